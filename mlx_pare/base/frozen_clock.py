"""A clock that stands still, for a process of its own: chat templates, and the Python code that stands in for some of
them, ask what day it is, and a run that goes on tomorrow must read the same chats."""

from __future__ import annotations

import datetime
import time
from typing import Any


class Clock:
    """What ``datetime`` and ``time.strftime``, ``localtime`` and ``gmtime`` of this process say from here on.

    To be made before anything imports these names from their modules. What measures time goes on.
    """

    def __init__(self) -> None:
        self.set("1970-01-01")
        self._replace_dates()
        self._replace_times()

    def set(self, moment: str) -> None:
        """From here on it is ``moment``: a date, YYYY-MM-DD, which is its midnight, or a time of ISO 8601."""
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
