"""How dq plugs into diffusers: a quantizer and its config, in the loader's own two mappings.

diffusers has no call to register a quantizer; `enter` writes into the two dictionaries that
decide. The order in which its loader calls the members below is fixed (diffusers 0.42): `__init__`,
`update_torch_dtype`, `maybe_update_loaded_keys`, `_process_model_before_weight_loading`, then for
each file `maybe_update_state_dict` and for each tensor `check_if_quantized_param` and
`create_quantized_param`, at the end `_process_model_after_weight_loading`. `from_single_file` calls
`maybe_update_state_dict` first of all, and always claims that the file is quantized already.
"""

from __future__ import annotations

import sys

from dq.attention import dispatcher
from dq.errors import DQError
from dq.integration.config import DQConfig
from dq.integration.live import attach
from dq.integration.quantizer import DQQuantizer

__all__ = ["DQConfig", "DQQuantizer", "attach", "enter"]


def enter() -> None:
    """Write the quantizer and its config into the mappings of the libraries that are loaded.

    The attention backend too.

    Raises:
        DQError: If another package has taken the name.
    """
    for host, entries in _MAPPINGS.items():
        for mapping, entry in entries.items():
            if host in sys.modules:
                table = getattr(sys.modules[host], mapping)
                known = table.setdefault("dq", entry)
                if known.__module__ != entry.__module__:
                    raise DQError(
                        f"quantization method 'dq' is taken by {known}; uninstall that package"
                    )
    dispatcher.register()


_MAPPINGS: dict[str, dict[str, type]] = {
    "diffusers.quantizers.auto": {
        "AUTO_QUANTIZER_MAPPING": DQQuantizer,
        "AUTO_QUANTIZATION_CONFIG_MAPPING": DQConfig,
    },
    # PipelineQuantizationConfig(quant_backend="dq") looks its config class up here too.
    "transformers.quantizers.auto": {"AUTO_QUANTIZATION_CONFIG_MAPPING": DQConfig},
}
enter()
