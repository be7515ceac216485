"""Models that were quantized in place, by any step after they were loaded."""

from __future__ import annotations

from typing import Any

from dq import checksum
from dq.integration.alignment import align
from dq.integration.config import DQConfig, record
from dq.integration.quantizer import DQQuantizer
from dq.plan import Plan

__all__ = ["attach"]


def attach(model: Any, plan: Plan) -> None:
    """Tell diffusers that a live model was quantized: `save_pretrained` then writes it as such."""
    align(model)
    config = DQConfig(plan=plan, digest=checksum.of_model(model, plan))
    quantizer = DQQuantizer(config, pre_quantized=True)
    quantizer._prepared = True
    record(model, config)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    # As the loader does; it leaves the file config.json out of this.
    model.register_to_config(_pre_quantization_dtype=model.dtype)
