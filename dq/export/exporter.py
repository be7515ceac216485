"""What an export target is: a layout, which layers go there, and what else its readers look for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dq.export.forms import form
from dq.nn import PackedConv2d, PackedLayer
from dq.registry import Registry

__all__ = ["Exporter", "exporters"]

Layers = Mapping[str, PackedLayer]


def _as_they_are(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    return dict(tensors), {}


def _header(described: Mapping[str, str]) -> dict[str, str]:
    return {"format": "pt", **described}


@dataclass(frozen=True)
class Exporter:
    """One target.

    Args:
        help: One line: whose layout it is.
        forms: What it holds; see `dq.export.forms`.
        remedy: Recipes whose checkpoints fit.
        loads: Maps the class name of a denoiser to what reads its checkpoint again, in words.
        tensors: Maps name and layer, which `refuses` has nothing against, to the tensors that stand
            for its weight, by name.
        config: Maps layers that went there, and names of other linears and convolutions, to what
            stands under `quantization_config` in the denoiser's `config.json`.
        convolutions: Whether it holds those too.
        objection: What else stands against a layer of one of the forms, in words.
        check: Raises a `DQError` if a library is missing.
        flat: Maps tensors by name to plain tensors, and to a description by name of each.
        header: Maps all descriptions to the metadata of the safetensors file.
    """

    help: str
    forms: tuple[str, ...]
    remedy: str
    loads: Callable[[str], str]
    tensors: Callable[[str, PackedLayer], dict[str, Tensor]]
    config: Callable[[Layers, Sequence[str]], dict[str, Any]]
    convolutions: bool = False
    objection: Callable[[PackedLayer], str | None] = lambda layer: None
    check: Callable[[], None] = lambda: None
    flat: Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], dict[str, str]]] = _as_they_are
    header: Callable[[Mapping[str, str]], dict[str, str]] = _header

    def refuses(self, layer: PackedLayer) -> str | None:
        """Return in words why a layer cannot go there; None if it can."""
        if layer.spec.transform is not None:
            return f"its input is changed first: {layer.spec.transform}"
        if layer.spec.salient is not None:
            return "some of its input channels have more bits than the others"
        if isinstance(layer, PackedConv2d) and not self.convolutions:
            return "the layout has no convolutions"
        found = form(layer.spec.weight)
        if found not in self.forms:
            return f"the layout has no {found or layer.spec.weight}"
        return self.objection(layer)


exporters: Registry[Exporter] = Registry("export target", home="dq.export")
