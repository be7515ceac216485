from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from dq import checkpoints
from dq.errors import DQError
from dq.eval.clip import Clip

FOLDER = checkpoints.path("emoji-clip")
TEXTS = ["red apple", "a very long text " * 30, "dog face"]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip.load(str(FOLDER))


def images(size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, size, size), generator=generator, dtype=torch.uint8)


def test_equals_transformers_own_way(clip: Clip) -> None:
    model, tokenizer = (
        CLIPModel.from_pretrained(FOLDER).eval(),
        CLIPTokenizer.from_pretrained(FOLDER),
    )
    before = CLIPImageProcessorPil.from_pretrained(FOLDER)
    with torch.no_grad():
        pixels = before([i.permute(1, 2, 0).numpy() for i in images()], return_tensors="pt")
        tokens = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
        out = model(**pixels, **tokens)
    expected = 100 * (out.image_embeds * out.text_embeds).sum(1).clamp_min(0)
    assert torch.allclose(clip.scores(images(), TEXTS), expected, atol=1e-3)


def test_each_text_is_embedded_alone(clip: Clip) -> None:
    together, alone = clip.embed_texts(TEXTS), clip.embed_texts(TEXTS[2:])
    assert torch.allclose(together[2:], alone, atol=1e-4)


def test_mistakes(clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(DQError, match="3 images cannot be scored for 2 prompts"):
        clip.scores(images(), TEXTS[:2])
    with pytest.raises(DQError, match="uint8, not float32"):
        clip.embed_images(images() / 255)
    with pytest.raises(DQError, match=r"no config\.json"):
        Clip.load(str(tmp_path))
    with pytest.raises(DQError, match="--features emoji-clip"):
        Clip.load("nobody/no-such-model")
