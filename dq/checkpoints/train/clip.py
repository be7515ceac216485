"""The CLIP model: captions and pictures in one space, and the tokenizer of the captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from dq.checkpoints.train.data import SIZE, Artwork, Emoji

__all__ = ["LENGTH", "ClipTrainee", "build", "retrieval", "save_tokenizer", "tokenize", "tokenizer"]

LENGTH = 32
_VOCABULARY = 2048
_NAME_SHARE = 0.6


def tokenizer(art: Artwork) -> CLIPTokenizer:
    """Learn a byte-level BPE of 2,048 tokens from the captions.

    The vocabulary is laid out as OpenAI's: all bytes, all bytes that end a word, the merges, then
    start and end of text; so every string can be encoded, and the end token has the largest number.
    """
    shape = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = shape.normalizer, shape.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = alphabet + [f"{a}</w>" for a in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator([c for e in art.emoji for c in e.captions], trainer)
    found = json.loads(learner.to_str())["model"]["merges"]
    merges: list[Any] = [(left, right) for left, right in found][: _VOCABULARY - len(letters) - 2]
    words = [*letters, *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: n for n, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def save_tokenizer(tok: CLIPTokenizer, folder: Path) -> None:
    """Write the tokenizer for this and for older releases of transformers."""
    tok.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}")


def tokenize(tok: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return the `(N, 32)` int64 token numbers, padded as the pipelines pad."""
    ids = tok(captions, padding="max_length", max_length=LENGTH, truncation=True).input_ids
    return torch.tensor(ids)


class Captions:
    """The token numbers of all captions, to draw from.

    Args:
        tok: The tokenizer.
        emoji: Whose captions.
    """

    def __init__(self, tok: CLIPTokenizer, emoji: tuple[Emoji, ...]) -> None:
        self.counts = torch.tensor([len(e.captions) for e in emoji])
        self.starts = self.counts.cumsum(0) - self.counts
        self.ids = tokenize(tok, [c for e in emoji for c in e.captions])

    def rows(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the rows of `ids` for the pictures `index`: the name, or else one of its aliases.

        Args:
            index: `(B,)` numbers of pictures.
            generator: Decides.

        Returns:
            `(B,)` row numbers.
        """
        alias = torch.rand(len(index), generator=generator) >= _NAME_SHARE
        others = self.counts[index] - 1
        drawn = (torch.rand(len(index), generator=generator) * others).long() + 1
        return self.starts[index] + torch.where(alias & (others > 0), drawn, 0)


def build(tok: CLIPTokenizer) -> CLIPModel:
    """Return the untrained model (about 5 M parameters); its text tower serves the pipelines."""
    text = {
        "vocab_size": len(tok),
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "hidden_act": "gelu",
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
    }
    vision = {
        "image_size": SIZE,
        "patch_size": 8,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=192))


class ClipTrainee:
    """The symmetric contrastive loss of CLIP over a batch of distinct pictures.

    The pictures are shifted, softened and made noisy, so that the score is fair to what a small
    denoiser draws.

    Args:
        art: Pictures and captions.
        tok: The tokenizer of the captions.
        device: Where to compute.
        batch: Pairs a step.
    """

    name = "clip"

    def __init__(self, art: Artwork, tok: CLIPTokenizer, device: str, batch: int) -> None:
        model: Any = build(tok)
        self.model = model.to(device)
        # On a CPU the backward pass of the fused attention is slower than plain matrix products.
        self.model.set_attn_implementation("eager")
        self.captions = Captions(tok, art.emoji)
        # The text tower is causal: padding behind the longest caption only costs time.
        self.longest = 1 + int((self.captions.ids != tok.eos_token_id).sum(1).max())
        self.art, self.device, self.batch = art, device, batch

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the loss of one batch, see `Trainee`."""
        index = torch.multinomial(self.art.weights, self.batch, generator=generator)
        ids = self.captions.ids[self.captions.rows(index, generator), : self.longest]
        pixels = _disturb(self.art.images(index), generator)
        out = self.model(input_ids=ids.to(self.device), pixel_values=pixels.to(self.device))
        with torch.autocast(torch.device(self.device).type, enabled=False):
            scale = self.model.logit_scale.clamp(max=4.6052).exp()
            logits = scale * out.text_embeds.float() @ out.image_embeds.float().T
            target = torch.arange(len(index), device=logits.device)
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _disturb(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 3 px, softens a third of the pictures, adds noise to all."""
    down, right = torch.randint(-3, 4, (2,), generator=generator).tolist()
    pixels = F.pad(pixels, (3, 3, 3, 3), value=1.0)
    pixels = pixels[..., 3 + down : 3 + down + SIZE, 3 + right : 3 + right + SIZE]
    chance = torch.rand(2, len(pixels), 1, 1, 1, generator=generator)
    soft = F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    pixels = torch.where(chance[0] < 1 / 3, soft, pixels)
    noise = torch.randn(pixels.shape, generator=generator)
    return pixels + 0.15 * chance[1] * noise


@torch.no_grad()
def retrieval(model: CLIPModel, tok: CLIPTokenizer, art: Artwork, among: int = 64) -> float:
    """Measure how often a picture's own name scores best among `among` random names.

    Returns:
        The top-1 accuracy in [0, 1] over all pictures, in one seeded shuffled order.
    """
    model.eval()
    device = next(model.parameters()).device
    order = torch.randperm(len(art.emoji), generator=torch.Generator().manual_seed(0))
    hits = 0
    groups = [g for g in order.split(among) if len(g) == among]
    for group in groups:
        ids = tokenize(tok, [art.emoji[i].captions[0] for i in group.tolist()])
        out = model(input_ids=ids.to(device), pixel_values=art.images(group).to(device))
        best = (out.image_embeds @ out.text_embeds.T).argmax(1)
        hits += int((best.cpu() == torch.arange(among)).sum())
    return hits / (among * len(groups))
