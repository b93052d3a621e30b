"""llmcompress: compress large language models from YAML recipes.

Where to begin reading: ``quickstart.yaml`` in ``recipes/``, then the stages that it names in :mod:`llmcompress.stages`,
then the mathematics that they call in :mod:`llmcompress.algorithms`. ARCHITECTURE.md is the map.
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__"]
