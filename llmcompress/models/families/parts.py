"""Building blocks of layouts that several families share: attention, gated MLP, mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llmcompress.errors import InputError
from llmcompress.models.families.facts import Facts
from llmcompress.models.layout import (
    Block,
    DiskNames,
    ExpertBank,
    LinearGroup,
    LinearView,
    Loan,
    ModelLayout,
    Role,
    RouterView,
    Sublayer,
    TensorView,
)

# experts that are stored one by one under the name of their module
PER_EXPERT = DiskNames(experts=(".mlp.experts", ".mlp.experts"))


@dataclass(frozen=True, slots=True)
class Part:
    """A sublayer with the dense tensors that belong to it."""

    sublayer: Sublayer
    kept: tuple[TensorView, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table of supported families.

    Attributes:
        model_type: As in ``config.json``.
        layer: ``(facts, index, layer name) -> parts`` in the order in which they run.
        loan: ``(facts, index) -> loan`` of layers that run a module of an earlier one.
        defaults: transformers' default of every key that ``layer`` reads.
        aliases: Other names of keys in the file.
        disk: Names in hub checkpoints; or a function of the facts.
        norm_bias: Whether norms carry a bias (LayerNorm instead of RMSNorm).
        norm_adds_one: See :class:`~llmcompress.models.layout.ModelLayout`.
        head_bias: Key that says whether the head has a bias, or None.
        body: Run-time name of the model without its head.
        norm_weights: Whether norms have weights at all.
        embedding: Name of the embedding in the body.
        layers: Name of the list of decoder layers in the body.
        final_norm: Name of the last norm in the body.
        depth: Number of decoder layers; from ``num_hidden_layers`` when None.
        ignored: See :class:`~llmcompress.models.layout.ModelLayout`; or a function of the facts.
        layer_scale: Name in a layer of the number that multiplies the hidden states after it, None without.
        positions: Name in the body of learned positions, ``max_position_embeddings`` rows, and how many stand before
            these; None without.
        package: Folder of the model in transformers, None for that of its model type.
    """

    model_type: str
    layer: Callable[[Facts, int, str], tuple[Part, ...]]
    defaults: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)
    disk: DiskNames | Callable[[Facts], DiskNames] = field(default_factory=DiskNames)
    norm_bias: bool = False
    norm_adds_one: bool = False
    norm_weights: bool = True
    head_bias: str | None = None
    ignored: tuple[str, ...] | Callable[[Facts], tuple[str, ...]] = ()
    body: str = "model"
    embedding: str = "embed_tokens"
    layers: str = "layers"
    final_norm: str = "norm"
    depth: Callable[[Facts], int] | None = None
    loan: Callable[[Facts, int], Loan | None] | None = None
    package: str | None = None
    layer_scale: str | None = None
    positions: tuple[str, int] | None = None

    def layout(self, config: Mapping[str, Any]) -> ModelLayout:
        """Compute the layout of a model of this family.

        Raises:
            InputError: A value of the config has the wrong type.
        """
        facts = Facts(config, self.defaults, self.aliases)
        hidden, vocab, tied = facts.hidden, facts.size("vocab_size"), facts.flag("tie_word_embeddings")
        blocks = []
        for index in range(facts.size("num_hidden_layers") if self.depth is None else self.depth(facts)):
            name = f"{self.body}.{self.layers}.{index}"
            parts = self.layer(facts, index, name)
            kept = [view for part in parts for view in part.kept]
            given = {view.name for view in kept}
            norms = [n for p in parts for n in _norms(p.sublayer) if n is not None]
            # a norm of another width is given by its part, one in another block belongs to that
            missing = [
                n for n in norms if f"{n}.weight" not in given and n.startswith(f"{name}.") and self.norm_weights
            ]
            kept = [view for n in dict.fromkeys(missing) for view in norm(n, hidden, self.norm_bias)] + kept
            loan = None if self.loan is None else self.loan(facts, index)
            scale = None if self.layer_scale is None else f"{name}.{self.layer_scale}"
            kept += [] if scale is None else [TensorView(scale, (1,))]
            blocks.append(Block(index, name, tuple(part.sublayer for part in parts), tuple(kept), loan, scale))
        outside = [TensorView(f"{self.body}.{self.embedding}.weight", (vocab, hidden))]
        if self.positions is not None:
            name, before = self.positions
            rows = facts.size("max_position_embeddings") + before
            outside.append(TensorView(f"{self.body}.{name}.weight", (rows, hidden)))
        outside += norm(f"{self.body}.{self.final_norm}", hidden, self.norm_bias) if self.norm_weights else []
        if not tied:
            outside.append(TensorView("lm_head.weight", (vocab, hidden)))
        if self.head_bias is not None and facts.flag(self.head_bias):
            outside.append(TensorView("lm_head.bias", (vocab,)))
        ignored = self.ignored(facts) if callable(self.ignored) else self.ignored
        disk = self.disk(facts) if callable(self.disk) else self.disk
        return ModelLayout(
            self.model_type, tuple(blocks), tuple(outside), tied, hidden, vocab, disk, ignored, self.norm_adds_one
        )


def _norms(sublayer: Sublayer) -> tuple[str | None, ...]:
    return sublayer.pre_norm, sublayer.post_norm, sublayer.joins


def norm(name: str, size: int, bias: bool = False) -> list[TensorView]:
    """Tensors of a norm."""
    views = [TensorView(f"{name}.weight", (size,))]
    if bias:
        views.append(TensorView(f"{name}.bias", (size,)))
    return views


def biases(groups: tuple[LinearGroup, ...]) -> tuple[TensorView, ...]:
    """Biases of the linears of ``groups``."""
    linears = [linear for group in groups for linear in group.linears if linear.bias]
    return tuple(TensorView(f"{linear.name}.bias", (linear.out_features,)) for linear in linears)


def weights(linears: Iterable[LinearView]) -> list[TensorView]:
    """Weights of these linears as plain tensors, for what stays dense or is borrowed."""
    return [TensorView(f"{linear.name}.weight", (linear.out_features, linear.in_features)) for linear in linears]


def first_and_last(module: str, first: Iterable[LinearView], last: LinearView) -> tuple[LinearGroup, LinearGroup]:
    """Groups of a module that projects its input, by one linear or several, and its output."""
    return LinearGroup(tuple(first), "first", module), LinearGroup((last,), "last", module)


@dataclass(frozen=True, slots=True)
class AttentionNames:
    """What a family calls the parts of grouped-query attention.

    Attributes:
        module: The module, in the decoder layer.
        pre_norm: The norm before it, in the layer; None for no norm.
        query_norm, key_norm, output: Norms and output projection, in the module.
    """

    module: str = "self_attn"
    pre_norm: str | None = "input_layernorm"
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"
    output: str = "o_proj"


USUAL = AttentionNames()


def attention(
    facts: Facts,
    layer: str,
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: Literal["none", "head", "each", "full"] = "none",
    post_norm: str | None = None,
    names: AttentionNames = USUAL,
    form: Literal["apart", "fused", "gated"] = "apart",
) -> Part:
    """Grouped-query attention.

    Args:
        facts: The config.
        layer: Run-time name of the decoder layer.
        qkv_bias: Whether q, k and v have biases.
        out_bias: Whether o has one.
        qk_norm: Norms on queries and keys: per head with weights that all heads share or (``each``) of their own, over
            all heads, or none.
        post_norm: Norm on the output before the residual add.
        names: Names of its parts.
        form: ``fused``: ``qkv_proj`` holds q, k and v. ``gated``: ``q_proj`` has as many rows again, a gate on each
            head's output.
    """
    module, query, value = f"{layer}.{names.module}", facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    rows = {"q_proj": 2 * query if form == "gated" else query, "k_proj": value, "v_proj": value}
    if form == "fused":
        rows = {"qkv_proj": query + 2 * value}
    first = [LinearView(f"{module}.{n}", size, facts.hidden, Role.ATTENTION, qkv_bias) for n, size in rows.items()]
    last = LinearView(f"{module}.{names.output}", facts.hidden, query, Role.ATTENTION, out_bias)
    groups = first_and_last(module, first, last)
    kept = list(biases(groups))
    if qk_norm == "each":
        rows = {names.query_norm: facts.heads, names.key_norm: facts.kv_heads}
        kept += [TensorView(f"{module}.{n}.weight", (count, facts.head_dim)) for n, count in rows.items()]
    elif qk_norm != "none":
        widths = (facts.head_dim, facts.head_dim) if qk_norm == "head" else (query, value)
        kept += norm(f"{module}.{names.query_norm}", widths[0]) + norm(f"{module}.{names.key_norm}", widths[1])
    pre_norm = None if names.pre_norm is None else f"{layer}.{names.pre_norm}"
    return Part(Sublayer("attention", module, pre_norm, post_norm, groups), tuple(kept))


def with_gate(head: Part, name: str, rows: int) -> Part:
    """Attention with one more linear that reads its input, without a bias: gates on what the heads write."""
    first, *rest = head.sublayer.groups
    gate = LinearView(f"{head.sublayer.module}.{name}", rows, first.linears[0].in_features, Role.ATTENTION)
    groups = (replace(first, linears=(*first.linears, gate)), *rest)
    return Part(replace(head.sublayer, groups=groups), head.kept)


def with_sinks(head: Part, heads: int) -> Part:
    """Attention whose heads have a number each that takes part in their softmax."""
    return Part(head.sublayer, (*head.kept, TensorView(f"{head.sublayer.module}.sinks", (heads,))))


def gated_groups(
    module: str, hidden: int, intermediate: int, role: Role, bias: bool = False, fused: bool = False
) -> tuple[LinearGroup, ...]:
    """Groups of a gated MLP: gate and up, or ``gate_up_proj`` that holds both, then down."""
    rows = {"gate_up_proj": 2 * intermediate} if fused else {"gate_proj": intermediate, "up_proj": intermediate}
    first = [LinearView(f"{module}.{name}", size, hidden, role, bias) for name, size in rows.items()]
    return first_and_last(module, first, LinearView(f"{module}.down_proj", hidden, intermediate, role, bias))


def gated_mlp(
    facts: Facts,
    layer: str,
    bias: bool = False,
    pre_norm: str | None = "post_attention_layernorm",
    post_norm: str | None = None,
    name: str = "mlp",
    fused: bool = False,
) -> Part:
    """The dense gated MLP of a decoder layer; ``pre_norm`` and ``name`` are names in the layer."""
    module = f"{layer}.{name}"
    groups = gated_groups(module, facts.hidden, facts.size("intermediate_size"), Role.MLP, bias, fused)
    before = None if pre_norm is None else f"{layer}.{pre_norm}"
    return Part(Sublayer("mlp", module, before, post_norm, groups), biases(groups))


def plain_groups(
    module: str,
    hidden: int,
    intermediate: int,
    role: Role,
    bias: bool = False,
    names: tuple[str, str] = ("up_proj", "down_proj"),
) -> tuple[LinearGroup, ...]:
    """Groups of an MLP without a gate, whose two linears have these names."""
    first = LinearView(f"{module}.{names[0]}", intermediate, hidden, role, bias)
    return first_and_last(module, (first,), LinearView(f"{module}.{names[1]}", hidden, intermediate, role, bias))


def plain_mlp(
    facts: Facts,
    layer: str,
    names: tuple[str, str] = ("up_proj", "down_proj"),
    bias: bool = False,
    pre_norm: str = "post_attention_layernorm",
) -> Part:
    """An MLP without a gate, whose two linears have these names; ``pre_norm`` is a name in the layer."""
    module = f"{layer}.mlp"
    groups = plain_groups(module, facts.hidden, facts.size("intermediate_size"), Role.MLP, bias, names)
    return Part(Sublayer("mlp", module, f"{layer}.{pre_norm}", None, groups), biases(groups))


def beside(parts: Iterable[Part]) -> tuple[Part, ...]:
    """The same, each after the first one reading the hidden states that the first one read (Cohere, Granite)."""
    return tuple(Part(replace(part.sublayer, parallel=place > 0), part.kept) for place, part in enumerate(parts))


def scaled(parts: Iterable[Part], scale: float) -> tuple[Part, ...]:
    """The same, each output multiplied before it is added to the hidden states (Granite)."""
    return tuple(Part(replace(part.sublayer, output_scale=scale), part.kept) for part in parts)


def mixture(
    layer: str,
    bank: ExpertBank,
    shared: tuple[LinearGroup, ...] = (),
    extra: tuple[TensorView, ...] = (),
    name: str = "mlp",
    pre_norm: str | None = "post_attention_layernorm",
    post_norm: str | None = None,
) -> Part:
    """A mixture-of-experts sublayer.

    Args:
        layer: Run-time name of the decoder layer.
        bank: Its experts.
        shared: Linears of the shared experts.
        extra: Further dense tensors of the module, beside router, its correction and biases.
        name: Name of the module in the layer.
        pre_norm: Name of the norm before it, None without one.
        post_norm: Name of the norm on its output, None without one.
    """
    router = bank.router
    kept = [TensorView(router.weight, (bank.num_experts, bank.width))]
    if router.bias:
        kept.append(TensorView(f"{router.module}.bias", (bank.num_experts,)))
    if bank.bias:
        kept.append(TensorView(f"{bank.gate_up}_bias", (bank.num_experts, bank.first_rows)))
        kept.append(TensorView(f"{bank.down}_bias", (bank.num_experts, bank.hidden)))
    kept += [] if router.correction is None else [router.correction]
    kept += [*extra, *biases(shared)]
    before, after = (None if word is None else f"{layer}.{word}" for word in (pre_norm, post_norm))
    sublayer = Sublayer("moe", f"{layer}.{name}", before, after, shared, bank)
    return Part(sublayer, tuple(kept))


def expert_bank(
    facts: Facts,
    layer: str,
    experts_key: str,
    intermediate_key: str,
    router: RouterView,
    name: str = "mlp",
    top_k: int | None = None,
    **options: Any,
) -> ExpertBank:
    """Read an expert bank's sizes from the config.

    Args:
        facts: The config.
        layer: Run-time name of the decoder layer.
        experts_key: Key of the number of experts.
        intermediate_key: Key of their intermediate size.
        router: Their router.
        name: Name of the module in the layer that holds the experts.
        top_k: Experts per token, None for ``num_experts_per_tok``.
        options: Further fields of :class:`~llmcompress.models.layout.ExpertBank`.

    Raises:
        InputError: More experts are chosen per token than there are.
    """
    if "activation" not in options:
        options["activation"] = facts.activation()
    experts = facts.size(experts_key)
    chosen = facts.size("num_experts_per_tok") if top_k is None else top_k
    if chosen > experts:
        raise InputError(
            f"config.json: num_experts_per_tok {chosen} exceeds the {experts} experts of {experts_key}",
            "check that the model folder is complete and the file unchanged",
        )
    entry = options.get("entry")
    return ExpertBank(
        module=f"{layer}.{name}.experts",
        num_experts=experts,
        top_k=chosen,
        hidden=facts.hidden if entry is None else entry.out_features,
        intermediate=facts.size(intermediate_key),
        router=router,
        **options,
    )
