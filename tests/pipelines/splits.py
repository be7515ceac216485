"""What a family says about concatenations, against the `torch.cat` that really runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dq.family import family_of, quantizable

__all__ = ["concatenated_inputs", "sample"]


class _Cats(TorchFunctionMode):
    """Remembers the results of torch.cat along the channels, with the sizes of their parts."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, int, tuple[int, ...]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat):
            dim = kwargs.get("dim", 0) if len(args) < 2 else args[1]
            axis = dim % result.dim()
            self.seen.append((result, axis, tuple(part.shape[axis] for part in args[0])))
        return result


def sample(model: nn.Module, seed: int = 0) -> dict[str, Any]:
    """Return the family's inputs for a batch of two."""
    return family_of(model).sample_inputs(model, 2, torch.Generator().manual_seed(seed))


@torch.no_grad()
def concatenated_inputs(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Run the model; return the sizes of the parts of each layer's input that is a raw concat."""
    cats, found = _Cats(), {}

    def hook(name: str, axis: int):
        def seen(module: nn.Module, args: Any) -> None:
            for result, dim, sizes in cats.seen:
                same = result.data_ptr() == args[0].data_ptr() and result.shape == args[0].shape
                if same and dim == axis % result.dim():
                    found[name] = sizes

        return seen

    handles = [
        layer.register_forward_pre_hook(hook(name, -1 if isinstance(layer, nn.Linear) else 1))
        for name, layer in quantizable(model).items()
    ]
    with cats:
        model(**sample(model))
    for handle in handles:
        handle.remove()
    return found
