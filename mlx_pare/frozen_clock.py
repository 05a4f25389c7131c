"""A clock that stands still, for a process of its own: chat templates, and the Python code that stands in for some of
them, ask what day it is, and a run that goes on tomorrow must read the same chats."""

from __future__ import annotations

import datetime
import time
from typing import Any


def freeze(day: str) -> None:
    """From here on ``datetime`` and ``time.strftime``, ``localtime`` and ``gmtime`` say midnight of a day, YYYY-MM-DD.

    To be called before anything imports these names from their modules. What measures time goes on.
    """
    moment = datetime.datetime.fromisoformat(day)

    class Date(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return cls(moment.year, moment.month, moment.day)

    class DateTime(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return cls(moment.year, moment.month, moment.day, tzinfo=tz)

        @classmethod
        def today(cls) -> datetime.datetime:
            return cls.now()

        @classmethod
        def utcnow(cls) -> datetime.datetime:
            return cls.now()

    parts, strftime = moment.timetuple(), time.strftime
    localtime, gmtime = time.localtime, time.gmtime

    def said(form: str, when: Any = parts) -> str:
        return strftime(form, when)

    datetime.date, datetime.datetime = Date, DateTime
    time.strftime = said
    time.localtime = lambda seconds=None: parts if seconds is None else localtime(seconds)
    time.gmtime = lambda seconds=None: parts if seconds is None else gmtime(seconds)
