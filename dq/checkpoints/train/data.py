"""The emoji artwork: download, pictures, captions and how often each one is drawn.

The pictures are Google's Noto emoji (Apache-2.0) as packed in the npm package
`emoji-datasource-google`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tarfile
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["SIZE", "URL", "Artwork", "Emoji", "fetch", "load"]

URL = "https://registry.npmjs.org/emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz"
_SHA512 = "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="
SIZE = 64
_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
# What a person can hardly tell apart at 64 pixels is drawn less often: objects get the steps.
_RARE = {"Flags": 0.1, "Symbols": 0.2, "Component": 0.2, "People & Body": 0.2}
_DEFAULT_SHARE = 0.6


@dataclass(frozen=True)
class Emoji:
    """One picture with its captions.

    Attributes:
        base: The number of the emoji this picture shows (tones of one emoji share it).
        captions: The lower-case name first, then the aliases; all carry the skin tone, if any.
        picture: The file name of the 64 px picture.
        group: The Unicode group, such as `Animals & Nature`.
        subgroup: The Unicode subgroup, such as `animal-mammal`.
        default: Whether this is the emoji without an explicit skin tone.
    """

    base: int
    captions: tuple[str, ...]
    picture: str
    group: str
    subgroup: str
    default: bool


@dataclass(frozen=True)
class Artwork:
    """All pictures with their captions.

    Attributes:
        emoji: One entry a picture.
        pictures: `(N, 3, 64, 64)` uint8 on a white background, in the order of `emoji`.
    """

    emoji: tuple[Emoji, ...]
    pictures: Tensor

    @cached_property
    def weights(self) -> Tensor:
        """`(N,)` float probabilities: every base emoji of a group alike, its default tone 60 %."""
        tones = torch.bincount(torch.tensor([e.base for e in self.emoji]))
        values = []
        for e in self.emoji:
            others = int(tones[e.base]) - 1
            share = _DEFAULT_SHARE if e.default else (1 - _DEFAULT_SHARE) / max(others, 1)
            values.append(_RARE.get(e.group, 1.0) * (share if others else 1.0))
        weights = torch.tensor(values)
        return weights / weights.sum()

    def images(self, index: Tensor) -> Tensor:
        """Return the pictures `index` as `(B, 3, 64, 64)` float32 in [-1, 1]."""
        return self.pictures[index].float().div_(127.5).sub_(1)


def fetch(cache: Path) -> Path:
    """Download and unpacks the artwork once.

    Args:
        cache: The folder to keep it in; what is there already is not downloaded again.

    Returns:
        The folder that holds `emoji.json` and `img/google/64`.

    Raises:
        ValueError: The download is not the file whose checksum is pinned here.
    """
    folder = cache / "package"
    if (folder / "complete").exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / URL.rsplit("/", 1)[1]
    if not archive.exists():
        partial = archive.with_suffix(".part")
        with urllib.request.urlopen(URL) as source:
            partial.write_bytes(source.read())
        partial.replace(archive)
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != _SHA512:
        raise ValueError(f"{archive}: sha512 is {digest}, expected {_SHA512}; delete it and retry")
    with tarfile.open(archive) as tar:
        wanted = [m for m in tar if re.fullmatch(r"package/(emoji\.json|img/google/64/.*)", m.name)]
        tar.extractall(cache, members=wanted, filter="data")
    (folder / "complete").touch()
    return folder


def load(cache: Path) -> Artwork:
    """Read all emoji that have a picture.

    Args:
        cache: The folder given to `fetch`.

    Returns:
        The artwork; its order depends on the package only.
    """
    folder = fetch(cache)
    entries = json.loads((folder / "emoji.json").read_text())
    entries = sorted((e for e in entries if e["has_img_google"]), key=lambda e: e["sort_order"])
    names = {str(e["name"]).lower() for e in entries}
    emoji = tuple(e for n, entry in enumerate(entries) for e in _variants(n, entry, names))
    pictures = [_picture(folder / "img/google/64" / e.picture) for e in emoji]
    return Artwork(emoji, torch.from_numpy(np.stack(pictures)))


def _variants(base: int, entry: dict[str, Any], names: set[str]) -> list[Emoji]:
    """The emoji itself and its skin tones."""
    name = str(entry["name"]).lower()
    aliases = [re.sub(r"[_-]", " ", s).strip() for s in entry["short_names"]]
    # An alias that ends in a digit, or is the name of another emoji ("mouse"), would mislead.
    aliases = [a for a in aliases if a not in names and not a[-1].isdigit() and len(a) > 1]
    captions = tuple(dict.fromkeys([name, *aliases]))
    group, subgroup = str(entry["category"]), str(entry["subcategory"])
    found = [Emoji(base, captions, str(entry["image"]), group, subgroup, True)]
    for code, variant in entry.get("skin_variations", {}).items():
        if not variant["has_img_google"]:
            continue
        tone = " and ".join(_TONES[c] for c in code.split("-")) + " skin tone"
        toned = tuple(f"{c}, {tone}" for c in captions)
        found.append(Emoji(base, toned, str(variant["image"]), group, subgroup, False))
    return found


def _picture(file: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read one picture as (3, 64, 64) uint8 on white."""
    picture = Image.open(file).convert("RGBA")
    if picture.size != (SIZE, SIZE):
        # A few emoji are one or two pixels off; centred, not stretched.
        picture.thumbnail((SIZE, SIZE))
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    corner = ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2)
    canvas.alpha_composite(picture, corner)
    return np.asarray(canvas.convert("RGB")).transpose(2, 0, 1)
