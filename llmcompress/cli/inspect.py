"""``inspect``: family, blocks, bits per module and bytes of a model folder or artifact, from headers alone."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.command import command
from llmcompress.cli.look_ahead import read_object
from llmcompress.cli.output import Output, table
from llmcompress.errors import InputError
from llmcompress.inference.coverage import decline_config, reach
from llmcompress.models.paths import model_folder
from llmcompress.models.state_memory import BatchMemory, memory_table
from llmcompress.quant.states import DECODED_BITS, StateSpec
from llmcompress.units import bytes_text, natural_order

if TYPE_CHECKING:
    from rich.console import Console

    from llmcompress.models.layout import ModelLayout
    from llmcompress.models.tensor_file import Entry

PACKED_PARTS = {"weight_packed", "weight_scale", "weight_zero_point", "weight_shape"}


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """Weights of one role that are stored alike.

    Attributes:
        role: ``attention``, ``experts`` …; ``other`` for what stays dense.
        how: ``3-bit, group 128, symmetric`` or the dtype.
        modules: Number of weights.
        values: Number of logical values.
        bytes: Bytes stored, with scales and zero points.
        blocks: Indices of the blocks they are in.
    """

    role: str
    how: str
    modules: int
    values: int
    bytes: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a folder holds.

    Attributes:
        path, kind, family: Folder; ``checkpoint``, ``llmcompress artifact`` or another quantization method; model type.
        supported: Whether llmcompress can compress it; ``reason`` says why not.
        modules_because: Why tokens on a CPU go through transformers' modules; None where the native engines cover the
            model, or it cannot be compressed.
        native_tokens: Longest sequence that they take, None for any.
        blocks, experts, top_k, hidden, vocab: Sizes, None where unknown.
        context: Longest input in tokens.
        parameters: Logical values, packed or not.
        bytes: Bytes of all tensors.
        bits: Bits per parameter over everything.
        groups: Weights by role and storage.
        policies: Run-time policies saved with the model.
        heads: Heads of models with low-bit states: per mixer and head half-life in tokens, width and output error.
        memory: Memory of models with states: bytes by batch size.
        tokenizer: Whether tokenizer files are there.
        files: Weight files.
    """

    path: str
    kind: str
    family: str
    supported: bool
    reason: str | None
    modules_because: str | None
    native_tokens: int | None
    blocks: int | None
    experts: int | None
    top_k: int | None
    hidden: int | None
    vocab: int | None
    context: int | None
    parameters: int
    bytes: int
    bits: float
    groups: tuple[ModuleGroup, ...]
    policies: dict[str, Any] = field(default_factory=dict)
    heads: tuple[dict[str, Any], ...] = ()
    memory: tuple[BatchMemory, ...] = ()
    tokenizer: bool = False
    files: tuple[str, ...] = ()


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    command(app, "inspect")(inspect)


def inspect(
    out: Output,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Model folder, artifact, run folder or asset:NAME.")],
) -> None:
    """Show what a model folder or artifact holds, without reading its weights."""
    from llmcompress.models.family_artifact import is_family

    folder = model_folder(path)
    if is_family(folder):
        # its config.json is the base's, its weights are in the nodes of the tree
        from llmcompress.cli.family import inspect as inspect_family

        inspect_family(out, folder)
        return
    found = look(folder)
    out.result(found, lambda screen: _show(found, screen))


def look(path: Path) -> Inspection:
    """Read config and headers.

    Args:
        path: Folder with config.json.

    Raises:
        InputError: A file is damaged, or weights are only there as pickles.
    """
    config = read_object(path / "config.json")
    headers = weight_headers(path)
    layout, reason = _layout(config)
    quantization = config.get("quantization_config") or {}
    method = str(quantization.get("quant_method", "")) if isinstance(quantization, dict) else ""
    specs = _specs(quantization, layout) if method == "llmcompress" else {}
    groups = _groups(headers, layout, specs)
    total, values = sum(g.bytes for g in groups), sum(g.values for g in groups)
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    bank = next((b.bank for b in layout.blocks if b.bank is not None), None) if layout else None
    policies = quantization.get("policies", {}) if method == "llmcompress" else {}
    modules_because = None if layout is None else decline_config(config) or _states_because(policies)
    return Inspection(
        path=str(path),
        kind={"": "checkpoint", "llmcompress": "llmcompress artifact"}.get(method, f"{method} checkpoint"),
        family=str(config.get("model_type", "unknown")),
        supported=layout is not None and not (method and method != "llmcompress"),
        reason=reason,
        modules_because=modules_because,
        native_tokens=reach(config) if layout is not None and modules_because is None else None,
        blocks=len(layout.blocks) if layout else text.get("num_hidden_layers"),
        experts=bank.num_experts if bank else None,
        top_k=bank.top_k if bank else None,
        hidden=layout.hidden if layout else text.get("hidden_size"),
        vocab=layout.vocab if layout else text.get("vocab_size"),
        context=text.get("max_position_embeddings"),
        parameters=values,
        bytes=total,
        bits=round(8 * total / values, 4) if values else 0.0,
        groups=tuple(groups),
        policies=policies,
        heads=_heads(policies),
        memory=_memory(layout, total, policies),
        tokenizer=any((path / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")),
        files=tuple(sorted({file for file, _ in headers.values()})),
    )


def weight_headers(path: Path) -> dict[str, tuple[str, Entry]]:
    """Tensor name → (file name, header entry).

    Raises:
        InputError: There are no safetensors files, or one is damaged.
    """
    from llmcompress.models.tensor_file import TensorFile

    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = [p.name for p in (*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth"))]
        if pickles:
            raise InputError(
                f"{path}: weights are pickles ({pickles[0]}), which can run code and are not read",
                "convert them to safetensors on a machine you can lose",
            )
        raise InputError(f"{path}: no safetensors files", "give the folder that holds the weights")
    return {name: (file.name, entry) for file in files for name, entry in TensorFile(file).entries.items()}


def _layout(config: dict[str, Any]) -> tuple[ModelLayout | None, str | None]:
    from llmcompress.models.registry import layout_from_config

    try:
        return layout_from_config(config), None
    except InputError as error:
        return None, error.message


def _specs(quantization: dict[str, Any], layout: ModelLayout | None) -> dict[str, dict[str, Any]]:
    """Plan name → spec of a native artifact; embedding and head too, where a policy keeps them in low bits."""
    specs = quantization.get("specs", [])
    found = {name: specs[index] for name, index in quantization.get("modules", {}).items()}
    policy = quantization.get("policies", {}).get("embeddings")
    if policy is not None and layout is not None:
        found |= {stem: {**policy, "symmetric": True} for stem in _outside(layout)}
    return found


def _outside(layout: ModelLayout) -> dict[str, tuple[int, ...]]:
    """Modules outside the blocks → shape of their weight."""
    return {view.name.removesuffix(".weight"): tuple(view.shape) for view in layout.outside}


def _groups(
    headers: dict[str, tuple[str, Entry]], layout: ModelLayout | None, specs: dict[str, dict[str, Any]]
) -> list[ModuleGroup]:
    """Gather tensors by role and storage; packed parts count with their weight."""
    known = {name: (role.value, shape, block) for name, role, shape, block in layout.quantizable()} if layout else {}
    known |= {stem: ("other", shape, -1) for stem, shape in (_outside(layout) if layout else {}).items()}
    disk = _disk_roles(layout) if layout else {}
    gathered: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    blocks: dict[tuple[str, str], set[int]] = defaultdict(set)
    counted: set[str] = set()
    for name, (_, entry) in headers.items():
        stem, _, part = name.rpartition(".")
        if stem in specs and part in PACKED_PARTS:
            role, shape, block = known.get(stem, ("other", (), -1))
            # rows that stay dense have a tensor of their own
            coded = math.prod(shape) - specs[stem].get("dense_rows", 0) * (shape[-1] if shape else 0)
            key, values = (role, spec_text(specs[stem])), 0 if stem in counted else coded
            modules = 0 if stem in counted else 1
            counted.add(stem)
        else:
            role, block = _dense_role(name, known, disk)
            key, values, modules = (role, entry.code.lower()), math.prod(entry.shape), 1
        total = gathered[key]
        total[0] += modules
        total[1] += values
        total[2] += entry.nbytes
        if block >= 0:
            blocks[key].add(block)
    order = {"attention": 0, "mlp": 1, "experts": 2, "shared_experts": 3, "ssm": 4, "other": 5}
    keys = sorted(gathered, key=lambda k: (order.get(k[0], 9), k[1]))
    found = []
    for role, how in keys:
        modules, values, size = gathered[role, how]
        found.append(ModuleGroup(role, how, modules, values, size, tuple(sorted(blocks[role, how]))))
    return found


def _heads(policies: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """One entry per mixer whose states were measured."""
    policy = policies.get("state_cache") or {}
    found = []
    measured = policy.get("measured") or {}
    # JSON is written in the order of names, in which layer 10 comes before layer 2
    for module, row in sorted(measured.items(), key=lambda item: natural_order(item[0])):
        bits = (policy.get("head_bits") or {}).get(module, [policy.get("bits")] * len(row["half_lives"]))
        found.append({"mixer": module, **row, "bits": bits})
    return tuple(found)


def _memory(layout: ModelLayout | None, weights: int, policies: dict[str, Any]) -> tuple[BatchMemory, ...]:
    if layout is None:
        return ()
    return tuple(memory_table(layout, weights, policies.get("state_cache")))


def _states_because(policies: dict[str, Any]) -> str | None:
    """Why states as a policy stores them are not those of a native engine: what ``decline_states`` of
    ``inference/recurrent.py`` says of the loaded model, but for sizes and windows.
    """
    policy = policies.get("state_cache")
    if not policy:
        return None
    if policy.get("head_bits"):
        return f"{next(iter(policy['head_bits']))}: its heads have widths of their own, as states of several widths do"
    spec = StateSpec.of(policy)
    if not spec.has_kernel:
        return f"no kernel for states of codec {spec.codec} as it is set"
    return None if spec.bits in DECODED_BITS else f"no kernel for states of {spec.bits} bits"


def _disk_roles(layout: ModelLayout) -> dict[str, tuple[str, int]]:
    """Disk prefix of every expert bank, ending in a dot → role and block."""
    found = {}
    for block in layout.blocks:
        bank = block.bank
        if bank is None:
            continue
        name = bank.module
        if layout.disk.experts is not None:
            name = name.replace(*layout.disk.experts)
        for module in {name, bank.module}:
            found[module + "."] = ("experts", block.index)
    return found


def _dense_role(name: str, known: dict[str, Any], disk: dict[str, tuple[str, int]]) -> tuple[str, int]:
    stem = name.removesuffix(".weight").removesuffix(".weight_dense")
    for key in (name, stem):
        if key in known:
            return known[key][0], known[key][2]
    place = name.find(".experts.")
    if place >= 0 and name[: place + len(".experts.")] in disk:
        return disk[name[: place + len(".experts.")]]
    return "other", -1


def spec_text(spec: dict[str, Any]) -> str:
    """``3-bit, group 128, asymmetric``."""
    group = "per row" if spec.get("group_size") == -1 else f"group {spec.get('group_size')}"
    codec = "" if spec.get("codec", "int_group") == "int_group" else f", {spec['codec']}"
    return f"{spec.get('bits')}-bit, {group}, {'symmetric' if spec.get('symmetric') else 'asymmetric'}{codec}"


def _show(found: Inspection, screen: Console) -> None:
    screen.print(str(found.path), style="bold", markup=False, highlight=False)
    facts = [f"{found.kind}, model type {found.family}"]
    if found.blocks:
        facts.append(f"{found.blocks} blocks, hidden {found.hidden}, vocabulary {found.vocab}")
    if found.experts:
        facts.append(f"{found.experts} experts per block, {found.top_k} chosen per token")
    facts.append(f"{found.parameters / 1e6:.2f} M parameters in {bytes_text(found.bytes)}, {found.bits:.2f} bits each")
    if not found.supported:
        facts.append(f"cannot be compressed: {found.reason or 'it is quantized already'}")
    elif found.modules_because is None:
        bound = found.native_tokens
        # tables of learned positions end there in the modules too
        longer = "longer ones, if the model takes them, through transformers' modules"
        facts.append("decodes natively on CPUs" + (f" in sequences of up to {bound} tokens, {longer}" if bound else ""))
    else:
        facts.append(f"decodes through transformers' modules: {found.modules_because}")
    if found.policies:
        facts.append(f"policies: {', '.join(found.policies)}")
    if not found.tokenizer:
        facts.append("no tokenizer files")
    for fact in facts:
        screen.print(f"  {fact}", markup=False, highlight=False)
    rows = [
        (g.role, g.how, g.modules, _span(g.blocks), f"{g.values / 1e6:.2f} M", bytes_text(g.bytes),
         f"{8 * g.bytes / g.values:.2f}" if g.values else None)
        for g in found.groups
    ]  # fmt: skip
    headers = ("role", "stored as", "weights", "blocks", "values", "bytes", "bits each")
    screen.print(table(headers, rows, right="weights|values|bytes|bits each"))
    _show_states(found, screen)


def _show_states(found: Inspection, screen: Console) -> None:
    """Widths of weights, activations and states; heads by memory and error; bytes by batch."""
    if not found.memory:
        return
    if "state_cache" in found.policies:
        weights = sorted({group.how.partition("-bit")[0] for group in found.groups if "-bit" in group.how})
        activations = found.policies.get("activations", {}).get("bits", 16)
        policy = found.policies["state_cache"]
        states = "auto" if policy.get("head_bits") else policy["bits"]
        screen.print(f"  W{'/'.join(weights) or 16} A{activations} H{states}, codec {policy['codec']}", highlight=False)
    heads = [
        (
            str(entry["mixer"]), len(entry["bits"]), _middle(entry["half_lives"]), _longest(entry["half_lives"]),
            f"{sum(entry['bits']) / len(entry['bits']):.2f}", _middle(entry["errors"]), f"{max(entry['errors']):.3f}",
        )
        for entry in found.heads
    ]  # fmt: skip
    if heads:
        headers: tuple[str, ...] = ("mixer", "heads", "half-life", "longest", "bits", "error", "worst")
        screen.print(table(headers, heads, right="heads|half-life|longest|bits|error|worst"))
    sizes = [
        (str(m.batch), bytes_text(m.weights), bytes_text(m.states + m.convolution), bytes_text(m.total),
         bytes_text(m.weights + m.float_states + m.convolution))
        for m in found.memory
    ]  # fmt: skip
    headers = ("batch", "weights", "states", "together", "with fp32 states")
    screen.print(table(headers, sizes, right="batch|weights|states|together|with fp32 states"))


def _middle(values: list[float | None]) -> str:
    known = sorted(float("inf") if value is None else value for value in values)
    return f"{known[len(known) // 2]:.3g}"


def _longest(values: list[float | None]) -> str:
    return f"{max(float('inf') if value is None else value for value in values):.3g}"


def _span(blocks: tuple[int, ...]) -> str | None:
    """``0–3, 7``."""
    if not blocks:
        return None
    parts: list[list[int]] = []
    for index in blocks:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in parts)
