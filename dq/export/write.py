"""Write a quantized pipeline in another library's layout, layer by layer."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn

from dq import attention
from dq.errors import DQError, inside
from dq.export.exporter import Exporter, exporters
from dq.export.forms import form
from dq.export.report import Exported, ExportedLayer
from dq.export.tensorfile import TensorFile
from dq.folders import check_free, new_folder
from dq.nn import PackedLayer, describe, packed_layers
from dq.nn.stored import TENSORS

__all__ = ["check", "export"]

logger = logging.getLogger("dq")

_FILE = "diffusion_pytorch_model.safetensors"
_REPLACED = ("*.safetensors", "*.bin", "*.index.json")


def check(source: Path, to: str, output: Path, overwrite: bool) -> None:
    """Refuse what cannot be exported, before a model is loaded for it.

    Raises:
        DQError: If the target is unknown or needs a library, `source` is not a folder of a
            pipeline, or `output` exists or lies within it.
    """
    exporters[to].check()
    if not (source / "model_index.json").is_file():
        raise DQError(f"{source} is not a pipeline folder: it has no model_index.json")
    if output.resolve().is_relative_to(source.resolve()):
        raise DQError(f"{output} lies within {source}, which is read; choose another folder")
    check_free(output, overwrite, source)


def export(
    model: Any, source: Path, component: str, to: str, output: Path, overwrite: bool = False
) -> Exported:
    """Write a pipeline, whose denoiser is packed, as another library reads it.

    Layers that do not fit are written in floating point, in their compute dtype.

    Args:
        model: The packed denoiser.
        source: Folder of the pipeline that it was loaded from; all else is copied from there.
        component: Name of the denoiser, e.g. "unet".
        to: Name of the target.
        output: Folder to write; it appears whole or not at all.
        overwrite: Whether it may exist.

    Raises:
        DQError: See `check`; or if no layer fits.
    """
    check(source, to, output, overwrite)
    exporter = exporters[to]
    layers = packed_layers(model)
    changed = attention.specs_of(model)
    if changed:
        logger.warning(
            "%d attentions are quantized or ordered here; elsewhere they are computed in full",
            len(changed),
        )
    reasons = {name: exporter.refuses(layer) for name, layer in layers.items()}
    _check_static(source, layers)
    _check_fit(exporter, source, reasons)
    with new_folder(output, overwrite) as folder:
        _copy(source, component, folder)
        _write_config(exporter, model, reasons, source / component, folder / component)
        path = folder / component / _FILE
        with TensorFile(path) as file:
            described: dict[str, str] = {}
            done = []
            for name, tensors in _tensors(exporter, model, reasons):
                plain, words = exporter.flat(tensors)
                described |= words
                size = sum([file.add(*item) for item in plain.items()])
                if name in layers:
                    done.append(_reported(name, layers[name], reasons[name], size))
            file.finish(exporter.header(described))
        total = path.stat().st_size
    kind = type(model).__name__
    return Exported(to, str(output), kind, tuple(done), total, exporter.loads(kind))


def _check_fit(exporter: Exporter, source: Path, reasons: Mapping[str, str | None]) -> None:
    if not reasons:
        raise DQError(f"{source} is not quantized by dq: run dq quantize first")
    if None in reasons.values():
        return
    words = "; ".join(dict.fromkeys(str(reason) for reason in reasons.values()))
    raise DQError(
        f"{source}: none of {len(reasons)} packed layers fits ({words}); "
        f"quantize with one of {exporter.remedy}"
    )


def _check_static(source: Path, layers: Mapping[str, PackedLayer]) -> None:
    """Refuse what would be another model without dq, in silence."""
    for name, layer in layers.items():
        low = layer.spec.input
        if low is not None and low.granularity.size == 1:
            raise DQError(
                f"{source}: {describe(name, layer)} has a scale for every channel of its input, "
                "which is a simulation only: no product sums over scales; quantize with inputs by "
                "token or in groups"
            )
        if low is not None and low.step_groups:
            raise DQError(
                f"{source}: {describe(name, layer)} has scales for groups of steps, which no other "
                "library knows; quantize without step-groups"
            )
        if layer.spec.tabled:
            raise DQError(
                f"{source}: outputs of {describe(name, layer)} are stored for timesteps, which no "
                "other library looks up; quantize with layers of time kept, not cached"
            )
        if layer.spec.output_groups:
            raise DQError(
                f"{source}: the output of {describe(name, layer)} is corrected step by step, which "
                "no other library does; quantize without ptqd"
            )


def _reported(name: str, layer: PackedLayer, reason: str | None, size: int) -> ExportedLayer:
    dtype = str(layer.compute_dtype).removeprefix("torch.")
    found = dtype if reason else str(form(layer.spec.weight))
    return ExportedLayer(name, found, reason or "", layer.rows * layer.columns, size)


def _copy(source: Path, component: str, folder: Path) -> None:
    """Copy the pipeline, but for the denoiser's weights."""

    def skipped(path: str, names: list[str]) -> set[str]:
        if Path(path) != source / component:
            return set()
        return {name for name in names if any(Path(name).match(p) for p in _REPLACED)}

    shutil.copytree(source, folder, ignore=skipped, dirs_exist_ok=True)


def _write_config(
    exporter: Exporter, model: nn.Module, reasons: Mapping[str, str | None], old: Path, new: Path
) -> None:
    kinds = (nn.Linear, nn.Conv2d)
    went = {n: layer for n, layer in packed_layers(model).items() if reasons[n] is None}
    others = [n for n, m in model.named_modules() if isinstance(m, kinds) and n not in went]
    values = json.loads((old / "config.json").read_text())
    values["quantization_config"] = exporter.config(went, others)
    (new / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def _tensors(
    exporter: Exporter, model: Any, reasons: Mapping[str, str | None]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every tensor of the new checkpoint: those of a weight under its layer's name."""
    layers = packed_layers(model)
    within = {f"{name}.{leaf}" for name in layers for leaf in (*TENSORS, "bias")}
    for name, tensor in model.state_dict().items():
        if name not in within:
            yield name, {name: tensor.detach()}
    with init_empty_weights():
        known = type(model).from_config(model.config).state_dict().keys()
    for name, layer in layers.items():
        bias = layer.bias
        with inside(describe(name, layer)):
            if reasons[name] is None:
                yield name, exporter.tensors(name, layer)
            else:
                weight, bias = layer.plain()
                yield name, {f"{name}.weight": weight.to(layer.compute_dtype)}
            if f"{name}.bias" in known:
                yield f"{name}.bias", {f"{name}.bias": bias.detach().to(layer.compute_dtype)}
            elif bias is not None and layer.spec.transform is None:
                raise DQError(
                    f"it has a bias, and the layer of a plain {type(model).__name__} has none: the "
                    "shift of its input was folded into a norm; quantize without shifts to export"
                )
