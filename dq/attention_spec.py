"""What one attention becomes: operands of few bits, tokens in another order, blocks left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from dq.errors import DQError, check_known
from dq.formats import FloatFormat
from dq.spec import TensorSpec
from dq.tokens.spec import TokenSpec

__all__ = ["AttentionSpec"]


@dataclass(frozen=True)
class AttentionSpec:
    """The four operands of `softmax(q k^T) v`; all have their scales found at run time.

    A scale must be the same for everything that is summed over: q and k have one a token, the
    probabilities p one a query, and v one a head, since its tokens are summed. None of them adds an
    offset to a product, so that p, which is never negative, is unsigned with the code 0 for 0.

    Where tokens are ordered, sums may go block by block, and granularity "block" gives q, k and p
    one scale a block, v one a block of keys and feature. Keys have their mean taken off first,
    which no softmax sees.

    Args:
        query_key: Of q and k, seen as `(tokens, D)`; None leaves both as they are.
        value: Of v, seen as `(heads, tokens * D)`.
        probabilities: Of p, seen as `(queries, keys)`; None, like `value`, leaves both as they are.
        tokens: Order of the tokens, and which blocks are computed; None for all, as they come.
    """

    query_key: TensorSpec | None = None
    value: TensorSpec | None = None
    probabilities: TensorSpec | None = None
    tokens: TokenSpec | None = None

    def __post_init__(self) -> None:
        if (self.value is None) != (self.probabilities is None):
            raise DQError("values and probabilities are quantized together, or neither is")
        if self.query_key is None and self.value is None and self.tokens is None:
            raise DQError("an attention spec that changes nothing; leave the site out")
        wanted = "block" if self.by_block else "token"
        if wanted == "block" and self.tokens is None:
            raise DQError("scales by block need ordered tokens, which say what a block is")
        for name, spec in self._operands().items():
            if not spec.dynamic or spec.granularity.kind != wanted or not spec.symmetric:
                raise DQError(f"{name} is dynamic by {wanted} and symmetric, not {spec}")
            if isinstance(spec.grid, FloatFormat):
                continue  # no product takes unsigned ones
            if (spec.grid.low == 0) != (name == "probabilities"):
                raise DQError(f"probabilities alone are unsigned: {name} is not {spec.format}")

    def _operands(self) -> dict[str, TensorSpec]:
        every = {name: getattr(self, name) for name in ("query_key", "value", "probabilities")}
        return {name: spec for name, spec in every.items() if spec is not None}

    @property
    def by_block(self) -> bool:
        """Whether scales are those of blocks."""
        return any(spec.granularity.kind == "block" for spec in self._operands().values())

    @property
    def by_token(self) -> bool:
        """Whether operands have scales of tokens, which no block-sparse kernel takes."""
        return self.has_operands and not self.by_block

    @property
    def has_operands(self) -> bool:
        """Whether some operands are quantized."""
        return bool(self._operands())

    @property
    def depends_on_step(self) -> bool:
        """Whether it has to know the timestep."""
        return self.tokens is not None and bool(self.tokens.groups)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        values = {name: spec.to_dict() for name, spec in self._operands().items()}
        return values if self.tokens is None else {**values, "tokens": self.tokens.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Invert `to_dict`.

        Raises:
            DQError: For an unknown key, or a value that does not fit.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        check_known("key of an attention spec", values, known)
        read = {n: TensorSpec.from_dict(spec) for n, spec in values.items() if n != "tokens"}
        tokens = TokenSpec.from_dict(values["tokens"]) if "tokens" in values else None
        return cls(**read, tokens=tokens)

    def __str__(self) -> str:
        words = []
        if self.query_key is not None or self.value is not None:
            scores = "float" if self.query_key is None else self.query_key.format
            words.append(f"q k {scores}")
            if self.value is None or self.probabilities is None:
                words.append("p v float")
            else:
                words.append(f"p {self.probabilities.format} v {self.value.format}")
        return ", ".join(words if self.tokens is None else [*words, str(self.tokens)])
