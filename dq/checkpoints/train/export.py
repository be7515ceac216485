"""Trained weights to the folders of the package: averaged, float16, in the layout of diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline, StableDiffusionPipeline
from transformers import CLIPTextModel

from dq.checkpoints.train import clip, data, dit, unet, vae
from dq.checkpoints.train.grid import PROMPTS
from dq.checkpoints.train.latents import scheduler
from dq.checkpoints.train.parts import Work

__all__ = ["export", "pipeline"]

_README = """# {name}

{what}.
Trained from scratch on the emoji artwork described below, as a small real network for
demonstrations, tests and benchmarks of quantization. It knows nothing but emoji.

{facts}

Made by `python -m dq.checkpoints.train`; `docs/checkpoints.md` tells how.

## Artwork and licence

The training pictures are Noto emoji, Copyright Google LLC, licensed under the Apache License,
Version 2.0 (<https://github.com/googlefonts/noto-emoji>), in the 64 px version of the npm package
`emoji-datasource-google` 16.0.0 (<https://github.com/iamcal/emoji-data>; its data and code: MIT,
Copyright Cal Henderson). The weights in this folder are distributed under the Apache License,
Version 2.0, as well (<https://www.apache.org/licenses/LICENSE-2.0>).
"""
_WHAT = {
    "emoji-unet": "A `StableDiffusionPipeline` that draws 64 px emoji from their names",
    "emoji-dit": "A `DiTPipeline` that draws 64 px emoji of 1,000 classes",
    "emoji-clip": "A `CLIPModel` that compares 64 px pictures with the names of emoji",
}
_PARTS = {
    "emoji-unet": ("vae", "clip", "unet"),
    "emoji-dit": ("vae", "dit"),
    "emoji-clip": ("clip",),
}


def pipeline(work: Work, part: str) -> Any:
    """Build the pipeline around the denoiser `part` ("unet" or "dit") as trained so far.

    Returns:
        A `StableDiffusionPipeline` or a `DiTPipeline`, float32.
    """
    work.latents  # noqa: B018  (sets the scaling factor of the autoencoder)
    if part == "unet":
        trained = work.trained("unet", unet.TextUNet(work.clip))
        text: Any = CLIPTextModel(work.clip.text_model.config)
        text.load_state_dict(trained.text.state_dict())
        return StableDiffusionPipeline(
            vae=work.vae,
            text_encoder=text.to(work.device).eval(),
            tokenizer=work.tokenizer,
            unet=trained.unet,
            scheduler=scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    model = work.trained("dit", dit.build())
    return DiTPipeline(model, work.vae, scheduler(), id2label=_labels(work.art))


def export(work: Work, target: Path) -> None:
    """Write `emoji-unet`, `emoji-dit` and `emoji-clip` into `target`, replacing what is there.

    Args:
        work: What was trained.
        target: The folder to hold the three folders; created if missing.
    """
    scores = _scores(work)
    _save(work, "unet", _fresh(target / "emoji-unet"))
    _save(work, "dit", _fresh(target / "emoji-dit"))
    _save_clip(work, _fresh(target / "emoji-clip"))
    for name, parts in _PARTS.items():
        facts = "\n".join(f"- {_fact(work, part, scores)}" for part in parts)
        text = _README.format(name=name, what=_WHAT[name], facts=facts)
        (target / name / "README.md").write_text(text)
        if name != "emoji-clip":
            (target / name / "prompts.txt").write_text("\n".join(_prompts(work.art)) + "\n")
        _tidy(target / name)


def _save(work: Work, part: str, folder: Path) -> None:
    """Write one pipeline in float16."""
    pipe = pipeline(work, part)
    pipe.to(torch.float16).save_pretrained(folder)
    work.vae.float()
    if part == "unet":
        clip.save_tokenizer(work.tokenizer, folder / "tokenizer")
        return
    # The pipeline takes the labels but does not save them.
    file = folder / "model_index.json"
    index = json.loads(file.read_text()) | {"id2label": _labels(work.art)}
    file.write_text(json.dumps(index, indent=1, ensure_ascii=False))


def _save_clip(work: Work, folder: Path) -> None:
    """Write the CLIP model in float16 with its tokenizer and its image processor."""
    work.clip.half().save_pretrained(folder)
    work.clip.float()
    clip.save_tokenizer(work.tokenizer, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor(), indent=1))


def _tidy(folder: Path) -> None:
    """Let everyone read the files, and let transformers load float32, as diffusers does."""
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
        if file.name == "config.json":
            text = file.read_text()
            file.write_text(text.replace('"dtype": "float16"', '"dtype": "float32"'))


def _fresh(folder: Path) -> Path:
    """Empty `folder`."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def _scores(work: Work) -> dict[str, str]:
    """Measure the autoencoder and the CLIP model on the training pictures."""
    mean = work.latents.mean.cpu() / work.latents.scale
    decibels = vae.psnr(work.vae, work.art, mean)
    hits = clip.retrieval(work.clip, work.tokenizer, work.art)
    scores = {
        "vae": f"reconstruction PSNR {decibels.mean():.2f} dB (mean), {decibels.min():.2f} (least)",
        "clip": f"top-1 retrieval {hits:.1%} among 64 names",
    }
    for line in scores.values():
        print(line)
    return scores


def _fact(work: Work, part: str, scores: dict[str, str]) -> str:
    """Say in one line how `part` was trained."""
    found = work.facts(part)
    words = [f"{part}:"]
    if found:
        words.append(
            f"{found['step']:,.0f} steps, {found['seconds'] / 60:.0f} minutes on one CPU core,"
        )
        words.append(f"loss {found['loss']:.4f}")
    if part in scores:
        words.append(f"({scores[part]})")
    return " ".join(words)


def _labels(art: data.Artwork) -> dict[str, str]:
    """Name every class; commas separate a name and its aliases, an alias names its first class."""
    seen: set[str] = set()
    labels = {}
    for n, index in enumerate(dit.chosen(art)):
        captions = [c for c in art.emoji[index].captions if c not in seen and "," not in c]
        seen.update(captions)
        labels[str(n)] = ", ".join(captions)
    return labels


def _prompts(art: data.Artwork, count: int = 64) -> list[str]:
    """Name what the checkpoints draw well: the documented grid, then classes spread evenly."""
    names = list(PROMPTS)
    others = [c for n in dit.chosen(art) if (c := art.emoji[n].captions[0]) not in names]
    step = len(others) // (count - len(names))
    return names + others[::step][: count - len(names)]


def _preprocessor() -> dict[str, Any]:
    """Describe the image processor: 64 px, values in [-1, 1]."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": data.SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": data.SIZE, "width": data.SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
