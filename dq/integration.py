"""How dq plugs into diffusers: a quantizer and its config, in the loader's own two mappings.

diffusers has no call to register a quantizer; `register` writes into the two dictionaries that
decide. The order in which its loader calls the members below is fixed (diffusers 0.42): `__init__`,
`update_torch_dtype`, `maybe_update_loaded_keys`, `_process_model_before_weight_loading`, then for
each file `maybe_update_state_dict` and for each tensor `check_if_quantized_param` and
`create_quantized_param`, at the end `_process_model_after_weight_loading`. `from_single_file` calls
`maybe_update_state_dict` first of all, and always claims that the file is quantized already.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from dq import attention, checksum, runtime
from dq.arrivals import Arrivals, leaf
from dq.attention import dispatcher
from dq.engine import decide
from dq.errors import DQError, check_known, inside
from dq.memory import give_back
from dq.nn import describe, empty_packed, packed_layers, unpack_model
from dq.nn.packed import packed
from dq.nn.stored import COMPANIONS
from dq.nn.swap import replace
from dq.nn.token_site import TOKEN_TENSORS
from dq.plan import Plan
from dq.recipe import Recipe

__all__ = ["DQConfig", "DQQuantizer", "attach", "detach"]

_ALIGNMENT = 64  # of torch's own allocations, bytes
_GIVE_BACK = 1 << 22  # bytes of float weights after which freed memory goes back to the system
_KEYS = ("recipe", "plan", "digest", "version")


class _Method(str, Enum):  # noqa: UP042 - the loader compares with plain strings and asks for .value
    DQ = "dq"


class DQConfig(QuantizationConfigMixin):
    """What stands in a denoiser's `config.json` under `quantization_config`.

    Args:
        recipe: For float checkpoints: a data-free recipe, by name, file, dictionary or object.
        plan: For quantized ones: the plan, as an object or as JSON values.
        digest: Checksum of all packed tensors, 8 hex digits; None leaves it unchecked.
        version: Of the plan format, written beside the plan.

    Raises:
        DQError: If neither or both of recipe and plan are given, or one of them is not valid.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
        plan: Plan | Mapping[str, Any] | None = None,
        digest: str | None = None,
        version: int | None = None,
    ) -> None:
        if (recipe is None) == (plan is None):
            raise DQError("DQConfig takes a recipe or a plan, and one of them only")
        self.quant_method = _Method.DQ
        self.recipe = None if recipe is None else Recipe.get(recipe)
        self.plan = _plan(plan, version)
        self.digest = digest

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Invert `to_dict`."""
        values = {k: v for k, v in config_dict.items() if k != "quant_method"}
        check_known("key of quantization_config", values, _KEYS)
        config = cls(**values)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        values: dict[str, Any] = {"quant_method": "dq"}
        if self.recipe is not None:
            return {**values, "recipe": self.recipe.to_dict()}
        assert self.plan is not None  # one of both is there
        plan = self.plan.to_dict()
        values |= {"version": plan.pop("version"), "plan": plan}
        return values if self.digest is None else {**values, "digest": self.digest}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same as `to_dict`."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return `to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __repr__(self) -> str:
        if self.recipe is not None:
            return f"DQConfig(recipe={self.recipe.name!r})"
        assert self.plan is not None  # one of both is there
        return f"DQConfig(plan of {len(self.plan.layers)} layers of {self.plan.model})"


def _plan(plan: Plan | Mapping[str, Any] | None, version: int | None) -> Plan | None:
    """Return the plan that stands in a config file, where anything may stand."""
    if plan is None or isinstance(plan, Plan):
        return plan
    with inside("quantization_config"):
        try:
            return Plan.from_dict({**plan, **({} if version is None else {"version": version})})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DQError(
                f"the plan is malformed ({error}); copy or download config.json again"
            ) from error


class DQQuantizer(DiffusersQuantizer):
    """Builds packed layers while diffusers loads a denoiser: no float copy of it ever exists."""

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: DQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plan = quantization_config.plan
        self.compute_dtype = torch.float32
        self._expected: dict[str, int] = {}  # checksums that the file's header promises
        self._names: list[str] = []  # of the tensors in the files
        self._stash: dict[str, Tensor] = {}
        self._arrivals: Arrivals | None = None  # while packed tensors come in
        self._prepared = False
        self._freed = 0  # bytes of float weights that are packed and gone

    @property
    def is_serializable(self) -> bool:
        """Always: packed tensors are plain tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top of packed layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Kernels are opaque custom ops, the rest is plain torch."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what the loader would do wrongly in silence."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise DQError(
                "device_map places layers on disk, which the loader writes before it quantizes; "
                "map to cpu, or use group offloading after loading"
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Never return None: the loader would cast weights to the placeholders' dtype."""
        self.compute_dtype = torch_dtype or torch.float32
        return self.compute_dtype

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        """Read the checksums in the headers of the files that are about to be loaded."""
        self._expected = checksum.read(checkpoint_files, loaded_keys)
        self._names = loaded_keys
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Check each tensor, and view float32 scales as int32: the loader casts floats."""
        if not self._prepared:
            return self._single_file(state_dict)
        if not self.pre_quantized:
            return state_dict
        return {name: self._incoming(name, value) for name, value in state_dict.items()}

    def _single_file(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take out what a plain model has not: with unknown keys the loader converts from LDM."""
        ours = ("weight_scale", *TOKEN_TENSORS)
        self.pre_quantized = any(leaf(name) in ours for name in state_dict)
        if not self.pre_quantized:
            return state_dict
        extra = (*COMPANIONS, *TOKEN_TENSORS)
        self._stash = {n: v for n, v in state_dict.items() if leaf(n) in extra}
        return {n: v for n, v in state_dict.items() if n not in self._stash}

    def _incoming(self, name: str, value: Tensor) -> Tensor:
        assert self._arrivals is not None  # made before the first file is read
        self._arrivals.check(name, value)
        is_scale = leaf(name) in COMPANIONS and value.dtype == torch.float32
        return value.view(torch.int32) if is_scale else value

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self._prepared = True
        if self.plan is None:
            self.plan = decide(model, self.quantization_config.recipe)
        if self.pre_quantized:
            self._expect(model, kwargs.get("state_dict"))
        elif self.plan.is_static():
            raise DQError(
                "this recipe has static inputs, whose ranges only calibration finds; use "
                "DQPipeline.from_pretrained(model, recipe=...), or dynamic inputs ('w8a8-dynamic')"
            )

    def _expect(self, model: nn.Module, single_file: dict[str, Any] | None) -> None:
        """Prepare a model for packed tensors, those of a single file being at hand already."""
        assert self.plan is not None  # packed checkpoints come with one
        empty_packed(model, self.plan)
        attention.empty_sites(model, self.plan.attention)
        self._arrivals = Arrivals(model, self.plan, self._expected)
        if single_file is not None:
            single_file.update(self._stash)
        self._arrivals.check_names(self._names if single_file is None else single_file)
        if single_file is not None:
            single_file.update({n: self._incoming(n, v) for n, v in single_file.items()})

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        """Claim the tensors of planned layers, except biases, and those of ordered tokens."""
        layer, _, own = param_name.rpartition(".")
        assert self.plan is not None  # decided before loading
        if own in TOKEN_TENSORS:
            return self.pre_quantized
        if layer not in self.plan.layers:
            return False
        return own == "weight" or (self.pre_quantized and own in COMPANIONS)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str | int | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Put one tensor into its packed layer, or pack one float weight."""
        layer, _, own = param_name.rpartition(".")
        value = param_value.to(target_device) if target_device is not None else param_value
        if self.pre_quantized:
            _place(model.get_submodule(layer), own, value)
        else:
            self._pack(model, layer, value)

    def _pack(self, model: nn.Module, name: str, value: Tensor) -> None:
        layer = model.get_submodule(name)
        assert isinstance(layer, (nn.Linear, nn.Conv2d))  # plans name no other layers
        assert self.plan is not None  # decided before loading
        layer.weight = nn.Parameter(value, requires_grad=False)
        with inside(describe(name, layer)):
            made = packed(layer, self.plan.layers[name])
            made.load_layer(layer)
        replace(model, name, made)
        self._freed += value.numel() * value.element_size()
        if self._freed > _GIVE_BACK:
            give_back()
            self._freed = 0

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        lost = [n for n, tensor in model.state_dict().items() if tensor.is_meta]
        if lost:
            raise DQError(
                f"the checkpoint lacks {len(lost)} tensors, the first is {lost[0]}; "
                "it is incomplete or belongs to another model: copy or download it again"
            )
        digest = self.quantization_config.digest
        assert self.plan is not None  # decided before loading
        if self._arrivals is not None:
            self._arrivals.check_digest(digest)
        for layer in packed_layers(model).values():
            layer.compute_dtype = self.compute_dtype
        _align(model)
        runtime.install(model, self.plan.attention)
        self._stash, self._arrivals, self._names = {}, None, []
        digest = digest or checksum.of_model(model, self.plan)
        _record(model, self, DQConfig(plan=self.plan, digest=digest))

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Add the checksum of every tensor to the header of the file.

        Raises:
            DQError: If adapters are attached: PEFT renames the layers below them.
        """
        for name in state_dict:
            if ".base_layer." in name:
                raise DQError(
                    f"{name.partition('.base_layer.')[0]} carries an adapter, and a checkpoint "
                    "saved like this cannot be loaded: call unload_lora_weights() first, and save "
                    "the adapter by itself with save_lora_weights()"
                )
        return state_dict, checksum.metadata(state_dict)

    def _dequantize(self, model: nn.Module) -> nn.Module:
        unpack_model(model)
        runtime.uninstall(model)
        detach(model)
        return model


def _place(layer: nn.Module, name: str, value: Tensor) -> None:
    """Put one stored tensor into its packed layer."""
    if value.dtype == torch.int32:
        value = value.view(torch.float32)  # undoes what hid it from the loader
    setattr(layer, name, nn.Parameter(value, False) if name == "weight" else value)


def _align(model: nn.Module) -> None:
    """Move float tensors that lie at odd addresses to memory of their own.

    safetensors maps tensors at whatever offset a file's header leaves, and there MKL adds products
    up in another order: a reloaded model would differ from the saved one in the last bits.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        odd = tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT
        if odd and tensor.is_floating_point():
            tensor.data = tensor.data.clone()


def _record(model: Any, quantizer: DQQuantizer, config: DQConfig) -> None:
    quantizer.quantization_config = config
    model.register_to_config(quantization_config=config)


def attach(model: Any, plan: Plan) -> None:
    """Tell diffusers that a live model was quantized: `save_pretrained` then writes it as such."""
    _align(model)
    config = DQConfig(plan=plan, digest=checksum.of_model(model, plan))
    quantizer = DQQuantizer(config, pre_quantized=True)
    quantizer._prepared = True
    _record(model, quantizer, config)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    # As the loader does; it leaves the file config.json out of this.
    model.register_to_config(_pre_quantization_dtype=model.dtype)


def detach(model: Any) -> None:
    """Remove every trace of quantization from a model's config; the loader itself forgets it."""
    kept = {k: v for k, v in model.config.items() if k != "quantization_config"}
    model._internal_dict = FrozenDict(kept)


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
                if known.__module__ != __name__:
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
