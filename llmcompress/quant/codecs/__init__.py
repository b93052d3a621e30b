"""Codecs: how quantized weights are stored. A codec is a module of functions; none of them imports torch at top level.

Every codec has ``tensor_shapes(shape, spec)`` and ``nbytes(shape, spec)`` (both torch-free), ``encode`` and
``decode(packed_weight, dtype)``.
"""

from __future__ import annotations

import difflib
from types import ModuleType

from llmcompress.errors import InputError
from llmcompress.quant.codecs import delta_tree, int_group

_CODECS: dict[str, ModuleType] = {"int_group": int_group, "delta_tree": delta_tree}


def codec(name: str) -> ModuleType:
    """The codec called ``name``.

    Raises:
        InputError: There is no such codec.
    """
    if name not in _CODECS:
        near = difflib.get_close_matches(name, _CODECS, 1)
        hint = f"did you mean {near[0]}?" if near else f"known codecs: {', '.join(sorted(_CODECS))}"
        raise InputError(f"unknown codec {name!r}", hint)
    return _CODECS[name]
