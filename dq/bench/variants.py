"""The competitors: one denoiser in full precision, in bfloat16 and quantized, each at its best."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dq import attention
from dq.bench.models import Checkpoint, Subject
from dq.bench.peers import Peer
from dq.bench.timing import interleave
from dq.errors import DQError
from dq.family import family_of
from dq.pipelines.draw import default_prompts, draw, repeated
from dq.recipe import Recipe

__all__ = ["BASELINE", "COMPILED", "REFERENCE", "Variant", "pipelines", "variants"]

REFERENCE = "fp32"  # torch's defaults: what errors are measured against
BASELINE = "bf16"  # what times are measured against
COMPILED = ", compiled"  # what names of compiled variants end in; their baseline is compiled too
_ATTENTION = "bf16+attention"  # the baseline with our attention, but nothing quantized
_ONEDNN = "fp32-onednn"
_TRIALS = 3
_PLAIN = {REFERENCE: torch.float32, _ONEDNN: torch.float32,
          BASELINE: torch.bfloat16, _ATTENTION: torch.bfloat16}  # fmt: skip
_FOR_CPUS = (_ONEDNN, _ATTENTION)


@dataclass(frozen=True)
class Variant:
    """One competitor, ready to run.

    Args:
        name: "fp32", "fp32-onednn", "bf16" or a recipe.
        model: The denoiser.
        inputs: Arguments of its forward call.
        onednn: Whether float32 linears go through oneDNN: on AMD twice as fast as torch's default.
        channels_last: Whether images and weights of convolutions are laid out channels last.
        run: What runs instead of the model: its compiled form, or the pipeline that it belongs to.
    """

    name: str
    model: nn.Module
    inputs: Mapping[str, Any]
    onednn: bool = False
    channels_last: bool = False
    run: Callable[..., Any] | None = None

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Run one forward call, without gradients as diffusers' pipelines do."""
        with _float32_linears(self.onednn):
            run = self.model if self.run is None else self.run
            answer = run(**self.inputs, **_plain(self.model))
        output: Tensor = answer[0] if isinstance(answer, tuple) else answer
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


def _plain(model: nn.Module) -> dict[str, Any]:
    """Return what makes a denoiser return tensors, where it does not anyway."""
    known = inspect.signature(model.forward).parameters
    return {"return_dict": False} if "return_dict" in known else {}


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
    models = {name: subject.plain(dtype, seed) for name, dtype in _plain_forms(device).items()}
    if _ATTENTION in models:
        attention.install(models[_ATTENTION])
    for recipe in recipes:
        models[recipe.name] = subject.quantized(recipe, seed)
    made = [_variant(name, m.to(device), batch, seed) for name, m in models.items()]
    found = [_fastest(variant) for variant in made]
    if compiled:
        again = [v for v in found if v.name == BASELINE or v.name not in _PLAIN]
        found += [
            replace(v, name=v.name + COMPILED, run=torch.compile(v.model, fullgraph=True))
            for v in again
        ]
    for name, peer in against.items():
        plain = _variant(name, subject.plain(torch.bfloat16, seed), batch, seed)
        model = peer.build(plain.model, plain.inputs, torch.get_num_threads())
        found.append(replace(plain, model=model))
    return found


def pipelines(
    subject: Subject, recipes: Sequence[Recipe], batch: int, steps: int, seed: int, device: str
) -> list[Variant]:
    """Return competitors that draw whole batches of images.

    Args:
        subject: A checkpoint.
        recipes: What its denoiser is quantized by.
        batch: Images.
        steps: Denoising steps.
        seed: Of the first image.
        device: Where it runs.

    Raises:
        DQError: If the subject is a denoiser alone.
    """
    if not isinstance(subject, Checkpoint):
        raise DQError(f"{subject.name} is a denoiser without a pipeline; ask for a checkpoint")
    forms = _plain_forms(device)
    pipes = {name: subject.pipeline(dtype) for name, dtype in forms.items() if name != _ONEDNN}
    if _ATTENTION in pipes:
        attention.install(pipes[_ATTENTION].denoiser)
    for recipe in recipes:
        pipes[recipe.name] = subject.pipeline(torch.bfloat16, recipe, seed)
    chosen = repeated(default_prompts(pipes[REFERENCE]), batch)
    seeds = [seed + i for i in range(batch)]

    def drawn(pipe: Any, return_dict: bool = False) -> tuple[Tensor]:
        images = draw(pipe, chosen, seeds, steps, batch=batch, output_type="latent")
        return (torch.stack([torch.as_tensor(image) for image in images]),)

    return [
        Variant(name, pipe.denoiser, {}, run=partial(drawn, pipe.to(device)))
        for name, pipe in pipes.items()
    ]


def _plain_forms(device: str) -> dict[str, torch.dtype]:
    """Return the dtypes of what competes without quantization, by name."""
    return {n: dtype for n, dtype in _PLAIN.items() if device == "cpu" or n not in _FOR_CPUS}


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
