"""What layers store beside their codes, as the one tensor that files hold it in.

A tensor costs about 130 bytes of a file's header, most of them its name, and a layer has up to four
of a few numbers each: apart they would be a twentieth of a small model at one bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from dq.nn.stored import COMPANIONS

__all__ = ["JOINED", "companions_in", "join", "part"]

JOINED = "dq_companions"  # its name


def companions_in(names: Iterable[str], layers: Collection[str]) -> list[str]:
    """Return which tensors of a `state_dict` are joined, in the order in which they are.

    Args:
        names: Of all tensors.
        layers: Names of the packed layers.
    """
    split = ((name, *name.rpartition(".")) for name in names)
    return sorted(name for name, layer, _, own in split if own in COMPANIONS and layer in layers)


def join(state: Mapping[str, Tensor], layers: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors of a file from those of a model.

    Args:
        state: Of the model, by name; those beside the codes are float32.
        layers: Names of the packed layers.

    Returns:
        `state` with all of its companions in one tensor `JOINED`, float32, in the order of their
        names; a copy on the CPU. Without packed layers there is none.
    """
    files = dict(state)
    parts = [files.pop(name) for name in companions_in(state, layers)]
    if parts:
        files[JOINED] = torch.cat([tensor.detach().cpu().flatten() for tensor in parts])
    return files


def part(joined: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Invert `join`.

    Args:
        joined: `(sum of all sizes,)` float32.
        shapes: Of all companions, by name.

    Returns:
        A tensor of its own for each name: a view would keep all of them in memory.
    """
    names = sorted(shapes)
    parts = joined.split([shapes[name].numel() for name in names])
    return {n: p.clone().view(shapes[n]) for n, p in zip(names, parts, strict=True)}
