"""``--nproc``: start the same command once per process under torch's elastic agent, the one that torchrun runs."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.distributed.world import LAUNCHED, LOST
from llmcompress.errors import EnvironmentProblem, ExitCode, Interrupted, LLMCompressError, UsageError, command_line

if TYPE_CHECKING:
    from llmcompress.cli.output import Output

_PANEL = "Processes"


@dataclass(frozen=True)
class ProcessOptions:
    """Options of commands that may run in several processes."""

    nproc: Annotated[
        int | None,
        typer.Option("--nproc", min=1, metavar="N", help="Processes on this machine.", rich_help_panel=_PANEL),
    ] = None
    nnodes: Annotated[
        int,
        typer.Option(
            "--nnodes",
            min=1,
            metavar="N",
            help="Number of machines; start the same command on each.",
            rich_help_panel=_PANEL,
        ),
    ] = 1
    rdzv_endpoint: Annotated[
        str | None,
        typer.Option(
            "--rdzv-endpoint",
            metavar="HOST:PORT",
            help="Address at which the machines meet: that of one of them.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    rdzv_id: Annotated[
        str | None,
        typer.Option(
            "--rdzv-id",
            metavar="NAME",
            help="Name of this run, the same on every machine.",
            rich_help_panel=_PANEL,
        ),
    ] = None

    def processes(self) -> Processes | None:
        """What to start; None where one process will do, or where this is one of those that were started.

        Raises:
            UsageError: The options contradict each other.
        """
        if LAUNCHED in os.environ:
            return None
        if self.nnodes > 1 and (self.rdzv_endpoint is None or self.rdzv_id is None):
            raise UsageError(
                "--nnodes: machines must find each other", "--rdzv-endpoint HOST:PORT --rdzv-id NAME, equal on all"
            )
        nproc = self.nproc or 1
        return Processes(nproc, self.nnodes, self.rdzv_endpoint, self.rdzv_id) if nproc * self.nnodes > 1 else None


@dataclass(frozen=True, slots=True)
class Processes:
    """How many processes, and where they meet.

    Attributes:
        nproc: On each machine.
        nnodes: Machines.
        endpoint: ``host:port`` that all machines reach; None on a single one.
        name: Name of the meeting.
    """

    nproc: int
    nnodes: int = 1
    endpoint: str | None = None
    name: str | None = None


class AlreadyTold(EnvironmentProblem):
    """The first process, which talks to the terminal, has said itself what ended it; the exit code is its own."""


def launch(out: Output, processes: Processes, words: Sequence[str], run_dir: Path) -> None:
    """Run ``llmcompress WORDS`` in every process and wait.

    Rank 0 of the first machine talks to the terminal; what the others say goes to files that are read when one fails.

    Args:
        out: For messages.
        processes: How many, where.
        words: The command line without the options of this module.
        run_dir: Where a resume would start.

    Raises:
        AlreadyTold: The first process failed: its message stands on the terminal, with ``--json`` on stdout too.
        LLMCompressError: Another process failed; with its own message where it left one.
        Interrupted: Ctrl-C or SIGTERM.
    """
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # the agent's own words would come before ours
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    again = f"{command_line('resume', run_dir)} --nproc N, with any N"
    with tempfile.TemporaryDirectory(prefix="llmcompress-ranks-") as logs:
        quiet = {local: Std.ALL for local in range(processes.nproc) if local > 0}
        environment = {LAUNCHED: "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", _threads(processes.nproc))}
        if processes.nnodes == 1:
            environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
        os.environ.update(environment)
        config: Any = LaunchConfig(
            min_nodes=processes.nnodes, max_nodes=processes.nnodes, nproc_per_node=processes.nproc,
            run_id=processes.name or uuid.uuid4().hex, rdzv_backend="c10d",
            rdzv_endpoint=processes.endpoint or "localhost:0", max_restarts=0, monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=quiet),
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-m", "llmcompress", *words)
        except ChildFailedError as error:
            raise _failure(error.failures, Path(logs), processes.nproc * processes.nnodes, again) from None
        except (SignalException, KeyboardInterrupt) as stop:
            raise Interrupted("stopped by a signal; finished blocks are kept", again) from stop
        finally:
            for name in environment:
                os.environ.pop(name, None)


def _threads(nproc: int) -> str:
    from llmcompress.pipeline.device import usable_cores

    return str(max(1, usable_cores() // nproc))


def _failure(failures: Any, logs: Path, size: int, again: str) -> LLMCompressError:
    """One error for everything that the death of one process has led to."""
    said = {rank: _said(logs, failure.local_rank, "error:") for rank, failure in failures.items()}

    def order(item: tuple[int, Any]) -> tuple[int, float]:
        rank, failure = item
        code = int(failure.exitcode)
        # it lost its peers, or was stopped by us
        drawn_in = code in (LOST, -signal.SIGTERM)
        killed, told = code < 0 and not drawn_in, bool(said[rank]) or (rank == 0 and not drawn_in)
        # what was killed from outside, then what has something to say, then what died without a word, then the rest
        return [killed, told, not drawn_in, True].index(True), float(failure.timestamp)

    rank, failure = min(failures.items(), key=order)
    code = int(failure.exitcode)
    if code < 0:
        name = signal.Signals(-code).name
        hint = f"{again}; a process killed by SIGKILL has often run out of memory" if name == "SIGKILL" else again
        text = f"process {rank} of {size} was killed ({name})"
        return EnvironmentProblem(f"{text}; the others were stopped, finished blocks are kept", hint)
    if code == LOST:
        return EnvironmentProblem(f"process {rank} of {size} lost the others; finished blocks are kept", again)
    text = f"process {rank} of {size} failed{f': {said[rank]}' if said[rank] else f' with exit code {code}'}"
    kept = _said(logs, failure.local_rank, "next: the traceback is in")
    error = (AlreadyTold if rank == 0 else LLMCompressError)(text, f"{again}; {kept}" if kept else again)
    error.exit_code = ExitCode(code) if code in {int(known) for known in ExitCode} else ExitCode.UNEXPECTED
    return error


def _said(logs: Path, local_rank: int, beginning: str) -> str:
    """The first line that begins so, without its label, of what a process other than the first has left; else empty."""
    for path in logs.rglob(f"{local_rank}/stderr.log"):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(beginning):
                return line.partition(":")[2].strip()
    return ""
