"""State-space families without attention: Mamba, Falcon Mamba and Mamba-2."""

from __future__ import annotations

from typing import Any

from llmcompress.models.families.facts import Facts
from llmcompress.models.families.mixers import mamba1, plain_mixer, time_step_rank, virtual_scan, whole_channels
from llmcompress.models.families.parts import Family, Part
from llmcompress.models.layout import DiskNames

_MIXER_KEYS = ("num_heads", "head_dim", "state_size", "n_groups", "conv_kernel")


def _mamba(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    inner = facts.optional_size("intermediate_size")
    inner = inner or whole_channels(facts.number("expand") * facts.hidden, "expand * hidden_size")
    scan = virtual_scan(f"{layer}.mixer", inner, facts.size("state_size"), facts.size("conv_kernel"))
    rank, bias, conv_bias = time_step_rank(facts, "time_step_rank"), facts.flag("use_bias"), facts.flag("use_conv_bias")
    return (mamba1(facts, scan, f"{layer}.norm", rank, bias, conv_bias),)


def _mamba2(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return (plain_mixer(facts, layer, _MIXER_KEYS),)


_MAMBA = {
    "vocab_size": 50280, "hidden_size": 768, "state_size": 16, "num_hidden_layers": 32, "expand": 2, "conv_kernel": 4,
    "use_bias": False, "use_conv_bias": True, "time_step_rank": "auto", "tie_word_embeddings": True,
}  # fmt: skip
_BACKBONE: dict[str, Any] = {"body": "backbone", "embedding": "embeddings", "final_norm": "norm_f"}
# transformers gives an embedding of the old name random values, so it is never written
_OLD_EMBEDDING = DiskNames(older=(("backbone.embeddings.", "backbone.embedding."),))

FAMILIES = (
    Family("mamba", _mamba, _MAMBA, disk=_OLD_EMBEDDING, **_BACKBONE),
    Family("falcon_mamba", _mamba, _MAMBA, disk=_OLD_EMBEDDING, **_BACKBONE),
    Family(
        "mamba2",
        _mamba2,
        {
            **_MAMBA, "vocab_size": 32768, "hidden_size": 4096, "state_size": 128, "num_hidden_layers": 64,
            "num_heads": 128, "head_dim": 64, "n_groups": 8, "tie_word_embeddings": False,
        },
        disk=_OLD_EMBEDDING,
        **_BACKBONE,
    ),
)  # fmt: skip
