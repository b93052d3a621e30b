"""Layers whose states the decode step passes tokens through: gated delta rules, Kimi's, lightning attention.

Each is described by the names of :class:`~llmcompress_kernels.decode.Layer`; the definitions are in
:mod:`llmcompress_kernels.reference.delta`.
"""

from __future__ import annotations

from typing import Any

import torch
from llmcompress_kernels import matrix
from llmcompress_kernels.decode_delta import Delta, DeltaSizes, StateCodec
from torch import Tensor

from llmcompress.inference.weights import linear_matrix, norm_of
from llmcompress.nn.mixers import runtime_of


def _is_lightning(module: Any) -> bool:
    """Whether a module is lightning attention (MiniMax-01)."""
    return hasattr(module, "slope_rate")


def sizes_of(module: Any) -> DeltaSizes:
    """Sizes of a layer's states.

    Args:
        module: A mixer of Qwen3-Next, Qwen3.5, OLMo Hybrid or Kimi-Linear, or lightning attention.
    """
    if hasattr(module, "num_v_heads"):
        return DeltaSizes(module.num_v_heads, module.num_k_heads, module.head_k_dim, module.head_v_dim)
    count = module.num_attention_heads if _is_lightning(module) else module.num_heads
    return DeltaSizes(count, count, module.head_dim, module.head_dim)


def decline_rule(module: Any, low: bool) -> str | None:
    """Why the step does not take a layer's states, None if it does.

    Args:
        module: As of :func:`sizes_of`.
        low: Whether states are kept in low bits.
    """
    taps = None if _is_lightning(module) else module.conv_kernel_size
    return sizes_of(module).decline(taps, low)


def rule_of(model: Any, name: str) -> dict[str, Any]:
    """What a layer reads before and after its states.

    Args:
        model: The model.
        name: Name of the layer's module.

    Returns:
        By the names of :class:`~llmcompress_kernels.decode.Layer`; what attention has and this layer has not is None.
    """
    module = model.get_submodule(name)
    found: dict[str, Any] = dict.fromkeys(("query", "key", "value"))
    if _is_lightning(module):
        return found | _lightning(module)
    found["conv_weight"] = module.conv1d.weight.detach()[:, 0].float().mT.contiguous()
    if hasattr(module, "forget_gate"):
        return found | _kimi(module)
    return found | _gated(module, *_state_codec(model, name))


def _split(module: Any) -> dict[str, Any]:
    """Three projections in the place of one."""
    sides = zip(("conv_in", "conv_key", "conv_value"), (module.q_proj, module.k_proj, module.v_proj))
    return {name: linear_matrix(side) for name, side in sides}


def _gated(module: Any, codec: StateCodec | None, fixed: Tensor | None) -> dict[str, Any]:
    grouped, apart, sizes = hasattr(module, "in_proj_qkvz"), hasattr(module, "q_proj"), sizes_of(module)
    if apart:
        # OLMo Hybrid
        steps = torch.cat([module.b_proj.weight.detach(), module.a_proj.weight.detach()])
    elif grouped:
        # those of a key head's value heads side by side
        both = module.in_proj_ba.weight.detach().unflatten(0, (sizes.key_heads, 2, -1))
        steps = both.transpose(0, 1).reshape(2 * sizes.heads, -1)
    else:
        steps = torch.cat([module.in_proj_b.weight.detach(), module.in_proj_a.weight.detach()])
    gated = module.o_norm if apart else module.norm
    first: Any = module.in_proj_qkvz if grouped else getattr(module, "in_proj_qkv", None)
    return {
        **(_split(module) if apart else {"conv_in": linear_matrix(first)}),
        "conv_gates": None if grouped else linear_matrix(module.g_proj if apart else module.in_proj_z),
        "steps": matrix.dense(steps),
        "output": linear_matrix(module.o_proj if apart else module.out_proj),
        "delta": Delta(
            sizes,
            norm_of(module, "dt_bias"),
            -module.A_log.detach().float().exp(),
            norm_of(gated),
            "split" if apart else "with_gates" if grouped else "apart",
            codec,
            fixed,
            most=2.0 if getattr(module, "allow_neg_eigval", False) else 1.0,
            epsilon=gated.variance_epsilon,
        ),
    }


def _kimi(module: Any) -> dict[str, Any]:
    """Gates and what makes decays are products of two matrices."""
    forget = module.forget_gate
    return {
        **_split(module),
        "gates_low": linear_matrix(module.g_a_proj),
        "conv_gates": linear_matrix(module.g_b_proj),
        "decays_low": matrix.dense(forget.f_a_proj.weight.detach()),
        "decays": matrix.dense(forget.f_b_proj.weight.detach()),
        "steps": matrix.dense(module.b_proj.weight.detach()),
        "output": linear_matrix(module.o_proj),
        "delta": Delta(
            sizes_of(module),
            norm_of(forget, "dt_bias"),
            -forget.A_log.detach().float().exp().flatten(),
            norm_of(module.o_norm),
            "split",
            epsilon=module.o_norm.variance_epsilon,
            rule="columns",
            sigmoid=True,
        ),
    }


def _lightning(module: Any) -> dict[str, Any]:
    """A convolution of one tap does nothing but what follows it, silu."""
    sizes = sizes_of(module)
    return {
        "conv_in": linear_matrix(module.qkv_proj),
        "conv_weight": torch.ones(1, sizes.channels),
        "conv_gates": linear_matrix(module.output_gate),
        "output": linear_matrix(module.out_proj),
        "delta": Delta(
            sizes,
            None,
            -module.slope_rate.detach().float().flatten(),
            norm_of(module.norm),
            "without_gates",
            epsilon=module.norm.variance_epsilon,
            rule="lightning",
            sigmoid=True,
            whole=True,
        ),
    }


def _state_codec(model: Any, name: str) -> tuple[StateCodec | None, Tensor | None]:
    """How a delta rule's states are kept, and their calibrated scale."""
    runtime = runtime_of(model)
    if runtime is None:
        return None, None
    quantizer = runtime.quantizers[name]
    spec, static = quantizer.spec, quantizer.static
    codec = StateCodec(spec.bits, quantizer.window, spec.refit, spec.dither)
    return codec, None if static is None else static.detach().contiguous()
