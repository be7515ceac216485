import pytest
import torch
from torch import nn

from dq.errors import DQError
from dq.nn import (
    QuantLayer,
    empty_packed,
    install,
    pack_model,
    packed_layers,
    uninstall,
    unpack_model,
)
from dq.nn.swap import exchanged, replace
from dq.plan import LayerSpec, Plan
from dq.presets import weight_preset
from dq.spec import Granularity, TensorSpec

W4 = LayerSpec(weight_preset("int4-g4"))
W8 = LayerSpec(weight_preset("int8"), TensorSpec("int8", Granularity("token"), dynamic=True))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))])
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.blocks[0](self.conv(x).mean((2, 3))))


PLAN = Plan("Net", {"conv": W4, "blocks.0.0": W8, "blocks.0.2": W4})
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(state) and all(torch.equal(now[name], state[name]) for name in state)


def test_replace_reaches_any_depth() -> None:
    model, layer = Net(), nn.Identity()
    for name in ("conv", "blocks.0.2"):
        replace(model, name, layer)
        assert model.get_submodule(name) is layer


def test_exchanged_layers_come_back_after_an_error_too() -> None:
    net, other = Net(), nn.Linear(8, 3)
    before = net.out
    with pytest.raises(KeyboardInterrupt), exchanged(net, {"out": other, "blocks.0.1": nn.Tanh()}):
        assert net.out is other
        assert isinstance(net.blocks[0][1], nn.Tanh)
        raise KeyboardInterrupt
    assert net.out is before
    assert isinstance(net.blocks[0][1], nn.ReLU)


def test_install_changes_the_planned_layers_only() -> None:
    model = Net()
    float_out = model.out
    install(model, PLAN)
    found = {name for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    assert found == set(PLAN.layers)
    assert {name: model.get_submodule(name).spec for name in found} == PLAN.layers
    assert model.out is float_out


def test_uninstall_undoes_install() -> None:
    model = Net().eval()
    state, y = snapshot(model), model(X)
    install(model, PLAN)
    assert not torch.equal(model(X), y)
    uninstall(model)
    model.eval()
    assert same(model, state)
    assert torch.equal(model(X), y)
    assert {type(m) for m in model.modules()} == {type(m) for m in Net().modules()}


def test_the_packed_model_computes_what_was_simulated() -> None:
    model = Net().eval()
    install(model, PLAN)
    expected = model(X)
    pack_model(model)
    assert set(packed_layers(model)) == set(PLAN.layers)
    assert torch.allclose(model(X), expected, rtol=1e-5, atol=1e-6)
    assert not any(isinstance(m, QuantLayer) for m in model.modules())


def test_unpacking_gives_float_layers_with_the_packed_values() -> None:
    model = Net().eval()
    install(model, Plan("Net", {"conv": W4}))
    pack_model(model)
    y = model(X)
    unpack_model(model)
    assert packed_layers(model) == {}
    assert type(model.conv) is nn.Conv2d
    assert model.conv.weight.dtype == torch.float32
    assert torch.equal(model(X), y)


def test_unpacking_keeps_the_dtype_of_the_model() -> None:
    model = Net().bfloat16()
    install(model, PLAN)
    pack_model(model)
    unpack_model(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_an_empty_skeleton_takes_a_packed_state_dict() -> None:
    model = Net().eval()
    install(model, PLAN)
    pack_model(model)
    with torch.device("meta"):
        skeleton = Net().eval()
    empty_packed(skeleton, PLAN)
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
    skeleton.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert torch.equal(skeleton(X), model(X))


@pytest.mark.parametrize("act", [install, empty_packed])
@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (
            Plan("Other", PLAN.layers),
            "the plan was made for Other, not for Net; quantize this model with a recipe instead",
        ),
        (
            Plan("Net", {**PLAN.layers, "blocks.0.3": W4}),
            "unknown layer of this Net, named by the plan: 'blocks.0.3'. Did you mean 'blocks.0.",
        ),
        (Plan("Net", {**PLAN.layers, "blocks.0.1": W4}), "unknown layer of this Net"),
    ],
)
def test_plans_that_do_not_fit_are_refused_before_anything_changes(act, plan, text: str) -> None:
    model = Net()
    state = snapshot(model)
    with pytest.raises(DQError, match=text):
        act(model, plan)
    assert same(model, state)
    assert not any(isinstance(m, QuantLayer) for m in model.modules())


def test_a_layer_that_fails_is_named_and_nothing_is_installed() -> None:
    model = Net()
    model.blocks[0][2].weight.data[0, 0] = torch.inf
    text = r"^blocks\.0\.2 \(Linear 16->8\): the tensor holds values that are not finite"
    with pytest.raises(DQError, match=text):
        install(model, PLAN)
    assert not any(isinstance(m, QuantLayer) for m in model.modules())


def test_a_group_that_does_not_fit_names_layer_and_divisors() -> None:
    plan = Plan("Net", {"conv": LayerSpec(weight_preset("int4-g96"))})
    text = r"conv \(Conv2d 4->8\): group size 96 does not divide 36 .* near it: 12, 18, 36"
    with pytest.raises(DQError, match=text):
        install(Net(), plan)


def test_installing_again_keeps_what_was_tuned() -> None:
    model = Net()
    install(model, PLAN)
    tuned = model.conv
    tuned.weight_quantizer.scale.mul_(0.9)
    install(model, PLAN)
    assert model.conv is tuned


def test_a_layer_with_another_spec_is_installed_anew() -> None:
    model = Net()
    install(model, PLAN)
    install(model, Plan("Net", {**PLAN.layers, "conv": W8}))
    assert model.conv.spec == W8
    assert model.blocks[0][0].spec == W8


def test_a_layer_that_a_later_plan_drops_is_float_again() -> None:
    model = Net()
    weight = model.conv.weight
    install(model, PLAN)
    install(model, Plan("Net", {"blocks.0.0": W8}))
    assert type(model.conv) is nn.Conv2d
    assert model.conv.weight is weight
    pack_model(model)
    assert set(packed_layers(model)) == {"blocks.0.0"}
