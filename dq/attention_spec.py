"""How the operands of one attention are quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from dq.errors import DQError, unknown
from dq.spec import TensorSpec

__all__ = ["AttentionSpec"]


@dataclass(frozen=True)
class AttentionSpec:
    """The four operands of `softmax(q k^T) v`; all have their scales found at run time.

    A scale must be the same for everything that is summed over: q and k have one a token, the
    probabilities p one a query, and v one a head, since its tokens are summed. None of them adds an
    offset to a product, so that p, which is never negative, is unsigned with the code 0 for 0.

    Args:
        query_key: Of q and k, seen as `(tokens, D)`; None leaves both as they are.
        value: Of v, seen as `(heads, tokens * D)`.
        probabilities: Of p, seen as `(queries, keys)`; None, like `value`, leaves both as they are.
    """

    query_key: TensorSpec | None = None
    value: TensorSpec | None = None
    probabilities: TensorSpec | None = None

    def __post_init__(self) -> None:
        if (self.value is None) != (self.probabilities is None):
            raise DQError("values and probabilities are quantized together, or neither is")
        if self.query_key is None and self.value is None:
            raise DQError("an attention spec without operands does nothing; leave the site out")
        for field in dataclasses.fields(self):
            spec = getattr(self, field.name)
            if spec is None:
                continue
            if not spec.dynamic or spec.granularity.kind != "token" or not spec.symmetric:
                raise DQError(f"{field.name} is dynamic by token and symmetric, not {spec}")
            unsigned = spec.grid.low == 0
            if unsigned != (field.name == "probabilities"):
                raise DQError(
                    f"probabilities alone are unsigned: {field.name} is not {spec.format}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        specs = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: spec.to_dict() for name, spec in specs.items() if spec is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Invert `to_dict`.

        Raises:
            DQError: For an unknown key, or a value that does not fit.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise unknown("key of an attention spec", key, known)
        return cls(**{name: TensorSpec.from_dict(spec) for name, spec in values.items()})

    def __str__(self) -> str:
        scores = "float" if self.query_key is None else self.query_key.format
        words = [f"q k {scores}"]
        if self.value is None or self.probabilities is None:
            return f"{words[0]}, p v float"
        return f"{words[0]}, p {self.probabilities.format} v {self.value.format}"
