"""The competitors: one denoiser in full precision, in bfloat16 and quantized, each at its best."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dq import attention
from dq.bench.models import Subject
from dq.bench.peers import Peer
from dq.bench.timing import interleave
from dq.family import family_of
from dq.recipe import Recipe

__all__ = ["BASELINE", "COMPILED", "REFERENCE", "Variant", "variants"]

REFERENCE = "fp32"  # torch's defaults: what errors are measured against
BASELINE = "bf16"  # what times are measured against
COMPILED = ", compiled"  # what names of compiled variants end in; their baseline is compiled too
_ATTENTION = "bf16+attention"  # the baseline with our attention, but nothing quantized
_ONEDNN = "fp32-onednn"
_TRIALS = 3


@dataclass(frozen=True)
class Variant:
    """One competitor, ready to run.

    Args:
        name: "fp32", "fp32-onednn", "bf16" or a recipe.
        model: The denoiser.
        inputs: Arguments of its forward call.
        onednn: Whether float32 linears go through oneDNN: on AMD twice as fast as torch's default.
        channels_last: Whether images and weights of convolutions are laid out channels last.
        compiled: What runs instead of the model: its compiled form.
    """

    name: str
    model: nn.Module
    inputs: Mapping[str, Any]
    onednn: bool = False
    channels_last: bool = False
    compiled: Callable[..., Any] | None = None

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Run one forward call, without gradients as diffusers' pipelines do."""
        with _float32_linears(self.onednn):
            run = self.model if self.compiled is None else self.compiled
            output: Tensor = run(**self.inputs, return_dict=False)[0]
        if output.is_cuda:
            torch.cuda.synchronize(output.device)  # a GPU answers before it is done
        return output

    def laid_out(self, channels_last: bool) -> Variant:
        """Return a copy in one of the two layouts."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model = copy.deepcopy(self.model)
        for parameter in model.parameters():
            parameter.data = _laid_out(parameter.data, layout)
        inputs = {key: _laid_out(value, layout) for key, value in self.inputs.items()}
        return replace(self, model=model, inputs=inputs, channels_last=channels_last)


def _laid_out(value: Any, layout: torch.memory_format) -> Any:
    is_image = isinstance(value, Tensor) and value.dim() == 4
    return value.contiguous(memory_format=layout) if is_image else value


@contextmanager
def _float32_linears(onednn: bool) -> Iterator[None]:
    """While active, float32 linears run in oneDNN, if asked.

    It is what `torch.set_float32_matmul_precision("medium")` does on a CPU, through the newer
    setting, which can be restored. It allows bfloat16 products; without AMX oneDNN makes no use of
    that, as the error in the report shows (5e-7).
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if onednn:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def variants(
    subject: Subject,
    recipes: Sequence[Recipe],
    batch: int,
    seed: int,
    device: str = "cpu",
    compiled: bool = False,
    against: Mapping[str, Peer] = MappingProxyType({}),
) -> list[Variant]:
    """Return all competitors of one model, each in the layout that it is faster in.

    Args:
        subject: The model.
        recipes: What it is quantized by.
        batch: Images in a forward call.
        seed: Of weights, inputs and calibration.
        device: Where it runs.
        compiled: Whether bfloat16 and the recipes compete once more, compiled as a whole.
        against: Peers by name.
    """
    models = {
        REFERENCE: subject.plain(torch.float32, seed),
        _ONEDNN: subject.plain(torch.float32, seed),
        BASELINE: subject.plain(torch.bfloat16, seed),
        _ATTENTION: subject.plain(torch.bfloat16, seed),
    }
    attention.install(models[_ATTENTION])
    for recipe in recipes:
        models[recipe.name] = subject.quantized(recipe, seed)
    made = [_variant(name, m.to(device), batch, seed) for name, m in models.items()]
    found = [_fastest(variant) for variant in made]
    if compiled:
        again = [v for v in found if v.name == BASELINE or v.name not in _PLAIN]
        found += [
            replace(v, name=v.name + COMPILED, compiled=torch.compile(v.model, fullgraph=True))
            for v in again
        ]
    for name, peer in against.items():
        plain = _variant(name, subject.plain(torch.bfloat16, seed), batch, seed)
        model = peer.build(plain.model, plain.inputs, torch.get_num_threads())
        found.append(replace(plain, model=model))
    return found


_PLAIN = (REFERENCE, _ONEDNN, BASELINE, _ATTENTION)


def _variant(name: str, model: nn.Module, batch: int, seed: int) -> Variant:
    generator = torch.Generator().manual_seed(seed + 1)  # not what was calibrated on
    inputs = family_of(model).sample_inputs(model, batch, generator)
    return Variant(name, model, inputs, onednn=name == _ONEDNN)


def _fastest(variant: Variant) -> Variant:
    """Return a variant in its faster layout; models without convolutions have only one."""
    convolutions = [m for m in variant.model.modules() if isinstance(m, nn.Conv2d)]
    if len(convolutions) < 2:  # transformers have one, which cuts patches
        return variant
    both = {str(last): variant.laid_out(last) for last in (False, True)}
    times = interleave(both, _TRIALS, f"layout of {variant.name}")
    return both[min(both, key=lambda key: times[key].cpu_milliseconds)]
