"""Operands that do not fit are refused by name, whatever would run; the kernels would read past their end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from llmcompress_kernels import cpu, gpu, mamba1, ops, state, state_shapes, tree
from llmcompress_kernels.delta_state import dsq_delta_update
from llmcompress_kernels.reference import bitpack
from llmcompress_kernels.reference.state import SEGMENT
from torch import Tensor

S, H, G, P, N, T, R = 3, 4, 2, 16, 32, 5, 4
INNER, WIDTH = H * P, H * P + 2 * G * N
Named = dict[str, Any]


def half(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float16)


def packed() -> Named:
    codes = torch.zeros(S, H, P, N // 2, dtype=torch.uint8)
    return {"codes": codes, "channel": half(S, H, P), "scale": half(S, H, N), "fixed": None}


def window() -> Named:
    return {"recent": torch.zeros(S, R - 1, H * P + H + G * N), "count": torch.zeros(S, dtype=torch.int32)}


def token() -> Named:
    return {
        "drive": torch.zeros(S, H, P),
        "decay": torch.zeros(S, H),
        "b": torch.zeros(S, G, N),
        "c": torch.zeros(S, G, N),
    }


def delta() -> Named:
    value, decay, key, query = token().values()
    return {"value": value, "decay": decay, "step": torch.zeros(S, H), "key": key, "query": query}


def weights() -> Named:
    vectors = {name: torch.ones(H) for name in ("dt_bias", "a", "d")}
    return {
        "conv_weight": torch.zeros(WIDTH, 4), "conv_bias": torch.zeros(WIDTH), **vectors, "gain": torch.ones(INNER)
    }  # fmt: skip


def mixer() -> Named:
    return {"projected": torch.zeros(S, INNER + WIDTH + H), "conv": torch.zeros(S, WIDTH, 4), **weights()}


def prompt() -> Named:
    given = {"projected": torch.zeros(S, T, INNER + WIDTH), "dt": torch.zeros(S, T, H)}
    return {**given, "conv": torch.zeros(S, WIDTH, 4), **weights(), "state": torch.zeros(S, H, P, N)}


def text() -> Named:
    given = {name: tensor.unsqueeze(1).repeat_interleave(T, 1) for name, tensor in token().items()}
    return {**given, "state": torch.zeros(S, H, P, N), "bits": torch.full((H,), 4), "fixed": None}


def gradient() -> Named:
    given = text()
    del given["state"]
    kept = torch.zeros(S, H, -(-T // SEGMENT), P, N)
    names = ("drive", "decay", "b", "c")
    return {
        "grad": torch.zeros(S, T, H, P),
        **{n: given[n] for n in names},
        "kept": kept,
        "bits": given["bits"],
        "fixed": None,
    }


def channels() -> Named:
    return {
        **packed(), "floats": None, "x": torch.zeros(S, INNER), "dt": torch.ones(S, INNER), "a": torch.zeros(INNER, N),
        "b": torch.zeros(S, N), "c": torch.zeros(S, N), "channels": P, "bits": 4, "refit": False, "dither": False,
        "recent": torch.zeros(S, R - 1, 2 * INNER + N), "count": torch.zeros(S, dtype=torch.int32),
    }  # fmt: skip


def channel_text() -> Named:
    return {
        "x": torch.zeros(S, T, INNER), "dt": torch.ones(S, T, INNER), "a": torch.zeros(INNER, N),
        "b": torch.zeros(S, T, N), "c": torch.zeros(S, T, N), "d": torch.ones(INNER),
        "floats": torch.zeros(S, INNER // 16, N, 16),
    }  # fmt: skip


def backward(**given: Any) -> None:
    torch.ops.llmcompress.selective_scan_q_backward(*given.values(), 1, 1)


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], Named]]] = {
    "state_update": (state.state_update, lambda: {"state": torch.zeros(S, H, P, N), **token()}),
    "dsq_state_update": (state.dsq_state_update, lambda: {**packed(), **token(), "bits": 4}),
    "fixed": (
        state.dsq_state_update, lambda: {**packed(), **token(), "bits": 4, "channel": None, "fixed": half(H, P)}
    ),
    "dsq_replay_update": (state.dsq_replay_update, lambda: {**packed(), **window(), **token(), "bits": 4}),
    "dsq_delta_update": (dsq_delta_update, lambda: {**packed(), **window(), **delta(), "bits": 4}),
    "mamba2_decode": (
        state.mamba2_decode,
        lambda: {
            **mixer(), **packed(), "floats": None, "groups": G, "states": N, "bits": 4, "epsilon": 1e-5, **window(),
        },
    ),
    "floats": (
        state.mamba2_decode,
        lambda: {
            **mixer(), **dict.fromkeys(packed()), "floats": torch.zeros(S, H, P, N), "groups": G, "states": N,
            "bits": 4, "epsilon": 1e-5,
        },
    ),
    "mamba2_prefill": (
        state.mamba2_prefill, lambda: {**prompt(), "groups": G, "limits": (0.0, 1.0), "epsilon": 1e-5}
    ),
    "dsq_pack": (state.dsq_pack, lambda: {"state": torch.zeros(S, H, P, N), "fixed": half(H, P), "bits": 4}),
    "selective_scan_q": (state.selective_scan_q, lambda: {**text(), "fixed": half(H, P)}),
    "selective_scan_q_backward": (backward, gradient),
}  # fmt: skip
# what is packed alone may have any number of sequences and states
CASES = [
    (call, name)
    for call, (_, make) in CALLS.items()
    for name, value in make().items()
    if isinstance(value, Tensor) and (call, name) != ("dsq_pack", "state")
]


def wrong(tensor: Tensor) -> list[Tensor]:
    """Too few and too many along each axis, and an axis more."""
    found = [tensor.unsqueeze(0)]
    for axis, size in enumerate(tensor.shape):
        found += [tensor.narrow(axis, 0, size - 1).contiguous(), torch.cat((tensor, tensor.narrow(axis, 0, 1)), axis)]
    return found


@pytest.mark.parametrize(("call", "name"), CASES)
@pytest.mark.usefixtures("state_kernels")
def test_a_wrong_shape_is_refused(call: str, name: str) -> None:
    run, make = CALLS[call]
    run(**make())
    # a mixer's vectors are counted only: another axis of one is no harm
    for shaped in wrong(make()[name])[name in ("dt_bias", "a", "conv_bias") :]:
        # a window may have any number of rows
        given = make() | {name: shaped}
        if name == "recent" and shaped.shape[::2] == make()[name].shape[::2] and shaped.dim() == 3:
            continue
        before = {key: value.clone() for key, value in given.items() if isinstance(value, Tensor)}
        with pytest.raises(ValueError, match=r"expected|divide|evenly"):
            run(**given)
        assert all(torch.equal(given[key], value) for key, value in before.items())


@pytest.mark.parametrize("missing", ["channel", "scale", "count"])
def test_what_is_missing_is_named(missing: str) -> None:
    run, make = CALLS["mamba2_decode"]
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        run(**make() | {missing: None})
    with pytest.raises(ValueError, match="floats is missing"):
        run(**make() | {"codes": None})
    with pytest.raises(ValueError, match="6 bits"):
        run(**make() | {"bits": 6})


def test_calls_on_a_gpu_are_asked_the_same() -> None:
    """By the functions that stand in front of its kernels; the definitions run behind them here."""
    for call in (
        "state_update",
        "dsq_state_update",
        "fixed",
        "dsq_replay_update",
        "mamba2_decode",
        "floats",
        "dsq_pack",
    ):
        run, make = CALLS[call]
        function = next(f for f in gpu._FUNCTIONS if f.__name__ == run.__name__)
        arguments = make()
        if call == "mamba2_decode":
            arguments = {
                **{k: v for k, v in arguments.items() if k not in window()},
                "refit": False,
                "dither": False,
            } | {key: arguments[key] for key in window()}
        gpu._checked(function)(*arguments.values())
        name, shaped = next((n, v) for n, v in reversed(arguments.items()) if isinstance(v, Tensor))
        with pytest.raises(ValueError, match=f"{run.__name__}: {name}"):
            gpu._checked(function)(*(arguments | {name: shaped[..., :-1]}).values())


@pytest.mark.parametrize("floats", [False, True])
def test_channels_with_rates_of_their_own(floats: bool) -> None:
    """Before any kernel: sizes of mamba1 that have one are in its own tests."""
    given = channels()
    if floats:
        given |= dict.fromkeys(packed()) | {"floats": torch.zeros(S, INNER // 16, N, 16), "recent": None, "count": None}
    order = [key for key in given if key not in ("refit", "dither")]
    state_shapes.check_channels(*(given[key] for key in order))
    for name, tensor in given.items():
        for shaped in wrong(tensor) if isinstance(tensor, Tensor) else ():
            if name == "recent" and shaped.dim() == 3 and shaped.shape[::2] == tensor.shape[::2]:
                continue
            with pytest.raises(ValueError, match="expected"):
                mamba1.update(**given | {name: shaped})
    text = channel_text()
    state_shapes.check_channel_scan(**text)
    for name, tensor in text.items():
        for shaped in wrong(tensor):
            with pytest.raises(ValueError, match="expected"):
                mamba1.scan(**text | {name: shaped})


def nodes(rows: int, columns: int, group: int) -> Named:
    bits = [4, 3]
    return {
        "x": torch.randn(4, columns),
        "packed": [bitpack.pack(torch.zeros(rows, columns, dtype=torch.uint8), b) for b in bits],
        "scale": [half(rows, -(-columns // group)) for _ in bits],
        "spans": torch.tensor([[0, 4], [1, 2]]), "bits": bits, "multiplier": [1.0, 0.5], "group_size": group,
    }  # fmt: skip


def test_weights_of_a_tree() -> None:
    given = nodes(32, 96, 64)
    ops.delta_decode(**given)
    changes: list[Named] = [
        {"x": given["x"][:, :64]}, {"x": given["x"][0]}, {"packed": given["packed"][:1]}, {"multiplier": [1.0]},
        {"bits": [4, 4]}, {"group_size": 32}, {"group_size": 0}, {"spans": given["spans"] + 1},
        {"spans": torch.tensor([[-1, 4], [1, 2]])}, {"scale": [given["scale"][0], given["scale"][1][:, :1]]},
        {"packed": [given["packed"][0], given["packed"][1][:31]]},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(ValueError, match="delta_decode"):
            ops.delta_decode(**given | change)
        with pytest.raises(ValueError, match="delta_decode"):
            gpu.delta_decode(**given | change)
    # a range of no rows may lie anywhere
    ops.delta_decode(**given | {"spans": torch.tensor([[0, 4], [9, 9]])})


@pytest.mark.skipif(cpu.unavailable(tree.FAMILY) is not None, reason="no C++ kernels here")
@pytest.mark.parametrize(("columns", "group"), [(96, 64), (128, 32), (80, 128), (64, 64)])
def test_planes_of_another_weight(columns: int, group: int) -> None:
    given = nodes(40, columns, group)
    parts = tree.planes(given["packed"], given["scale"], given["bits"], given["multiplier"], group, columns)
    spans = [(0, 4)] * len(parts)
    assert tree.product(given["x"], parts, spans, 40, group).shape == (4, 40)
    for x, many, rows in (
        (torch.zeros(4, columns + 64), spans, 40),
        (given["x"], spans[1:], 40),
        (given["x"], spans, 49),
    ):
        with pytest.raises(ValueError, match="delta_decode"):
            tree.product(x, parts, many, rows, group)
