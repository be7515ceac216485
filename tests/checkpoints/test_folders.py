"""The shipped folders load offline and draw what they are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from dq import checkpoints
from dq.checkpoints.train.grid import draw

ASKED = ("automobile", "red apple", "evergreen tree", "umbrella")
DENOISERS = {
    "emoji-unet": ("unet/diffusion_pytorch_model.safetensors", StableDiffusionPipeline),
    "emoji-dit": ("transformer/diffusion_pytorch_model.safetensors", DiTPipeline),
}


@pytest.fixture(scope="module", params=sorted(DENOISERS))
def pipe(request: pytest.FixtureRequest) -> Any:
    return DiffusionPipeline.from_pretrained(checkpoints.path(request.param))


@pytest.fixture(scope="module")
def pictures(pipe: Any) -> Tensor:
    return draw(pipe, ASKED, steps=12)


def cosines(pictures: Tensor, names: tuple[str, ...]) -> Tensor:
    folder = checkpoints.path("emoji-clip")
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    tok = CLIPTokenizer.from_pretrained(folder)
    ids = tok(list(names), padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=2 * pictures - 1)
    return out.image_embeds @ out.text_embeds.T


@pytest.mark.parametrize("name", sorted(DENOISERS))
def test_loads_as_its_class_and_is_small(name: str) -> None:
    file, kind = DENOISERS[name]
    folder = checkpoints.path(name)
    assert isinstance(DiffusionPipeline.from_pretrained(folder), kind)
    assert (folder / file).stat().st_size < 14.5e6
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 25e6


def test_pictures_are_finite_and_not_flat(pictures: Tensor) -> None:
    assert pictures.shape == (len(ASKED), 3, 64, 64)
    assert pictures.isfinite().all()
    assert (pictures.flatten(1).std(1) > 0.05).all()


def test_a_seed_decides(pipe: Any, pictures: Tensor) -> None:
    assert torch.equal(draw(pipe, ASKED, steps=12), pictures)


def test_clip_tells_the_pictures_apart(pictures: Tensor) -> None:
    own = cosines(pictures, ASKED).argmax(1)
    assert int((own == torch.arange(len(ASKED))).sum()) >= len(ASKED) - 1


def test_the_empty_prompt_is_not_the_prompt(pipe: Any, pictures: Tensor) -> None:
    other = draw(pipe, ASKED[1:] + ASKED[:1], steps=12)
    assert (other - pictures).abs().mean() > 0.02


def test_every_class_has_a_label() -> None:
    pipe = DiTPipeline.from_pretrained(checkpoints.path("emoji-dit"))
    assert sorted(set(pipe.labels.values())) == list(range(1000))
    assert pipe.get_label_ids(["red apple"]) == pipe.get_label_ids(["apple"])


def test_tokenizer_keeps_unknown_words() -> None:
    tok = CLIPTokenizer.from_pretrained(checkpoints.path("emoji-unet") / "tokenizer")
    assert tok.model_max_length == 32
    ids = tok("Zebra ÿ 7!").input_ids
    assert tok.eos_token_id not in ids[:-1]
    assert ids[-1] == tok.eos_token_id == max(ids)


def test_image_processor_gives_the_range_of_the_training() -> None:
    from PIL import Image
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(checkpoints.path("emoji-clip"))
    pixels = processor(Image.new("RGB", (96, 96), "white"), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 64, 64)
    assert torch.allclose(pixels, torch.ones_like(pixels), atol=1e-2)
