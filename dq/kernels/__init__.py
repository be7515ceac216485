"""Low-bit kernels: which one serves a layer, and honestly so.

A kernel runs a whole layer on its stored tensors: it quantizes the input, multiplies in low
precision and scales the result. Each lives in a file of its own and registers with a predicate over
what the layer really needs (`Site`). `choose` takes the first that agrees and passes its self-test;
a layer that none serves unpacks its weight and uses the framework's stock kernel.
`dq.kernels.reference` defines the numerics.
"""

from dq.kernels.kernel import Arguments, ConvArguments, Kernel, Site, choose, kernels

__all__ = ["Arguments", "ConvArguments", "Kernel", "Site", "choose", "kernels"]
