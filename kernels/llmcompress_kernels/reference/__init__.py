"""Plain PyTorch definitions of the operators."""
