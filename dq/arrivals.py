"""Check what a checkpoint's files hold against what its plan promises, before it is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dq import checksum
from dq.errors import DQError
from dq.nn.joined import JOINED, companions_in, part
from dq.nn.token_site import TOKEN_TENSORS
from dq.plan import Plan

__all__ = ["Arrivals", "leaf"]

_OTHER_CHECKPOINT = (
    "config.json and weights are of different checkpoints: copy or download both again"
)


def leaf(name: str) -> str:
    """Return the last part of a dotted name."""
    return name.rpartition(".")[2]


class Arrivals:
    """Compares the tensors of a packed checkpoint, as they come in, with plan and checksums.

    Args:
        model: The model with empty packed layers: it says what has to come.
        plan: The plan from config.json.
        expected: Checksums from the headers of the files, by tensor name; may be empty.
    """

    def __init__(self, model: nn.Module, plan: Plan, expected: Mapping[str, int]) -> None:
        self.plan = plan
        self.expected = expected
        self.forms = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
        companions = companions_in(self.forms, plan.layers)
        self.companions = {name: self.forms.pop(name)[0] for name in companions}
        if companions:
            numbers = sum(shape.numel() for shape in self.companions.values())
            self.forms[JOINED] = torch.Size([numbers]), torch.float32
        self.found: dict[str, int] = {}

    def check_names(self, names: Iterable[str]) -> None:
        """Compare the names in the files with those of the model, before anything is read.

        Raises:
            DQError: If a tensor is missing, or a packed one is there that the plan does not name.
        """
        names = list(names)
        lost = sorted(self.forms.keys() - set(names))
        if lost:
            raise DQError(
                f"the weights lack {len(lost)} tensors that config.json promises, the first is "
                f"{lost[0]}; the file is incomplete, or {_OTHER_CHECKPOINT}"
            )
        for name in names:
            if leaf(name) in (JOINED, *TOKEN_TENSORS) and name not in self.forms:
                raise DQError(
                    f"the weights hold {name}, of a part that the plan in config.json does not "
                    f"name; {_OTHER_CHECKPOINT}"
                )

    def take(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Compare one tensor, as it is in the file, and return what the model has of it.

        Raises:
            DQError: If shape, dtype or checksum is not what it should be.
        """
        self._check_form(name, value)
        found = checksum.of(value)
        if self.expected.get(name, found) != found:
            raise DQError(
                f"tensor {name} is damaged: its checksum is {found:08x}, the file was written with "
                f"{self.expected[name]:08x}; copy or download the checkpoint again"
            )
        if name != JOINED:
            self.found[name] = found
            return {name: value}
        parts = part(value, self.companions)
        self.found.update({own: checksum.of(tensor) for own, tensor in parts.items()})
        return parts

    def _check_form(self, name: str, value: Tensor) -> None:
        if name not in self.forms:
            return  # diffusers warns about tensors that a model has no use for
        shape, dtype = self.forms[name]
        layer, own = name.rpartition(".")[0], leaf(name)
        codes = layer in self.plan.layers and own == "weight"
        packed = codes or own in (JOINED, *TOKEN_TENSORS)
        if value.shape != shape or (packed and value.dtype != dtype):
            raise DQError(
                f"tensor {name} should be {_form(shape, dtype)} by the plan in config.json, the "
                f"file has {_form(value.shape, value.dtype)}; {_OTHER_CHECKPOINT}"
            )

    def check_digest(self, digest: str | None) -> None:
        """Compare all packed tensors with the digest in config.json, once they have come in.

        Raises:
            DQError: If they are of another checkpoint.
        """
        if digest is None:
            return
        found = checksum.digest(self.found, self.plan)
        if found != digest:
            raise DQError(
                f"plan and packed weights have checksum {found}, config.json was written with "
                f"{digest}; {_OTHER_CHECKPOINT}"
            )


def _form(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
