"""One small table per model family: what its layers consist of, in the parts of ``parts.py``."""
