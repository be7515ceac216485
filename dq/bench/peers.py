"""Other quantizers, each in the setting that suits a CPU best: `pip install "dq-diffusion[bench]"`.

They get the same bfloat16 model and the same inputs, and run in the same rounds.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dq.calls import run
from dq.errors import DQError, unknown
from dq.family import family_of

__all__ = ["PEERS", "Peer", "peers"]


@dataclass(frozen=True)
class Peer:
    """A quantizer that is not ours.

    Args:
        packages: That must be installed.
        build: Makes a quantized model of a bfloat16 one, which it may change; also gets inputs of a
            forward call and the number of threads.
    """

    packages: tuple[str, ...]
    build: Callable[[nn.Module, Mapping[str, Any], int], nn.Module]


def _torchao(config: str) -> Peer:
    def build(model: nn.Module, inputs: Mapping[str, Any], threads: int) -> nn.Module:
        import torchao.quantization as library

        library.quantize_(model, getattr(library, config)())
        return model

    return Peer(("torchao",), build)


def _sdnq(**options: Any) -> Peer:
    def build(model: nn.Module, inputs: Mapping[str, Any], threads: int) -> nn.Module:
        from sdnq import sdnq_post_load_quant

        made: nn.Module = sdnq_post_load_quant(model, weights_dtype="int8", **options)
        return made

    return Peer(("sdnq",), build)


class _Openvino(nn.Module):
    """A graph of OpenVINO, called like the denoiser that it was made of."""

    def __init__(self, graph: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.graph, self.names = graph, names

    def forward(self, return_dict: bool = True, **inputs: Any) -> tuple[Tensor]:
        """Return a tuple of the output, in float32."""
        arrays = [_array(inputs[name]) for name in self.names]
        return (torch.from_numpy(self.graph(arrays)[0].copy()),)


def _array(value: Any) -> Any:
    tensor = torch.as_tensor(value)
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


class _Positional(nn.Module):
    """A denoiser whose inputs are positional, as graph makers want them."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        """Return the output alone."""
        return run(self.model, dict(zip(self.names, values, strict=True)))


def _openvino(int8: bool) -> Peer:
    def build(model: nn.Module, inputs: Mapping[str, Any], threads: int) -> nn.Module:
        import openvino

        names = tuple(inputs)
        example = tuple(torch.as_tensor(_array(inputs[name])) for name in names)
        whole = _Positional(model.float(), names).eval()
        with torch.no_grad():
            graph = openvino.convert_model(whole, example_input=example)
        if int8:
            import nncf

            batches = [_sample(model, len(example[0]), seed) for seed in range(4)]
            data = nncf.Dataset([[_array(batch[name]) for name in names] for batch in batches])
            graph = nncf.quantize(graph, data, model_type=nncf.ModelType.TRANSFORMER)
        hints = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads}
        return _Openvino(openvino.Core().compile_model(graph, "CPU", hints), names)

    return Peer(("openvino", "nncf") if int8 else ("openvino",), build)


def _sample(model: nn.Module, batch: int, seed: int) -> dict[str, Any]:
    return family_of(model).sample_inputs(model, batch, torch.Generator().manual_seed(100 + seed))


PEERS: dict[str, Peer] = {
    "torchao-int8-dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao-int8-weights": _torchao("Int8WeightOnlyConfig"),
    "sdnq-int8-weights": _sdnq(),
    "sdnq-int8": _sdnq(use_quantized_matmul=True),
    "openvino-bf16": _openvino(int8=False),
    "openvino-int8": _openvino(int8=True),
}


def peers(names: tuple[str, ...]) -> dict[str, Peer]:
    """Return peers by name; "all" stands for those that are installed.

    Raises:
        DQError: For an unknown name, or one whose packages are missing.
    """
    if names == ("all",):
        return {name: peer for name, peer in PEERS.items() if not _missing(peer)}
    for name in names:
        if name not in PEERS:
            raise unknown("peer", name, [*PEERS, "all"])
        if _missing(PEERS[name]):
            raise DQError(
                f"peer {name} needs {', '.join(_missing(PEERS[name]))}: "
                'pip install "dq-diffusion[bench]"'
            )
    return {name: PEERS[name] for name in names}


def _missing(peer: Peer) -> list[str]:
    return [package for package in peer.packages if importlib.util.find_spec(package) is None]
