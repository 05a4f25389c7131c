"""The probe `needle`: one sentence with a code, hidden in a long text, at several depths and lengths.

The texts are made here, the same ones every time, from a list of words: 32,000 tokens of them would be most of the
package. A random generator of our own makes them, because Python may change its choices between versions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

from .checks import Check
from .records import Task

NAME = "needle"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the sentence is, from the start to the end of the text
HALVINGS = 4  # lengths: the longest, half of it, and so on
SHORTEST = 64  # tokens of text; a shorter length is left out
MAX_TOKENS = 24
# fmt: off
WHO = ("The baker", "A tall sailor", "My neighbour", "The old teacher", "Her brother", "The quiet clerk",
       "A young nurse", "The gardener", "Our guide", "The painter", "A tired driver", "The librarian")
DID = ("carried", "described", "repaired", "sold", "forgot", "painted", "hid", "found", "washed", "borrowed",
       "counted", "praised")
WHAT = ("a wooden chair", "the blue lamp", "two heavy boxes", "an empty bottle", "the garden gate",
        "a bag of apples", "the broken clock", "a pair of boots", "the morning paper", "an old map",
        "the kitchen table", "a silver spoon")
WHERE = ("near the river", "behind the church", "on a rainy Monday", "before lunch", "in the narrow street",
         "at the station", "after the long walk", "under the bridge", "in the cold cellar", "at the mill",
         "during the fair", "on the second floor")
PLACES = ("lighthouse", "harbour", "museum", "theatre", "bakery", "castle", "school", "library", "market",
          "hospital", "garden", "station", "brewery", "tower", "chapel", "workshop", "stable", "cellar", "mill",
          "palace")
# fmt: on


class Draws:
    """Whole numbers from a seed: the bytes of sha256 of a counter."""

    def __init__(self, seed: str):
        self._seed, self._count = seed, 0

    def below(self, limit: int) -> int:
        """The next number, from 0 to less than ``limit``."""
        self._count += 1
        return int.from_bytes(hashlib.sha256(f"{self._seed} {self._count}".encode()).digest()[:8], "big") % limit


def _sentence(draws: Draws) -> str:
    return " ".join(words[draws.below(len(words))] for words in (WHO, DID, WHAT, WHERE)) + "."


def haystack(needle: str, depth: float, sentences: int, seed: str) -> str:
    """Make a text with one sentence hidden in it.

    Args:
        needle: the sentence.
        depth: 0: it is the first; 1: the last.
        sentences: the number of others.
        seed: of the others.
    Returns:
        The text, in paragraphs of eight sentences.
    """
    draws = Draws(seed)
    text = [_sentence(draws) for _ in range(sentences)]
    text.insert(round(depth * sentences), needle)
    return "\n\n".join(" ".join(text[start : start + 8]) for start in range(0, len(text), 8))


def lengths(longest: int) -> list[int]:
    """The lengths of the texts, in tokens, from the longest to an eighth of it."""
    return [size for size in (longest >> i for i in range(HALVINGS)) if size >= SHORTEST]


def tasks(longest: int, count: Callable[[str], int]) -> Iterator[Task]:
    """Make the tasks of the probe.

    Args:
        longest: tokens of the longest prompt with its answer.
        count: the number of tokens of a prompt, with what a chat template adds.
    Returns:
        One task for every length and depth. A length in which not even one other sentence has room is left out.
    """
    for length in lengths(longest):
        for number, depth in enumerate(DEPTHS):
            seed = f"{length} {number}"
            place = PLACES[Draws(f"place {seed}").below(len(PLACES))]
            code = 10_000 + Draws(f"code {seed}").below(90_000)
            write = _writer(f"The code of the {place} is {code}.", place, depth, seed)
            sentences = _fitting(length - MAX_TOKENS, lambda n, write=write: count(write(n)))
            if sentences:
                other = 10_000 + (code - 10_000 + 1) % 90_000
                yield Task(
                    f"probe {NAME}, {length} tokens, {depth:.0%} deep", f"{NAME} {length}", write(sentences),
                    checks=(Check("contains", (str(code),)),), max_tokens=MAX_TOKENS,
                    right=(f"The code is {code}.",), wrong=(f"The code is {other}.", ""),
                )  # fmt: skip


def _writer(needle: str, place: str, depth: float, seed: str) -> Callable[[int], str]:
    """What writes the prompt with a number of other sentences."""
    question = f"Answer from the text above: what is the code of the {place}?"
    return lambda sentences: f"{haystack(needle, depth, sentences, seed)}\n\n{question}"


def _fitting(room: int, count: Callable[[int], int]) -> int:
    """Return how many sentences take about ``room`` tokens, and no more; 0 if not even one has room.

    Counting takes a while, so the number is estimated from few sentences.
    """
    least = count(1)
    each = (count(33) - least) / 32
    sentences = 1 + math.floor((room - least) / each)
    while sentences > 0 and (excess := count(sentences) - room) > 0:
        sentences -= math.ceil(excess / each)
    return max(0, sentences)
