import dataclasses
import re

import pytest
from torch import nn

from dq.engine import decide, quantize
from dq.errors import DQError
from dq.family import Role, family_of, quantizable
from dq.methods.ptq import PTQ
from dq.nn import matrix_shape
from dq.plan import Plan
from dq.presets import weight_preset
from dq.recipe import Recipe
from dq.spec import Granularity
from tests.models import MODELS

NETWORKS = {name: case.network(case.build()) for name, case in MODELS.items()}
WIDE = (Role.IO, Role.TIME)
each = pytest.mark.parametrize("name", MODELS)


def plan_of(name: str, **settings):
    return decide(NETWORKS[name], Recipe("test", (PTQ(**settings),)))


def first_step(model: nn.Module, recipe: str) -> Plan:
    """What PTQ decides; the step that looks at prompts is left out, it needs some."""
    wanted = Recipe.get(recipe)
    return decide(model, dataclasses.replace(wanted, steps=wanted.steps[:1]))


@each
@pytest.mark.parametrize("weight", range(2, 9))
def test_every_width_decides_a_plan_on_every_family(name: str, weight: int) -> None:
    model = NETWORKS[name]
    family, layers = family_of(model), quantizable(model)
    roles, splits = family.roles(model), family.splits(model)
    for low in (*range(2, 9), 16):
        plan = first_step(model, f"w{weight}a{low}")
        assert plan.model == type(model).__name__
        assert set(plan.layers) | set(plan.notes) >= set(layers)
        for layer, spec in plan.layers.items():
            shape = matrix_shape(layers[layer])
            wide = roles[layer] in WIDE or layer in plan.notes
            assert spec.weight.format == f"int{8 if wide else weight}"
            assert spec.bytes(*shape) < 4 * shape[0] * shape[1]
            assert (spec.input is None) == (low == 16)
            if spec.input is not None:
                assert spec.input.format == f"int{low}"
                assert spec.input.dynamic is family.dynamic_inputs
                wanted = () if family.dynamic_inputs else splits.get(layer, ())
                assert spec.input_splits == wanted


@each
@pytest.mark.parametrize("inputs", ["static", "dynamic"])
def test_the_recipe_may_say_when_ranges_are_found(name: str, inputs: str) -> None:
    plan = first_step(NETWORKS[name], f"w8a8-{inputs}")
    assert plan.is_static() is (inputs == "static")
    splits = family_of(NETWORKS[name]).splits(NETWORKS[name])
    for layer, spec in plan.layers.items():
        assert spec.input.symmetric is (inputs == "dynamic")
        assert spec.input_splits == (splits.get(layer, ()) if inputs == "static" else ())


@pytest.mark.parametrize("bits", range(2, 9))
def test_widths_up_to_four_have_groups(bits: int) -> None:
    spec = next(
        spec.weight
        for spec in plan_of("sd32", weights=f"int{bits}").layers.values()
        if spec.weight.format == f"int{bits}" and (bits == 8 or spec.weight.format != "int8")
    )
    if bits <= 4:
        assert spec == weight_preset(f"int{bits}")
        assert spec.scale_format == f"uint{8 - bits}"
    else:
        assert spec.granularity == Granularity("channel")
        assert spec.scale_format == "float32"


@pytest.mark.parametrize(("recipe", "group"), [("w4a8", 32), ("w4a8-g64", 64), ("w4a8-g0", 0)])
def test_names_set_the_group(recipe: str, group: int) -> None:
    plan = first_step(NETWORKS["sd64"], recipe)
    narrow = {spec.weight for spec in plan.layers.values()} - {weight_preset("int8")}
    assert narrow == {weight_preset(f"int4-g{group}")}


def test_layers_that_the_group_does_not_fit_have_eight_bits_and_a_note() -> None:
    plan = plan_of("sd32", weights="int4-g64")
    misfits = [name for name, note in plan.notes.items() if "does not divide" in note]
    assert misfits
    for name in misfits:
        assert plan.layers[name].weight == weight_preset("int8")
        assert matrix_shape(quantizable(NETWORKS["sd32"])[name])[1] % 64
        text = r"\(\w+ \d+->\d+\) has 8-bit weights: group size 64 does not divide \d+ input feat"
        assert re.match(text, plan.notes[name])
    fits = [spec for name, spec in plan.layers.items() if name not in misfits]
    assert any(spec.weight == weight_preset("int4-g64") for spec in fits)


def test_a_group_that_fits_nothing_is_an_error_that_names_divisors() -> None:
    text = r"int4-g97 fits no layer of the model; .*group size 97 does not divide .*near it: \d+"
    with pytest.raises(DQError, match=text):
        plan_of("sd32", weights="int4-g97")


@each
@pytest.mark.parametrize("role", list(Role))
def test_roles_are_skipped_or_kept_wide(name: str, role: Role) -> None:
    model = NETWORKS[name]
    roles = family_of(model).roles(model)
    skipped = plan_of(name, weights="int4", skip_roles=(role,))
    wide = plan_of(name, weights="int4", wide_roles=(role,))
    for layer, its_role in roles.items():
        if its_role == role:
            assert layer not in skipped.layers
            assert f"role {role} is skipped" in skipped.notes[layer]
            if layer in wide.layers:
                assert wide.layers[layer].weight == weight_preset("int8")


def test_small_layers_stay_float_with_a_note() -> None:
    model = NETWORKS["sd32"]
    plan = plan_of("sd32", smallest=5000)
    for name, layer in quantizable(model).items():
        rows, columns = matrix_shape(layer)
        assert (name in plan.layers) is (rows * columns >= 5000)
        if name not in plan.layers:
            assert f"stays float: {rows * columns} weights are too few" in plan.notes[name]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"weights": "int1"}, "unknown weight format 'int1'. Did you mean 'int"),
        ({"weights": "uint8"}, "weights are signed; uint8 is not"),
        ({"wide": "int9"}, "unknown weight format 'int9'"),
        ({"inputs": "int1"}, "unknown input format 'int1'. Did you mean 'int"),
        ({"wide_inputs": "e9m9"}, "unknown input format 'e9m9'"),
        ({"dynamic": "statc"}, "unknown value of dynamic 'statc'. Did you mean 'static'"),
        ({"skip_roles": ("skipp",)}, "unknown role 'skipp'. Did you mean 'skip'"),
        ({"wide_roles": ("tim",)}, "unknown role 'tim'. Did you mean 'time'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, text: str) -> None:
    with pytest.raises(DQError, match=text):
        PTQ(**settings)


def test_an_unknown_observer_is_named() -> None:
    case = MODELS["dit64"]
    recipe = Recipe("test", (PTQ(weight_observer="msee"),))
    with pytest.raises(DQError, match=r"unknown observer 'msee'\. Did you mean 'mse'"):
        quantize(case.network(case.build()), recipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "int8-g64"}, "8-bit integers take no groups.*drop -g64"),
        ({"weights": "int4-g-1"}, "unknown weight format 'int4-g-1'"),
        ({"weights": "nvfp4-g32"}, "nvfp4 has blocks of 16"),
        ({"weights": "int4-floor"}, "only nvfp4, .* have scales that a rule finds"),
    ],
)
def test_groups_that_cannot_be(settings: dict[str, str], message: str) -> None:
    with pytest.raises(DQError, match=message):
        PTQ(**settings)


@pytest.mark.parametrize("name", ["w4a16-static", "w8a16-static", "fp4-w4a16-static"])
def test_float_inputs_have_no_scales(name: str) -> None:
    with pytest.raises(DQError, match="inputs stay in floating point: they have no static"):
        Recipe.get(name)


@pytest.mark.parametrize("name", ["binary", "binary-g16"])
def test_one_bit_without_training_is_warned_of(name: str) -> None:
    with pytest.warns(UserWarning, match="use recipe binarydm-w1a8, which trains"):
        plan = plan_of("dit64", weights=name)
    assert "binarydm" in plan.notes["1-bit weights"]


@pytest.mark.parametrize("name", ["ternary", "ternary-g16", "binary-x2", "binary-g16-x2"])
def test_three_levels_and_two_bases_are_not(name: str, recwarn: pytest.WarningsRecorder) -> None:
    plan = plan_of("dit64", weights=name)
    assert not recwarn.list
    assert "1-bit weights" not in plan.notes
    assert any(spec.weight.code_bits == 2 for spec in plan.layers.values())
