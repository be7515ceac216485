from pathlib import Path

import pytest
import torch
from torch import nn

from dq.calibrate import Calibration, CalibrationSpec
from dq.errors import DQError
from dq.plan import LayerSpec, Plan
from dq.presets import weight_preset
from dq.spec import Granularity, TensorSpec
from dq.taps import tap_inputs
from dq.work import Work
from tests.sources import Drawing

STATIC = TensorSpec("int8", Granularity("tensor"), symmetric=False)
DYNAMIC = TensorSpec("int8", Granularity("token"), dynamic=True)
INT8 = weight_preset("int8")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3)
        self.last = nn.Linear(8, 2)
        self.unused = nn.Linear(8, 2)

    def forward(self, x, step, extra=None, return_dict=True):
        if isinstance(extra, dict):
            x = x * extra["inner"]["scale"]
        return (self.last(self.conv(x * step).mean((2, 3))),)


class Calls:
    """Calls a network with values that depend on the batch."""

    def __init__(self, model: Net, **arguments) -> None:
        self.model = model
        self.arguments = arguments
        self.runs = 0

    def batches(self, spec: CalibrationSpec) -> int:
        return 3

    def run(self, spec: CalibrationSpec, batch: int) -> None:
        self.runs += 1
        x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(batch)) * (batch + 1)
        self.model(x, 3, **self.arguments)
        self.model(x=x, step=torch.tensor(2.0), return_dict=False, **self.arguments)


def calibration(model: Net | None = None, folder: Path | None = None, **arguments) -> Calibration:
    model = model or Net()
    return Calibration(model, Calls(model, **arguments), CalibrationSpec(), Work(folder))


def plan(**specs: LayerSpec) -> Plan:
    return Plan("Net", specs)


def test_replay_repeats_what_any_pipeline_drew(model_case, model_pipe, tmp_path: Path) -> None:
    model = model_case.network(model_pipe)
    drawing = Drawing(model_case, model_pipe)
    for _ in range(2):  # the second time from the files alone
        calibration = Calibration(model, drawing, CalibrationSpec(), Work(tmp_path))
        replayed = [y for calls in calibration.batches() for y in calibration.replay(calls)]
        assert len(replayed) == len(drawing.outputs) >= 4
        assert all(torch.equal(a, b) for a, b in zip(replayed, drawing.outputs, strict=True))


def test_nested_arguments_and_numbers_are_replayed() -> None:
    one = calibration(extra={"inner": {"scale": torch.tensor(0.5)}, "none": None})
    batch = next(one.batches())
    assert [sorted(call) for call in batch] == [["extra", "step", "x"]] * 2
    assert batch[0]["step"] == 3
    (first, _) = one.replay(batch)
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first, one.model(x * 0.5, 3)[0])
    assert not first.requires_grad


def test_arguments_that_cannot_be_stored_are_named() -> None:
    with pytest.raises(DQError, match="argument 'extra' of the denoiser is a list: calib"):
        list(calibration(extra=[1]).batches())


def test_calls_are_captured_before_the_model_can_change_them() -> None:
    model = Net()
    model.register_forward_hook(lambda module, args, y: args[0].zero_() if args else None)
    (first, *_) = calibration(model).batches()
    assert first[0]["x"].abs().sum() > 0


def test_a_source_is_needed_and_the_remedy_is_named() -> None:
    without = Calibration(Net(), None, CalibrationSpec())
    with pytest.raises(DQError, match="needs calibration data, and only the denoiser was given; "):
        list(without.batches())


def test_a_source_that_never_calls_the_denoiser_is_an_error() -> None:
    one = calibration()
    one.source.model = Net()
    with pytest.raises(DQError, match="drew images without calling its denoiser"):
        list(one.batches())


def test_ranges_are_those_of_all_inputs_seen() -> None:
    one = calibration()
    seen: dict[str, list[torch.Tensor]] = {"conv": [], "last": []}
    layers = {name: one.model.get_submodule(name) for name in seen}
    for calls in one.batches():
        with tap_inputs(layers, lambda name, x: seen[name].append(x)):
            list(one.replay(calls))
    assert len(seen["conv"]) == 6
    split = LayerSpec(INT8, STATIC, (1, 3))
    ranges = one.input_ranges(plan(conv=split, last=LayerSpec(INT8, STATIC)))
    inputs = torch.cat(seen["conv"])
    for index, part in enumerate(inputs.split((1, 3), 1)):
        assert ranges["conv"][0][index] == part.min()
        assert ranges["conv"][1][index] == part.max()
    inputs = torch.cat(seen["last"])
    assert ranges["last"] == (inputs.min(), inputs.max(), None)
    assert ranges["conv"][0].shape == (2,)


def test_data_is_not_asked_for_without_static_inputs() -> None:
    one = calibration()
    dynamic = plan(conv=LayerSpec(INT8, DYNAMIC), last=LayerSpec(INT8))
    assert one.input_ranges(dynamic) == {}
    assert one.source.runs == 0


def test_finished_work_is_not_done_again(tmp_path: Path) -> None:
    wanted = plan(conv=LayerSpec(INT8, STATIC))
    expected = calibration(folder=tmp_path).input_ranges(wanted)
    again = calibration(folder=tmp_path)
    assert again.input_ranges(wanted) == expected
    assert again.source.runs == 0


def test_other_layers_are_observed_anew_from_the_same_calls(tmp_path: Path) -> None:
    calibration(folder=tmp_path).input_ranges(plan(conv=LayerSpec(INT8, STATIC)))
    again = calibration(folder=tmp_path)
    assert set(again.input_ranges(plan(last=LayerSpec(INT8, STATIC)))) == {"last"}
    assert again.source.runs == 0


def test_a_later_step_observes_for_itself(tmp_path: Path) -> None:
    narrow = TensorSpec("int2", Granularity("tensor"), symmetric=False, observer="mse")
    for _ in range(2):  # the second time from the files alone
        one = calibration(folder=tmp_path)
        wide = one.input_ranges(plan(conv=LayerSpec(INT8, STATIC)))
        low, high, _ = one.input_ranges(plan(conv=LayerSpec(INT8, narrow)))["conv"]
        assert high - low < 0.9 * (wide["conv"][1] - wide["conv"][0])
    assert one.source.runs == 0


def test_a_batch_counts_once_whether_drawn_or_stored(tmp_path: Path) -> None:
    mse = TensorSpec("int2", Granularity("tensor"), symmetric=False, observer="mse")
    wanted = plan(conv=LayerSpec(INT8, mse))
    next(calibration(folder=tmp_path).batches())  # one of three is stored
    expected = calibration().input_ranges(wanted)
    assert calibration(folder=tmp_path).input_ranges(wanted) == expected


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_name_the_layer(bad: float) -> None:
    model = Net()
    model.conv.bias.data[0] = bad
    text = (
        r"^last \(Linear 8->2\): its input is not finite during calibration; calibrate in float32"
    )
    with pytest.raises(DQError, match=text):
        calibration(model).input_ranges(plan(last=LayerSpec(INT8, STATIC)))


def test_a_layer_that_is_never_reached_is_named() -> None:
    with pytest.raises(DQError, match=r"unused \(Linear 8->2\): no data was observed"):
        calibration().input_ranges(plan(unused=LayerSpec(INT8, STATIC)))


@pytest.mark.parametrize("name", ["n", "steps", "batch"])
def test_nothing_cannot_be_calibrated_on(name: str) -> None:
    with pytest.raises(DQError, match=f"needs {name} of 1 or more, not 0"):
        CalibrationSpec(**{name: 0})
