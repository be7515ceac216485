"""Which of the two levels around it a weight becomes: pure functions on one matrix.

All take a weight `(N, K)`, its scales and spec, and the second moment `(K, K)` of what the weight
will meet, `E[x x^T]`: the squared error of the layer's output is quadratic in the error of its
weight,

    E |(W' - W) x|^2  =  trace (W' - W) E[x x^T] (W' - W)^T,

so nothing else about the inputs is needed. They work on any grid, integers or floats, and return
uint8 codes. Rows do not depend on each other.
"""
