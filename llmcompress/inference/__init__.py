"""Writing text with a loaded model: the native decode step where it can run, transformers' own loop elsewhere."""
