"""The Inception network that FID is defined by: the 2015 TensorFlow weights, 2,048 features.

Szegedy et al., "Rethinking the Inception Architecture" (arXiv 1512.00567). It differs from
torchvision's in three places, which matter: averages at borders count only pixels that are there,
the last block pools by maximum, and inputs are `(x - 128) / 128`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq.errors import DQError

__all__ = ["FEATURES", "Inception"]

FEATURES = 2048
_EDGE = 299  # pixels of the images that it was trained on
_EPSILON = 1e-3

Size = int | tuple[int, int]


class _Conv(nn.Module):
    """Convolution, normalization by running statistics, ReLU."""

    def __init__(
        self, channels: int, out: int, kernel: Size, stride: int = 1, padding: Size = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(out, eps=_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class _Branches(nn.ModuleList):
    """Several ways beside each other; their channels are put together."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], 1)


def _chain(channels: int, *steps: tuple[int, Size]) -> list[_Conv]:
    """Return convolutions that keep the size of an image."""
    made = []
    for out, kernel in steps:
        padding = tuple(k // 2 for k in (kernel if isinstance(kernel, tuple) else (kernel, kernel)))
        made.append(_Conv(channels, out, kernel, padding=(padding[0], padding[1])))
        channels = out
    return made


def _average() -> nn.Module:
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


def _block_a(channels: int, pooled: int) -> nn.Module:
    return _Branches([
        *_chain(channels, (64, 1)),
        nn.Sequential(*_chain(channels, (48, 1), (64, 5))),
        nn.Sequential(*_chain(channels, (64, 1), (96, 3), (96, 3))),
        nn.Sequential(_average(), *_chain(channels, (pooled, 1))),
    ])  # fmt: skip


def _block_b(channels: int) -> nn.Module:
    return _Branches([
        _Conv(channels, 384, 3, stride=2),
        nn.Sequential(*_chain(channels, (64, 1), (96, 3)), _Conv(96, 96, 3, stride=2)),
        nn.MaxPool2d(3, 2),
    ])  # fmt: skip


def _block_c(channels: int, inner: int) -> nn.Module:
    row, column = (1, 7), (7, 1)
    return _Branches([
        *_chain(channels, (192, 1)),
        nn.Sequential(*_chain(channels, (inner, 1), (inner, row), (192, column))),
        nn.Sequential(*_chain(channels, (inner, 1), (inner, column), (inner, row),
                              (inner, column), (192, row))),
        nn.Sequential(_average(), *_chain(channels, (192, 1))),
    ])  # fmt: skip


def _block_d(channels: int) -> nn.Module:
    return _Branches([
        nn.Sequential(*_chain(channels, (192, 1)), _Conv(192, 320, 3, stride=2)),
        nn.Sequential(*_chain(channels, (192, 1), (192, (1, 7)), (192, (7, 1))),
                      _Conv(192, 192, 3, stride=2)),
        nn.MaxPool2d(3, 2),
    ])  # fmt: skip


def _block_e(channels: int, pool: nn.Module) -> nn.Module:
    def fork(size: int) -> nn.Module:
        return _Branches([*_chain(size, (384, (1, 3))), *_chain(size, (384, (3, 1)))])

    return _Branches([
        *_chain(channels, (320, 1)),
        nn.Sequential(*_chain(channels, (384, 1)), fork(384)),
        nn.Sequential(*_chain(channels, (448, 1), (384, 3)), fork(384)),
        nn.Sequential(pool, *_chain(channels, (192, 1))),
    ])  # fmt: skip


class Inception(nn.Module):
    """Maps images to features.

    Attributes:
        num_features: Of an image; torchmetrics asks for it.
    """

    num_features = FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _Conv(3, 32, 3, stride=2), _Conv(32, 32, 3), *_chain(32, (64, 3)), nn.MaxPool2d(3, 2),
            _Conv(64, 80, 1), _Conv(80, 192, 3), nn.MaxPool2d(3, 2),
            _block_a(192, 32), _block_a(256, 64), _block_a(288, 64), _block_b(288),
            _block_c(768, 128), _block_c(768, 160), _block_c(768, 160), _block_c(768, 192),
            _block_d(768), _block_e(1280, _average()), _block_e(2048, nn.MaxPool2d(3, 1, 1)),
        )  # fmt: skip
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Map `(N, 3, 299, 299)` images, numbers of 0 to 255 of any dtype, to `(N, 2048)`."""
        x = (images.float() - 128) / 128
        features: Tensor = self.layers(x).mean((2, 3))
        return features

    @property
    def edge(self) -> int:
        """Pixels of an image's edge."""
        return _EDGE

    @classmethod
    def load(cls, file: Path) -> Inception:
        """Read weights in any of the three layouts in use.

        pytorch-fid's and torch-fidelity's are state dictionaries with torchvision's names, the
        third is a TorchScript with names of its own. All hold the same convolutions in one order.

        Args:
            file: `.pth` or `.pt`.

        Raises:
            DQError: If the file holds something else.
        """
        model = cls()
        layers = [module for module in model.modules() if isinstance(module, _Conv)]
        try:
            found = _convolutions(_state(file))
            if len(found) != len(layers):
                raise KeyError(f"{len(found)} convolutions instead of {len(layers)}")
            for layer, tensors in zip(layers, found, strict=True):
                layer.conv.load_state_dict({"weight": tensors.pop("conv.weight")})
                layer.norm.load_state_dict(tensors, strict=False)
        except (RuntimeError, KeyError, ValueError, AttributeError) as error:
            raise DQError(
                f"{file} does not hold the 2015 Inception weights ({str(error).splitlines()[0]}); "
                "`dq eval --features inception` without --weights names three places to get them"
            ) from error
        return model


def _state(file: Path) -> Mapping[str, Tensor]:
    try:
        script = torch.jit.load(str(file), map_location="cpu")
    except RuntimeError:  # not a TorchScript
        state: Mapping[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        return state
    found: Mapping[str, Tensor] = script.state_dict()
    return found


def _convolutions(state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the tensors of each convolution by our names, in order."""
    found = []
    for name, tensor in state.items():
        if tensor.dim() != 4 or "Aux" in name:
            continue
        stem = name.removesuffix("weight")
        scripted = f"{stem}beta" in state
        norm = stem if scripted else f"{stem.removesuffix('conv.')}bn."
        names = ("beta", "mean", "var") if scripted else ("bias", "running_mean", "running_var")
        ours = ("bias", "running_mean", "running_var")
        tensors = {own: state[norm + theirs] for own, theirs in zip(ours, names, strict=True)}
        tensors["weight"] = state.get(f"{norm}weight") if not scripted else None  # type: ignore[assignment]
        if tensors["weight"] is None:
            tensors["weight"] = torch.ones_like(tensors["bias"])
        found.append({"conv.weight": tensor, **tensors})
    return found
