"""The structures that Python and C++ agree on for the decode step; ``csrc/cpu/decode/decode.h`` says what they hold."""

from __future__ import annotations

import ctypes

from llmcompress_kernels.decode_delta import DeltaStruct
from llmcompress_kernels.matrix import MatrixStruct


class LayerStruct(ctypes.Structure):
    """``Layer`` of C++."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "attention_norm_bias", "mlp_norm_bias")),
        *((name, ctypes.c_void_p) for name in ("attention_after", "mlp_after", "query_norm", "key_norm")),
        *((name, ctypes.c_void_p) for name in ("query_norm_bias", "key_norm_bias", "value_norm", "query_down_norm")),
        *((name, ctypes.c_void_p) for name in ("query_scales", "router_norm", "shared_norm", "routed_after")),
        *((name, ctypes.c_void_p) for name in ("shared_after", "expert_scales", "router_correction", "sinks")),
        *((name, ctypes.c_void_p) for name in ("conv_weight", "conv_bias", "cosine", "sine")),
        ("delta", ctypes.POINTER(DeltaStruct)),
        *((name, MatrixStruct) for name in ("query", "key", "value", "output", "head_gates")),
        *((name, MatrixStruct) for name in ("query_down", "absorb", "expand")),
        *((name, MatrixStruct) for name in ("conv_in", "conv_key", "conv_value", "conv_gates", "steps")),
        *((name, MatrixStruct) for name in ("gates_low", "decays_low", "decays")),
        *((name, MatrixStruct) for name in ("gate", "up", "down", "aside", "router")),
        *((name, MatrixStruct) for name in ("entry", "exit")),
        *((name, MatrixStruct) for name in ("shared_gate", "shared_up", "shared_down", "shared_router")),
        *((name, ctypes.c_int32) for name in ("whole_norms", "own_norms", "norms_last", "parallel")),
        *((name, ctypes.c_int32) for name in ("gates", "softplus", "replaces")),
        *((name, ctypes.c_int32) for name in ("mixes", "mixer", "reads_aside")),
        *((name, ctypes.c_int32) for name in ("place", "turned", "window", "chunked")),
        *((name, ctypes.c_int32) for name in ("heads", "key_value_heads", "head_dim", "value_dim")),
        *((name, ctypes.c_float) for name in ("output_scale", "attention_keeps", "mlp_keeps", "positive", "negative")),
    )


class ModelStruct(ctypes.Structure):
    """``Model`` of C++."""

    _fields_ = (
        ("layers", ctypes.POINTER(LayerStruct)),
        *((name, ctypes.c_void_p) for name in ("final_norm", "final_norm_bias", "embedding_norm", "position_rows")),
        ("embedding", MatrixStruct),
        ("head", MatrixStruct),
        ("screen", MatrixStruct),
        ("screen_error", ctypes.c_void_p),
        ("member_embeddings", ctypes.POINTER(MatrixStruct)),
        ("member_heads", ctypes.POINTER(MatrixStruct)),
        *((name, ctypes.c_int32) for name in ("layer_count", "hidden")),
        *((name, ctypes.c_int32) for name in ("neighbours", "latents", "latent_width", "taps")),
        ("latent_epsilon", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("activation", "top_k", "routing", "members")),
        *((name, ctypes.c_int32) for name in ("renormalizes", "scales_inputs", "groups", "top_groups", "voters")),
        *((name, ctypes.c_float) for name in ("epsilon", "attention_scale", "routed_scale", "routed_floor")),
        *((name, ctypes.c_float) for name in ("jitter",)),
        *((name, ctypes.c_float) for name in ("attention_cap", "logit_cap", "gate_slope", "gate_limit")),
        *((name, ctypes.c_float) for name in ("embedding_scale", "residual_scale")),
    )


class BoundMixersStruct(ctypes.Structure):
    """``BoundMixers`` of C++."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("run", "engine", "states"))


class BoundLowStatesStruct(ctypes.Structure):
    """``BoundLowStates`` of C++."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("run", "held"))


class CacheStruct(ctypes.Structure):
    """``Cache`` of C++."""

    _fields_ = (
        ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("kind", ctypes.c_int32), ("slots", ctypes.c_int32),
        ("positions", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("begins", "windows", "inputs", "states", "low")),
    )  # fmt: skip


class StepStruct(ctypes.Structure):
    """``Step`` of C++."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("tokens", "positions", "slots", "members", "logits", "best", "seconds", "mixers", "hidden")
        ),
        *((name, ctypes.c_int32) for name in ("batch", "planes", "threads", "first_layer", "last_layer", "reserved")),
    )


class PromptStruct(ctypes.Structure):
    """``Prompt`` of C++."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tokens", "hidden", "seconds", "reroute", "mixers")),
        *((name, ctypes.c_int64) for name in ("count", "start")),
        *((name, ctypes.c_int32) for name in ("slot", "member", "planes", "threads", "last", "reserved")),
    )


# what decides on a layer's choice of experts
REROUTE = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
# in the order of llmcompress_decode_size
STRUCTS = (
    MatrixStruct, LayerStruct, ModelStruct, CacheStruct, StepStruct, PromptStruct, BoundMixersStruct,
    BoundLowStatesStruct,
)  # fmt: skip
