import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dq.export.tensorfile import TensorFile

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "wide": torch.randn(2, 5),
    "half": torch.randn(3).bfloat16(),
    "scalar": torch.tensor(2.5),
    "turned": torch.randn(4, 3).T,
    "empty": torch.empty(0, 4),
    "fp8": torch.randn(7).to(torch.float8_e4m3fn),
    "power": torch.tensor([127, 1], dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "long": torch.tensor([1 << 40]),
    "flag": torch.tensor([True, False]),
}


def test_safetensors_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with TensorFile(path) as file:
        sizes = {name: file.add(name, tensor) for name, tensor in TENSORS.items()}
        assert not path.exists()
        file.finish({"a": "b"})
    assert [p.name for p in tmp_path.iterdir()] == ["file.safetensors"]
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert sizes[name] == tensor.numel() * tensor.itemsize
        same = torch.equal(
            loaded[name].contiguous().reshape(-1).view(torch.uint8),
            tensor.contiguous().reshape(-1).view(torch.uint8),
        )
        assert same, name
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"a": "b"}


def test_elements_are_aligned(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with TensorFile(path) as file:
        for name, tensor in TENSORS.items():
            file.add(name, tensor)
        file.finish({})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0
