"""The operator on packed states of gated delta rules: schema, shape function, façade and registration.

Its definition is :mod:`llmcompress_kernels.reference.delta_state`; the C++ kernel is one of the family of
:mod:`llmcompress_kernels.cpu_state`. :mod:`llmcompress_kernels.state` packs such states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import cpu_state, select
from llmcompress_kernels.reference import delta_state as definition

SCHEMA = (
    "dsq_delta_update(Tensor(a!) codes, Tensor(b!)? channel, Tensor(c!) scale, Tensor? fixed, Tensor(d!)? recent, "
    "Tensor(e!)? count, Tensor value, Tensor decay, Tensor step, Tensor key, Tensor query, int bits, "
    "bool refit=False, bool dither=False) -> Tensor"
)


def dsq_delta_update(
    codes: Tensor,
    channel: Tensor | None,
    scale: Tensor,
    fixed: Tensor | None,
    recent: Tensor | None,
    count: Tensor | None,
    value: Tensor,
    decay: Tensor,
    step: Tensor,
    key: Tensor,
    query: Tensor,
    bits: int,
    refit: bool = False,
    dither: bool = False,
) -> Tensor:
    """One token of every sequence through a gated delta rule with states packed by DSQ; codes and scales are replaced.

    Args:
        codes: uint8 ``[S, H, P, N * bits / 8]``: P columns of a value, N of a key.
        channel: fp16 ``[S, H, P]``; None when calibrated.
        scale: fp16 ``[S, H, N]``.
        fixed: fp16 ``[H, P]`` calibrated channel scale; None when there is ``channel``.
        recent: fp32 ``[S, R - 1, H P + H + G N]`` replay window, a row ``change | decay | key`` of a token since the
            last rounding; None to round at every token.
        count: int32 ``[S]``, filled rows of each sequence; None likewise.
        value: fp32 ``[S, H, P]``.
        decay: fp32 ``[S, H]``, factor of the state before the token.
        step: fp32 ``[S, H]``, share of what the state says wrongly of the value that it takes.
        key: fp32 ``[S, G, N]`` of length one; head h reads group ``h // (H / G)``.
        query: As ``key``, scaled.
        bits: 4 or 8.
        refit: As in :func:`llmcompress_kernels.state.dsq_state_update`.
        dither: As there.

    Returns:
        ``[S, H, P]``, read from the fresh state before it is rounded.
    """
    held, token = (codes, channel, scale, fixed, recent, count), (value, decay, step, key, query)
    out: Tensor = torch.ops.llmcompress.dsq_delta_update(*held, *token, bits, refit, dither)
    return out


def _like_value(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[6], memory_format=torch.contiguous_format)


_LIBRARY = torch.library.Library("llmcompress", "FRAGMENT")
_LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("dsq_delta_update", definition.dsq_delta_update, "CompositeExplicitAutograd")
_LIBRARY.impl("dsq_delta_update", cpu_state.dsq_delta_update, "CPU")
torch.library.register_fake("llmcompress::dsq_delta_update", _like_value, lib=_LIBRARY)
select.register(select.Implementation("dsq_delta_update", "reference", ("any",)))
select.register(select.Implementation("dsq_delta_update", "cpu", ("cpu",), cpu_state.unavailable))
