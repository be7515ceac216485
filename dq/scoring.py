"""Draw images on both sides, score them, and report: `dq eval`."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import PartialState
from PIL import Image, ImageChops

import dq
from dq import checkpoints
from dq.errors import DQError, unknown
from dq.eval.clip import Clip
from dq.eval.curve import curve
from dq.eval.features import Extractor, extractors
from dq.eval.gate import Gate
from dq.eval.grid import grid
from dq.eval.reference import Reference
from dq.eval.report import Page
from dq.eval.resize import RULES
from dq.eval.score import Scores, Side, check_metrics, score
from dq.pipelines.draw import default_prompts
from dq.pipelines.gallery import Gallery, Settings
from dq.pipelines.pipeline import DQPipeline, resolve
from dq.recipe import templates
from dq.work import fingerprint

__all__ = ["Asked", "Candidate", "Report", "run"]

_FULL = "full precision"
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


@dataclass(frozen=True)
class Candidate:
    """One quantized pipeline and what it scored.

    Attributes:
        name: Checkpoint, or recipe.
        scores: Against full precision.
        stored_bytes: All tensors of the denoiser.
        bytes_on_disk: Its weight files; None for a recipe, which has none.
        average_weight_bits: Scales included; 16 or 32 if it is not quantized.
        compute_paths: Number of layers by what they compute on.
        peak_megabytes: The denoiser with its copies, and what drawing a batch takes for a while;
            1e6 bytes, None if the system does not tell.
        seconds_per_image: Median over the batches, text encoder and decoder included.
        full_seconds_per_image: Of full precision.
        seconds_per_step: The same over the steps.
    """

    name: str
    scores: Scores
    stored_bytes: int
    bytes_on_disk: int | None
    average_weight_bits: float
    compute_paths: Mapping[str, int]
    peak_megabytes: float | None
    seconds_per_image: float
    full_seconds_per_image: float
    seconds_per_step: float


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        full: Bits and megabytes of full precision.
        facts: Extractor, resize rule, number of images, seeds, versions.
        candidates: One a pipeline.
        folder: Where images and page are.
    """

    full: Mapping[str, float]
    facts: Mapping[str, Any]
    candidates: tuple[Candidate, ...]
    folder: Path

    @property
    def metrics(self) -> Mapping[str, float]:
        """The scores of the first candidate, which gates hold against their thresholds."""
        return self.candidates[0].scores.metrics

    def failures(self, gates: Sequence[Gate]) -> list[str]:
        """Return a line for each threshold that a candidate missed."""
        found = []
        for each in self.candidates:
            for gate in gates:
                line = gate.failure(each.scores.metrics, each.scores.baseline)
                if line is not None:
                    found.append(f"{each.name}: {line}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; `metrics` are those of the first candidate."""
        return {
            "metrics": dict(self.metrics),
            "baseline": dict(self.candidates[0].scores.baseline),
            "facts": dict(self.facts),
            "candidates": [dataclasses.asdict(each) for each in self.candidates],
            "folder": str(self.folder),
        }

    def rows(self) -> list[dict[str, object]]:
        """Return a table of sizes, times and scores, full precision in its first line."""
        rows: list[dict[str, object]] = [
            {"": _FULL, "bits": f"{self.full['bits']:.2f}", "MB": f"{self.full['megabytes']:.2f}"}
        ]
        for each in self.candidates:
            size = each.stored_bytes if each.bytes_on_disk is None else each.bytes_on_disk
            bits = f"{each.average_weight_bits:.2f}"
            rows.append({"": each.name, "bits": bits, "MB": f"{size / 1e6:.2f}"})
        self._add_scores(rows, reference=False)
        times = [self.candidates[0].full_seconds_per_image]
        times += [each.seconds_per_image for each in self.candidates]
        peaks = [None, *(each.peak_megabytes for each in self.candidates)]
        for row, time, peak in zip(rows, times, peaks, strict=True):
            row |= {"peak MB": "" if peak is None else f"{peak:.0f}", "s/image": f"{time:.3f}"}
        return rows

    def reference_rows(self) -> list[dict[str, object]]:
        """Return a table of the distances to the reference set; empty without one."""
        rows: list[dict[str, object]] = [
            {"": name} for name in (_FULL, *(each.name for each in self.candidates))
        ]
        self._add_scores(rows, reference=True)
        return rows if len(rows[0]) > 1 else []

    def _add_scores(self, rows: list[dict[str, object]], reference: bool) -> None:
        """Add the columns of metrics to the reference set, or of all others."""
        names = dict.fromkeys(n for c in self.candidates for n in c.scores.metrics)
        for name in [n for n in names if n.endswith("-reference") is reference]:
            rows[0][name] = _number(self.candidates[0].scores.baseline.get(name))
            for row, each in zip(rows[1:], self.candidates, strict=True):
                spread = each.scores.spread.get(name)
                value = _number(each.scores.metrics.get(name))
                row[name] = value if spread is None else f"{value} ± {spread:.2g}"

    def __str__(self) -> str:
        lines = _lines_of(self.rows())
        if self.reference_rows():
            lines += ["", *_lines_of(self.reference_rows())]
        lines += ["", ", ".join(f"{k} {v}" for k, v in self.facts.items() if k != "warning")]
        if "warning" in self.facts:
            lines.append(f"warning: {self.facts['warning']}")
        return "\n".join([*lines, f"look at {self.folder}/report.html"])


def _lines_of(rows: Sequence[Mapping[str, object]]) -> list[str]:
    table = [list(rows[0]), *([str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in table]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


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
    extractor, clip = _scorers(asked)
    pipe = DQPipeline.from_pretrained(against, dtype=asked.dtype).to(asked.device)
    words = tuple(prompts or default_prompts(pipe))
    settings = dataclasses.replace(
        settings or Settings(()), prompts=tuple(words[i % len(words)] for i in range(count))
    )
    full = _gallery(pipe, against, folder / "full", settings)
    full.draw(pipe)
    weight = {
        "bits": pipe.footprint().average_weight_bits or 8.0 * asked.dtype.itemsize,
        "megabytes": pipe.footprint().stored_bytes / 1e6,
    }
    del pipe
    drawn = [_draw(model, against, folder, settings, asked) for model in models]
    shown = _drawn_reference(asked, folder, settings, prompts)
    state = PartialState()
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    reference = None
    if asked.reference is not None and extractor is not None:
        if shown is None:
            reference = Reference.load(asked.reference, extractor, asked.skip_bad)
        else:
            name = str(asked.reference)
            reference = Reference.of_files(name, shown.files, extractor, asked.skip_bad)
    other = Side(_FULL, full.files, settings.prompts, full.latents())
    candidates = []
    for gallery, weighed in drawn:
        side = Side(gallery.folder.name, gallery.files, settings.prompts, gallery.latents())
        found = score(side, other, asked.metrics, extractor, clip, reference)
        time, full_time = (_per_image(g) for g in (gallery, full))
        per_step = time / settings.steps
        candidates.append(
            Candidate(gallery.folder.name, found, **weighed, seconds_per_image=time,
                      full_seconds_per_image=full_time, seconds_per_step=per_step)
        )  # fmt: skip
    report = Report(
        weight, _facts(settings, asked, extractor, clip, reference), tuple(candidates), folder
    )
    (folder / "scores.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    _page(report, full, [gallery for gallery, _ in drawn])
    return report


def _scorers(asked: Asked) -> tuple[Extractor | None, Clip | None]:
    """Load extractors before anything is drawn: what is missing is said at once."""
    check_metrics(asked.metrics)
    if asked.rule not in RULES:
        raise unknown("resize rule", asked.rule, RULES)
    extractor = clip = None
    if {"fid", "kid", "cmmd", "precision", "recall"} & set(asked.metrics):
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
    words, count = tuple(prompts or default_prompts(pipe)), len(settings.prompts)
    chosen = tuple(words[i % len(words)] for i in range(count))
    gallery = _gallery(
        pipe, name, folder / "reference", dataclasses.replace(settings, prompts=chosen)
    )
    gallery.draw(pipe)
    return gallery


def _is_pipeline(name: str) -> bool:
    return name in checkpoints.names() or (Path(name) / "model_index.json").is_file()


def _gallery(pipe: Any, model: str, folder: Path, settings: Settings) -> Gallery:
    return Gallery(folder, f"{model} {fingerprint(pipe.denoiser, {})}", settings)


def _draw(
    model: str, against: str, folder: Path, settings: Settings, asked: Asked
) -> tuple[Gallery, dict[str, Any]]:
    """Return a candidate's gallery, drawn, and what it weighs."""
    recipe = _is_recipe(model)
    source, wanted = (against, model) if recipe else (model, None)
    pipe = DQPipeline.from_pretrained(source, wanted, dtype=asked.dtype).to(asked.device)
    name = Path(model).stem if recipe else Path(model).name
    gallery = _gallery(pipe, model, folder / name, settings)
    gallery.draw(pipe)
    count, growth = pipe.footprint(), gallery.peak_bytes()
    float_bits = 8.0 * asked.dtype.itemsize
    return gallery, {
        "stored_bytes": count.stored_bytes,
        "bytes_on_disk": _files(source, pipe) if not recipe else None,
        "average_weight_bits": count.average_weight_bits or float_bits,
        "compute_paths": {path: layers for path, (layers, _) in count.paths().items()},
        "peak_megabytes": None if growth is None else (count.resident_bytes + growth) / 1e6,
    }


def _files(model: str, pipe: Any) -> int | None:
    """Return the bytes of a local checkpoint's denoiser files."""
    name = next(k for k, v in pipe.components.items() if v is pipe.denoiser)
    found = [f.stat().st_size for f in (Path(resolve(model)) / name).glob("*.safetensors")]
    return sum(found) or None


def _is_recipe(model: str) -> bool:
    """Whether a name means a recipe and not a checkpoint."""
    if Path(model).is_dir() or model in checkpoints.names():
        return False
    return Path(model).suffix in (".yaml", ".yml", ".json") or any(
        re.fullmatch(template.pattern, model) for _, template in templates.items()
    )


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


def _page(report: Report, full: Gallery, galleries: Sequence[Gallery]) -> None:
    page = Page("dq eval")
    page.table(report.rows())
    if report.reference_rows():
        page.heading("Distances to the reference set")
        page.table(report.reference_rows())
    page.text(", ".join(f"{k}: {v}" for k, v in report.facts.items()))
    panels = _panels(report)
    if len(report.candidates) > 1 and panels:
        page.heading("Bits against quality")
        page.image(curve(panels), "scores of all candidates by bits a weight")
    for each, gallery in zip(report.candidates, galleries, strict=True):
        worst = each.scores.worst() or list(range(min(8, len(gallery.files))))
        page.heading(f"{each.name}: the {len(worst)} that differ most")
        pairs = [(_open(full.files[i]), _open(gallery.files[i])) for i in worst]
        rows = {
            _FULL: [a for a, _ in pairs],
            each.name: [b for _, b in pairs],
            "difference x 4": [_difference(a, b) for a, b in pairs],
        }
        page.image(grid(rows, [gallery.settings.prompts[i] for i in worst]), "the worst images")
        paths = ", ".join(f"{n} layers {path}" for path, n in each.compute_paths.items())
        page.text(f"computes as {paths or 'float'}")
        lines = [_line(each.scores, gallery.settings.prompts, i) for i in range(len(gallery.files))]
        page.table([lines[i] for i in worst])
        page.table(lines, folded=f"all {len(lines)} images")
    page.write(report.folder / "report.html")


def _panels(report: Report) -> dict[str, list[tuple[str, float, float]]]:
    """Return the points of up to three metrics."""
    names = [name for name in ("psnr", "clip", "fid") if name in report.metrics]
    return {
        name: [(c.name, c.average_weight_bits, c.scores.metrics[name]) for c in report.candidates]
        for name in names
    }


def _open(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def _difference(one: Image.Image, two: Image.Image) -> Image.Image:
    return ImageChops.difference(one, two).point(lambda value: min(255, 4 * value))


def _line(scores: Scores, prompts: Sequence[str], index: int) -> dict[str, object]:
    values = {name: _number(numbers[index]) for name, numbers in scores.images.items()}
    return {"image": index, "prompt": prompts[index], **values}
