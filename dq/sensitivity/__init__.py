"""Which layers a model can spare bits in: measured, estimated, and what follows from it."""
