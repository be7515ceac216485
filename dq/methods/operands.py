"""Quantized operands of attention: q and k, probabilities and v.

QuEST and Q-Diffusion round them as well as the inputs of layers (Wang et al. 2024, arXiv
2402.03666; Li et al. 2023, arXiv 2302.04304), with one static scale an operand. Here scales are
found at run time, see `dq.attention_spec`; the products are simulated.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dq import attention
from dq.attention_spec import AttentionSpec
from dq.errors import DQError
from dq.method import Job, Method, methods
from dq.plan import Plan
from dq.presets import FLOAT
from dq.spec import Granularity, TensorSpec

__all__ = ["Operands"]


@methods.register("operands")
@dataclass(frozen=True)
class Operands(Method):
    """Quantize the operands of every attention; comes after the step that decides formats.

    Args:
        query_key: Format of q and k, or "float".
        value: Format of v, or "float".
        probabilities: Format of probabilities, unsigned, or "float", as `value`.
    """

    query_key: str = "int8"
    value: str = "int8"
    probabilities: str = "uint8"

    def __post_init__(self) -> None:
        self.spec()

    def spec(self) -> AttentionSpec:
        """Return what a site becomes.

        Raises:
            DQError: If the formats do not go together.
        """
        names = (self.query_key, self.value, self.probabilities)
        token = Granularity("token")
        q, v, p = (None if n == FLOAT else TensorSpec(n, token, dynamic=True) for n in names)
        return AttentionSpec(q, v, p)

    def decide(self, job: Job) -> Plan:
        """Give every attention the same formats; see `Method.decide`.

        Raises:
            DQError: If the model has no attention that can be changed.
        """
        names = attention.sites(job.model)
        if not names:
            raise DQError(
                f"operands: no attention of this {type(job.model).__name__} can be changed; its "
                "processors call no attention function of torch or diffusers"
            )
        before = job.plan.attention
        made = {name: self._with(before.get(name)) for name in names}
        return dataclasses.replace(job.plan, attention=made)

    def _with(self, before: AttentionSpec | None) -> AttentionSpec:
        """Return the spec of a site, with the order of tokens that it has already."""
        tokens = None if before is None else before.tokens
        return dataclasses.replace(self.spec(), tokens=tokens)
