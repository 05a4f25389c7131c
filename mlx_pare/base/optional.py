"""Work that a run can do without. If it fails, the run reports it and continues."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

from . import console
from .errors import PareError, told

T = TypeVar("T")


def attempt(work: Callable[[], T]) -> tuple[T | None, PareError | None]:
    """Do ``work``, and return a failure of any kind instead of raising it.

    Args:
        work: what to do. An interrupt still ends the command.
    Returns:
        The result of ``work`` and None, or None and why it failed. The log of the run has the traceback of a defect.
    """
    try:
        return work(), None
    except PareError as error:
        return None, error
    except Exception as error:  # a defect in a side product must not cost the main one
        console.record("trace", "".join(traceback.format_exception(error)))
        return None, PareError(told(error)[0].rstrip("."))
