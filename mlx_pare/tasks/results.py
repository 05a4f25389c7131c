"""What tasks measured, as tasks.json holds it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ..base.errors import shell
from ..store.schema import SCHEMA, Count, Strict

FILE = "tasks.json"


class Rate(Strict):
    """How many items of a category passed, with Wilson's 95 % interval of the rate.

    ``says_nothing``: the teacher passes none of them, so a failure of the model shows no loss; None without a teacher.
    """

    category: str
    passed: Count
    total: Count
    low: float
    high: float
    says_nothing: bool | None = None

    @property
    def rate(self) -> float:
        """Passed of all, from 0 to 1; 0 without items."""
        return self.passed / self.total if self.total else 0.0


class Paired(Strict):
    """Two models on the same items: how many each of them passes alone, and McNemar's exact two-sided p."""

    category: str
    both: Count
    only_model: Count
    only_teacher: Count
    neither: Count
    p: float


class Given(Strict):
    """The surprisal -ln p of the tokens of given answers, in nats: the mean, and the largest with its token."""

    tokens: Count
    mean: float
    worst: float
    worst_token: str


class Surprisal(Given):
    """That of all given answers of a category; the mean is over their tokens."""

    category: str


class Answer(Strict):
    """What a model answered. ``finished``: it ended by itself, and not at max_tokens; None for a choice.

    ``text`` is None, and ``passed`` too, if the record has no check.
    """

    text: str | None = None
    finished: bool | None = None
    passed: bool | None = None
    surprisal: Given | None = None


class Item(Strict):
    """One record: where it is, and what the model (and the teacher) answered."""

    where: str
    category: str
    answer: Answer
    teacher: Answer | None = None


class TaskResults(Strict):
    """What `evaluate --tasks` measured. ``overall`` and ``overall_paired`` are of all items with a check together."""

    schema_version: int = SCHEMA
    model: str
    teacher: str | None = None
    raw: bool
    temperature: float
    seed: int
    overall: Rate
    tasks: list[Rate]
    overall_teacher: Rate | None = None
    teacher_tasks: list[Rate] = Field(default_factory=list)
    overall_paired: Paired | None = None
    paired: list[Paired] = Field(default_factory=list)
    surprisal: list[Surprisal] = Field(default_factory=list)
    teacher_surprisal: list[Surprisal] = Field(default_factory=list)
    items: list[Item]

    @classmethod
    def load(cls, path: Path) -> TaskResults:
        return cls.read(
            path, "results of tasks", f"delete {shell(Path(path).parent)} to do the step again", "is damaged"
        )
