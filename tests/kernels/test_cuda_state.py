"""The CUDA C++ state update without a GPU: on the host it gives the definition's codes, and compiles for two GPUs."""

from __future__ import annotations

import ctypes
import inspect
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from llmcompress_kernels import build, select
from llmcompress_kernels.cuda import aot, machine_code
from llmcompress_kernels.cuda import state as kernels
from llmcompress_kernels.reference import state as definition

HEADS, GROUPS, P = 4, 2, 64
# a candidate that computes in units of the old step
UNITS = 3


@pytest.fixture(scope="module")
def emulation(on_host: Callable[[str, str], ctypes.CDLL]) -> ctypes.CDLL:
    """The kernel compiled for the host."""
    library = on_host("state-emulation", "cuda/state/emulate.cpp")
    library.llmcompress_state_per_state.restype = ctypes.c_float
    library.llmcompress_state_per_state.argtypes = (ctypes.c_float, ctypes.c_int)
    return library


@pytest.fixture(scope="module")
def windows(on_host: Callable[[str, str], ctypes.CDLL]) -> ctypes.CDLL:
    """The kernels of replay windows compiled for the host."""
    return on_host("replay-emulation", "cuda/state/emulate_replay.cpp")


def start(seed: int, sequences: int, states: int, bits: int, calibrated: bool, scale: float = 1.0):
    """Packed states with outliers along both axes, one of them zero, and the calibrated scale."""
    torch.manual_seed(seed)
    u = torch.randn(sequences, HEADS, P, states) * torch.randn(P, 1).exp() * torch.randn(states).exp() * scale
    u[0, 0] = 0
    u[0, 1, :, 3] = 0
    u[0, 1, 5] = 0
    fixed = (torch.rand(HEADS, P) + 0.1).to(torch.float16) if calibrated else None
    codes, channel, side = definition.dsq_pack(u, fixed, bits)
    return [codes.clone(), None if calibrated else channel, side], fixed


def inputs(sequences: int, states: int) -> tuple[torch.Tensor, ...]:
    """drive, decay, b, c."""
    return (
        torch.randn(sequences, HEADS, P),
        torch.rand(sequences, HEADS) * 0.2 + 0.8,
        torch.randn(sequences, GROUPS, states),
        torch.randn(sequences, GROUPS, states),
    )


def compare(emulation, held, fixed, given, bits: int, variant: int | None = None, dither: bool = False) -> None:
    """One token by both; codes and scales to the last bit."""
    expected = [None if t is None else t.clone() for t in held]
    how = (bits, False, dither)
    assert kernels.verify(*held, fixed, *given, *how) is None
    found = kernels.dsq_state_update(*held, fixed, *given, *how, library=emulation, variant=variant)
    wanted = definition.dsq_state_update(*expected, fixed, *given, *how)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4 * float(wanted.abs().max().clamp(min=1)))
    for mine, exact in zip(held, expected):
        assert mine is None or torch.equal(mine, exact)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(("bits", "states", "late"), [(4, 128, True), (8, 128, False), (4, 64, False), (8, 64, True)])
def test_codes_and_scales_are_the_definitions(emulation, bits: int, states: int, late: bool, calibrated: bool) -> None:
    emulation.llmcompress_state_emulation(int(late), bits)
    held, fixed = start(bits, 2, states, bits, calibrated)
    for _ in range(2):
        for variant in (0, 1, 2):
            compare(emulation, held, fixed, inputs(2, states), bits, variant)
        for variant in (1, 2):
            compare(emulation, held, fixed, inputs(2, states), bits, variant, True)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("variant", kernels.CANDIDATES)
def test_candidates_give_the_same_codes(emulation, variant: int, calibrated: bool) -> None:
    """Those in units of the old step too: all that is not sure there is computed by the definition."""
    emulation.llmcompress_state_emulation(variant % 2, variant)
    held, fixed = start(variant, 2, 128, 4, calibrated)
    for dither in (False, True, False):
        compare(emulation, held, fixed, inputs(2, 128), 4, variant, dither)


@pytest.mark.parametrize("dither", [False, True])
@pytest.mark.parametrize("scale", [1e-9, 1e9, 1e30])
def test_scales_at_the_ends_of_fp16(emulation, scale: float, dither: bool) -> None:
    """Where a scale is far from the maximum that it stands for, codes have to be clamped."""
    emulation.llmcompress_state_emulation(1, 3)
    held, fixed = start(3, 1, 128, 4, False, scale)
    drive, decay, b, c = inputs(1, 128)
    drive = drive * scale
    b[..., ::7] *= 1e-6
    b[..., ::11] *= 1e6
    for variant in (None, UNITS):
        again = [None if t is None else t.clone() for t in held]
        compare(emulation, again, fixed, (drive, decay, b, c), 4, variant, dither)


def test_ties_are_divided(emulation) -> None:
    """Quotients at the middle between codes, where every lane has to fall back to the division."""
    emulation.llmcompress_state_emulation(0, 5)
    codes = torch.zeros(1, HEADS, P, 64, dtype=torch.uint8)
    fixed = torch.ones(HEADS, P, dtype=torch.float16)
    drive, decay = torch.ones(1, HEADS, P), torch.ones(1, HEADS)
    b = torch.ones(1, GROUPS, 128)
    # a scale of 1 has a dither of 3/32 of a step, which moves the middles there
    for dither, variant in itertools.product((False, True), (kernels.LARGE, UNITS)):
        middle = definition.dither_of(torch.ones(1, dtype=torch.float16)).item() if dither else 0.0
        drive[..., 1:] = ((torch.randint(-14, 15, (1, HEADS, P - 1)) * 0.5 - middle) / 7).clamp(-1, 1)
        held = [codes.clone(), None, torch.ones(1, HEADS, 128, dtype=torch.float16)]
        compare(emulation, held, fixed, (drive, decay, b, b), 4, variant, dither)


def test_a_dither_takes_no_code_beyond_the_largest(emulation) -> None:
    """fp16 rounded a scale down: the largest number is above 127 steps, and a dither of nearly half is added."""
    emulation.llmcompress_state_emulation(0, 7)
    scales = torch.arange(0x3800, 0x3C00, dtype=torch.int16).view(torch.float16)
    high = scales[definition.dither_of(scales) > 0.45].repeat(2)[:64]
    fixed = torch.ones(HEADS, P, dtype=torch.float16)
    b = (high.float() * (1 + 2.0**-12 * 0.99)).expand(1, GROUPS, 64).contiguous()
    drive, decay = torch.ones(1, HEADS, P), torch.ones(1, HEADS)
    drive[..., 1::2] = -1
    for bits in (4, 8):
        codes = torch.zeros(1, HEADS, P, 64 * bits // 8, dtype=torch.uint8)
        held = [codes, None, torch.ones(1, HEADS, 64, dtype=torch.float16)]
        compare(emulation, held, fixed, (drive, decay, b, b), bits, dither=True)
        assert torch.equal(held[2][0, 0], high)
        most = 2 ** (bits - 1) - 1
        assert int(definition.unpack(held[0], bits, 64).abs().max()) == most


def test_the_state_scale_over_the_largest_code_is_rounded_correctly(emulation) -> None:
    every = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).to(torch.float32)
    for bits, most in ((4, 7.0), (8, 127.0)):
        found = [emulation.llmcompress_state_per_state(v, bits) for v in every.tolist()]
        assert torch.equal(torch.tensor(found), every / most)


def within_a_window(library, held, fixed, given, dither: bool, variant: int, readers: int = 4) -> None:
    """One token by both; everything that is kept to the last bit."""
    expected = [None if t is None else t.clone() for t in held]
    how = (4, False, dither)
    assert kernels.verify_replay(*held[:3], fixed, *held[3:], *given, *how) is None
    found = kernels.dsq_replay_update(
        *held[:3], fixed, *held[3:], *given, *how, library=library, variant=variant, readers=readers
    )
    wanted = definition.dsq_replay_update(*expected[:3], fixed, *expected[3:], *given, *how)
    assert wanted.isfinite().all()
    # a sum of codes is off by so much of what codes of 1 give
    ones = definition.stored_state(torch.full_like(held[0], 0x11), *held[1:3], fixed, 4)[0]
    close = 1e-5 * (wanted.abs().max() + definition.read_out(ones, given[3].abs()))
    assert ((found - wanted).abs() <= close).all()
    for mine, exact in zip(held, expected):
        assert mine is None or torch.equal(mine.nan_to_num(nan=-1), exact.nan_to_num(nan=-1))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(("bits", "states", "variant"), [(4, 128, None), (8, 64, None), (4, 128, UNITS)])
def test_what_is_not_a_number_stays_so(emulation, bits: int, states: int, variant: int, calibrated: bool) -> None:
    emulation.llmcompress_state_emulation(0, 5)
    held, fixed = start(5, 2, states, bits, calibrated)
    expected = [None if t is None else t.clone() for t in held]
    for t in range(3):
        given = inputs(2, states)
        if t == 0:
            given[0][0, 1, 3] = torch.nan
        found = kernels.dsq_state_update(*held, fixed, *given, bits, library=emulation, variant=variant)
        wanted = definition.dsq_state_update(*expected, fixed, *given, bits)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(held[2].isnan(), expected[2].isnan())
    assert wanted[0, 1].isnan().all()
    assert not wanted[1].isnan().any()


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("states", "window", "dither", "late"), [(128, 2, True, False), (128, 5, False, True), (64, 3, True, True)]
)
def test_windows(windows, states: int, window: int, dither: bool, late: bool, calibrated: bool) -> None:
    """Sequences at different places of their windows; rows that are not filled hold NaN."""
    windows.llmcompress_replay_emulation(int(late), window)
    sequences = 3
    packed, fixed = start(window, sequences, states, 4, calibrated)
    width = HEADS * P + HEADS + GROUPS * states
    held = [*packed, torch.full((sequences, window - 1, width), torch.nan), torch.zeros(sequences, dtype=torch.int32)]
    for t in range(window + 2):
        first = t % 2  # the first sequence stands still now and then
        part = [None if x is None else x[first:] for x in held]
        within_a_window(
            windows, part, fixed, [x[first:] for x in inputs(sequences, states)], dither, 1 + t % 2, 4 + 4 * first
        )
    assert len(set(held[4].tolist())) > 1 or window == 2


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("variant", "readers", "window", "decayed"),
    [(3, 45, 4, 0.9), (4, 44, 16, 0.9), (5, 45, 2, 1e-25), (4, 45, 3, 1e-25), (6, 8, 4, 0.9), (3, 4, 3, 3e6)],
)
def test_candidates_of_windows(
    windows, variant: int, readers: int, window: int, decayed: float, calibrated: bool
) -> None:
    """Decays that nothing can be divided by, and some that grow, which is left to the definition."""
    windows.llmcompress_replay_emulation(window % 2, variant)
    packed, fixed = start(window, 2, 128, 4, calibrated)
    width = HEADS * P + HEADS + GROUPS * 128
    held = [*packed, torch.full((2, window - 1, width), torch.nan), torch.tensor([0, window - 1], dtype=torch.int32)]
    held[3][1] = torch.randn(window - 1, width)
    held[3][1, :, HEADS * P : HEADS * P + HEADS] = decayed
    for t in range(window):
        drive, decay, b, c = inputs(2, 128)
        if t > 0:
            decay[:, 0] = decayed
        within_a_window(windows, held, fixed, (drive, decay, b, c), t % 2 == 0, variant, readers)


def test_a_window_of_many_tokens_and_sequences(windows) -> None:
    """All rows that a window may have, and more sequences than are looked at together."""
    windows.llmcompress_replay_emulation(1, 11)
    sequences, rows = 34, kernels.MOST_ROWS
    packed, _ = start(11, sequences, 64, 4, False)
    width = HEADS * P + HEADS + GROUPS * 64
    count = torch.tensor([3, rows - 1, 0, 7] + [rows - 1] * 2 + [5] * 27 + [rows], dtype=torch.int32)
    decayed = torch.randn(sequences, rows, width)
    decayed[..., HEADS * P : HEADS * P + HEADS] = torch.rand(sequences, rows, HEADS) * 0.2 + 0.8
    held = [*packed, decayed, count]
    for _ in range(2):
        within_a_window(windows, held, None, inputs(sequences, 64), True, 2)
    assert held[4][:4].tolist() == [5, 0, 2, 9]


@pytest.mark.parametrize("readers", kernels.READERS)
def test_windows_of_more_heads_than_a_block_has_warps(windows, readers: int) -> None:
    """Several blocks share a group and its sequence's count; the last has fewer heads."""
    windows.llmcompress_replay_emulation(1, 13)
    heads, rows = 12 if readers == 8 else 20, 3
    codes, channel, side = definition.dsq_pack(torch.randn(2, heads, P, 64), None, 4)
    recent = torch.full((2, rows, heads * (P + 1) + 64), torch.nan)
    held = [codes, channel, side, recent, torch.zeros(2, dtype=torch.int32)]
    for t in range(rows + 2):
        token = (torch.randn(2, heads, P), torch.rand(2, heads), torch.randn(2, 1, 64), torch.randn(2, 1, 64))
        within_a_window(windows, held, None, token, False, 1 + t % 2, readers)
    assert held[4].tolist() == [1, 1]


@pytest.mark.parametrize(("scale", "reader"), [(1e-30, 1e30), (1e-9, 1), (1e-6, 1e-30), (1e9, 1e9), (1e25, 1)])
def test_windows_at_the_ends_of_fp16(windows, scale: float, reader: float) -> None:
    """Codes whose quotients are near the middle between two, and read-outs far beyond what fp16 holds."""
    windows.llmcompress_replay_emulation(1, 3)
    packed, _ = start(3, 1, 128, 4, False, scale)
    width = HEADS * P + HEADS + GROUPS * 128
    held = [*packed, torch.full((1, 2, width), torch.nan), torch.zeros(1, dtype=torch.int32)]
    for t in range(8):
        drive, decay, b, c = inputs(1, 128)
        b[..., ::7] *= 1e-6
        b[..., ::11] *= 1e6
        within_a_window(windows, held, None, (drive * scale, decay, b, c * reader), True, 1 + 2 * (t % 2))


def test_what_the_kernel_declines() -> None:
    held, fixed = start(0, 1, 128, 4, False)
    given = inputs(1, 128)
    assert kernels.verify(*held, fixed, *given, 4) is None
    assert "fitted" in (kernels.verify(*held, fixed, *given, 4, True) or "")
    assert kernels.verify(*held, fixed, *given, 4, False, True) is None
    assert "6 bits" in (kernels.verify(*held, fixed, *given, 6) or "")
    assert "float32" in (kernels.verify(*held, fixed, given[0].double(), *given[1:], 4) or "")
    assert "P = 32" in (kernels.verify(*held, fixed, given[0][..., :32], *given[1:], 4) or "")
    turned = held[0].transpose(2, 3).contiguous().transpose(2, 3)
    assert "contiguous" in (kernels.verify(turned, *held[1:], fixed, *given, 4) or "")


def test_what_the_kernels_of_windows_decline() -> None:
    held, fixed = start(0, 1, 128, 4, False)
    given, count = inputs(1, 128), torch.zeros(1, dtype=torch.int32)
    width = HEADS * P + HEADS + GROUPS * 128

    def why(recent: torch.Tensor, filled: torch.Tensor = count, bits: int = 4) -> str:
        return kernels.verify_replay(*held, fixed, recent, filled, *given, bits) or ""

    assert why(torch.zeros(1, kernels.MOST_ROWS, width)) == ""
    assert "window of 17" in why(torch.zeros(1, kernels.MOST_ROWS + 1, width))
    assert "window of 1" in why(torch.zeros(1, 0, width))
    assert "8 bits" in why(torch.zeros(1, 3, width), bits=8)
    assert "int64" in why(torch.zeros(1, 3, width), count.long())
    assert "contiguous" in why(torch.zeros(1, 4, width)[:, ::2])
    assert "16 bytes" in why(torch.zeros(width + 1)[1:].view(1, 1, width))


def test_every_argument_of_the_operator_is_known() -> None:
    """The dispatcher passes the operator's arguments on by place."""
    for operator, functions in (
        (torch.ops.llmcompress.dsq_state_update, (kernels.verify, kernels.dsq_state_update)),
        (torch.ops.llmcompress.dsq_replay_update, (kernels.verify_replay, kernels.dsq_replay_update)),
    ):
        names = [argument.name for argument in operator.default._schema.arguments]
        for function in functions:
            assert list(inspect.signature(function).parameters)[: len(names)] == names


def test_the_implementation_is_listed_with_its_reason() -> None:
    rows = {(r.op, r.implementation): r for r in select.explain("cuda")}
    for row in (rows["dsq_state_update", "cuda"], rows["dsq_replay_update", "cuda"]):
        assert row.used or row.reason
        assert torch.cuda.is_available() or row.reason == "no CUDA device"


@pytest.mark.slow
def test_every_instance_compiles_without_spills(tmp_path) -> None:
    """And fits four times into a multiprocessor, with few enough instructions per state."""
    if aot.missing() is not None:
        pytest.skip(aot.missing())
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(lambda arch: machine_code.instances("state/update.cu", arch, tmp_path), (80, 90))
        found = [one for part in parts for one in part]
    assert {(one.arch, *one.numbers[:5], one.numbers[6]) for one in found} == {
        (arch, bits, states, *shape, fixed, dither)
        for arch in (80, 90)
        for bits in (4, 8)
        for states in (64, 128)
        for shape in ((4, 8), (4, 4))
        for fixed in (0, 1)
        for dither in (0, 1)
    }
    for one in found:
        bits, states, rows, lanes = one.numbers[:4]
        counts = one.counts()
        assert (one.spills, one.stack) == (0, 0), one.numbers
        threads = P * lanes // rows
        assert 4 * threads * -(-one.registers // 8) * 8 <= 65536, one.numbers
        assert counts["LDGSTS"] > 0, one.numbers
        assert any("STG.E.128" in line for line in one.code), one.numbers
        # a lane has so many states: five rounded products each, one fused into the read-out, bounds of a code,
        # with 4 bits what turns three quarters of the codes into numbers; the rest is per row and column
        each = P * states // threads
        fused = (2.75 if bits == 4 else 3) * each
        assert 5 * each <= counts["FMUL"] <= 5 * each + 80, one.numbers
        assert fused <= counts["FFMA"] <= fused + each + 80, one.numbers


@pytest.mark.slow
def test_windows_compile_without_spills(tmp_path) -> None:
    """And take few instructions: up to 1050 to read a head, and 3 a state and little more for every token replayed."""
    if aot.missing() is not None:
        pytest.skip(aot.missing())
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(lambda arch: machine_code.instances("state/replay.cu", arch, tmp_path), (80, 90))
        found = [one for part in parts for one in part]
    readers = [one for one in found if len(one.numbers) == 4]
    assert {(one.arch, *one.numbers) for one in readers} == {
        (arch, states, warps, blocks, 0)
        for arch in (80, 90)
        for states in (64, 128)
        for warps, blocks in zip(kernels.READERS, (5, 2))
    }
    for one in readers:
        counts, each = one.counts(), P * one.numbers[0] // 32
        assert (one.spills, one.stack) == (0, 0), one
        assert 32 * one.numbers[1] * one.numbers[2] * -(-one.registers // 8) * 8 <= 65536, one.numbers
        assert counts["HMMA"] == 2 * each // 16, one.numbers
        # two codes take one; the rest of a head is counted with its loops unrolled
        assert counts["LOP3"] <= each // 2 + 40, one.numbers
        assert counts.total() <= 1050, one.numbers
    rounders = [one for one in found if len(one.numbers) > 4]
    assert {(one.arch, *one.numbers) for one in rounders} == {
        (arch, 4, states, 4, lanes, fixed, 4, dither, 1, 0)
        for arch in (80, 90)
        for states in (64, 128)
        for lanes in (4, 8)
        for fixed in (0, 1)
        for dither in (0, 1)
    }
    for one in rounders:
        _, _, rows, lanes = one.numbers[:4]
        assert (one.spills, one.stack) == (0, 0), one.numbers
        assert 4 * P * lanes // rows * -(-one.registers // 8) * 8 <= 65536, one.numbers
        # a run of eight columns in every row of a lane
        replays = [loop for loop in one.loops() if loop["FMUL"] == 2 * 8 * rows and loop["FADD"] == 8 * rows]
        assert len(replays) == one.numbers[1] // 8 // lanes, one.numbers
        assert all(loop.total() <= 3.6 * 8 * rows for loop in replays), one.numbers


@pytest.mark.slow
def test_candidates_compile(tmp_path) -> None:
    """Those that no library has by default: in units of the old step, a token taken in is a product a state."""
    if aot.missing() is not None:
        pytest.skip(aot.missing())
    folder = build.SOURCES / "cuda"
    source = tmp_path / "candidates.cu"
    shape = "StateShape<4, 128, 4, {}, false, {}, true, true, true>"
    source.write_text(
        f'#include "{folder}/common/device.cuh"\n#include "{folder}/state/kernel.cuh"\n'
        f'#include "{folder}/state/read.cuh"\nnamespace llmcompress::gpu {{\n'
        + "".join(
            f"template __global__ void update_kernel<{shape.format(*own)}>(const __grid_constant__ ReplayCall);\n"
            for own in ((8, 4), (4, 4), (4, 6))
        )
        + "template __global__ void read_kernel<ReadShape<128, 4, 5, true>>(const __grid_constant__ ReplayCall);\n}\n"
    )
    found = machine_code.instances(str(source), 90, tmp_path)
    assert len(found) == 4
    for one in found:
        if len(one.numbers) == 4:
            assert 5 * 128 * -(-one.registers // 8) * 8 <= 65536
            assert one.spills == 0
            continue
        rows, lanes, blocks = one.numbers[2], one.numbers[3], one.numbers[5]
        threads = P * lanes // rows
        each = P * 128 // threads
        # registers are given to schedulers, of which a multiprocessor has four
        assert -(-threads * blocks // 128) * 32 * -(-one.registers // 8) * 8 <= 16384, one.numbers
        # the form with more blocks keeps what is rarely needed in memory
        assert one.spills <= (0 if blocks == 4 else 2 * 4 * 64), one.numbers
        (taken,) = [loop for loop in one.loops() if loop["FFMA"] == each]
        assert taken.total() <= 1.45 * each, one.numbers
