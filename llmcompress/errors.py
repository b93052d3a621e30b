"""The errors a user can meet, each with its exit code and its next step.

Every error that leaves the library on purpose derives from :class:`LLMCompressError`.
The CLI prints ``message`` and ``next:`` and ends with ``exit_code``; anything else that
escapes is a bug and exits 1 with the traceback saved beside the run.
"""

from __future__ import annotations

import shlex
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the command line, stable across versions."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    RECIPE = 3
    ENVIRONMENT = 4
    RESOURCES = 5
    GATE = 6
    EXPORT = 7
    INTERRUPTED = 130


class LLMCompressError(Exception):
    """Base of all expected errors.

    Args:
        message: What happened and where, one line per problem.
        hint: What to do next, as a command or a concrete change.
    """

    exit_code: ExitCode = ExitCode.UNEXPECTED

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def command_line(*words: object) -> str:
    """A command of ours as a shell takes it, whatever is in its paths; for hints.

    Args:
        words: What follows ``llmcompress``.
    """
    return shlex.join(["llmcompress", *map(str, words)])


def first_line(error: BaseException) -> str:
    """First line of what an error of another package says; its class where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class UsageError(LLMCompressError):
    """The command line itself is wrong."""

    exit_code = ExitCode.USAGE


class RecipeError(LLMCompressError):
    """The recipe is invalid, or does not fit the model it names."""

    exit_code = ExitCode.RECIPE


class InputError(LLMCompressError):
    """A model, tokenizer, data set or artifact is missing, damaged or not supported."""

    exit_code = ExitCode.ENVIRONMENT


class EnvironmentProblem(LLMCompressError):
    """A package, compiler or device that the job needs is missing."""

    exit_code = ExitCode.ENVIRONMENT


class ResourceError(LLMCompressError):
    """The job does not fit: memory, disk or a declared budget."""

    exit_code = ExitCode.RESOURCES


class GateFailed(LLMCompressError):
    """A quality gate of the recipe did not hold."""

    exit_code = ExitCode.GATE


class ExportError(LLMCompressError):
    """An exporter refused, or what it wrote did not read back equal."""

    exit_code = ExitCode.EXPORT


class Interrupted(LLMCompressError):
    """The run was stopped and can be resumed."""

    exit_code = ExitCode.INTERRUPTED
