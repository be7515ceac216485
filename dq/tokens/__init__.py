"""Tokens of an attention: where they lie, in which orders they may be put, which blocks count."""

from dq.tokens.layout import TokenLayout
from dq.tokens.orders import candidates, places
from dq.tokens.spec import TokenSpec

__all__ = ["TokenLayout", "TokenSpec", "candidates", "places"]
