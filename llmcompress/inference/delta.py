"""The native engine of models with delta rules or lightning attention: one call a token or prompt.

Qwen3-Next, Qwen3.5 and OLMo Hybrid have the gated delta rule, Kimi-Linear one with a decay for each column of a key,
MiniMax-Text-01 and M1 lightning attention, which only decays and adds.
Layers with attention keep keys and values, the others a state of fixed size, which the cache of the decode step has
beside them: in float32, or in the low bits of stage ``dsq``. A prompt's tokens pass through float states one by one, as
those of steps do: the same bits. Low-bit states are rounded at its end, and from there on by the steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmcompress_kernels import decode as native

from llmcompress.inference import recurrent
from llmcompress.inference.coverage import DELTAS, decline_config
from llmcompress.inference.decoder import decoder_of
from llmcompress.inference.engine import decline_anywhere, decline_module, decline_rest
from llmcompress.inference.hybrid import HybridEngine
from llmcompress.inference.rules import decline_rule
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.mixers import runtime_of
from llmcompress.nn.tree_linear import TreeLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decline(model: PreTrainedModel) -> str | None:
    """Why the engine cannot run a model, None if it can.

    Args:
        model: A causal language model, dense or packed.
    """
    config: Any = model.config.get_text_config()
    reason = decline_anywhere(model, config, DELTAS) or decline_config(config.to_dict())
    reason = reason or recurrent.decline_states(model) or _decline_layers(model)
    if reason is not None:
        return reason
    for name, module in model.named_modules():
        reason = decline_module(name, module)
        if reason is not None or isinstance(module, TreeLinear):
            return f"{name or 'the model'}{reason or ' is a TreeLinear'}"
    return decline_rest(model) or native.unavailable()


def _decline_layers(model: PreTrainedModel) -> str | None:
    low = runtime_of(model) is not None
    sublayers = [block.sublayers[0] for block in layout_from_config(model.config.to_dict()).blocks]
    rules = [s.module for s in sublayers if s.kind == "ssm" or s.decays]
    if len(rules) == len(sublayers):
        return "none of its layers has attention"
    for name in rules:
        reason = decline_rule(model.get_submodule(name), low)
        if reason is not None:
            return f"{name}: {reason}"
    return None


class DeltaEngine(HybridEngine):
    """A model with delta rules or lightning attention, ready to decode natively; arguments are those of `Engine`."""

    _declines = staticmethod(decline)

    def _weights(self, int8_activations: bool, head_bits: int | None) -> native.Decoder:
        self.blocks = list(range(self.model.config.num_hidden_layers))
        return decoder_of(self.model, head_bits)
