"""Errors a user can act on: what was found, where, what was expected, and what to do about it.

Every error becomes one line on the terminal and an exit code: 1 failed, 2 usage, 3 refused.
"""

from __future__ import annotations


class PareError(Exception):
    """Something failed. ``problem`` says what and where, ``cure`` what to do."""

    exit_code = 1

    def __init__(self, problem: str, cure: str | None = None):
        super().__init__(problem)
        self.problem = problem
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.problem}. {self.cure[0].upper()}{self.cure[1:]}." if self.cure else f"{self.problem}."


class Unsupported(PareError):
    """Nothing is wrong with it, but it is of a kind that mlx-pare cannot cut; some of these can be planned for."""


class UsageError(PareError):
    """The command was called with arguments that cannot mean anything."""

    exit_code = 2


class Refused(PareError):
    """Doing it would overwrite, mix different inputs, or not fit: nothing was touched."""

    exit_code = 3
