"""A batch dealt out to processes: nothing is lost, the sums are those of one process, and two real processes agree."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmcompress.distributed.world import LAUNCHED, World
from llmcompress.models.handle import ModelHandle
from llmcompress.training.optimizer import Schedule, Trainer
from llmcompress.training.parallel import deal

LENGTHS = [9, 3, 14, 5, 5, 20, 7, 1, 11, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_every_row_is_computed_once(size, deterministic):
    worlds = [World(rank, size, deterministic) for rank in range(size)]
    dealt = [deal(world, LENGTHS, 4) for world in worlds]
    rows = [row for own, world in zip(dealt, worlds) for part in own.of_rank(world.rank) for row in own.parts[part]]
    assert sorted(rows) == list(range(len(LENGTHS)))
    assert len({json.dumps([own.parts, own.shard_of]) for own in dealt}) == 1


def test_a_fixed_number_of_shards_does_not_ask_how_many_processes_there_are():
    found = [deal(World(0, size, True), LENGTHS, 64) for size in (1, 2, 5, 8)]
    assert len({json.dumps([own.parts, own.shard_of]) for own in found}) == 1
    assert len(set(found[0].shard_of)) == 8
    # alone and without the wish for equal bytes, rows are computed as they always were
    assert deal(World(), LENGTHS, 64).parts == [sorted(range(10), key=lambda i: (LENGTHS[i], i))]


def test_work_is_dealt_by_length():
    dealt = deal(World(0, 2), [1] * 15 + [100], 1)
    load = [
        sum(len(dealt.parts[part]) * (100 if 15 in dealt.parts[part] else 1) for part in dealt.of_rank(r))
        for r in (0, 1)
    ]
    assert sorted(load) == [15, 100]


def test_shards_add_up_to_the_batch():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6))
    unused = torch.nn.Parameter(torch.randn(2, 2))
    data = torch.randn(len(LENGTHS), 6)

    def act(rows):
        loss = (data[rows] @ weight).square().sum()
        loss.backward()
        return {"loss": loss.detach()}

    found = []
    for world in (World(), World(deterministic=True)):
        weight.grad = unused.grad = None
        parts = deal(world, LENGTHS, 3).sum_gradients({"weight": weight, "unused": unused}, act)
        found.append((weight.grad.clone(), sum(part["loss"] for part in parts)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1])


def test_only_the_first_process_keeps_checkpoints(tmp_path):
    parameters = {"w": torch.nn.Parameter(torch.ones(2))}
    Trainer(parameters, Schedule(0.1, 0, 1), world=World(1, 1)).save(tmp_path / "file", {})
    assert not list(tmp_path.iterdir())


# what each process runs: reinforcement for two steps, supervised training for one, offline training on a pool
PROGRAM = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from safetensors.torch import save_file
from llmcompress.algorithms.rl_objectives import GroupBaseline
from llmcompress.data.actions import CHECK
from llmcompress.data.problems.config import CountdownTask
from llmcompress.data.trajectories import Trajectory
from llmcompress.distributed.world import joined
from llmcompress.evaluation.sampling import Sampling
from llmcompress.evaluation.self_correction import Reader, measure
from llmcompress.models.handle import ModelHandle
from llmcompress.training import offline, rl, sft
from llmcompress.training.policy import Policy

torch.set_num_threads(1)
world = joined(False)
out = Path(sys.argv[1])
handle = ModelHandle.open("asset:reference_reasoner")
reader = Reader(handle.tokenizer(), CountdownTask(kind="countdown", high=15, limit=60, compact=True).build())
policy = Policy(handle.dense_model(torch.float32), world=world)
settings = rl.RlSettings(
    level="outcome", steps=2, prompts=4, samples=4, updates=2, lr=1e-3, warmup=0, max_norm=1.0, kl=0.05, kl_mean=False,
    clip=0.2, ratio="mean", sampling=Sampling(14, 0.8, batch=6), truncation_reward=-1, flip_bonus=1.0,
    verify_correct_bonus=1.0, discount=0.0, train_end=True, skip_agreeing=True, micro_batch=16, micro_tokens=None,
    save_every=1, seed=0,
)
problems = reader.problems.problems("train")[:12]
seen = []
rl.train_online(policy, reader, problems, settings, GroupBaseline(), rl.Guard(), out / "rl.safetensors", seen.append)

def text(i):
    return "\\\\boxed{1+2}" + CHECK + "1+2=3" + "+4" * (i % 5) + ". Therefore, the answer is incorrect."

trajectories = [Trajectory(p.key, p.question, text(i), 1, "trajectory") for i, p in enumerate(problems)]
rows = [sft.to_row(t, reader, 200) for t in trajectories]
plan = sft.SftSettings(2, 6, 1e-3, 0.1, 0.5, 0, "cosine", None, 16, None, 1, 0, 1.0, 0.1, 1, 3)
seen += sft.train_sft(policy, rows[:9], reader.pad, plan, out / "sft.safetensors", lambda *_: None, rows[9:])
responses = [[list(row.response)] * 2 for row in rows]
limits = offline.OfflineSettings(0.0, 1.0, 20, "truncate", False, 3, "position", 1)
prompts = [reader.prompt(p.question) for p in problems]
pool = offline.filter_pool(reader, problems, prompts, responses, limits, -1, world)
offline.pool_advantages(pool, settings, limits, GroupBaseline())
seen += offline.train_offline(policy, reader, pool, settings, 1, out / "offline.safetensors", seen.append)
figures = measure(policy.model, reader, problems, Sampling(14, batch=5), world=world).figures()
told = world.everyone(world.rank)
if world.rank == 0:
    (out / "seen.json").write_text(json.dumps([seen, figures, told, world.spread(5, lambda i: i * i)]))
else:
    world.spread(5, lambda i: i * i)
save_file({n: p.detach().clone() for n, p in policy.trainable.items()}, out / f"weights_{world.rank}.safetensors")
"""


def free_port() -> int:
    """One that the kernel gives to nobody who asks for any, from here until the processes have started."""
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", random.SystemRandom().randrange(20000, 32000)))
            return int(free.getsockname()[1])


def ranks(folder: Path, size: int) -> None:
    import os

    folder.mkdir()
    port = free_port()
    more = {LAUNCHED: "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **({**more, "RANK": str(rank)} if size > 1 else {})},
        )
        for rank in range(size)
    ]
    # a cold cache compiles kernels first: minutes on a machine that does other things
    assert [process.wait(900) for process in running] == [0] * size


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path):
    from safetensors.torch import load_file

    ranks(tmp_path / "one", 1)
    ranks(tmp_path / "two", 2)
    whole, half, other = (
        load_file(tmp_path / name)
        for name in ("one/weights_0.safetensors", "two/weights_0.safetensors", "two/weights_1.safetensors")
    )
    assert all(torch.equal(half[name], other[name]) for name in whole)
    # sums in another order set two apart from one; Adam makes much of a gradient of nearly nothing, so single weights
    # may differ, and by little
    start = ModelHandle.open("asset:reference_reasoner").checkpoint
    apart = sum(float((half[name] - value).square().sum()) for name, value in whole.items())
    moved = sum(float((start.tensor(name) - value).square().sum()) for name, value in whole.items())
    assert apart < 1e-4 * moved
    one, two = (json.loads((tmp_path / name / "seen.json").read_text()) for name in ("one", "two"))
    assert len(one[0]) == len(two[0]) > 4
    for alone, shared in zip(one[0], two[0]):
        for key, value in alone.items():
            assert shared[key] == (value if value is None else pytest.approx(value, rel=1e-3, abs=1e-4)), key
    assert one[1] == two[1]
    assert one[2:] == [[0], [0, 1, 4, 9, 16]] and two[2:] == [[0, 1], [0, 1, 4, 9, 16]]
