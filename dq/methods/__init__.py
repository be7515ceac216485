"""Quantization methods, one file a paper: pure maths and a thin step."""
