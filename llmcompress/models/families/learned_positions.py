"""OPT and GPT-Neo, which add a learned row for each position to the embeddings."""

from __future__ import annotations

from llmcompress.errors import InputError
from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import AttentionNames, Family, Part, attention, biases, plain_groups, plain_mlp
from llmcompress.models.layout import DiskNames, Role, Sublayer


def _opt(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    """The two linears of an MLP are in the layer itself."""
    facts = _checked(facts)
    bias = facts.flag("enable_bias")
    names = AttentionNames(pre_norm="self_attn_layer_norm", output="out_proj")
    groups = plain_groups(layer, facts.hidden, facts.size("ffn_dim"), Role.MLP, bias, ("fc1", "fc2"))
    mlp = Sublayer("mlp", layer, f"{layer}.final_layer_norm", None, groups, activation="activation_fn")
    return attention(facts, layer, bias, bias, names=names), Part(mlp, biases(groups))


def _checked(facts: Facts) -> Facts:
    """The same; OPT-350m and Galactica have another form.

    Raises:
        InputError: Norms stand after sublayers, have no weights or are missing, or embeddings are narrower.
    """
    wrong = [key for key in ("do_layer_norm_before", "layer_norm_elementwise_affine") if not facts.flag(key)]
    wrong += ["_remove_final_layer_norm"] if facts.flag("_remove_final_layer_norm") else []
    wrong += ["word_embed_proj_dim"] if facts.optional_size("word_embed_proj_dim") not in (None, facts.hidden) else []
    if wrong:
        given = ", ".join(f"{key} is {facts.get(key)}" for key in wrong)
        raise InputError(
            f"config.json: {given}: an OPT of another form, as OPT-350m and Galactica are",
            "take a model whose norms stand before its sublayers and have weights, and whose embeddings are as wide "
            "as hidden states",
        )
    return facts


def _gpt_neo(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    size = facts.optional_size("intermediate_size") or 4 * facts.hidden
    return (
        attention(facts, layer, out_bias=True, names=AttentionNames("attn.attention", "ln_1", output="out_proj")),
        plain_mlp(facts.having(intermediate_size=size), layer, ("c_fc", "c_proj"), True, "ln_2"),
    )


FAMILIES = (
    Family(
        "opt",
        _opt,
        {
            "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072,
            "num_attention_heads": 12, "max_position_embeddings": 2048, "tie_word_embeddings": True,
            "enable_bias": True, "do_layer_norm_before": True, "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False, "word_embed_proj_dim": None,
        },
        # files of the model without its head
        disk=DiskNames(older=(("model.decoder.", "decoder."),)),
        norm_bias=True,
        body="model.decoder",
        final_norm="final_layer_norm",
        positions=("embed_positions", 2),
    ),
    Family(
        "gpt_neo",
        _gpt_neo,
        {
            "vocab_size": 50257, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
            "intermediate_size": None, "max_position_embeddings": 2048, "tie_word_embeddings": True,
        },
        aliases={"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"},
        ignored=(r"\.attn\.attention\.(masked_)?bias$",),
        norm_bias=True,
        body="transformer",
        layers="h",
        embedding="wte",
        final_norm="ln_f",
        positions=("wpe", 0),
    ),
)  # fmt: skip
