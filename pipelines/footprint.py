"""What a quantized denoiser weighs and what it computes: counted, never estimated."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dq import attention
from dq.kernels.layout import scratch_bytes
from dq.nn import matrix_shape, packed_layers
from dq.nn.layers import input_channels
from dq.nn.stored import TENSORS
from dq.plan import LayerSpec

__all__ = ["AttentionReport", "Footprint", "LayerReport", "footprint", "planned_bytes"]


@dataclass(frozen=True)
class LayerReport:
    """One packed layer.

    Attributes:
        name: Module name.
        weight: Spec of the weight, in words.
        input: Spec of the input, in words; "float" if it is not quantized.
        compute_path: What really runs on the device where the layer lies.
        weights: Number of weights.
        bytes: Stored codes, scales and zero points, and the input's scales.
    """

    name: str
    weight: str
    input: str
    compute_path: str
    weights: int
    bytes: int


@dataclass(frozen=True)
class AttentionReport:
    """Attentions that are changed alike.

    Attributes:
        change: Operands, order of tokens and blocks, in words.
        compute_path: What really runs on the device where they lie.
        density: Share of the blocks that is computed, in all of them; None if there are no blocks.
        sites: Number of attentions.
    """

    change: str
    compute_path: str
    density: float | None
    sites: int

    @property
    def words(self) -> str:
        """The change, with the density if there is one."""
        share = "" if self.density is None else f", {100 * self.density:.0f} % of blocks"
        return f"{self.change}{share}"

    def __str__(self) -> str:
        return f"attention {self.words}: {self.compute_path}, {self.sites} sites"


@dataclass(frozen=True)
class Footprint:
    """A denoiser in numbers.

    Attributes:
        model: Class name.
        parameters: Number of parameters before packing; `num_parameters()` of diffusers counts the
            bytes of packed codes instead, half of them with 4-bit weights.
        stored_bytes: Bytes of all tensors, packed and float.
        planned_bytes: The same, from what the plan's bits say alone.
        resident_bytes: Bytes in memory now, with the copies that kernels have made.
        scratch_bytes: Bytes in which weights are expanded, shared by all models of the process.
        float_bytes: Bytes without quantization in the same compute dtype.
        average_weight_bits: Bits of codes, scales and zero points a weight, over packed layers.
        layers: One report a packed layer.
        attention: What a plan changes of attentions, one report for all that are alike; those that
            stay as they are are left out.
    """

    model: str
    parameters: int
    stored_bytes: int
    planned_bytes: int
    resident_bytes: int
    scratch_bytes: int
    float_bytes: int
    average_weight_bits: float
    layers: tuple[LayerReport, ...]
    attention: tuple[AttentionReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return dataclasses.asdict(self)

    def paths(self) -> dict[str, tuple[int, int]]:
        """Return (layers, weights) by compute path."""
        table: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for layer in self.layers:
            count, weights = table[layer.compute_path]
            table[layer.compute_path] = count + 1, weights + layer.weights
        return dict(table)


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # other quantizers' tensors claim to be float
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def planned_bytes(model: nn.Module) -> tuple[int, int]:
    """Return (bytes of packed weights and input scales, bytes of everything) as the plan says."""
    layers = packed_layers(model)
    packed = sum(
        layer.spec.bytes(*matrix_shape(layer), input_channels(layer)) for layer in layers.values()
    )
    inside = {f"{name}.{leaf}" for name in layers for leaf in TENSORS}
    rest = sum(_bytes(t) for name, t in model.state_dict().items() if name not in inside)
    return packed, packed + rest


def _input_words(spec: LayerSpec) -> str:
    words = [str(spec.input or "float")]
    words += ["1 token kept"] if spec.kept_every else []
    groups = len(spec.output_groups)
    words += [f"output corrected in {groups} step groups"] if groups else []
    return ", ".join(words)


def footprint(model: nn.Module) -> Footprint:
    """Count a denoiser, quantized or not."""
    layers = packed_layers(model)
    reports = []
    weights = extra = float_bytes = 0
    for name, layer in layers.items():
        rows, columns = matrix_shape(layer)
        weights += rows * columns
        float_bytes += rows * columns * layer.compute_dtype.itemsize
        extra += layer.resident_bytes() - layer.stored_bytes()
        spec = layer.spec
        reports.append(
            LayerReport(
                name,
                str(spec.weight),
                _input_words(spec),
                layer.path(),
                rows * columns,
                spec.bytes(rows, columns, input_channels(layer)),
            )
        )
    packed, total = planned_bytes(model)
    state = model.state_dict()
    inside = {f"{name}.{leaf}" for name in layers for leaf in TENSORS}
    outside = {name: tensor for name, tensor in state.items() if name not in inside}
    stored = sum(map(_bytes, state.values()))
    return Footprint(
        model=type(model).__name__,
        parameters=weights + sum(t.numel() for n, t in model.named_parameters() if n in outside),
        stored_bytes=stored,
        planned_bytes=total,
        resident_bytes=stored + extra,
        scratch_bytes=scratch_bytes(),
        float_bytes=float_bytes + sum(map(_bytes, outside.values())),
        average_weight_bits=8 * packed / weights if weights else 0.0,
        layers=tuple(reports),
        attention=_attention(model),
    )


def _attention(model: nn.Module) -> tuple[AttentionReport, ...]:
    """Return what is changed of attentions, those that are alike together."""
    alike: dict[tuple[str, str], list[float | None]] = defaultdict(list)
    for name, spec in attention.specs_of(model).items():
        site = attention.site_of(model.get_submodule(name))
        path = attention.path(model, spec, site)
        alike[str(spec), path].append(None if site is None else site.density())
    reports = []
    for (change, path), shares in alike.items():
        known = [share for share in shares if share is not None]
        density = sum(known) / len(known) if known else None
        reports.append(AttentionReport(change, path, density, len(shares)))
    return tuple(reports)
