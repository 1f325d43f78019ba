"""What can go wrong in kvbench, and the exit code that it means.

::

    KVXferError
      KVBenchError          exit code 1: a file, a plan or a run failed
        InputFileError      a model or config file; says file, key, line
        PlanError           the values do not make a plan
        RunError            a benchmark ran and failed, or could not run
      WrongUseError         exit code 2: the command line makes no sense
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from kvxfer.errors import KVXferError, UsageError

__all__ = [
    "InputFileError",
    "KVBenchError",
    "PlanError",
    "RunError",
    "WrongUseError",
    "suggestion",
]


class KVBenchError(KVXferError):
    """Base of what kvbench reports; ``exit_code`` is the process's."""

    exit_code = 1


class InputFileError(KVBenchError):
    """A model or config file cannot be used; nothing was computed from it."""

    def __init__(self, path: str, problem: str, line: int | None = None) -> None:
        place = path if line is None else f"{path}, line {line}"
        super().__init__(f"{place}: {problem}")
        self.path = path
        self.line = line
        self.problem = problem


class PlanError(KVBenchError):
    """The model, the config and the options together give no plan."""


class RunError(KVBenchError):
    """A benchmark could not run, or ran and failed.

    ``exit_code`` is the benchmark's own where it had one.
    """

    def __init__(self, problem: str, exit_code: int = 1) -> None:
        super().__init__(problem)
        self.exit_code = exit_code


class WrongUseError(KVBenchError, UsageError):
    """The command line is wrong; nothing was read or run."""

    exit_code = 2


def suggestion(word: str, allowed: Iterable[str]) -> str:
    """Return ``", did you mean 'x'?"`` or an empty string."""
    choices = list(allowed)
    folded = {choice.lower(): choice for choice in choices}
    near = get_close_matches(word.lower(), folded, n=1, cutoff=0.6)
    return f", did you mean {folded[near[0]]!r}?" if near else ""
