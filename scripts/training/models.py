"""The reference models: a Mixtral-style MoE, a Mamba-2, a hybrid of attention, Mamba-2 and experts, a Qwen3.5."""

from __future__ import annotations

import math
from typing import Any

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def build_moe(vocab_size: int) -> Any:
    """Mixtral-style: 8.5 M parameters, 2.3 M active per token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=128,
        num_local_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        output_router_logits=False,
        **SPECIAL,
    )
    return MixtralForCausalLM(config)


def build_mamba2(vocab_size: int) -> Any:
    """Mamba-2: 2.3 M parameters, 6 layers, 6 heads of 64 channels and 64 states each."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=vocab_size,
        hidden_size=192,
        num_hidden_layers=6,
        num_heads=6,
        head_dim=64,
        state_size=64,
        expand=2,
        n_groups=1,
        chunk_size=64,
        tie_word_embeddings=True,
        residual_in_fp32=False,
        initializer_range=0.02,
        **SPECIAL,
    )
    model = Mamba2ForCausalLM(config)
    spread_half_lives(model)
    return model


def build_hybrid(vocab_size: int) -> Any:
    """GraniteMoeHybrid: 3.8 M parameters; Mamba-2 in four layers, attention in two, experts in all six."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    config = GraniteMoeHybridConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=6,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        shared_intermediate_size=128,
        num_local_experts=8,
        num_experts_per_tok=2,
        mamba_n_heads=4,
        mamba_d_head=64,
        mamba_d_state=32,
        mamba_expand=2,
        mamba_n_groups=1,
        mamba_chunk_size=64,
        attention_multiplier=32**-0.5,
        position_embedding_type="rope",
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        **SPECIAL,
    )
    model = GraniteMoeHybridForCausalLM(config)
    spread_half_lives(model)
    return model


def build_delta(vocab_size: int) -> Any:
    """Qwen3.5: 2.6 M parameters; the gated delta rule in three layers, gated attention in the fourth."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        num_hidden_layers=4,
        intermediate_size=448,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        linear_num_key_heads=3,
        linear_num_value_heads=6,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        tie_word_embeddings=True,
        **SPECIAL,
    )
    model = Qwen3_5ForCausalLM(config)
    spread_half_lives(model)
    return model


BUILDERS = {"moe": build_moe, "mamba2": build_mamba2, "hybrid": build_hybrid, "delta": build_delta}


def spread_half_lives(model: Any, shortest: float = 2.0, longest: float = 1500.0) -> None:
    """Initialise A_log and dt_bias so that the heads of a layer forget at log-uniform half-lives, in tokens.

    The decay rate ``ln 2 / half-life`` is shared between step and A (both grow with its square
    root), so that slow heads also write in small steps.
    """
    import torch

    mixers = [m for m in model.modules() if hasattr(m, "A_log") and hasattr(m, "dt_bias")]
    for index, mixer in enumerate(mixers):
        heads = mixer.A_log.numel()
        # layers are offset against each other, so that the model as a whole covers the range evenly
        position = (torch.arange(heads) + (index + 0.5) / len(mixers)) / heads
        rate = math.log(2) / (shortest * (longest / shortest) ** position)
        dt = 0.3 * rate.sqrt()
        with torch.no_grad():
            mixer.A_log.copy_((rate / dt).log())
            mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def balance_loss(router_logits: Any, experts: int, top_k: int) -> Any:
    """Load-balancing loss computed per layer, then averaged.

    transformers pools the counts of all layers before it multiplies, which balances only
    their sum: single layers may then starve an expert completely.
    """
    import torch

    losses = []
    for logits in router_logits:
        probs = logits.float().softmax(-1)
        chosen = probs.topk(top_k, dim=-1).indices
        load = torch.zeros(experts).index_add_(0, chosen.flatten(), torch.ones(chosen.numel()))
        losses.append(experts * (load / chosen.numel() * probs.mean(0)).sum())
    return torch.stack(losses).mean()
