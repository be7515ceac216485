"""Families and the facade: what a pipeline consists of, and `DQPipeline`."""
