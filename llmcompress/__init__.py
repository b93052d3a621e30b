"""llmcompress: compress large language models from YAML recipes."""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__"]
