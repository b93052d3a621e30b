"""Tiny random decoders of the families that the native engine covers, dense and packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmcompress.inference.speed import rounded
from llmcompress.quant.spec import QuantSpec

_SIZES: dict[str, Any] = {
    "vocab_size": 72, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 512, "tie_word_embeddings": False, "intermediate_size": 80,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    # biases, grouped heads of a size that is no multiple of a vector
    "qwen2": {"head_dim": None},
    "qwen3": {"head_dim": 24, "num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 6, "sliding_window": None},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [0],
    },
    # a shared expert with a share of its own, wider than the others; dense layers among the sparse ones
    "qwen2_moe": {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 112, "num_hidden_layers": 4, "decoder_sparse_step": 2,
        "mlp_only_layers": [1], "head_dim": None,
    },
    # LayerNorm, biases everywhere, sparsemixer
    "phimoe": {
        "num_local_experts": 6, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True,
        "router_jitter_noise": 0.1,
    },
    # queries and keys normed over all heads
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
}  # fmt: skip


class Decoders:
    """Makes models; ``Decoders.packed`` rounds every quantizable weight to nearest."""

    families = tuple(_FAMILIES)

    @staticmethod
    def dense(family: str, **changes: Any) -> Any:
        """A float32 model in evaluation mode."""
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        sizes = {**_SIZES, **_FAMILIES[family], **changes}
        if sizes["head_dim"] is None:
            del sizes["head_dim"]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3 if "embed" in name else parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    @classmethod
    def packed(cls, family: str, bits: int, group_size: int = 32, symmetric: bool = False, **changes: Any) -> Any:
        """The same model with packed weights."""
        return rounded(cls.dense(family, **changes), QuantSpec(bits, group_size, symmetric))


@pytest.fixture(scope="session")
def decoders() -> type[Decoders]:
    """Factory of tiny decoders."""
    return Decoders


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Random tokens ``[300]`` that are not special."""
    return torch.randint(3, 72, (300,), generator=torch.Generator().manual_seed(5))
