"""Exchange the layers of a model: float to simulated, simulated to packed, packed to float."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from dq.errors import DQError, check_known, inside
from dq.family import quantizable
from dq.nn.layers import Layer, constructor, describe
from dq.nn.packed import PackedConv2d, PackedLinear, packed
from dq.nn.simulated import QuantLayer, simulate
from dq.nn.steps import watch
from dq.plan import LayerSpec, Plan
from dq.progress import track
from dq.scales import Scales
from dq.transform import NO_TRANSFORM, Transform

__all__ = [
    "ORIGINAL",
    "empty_packed",
    "exchanged",
    "install",
    "keep_int8",
    "pack_model",
    "packed_layers",
    "plain_layers",
    "replace",
    "uninstall",
    "unpack_model",
]


ORIGINAL = "dq_original"  # name, below a module that learns, of the one that it learns from


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the module called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


@contextmanager
def exchanged(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """While active, other layers are in the places of those that are named."""
    before = {name: model.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        replace(model, name, layer)
    try:
        yield
    finally:
        for name, layer in before.items():
            replace(model, name, layer)


def _planned(model: nn.Module, plan: Plan) -> list[tuple[str, Layer, LayerSpec]]:
    """Return each layer of the plan; a plan for another model is an error before any change."""
    if type(model).__name__ != plan.model:
        raise DQError(
            f"the plan was made for {plan.model}, not for {type(model).__name__}; "
            "quantize this model with a recipe instead"
        )
    layers = quantizable(model)
    check_known(f"layer of this {plan.model}, named by the plan:", plan.layers, layers)
    return [(name, layers[name], spec) for name, spec in plan.layers.items()]


def install(
    model: nn.Module,
    plan: Plan,
    scales: Mapping[str, Scales] | None = None,
    transforms: Mapping[str, Transform] | None = None,
) -> None:
    """Replace every float layer that the plan names by its simulated form, in place.

    Simulated layers that the plan does not name, left by an earlier step, become float again.

    Args:
        model: The denoiser.
        plan: What each layer becomes.
        scales: Of weights, by layer, where they have been chosen before.
        transforms: Of inputs, by layer, where the plan says that they are changed.
    """
    done = []
    for name, layer, spec in track(_planned(model, plan), "choosing scales"):
        if isinstance(layer, QuantLayer) and layer.spec.core == spec.core:
            layer.spec = spec  # an earlier step of the recipe has installed, perhaps tuned it
            continue
        with inside(describe(name, layer)):
            changed = (transforms or {}).get(name, NO_TRANSFORM)
            made = simulate(layer, spec, (scales or {}).get(name), changed)
        if isinstance(layer, QuantLayer):
            made.take_over(layer)
        done.append((name, made))
    for name, plain in _simulated(model).items():
        if name not in plan.layers:
            replace(model, name, plain)
    for name, layer in done:
        replace(model, name, layer)
    watch(model)


def uninstall(model: nn.Module) -> None:
    """Replace every simulated layer by the float one that it was made from, and learned norms."""
    for name, layer in plain_layers(model).items():
        replace(model, name, layer)
    watch(model)


def plain_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return what a model's layers were before: float layers, and norms that had not learned.

    With `exchanged` the model is itself in full precision for a while, without a second model:
    float layers share the parameters of simulated ones.
    """
    learned = {n: m._modules.get(ORIGINAL) for n, m in model.named_modules()}
    return {**_simulated(model), **{n: m for n, m in learned.items() if m is not None}}


def _simulated(model: nn.Module) -> dict[str, Layer]:
    """Return the float layer of each simulated one."""
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer):
            assert isinstance(layer, (nn.Linear, nn.Conv2d))  # QuantLayer is mixed into these only
            layers[name] = _plain(layer, layer.weight, layer.bias)
    return layers


def _plain(layer: Layer, weight: Tensor, bias: Tensor | None) -> Layer:
    build: Callable[..., Any] = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    made: Layer = build(**constructor(layer))
    made.weight = cast(nn.Parameter, weight)
    made.bias = cast(Any, bias)
    return made.train(layer.training)


def pack_model(model: nn.Module) -> None:
    """Replace every simulated layer by its packed form, in place."""
    done = []
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer):
            assert isinstance(layer, (nn.Linear, nn.Conv2d))  # QuantLayer is mixed into these only
            with inside(describe(name, layer)):
                made = packed(layer, layer.spec)
                made.load_layer(layer)
            done.append((name, made))
    for name, made in done:
        replace(model, name, made)
    for module in [*model.modules()]:
        module._modules.pop(ORIGINAL, None)


def empty_packed(model: nn.Module, plan: Plan) -> None:
    """Replace every layer that the plan names by a packed one on the meta device."""
    for name, layer, spec in _planned(model, plan):
        with inside(describe(name, layer)):
            replace(model, name, packed(layer, spec, torch.device("meta")))


def packed_layers(model: nn.Module) -> dict[str, PackedLinear | PackedConv2d]:
    """Return the packed layers by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (PackedLinear, PackedConv2d))
    }


def unpack_model(model: nn.Module) -> None:
    """Replace every packed layer by a float one with the weight that its codes stand for."""
    for name, layer in packed_layers(model).items():
        weight, bias = (
            x if x is None else nn.Parameter(x.to(layer.compute_dtype), requires_grad=False)
            for x in layer.plain()
        )
        assert weight is not None  # only biases may be missing
        replace(model, name, _plain(layer, weight, bias))


def keep_int8(model: nn.Module, keep: bool) -> None:
    """Say whether packed weights may lie beside their codes as int8, ready to be multiplied.

    By default those with 8-bit codes do, and shorter ones are expanded at every call.

    Args:
        model: The denoiser.
        keep: True is faster with short codes, a byte a weight; False saves the second byte of 8-bit
            ones.
    """
    for layer in packed_layers(model).values():
        layer.keep(keep)
