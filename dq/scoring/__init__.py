"""Draw images on both sides, score them, and report: `dq eval`."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import PartialState
from torch import Tensor

import dq
from dq import checkpoints
from dq.calls import Call
from dq.errors import DQError, unknown
from dq.eval.clip import Clip
from dq.eval.features import Extractor, extractors
from dq.eval.reference import Reference
from dq.eval.resize import RULES
from dq.eval.score import DISTANCES, Scores, Side, check_metrics, score
from dq.pipelines.draw import default_prompts, repeated
from dq.pipelines.gallery import Gallery, Settings
from dq.pipelines.loading import resolve
from dq.pipelines.pipeline import DQPipeline
from dq.recipe import Recipe
from dq.scoring.page import write_page
from dq.scoring.replay import captured, outputs
from dq.scoring.report import FULL, Candidate, Report
from dq.work import fingerprint

__all__ = ["Asked", "Candidate", "Report", "run"]

_FEW = 10_000  # images below which FID says more about their number than about the model


@dataclass(frozen=True)
class Asked:
    """What is to be scored, and how.

    Args:
        metrics: Names, see `dq.eval.score.METRICS`.
        features: Name of the extractor for distances.
        weights: Its weights; None for those that come with it.
        rule: How images are resized for it.
        clip: CLIP model for the CLIP score, folder or hub name.
        reference: Folder of images, `.npz`, or pipeline to draw such images by, that both sides are
            compared with; None for none.
        dtype: Of everything that is not packed.
        device: Where pipelines and extractors run.
        skip_bad: Whether files of the reference that cannot be read are left out.
    """

    metrics: tuple[str, ...] = ("psnr", "ssim", "cosine", "clip", "fid", "kid")
    features: str = "emoji-clip"
    weights: Path | None = None
    rule: str = "clean"
    clip: str | None = None
    reference: Path | None = None
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    skip_bad: bool = False


def run(
    models: Sequence[str],
    against: str,
    folder: Path,
    asked: Asked,
    count: int,
    settings: Settings | None = None,
    prompts: Sequence[str] | None = None,
) -> Report | None:
    """Draw, score and write `report.html` and `scores.json`.

    Args:
        models: Quantized checkpoints, or recipes by which `against` is quantized.
        against: The full-precision checkpoint.
        folder: For the images; drawing continues where it stopped.
        asked: What to score.
        count: Images on each side.
        settings: Seed, steps, guidance and batch; its prompts are not used.
        prompts: What to draw, repeated if there are fewer than images; None for the pipeline's own.

    Returns:
        What was found; None in all but the first of several processes, which only draw.

    Raises:
        DQError: For everything that a user can mend.
    """
    if count < 2:
        raise DQError(f"-n {count}: scores need at least 2 images")
    _check_models(models)
    extractor, clip = _scorers(asked)
    pipe = DQPipeline.from_pretrained(against, dtype=asked.dtype).to(asked.device)
    words = repeated(prompts or default_prompts(pipe), count)
    settings = dataclasses.replace(settings or Settings(()), prompts=words)
    full = _gallery(pipe, against, folder / "full", settings)
    full.draw(pipe)
    weight = {
        "bits": pipe.footprint().average_weight_bits or 8.0 * asked.dtype.itemsize,
        "megabytes": pipe.footprint().stored_bytes / 1e6,
    }
    calls = captured(pipe, settings) if "sqnr" in asked.metrics else []
    exact = outputs(pipe, calls) if calls else None
    kind = type(pipe.denoiser).__name__
    del pipe
    drawn = [_draw(model, against, kind, folder, settings, asked, calls) for model in models]
    shown = _drawn_reference(asked, folder, settings, prompts)
    state = PartialState()
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    reference = _reference(asked, shown, extractor)
    other = Side(FULL, full.files, settings.prompts, full.latents(), exact)
    found = [score(each.side(), other, asked.metrics, extractor, clip, reference) for each in drawn]
    candidates = tuple(_candidate(d, full, f) for d, f in zip(drawn, found, strict=True))
    report = Report(weight, _facts(settings, asked, extractor, clip, reference), candidates, folder)
    (folder / "scores.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    write_page(report, full, [each.gallery for each in drawn])
    return report


def _scorers(asked: Asked) -> tuple[Extractor | None, Clip | None]:
    """Load extractors before anything is drawn: what is missing is said at once."""
    if not asked.metrics:
        raise DQError("no metric is asked for: leave --metrics out for the usual ones")
    check_metrics(asked.metrics)
    reference = asked.reference
    if reference is not None and not (reference.exists() or _is_pipeline(str(reference))):
        raise DQError(f"--reference {reference} does not exist")
    if asked.rule not in RULES:
        raise unknown("resize rule", asked.rule, RULES)
    extractor = clip = None
    if set(DISTANCES) & set(asked.metrics):
        extractor = extractors[asked.features](asked.weights, asked.rule, asked.device)
    if "clip" in asked.metrics:
        name = asked.clip or str(checkpoints.path("emoji-clip"))
        clip = Clip.load(name, asked.rule, asked.device)
    return extractor, clip


def _drawn_reference(
    asked: Asked, folder: Path, settings: Settings, prompts: Sequence[str] | None
) -> Gallery | None:
    """Draw the reference set if it is a pipeline; by default for that one's own prompts."""
    if asked.reference is None or not _is_pipeline(str(asked.reference)):
        return None
    name = str(asked.reference)
    pipe = DQPipeline.from_pretrained(name, dtype=asked.dtype).to(asked.device)
    words = repeated(prompts or default_prompts(pipe), len(settings.prompts))
    own = dataclasses.replace(settings, prompts=words)
    gallery = _gallery(pipe, name, folder / "reference", own)
    gallery.draw(pipe)
    return gallery


def _is_pipeline(name: str) -> bool:
    return name in checkpoints.names() or (Path(name) / "model_index.json").is_file()


def _gallery(pipe: Any, model: str, folder: Path, settings: Settings) -> Gallery:
    name = Path(resolve(model)).name  # however the way there is spelled
    return Gallery(folder, f"{name} {fingerprint(pipe.denoiser, {})}", settings)


@dataclass(frozen=True)
class _Drawn:
    """A candidate's images, what it puts out on calls of full precision, and what it weighs."""

    gallery: Gallery
    replayed: Tensor | None
    weighed: dict[str, Any]

    def side(self) -> Side:
        """Return what is scored."""
        gallery = self.gallery
        prompts, latents = gallery.settings.prompts, gallery.latents()
        return Side(gallery.folder.name, gallery.files, prompts, latents, self.replayed)


def _sized(name: str, settings: Settings) -> Recipe:
    """Return a recipe that is calibrated on images of the size that is drawn."""
    recipe = Recipe.get(name)
    size = recipe.calibration.size or settings.size
    return dataclasses.replace(
        recipe, calibration=dataclasses.replace(recipe.calibration, size=size)
    )


def _draw(
    model: str,
    against: str,
    kind: str,
    folder: Path,
    settings: Settings,
    asked: Asked,
    calls: Sequence[Call],
) -> _Drawn:
    recipe = _is_recipe(model)
    source, wanted = (against, _sized(model, settings)) if recipe else (model, None)
    pipe = DQPipeline.from_pretrained(source, wanted, dtype=asked.dtype).to(asked.device)
    name = Path(model).stem if recipe else Path(model).name
    if type(pipe.denoiser).__name__ != kind:
        raise DQError(
            f"{model} is a {type(pipe.denoiser).__name__}, {against} a {kind}: their images have "
            "nothing in common; compare checkpoints of one model"
        )
    gallery = _gallery(pipe, model, folder / name, settings)
    gallery.draw(pipe)
    count, growth = pipe.footprint(), gallery.peak_bytes()
    float_bits = 8.0 * asked.dtype.itemsize
    weighed = {
        "stored_bytes": count.stored_bytes,
        "bytes_on_disk": _files(source, pipe) if not recipe else None,
        "average_weight_bits": count.average_weight_bits or float_bits,
        "attention": "; ".join(report.words for report in count.attention) or "float",
        "compute_paths": {path: layers for path, (layers, _) in count.paths().items()},
        "peak_megabytes": None if growth is None else (count.resident_bytes + growth) / 1e6,
    }
    return _Drawn(gallery, outputs(pipe, calls) if calls else None, weighed)


def _candidate(drawn: _Drawn, full: Gallery, found: Scores) -> Candidate:
    time = _per_image(drawn.gallery)
    return Candidate(
        drawn.gallery.folder.name,
        found,
        **drawn.weighed,
        seconds_per_image=time,
        full_seconds_per_image=_per_image(full),
        seconds_per_step=time / full.settings.steps,
    )


def _reference(
    asked: Asked, shown: Gallery | None, extractor: Extractor | None
) -> Reference | None:
    """Return the reference set that both sides are compared with, if there is one."""
    if asked.reference is None or extractor is None:
        return None
    if shown is None:
        return Reference.load(asked.reference, extractor, asked.skip_bad)
    return Reference.of_files(str(asked.reference), shown.files, extractor, asked.skip_bad)


def _files(model: str, pipe: Any) -> int | None:
    """Return the bytes of a local checkpoint's denoiser files."""
    name = next(k for k, v in pipe.components.items() if v is pipe.denoiser)
    found = [f.stat().st_size for f in (Path(resolve(model)) / name).glob("*.safetensors")]
    return sum(found) or None


def _is_recipe(model: str) -> bool:
    """Whether a name means a recipe and not a checkpoint."""
    if Path(model).is_dir() or model in checkpoints.names():
        return False
    return Path(model).suffix in (".yaml", ".yml", ".json") or Recipe.is_name(model)


def _check_models(models: Sequence[str]) -> None:
    """Refuse names that mean nothing before anything is drawn; those with a slash may be hubs'."""
    for model in models:
        if not (_is_recipe(model) or _is_pipeline(model) or "/" in model or Path(model).exists()):
            Recipe.get(model)  # says which it may have meant


def _per_image(gallery: Gallery) -> float:
    sizes = [len(batch) for batch in gallery.batches()]
    return statistics.median(t / n for t, n in zip(gallery.seconds(), sizes, strict=True))


def _facts(
    settings: Settings, asked: Asked, extractor: Extractor | None, clip: Clip | None,
    reference: Reference | None,
) -> dict[str, Any]:  # fmt: skip
    count = len(settings.prompts)
    facts: dict[str, Any] = {
        "images": count,
        "seeds": f"{settings.seed} to {settings.seed + count - 1}",
        "steps": settings.steps,
        "features": extractor.name if extractor else "none",
        "licence": extractor.licence if extractor else "none",
        "resize": asked.rule,
        "clip": Path(clip.name).name if clip else "none",
        "reference": f"{reference.name} ({reference.count})" if reference else "none",
        "dtype": str(asked.dtype).removeprefix("torch."),
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "dq": dq.__version__,
    }
    if extractor is not None and count < _FEW:
        facts["warning"] = (
            f"FID of {count} images is biased: compare it at equal numbers only, or use KID"
        )
    return facts
