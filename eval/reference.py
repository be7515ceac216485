"""What a set of images is compared with: features, or the moments that a file keeps of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dq.errors import DQError
from dq.eval.features import Extractor
from dq.eval.frechet import Moments, frechet_distance, frechet_distance_of_features
from dq.eval.images import image_files, read_batches

__all__ = ["Reference", "features_of_files", "moments_of_files"]

_BATCH = 64


def features_of_files(
    files: Sequence[Path], extractor: Extractor, skip_bad: bool = False
) -> Tensor:
    """Return the features of images, `(N, d)`; one batch of images is in memory at a time."""
    return extractor.over(images for images, _ in read_batches(files, _BATCH, skip_bad))


def moments_of_files(files: Sequence[Path], extractor: Extractor) -> Moments:
    """Return mean and covariance of the features of images; memory does not grow with them."""
    return Moments.over(extractor(images) for images, _ in read_batches(files, _BATCH))


@dataclass(frozen=True)
class Reference:
    """A set to compare with.

    Attributes:
        name: What reports call it.
        count: Number of images; 0 if a file does not tell.
        features: `(N, d)`, or None if only moments are known.
        moments: Mean and covariance, or None until they are needed.
    """

    name: str
    count: int
    features: Tensor | None = None
    moments: Moments | None = None

    @classmethod
    def of_files(cls, name: str, files: list[Path], extractor: Extractor, skip_bad: bool) -> Self:
        """Return images as a reference."""
        features = features_of_files(files, extractor, skip_bad)
        return cls(name, len(features), features)

    @classmethod
    def load(cls, path: Path, extractor: Extractor, skip_bad: bool = False) -> Self:
        """Read a folder of images, or an `.npz`.

        Files of pytorch-fid hold `mu` and `sigma`; those of ADM may hold them too, or images as
        `arr_0`, NHWC uint8.

        Raises:
            DQError: If there is neither, or if the features have other dimensions.
        """
        if path.suffix != ".npz":
            return cls.of_files(path.name, image_files(path), extractor, skip_bad)
        if not path.is_file():
            raise DQError(f"reference {path} does not exist")
        try:
            with np.load(path) as values:
                known = {name: values[name] for name in values.files if name in _KEYS}
        except (OSError, ValueError) as error:
            raise DQError(f"{path} could not be read ({error})") from error
        if "arr_0" in known:
            images = torch.from_numpy(known["arr_0"])
            features = extractor.over(b.permute(0, 3, 1, 2) for b in images.split(_BATCH))
            return cls(path.name, len(features), features)
        if not {"mu", "sigma"} <= set(known):
            raise DQError(f"{path} holds neither mu and sigma nor arr_0")
        mean, covariance = (torch.from_numpy(known[k]).double() for k in ("mu", "sigma"))
        if mean.shape != (extractor.dimension,):
            raise DQError(
                f"{path} has {len(mean)} dimensions, features of {extractor.name} have "
                f"{extractor.dimension}; use the extractor that they were made with"
            )
        return cls(path.name, 0, None, Moments(0, mean, covariance))

    def save(self, path: Path) -> None:
        """Write mean and covariance as pytorch-fid and ADM read them."""
        moments = self._moments()
        np.savez(path, mu=moments.mean.numpy(), sigma=moments.covariance.numpy())

    def fid(self, features: Tensor | Moments) -> float:
        """Return the Fréchet distance of features, or of their moments, to this set."""
        if isinstance(features, Moments):
            return frechet_distance(features, self._moments())
        if self.features is not None:
            return frechet_distance_of_features(features, self.features)
        return frechet_distance(Moments.of(features), self._moments())

    def images(self, metric: str) -> Tensor:
        """Return the features.

        Raises:
            DQError: If only moments are known; says which metric needs more.
        """
        if self.features is None:
            raise DQError(f"{self.name} holds moments only; {metric} needs images or features")
        return self.features

    def _moments(self) -> Moments:
        if self.moments is not None:
            return self.moments
        assert self.features is not None  # one of both is there
        return Moments.of(self.features)


_KEYS = ("mu", "sigma", "arr_0")
