"""C kernels for what torch does in several passes on a CPU, built once a machine when first used.

Sources lie beside this file and are compiled by the C compiler that the machine has, into the
user's cache: about a second. Without a compiler everything runs in plain torch, slower: integer
layers to the same numbers, attention and norms to others in the last bits. `DQ_NATIVE=0` in the
environment does the same.
"""

from dq.kernels.native.build import library, why_not

__all__ = ["library", "why_not"]
