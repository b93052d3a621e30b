"""Search of launch configurations for given shapes: what ``llmcompress bench tune`` runs on a GPU.

Each case goes to the backend that a call of it would run on. Every candidate's result is compared with the definition
before it is timed, so that a configuration that computes something else never gets into a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmcompress_kernels import gpu as dispatch
from llmcompress_kernels.cuda import launches, skinny

Call = Callable[[], Tensor]
# calls, one for each rotation of the weights → microseconds of one
Timer = Callable[[Sequence[Call]], float]
# relative error of bfloat16 results with sums of another order; a wrong index is off by 1
TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class Case:
    """A product to configure: dense ``[rows, columns]``, or a bank of gated experts.

    Attributes:
        bits: Code width.
        tokens: Rows of the activation; configurations are kept for the next power of two.
        rows: N, or the experts' intermediate size.
        columns: K, or the experts' hidden size.
        group: Columns per scale.
        dtype: Type of the activation.
        experts: Experts of the bank; 0 for a dense product.
        slots: Experts of a token.
    """

    bits: int
    tokens: int
    rows: int
    columns: int
    group: int = 128
    dtype: torch.dtype = torch.bfloat16
    experts: int = 0
    slots: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a case.

    Attributes:
        case: The case.
        backend: ``cuda`` or ``triton``, empty where nothing was searched.
        part: ``dense``, ``experts``, ``gate_up`` or ``down``.
        chosen: The configuration now in the table.
        microseconds: Its time.
        default_microseconds: Microseconds of the configuration without a table.
        tried: Candidates that ran and were right.
        passed_over: Candidates that do not fit the GPU or gave another result.
        reason: Why nothing was searched.
    """

    case: Case
    backend: str
    part: str
    chosen: str = ""
    microseconds: float = 0.0
    default_microseconds: float = 0.0
    tried: int = 0
    passed_over: int = 0
    reason: str = ""


def tune(
    cases: Iterable[Case], gpu: str, device: torch.device, timer: Timer, copies: Callable[[int], int]
) -> Iterator[Outcome]:
    """Search, and keep each winner in the table of the cache as soon as it is known.

    Args:
        cases: What to configure.
        gpu: Name under which dispatch looks for the table.
        device: Where to run.
        timer: Times a candidate; :func:`~llmcompress_kernels.bench.replay.replay` on a GPU.
        copies: From the bytes of a weight, how many of them exceed the caches together.
    """
    for case in cases:
        yield from (
            _routed(case, gpu, device, timer, copies) if case.experts else _dense(case, gpu, device, timer, copies)
        )


class _Weight(NamedTuple):
    """Operands of the operators in their order."""

    packed: Tensor
    scale: Tensor
    zero: Tensor


def _weights(case: Case, shape: tuple[int, ...], device: torch.device, copies: Callable[[int], int]) -> list[_Weight]:
    """Random codes, scales and zero points, made where they are needed: a bank of experts is large."""
    draws = torch.Generator(device).manual_seed(0)
    *rows, columns = shape
    groups = -(-columns // case.group)

    def words(count: int) -> Tensor:
        size = (*rows, -(-count * case.bits // 32))
        return torch.randint(-(1 << 31), 1 << 31, size, generator=draws, device=device).to(torch.int32)

    scale = (torch.rand((*rows, groups), generator=draws, device=device) + 0.5).mul(0.05).to(torch.float16)
    first = _Weight(words(columns), scale, words(groups))
    count = copies(sum(tensor.nbytes for tensor in first))
    return [first, *(_Weight(*(tensor.clone() for tensor in first)) for _ in range(count - 1))]


def _input(case: Case, device: torch.device) -> Tensor:
    return torch.randn(case.tokens, case.columns, generator=torch.Generator().manual_seed(1)).to(device, case.dtype)


def _dense(case: Case, gpu: str, device: torch.device, timer: Timer, copies: Callable[[int], int]) -> Iterator[Outcome]:
    weights, x = _weights(case, (case.rows, case.columns), device, copies), _input(case, device)
    rest = (case.bits, case.group, case.columns)
    expected = torch.ops.llmcompress.group_gemm_definition(x.float(), *weights[0], *rest)
    search = _Search(expected, timer)
    small = skinny.verify(x, *weights[0], case.bits, case.group) is None
    if small and dispatch.wanted("cuda") and dispatch.family_ready(skinny.FAMILY):
        calls: dict[Any, Sequence[Call]] = {
            launch: [partial(skinny.group_gemm, x, *weight, *rest, launch) for weight in weights]
            for launch in launches.candidates().values()
        }
        best = search.best(calls)
        key = launches.key("dense", case.bits, case.tokens, case.rows, case.columns)
        launches.keep(gpu, {key: best})
        yield search.outcome(case, "cuda", "dense", best, launches.usual("dense", case.tokens))
        return
    reason = _no_table(case, x)
    if reason is not None:
        yield Outcome(case, "", "dense", reason=reason)
        return
    from llmcompress_kernels.triton import group_gemm, tuning

    usual = _usual(case.tokens, case.rows, case.columns, device)

    def microseconds(config: tuning.Config) -> float:
        return search.time(
            config,
            [partial(group_gemm.group_gemm, x, *weight, *rest, config=config) for weight in weights],
        )

    key = tuning.key("group_gemm", case.bits, case.dtype, case.tokens, case.rows, case.columns)
    best, _ = tuning.search(key, gpu, dict.fromkeys([usual, *tuning.candidates(case.tokens)]), microseconds)
    yield search.outcome(case, "triton", "dense", best, usual)


def _routed(
    case: Case, gpu: str, device: torch.device, timer: Timer, copies: Callable[[int], int]
) -> Iterator[Outcome]:
    ups = _weights(case, (case.experts, 2 * case.rows, case.columns), device, copies)
    downs = _weights(case, (case.experts, case.columns, case.rows), device, copies)
    x, draws = _input(case, device), torch.Generator().manual_seed(2)
    index = torch.rand(case.tokens, case.experts, generator=draws).topk(case.slots, -1).indices.to(device)
    weights = torch.rand(case.tokens, case.slots, generator=draws).to(device)
    rest = (case.rows, "silu", 1.702, 7.0)
    more = (None, case.bits, case.group)
    operands = [(*up, *more, *down, *more) for up, down in zip(ups, downs)]
    expected = torch.ops.llmcompress.moe_group_gemm_definition(x.float(), index, weights, *operands[0], *rest)
    sides = [(skinny.Side(*up, *more), skinny.Side(*down, *more)) for up, down in zip(ups, downs)]
    small = skinny.verify_routed(x, index, sides[0], case.rows, "silu") is None
    if small and dispatch.wanted("cuda") and dispatch.family_ready(skinny.FAMILY):
        for mode, shape in (("gate_up", (case.rows, case.columns)), ("down", (case.columns, case.rows))):
            search = _Search(expected, timer)
            calls: dict[Any, Sequence[Call]] = {}
            for launch in launches.candidates().values():
                both = (launch, None) if mode == "gate_up" else (None, launch)
                calls[launch] = [partial(skinny.moe_group_gemm, x, index, weights, s, *rest, both) for s in sides]
            best = search.best(calls)
            launches.keep(gpu, {launches.key(mode, case.bits, case.tokens, *shape): best})
            yield search.outcome(case, "cuda", mode, best, launches.usual(mode, case.tokens))
        return
    reason = _no_table(case, x)
    if reason is not None:
        yield Outcome(case, "", "experts", reason=reason)
        return
    from llmcompress_kernels.triton import moe_group_gemm, tuning

    search = _Search(expected, timer)
    share = -(-case.tokens * case.slots // case.experts)
    usual = _usual(share, case.rows, case.columns, device)

    def microseconds(config: tuning.Config) -> float:
        return search.time(
            config,
            [partial(moe_group_gemm.moe_group_gemm, x, index, weights, *o, *rest, config=config) for o in operands],
        )

    key = tuning.key("moe_group_gemm", case.bits, case.dtype, share, case.rows, case.columns)
    best, _ = tuning.search(key, gpu, dict.fromkeys([usual, *tuning.candidates(share)]), microseconds)
    yield search.outcome(case, "triton", "experts", best, usual)


def _no_table(case: Case, x: Tensor) -> str | None:
    """Why no table decides how a call runs, None if Triton's does."""
    if not dispatch.wanted("triton"):
        return "another implementation is asked for by LLMCOMPRESS_KERNELS"
    if x.device.type == "cuda" and (missing := dispatch.no_triton()) is not None:
        return missing
    from llmcompress_kernels.triton import group_gemm, widened

    if x.device.type == "cuda" and widened.verify(x, case.bits, case.tokens, widened.FROM) is None:
        return f"{case.tokens} tokens are multiplied by torch after the weight was widened"
    return group_gemm.verify(x, case.bits)


def _usual(tokens: int, rows: int, columns: int, device: torch.device) -> Any:
    from llmcompress_kernels.triton import tuning

    if device.type != "cuda":
        return tuning.INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return tuning.default(tokens, rows, columns, properties.multi_processor_count, properties.major >= 9)


class _Search:
    """Times of the candidates of one case that are right.

    Args:
        expected: What they have to compute, float32.
        timer: Times one.
    """

    def __init__(self, expected: Tensor, timer: Timer) -> None:
        self.expected = expected
        self.timer = timer
        self.times: dict[Any, float] = {}
        self.passed_over = 0

    def time(self, config: Any, calls: Sequence[Call]) -> float:
        """Microseconds of a candidate.

        Raises:
            RuntimeError: It does not run, or computes something else.
        """
        try:
            found = calls[0]()
            error = float((found.float() - self.expected).norm() / self.expected.norm())
            # written so that a NaN is an error
            if not error <= TOLERANCE:
                raise RuntimeError(f"{config}: relative error {error:.2g}")
            self.times[config] = self.timer(calls)
        except Exception:
            self.passed_over += 1
            raise
        return self.times[config]

    def best(self, candidates: Mapping[Any, Sequence[Call]]) -> Any:
        """The fastest of the candidates that run.

        Raises:
            RuntimeError: None does.
        """
        for config, calls in candidates.items():
            try:
                self.time(config, calls)
            except RuntimeError:
                continue
        if not self.times:
            raise RuntimeError("no candidate runs on this GPU")
        return min(self.times, key=self.times.__getitem__)

    def outcome(self, case: Case, backend: str, part: str, best: Any, usual: Any) -> Outcome:
        """What to report."""
        default = self.times.get(usual, float("nan"))
        return Outcome(case, backend, part, str(best), self.times[best], default, len(self.times), self.passed_over)
