"""What is measured is what happens, whoever measures it and however often it was stopped."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from dq.errors import DQError
from dq.sensitivity import gradient, shares
from dq.sensitivity import measure as measuring_module
from dq.sensitivity.heldout import output_noise, simulated
from dq.sensitivity.probe import Probe, fill
from dq.sensitivity.shares import shared
from dq.sensitivity.survey import fill_table
from dq.sensitivity.table import Table, decibels
from dq.work import Work
from tests.models import MODELS
from tests.sensitivity.probes import network, outputs, probe

FEW = ("sd32", "dit64", "flux")


@pytest.fixture(scope="module")
def tables() -> dict[str, tuple[Probe, Table]]:
    found = {}
    for name in FEW:
        one = probe(network(name), weights=("int2", "int4", "int8"))
        found[name] = one, fill_table(one, 1.0, Work(None))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_that_runs_has_a_row(name: str) -> None:
    one = probe(network(name), steps=1)
    table = fill_table(one, 0.2, Work(None))
    assert {row.name for row in table.rows} <= set(one.candidates.shapes)
    assert len(table.rows) > 5
    for row in table.rows:
        assert list(row.weight) == list(one.candidates.weights[row.name])
        assert list(row.input) == ["int8"]
        assert all(value >= 0 for value in (*row.weight.values(), *row.input.values()))
        assert row.macs > 0


@pytest.mark.parametrize("name", FEW)
def test_noise_is_that_of_the_model_with_one_weight_quantized(tables, name: str) -> None:
    one, table = tables[name]
    references = outputs(one)
    for row in table.rows[::5]:
        for weight in row.weight:
            with simulated(one, {row.name: (weight, "float")}):
                real = output_noise(one.model, one.calls, references)
            assert row.weight[weight] == pytest.approx(real, rel=1e-3, abs=1e-14)


@pytest.mark.parametrize("name", FEW)
def test_fewer_bits_make_more_noise(tables, name: str) -> None:
    _, table = tables[name]
    ordered = [row for row in table.rows if row.weight.get("int2", 1) > row.weight["int8"]]
    assert len(ordered) >= 0.95 * len(table.rows)


def test_with_and_without_a_prefix_the_table_is_the_same(tables) -> None:
    one, table = tables["sd32"]
    assert fill_table(dataclasses.replace(one, prefix=False), 1.0, Work(None)).rows == table.rows


def test_an_input_that_is_shared_is_quantized_once_for_all(tables) -> None:
    one, table = tables["sd32"]
    rows = {row.name: row for row in table.rows}
    references = outputs(one)
    for group in table.sharing:
        noise = [rows[name].input["int8"] for name in group]
        assert len(set(noise)) == 1
        # A wide weight format makes next to none: what is left is that of the inputs.
        choice = dict.fromkeys(group, ("int8", "int8"))
        weights = sum(rows[name].weight["int8"] for name in group)
        with simulated(one, choice):
            real = output_noise(one.model, one.calls, references)
        assert abs(decibels(real) - decibels(sum(noise) + weights)) < 2.5


def test_a_killed_measurement_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = probe(network("sd32"))
    expected = fill_table(one, 1.0, Work(None))
    run, runs = measuring_module._Unit.run, []

    def dies(unit):
        runs.append(unit.layers[0])
        if len(runs) == 2:
            raise KeyboardInterrupt
        return run(unit)

    monkeypatch.setattr(measuring_module._Unit, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        fill_table(one, 1.0, Work(tmp_path))
    assert not any("forward" in module.__dict__ for module in one.model.modules())
    assert fill_table(one, 1.0, Work(tmp_path)).rows == expected.rows
    assert len(runs) == len(set(runs)) + 1  # only the unit that died ran twice
    runs.clear()
    assert fill_table(one, 1.0, Work(tmp_path)).rows == expected.rows
    assert runs == []


class State:
    """What `accelerate` tells one of two processes, that do not wait for each other."""

    num_processes = 2

    def __init__(self, index: int) -> None:
        self.process_index = index

    def wait_for_everyone(self) -> None:
        pass


def test_shares_of_two_processes_make_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(index: int) -> dict[str, torch.Tensor]:
        made.append(index)
        return {"number": torch.tensor(index)}

    made: list[int] = []
    monkeypatch.setattr(shares, "PartialState", lambda: State(1))
    with pytest.raises(DQError, match="what another process has measured is missing"):
        shared(Work(tmp_path), "stage", 5, make, "making")
    assert made == [1, 3]
    monkeypatch.setattr(shares, "PartialState", lambda: State(0))
    found = shared(Work(tmp_path), "stage", 5, make, "making")
    assert made == [1, 3, 0, 2, 4]
    assert [int(part["number"]) for part in found] == [0, 1, 2, 3, 4]


def test_a_bfloat16_model_is_measured_in_float32_and_given_back() -> None:
    model = network("sd32").to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    table = fill_table(probe(model), 1.0, Work(None))
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses
    assert min(min(row.weight.values()) for row in table.rows) < 1e-7  # no floor of bfloat16


def test_a_model_that_draws_random_numbers_is_run_whole(caplog: pytest.LogCaptureFixture) -> None:
    model = network("dit64")
    model.transformer_blocks[0].ff.register_forward_hook(
        lambda module, args, y: y + 1e-6 * torch.randn_like(y)
    )
    table = fill_table(probe(model), 1.0, Work(None))
    assert "it is run whole each time" in caplog.text
    assert len(table.rows) > 5


@pytest.mark.parametrize("name", FEW)
def test_what_is_estimated_is_near_what_is_measured(tables, name: str) -> None:
    one, full = tables[name]
    guessed = fill_table(one, 0.0, Work(None))
    assert all(row.measured == () for row in guessed.rows)
    for kind, format in (("weight", "int2"), ("weight", "int4"), ("input", "int8")):
        pairs = [
            (getattr(a, kind)[format], getattr(b, kind)[format])
            for a, b in zip(full.rows, guessed.rows, strict=True)
            if format in getattr(a, kind)
        ]
        assert spearmanr(*zip(*pairs, strict=True)).statistic > 0.9
        apart = sorted(decibels(b) - decibels(a) for a, b in pairs)
        assert abs(apart[len(apart) // 2]) < 1.5  # no bias: 16 samples leave a spread of 1.5 dB


def test_estimates_of_large_models_keep_no_weights(tables, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = tables["dit64"]
    kept = fill_table(one, 0.0, Work(None))
    monkeypatch.setattr(gradient, "_KEPT", 0)
    assert fill_table(one, 0.0, Work(None)).rows == kept.rows


def test_the_most_fragile_layers_are_measured(tables) -> None:
    one, full = tables["sd32"]
    some = fill_table(one, 0.2, Work(None))
    guessed = {row.name: row for row in fill_table(one, 0.0, Work(None)).rows}
    ran = [row for row in some.rows if row.measured]
    assert len(ran) == round(0.2 * len(some.rows))
    for row, exact in zip(some.rows, full.rows, strict=True):
        if row.measured:
            assert row.weight == exact.weight
            assert row.measured == exact.measured
        else:
            assert row == guessed[row.name]
    assert min(max(r.weight.values()) for r in ran) > statistics.median(
        max(r.weight.values()) for r in some.rows
    )


def test_formats_that_were_not_run_keep_their_estimated_ratio() -> None:
    estimated = {"int2": 256.0, "int4": 16.0, "int8": 0.0625}
    assert fill({}, estimated) == estimated
    assert fill({"int4": 8.0}, estimated) == {"int2": 128.0, "int4": 8.0, "int8": 0.03125}
    assert fill({"int2": 256.0, "int8": 1.0}, estimated)["int4"] == 16.0  # the nearest in ratio
    assert fill({"int4": 0.0}, {"int4": 0.0, "int8": 0.0}) == {"int4": 0.0, "int8": 0.0}


def test_tables_are_written_and_read(tables, tmp_path: Path) -> None:
    _, table = tables["sd32"]
    table.save(tmp_path / "table.json")
    assert Table.load(tmp_path / "table.json") == table
