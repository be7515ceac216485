"""Weights of one and two bits that learn: binarizers, a file each, and gradients of the sign.

A binarizer makes the weight that is computed with of a latent one, while training; in the end it
says what is stored: codes and scales in one of the forms of `dq.spec`, sums of scaled signs with or
without an offset, or ternary levels.
"""

from dq.binarizers.binarizer import Binarizer, Exported
from dq.binarizers.registry import binarizers

__all__ = ["Binarizer", "Exported", "binarizers"]
