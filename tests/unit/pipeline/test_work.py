"""Every term against the count it stands for, with rates of one operation per second where nothing else is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmcompress.distributed.world import shards_of
from llmcompress.models.layout import Block, ExpertBank
from llmcompress.models.memory_limits import Limits
from llmcompress.models.registry import layout_from_config
from llmcompress.pipeline.rates import CURVES, NUMBERS, Rates
from llmcompress.pipeline.work import BlockWork, Run, heads_of, least_k, product
from llmcompress.quant.spec import QuantSpec
from llmcompress.stages.base import PlanInputs
from llmcompress.stages.blockwise.estimate import Job
from llmcompress.stages.router_calibration import RouterFields

CONFIGS = Path(__file__).resolve().parents[2] / "data" / "hub_configs"
CONFIG = json.loads((CONFIGS / "mixtral_8x7b.json").read_text())
LAYOUT = layout_from_config(CONFIG)
BLOCK: Block = LAYOUT.blocks[0]
H, INNER, E, WINDOWS, LENGTH = 4096, 14336, 8, 16, 512
T = WINDOWS * LENGTH
FREE = 1e30
SPEC = QuantSpec(4, 128)


def rates(**costly: Any) -> Rates:
    """Everything is free but what is named."""
    data: dict[str, Any] = dict.fromkeys(CURVES, ((1.0, FREE),)) | dict.fromkeys(NUMBERS, FREE)
    for name in ("flush", "batch", "piece", "matrix", "message", "start", "join"):
        data[name] = 1 / FREE
    named = {key: ((1.0, value),) if key in CURVES else value for key, value in costly.items()}
    return Rates(**{**data, **named, "machine": "invented", "device": "cpu", "error": {}})


def bank() -> ExpertBank:
    assert BLOCK.bank is not None
    return BLOCK.bank


def work(
    costly: dict[str, float], names: tuple[str, ...] = (), ranks: int = 1, shards: int = 1, tokens: int = WINDOWS,
    limits: Limits | None = None, **job: Any,
) -> BlockWork:  # fmt: skip
    plan = dict.fromkeys(names or (bank().gate_up, bank().down), SPEC)
    found = Job(plan=plan, hessians=True, targets=False, residuals=False, streams=1, tokens=tokens * LENGTH, cuda=False)
    inputs = PlanInputs(LAYOUT, 2, 4, tokens, LENGTH, {}, "cpu")
    run = Run.of(tokens // ranks, LENGTH, max(1, shards // ranks), heads_of(CONFIG))
    return BlockWork(
        BLOCK, replace(found, **job), inputs, limits or Limits(1 << 40, 1 << 40), run, ranks, shards, rates(**costly)
    )


def one_pass() -> float:
    """Multiply-adds, times two, of a token's way through the block."""
    attention = 2 * H * H + 2 * H * (H // 4)
    return 2.0 * (attention + E * H + 2 * 3 * H * INNER)


def test_products_of_a_pass() -> None:
    assert work({"product": 1.0}).forward(last=False) == pytest.approx(T * one_pass())
    assert product(3, 5, 7, rates(product=2.0)) == 2 * 3 * 5 * 7 / 2


def test_the_last_block_ends_where_nothing_is_needed() -> None:
    single, double = work({"product": 1.0}), work({"product": 1.0}, streams=2)
    down, experts = 2.0 * T * 2 * H * INNER, 2.0 * T * 2 * 3 * H * INNER
    assert single.forward(last=False) - single.forward(last=True) == pytest.approx(down)
    assert double.forward(last=False) == pytest.approx(2 * T * one_pass())
    assert double.forward(last=False) - double.forward(last=True) == pytest.approx(down + experts)


def test_inputs_that_are_not_kept_are_computed_twice() -> None:
    tight = work({"product": 1.0}, limits=Limits(1 << 40, 1 << 20))
    gate = 2.0 * T * 2 * 2 * H * INNER
    assert tight.forward(last=False) - work({"product": 1.0}).forward(last=False) == pytest.approx(gate)
    names = ("model.layers.0.self_attn.o_proj",)
    attention = work({"product": 1.0}, names, limits=Limits(1 << 40, 1 << 20))
    again = 2.0 * T * (H * H + 2 * H * (H // 4))
    assert attention.forward(last=False) - T * one_pass() == pytest.approx(again)


def test_attention_relates_every_pair_of_a_window() -> None:
    assert work({"attention": 1.0}).forward(last=False) == T * LENGTH * 32


def test_calls_are_counted_by_batch_and_by_piece() -> None:
    # one window of 512 tokens to a batch, two sublayers; two projections of eight experts, of each shard
    assert work({"batch": 1.0}).forward(last=False) == pytest.approx(2 * WINDOWS)
    for shards in (1, 4):
        assert work({"piece": 1.0}, shards=shards).forward(last=False) == pytest.approx(2 * E * shards)
    assert Run.of(10, 128, 4, 1).batches == 4 and Run.of(10, 128, 1, 1).batches == 3


def test_second_moments_and_their_memory() -> None:
    routed = 2 * T
    assert work({"hessian": 1.0}).moments() == pytest.approx(2 * routed * (H**2 + INNER**2))
    squares = E * (H**2 + INNER**2)
    assert work({"squares": 1.0}).moments() == squares
    assert work({"memory": 1.0}).moments() == 4 * squares
    # small ones come from memory that was freed before
    assert work({"memory": 1.0}, tokens=1).moments() > 0
    few = work({"hessian": 1.0}, tokens=1).moments() - 2 * 2 * 512 * (H**2 + INNER**2)
    # 128 tokens to an expert where 256 and 896 are asked for: sums of all tokens, through every expert
    assert few == pytest.approx(2 * 512 * H**2 + 2 * E * 512 * INNER**2)


def test_targets_cost_cross_moments_a_fit_and_a_second_gate() -> None:
    down = (bank().down,)
    aimed = work({"product": 1.0}, down, targets=True, residuals=True)
    routed = 2 * T
    assert aimed.moments() == pytest.approx(2 * routed * INNER * (INNER + H) + 2 * routed * 2 * INNER * H)
    fit = work({"fit": 1.0}, down, targets=True).solves()[1]
    assert fit == pytest.approx(INNER**3 / 3 + 4 * H * INNER**2)
    assert work({"fit": 1.0}, down).solves()[1] == pytest.approx(0)


def test_solves_are_a_factor_and_a_loop() -> None:
    assert work({"factor": 1.0}).solves() == pytest.approx((0, H**3 + INNER**3))
    assert work({"columns": 1.0}).solves() == pytest.approx((0, 2 * INNER * H**2 + H * INNER**2))
    names = tuple(f"model.layers.0.self_attn.{key}_proj" for key in "qkvo")
    serial, one = work({"columns": 1.0}, names).solves()
    assert one == 0
    assert serial == pytest.approx((H + H // 2 + H) * H**2)


def test_experts_share_a_turn_only_where_they_are_solved_together() -> None:
    layout = layout_from_config(
        json.loads((CONFIGS.parents[2] / "recipes/assets/reference_moe/config.json").read_text())
    )
    block = layout.blocks[0]
    assert block.bank is not None
    plan = {block.bank.gate_up: SPEC}
    job = Job(plan, True, False, False, 1, T, False)
    inputs, run = PlanInputs(layout, 2, 4, WINDOWS, LENGTH, {}, "cpu"), Run.of(WINDOWS, LENGTH, 1, 6)
    found = [
        BlockWork(block, job, inputs, Limits(), run, 1, shards, rates(matrix=1.0)).solves()[1] for shards in (1, 8)
    ]
    # 256 x 192 weights: more than 16 fit a turn of 4 MiB
    assert found == pytest.approx([1 / 16, 1.0])


def test_chunks_follow_the_memory_for_second_moments() -> None:
    square = 4 * (H**2 + INNER**2)
    assert work({}, limits=Limits(3 * square, 1 << 40)).chunks() == [3, 3, 2]
    assert work({}, limits=Limits(1, 1)).chunks() == [1] * E


def router_seconds(name: str, **fields: Any) -> float:
    return work({name: 1.0}).router(type("F", (), {"calibrate": True, "holdout": 0.0, "k": "auto", **fields}))


def test_routers_are_fitted_by_the_cheaper_system() -> None:
    logits = 3 * 2 * T * E * H
    # all eight experts: one system for all
    assert router_seconds("product") == pytest.approx(logits + 2 * T * H**2)
    assert router_seconds("factor") == pytest.approx(H**3)
    assert router_seconds("select") == T * E
    # four of eight, 4096 tokens each: as many as features, so moments of features
    assert router_seconds("product", k=4) == pytest.approx(logits + 2 * T * 4 * H**2)
    # two of eight: 2048 tokens each, systems of tokens out of one matrix of products
    assert router_seconds("product", k=2) == pytest.approx(logits + T**2 * H)
    assert router_seconds("factor", k=2) == pytest.approx(E * 2048**3)
    # one of eight: each has products of its own
    assert router_seconds("product", k=1) == pytest.approx(logits + E * 2 * 1024**2 * H)
    assert work({"product": 1.0}).router(RouterFields()) == 0


def test_messages_are_those_of_sums_results_and_routers() -> None:
    assert work({}).traffic(None) == (0, 0)
    data, messages = work({}, ranks=2, shards=8).traffic(None)
    packed = E * 3 * H * INNER / 2
    assert data == pytest.approx(E * 4 * 4 * (H**2 + INNER**2) + packed, rel=0.02)
    # of eight shards the other process holds four; a shape and the values; headers and errors of two owners
    assert messages == 2 * (E * 4 * 2 + 3 + 3 * E + 8)


def test_files() -> None:
    values = 2 * H * H + 2 * H * (H // 4) + E * 3 * H * INNER + E * H + 2 * H
    assert work({"read": 1.0}).read() == pytest.approx(4 * values)
    # a checkpoint that the memory cannot hold comes from the disk
    assert work({"disk": 1.0}).read() == pytest.approx(0)
    assert work({"disk": 1.0, "cache": 1.0}).read() == pytest.approx(2 * values)
    assert work({"flush": 1.0, "written": FREE}).write() == pytest.approx(1)


def test_rounding_costs_what_its_grid_costs() -> None:
    values = E * 3 * H * INNER
    assert work({"rounded": 1.0}).rounding("minmax") == pytest.approx(values)
    assert work({"searched": 1.0}).rounding("mse") == pytest.approx(values)
    assert work({"rounded": 1.0}).rounding("mse") == work({"searched": 1.0}).rounding("minmax") == pytest.approx(0)


def test_what_a_configuration_says() -> None:
    assert heads_of(CONFIG) == 32 and heads_of({"text_config": {"num_attention_heads": 4}}) == 4 and heads_of({}) == 1
    assert [least_k(*pair) for pair in ((8, 2), (16, 2), (64, 8), (60, 6), (256, 8))] == [8, 4, 16, 12, 16]
    assert [shards_of(16, *pair) for pair in ((1, False), (3, False), (2, True), (16, True))] == [1, 3, 8, 16]
