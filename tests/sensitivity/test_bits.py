"""From a table to formats."""

from __future__ import annotations

import dataclasses

import pytest

from dq.errors import DQError
from dq.family import family_of
from dq.presets import FLOAT
from dq.sensitivity.bits import Limits, allocate, allocate_paper
from dq.sensitivity.candidates import Candidates
from dq.sensitivity.probe import Probe
from dq.sensitivity.survey import Settings, fill_table, prepare
from dq.sensitivity.table import CONTENT, QUALITY, Table
from dq.sensitivity.times import timed
from dq.spec import Granularity
from dq.work import Work
from tests.sensitivity.probes import calibration, network, probe


@pytest.fixture(scope="module")
def found() -> tuple[Probe, Table]:
    one = probe(network("sd32"))
    return one, fill_table(one, 0.0, Work(None))


def size(candidates: Candidates, bits: float) -> float:
    return sum(rows * columns for rows, columns in candidates.shapes.values()) * bits / 8


def taken(candidates: Candidates, choice) -> int:
    return sum(candidates.bytes(name, *pair) for name, pair in choice.items())


@pytest.mark.parametrize("bits", [3.5, 4.5, 6.0, 8.5, 16.0])
def test_budgets_are_kept_and_used(found, bits: float) -> None:
    one, table = found
    limit = size(one.candidates, bits)
    choice = allocate(table, one.candidates, Limits(limit))
    assert set(choice) == {row.name for row in table.rows}
    assert 0.97 * limit < taken(one.candidates, choice) <= limit
    plan = one.candidates.plan(choice)
    assert sum(spec.bytes(*one.candidates.shapes[n]) for n, spec in plan.layers.items()) == sum(
        one.candidates.bytes(name, *choice[name]) for name in plan.layers
    )


def test_more_bytes_make_less_noise(found) -> None:
    one, table = found
    noise = [
        table.noise(allocate(table, one.candidates, Limits(size(one.candidates, bits))))
        for bits in (3.0, 4.0, 5.0, 6.0, 8.0)
    ]
    assert noise == sorted(noise, reverse=True)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3])
def test_float_inputs_have_a_share_of_the_multiply_adds(found, share: float) -> None:
    one, table = found
    limits = Limits(size(one.candidates, 4.5), share)
    choice = allocate(table, one.candidates, limits)
    macs = {row.name: row.macs for row in table.rows}
    there = sum(macs[name] for name, (_, input) in choice.items() if input == FLOAT)
    assert there <= share * sum(macs.values())
    assert (there > 0) == (share > 0)


def test_layers_that_see_one_tensor_agree_on_its_format(found) -> None:
    one, table = found
    limits = Limits(size(one.candidates, 4.5), 0.2)
    choice = allocate(table, one.candidates, limits)
    assert all(len({choice[name][1] for name in group}) == 1 for group in table.sharing)


def test_quality_is_protected_if_it_weighs_more(found) -> None:
    one, table = found
    limits = Limits(size(one.candidates, 5.5), 0.0)
    groups = {row.name: row.group for row in table.rows}

    def noise(weight: float, group: str) -> float:
        choice = allocate(table, one.candidates, limits, weight)
        return table.noise({n: pair for n, pair in choice.items() if groups[n] == group})

    assert noise(1000.0, QUALITY) < noise(1.0, QUALITY)
    assert noise(1000.0, CONTENT) > noise(1.0, CONTENT)


def test_forced_layers_have_no_choice(found) -> None:
    one, table = found
    forced = {"conv_out": "int8|*", "*.ff.net.2": "int4|int8"}
    limits = Limits(size(one.candidates, 6.0), 0.1, forced=forced)
    choice = allocate(table, one.candidates, limits)
    assert choice["conv_out"][0] == "int8"
    assert {pair for name, pair in choice.items() if name.endswith(".ff.net.2")} == {
        ("int4", "int8")
    }
    for bad, text in (
        ({"conv_uot": "int8|*"}, "unknown layer pattern 'conv_uot'"),
        ({"conv_out": "int7|*"}, r"unknown option of conv_out 'int7\|\*'"),
    ):
        with pytest.raises(DQError, match=text):
            allocate(table, one.candidates, dataclasses.replace(limits, forced=bad))


def test_impossible_budgets_say_what_is_possible(found) -> None:
    one, table = found
    with pytest.raises(DQError, match=r"bytes: .* is asked for, .* is possible"):
        allocate(table, one.candidates, Limits(size(one.candidates, 1.0)))


def test_the_papers_objective_gives_a_choice_a_split(found) -> None:
    one, table = found
    limit = size(one.candidates, 5.0)
    choices = allocate_paper(table, one.candidates, Limits(limit, 0.0))
    assert len(choices) > 3
    assert all(taken(one.candidates, choice) <= limit for choice in choices)
    only_one_group = Limits(limit, 0.0, forced={"*.attn1.*": "int8|*"})
    for choice in allocate_paper(table, one.candidates, only_one_group):
        assert {pair[0] for name, pair in choice.items() if ".attn1." in name} == {"int8"}
    ours = table.noise(allocate(table, one.candidates, Limits(limit, 0.0)))
    assert all(ours <= table.noise(choice) for choice in choices)
    with pytest.raises(DQError, match="is possible"):
        allocate_paper(table, one.candidates, Limits(size(one.candidates, 1.0)))


def test_time_can_be_limited(found) -> None:
    one, table = found
    with pytest.raises(DQError, match="needs a table with times"):
        allocate(table, one.candidates, Limits(1e9, seconds=1.0))
    clocked = timed(table, one.candidates, one.model, repeats=2)
    assert all(len(row.seconds) == len(row.weight) * 2 + 1 for row in clocked.rows)
    fastest = sum(min(row.seconds.values()) for row in clocked.rows)
    slowest = sum(max(row.seconds.values()) for row in clocked.rows)
    limit = (fastest + slowest) / 2
    free = dataclasses.replace(clocked, sharing=())  # ties may ask for more than the fastest
    choice = allocate(free, one.candidates, Limits(1e9, seconds=limit))
    rows = {row.name: row for row in clocked.rows}
    assert sum(rows[n].seconds["|".join(pair)] for n, pair in choice.items()) <= limit


def test_groups_that_do_not_fit_are_no_candidates() -> None:
    model = network("sd32")
    one = probe(model)
    offered = one.candidates.weights["conv_in"]  # 36 weights a channel
    assert set(offered) == {"int8"}
    assert one.run_weights("conv_in") == ("int8",)


def test_formats_of_all_kinds_compete() -> None:
    model = network("sd32")
    weights, inputs = ("int4", "e2m1-g32", "nvfp4", "e4m3"), ("int8", "e4m3")
    mixed = Candidates.of(model, family_of(model), weights, inputs, False)
    spec = mixed.spec("mid_block.resnets.0.conv1", "e2m1-g32", "e4m3")
    assert spec is not None
    assert spec.weight.granularity == Granularity("group", 32)
    one = prepare(calibration(model), mixed, Settings(steps=2))
    choice = allocate(fill_table(one, 0.0, Work(None)), mixed, Limits(size(mixed, 6.0)))
    assert {weight for weight, _ in choice.values()} >= {"int4", "e4m3"}
    for weight, low in choice.values():  # nothing multiplies integers with floats
        assert low == FLOAT or low.startswith("int") == weight.startswith("int")


def test_a_float_weight_takes_no_quantized_input(found) -> None:
    one, _ = found
    with pytest.raises(DQError, match="conv_out: a float weight with int8 inputs gains nothing"):
        one.candidates.spec("conv_out", FLOAT, "int8")
