"""What the methods share that change inputs before these are quantized; see `dq.transform`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from dq.errors import DQError, inside
from dq.family import Role, check_roles, quantizable
from dq.inputs import Seen, look
from dq.method import Job, Method
from dq.nn import describe
from dq.nn.layers import Layer
from dq.plan import LayerSpec, Plan
from dq.progress import track
from dq.transform import NO_TRANSFORM, Transform

__all__ = ["Change", "FittedChange", "Site"]


@dataclass(frozen=True)
class Site:
    """Layers that see the same input, and what is known of it.

    Attributes:
        layers: The float layers, by name.
        specs: How they are to be quantized.
        input: What is known of their input.
        before: How an earlier step changes it.
    """

    layers: dict[str, Layer]
    specs: dict[str, LayerSpec]
    input: Seen
    before: Transform


@dataclass(frozen=True)
class Change(Method):
    """Change the inputs of quantized layers, and the weights with them. Subclasses say how.

    Args:
        roles: Roles whose layers are looked at; empty for all.
    """

    roles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_roles(self.roles)

    def _set(self, job: Job, specs: dict[str, LayerSpec], name: str, transform: Transform) -> None:
        specs[name] = self.changed_spec(specs[name], transform)
        job.transforms[name] = transform
        job.ranges.pop(name, None)  # it was that of the input before

    def changed_spec(self, spec: LayerSpec, transform: Transform) -> LayerSpec:
        """Return what a layer's spec becomes."""
        return dataclasses.replace(spec, transform=transform.spec)

    def _groups(self, job: Job) -> Iterator[tuple[str, ...]]:
        """Yield the layers that one norm feeds together, then every other layer by itself."""
        roles = job.family.roles(job.model)
        wanted = {
            name
            for name, spec in job.plan.layers.items()
            if spec.input is not None
            and (not self.roles or roles[name] in self.roles)
            # Of these the first token is kept apart instead, see `dq.nn.kept`.
            and not (spec.is_static and roles[name] is Role.CROSS_KV)
        }
        fed = [tuple(n for n in some if n in wanted) for some in job.family.fed(job.model).values()]
        together = [group for group in fed if group]
        yield from together
        alone = wanted - {name for group in together for name in group}
        yield from ((name,) for name in job.plan.layers if name in alone)


@dataclass(frozen=True)
class FittedChange(Change, ABC):
    """A change that depends on what the inputs are."""

    @abstractmethod
    def change(self, site: Site) -> Transform | None:
        """Return how the input of some layers is to be changed; None leaves it."""

    def decide(self, job: Job) -> Plan:
        """Find a change for each input; see `Method.decide`.

        Raises:
            NeedsData: If nothing makes the denoiser run.
        """
        groups = list(self._groups(job))
        names = [name for group in groups for name in group]
        seen = look(job.calibration, names) if names else {}
        layers, specs = quantizable(job.model), dict(job.plan.layers)
        for group in track(groups, f"{type(self).__name__.lower()}"):
            first = group[0]
            site = Site(
                {name: layers[name] for name in group},
                {name: specs[name] for name in group},
                seen[first],
                job.transforms.get(first, NO_TRANSFORM),
            )
            with inside(describe(first, layers[first])):
                found = self.change(site)
            if found is not None:
                for name in group:
                    self._set(job, specs, name, found)
        return dataclasses.replace(job.plan, layers=specs)

    def refuse(self, before: Transform, what: str) -> None:
        """Refuse to add what an earlier step has added."""
        if before != NO_TRANSFORM:
            raise DQError(f"its input is {before.spec} already: {what} comes first, and once")
