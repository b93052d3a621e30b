"""Comparisons by math-verify in a process that its caller can do without.

    python math_worker.py SECONDS

Reads one JSON pair ``[gold, answer]`` per line and answers ``1`` or ``0``; says ``ready`` first. A comparison that
takes more than SECONDS of processor time ends the process: sympy works out ``9^{9^{9}}`` in one call that no exception
interrupts, and a model may write that. This file imports nothing of this project, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys

# a power of powers needs gigabytes long before it needs minutes
MEMORY = 4 << 30


def equal(gold: str, answer: str) -> bool:
    """Whether two answers in LaTeX are the same; what cannot be read or worked out is not."""
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    # no time limits of its own: they raise in Python, which arithmetic on long numbers does not come back to
    sides = [
        parse(f"\\boxed{{{text}}}", extraction_config=config, extraction_mode="first_match", parsing_timeout=None)
        for text in (gold, answer)
    ]
    # not symmetric: the gold answer comes first
    return bool(sides[0] and sides[1] and verify(sides[0], sides[1], timeout_seconds=None))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Answer until the input ends."""
    seconds = float(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    # macOS refuses a limit below what its libraries reserve, and keeps none
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))
    import math_verify  # noqa: F401 - the time that this takes is none of a comparison's

    _say("ready")
    for line in sys.stdin:
        # without a handler the signal ends the process, wherever it is
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            same = equal(*json.loads(line))
        except Exception:  # out of memory, out of stack
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(str(int(same)))


if __name__ == "__main__":
    main()
