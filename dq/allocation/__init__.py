"""Which option each layer gets: an integer programme, pure numbers."""

from dq.allocation.lagrange import relax
from dq.allocation.problem import Budget, Choice, Option, Problem
from dq.allocation.programme import smallest, solve

__all__ = ["Budget", "Choice", "Option", "Problem", "relax", "smallest", "solve"]
