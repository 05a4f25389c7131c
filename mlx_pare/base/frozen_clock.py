"""A clock that stands still, for a separate process.

Chat templates, and the Python code that stands in for some of them, ask for the date. A run that continues tomorrow
must read the same chats.
"""

from __future__ import annotations

import datetime
import time
from typing import Any


class Clock:
    """Fixes what ``datetime`` and ``time.strftime``, ``localtime`` and ``gmtime`` return in this process.

    Create it before any other module imports these names. Functions that measure time keep running.
    """

    def __init__(self) -> None:
        self.set("1970-01-01")
        self._replace_dates()
        self._replace_times()

    def set(self, moment: str) -> None:
        """Set the time to ``moment``: a date, YYYY-MM-DD, which means its midnight, or an ISO 8601 time."""
        self._now = _fields(moment)

    def _replace_dates(self) -> None:
        clock = self

        class Date(datetime.date):
            @classmethod
            def today(cls) -> datetime.date:
                return cls(*clock._now[:3])

        class DateTime(datetime.datetime):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
                return cls(*clock._now, tzinfo=tz)

            @classmethod
            def today(cls) -> datetime.datetime:
                return cls.now()

            @classmethod
            def utcnow(cls) -> datetime.datetime:
                return cls.now()

        datetime.date, datetime.datetime = Date, DateTime

    def _replace_times(self) -> None:
        strftime, localtime, gmtime = time.strftime, time.localtime, time.gmtime

        def now() -> time.struct_time:
            return datetime.datetime.now().timetuple()

        def said(form: str, when: Any = None) -> str:
            return strftime(form, now() if when is None else when)

        time.strftime = said
        time.localtime = lambda seconds=None: now() if seconds is None else localtime(seconds)
        time.gmtime = lambda seconds=None: now() if seconds is None else gmtime(seconds)


def _fields(moment: str) -> tuple[int, ...]:
    return datetime.datetime.fromisoformat(moment).timetuple()[:6]
