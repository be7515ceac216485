"""The module that fake-quantizes one tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dq.errors import DQError
from dq.nn.steps import Steps
from dq.nn.stepwise import scales_now
from dq.quantize import choose_scales, dequantize, fake_quantize, quantize
from dq.scales import Scales, scales_of_range
from dq.spec import TensorSpec
from dq.storage import pack_weight

__all__ = ["Quantizer"]


class Quantizer(nn.Module):
    """Fake-quantizes one matrix `(R, K)`, with straight-through gradients.

    Args:
        spec: How. Dynamic specs need nothing more; others need `fit` or `set_range` first.

    Attributes:
        steps: Knows the timestep, where the spec has step groups.
    """

    scale: Tensor | None
    zero: Tensor | None
    multiplier: Tensor | None
    more: Tensor | None
    gain: nn.Parameter | None
    steps: Steps | None = None

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_parameter("gain", None)
        for name in Scales._fields:
            self.register_buffer(name, None)

    def fit(self, x: Tensor) -> None:
        """Choose the scales for a known matrix, e.g. a weight."""
        self.set_scales(choose_scales(x.detach(), self.spec))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take over observed ranges of an input.

        Args:
            low: `(S, G)` float32, of S step groups and G groups of channels, which are one each
                where there are none; or a single element.
            high: Likewise.
        """
        low, high = (end if end.dim() == 2 else end.view(1, 1) for end in (low, high))
        self.set_scales(scales_of_range(low, high, self.spec))

    @property
    def depends_on_step(self) -> bool:
        """Whether it has to know the timestep."""
        return bool(self.spec.step_groups)

    def set_scales(self, scales: Scales) -> None:
        """Take over scales that were chosen before."""
        for name, value in scales._asdict().items():
            setattr(self, name, value)

    def learn(self) -> nn.Parameter:
        """Make the scale learnable, and return what it is multiplied by: the logarithm of a factor.

        A factor that is learned itself can turn negative; its logarithm starts at 0, exactly.
        """
        self.gain = nn.Parameter(torch.zeros_like(self.scales.scale))
        return self.gain

    def settle(self) -> None:
        """Take over the scale that was learned, if one was."""
        if self.gain is not None:
            scales, self.gain = self.scales, None
            self.set_scales(Scales(*(x if x is None else x.detach() for x in scales)))  # type: ignore[arg-type]

    @property
    def scales(self) -> Scales:
        """The scales.

        Raises:
            DQError: If there are none yet.
        """
        if self.scale is None:
            raise DQError("it has no scales yet: static inputs need a calibration first")
        if self.gain is None:
            return Scales(self.scale, self.zero, self.multiplier, self.more)
        factor = self.gain.exp()
        more = None if self.more is None else self.more * factor.unsqueeze(-1)
        return Scales(self.scale * factor, self.zero, self.multiplier, more)

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of a matrix, `(R, K)` uint8."""
        return quantize(x, self.scales, self.spec)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the matrix `(R, K)` that codes stand for, float32."""
        return dequantize(codes, self.scales, self.spec)

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        """Return what is stored of a weight; see `dq.storage`."""
        return pack_weight(codes, self.scales, self.spec)

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized and dequantized `(R, K)` matrix, float32."""
        scales = choose_scales(x.detach(), self.spec) if self.spec.dynamic else self.scales
        if not self.spec.step_groups:
            return fake_quantize(x, scales, self.spec)
        assert self.steps is not None  # given by `dq.nn.steps.watch` when the layer was installed
        return fake_quantize(x, *scales_now(scales, self.spec, self.steps, len(x)))
