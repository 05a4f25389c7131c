"""The process that writes chats by a model's template, which is a program that comes with the model."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

from ..base.errors import PareError
from ..base.frozen_clock import Clock
from ..model.tokenizer_files import limit

CHAT_BYTES = 512 << 20  # memory that writing a chat may add, if the system can limit it (Linux)


def write_chats(directory: str, seconds: str) -> None:
    """Answer every line of stdin, a chat, with a line on stdout: its text, or the error.

    A chat that takes longer than ``seconds`` ends the process.
    """
    clock = Clock()
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not look like an answer
    from .tokens import stock_tokenizer

    try:
        tokenizer, wrong = stock_tokenizer(Path(directory)), None
    except PareError as error:
        wrong = str(error)
    if (used := Path("/proc/self/statm")).exists():  # in pages; the sixth number is data
        limit(resource.RLIMIT_DATA, int(used.read_text().split()[5]) * resource.getpagesize() + CHAT_BYTES)
    answers.write(b"{}\n")
    for line in sys.stdin:
        limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + int(seconds))
        signal.alarm(int(seconds))
        chat = json.loads(line)
        clock.set(chat["now"])
        more = {"tools": chat["tools"]} if chat["tools"] else {}
        more |= {"add_generation_prompt": True} if chat["answer"] else {}
        try:
            if wrong:
                raise ValueError(wrong)
            answer = {"text": tokenizer.apply_chat_template(chat["messages"], tokenize=False, **more)}
        except Exception as error:  # templates are programs and may raise anything
            answer = {"error": f"{type(error).__name__}: {error}"[:1000]}
        signal.alarm(0)
        answers.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    write_chats(*sys.argv[1:])
