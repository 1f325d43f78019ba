"""What a check found, what it means, and what to type."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Level(enum.Enum):
    """How much a finding matters; the value is what the table shows."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; nothing to do."""
    WARNING = "warning"
    """It works, and not as well as it could."""
    PROBLEM = "PROBLEM"
    """Something that was asked for, or that the machine has, does not work."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
      check: What was looked at, in a word or two.
      level: How much it matters.
      found: What is so.
      meaning: What follows from it; empty where nothing does.
      remedy: What to type, or to ask the administrator for; empty if nothing.
    """

    check: str
    level: Level
    found: str
    meaning: str = ""
    remedy: str = ""


def ok(check: str, found: str) -> Finding:
    """Say that all is well."""
    return Finding(check, Level.OK, found)


def note(check: str, found: str, meaning: str = "", remedy: str = "") -> Finding:
    """Say what is worth knowing."""
    return Finding(check, Level.NOTE, found, meaning, remedy)


def warning(check: str, found: str, meaning: str, remedy: str) -> Finding:
    """Say what could be better."""
    return Finding(check, Level.WARNING, found, meaning, remedy)


def problem(check: str, found: str, meaning: str, remedy: str) -> Finding:
    """Say what does not work."""
    return Finding(check, Level.PROBLEM, found, meaning, remedy)


def verdict(findings: Iterable[Finding]) -> str:
    """Sum up a report in a sentence."""
    levels = [finding.level for finding in findings]
    problems, warnings = levels.count(Level.PROBLEM), levels.count(Level.WARNING)
    if not problems and not warnings:
        return "nothing to complain of"
    return f"{_count(problems, 'problem')}, {_count(warnings, 'warning')}"


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
