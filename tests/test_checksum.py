import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dq import checksum
from dq.errors import DQError
from dq.nn import install, pack_model
from dq.plan import LayerSpec, Plan
from dq.presets import weight_preset
from dq.spec import Granularity, TensorSpec

DTYPES = [torch.uint8, torch.int8, torch.float32, torch.bfloat16, torch.float16, torch.int64]


def packed_model() -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Conv2d(8, 4, 3))
    layers = {"0": LayerSpec(weight_preset("int4-g32")), "1": LayerSpec(weight_preset("int8"))}
    plan = Plan("Sequential", layers)
    install(model, plan)
    pack_model(model)
    return model, plan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4)])
def test_the_checksum_is_crc32_of_the_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 10).to(dtype)
    values = tensor.reshape(-1).view(torch.uint8).tolist()
    assert checksum.of(tensor) == zlib.crc32(bytes(values))


def test_views_have_the_checksum_of_their_copies() -> None:
    tensor = torch.randn(4, 6)
    assert checksum.of(tensor.t()) == checksum.of(tensor.t().contiguous())
    assert checksum.of(tensor.t()) != checksum.of(tensor)


def test_every_flipped_bit_of_a_packed_layer_changes_the_digest() -> None:
    model, plan = packed_model()
    expected = checksum.of_model(model, plan)
    assert len(expected) == 8
    stored = [t for n, t in model.state_dict().items() if not n.endswith("bias")]
    assert len(stored) == 4
    for tensor in stored:
        flat = tensor.view(-1).view(torch.uint8)
        for index in (0, len(flat) - 1):
            flat[index] ^= 16
            assert checksum.of_model(model, plan) != expected
            flat[index] ^= 16
    assert checksum.of_model(model, plan) == expected


def test_swapped_layers_change_the_digest() -> None:
    crcs = {"a.weight": 1, "b.weight": 2}
    spec = LayerSpec(weight_preset("int8"))
    plan = Plan("Net", {"a": spec, "b": spec})
    swapped = {"a.weight": 2, "b.weight": 1}
    assert checksum.digest(crcs, plan) != checksum.digest(swapped, plan)
    assert checksum.digest(dict(reversed(crcs.items())), plan) == checksum.digest(crcs, plan)


def test_tensors_outside_the_plan_do_not_count() -> None:
    plan = Plan("Net", {"a": LayerSpec(weight_preset("int8"))})
    crcs = {"a.weight": 1}
    more = {**crcs, "a.bias": 5, "other.weight": 6}
    assert checksum.digest(more, plan) == checksum.digest(crcs, plan)


def test_headers_promise_what_the_tensors_are(tmp_path: Path) -> None:
    state = {"b": torch.randn(3), "a": torch.arange(4)}
    file = tmp_path / "x.safetensors"
    save_file(state, file, metadata=checksum.metadata(state))
    found = checksum.read([str(file)], state)
    assert found == {name: checksum.of(tensor) for name, tensor in state.items()}


def test_files_without_checksums_promise_nothing(tmp_path: Path) -> None:
    state = {"a": torch.arange(4)}
    save_file(state, tmp_path / "plain.safetensors")
    (tmp_path / "model.bin").write_bytes(b"a pickle")
    files = [str(tmp_path / name) for name in ("model.bin", "plain.safetensors")]
    assert checksum.read(files, state) == {}
    assert checksum.read(None, state) == {}


def test_plans_that_store_the_same_tensors_have_digests_of_their_own() -> None:
    weight = weight_preset("int8")
    low = TensorSpec("int8", Granularity("token"), dynamic=True)
    plans = [Plan("Net", {"a": LayerSpec(weight)}), Plan("Net", {"a": LayerSpec(weight, low)})]
    assert len({checksum.digest({"a.weight": 1}, plan) for plan in plans}) == 2


def test_checksums_of_other_tensors_are_refused(tmp_path: Path) -> None:
    state = {"a": torch.arange(4)}
    file = tmp_path / "x.safetensors"
    save_file(state, file, metadata=checksum.metadata(state))
    with pytest.raises(DQError, match=r"x\.safetensors: its header does not list .* of 2 tensors"):
        checksum.read([str(file)], ["a", "b"])


@pytest.mark.parametrize("keep", [0, 4, 40])
def test_truncated_files_are_named_with_the_remedy(tmp_path: Path, keep: int) -> None:
    state = {"a": torch.arange(400)}
    file = tmp_path / "x.safetensors"
    save_file(state, file, metadata=checksum.metadata(state))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DQError, match=r"x\.safetensors cannot be read .*truncated or damaged"):
        checksum.read([str(file)], state)
