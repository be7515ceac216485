import copy

import pytest
import torch
from torch import nn

from dq.kernels.native import calls, library
from dq.nn import norm


def layers() -> tuple[nn.GroupNorm, nn.Module]:
    plain = nn.GroupNorm(4, 12)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    model = nn.Sequential(copy.deepcopy(plain))
    norm.install(model)
    return plain, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_it_equals_torchs_in_every_layout(dtype: torch.dtype, layout: torch.memory_format) -> None:
    plain, model = layers()
    x = torch.randn(2, 12, 5, 7).to(dtype).contiguous(memory_format=layout)
    with torch.no_grad():
        y, expected = model.to(dtype)(x), plain.to(dtype)(x)
    assert y.stride() == x.stride()
    assert torch.allclose(y.float(), expected.float(), rtol=2e-2, atol=1e-2)


def test_only_images_channels_last_are_native(monkeypatch: pytest.MonkeyPatch) -> None:
    if library() is None:
        pytest.skip("no native kernels")
    seen = []
    original = calls.group_norm
    monkeypatch.setattr(
        calls, "group_norm", lambda x, *rest: seen.append(x.shape) or original(x, *rest)
    )
    _, model = layers()
    image = torch.randn(2, 12, 5, 7).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for x in (image.contiguous(), image.flatten(2), image[:, :, :, ::2], image):
            model(x)
        assert seen == [image.shape]
    # Gradients are left to torch (whose 2.13 crashes here unless the image wants one as well).
    model(image.requires_grad_()).square().sum().backward()
    assert len(seen) == 1
    assert model[0].weight.grad is not None


def test_install_can_be_undone() -> None:
    _, model = layers()
    assert type(model[0]) is norm.GroupNorm
    norm.uninstall(model)
    assert type(model[0]) is nn.GroupNorm
