"""What builds packed layers while diffusers loads a denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from dq import attention, checksum, runtime
from dq.arrivals import Arrivals, leaf
from dq.engine import decide
from dq.errors import DQError, inside
from dq.integration.alignment import align
from dq.integration.config import DQConfig, forget, record
from dq.memory import give_back
from dq.nn import describe, empty_packed, packed_layers, unpack_model
from dq.nn.joined import JOINED, join
from dq.nn.packed import packed
from dq.nn.stored import COMPANIONS
from dq.nn.swap import replace
from dq.nn.token_site import TOKEN_TENSORS

__all__ = ["DQQuantizer"]

_GIVE_BACK = 1 << 22  # bytes of float weights after which freed memory goes back to the system


class DQQuantizer(DiffusersQuantizer):
    """Builds packed layers while diffusers loads a denoiser: no float copy of it ever exists."""

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: DQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: DQConfig = quantization_config
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
        return [name for name in loaded_keys if name != JOINED]

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Leave out what a file has in one tensor."""
        joined = () if self._arrivals is None else self._arrivals.companions
        return [name for name in missing_keys if name not in joined]

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Check each tensor, and give those beside the codes their names and places."""
        if not self._prepared:
            return self._single_file(state_dict)
        return self._incoming(state_dict) if self.pre_quantized else state_dict

    def _single_file(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take out what a plain model has not: with unknown keys the loader converts from LDM."""
        extra = (JOINED, *TOKEN_TENSORS)
        self._stash = {n: v for n, v in state_dict.items() if leaf(n) in extra}
        self.pre_quantized = bool(self._stash)
        return {n: v for n, v in state_dict.items() if n not in self._stash}

    def _incoming(self, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return what a model has of the tensors of a file, float32 as int32: floats are cast."""
        assert self._arrivals is not None  # made before the first file is read
        return {
            own: part.view(torch.int32) if own in self._arrivals.companions else part
            for name, value in state_dict.items()
            for own, part in self._arrivals.take(name, value).items()
        }

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self._prepared = True
        if self.plan is None:
            recipe = self.quantization_config.recipe
            assert recipe is not None  # a config has a plan or a recipe
            self.plan = decide(model, recipe)
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
            coming = self._incoming(single_file)
            single_file.clear()
            single_file.update(coming)

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
        align(model)
        runtime.install(model, self.plan.attention)
        self._stash, self._arrivals, self._names = {}, None, []
        digest = digest or checksum.of_model(model, self.plan)
        self.quantization_config = DQConfig(plan=self.plan, digest=digest)
        record(model, self.quantization_config)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Join what is beside the codes, and add a checksum of every tensor to the header.

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
        assert self.plan is not None  # decided before anything was packed
        joined = join(state_dict, self.plan.layers)
        return joined, checksum.metadata(joined)

    def _dequantize(self, model: nn.Module) -> nn.Module:
        unpack_model(model)
        runtime.uninstall(model)
        forget(model)
        return model


def _place(layer: nn.Module, name: str, value: Tensor) -> None:
    """Put one stored tensor into its packed layer."""
    if value.dtype == torch.int32:
        value = value.view(torch.float32)  # undoes what hid it from the loader
    setattr(layer, name, nn.Parameter(value, False) if name == "weight" else value)
