"""Building blocks of layouts with state-space mixers: Mamba-1, Mamba-2 and their scans.

Facts found in transformers 5.23: every mixer reads ``conv1d.weight`` directly, Mamba-1 mixers also ``dt_proj.weight``,
so neither may become a packed module; they are small and stay dense. ``in_proj`` of Mamba-2 holds the rows
``[z | x | B | C | dt]``; the dt rows stay dense.
"""

from __future__ import annotations

from math import ceil, gcd

from llmcompress.errors import InputError
from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import Part, biases, first_and_last, norm
from llmcompress.models.layout import LinearGroup, LinearView, Role, ScanView, Sublayer, TensorView

# channels of a virtual head of Mamba-1, where the number of channels allows
VIRTUAL_HEAD = 64


def _conv(scan: ScanView, bias: bool) -> list[TensorView]:
    views = [TensorView(f"{scan.module}.conv1d.weight", (scan.conv_channels, 1, scan.conv_width))]
    return [*views, TensorView(f"{scan.module}.conv1d.bias", (scan.conv_channels,))] if bias else views


def mamba1(
    facts: Facts,
    scan: ScanView,
    pre_norm: str,
    rank: int,
    bias: bool,
    conv_bias: bool,
    extra: tuple[TensorView, ...] = (),
) -> Part:
    """A Mamba-1 mixer: in_proj → conv → x_proj → dt_proj → scan → out_proj.

    Args:
        facts: The config.
        scan: Made by :func:`virtual_scan`.
        pre_norm: Run-time name of the norm before the mixer.
        rank: Width of the time step's bottleneck.
        bias: Whether in_proj and out_proj have biases.
        conv_bias: Whether the convolution has one.
        extra: Further dense tensors (Jamba's norms).
    """
    module, inner, states = scan.module, scan.conv_channels, scan.states

    def linear(name: str, rows: int, columns: int, with_bias: bool) -> LinearView:
        return LinearView(f"{module}.{name}", rows, columns, Role.SSM, with_bias)

    groups = (
        LinearGroup((linear("in_proj", 2 * inner, facts.hidden, bias),), "first", module),
        LinearGroup((linear("x_proj", rank + 2 * states, inner, False),), "inner", module),
        LinearGroup((linear("out_proj", facts.hidden, inner, bias),), "last", module),
    )
    kept = [TensorView(f"{module}.A_log", (inner, states)), TensorView(f"{module}.D", (inner,))]
    kept += _conv(scan, conv_bias)
    kept += [TensorView(f"{module}.dt_proj.weight", (inner, rank)), TensorView(f"{module}.dt_proj.bias", (inner,))]
    return Part(Sublayer("ssm", module, pre_norm, None, groups, scan=scan), (*kept, *biases(groups), *extra))


def virtual_scan(module: str, inner: int, states: int, width: int) -> ScanView:
    """The scan of a Mamba-1 mixer with ``inner`` channels, cut into virtual heads."""
    channels = gcd(inner, VIRTUAL_HEAD)
    return ScanView(module, "mamba1", inner // channels, channels, states, 1, inner, width)


def mamba2(
    facts: Facts,
    scan: ScanView,
    pre_norm: str,
    in_bias: bool,
    out_bias: bool,
    conv_bias: bool,
    gated_norm: bool = True,
) -> Part:
    """A Mamba-2 mixer: in_proj → conv → scan → gated norm → out_proj.

    Args:
        facts: The config.
        scan: Made by :func:`headed_scan`.
        pre_norm: Run-time name of the norm before the mixer.
        in_bias: Whether in_proj has a bias.
        out_bias: Whether out_proj has one.
        conv_bias: Whether the convolution has one.
        gated_norm: Whether there is a norm between scan and out_proj.
    """
    module, heads, inner = scan.module, scan.heads, scan.heads * scan.channels
    rows = inner + scan.conv_channels + heads
    first = LinearView(f"{module}.in_proj", rows, facts.hidden, Role.SSM, in_bias, kept_rows=heads)
    last = LinearView(f"{module}.out_proj", facts.hidden, inner, Role.SSM, out_bias)
    linears = first_and_last(module, (first,), last)
    kept = [TensorView(f"{module}.{name}", (heads,)) for name in ("dt_bias", "A_log", "D")]
    kept += _conv(scan, conv_bias) + (norm(f"{module}.norm", inner) if gated_norm else [])
    return Part(Sublayer("ssm", module, pre_norm, None, linears, scan=scan), (*kept, *biases(linears)))


def headed_scan(module: str, heads: int, channels: int, states: int, groups: int, width: int) -> ScanView:
    """The scan of a Mamba-2 mixer.

    Raises:
        InputError: The heads cannot share the groups evenly.
    """
    if heads % groups:
        raise InputError(f"config.json: {heads} state-space heads do not divide into {groups} groups")
    conv = heads * channels + 2 * groups * states
    return ScanView(module, "mamba2", heads, channels, states, groups, conv, width)


def plain_mixer(facts: Facts, layer: str, keys: tuple[str, ...]) -> Part:
    """The Mamba-2 mixer of a layer that holds nothing else.

    Args:
        facts: The config.
        layer: Run-time name of the layer.
        keys: Keys of heads, channels per head, states, groups and the convolution's width.
    """
    heads, channels, states, groups, width = (facts.size(key) for key in keys)
    scan = headed_scan(f"{layer}.mixer", heads, channels, states, groups, width)
    bias = facts.flag("use_bias")
    return mamba2(facts, scan, f"{layer}.norm", bias, bias, facts.flag("use_conv_bias"))


def time_step_rank(facts: Facts, key: str) -> int:
    """Width of the time step's bottleneck; ``auto`` is a sixteenth of the hidden size."""
    return ceil(facts.hidden / 16) if facts.get(key) == "auto" else facts.size(key)


def whole_channels(value: float, what: str) -> int:
    """A number of channels that a config gives as a product.

    Raises:
        InputError: It is not a whole number.
    """
    if value != int(value) or value < 1:
        raise InputError(f"config.json: {what} is {value}, not a whole number of channels")
    return int(value)
