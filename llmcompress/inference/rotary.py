"""Rotary tables of a model: which modules make them, and which layers use which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmcompress.inference.coverage import TURNED_IN_WINDOWS


class ByBase:
    """Modules that make tables of one base each, called like one module with kinds of layers (Granite SWA).

    Args:
        modules: By base.
    """

    def __init__(self, modules: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]) -> None:
        self.modules, self.layer_types = modules, tuple(modules)

    def __call__(self, x: Tensor, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[1, T, R]`` in the type of ``x``."""
        return self.modules[kind](x, positions)


def rotary_of(model: Any) -> Any:
    """What makes a model's rotary tables; None where it knows no positions."""
    base = model.base_model
    if model.config.model_type == "gptj":
        return _of_gptj(model)
    if hasattr(base, "rotary_embs"):
        return ByBase({_base(each.config.rope_parameters["rope_theta"]): each for each in base.rotary_embs})
    return getattr(base, "rotary_emb", getattr(base, "pos_emb", None))


def _of_gptj(model: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """GPT-J's table, sines beside cosines, is in every layer's attention."""
    table: Tensor = model.base_model.h[0].attn.embed_positions

    def tables(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        sine, cosine = table[positions].to(x.dtype).chunk(2, dim=-1)
        return torch.cat([cosine, cosine], dim=-1), torch.cat([sine, sine], dim=-1)

    return tables


def rotary_kinds(model: Any) -> Sequence[str | None]:
    """Kinds of layers that have rotary tables of their own, in the order of the tables; None alone stands for all."""
    kinds: Sequence[str] | None = getattr(rotary_of(model), "layer_types", None)
    return kinds or (None,)


def table_of(model: Any, attention: Any, layer: int, window: int) -> int | None:
    """Place of a layer's table, None where it turns nothing.

    Args:
        model: The model.
        attention: The layer's module of attention.
        layer: Which layer.
        window: Positions that its tokens see, 0 for all.
    """
    config = model.config.get_text_config()
    if rotary_of(model) is None or not _turns(attention, config, layer, window):
        return None
    kinds = rotary_kinds(model)
    if len(kinds) == 1:
        return 0
    bases = getattr(config, "layer_rope_theta", None)
    return kinds.index(config.layer_types[layer] if bases is None else _base(bases[layer]))


def _base(value: float) -> str:
    return str(float(value))


def _turns(attention: Any, config: Any, layer: int, window: int) -> bool:
    """Whether a layer turns queries and keys to their positions."""
    bases = getattr(config, "layer_rope_theta", None)
    if bases is not None:
        return bool(bases[layer])
    if config.model_type == "afmoe":
        return bool(attention.is_local_attention)
    if config.model_type not in TURNED_IN_WINDOWS:
        return bool(getattr(attention, "use_rope", True))
    if getattr(attention, "force_rope", False):
        return True
    # EXAONE without windows turns them in every layer
    return window > 0 or (config.model_type not in ("cohere2", "cohere2_moe") and config.sliding_window is None)
