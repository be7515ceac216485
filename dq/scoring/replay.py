"""The denoiser alone: what it puts out for the very inputs that full precision's images led to.

Images differ by all steps together, each going on from what the one before has left; here every
call is the same on both sides, so that the difference is what quantization does to one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dq.calibrate import Calibration, CalibrationSpec
from dq.calls import Call, run
from dq.pipelines.draw import PipelineSource
from dq.pipelines.gallery import Settings
from dq.progress import track

__all__ = ["captured", "outputs"]

_IMAGES = 16  # the first ones: their calls at all steps lie in memory


def captured(pipe: Any, settings: Settings) -> list[Call]:
    """Draw the first images and return the denoiser's arguments at each step.

    Args:
        pipe: In full precision.
        settings: What is drawn.
    """
    prompts = settings.prompts[:_IMAGES]
    spec = CalibrationSpec(
        prompts, len(prompts), settings.steps, settings.batch, settings.seed, size=settings.size
    )
    source = PipelineSource(pipe, settings.guidance)
    batches = Calibration(pipe.denoiser, source, spec).batches()
    return [call for batch in batches for call in batch]


@torch.no_grad()
def outputs(pipe: Any, calls: Sequence[Call]) -> Tensor:
    """Run the denoiser on captured arguments; return all it puts out, flat, float32."""
    said = track(calls, "replaying")
    return torch.cat([run(pipe.denoiser, call).float().cpu().flatten() for call in said])
