"""The search of ``bench tune`` with a clock that is made up: kernels run in Triton's interpreter, nothing is timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from llmcompress_kernels import tables

triton = pytest.importorskip("triton", reason="triton is not installed")
if not triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is not set", allow_module_level=True)
if triton.__version__ < "3.9" and np.__version__ >= "2.4":
    pytest.skip("the interpreter of this triton needs numpy < 2.4", allow_module_level=True)

from llmcompress_kernels.bench import tune  # noqa: E402
from llmcompress_kernels.cuda import launches  # noqa: E402
from llmcompress_kernels.triton import group_gemm, tuning  # noqa: E402

GPU, CPU = "A GPU of the tests", torch.device("cpu")
# the second is the fastest by the made-up clock, the third computes nonsense even faster
OPTIONS = (tuning.Config(16, 32, 64, 1, stages=1), tuning.Config(16, 64, 64, 2, stages=1), tuning.Config(16, 16, 32))
MICROSECONDS = {tuning.INTERPRETED: 9.0, OPTIONS[0]: 8.0, OPTIONS[1]: 3.0, OPTIONS[2]: 1.0}


@pytest.fixture(autouse=True)
def few(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tables.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuning, "candidates", lambda _: OPTIONS)
    tuning._table.cache_clear()
    right = group_gemm.group_gemm

    def broken(*operands: Any, config: tuning.Config) -> torch.Tensor:
        out = right(*operands, config=config)
        return -out if config == OPTIONS[2] else out

    monkeypatch.setattr(group_gemm, "group_gemm", broken)


def clock(calls: Sequence[Any]) -> float:
    """Microseconds as the configuration of the calls says."""
    assert len(calls) == 2, "weights rotate"
    return MICROSECONDS[calls[0].keywords["config"]]


def test_the_fastest_that_is_right_is_kept_and_found(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tune.Case(4, 3, 48, 96, group=32, dtype=torch.float16)
    bank = tune.Case(3, 2, 32, 64, group=32, dtype=torch.float16, experts=4, slots=2)
    first, second = tune.tune([dense, bank], GPU, CPU, clock, lambda _: 2)
    assert (first.backend, first.part, first.chosen) == ("triton", "dense", str(OPTIONS[1]))
    assert (first.microseconds, first.default_microseconds, first.tried, first.passed_over) == (3.0, 9.0, 3, 1)
    # no kernel of experts is broken, so the third is right there
    assert (second.part, second.chosen, second.tried) == ("experts", str(OPTIONS[2]), 4)
    monkeypatch.setattr(tuning, "_device", lambda _: (GPU, 132, True))
    cuda = torch.device("cuda", 0)
    assert tuning.pick("group_gemm", 4, torch.float16, 4, 48, 96, cuda) == OPTIONS[1]
    assert tuning.pick("moe_group_gemm", 3, torch.float16, 1, 32, 64, cuda) == OPTIONS[2]
    assert tuning.pick("group_gemm", 4, torch.float16, 5, 48, 96, cuda) not in OPTIONS
    (line, other) = tables.describe([GPU])
    assert line["table"].startswith("2 launches from ")
    assert other["table"].startswith("no table")


def test_what_no_table_decides_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", "reference")
    (outcome,) = tune.tune([tune.Case(4, 3, 48, 96, group=32)], GPU, CPU, clock, lambda _: 2)
    assert outcome.backend == ""
    assert "LLMCOMPRESS_KERNELS" in outcome.reason
    assert tables.read("triton", GPU)[0] == {}


def test_launches_of_cuda_kernels_are_checked_before_they_are_timed() -> None:
    expected = torch.ones(2, 4)
    times = dict(zip(launches.candidates().values(), range(100, 0, -1)))

    def calls(launch: launches.Launch) -> list[Any]:
        def call() -> torch.Tensor:
            if launch.warps == 16:
                raise RuntimeError("does not fit")
            return expected * (2 if launch.warps == 12 else 1)

        call.launch = launch  # type: ignore[attr-defined]
        return [call]

    search = tune._Search(expected, lambda given: times[given[0].launch])
    best = search.best({launch: calls(launch) for launch in times})
    assert best == list(times)[-1]
    assert best == launches.Launch(8, 2, 1, overlap=False)
    assert search.passed_over == sum(launch.warps in (12, 16) for launch in times)
    with pytest.raises(RuntimeError, match="no candidate runs"):
        tune._Search(expected * 5, lambda _: 1.0).best({launch: calls(launch) for launch in times})
