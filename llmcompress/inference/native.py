"""Which native engine runs a model: that of attention, of recurrent states, of both, or of delta rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError
from llmcompress.inference import delta, engine, hybrid, recurrent
from llmcompress.inference.coverage import DELTAS, HYBRIDS, STATES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NativeEngine = engine.Engine | recurrent.RecurrentEngine


def recurrent_model(model: PreTrainedModel) -> bool:
    """Whether a model's family keeps states only, and no keys and values."""
    return model.config.model_type in STATES


def decline(model: PreTrainedModel) -> str | None:
    """Why no native engine can run a model, None if one can."""
    if recurrent_model(model):
        return recurrent.decline(model)
    family = model.config.model_type
    if family in DELTAS:
        return delta.decline(model)
    return hybrid.decline(model) if family in HYBRIDS else engine.decline(model)


def _kind(family: str) -> type[engine.Engine]:
    if family in DELTAS:
        return delta.DeltaEngine
    return hybrid.HybridEngine if family in HYBRIDS else engine.Engine


def open_engine(model: PreTrainedModel, slots: int = 1, positions: int = 256, **options: Any) -> NativeEngine:
    """The engine of a model's family.

    Args:
        model: A causal language model that is not declined.
        slots: Sequences.
        positions: Tokens that a sequence may reach.
        **options: Of the engine.

    Raises:
        InputError: The model is declined, or an option is about keys and values that it does not have.
    """
    if not recurrent_model(model):
        return _kind(model.config.model_type)(model, slots, positions, **options)
    wrong = sorted({"cache_dtype", "screen"} & {key for key, value in options.items() if value is not None})
    if wrong:
        family = model.config.model_type
        raise InputError(f"{', '.join(wrong)}: a {family} model has no keys and values", "leave it out")
    given = {key: value for key, value in options.items() if key not in ("cache_dtype", "screen")}
    return recurrent.RecurrentEngine(model, slots, positions, **given)
