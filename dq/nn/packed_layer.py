"""What packed layers of all kinds share; see `dq.nn.packed` for the layers themselves."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dq.errors import DQError
from dq.kernels import Arguments, Kernel, Site, choose, copies, onednn
from dq.kernels.kernel import stamp_of
from dq.nn.changed import conv_groups, entered
from dq.nn.differentiable import Differentiable
from dq.nn.kernel_site import numbers_of, site_of
from dq.nn.layers import Layer, input_channels, matrix_shape
from dq.nn.quantizer import Quantizer
from dq.nn.simulated import QuantLayer, fake_input, segments, simulate
from dq.nn.split import columns_of, unpack_split
from dq.nn.steps import Steps
from dq.nn.stepwise import by_group, scales_now, spread_rows, stepwise
from dq.nn.stored import COMPANIONS, TENSORS, companion_forms, companions_of, weight_form
from dq.plan import LayerSpec
from dq.quantize import fake_quantize
from dq.scales import Scales
from dq.spec import TensorSpec
from dq.storage import unpack_weight
from dq.transform import Transform

__all__ = ["PackedLayer"]


class PackedLayer(nn.Module):
    """What both layers share.

    Attributes:
        spec: How the layer is quantized.
        weight: `(N, bytes)` uint8, packed codes; see `dq.storage`. Those of convolutions are
            `(N, bytes, 1, 1)`.
        weight_scale: `(N,)` or `(N, G)` float32.
        input_affine: `(S, 2)` float32, scale and code of zero of each segment, or group of
            channels, of a static input; `(T, S, 2)` for T step groups. None if it is dynamic or
            float.
        input_shift: `(C,)` float32, taken off the input first, or None: `dq.transform`.
        input_scale: `(C,)` float32, that the input is divided by then, or None.
        kept_input: `(K,)` float32, the token that is computed apart, or None: `dq.nn.kept`.
        kept_output: `(N,)` float32, what full precision makes of it, or None.
        table: `(T, N)` float32, outputs at the timesteps of `spec.tabled`, or None.
        output_affine: `(T, 2, N)` float32, scale and shift of the output in each of the
            `spec.output_groups`, or None.
        salient: `(S,)` float32, numbers of the input channels whose weights have more bits, or
            None: `dq.nn.split`.
        steps: Knows the timestep of the call, where something depends on it.
        compute_dtype: Dtype that the layer expects its input in; models ask for it.
        keep_int8: Whether kernels may keep whole numbers beside shorter codes; see
            `dq.nn.keep_int8`.
        remembers: Whether the output for an input tensor is kept as long as that tensor lives, for
            layers that see the same one at every step: projections of the prompt.
    """

    spec: LayerSpec
    weight: Tensor
    bias: Any  # Linear and Conv2d of torch type it differently
    weight_scale: Tensor
    input_affine: Tensor | None
    input_shift: Tensor | None
    input_scale: Tensor | None
    kept_input: Tensor | None
    kept_output: Tensor | None
    table: Tensor | None
    output_affine: Tensor | None
    salient: Tensor | None
    steps: Steps | None
    compute_dtype: torch.dtype
    keep_int8: bool
    gained_bias: bool = False  # that of a shift, where the float layer has none
    remembers: bool
    kind: str
    axis: int  # of the channels

    def _prepare(self, layer: Layer, spec: LayerSpec, device: torch.device | None) -> None:
        """Allocate what the spec says, without values."""
        self.spec = spec
        self.rows, self.columns = matrix_shape(layer)
        self.channels = input_channels(layer)
        self.sizes = segments(layer, spec)
        self.compute_dtype = _compute_dtype(layer)
        # PEFT tells a convolution from a linear by the number of dimensions of its weight.
        trailing = [1] * (self.weight.dim() - 2)
        del self.weight
        (shape, dtype), companions = weight_form(layer, spec), companion_forms(layer, spec)
        empty = torch.empty(*shape, *trailing, dtype=dtype, device=device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        for name in COMPANIONS:
            value = None
            if name in companions:
                shape, dtype = companions[name]
                value = torch.empty(shape, dtype=dtype, device=device)
            self.register_buffer(name, value)
        if layer.bias is not None or "input_shift" in companions:
            bias = torch.empty(self.rows, dtype=self.compute_dtype, device=device)
            learns = layer.bias is not None and layer.bias.requires_grad
            self.gained_bias = layer.bias is None
            self.bias = nn.Parameter(bias, requires_grad=learns)
        self.remembers = False
        self.steps = None
        self.keep_int8 = spec.weight.grid.bits == 8
        self._numbers = numbers_of(spec, self.columns)
        self._kernels: dict[str, Kernel | None] = {}

    def load_layer(self, layer: Layer) -> None:
        """Take over weight, bias and scales of a float or simulated layer.

        Raises:
            DQError: If the input is static and `layer` does not know its range.
        """
        simulated = layer if isinstance(layer, QuantLayer) else self._simulated(layer)
        for name, value in companions_of(simulated).items():
            setattr(self, name, value)
        matrix = simulated.matrix().detach()
        quantizer = simulated.weight_quantizer
        state = quantizer.pack(
            quantizer.encode(matrix) if simulated.codes is None else simulated.codes
        )
        self.weight = nn.Parameter(state["weight"].view(self.weight.shape), requires_grad=False)
        self.weight_scale = state["weight_scale"]
        bias = simulated.changed_bias()
        self.bias = bias if bias is None or bias is layer.bias else nn.Parameter(bias, False)
        self.train(layer.training)
        self.path(matrix.device.type)

    def _simulated(self, layer: Layer) -> QuantLayer:
        """Choose the scales of a float layer that no calibration has seen."""
        if self.spec.is_static:
            raise DQError("it has no scales yet: static inputs need a calibration first")
        rotation = 0 if self.spec.transform is None else self.spec.transform.rotation
        return simulate(layer, self.spec, transform=Transform(rotation=rotation))

    def float_weight(self) -> Tensor:
        """Return the weight that the codes stand for, float32, in the layer's own shape."""
        state = {"weight": self.weight.flatten(1), "weight_scale": self.weight_scale}
        if self.salient is not None:
            mask = columns_of(self.salient, self.channels, self.columns)
            return unpack_split(state, self.spec, mask, self.channels).view(self.float_shape)
        return unpack_weight(state, self.spec.weight, self.columns).view(self.float_shape)

    @property
    def transform(self) -> Transform:
        """How the input is changed before it is quantized."""
        spec = self.spec.transform
        rotation = 0 if spec is None else spec.rotation
        return Transform(self.input_shift, self.input_scale, rotation)

    def plain(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias for inputs that are not changed, float32."""
        weight, bias = self.float_weight(), self.bias
        if self.spec.transform is None:
            return weight, bias
        groups = conv_groups(self)
        weight = self.transform.restored(weight, groups)
        if self.gained_bias:
            return weight, None  # checkpoints of the float model have no place for it
        offset = self.transform.offset(weight, groups)
        return weight, bias if offset is None else bias.detach().float() - offset

    @property
    def float_shape(self) -> tuple[int, ...]:
        """Shape of the weight before packing."""
        raise AssertionError("each layer class has its own")

    def site(self, device: str) -> Site:
        """Return what a kernel has to do for this layer."""
        groups = conv_groups(self)
        return site_of(self.spec, self.kind, device, self.rows, self.columns, groups)

    def kernel(self, device: str) -> Kernel | None:
        """Return the kernel for a device type, chosen once; None means unpacking."""
        if device not in self._kernels:
            self._kernels[device] = choose(self.site(device)) if self._servable() else None
        return self._kernels[device]

    def _servable(self) -> bool:
        return True

    def path(self, device: str | None = None) -> str:
        """Return in words what the layer really computes on a device (default: where it is)."""
        path = self._product_path(device or self.weight.device.type)
        times = len(self.spec.tabled)
        return f"stored for {times} timesteps, else {path}" if times else path

    def _product_path(self, device: str) -> str:
        kernel = self.kernel(device)
        if kernel is not None:
            return kernel.path
        emulated = "" if self.spec.is_deployable else ", emulated format"
        if self.spec.input is None:
            dtype = str(self.compute_dtype).removeprefix("torch.")
            return f"unpack to {dtype}, stock kernel{emulated}"
        return f"simulated{emulated}"

    def arguments(self) -> Arguments:
        """Return the stored tensors in the form that kernels take."""
        return Arguments(
            weight=self.weight,
            scale=self.weight_scale,
            bias=self.bias,
            input_affine=self.input_affine,
            **self._numbers,
            keep=self.keep_int8,
        )

    def _simulated_input(self, x: Tensor) -> Tensor:
        low = self.spec.input
        x = entered(self, x, self.transform)
        if low is None:
            return x
        quantizers: list[Callable[[Tensor], Tensor]] = [Quantizer(low)]
        if self.input_affine is not None:
            affine = self.input_affine.view(-1, *self.input_affine.shape[-2:])
            parts = affine.chunk(len(self.sizes), 1)
            quantizers = [partial(self._fake, _scales(part, low), low) for part in parts]
        return fake_input(x, quantizers, self.sizes, self.axis, low)

    def _fake(self, scales: Scales, spec: TensorSpec, x: Tensor) -> Tensor:
        if not spec.step_groups:
            return fake_quantize(x, scales, spec)
        return fake_quantize(x, *scales_now(scales, spec, self._steps(), len(x)))

    def _steps(self) -> Steps:
        if self.steps is None:
            raise DQError("this layer depends on the timestep: call it through its denoiser")
        return self.steps

    @property
    def depends_on_step(self) -> bool:
        """Whether it has to know the timestep."""
        return self.spec.depends_on_step

    def run(self, kernel: Kernel, x: Tensor) -> Tensor:
        """Return what a kernel computes, with the input scales of the timestep."""
        a, affine = self.arguments(), self.input_affine
        groups = () if self.spec.input is None else self.spec.input.step_groups
        if not groups or affine is None:
            return self.run_on(kernel, x, a)

        def at(rows: Tensor, group: int) -> Tensor:
            return self.run_on(kernel, rows, a._replace(input_affine=affine[group]))

        index = self._steps().nearest(groups)
        if isinstance(index, int):
            return at(x, index)
        if len(index) == 1:  # in a graph: an index that is a number would become a constant of it
            return self.run_on(kernel, x, a._replace(input_affine=affine[index].squeeze(0)))
        return by_group(x, spread_rows(index, len(x)), len(groups), at)

    def run_on(self, kernel: Kernel, x: Tensor, a: Arguments) -> Tensor:
        """Return what a kernel computes on some tensors."""
        raise AssertionError("each layer class has its own")

    def simulate(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the same by a float product with the unpacked weight, differentiable."""
        raise AssertionError("each layer class has its own")

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in)` to `(..., out)`, or `(B, in, H, W)` to `(B, out, H', W')`."""
        return stepwise(self, x, self.product)

    def product(self, x: Tensor) -> Tensor:
        """Return the output, before what depends on the timestep."""
        kernel = self.kernel(x.device.type)
        if kernel is None:
            return self.simulate(x, self.bias)
        trained = x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if trained and torch.is_grad_enabled():
            return Differentiable.apply(x, self.bias, self, kernel)  # type: ignore[no-untyped-call]
        if self.remembers and not torch.compiler.is_compiling() and not x.is_inference():
            return self._remembered(kernel, x)
        return self.run(kernel, x)

    def _remembered(self, kernel: Kernel, x: Tensor) -> Tensor:
        """Return what this layer made of the very same input before, if neither has changed."""
        outputs: dict[int, Any] = x.__dict__.setdefault("_dq_outputs", {})
        now = (x._version, *stamp_of(self.weight, self.bias, self.input_affine))
        layer, then, y = outputs.get(id(self), (None, None, None))
        if layer is None or layer() is not self or then != now:
            y = self.run(kernel, x)
            outputs[id(self)] = (weakref.ref(self), now, y)
        assert isinstance(y, Tensor)  # it was made now or then
        return y

    def keep(self, int8: bool) -> None:
        """Say whether kernels may keep whole numbers beside the codes; drop those they have."""
        self.keep_int8 = int8
        onednn.forget(self.weight)
        copies.forget(self.weight)

    def stored_bytes(self) -> int:
        """Return the bytes of codes, scales, zero points and bias."""
        tensors = [getattr(self, name) for name in (*TENSORS, "bias")]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def resident_bytes(self) -> int:
        """Return `stored_bytes` plus the expanded copies that kernels keep."""
        kept = onednn.resident_bytes(self.weight) + copies.resident_bytes(self.weight)
        return self.stored_bytes() + kept

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Asked beforehand: torch changes a parameter in place, and a refusal must leave it whole.
        cast = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)).dtype
        if cast != self.weight.dtype:
            raise DQError(
                f"packed codes cannot be cast to {cast}; call dequantize() on the model first"
            )
        kept = {n: getattr(self, n) for n in COMPANIONS if getattr(self, n) is not None}
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self.weight.device)).dtype
        if probe in (torch.float32, torch.bfloat16, torch.float16):
            self.compute_dtype = probe
        return result

    def extra_repr(self) -> str:
        """Return shape and spec for `repr`."""
        return f"{super().extra_repr()}, {self.spec}"


def _scales(affine: Tensor, spec: TensorSpec) -> Scales:
    """Read the scales and the codes of zero of one input segment, `(T, g, 2)`."""
    scale, zero = affine.unbind(-1)
    return Scales(scale, None if spec.symmetric else zero + spec.grid.low)


def _compute_dtype(layer: Layer) -> torch.dtype:
    for tensor in (layer.bias, layer.weight):
        if tensor is not None and tensor.is_floating_point():
            return tensor.dtype
    return torch.float32
