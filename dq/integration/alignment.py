"""Where tensors begin in memory, which decides the last bits of products."""

from __future__ import annotations

from torch import nn

__all__ = ["align"]

_ALIGNMENT = 64  # of torch's own allocations, bytes


def align(model: nn.Module) -> None:
    """Move float tensors that lie at odd addresses to memory of their own.

    safetensors maps tensors at whatever offset a file's header leaves, and there MKL adds products
    up in another order: a reloaded model would differ from the saved one in the last bits.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        odd = tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT
        if odd and tensor.is_floating_point():
            tensor.data = tensor.data.clone()
