"""All scores of one set of images against another, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq.distance import sqnr
from dq.errors import DQError, check_known
from dq.eval.clip import Clip
from dq.eval.features import Extractor
from dq.eval.frechet import Moments
from dq.eval.images import read_batches
from dq.eval.kernel import cmmd, kid
from dq.eval.manifold import precision_recall
from dq.eval.paired import (
    Paired,
    check_lpips,
    paired_cosine,
    paired_lpips,
    paired_psnr,
    paired_ssim,
)
from dq.eval.reference import Reference, features_of_files, moments_of_files

__all__ = ["DISTANCES", "METRICS", "Scores", "Side", "check_metrics", "score"]

DISTANCES = ("fid", "kid", "cmmd", "precision", "recall")
_PAIRED: dict[str, Callable[[Tensor, Tensor], Paired]] = {
    "psnr": paired_psnr,
    "ssim": paired_ssim,
    "lpips": paired_lpips,
}
METRICS = ("psnr", "ssim", "cosine", "lpips", "sqnr", "clip", *DISTANCES)
_BATCH = 32
_MOST_SQNR = 200.0  # of equal outputs, so that JSON has a number


@dataclass(frozen=True)
class Side:
    """The images of one pipeline.

    Attributes:
        name: What reports call it.
        files: One a prompt.
        prompts: What was drawn.
        latents: What was decoded, `(N, ...)`, or None.
        outputs: What the denoiser put out on arguments that are the same on both sides, any shape,
            or None.
    """

    name: str
    files: Sequence[Path]
    prompts: Sequence[str]
    latents: Tensor | None = None
    outputs: Tensor | None = None


@dataclass(frozen=True)
class Scores:
    """What one side scored.

    Attributes:
        metrics: By name. Distances are to the other side, `-reference` ones to a reference set.
        baseline: What full precision scored where it scores alone: clip, and all `-reference` ones.
        spread: Standard deviation over images of what is measured an image, and kid's standard
            error.
        images: By metric, one number an image.
    """

    metrics: Mapping[str, float]
    baseline: Mapping[str, float]
    spread: Mapping[str, float]
    images: Mapping[str, tuple[float, ...]]

    def worst(self, count: int = 8) -> list[int]:
        """Return the indices of the images that differ most; none without a metric an image."""
        name = next((n for n in ("psnr", "ssim", "cosine", "clip") if n in self.images), None)
        values = () if name is None else self.images[name]
        return sorted(range(len(values)), key=lambda index: values[index])[:count]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return dataclasses.asdict(self)


def check_metrics(metrics: Sequence[str]) -> None:
    """Refuse names that are no metrics, and those whose package is missing.

    Raises:
        DQError: Names the nearest, or the package.
    """
    check_known("metric", metrics, METRICS)
    if "lpips" in metrics:
        check_lpips()


def score(
    side: Side,
    full: Side,
    metrics: Sequence[str],
    extractor: Extractor | None,
    clip: Clip | None,
    reference: Reference | None = None,
) -> Scores:
    """Score a side against full precision.

    Args:
        side: What is judged.
        full: What it is compared with; same prompts, same order, same seeds.
        metrics: Some of `METRICS`.
        extractor: For distances; None if none is asked for.
        clip: For the CLIP score; None if it is not asked for.
        reference: A further set that both sides are compared with.

    Raises:
        DQError: For unknown metrics, sides that do not belong together, and images that cannot be
            scored.
    """
    check_metrics(metrics)
    if list(side.prompts) != list(full.prompts):
        raise DQError(
            f"{side.name} and {full.name} were drawn for different prompts; draw both anew"
        )
    found = _Found({}, {}, {}, {})
    _pair(found, side, full, metrics)
    if clip is not None and "clip" in metrics:
        texts = clip.embed_texts(side.prompts)
        mine, theirs = (_clip_scores(clip, each.files, texts) for each in (side, full))
        found.each("clip", Paired(mine))
        found.baseline["clip"] = Paired(theirs).mean
    asked = [name for name in metrics if name in DISTANCES]
    if extractor is not None and asked:
        ours, theirs_ = (_features(each.files, extractor, asked) for each in (side, full))
        known = {"moments" if isinstance(theirs_, Moments) else "features": theirs_}
        near = Reference(full.name, len(full.files), **known)  # type: ignore[arg-type]
        _distances(found.metrics, found.spread, asked, ours, near)
        if reference is not None:
            _distances(found.metrics, found.spread, asked, ours, reference, "-reference")
            _distances(found.baseline, {}, asked, theirs_, reference, "-reference")
    return Scores(found.metrics, found.baseline, found.spread, found.images)


@dataclass(frozen=True)
class _Found:
    metrics: dict[str, float]
    baseline: dict[str, float]
    spread: dict[str, float]
    images: dict[str, tuple[float, ...]]

    def each(self, name: str, values: Paired) -> None:
        """Note a metric that every image has."""
        self.metrics[name], self.spread[name] = values.mean, values.spread
        self.images[name] = values.values


def _pair(found: _Found, side: Side, full: Side, metrics: Sequence[str]) -> None:
    asked = [name for name in _PAIRED if name in metrics]
    values: dict[str, list[float]] = {name: [] for name in asked}
    if asked:
        both = zip(read_batches(side.files, _BATCH), read_batches(full.files, _BATCH), strict=True)
        for (one, _), (two, _) in both:
            for name in asked:
                values[name] += _PAIRED[name](one, two).values
    for name in asked:
        found.each(name, Paired(tuple(values[name])))
    if "cosine" in metrics and side.latents is not None and full.latents is not None:
        found.each("cosine", paired_cosine(side.latents, full.latents))
    if "sqnr" in metrics and side.outputs is not None and full.outputs is not None:
        found.metrics["sqnr"] = min(sqnr(side.outputs, full.outputs), _MOST_SQNR)


def _clip_scores(clip: Clip, files: Sequence[Path], texts: Tensor) -> tuple[float, ...]:
    embedded = [clip.embed_images(images) for images, _ in read_batches(files, _BATCH)]
    return tuple(clip.scores_of(torch.cat(embedded), texts).tolist())


def _features(
    files: Sequence[Path], extractor: Extractor, asked: Sequence[str]
) -> Tensor | Moments:
    """Return what the distances need: moments are enough for FID, and of many images smaller."""
    if set(asked) == {"fid"} and len(files) > extractor.dimension:
        return moments_of_files(files, extractor)
    return features_of_files(files, extractor)


def _distances(
    metrics: dict[str, float],
    spread: dict[str, float],
    asked: Sequence[str],
    features: Tensor | Moments,
    reference: Reference,
    suffix: str = "",
) -> None:
    paired = suffix == ""  # full precision drew the same seeds
    if "fid" in asked:
        metrics[f"fid{suffix}"] = reference.fid(features)
    if isinstance(features, Moments):
        return  # nothing else was asked for
    if "kid" in asked:
        estimate = kid(features, reference.images("kid"), paired=paired)
        metrics[f"kid{suffix}"], spread[f"kid{suffix}"] = estimate.value, estimate.error
    if "cmmd" in asked:
        metrics[f"cmmd{suffix}"] = cmmd(features, reference.images("cmmd"), paired)
    if "precision" in asked or "recall" in asked:
        found = precision_recall(features, reference.images("precision"))
        for name, value in zip(("precision", "recall"), found, strict=True):
            if name in asked:
                metrics[name + suffix] = value
