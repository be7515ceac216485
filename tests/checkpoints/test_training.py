"""The four trainees on invented artwork: one step each, and what the sampling promises."""

from __future__ import annotations

import pytest
import torch

from dq.checkpoints.train import clip, dit, latents, unet, vae
from dq.checkpoints.train.data import Artwork, Emoji
from dq.checkpoints.train.loop import Plan, Run


@pytest.fixture(scope="module")
def art() -> Artwork:
    names = [("red apple", "apple"), ("tall tree",), ("hand, dark skin tone",), ("small boat",)]
    tones = [True, True, False, True]
    emoji = tuple(
        Emoji(min(n, 2) if n != 2 else 1, captions, f"{n}.png", "Objects", "tool", default)
        for n, (captions, default) in enumerate(zip(names, tones, strict=True))
    )
    pictures = torch.randint(256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    return Artwork(emoji, pictures.byte())


@pytest.fixture(scope="module")
def encoded(art: Artwork) -> latents.Latents:
    torch.manual_seed(0)
    return latents.Latents(*vae.encode(vae.build(), art), "cpu")


def test_default_tone_is_drawn_more_often(art: Artwork) -> None:
    assert art.weights.sum() == pytest.approx(1)
    assert art.weights[1] / art.weights[2] == pytest.approx(0.6 / 0.4)
    assert art.weights[0] == pytest.approx(float(art.weights[1] + art.weights[2]))


def test_latents_have_unit_variance(encoded: latents.Latents) -> None:
    total = encoded.mean.var() + encoded.std.square().mean()
    assert float(total) == pytest.approx(1, rel=1e-3)


def test_velocity_recovers_the_clean_latents(encoded: latents.Latents) -> None:
    batch = encoded.noised(torch.tensor([0, 1, 2, 3]), torch.Generator().manual_seed(0))
    alphas = latents.scheduler().alphas_cumprod[batch.t].view(-1, 1, 1, 1)
    clean = alphas.sqrt() * batch.x - (1 - alphas).sqrt() * batch.velocity
    spread = encoded.std.max() * 6
    assert (clean - encoded.mean).abs().max() < spread


def test_schedule_ends_in_pure_noise() -> None:
    schedule = latents.scheduler()
    assert schedule.alphas_cumprod[-1] == 0
    assert not schedule.config.clip_sample


@pytest.mark.parametrize("part", ["vae", "clip", "unet", "dit"])
def test_every_part_learns(part: str, art: Artwork, encoded: latents.Latents, tmp_path) -> None:
    torch.manual_seed(0)
    tok = clip.tokenizer(art)
    if part == "vae":
        trainee = vae.VaeTrainee(art, "cpu", 2)
    elif part == "clip":
        trainee = clip.ClipTrainee(art, tok, "cpu", 4)
    elif part == "unet":
        trainee = unet.UNetTrainee(encoded, art, tok, clip.build(tok), 2)
    else:
        trainee = dit.DiTTrainee(encoded, art, 2)
        trainee.pictures = torch.arange(dit.CLASSES) % 4
    run = Run(trainee, Plan(4, 1e-3, batch=2, warmup=1), tmp_path)
    before = [p.clone() for p in run.ema.parameters()]
    run.train()
    assert all(p.isfinite().all() for p in trainee.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, run.ema.parameters(), strict=True))


def test_tokenizer_reloads_offline(art: Artwork, tmp_path) -> None:
    tok = clip.tokenizer(art)
    clip.save_tokenizer(tok, tmp_path)
    again = clip.CLIPTokenizer.from_pretrained(tmp_path)
    assert again("Tall TREE, 9é").input_ids == tok("Tall TREE, 9é").input_ids
    assert (tmp_path / "merges.txt").exists()
