"""The tensors that a packed layer stores beside its codes: their names, forms and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dq.errors import DQError
from dq.nn.layers import Layer, input_channels, matrix_shape
from dq.nn.quantizer import Quantizer
from dq.nn.simulated import QuantLayer, segments
from dq.nn.split import split_shapes
from dq.plan import LayerSpec
from dq.storage import stored_shapes

__all__ = ["COMPANIONS", "TENSORS", "Form", "companion_forms", "companions_of", "weight_form"]

Form = tuple[tuple[int, ...], torch.dtype]

# What a plain layer does not have; `dq.nn.packed_layer` says what each is.
COMPANIONS = (
    "weight_scale", "input_affine", "input_shift", "input_scale", "kept_input", "kept_output",
    "table", "output_affine", "salient",
)  # fmt: skip
TENSORS = ("weight", *COMPANIONS)


def weight_form(layer: Layer, spec: LayerSpec) -> Form:
    """Return shape and dtype of the codes of a layer."""
    return _weight_shapes(layer, spec)["weight"]


def _weight_shapes(layer: Layer, spec: LayerSpec) -> dict[str, Form]:
    if spec.salient is None:
        return stored_shapes(spec.weight, *matrix_shape(layer))
    return split_shapes(spec, *matrix_shape(layer), input_channels(layer))


def companion_forms(layer: Layer, spec: LayerSpec) -> dict[str, Form]:
    """Return shape and dtype of each tensor that the spec asks for beside the codes."""
    rows, columns = matrix_shape(layer)
    shapes = {"weight_scale": _weight_shapes(layer, spec)["weight_scale"][0]}
    if spec.salient is not None:
        shapes["salient"] = (spec.salient_channels,)
    if spec.input is not None and spec.is_static:
        size, times = spec.input.granularity.size, len(spec.input.step_groups)
        parts = input_channels(layer) // size if size else len(segments(layer, spec))
        shapes["input_affine"] = (times, parts, 2) if times else (parts, 2)
    if spec.transform is not None and spec.transform.shift:
        shapes["input_shift"] = (input_channels(layer),)
    if spec.transform is not None and spec.transform.scale:
        shapes["input_scale"] = (input_channels(layer),)
    if spec.kept_every:
        shapes["kept_input"], shapes["kept_output"] = (columns,), (rows,)
    if spec.tabled:
        shapes["table"] = (len(spec.tabled), rows)
    if spec.output_groups:
        shapes["output_affine"] = (len(spec.output_groups), 2, rows)
    return {name: (shape, torch.float32) for name, shape in shapes.items()}


def companions_of(layer: QuantLayer) -> dict[str, Tensor | None]:
    """Return these tensors of a simulated layer, but for the scales of its weight.

    Raises:
        DQError: If something that its spec asks for has not been found yet.
    """
    shift, scale, _ = layer.transform
    kept, kept_output = _kept(layer)
    found = {"table": layer.table, "output_affine": layer.output_affine}
    wanted = {"table": layer.spec.tabled, "output_affine": layer.spec.output_groups}
    for name, times in wanted.items():
        if times and found[name] is None:
            raise DQError(f"its {name} over timesteps is not there yet: it needs a calibration")
        found[name] = found[name] if times else None
    return {
        "input_affine": _affine(layer),
        "input_shift": shift,
        "input_scale": scale,
        "kept_input": kept,
        "kept_output": kept_output,
        "salient": layer.salient,
        **found,
    }


def _affine(layer: QuantLayer) -> Tensor | None:
    """Return scales and codes of zero of a static input."""
    spec = layer.spec.input
    if spec is None or spec.dynamic:
        return None
    parts = []
    for quantizer in layer.input_quantizers:
        assert isinstance(quantizer, Quantizer)  # the list holds nothing else
        scale, zero, *_ = quantizer.scales
        zeros = (torch.zeros_like(scale) if zero is None else zero) - spec.grid.low
        parts.append(torch.stack([scale, zeros], -1))
    affine = torch.cat(parts, 1)  # (step groups, segments or groups of channels, 2)
    return affine if spec.step_groups else affine.squeeze(0)


def _kept(layer: QuantLayer) -> tuple[Tensor | None, Tensor | None]:
    """Return the token that is computed apart, and what full precision makes of it."""
    if not layer.spec.kept_every:
        return None, None
    if layer.kept_input is None:
        raise DQError("it does not know its kept token yet: that needs a calibration first")
    bias = None if layer.bias is None else layer.bias.detach().float()
    known, weight = layer.kept_input.float(), layer.weight.detach().float()
    return known, nn.functional.linear(known, weight, bias)
