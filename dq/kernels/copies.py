"""Other forms of stored weights, kept beside them as long as they live, for kernels on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["forget", "kept", "resident_bytes"]

Form = tuple[Tensor, ...]


@dataclass
class _Copies:
    """What is kept of one content of a weight.

    Attributes:
        stamp: Tells that content from later ones.
        forms: By name.
    """

    stamp: tuple[object, ...]
    forms: dict[str, Form] = field(default_factory=dict)


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def kept(weight: Tensor, name: str, make: Callable[[], Form]) -> Form:
    """Return a form of a stored weight, made when it is asked for first or the weight has changed.

    Args:
        weight: As it is stored; the form depends on nothing else.
        name: Of the form.
        make: Makes it, of tensors of its own.
    """
    version = 0 if weight.is_inference() else weight._version
    stamp = weight.device, weight.data_ptr(), version
    known: _Copies | None = _copies.get(weight)
    if known is None or known.stamp != stamp:
        known = _Copies(stamp)
        _copies[weight] = known
    if name not in known.forms:
        with torch.no_grad():
            known.forms[name] = make()
    return known.forms[name]


def resident_bytes(weight: Tensor) -> int:
    """Return the bytes of the forms that are kept of a stored weight."""
    known: _Copies | None = _copies.get(weight)
    forms = [] if known is None else known.forms.values()
    return sum(each.numel() * each.element_size() for form in forms for each in form)


def forget(weight: Tensor) -> None:
    """Drop the forms that are kept of a stored weight."""
    _copies.pop(weight, None)
