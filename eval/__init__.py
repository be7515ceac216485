"""Evaluation: what quantization did to the images."""
