"""The name of a model on the hub, as people write it for mlx-lm, Ollama and llama.cpp. Text only: no network."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_PART = r"\w(?:[\w.-]*\w)?"
_REVISION = r"@(?P<{}>\w[\w./+-]*)"
_NAME = re.compile(
    rf"(?:(?:https?:/+)?(?:huggingface\.co|hf\.co)/)?(?P<repo>{_PART}/{_PART})"
    rf"(?:{_REVISION.format('first')})?"
    r"(?:/(?P<file>[^@:\\]+\.[Gg][Gg][Uu][Ff])|:(?P<tag>\w[\w.-]*))?"
    rf"(?:{_REVISION.format('last')})?",
    re.ASCII,
)


@dataclass(frozen=True)
class HubName:
    """A model on the hub.

    ``repo``: "org/name". ``revision``: a branch, a tag or a commit; None for the main branch. ``file``: the path of a
    GGUF file in the repository. ``tag``: the type of a GGUF file there, such as "Q4_K_M".
    """

    repo: str
    revision: str | None = None
    file: str | None = None
    tag: str | None = None

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> HubName | None:
        """The model that a text names; None if the text is no such name.

        These are names: org/name, org/name@revision, org/name/file.gguf, org/name:Q4_K_M. The last two may also have
        @revision, and each of them may follow "hf.co/" or "https://huggingface.co/".
        """
        found = _NAME.fullmatch(os.fspath(text))
        if not found or ".." in found[0] or "--" in found["repo"] or not found[0].isprintable():
            return None
        if found["first"] and (found["last"] or found["file"]):  # a revision may hold slashes: it comes last
            return None
        if found["file"] and not all(found["file"].split("/")):
            return None
        if found["repo"].lower().endswith(".gguf"):  # the path of a file that does not exist
            return None
        return cls(found["repo"], found["first"] or found["last"], found["file"], found["tag"])

    def __str__(self) -> str:
        what = f"/{self.file}" if self.file else f":{self.tag}" if self.tag else ""
        return f"{self.repo}{what}{f'@{self.revision}' if self.revision else ''}"


_SNAPSHOT = re.compile(rf"models--({_PART}?)--({_PART})/snapshots/(\w+)(?:/(.+))?", re.ASCII)


def of_snapshot(path: str | os.PathLike[str]) -> HubName | None:
    """The model that a path in Hugging Face's cache belongs to; None for other paths."""
    found = _SNAPSHOT.search(os.fspath(path))
    return HubName(f"{found[1]}/{found[2]}", found[3], found[4]) if found else None


def called(path: Path) -> str:
    """A short name of a model for people: org/name in Hugging Face's cache, else the name of the directory.

    In the cache, the name of the directory is a commit.
    """
    found = of_snapshot(path)
    return str(HubName(found.repo, file=found.file)) if found else path.name


def shown(path: str) -> str:
    """A path as a table shows it: org/name in Hugging Face's cache, whose paths are long and say little."""
    return called(Path(path)) if of_snapshot(path) else path


def on_hub(text: str | os.PathLike[str]) -> HubName | None:
    """The model on the hub that a text names; None for an existing path, which always takes precedence over a name."""
    return None if os.path.exists(text) else HubName.parse(text)
