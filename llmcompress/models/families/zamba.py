"""Zamba2: Mamba-2 layers, and transformers shared by several of them (Glorioso et al., arXiv 2411.15242, section II).

Facts found in transformers 5.23: hybrid layers use ``num_mem_blocks`` shared transformers in turn, each with one set of
weights that belongs to the first layer that uses it. A use has of its own low-rank adapters on gate and up (and, where
the config says so, on q, k and v), which lie inside the shared module in a list by use, and a projection ``linear``
after it. There are no residual connections inside: see :class:`~llmcompress.models.layout.Sublayer`. transformers ties
the shared weights only where ``tie_word_embeddings`` is set, as in every released model.

Adapters are linears like others: rules quantize them, or keep them by ``match: adapter_list``. They are calibrated at
the one depth where they run.
"""

from __future__ import annotations

from llmcompress.errors import InputError
from llmcompress.models.families.facts import Facts
from llmcompress.models.families.mixers import headed_scan, mamba2
from llmcompress.models.families.parts import Family, Part, biases, norm, weights
from llmcompress.models.layout import LinearGroup, LinearView, Loan, Role, Sublayer, TensorView

# the list of layers that transformers assumes: hybrid where this has an h
_DEFAULT = "m" + "mmmmmh" * 7 + "mmmmh" + "mmmh" + "mm"


def _kinds(facts: Facts) -> list[str]:
    if facts.get("layers_block_type") is None:
        return ["hybrid" if letter == "h" else "linear_attention" for letter in _DEFAULT]
    kinds = facts.layer_kinds("layers_block_type")
    unknown = sorted(set(kinds) - {"hybrid", "linear_attention"})
    if unknown:
        raise InputError(f"config.json: layers_block_type has unknown layers {', '.join(unknown)}")
    return kinds


class _Use:
    """How one hybrid layer uses its shared transformer.

    Attributes:
        number: Number of the hybrid layer among hybrid layers.
        owner: Index of the layer to which the transformer belongs.
        shared: Run-time name of the transformer.
        first: Whether this is that layer.
    """

    def __init__(self, facts: Facts, index: int) -> None:
        hybrids = [at for at, kind in enumerate(_kinds(facts)) if kind == "hybrid"]
        self.number = hybrids.index(index)
        self.owner = hybrids[self.number % facts.size("num_mem_blocks")]
        self.shared = f"model.layers.{self.owner}.shared_transformer"
        self.first = self.owner == index
        if not self.first and not facts.flag("tie_word_embeddings"):
            raise InputError(
                "config.json: tie_word_embeddings is false, and transformers then gives each layer of zamba2 its own "
                "copy of the shared transformers",
                "no released model is like this; only shared ones are supported",
            )


def _adapter(module: str, name: str, use: int, rank: int, rows: int, columns: int, role: Role) -> list[LinearView]:
    """The two matrices of a low-rank adapter."""
    stem = f"{module}.{name}_adapter_list.{use}"
    return [LinearView(f"{stem}.0", rank, columns, role), LinearView(f"{stem}.1", rows, rank, role)]


def _attention(facts: Facts, use: _Use) -> Part:
    module, wide = f"{use.shared}.self_attn", 2 * facts.hidden
    head = wide // facts.heads
    rows = {"q": facts.heads * head, "k": facts.kv_heads * head, "v": facts.kv_heads * head}
    own = [LinearView(f"{module}.{name}_proj", size, wide, Role.ATTENTION) for name, size in rows.items()]
    adapters = []
    if facts.flag("use_shared_attention_adapter"):
        rank = facts.size("adapter_rank")
        if facts.kv_heads != facts.heads:
            raise InputError("config.json: adapters on q, k and v need as many key and value heads as query heads")
        adapters = [_adapter(module, f"linear_{name}", use.number, rank, wide, wide, Role.ATTENTION) for name in rows]
    first = [*(own if use.first else ()), *(pair[0] for pair in adapters)]
    groups = [LinearGroup(tuple(first), "first", module)] if first else []
    groups += [LinearGroup((pair[1],), "inner", module) for pair in adapters]
    if use.first:
        output = LinearView(f"{module}.o_proj", facts.hidden, rows["q"], Role.ATTENTION)
        groups.append(LinearGroup((output,), "last", module))
    pre_norm = f"{use.shared}.input_layernorm"
    sublayer = Sublayer(
        "attention", module, pre_norm, None, tuple(groups), reads="hidden|embedding", writes="aside"
    )  # fmt: skip
    return Part(sublayer, tuple(norm(pre_norm, wide)) if use.first else ())


def _mlp(facts: Facts, use: _Use) -> Part:
    module, hidden, bias = f"{use.shared}.feed_forward", facts.hidden, facts.flag("add_bias_linear")
    size = facts.optional_size("intermediate_size") or 4 * hidden
    own = [LinearView(f"{module}.gate_up_proj", 2 * size, hidden, Role.MLP, bias)] if use.first else []
    low, high = _adapter(module, "gate_up_proj", use.number, facts.size("adapter_rank"), 2 * size, hidden, Role.MLP)
    groups = [LinearGroup((*own, low), "first", module), LinearGroup((high,), "inner", module)]
    if use.first:
        groups.append(LinearGroup((LinearView(f"{module}.down_proj", hidden, size, Role.MLP, bias),), "last", module))
    pre_norm = f"{use.shared}.pre_ff_layernorm"
    sublayer = Sublayer(
        "mlp", module, pre_norm, None, tuple(groups), reads="aside", writes="aside", numbered=True
    )  # fmt: skip
    kept = norm(pre_norm, hidden) if use.first else []
    return Part(sublayer, (*kept, *biases(tuple(groups))))


def _mixer(facts: Facts, layer: str, hybrid: bool) -> Part:
    inner, heads = int(facts.number("mamba_expand") * facts.hidden), facts.size("n_mamba_heads")
    if inner % heads:
        raise InputError(f"config.json: {inner} channels do not divide into {heads} n_mamba_heads")
    groups, states, width = (facts.size(key) for key in ("mamba_ngroups", "mamba_d_state", "mamba_d_conv"))
    scan = headed_scan(f"{layer}.mamba", heads, inner // heads, states, groups, width)
    bias = facts.flag("add_bias_linear")
    part = mamba2(facts, scan, f"{layer}.input_layernorm", bias, bias, conv_bias=True)
    if not hybrid:
        return part
    own = part.sublayer
    sublayer = Sublayer(own.kind, own.module, own.pre_norm, None, own.groups, scan=own.scan, reads="hidden+aside")
    return Part(sublayer, part.kept)


def _zamba2(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    """A Mamba-2 layer; a hybrid one runs a shared transformer and a projection before its mixer."""
    if _kinds(facts)[index] != "hybrid":
        return (_mixer(facts, layer, hybrid=False),)
    use, name = _Use(facts, index), f"{layer}.linear"
    after = LinearGroup((LinearView(name, facts.hidden, facts.hidden, Role.MLP),), "last", name)
    projection = Part(Sublayer("mlp", name, None, None, (after,), reads="aside", writes="aside"), ())
    return _attention(facts, use), _mlp(facts, use), projection, _mixer(facts, f"{layer}.mamba_decoder", hybrid=True)


def _loan(facts: Facts, index: int) -> Loan | None:
    if _kinds(facts)[index] != "hybrid":
        return None
    use = _Use(facts, index)
    if use.first:
        return None
    first = _Use(facts, use.owner)
    tensors: list[TensorView] = []
    for part in (_attention(facts, first), _mlp(facts, first)):
        linears = [view for group in part.sublayer.groups for view in group.linears]
        tensors += weights(view for view in linears if "_adapter_list." not in view.name)
        tensors += part.kept
    return Loan(f"model.layers.{index}.shared_transformer", use.shared, use.owner, tuple(tensors))


FAMILIES = (
    Family(
        "zamba2",
        _zamba2,
        {
            "vocab_size": 32000, "hidden_size": 2560, "layers_block_type": None, "mamba_d_state": 64, "mamba_d_conv": 4,
            "mamba_expand": 2, "mamba_ngroups": 1, "n_mamba_heads": 8, "add_bias_linear": False,
            "intermediate_size": None, "num_attention_heads": 32, "num_key_value_heads": None, "num_mem_blocks": 1,
            "use_shared_attention_adapter": False, "adapter_rank": 128, "tie_word_embeddings": True,
        },
        aliases={"layers_block_type": "layer_types"},
        final_norm="final_layernorm",
        depth=lambda facts: len(_kinds(facts)),
        loan=_loan,
        # files may hold the shared weights under the name of every layer that uses them
        ignored=(r"\.shared_transformer\.",),
    ),
)  # fmt: skip
