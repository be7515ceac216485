"""The second moment of a layer's input says how large its outputs are, whatever its weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dq.calibrate import Calibration, CalibrationSpec
from dq.engine import decide
from dq.errors import DQError
from dq.moments import second_moments
from dq.nn import QuantLayer, install
from dq.nn.simulated import simulate
from dq.plan import LayerSpec
from dq.presets import input_preset, weight_preset
from dq.recipe import Recipe
from dq.transform import NO_TRANSFORM, Transform
from tests.models import MODELS
from tests.nn.layers import LAYERS, build
from tests.single import One, calibration_of
from tests.sources import Samples

ALL = 1 << 30  # rows
INPUTS = {
    "float": None,
    "static": input_preset("int8", dynamic=False),
    "dynamic": input_preset("int4", dynamic=True),
    "blocks": input_preset("e2m1-g8", dynamic=True),
}
EVEN_CONVS = {
    "even same": (lambda: nn.Conv2d(8, 4, 4, padding="same"), (2, 8, 6, 5)),
    "valid": (lambda: nn.Conv2d(8, 4, 3, padding="valid"), (1, 8, 6, 5)),
    "circular": (lambda: nn.Conv2d(8, 4, 3, padding=(2, 1), padding_mode="circular"), (2, 8, 6, 5)),
    "replicate": (
        lambda: nn.Conv2d(8, 6, (3, 5), padding=2, padding_mode="replicate", groups=2),
        (2, 8, 6, 5),
    ),
}


def moments_of(layer: nn.Module, inputs: list[Tensor], rows: int = ALL) -> Tensor:
    return second_moments(calibration_of(One(layer), inputs), {"layer": layer}, rows)["layer"]


def of_weight(weight: Tensor, moments: Tensor) -> Tensor:
    """Return the mean square of each output that the moments promise, `(N,)`."""
    parts = weight.flatten(1).chunk(len(moments))
    return torch.cat([((w @ m) * w).sum(1) for w, m in zip(parts, moments, strict=True)])


def of_outputs(layer: QuantLayer, outputs: list[Tensor]) -> Tensor:
    """Return the mean square of each output, less the bias."""
    assert isinstance(layer, nn.Module)
    bias = layer.changed_bias()
    rows = torch.cat([y.movedim(layer.axis, -1).flatten(0, -2) for y in outputs]).double()
    return (rows if bias is None else rows - bias.double()).square().mean(0)


def simulated(
    layer: nn.Linear | nn.Conv2d, x: Tensor, low: str, transform: Transform
) -> QuantLayer:
    spec = LayerSpec(weight_preset("int4-g0"), INPUTS[low], transform=transform.spec)
    made = simulate(layer, spec, transform=transform)
    if spec.is_static:
        made.set_input(torch.tensor([-1.0]), torch.tensor([1.5]))
    generator = torch.Generator().manual_seed(4)  # of all weights, not of those near its own
    made.codes = torch.randint(16, made.matrix().shape, generator=generator).to(torch.uint8)
    return made


TRANSFORMS = {
    "plain": lambda channels: NO_TRANSFORM,
    "shifted": lambda channels: Transform(shift=torch.linspace(-2, 1, channels)),
    "all": lambda channels: Transform(
        torch.linspace(-2, 1, channels), torch.linspace(0.5, 2, channels), 4
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("low", INPUTS)
@pytest.mark.parametrize("name", [*LAYERS, *EVEN_CONVS])
def test_they_are_those_of_what_the_weight_meets(name: str, low: str, transform: str) -> None:
    if name in LAYERS:
        layer, x = build(name)
    else:
        make, shape = EVEN_CONVS[name]
        layer, x = make(), torch.randn(shape) + 0.3
    channels = x.shape[1 if isinstance(layer, nn.Conv2d) else -1]
    made = simulated(layer, x, low, TRANSFORMS[transform](channels))
    inputs = [x, 2 * x.flip(-2)]
    moments = moments_of(made, inputs)
    groups = getattr(layer, "groups", 1)
    columns = made.matrix().shape[1]
    assert moments.shape == (groups, columns, columns)
    assert torch.equal(moments, moments.transpose(1, 2))
    found = of_weight(made.rounded_weight(), moments).double()
    torch.testing.assert_close(
        found, of_outputs(made, [made(x) for x in inputs]), rtol=1e-3, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd32", "dit64"])
def test_every_layer_of_a_model_is_reached(name: str) -> None:
    case = MODELS[name]
    model = case.network(case.build())
    install(model, decide(model, Recipe.get("w4a8-dynamic")))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}
    assert len(layers) > 20
    calibration = Calibration(model, Samples(model, 1), CalibrationSpec())
    calls = [call for batch in calibration.batches() for call in batch]
    outputs: dict[str, list[Tensor]] = {n: [] for n in layers}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda m, a, y, n=n: outputs[n].append(y))
        for n in layers
    ]
    for _ in calibration.replay(calls):
        pass
    for handle in handles:
        handle.remove()
    moments = second_moments(calibration, layers, ALL)
    assert moments.keys() == layers.keys()
    for n, layer in layers.items():
        found = of_weight(layer.rounded_weight(), moments[n]).double()
        assert moments[n].dtype == torch.float32
        torch.testing.assert_close(
            found, of_outputs(layer, outputs[n]), rtol=2e-3, atol=1e-5, msg=n
        )
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_rows_are_taken_at_random_from_every_call() -> None:
    layer, _ = build("linear")
    made = simulated(layer, torch.empty(0), "float", NO_TRANSFORM)
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0.0, 3.0, 4000).unsqueeze(1)
    inputs = [torch.randn(4000, 24, generator=generator) * ramp * size for size in (1.0, 2.0)]
    whole = moments_of(made, inputs)
    some = moments_of(made, inputs, rows=1000)
    assert 0 < (some - whole).norm() / whole.norm() < 0.3
    assert torch.equal(moments_of(made, inputs, rows=1000), some)
    assert torch.linalg.matrix_rank(moments_of(made, inputs, rows=6)[0]) == 6


def test_a_layer_that_is_never_reached_is_named() -> None:
    model = One(nn.Linear(4, 4))
    layers = {
        n: simulate(getattr(model, n), LayerSpec(weight_preset("int8"))) for n in model._modules
    }
    for n, layer in layers.items():
        setattr(model, n, layer)
    with pytest.raises(DQError, match=r"^unused \(Linear 4->4\): no calibration data reaches it"):
        second_moments(calibration_of(model, [torch.ones(2, 4)]), layers, ALL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_of_half_precision_have_moments_of_full(dtype: torch.dtype) -> None:
    layer, x = build("linear", dtype)
    made = simulated(layer, x, "float", NO_TRANSFORM)
    (found,) = moments_of(made, [x * 300])
    assert found.dtype == torch.float32
    rows = x.double().flatten(0, -2) * 300
    torch.testing.assert_close(found.double(), rows.T @ rows / len(rows), rtol=1e-2, atol=100.0)


def test_tokens_that_are_computed_apart_are_left_out() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 8)
    low = input_preset("int8", dynamic=False)
    made = simulate(layer, LayerSpec(weight_preset("int4-g0"), low, kept_every=5))
    x = torch.randn(2, 10, 24)
    x[:, ::5] = 400.0 * torch.randn(24)
    made.set_input(torch.tensor([-4.0]), torch.tensor([4.0]), x[0, 0])
    others = x[:, [1, 2, 3, 4, 6, 7, 8, 9]]
    plain = simulate(layer, LayerSpec(weight_preset("int4-g0"), low))
    plain.set_input(torch.tensor([-4.0]), torch.tensor([4.0]))
    found, wanted = moments_of(made, [x]), moments_of(plain, [others])
    torch.testing.assert_close(found, wanted)


def test_the_layers_themselves_are_left_alone() -> None:
    case = MODELS["dit64"]
    model = case.network(case.build())
    install(model, decide(model, Recipe.get("w4a8-dynamic")))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}
    second_moments(Calibration(model, Samples(model, 1), CalibrationSpec()), layers, 50)
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
