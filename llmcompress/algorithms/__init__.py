"""Pure functions on tensors; every file names its paper."""
