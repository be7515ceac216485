"""dq: quantization of diffusion pipelines, really packed and honestly measured.

Importing the package registers `quant_method: dq` with diffusers, so that
`DiffusionPipeline.from_pretrained` reads checkpoints that dq has written.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from dq.errors import DQError
from dq.registration import register

if TYPE_CHECKING:
    from dq.integration import DQConfig
    from dq.pipelines.pipeline import DQPipeline
    from dq.plan import Plan
    from dq.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["DQConfig", "DQError", "DQPipeline", "Plan", "Recipe"]

_HOMES = {
    "DQConfig": "dq.integration",
    "DQPipeline": "dq.pipelines.pipeline",
    "Plan": "dq.plan",
    "Recipe": "dq.recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dq' has no attribute {name!r}")
    if importlib.util.find_spec("dq.pipelines") is None:
        raise ImportError("dq is not installed: run `pip install -e .` in its checkout first")
    return getattr(importlib.import_module(_HOMES[name]), name)


register()
