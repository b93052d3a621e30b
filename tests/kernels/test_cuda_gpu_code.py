"""CUDA C++ without a GPU: the kernels' own source run on the host against the definition, and compiled for two GPUs."""

from __future__ import annotations

import ctypes
import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from llmcompress_kernels import select, tables
from llmcompress_kernels.cuda import aot, launches, skinny
from llmcompress_kernels.reference import group_gemm as dense_definition
from llmcompress_kernels.reference import moe_group_gemm as routed_definition

# one rounding of the result, and products of exact operands in fp32
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 5e-4}
ARCHITECTURES = (80, 90)
# instructions of one thread that an H100 can issue per weight while 3 TB/s of them arrive
BUDGET = {2: 2.8, 3: 4.0, 4: 5.3}


@pytest.fixture(scope="module")
def emulation(on_host: Callable[[str, str], ctypes.CDLL]) -> ctypes.CDLL:
    """The kernels compiled for the host."""
    return on_host("skinny-emulation", "cuda/skinny/emulate.cpp")


@pytest.fixture(params=["whole", "shared"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Blocks take whole strips where groups allow it, or share them, as they do with narrow groups."""
    if request.param == "shared":
        monkeypatch.setattr(skinny, "whole_strips", lambda call: False)
    return request.param


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error; NaN counts as infinite."""
    value = ((found.double() - expected).norm() / expected.norm()).item()
    return value if value == value else float("inf")


@pytest.mark.parametrize(("dtype", "late"), [(torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "group", "processors"),
    [
        (1, 128, 256, 128, 1),
        (3, 130, 1408, 64, 2),  # rows of another strip, half a step at the end, strips that blocks share
        (9, 17, 1536, 1024, 2),  # two tiles of tokens, groups longer than a step
        (16, 48, 640, 4096, 1),  # one group per row
        (21, 100, 512, 128, 2),  # two jobs
    ],
)
def test_dense(
    emulation, form, packed, monkeypatch, late, bits, dtype, tokens, rows, columns, group, processors
) -> None:
    torch.manual_seed(tokens)
    monkeypatch.setattr(skinny, "LEAST_STEPS", 1)
    monkeypatch.setattr(skinny, "TOKENS", 32)  # what is possible, not what is fastest
    emulation.llmcompress_skinny_emulation(int(late), bits)
    w = packed((rows, columns), bits, group, symmetric=tokens == 1)
    x = torch.randn(tokens, columns).to(dtype)
    operands = (w.weight, w.scale, w.zero, bits, group, columns)
    assert skinny.verify(x, *operands[:5]) is None
    expected = dense_definition.group_gemm(x.double(), *operands)
    found = skinny.group_gemm(x, *operands, library=emulation, device=skinny.Device(processors, 9))
    assert error(found, expected) < TOLERANCE[dtype]


def test_shared_memory_is_what_the_host_says(emulation) -> None:
    for bits in (2, 3, 4):
        for mode, at_once, group in itertools.product(skinny.MODES.values(), (1, 8, 9, 16), (64, 128, 4096)):
            call = skinny.Call(mode=mode, tokens=16, slots=3, experts=5, at_once=at_once, group=group)
            call.warps, call.stages, call.room = 8, 4, 4096
            found = getattr(emulation, f"llmcompress_skinny_shared_{bits}")(ctypes.byref(call), -(-at_once // 8))
            assert found == skinny.shared(bits, call)
            call.height, call.teams, call.members = 28, 4, 2
            found = getattr(emulation, f"llmcompress_skinny_shared_{bits}")(ctypes.byref(call), -(-at_once // 8))
            assert found == skinny.shared_of_strips(bits, call)


@pytest.mark.parametrize(
    "launch",
    [
        launches.Launch(1, 3, 1, whole=False),
        launches.Launch(2, 5, 3, whole=False),
        launches.Launch(4, 6, 1, overlap=False, whole=False),
        launches.Launch(2, 2, 2, whole=False),
        launches.Launch(1, 2, 1),
        launches.Launch(8, 3, 1),
        launches.Launch(5, 4, 2, overlap=False),
        launches.Launch(6, 2, 1),
    ],
)
def test_launches(emulation, packed, monkeypatch, launch) -> None:
    """However a product is cut up: activations come in several slices, strips are shared by many blocks."""
    monkeypatch.setattr(skinny, "LEAST_STEPS", 1)
    monkeypatch.setattr(skinny, "SHARED", {8: 64 << 10, 9: 72 << 10})
    monkeypatch.setattr(skinny, "SHARED_OF_A_BLOCK", {8: 64 << 10, 9: 40 << 10})
    emulation.llmcompress_skinny_emulation(launch.stages % 2, launch.warps)
    group = 128 if launch.whole else 64
    w = packed((150, 2112), 2, group, symmetric=False)
    x = torch.randn(7, 2112).to(torch.bfloat16)
    operands = (w.weight, w.scale, w.zero, 2, group, 2112)
    expected = dense_definition.group_gemm(x.double(), *operands)
    found = skinny.group_gemm(x, *operands, launch, library=emulation, device=skinny.Device(3, 9))
    assert error(found, expected) < TOLERANCE[torch.bfloat16]


def test_narrow_groups(emulation, packed) -> None:
    emulation.llmcompress_skinny_emulation(1, 0)
    for bits, group in ((3, 64), (4, 32), (2, 64), (4, 256), (3, 32)):
        w = packed((32, 512), bits, group, symmetric=False)
        x = torch.randn(2, 512).to(torch.float16)
        operands = (w.weight, w.scale, w.zero, bits, group, 512)
        expected = dense_definition.group_gemm(x.double(), *operands)
        found = skinny.group_gemm(x, *operands, library=emulation, device=skinny.Device(1, 9))
        assert error(found, expected) < TOLERANCE[torch.float16], (bits, group)


def test_results_do_not_depend_on_the_order_of_blocks_and_lanes(emulation, form, packed) -> None:
    w = packed((40, 2048), 3, 128, symmetric=False)
    x = torch.randn(5, 2048).to(torch.bfloat16)
    found = []
    for seed in range(3):
        emulation.llmcompress_skinny_emulation(seed % 2, seed)
        found.append(
            skinny.group_gemm(x, w.weight, w.scale, w.zero, 3, 128, 2048, library=emulation, device=skinny.Device(4, 9))
        )
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("tokens", "bits", "activation", "processors", "late"),
    [
        (1, (2, 2), "silu", 1, True),
        (4, (4, 3), "gelu", 60, False),
        (9, (3, 4), "gpt_oss", 60, True),
        (16, (2, 4), "gelu_pytorch_tanh", 1, False),
        (20, (3, 2), "silu", 60, True),  # more slots than a warp has lanes
    ],
)
def test_routed(emulation, form, packed, monkeypatch, tokens, bits, activation, processors, late) -> None:
    torch.manual_seed(tokens)
    emulation.llmcompress_skinny_emulation(int(late), tokens)
    monkeypatch.setattr(skinny, "LEAST_STEPS", 1)
    experts, slots, hidden, inner = 4, 2, 640, 384
    up = packed((experts, 2 * inner, hidden), bits[0], 128, symmetric=False)
    down = packed((experts, hidden, inner), bits[1], 128, symmetric=True)
    scale = 0.1 if activation == "gpt_oss" else 0.05
    sides = (
        skinny.Side(up.weight, up.scale, up.zero, torch.randn(experts, 2 * inner), bits[0], 128),
        skinny.Side(down.weight, down.scale, down.zero, torch.randn(experts, hidden), bits[1], 128),
    )
    x = (scale * torch.randn(tokens, hidden)).to(torch.bfloat16)
    index = torch.rand(tokens, experts).topk(slots, -1).indices
    index[0, 1] = experts  # a skipped slot
    if tokens > 8:
        index[:, 0] = 3  # more tokens than one tile
        index[:, 1] = torch.where(index[:, 1] == 3, 4, index[:, 1])
    weights = torch.rand(tokens, slots)
    assert skinny.verify_routed(x, index, sides, inner, activation) is None
    own = [v for s in sides for v in (s.weight, s.scale, s.zero, s.bias, s.bits, s.group)]
    expected = routed_definition.moe_group_gemm(x.double(), index, weights, *own, inner, activation, 1.702, 7.0)
    found = skinny.moe_group_gemm(
        x, index, weights, sides, inner, activation, 1.702, 7.0, library=emulation, device=skinny.Device(processors, 9)
    )
    assert error(found, expected) < 2 * TOLERANCE[torch.bfloat16]


def test_a_repeated_expert_takes_a_second_pass(emulation, form, packed) -> None:
    """More slots of one expert than a tile holds, because tokens name it twice."""
    emulation.llmcompress_skinny_emulation(1, 0)
    up, down = packed((2, 64, 256), 4, 64, True), packed((2, 256, 32), 4, 64, True)
    sides = tuple(skinny.Side(s.weight, s.scale, None, None, 4, 64) for s in (up, down))
    x = (0.1 * torch.randn(6, 256)).to(torch.float16)
    index, weights = torch.ones(6, 2, dtype=torch.int64), torch.rand(6, 2)
    own = [v for s in sides for v in (s.weight, s.scale, s.zero, s.bias, s.bits, s.group)]
    halves = [
        routed_definition.moe_group_gemm(
            x.double(), index[:, j : j + 1], weights[:, j : j + 1], *own, 32, "silu", 1.7, 7.0
        )
        for j in range(2)
    ]
    found = skinny.moe_group_gemm(
        x, index, weights, sides, 32, "silu", 1.7, 7.0, library=emulation, device=skinny.Device(1, 9)
    )
    assert error(found, halves[0] + halves[1]) < 1e-3


def test_all_slots_skipped_give_zeros(emulation, form, packed) -> None:
    up, down = packed((2, 64, 256), 4, 64, True), packed((2, 256, 32), 4, 64, True)
    sides = tuple(skinny.Side(s.weight, s.scale, None, None, 4, 64) for s in (up, down))
    x = torch.randn(2, 256).to(torch.float16)
    index, weights = torch.full((2, 2), 2), torch.rand(2, 2)
    found = skinny.moe_group_gemm(
        x, index, weights, sides, 32, "silu", 1.7, 7.0, library=emulation, device=skinny.Device(1, 9)
    )
    assert torch.equal(found, torch.zeros_like(x))


def test_what_the_kernels_decline(packed) -> None:
    w = packed((32, 512), 4, 128, True)
    x = torch.randn(2, 512).to(torch.bfloat16)

    def reason(x: torch.Tensor = x, bits: int = 4, group: int = 128) -> str:
        return skinny.verify(x, w.weight, w.scale, None, bits, group) or ""

    assert reason() == ""
    assert "float32" in reason(x.float())
    assert "17 tokens" in reason(torch.randn(17, 512).to(torch.bfloat16))
    assert "8 bits" in reason(bits=8)
    assert "groups of 48" in reason(group=48)
    assert "begin at 16 bytes" in reason(torch.randn(1, 576).to(torch.bfloat16), bits=3)
    shifted = torch.randn(513).to(torch.bfloat16)[1:].view(1, 512)
    assert "does not begin" in reason(shifted)


def test_the_implementation_is_listed_with_its_reason() -> None:
    rows = {(row.op, row.implementation): row for row in select.explain("cuda")}
    for op in ("group_gemm", "moe_group_gemm"):
        row = rows[op, "cuda"]
        assert row.used or row.reason
        assert torch.cuda.is_available() or row.reason == "no CUDA device"


def cut(bits: int, rows: int, columns: int, tokens: int = 1, launch: launches.Launch | None = None) -> skinny.Call:
    """A dense call on an H100."""
    call = skinny.Call(mode=0, tokens=tokens, slots=1, experts=1, rows=rows, columns=columns, group=128)
    call.at_once = min(tokens, 16)
    skinny.cut(call, bits, launch or launches.Launch(8, 4, 2, whole=False), skinny.Device(132, 9))
    return call


def test_blocks_fit_side_by_side() -> None:
    for bits, tokens in itertools.product((2, 3, 4), (1, 8, 16)):
        call = cut(bits, 14336, 4096, tokens)
        side_by_side = call.blocks // 132
        assert side_by_side * (skinny.shared(bits, call) + 1024) <= aot.SHARED_PER_PROCESSOR[90], (bits, tokens)
        assert side_by_side * call.warps >= 8, (bits, tokens)


def test_what_does_not_fit_gives_way() -> None:
    generous, tight = cut(4, 4096, 14336, 1), cut(4, 4096, 14336, 16)
    assert generous.room >= 2 * 14336
    assert 16 * 4 * 256 <= tight.room < 16 * 2 * 14336
    wanted = cut(4, 4096, 14336, 16, launches.Launch(16, 6, 4, whole=False))
    assert (wanted.warps, wanted.blocks) == (12, 132)
    assert wanted.stages < 6


def test_strips_are_shared_by_few_blocks() -> None:
    for rows, columns in ((32, 57344), (4096, 14336), (14336, 4096), (128, 128)):
        call = cut(4, rows, columns)
        assert 1 <= call.pieces <= skinny.MOST_PIECES + 1, (rows, columns)


def test_whole_strips_are_shared_out_evenly() -> None:
    """No multiprocessor takes much more than its share, whatever the shape, and everything fits."""
    for launch in (launches.Launch(8, 2, 1), launches.Launch(8, 4, 1), launches.Launch(4, 3, 2)):
        for bits, tokens in itertools.product((2, 3, 4), (1, 8, 16)):
            for rows, columns in (
                (14336, 4096),
                (4096, 14336),
                (4096, 4096),
                (6144, 4096),
                (1024, 4096),
                (11008, 4096),
            ):
                call = cut(bits, rows, columns, tokens, launch)
                name = (launch, bits, tokens, rows, columns)
                side_by_side = -(-call.blocks // 132)
                assert side_by_side * (skinny.shared_of_strips(bits, call) + 1024) <= aot.SHARED_PER_PROCESSOR[90], name
                assert call.warps == call.teams * call.members <= skinny.STRIP_WARPS, name
                assert call.members * call.rounds * 512 >= columns, name
                assert call.tiles * call.teams * call.height >= rows, name
                each = -(-call.tiles // call.blocks) * side_by_side if call.tiles > 132 else 1
                assert each * call.teams * call.height * 132 <= 1.35 * max(rows, 132 * 16), name


def test_tables_of_launches(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(tables.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(launches, "SHIPPED", tmp_path / "shipped")
    launches._table.cache_clear()
    name, first, second = "Some GPU 80GB", launches.Launch(4, 3, 2), launches.Launch(16, 5, 1, False)
    one, other = launches.key("dense", 4, 1, 128, 256), launches.key("down", 3, 5, 128, 256)
    assert other == launches.key("down", 3, 8, 128, 256)
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / tables.file_name(name)).write_text(
        json.dumps({one: {"warps": 2, "stages": 3, "blocks": 1}, other: {"warps": 1, "stages": 3, "blocks": 1}})
    )
    launches.keep(name, {one: first})
    assert launches._table(name) == {one: first, other: launches.Launch(1, 3, 1)}
    launches.keep(name, {one: second})
    assert launches._table(name)[one] == second
    assert launches.pick("dense", 4, 1, 128, 256, torch.device("cpu")) == launches.Launch()
    path = tables.path_of("cuda", name)
    stale = json.loads(path.read_text())
    stale["versions"]["kernels"] = "of yesterday"
    path.write_text(json.dumps(stale))
    launches._table.cache_clear()
    assert launches._table(name)[one] == launches.Launch(2, 3, 1)
    launches._table.cache_clear()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """Reports of all instances, both GPUs compiled at once."""
    if aot.missing() is not None:
        pytest.skip(aot.missing())
    folder = tmp_path_factory.mktemp("cubin")
    with ThreadPoolExecutor(2) as pool:
        return [r for part in pool.map(lambda arch: aot.compile_all(arch, folder), ARCHITECTURES) for r in part]


@pytest.mark.slow
def test_every_instance_compiles(compiled: list[dict]) -> None:
    wanted = set(itertools.product(("whole", "shared"), ARCHITECTURES, (2, 3, 4), ("fp16", "bf16"), (8, 16)))
    assert {(r["form"], r["arch"], r["bits"], r["type"], r["tokens"]) for r in compiled} == wanted
    for report in compiled:
        wide = report["tokens"] > 8
        most = skinny.WARPS_AT_ONCE[wide] if report["form"] == "whole" else skinny.MOST_WARPS[wide]
        # registers are given out by eights
        assert -(-report["registers"] // 8) * 8 * 32 * most <= 65536, report
        assert report["spills"] == report["stack"] == 0, report


@pytest.mark.slow
def test_the_products_are_made_of_what_they_are_meant_to_be(compiled: list[dict]) -> None:
    for report in compiled:
        counts, tiles = report["step"], report["tokens"] // 8
        assert report["steps"] == (4 if report["form"] == "shared" else 1), report
        # 2 x 16 rows, 16 columns at a time
        assert counts["HMMA"] % (2 * tiles) == 0, report
        assert report["copies"] > 0, report  # LDGSTS
        assert counts.get("LDG", 0) + counts.get("STL", 0) == 0, report
        if report["tokens"] == 8:
            # the rest is for copies, scales and waiting
            assert report["per_weight"] < (0.45 if report["form"] == "whole" else 0.55) * BUDGET[report["bits"]], report


def test_the_table_that_comes_along_is_found_and_names_whole_launches() -> None:
    launches._table.cache_clear()
    table = launches._launches(launches._shipped("NVIDIA H200"))
    assert {key.split("/")[0] for key in table} == set(skinny.MODES)
    stored = [path.name for path in launches.SHIPPED.glob("*.json")]
    assert stored == [tables.file_name("NVIDIA H200")]  # under another name nobody would find it
