"""TEMPORARY stand-in until the branch data is merged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .corpus import Rows


@dataclass(frozen=True)
class Domains:
    rows: Rows
    names: tuple
    weights: tuple
    of: np.ndarray

    @classmethod
    def of_one(cls, rows):
        return rows if isinstance(rows, Domains) else cls(rows, ("text",), (1.0,), np.zeros(rows.count, int))


class Sampler:
    def __init__(self, of, weights, batch, seed):
        self.count, self.batch, self.seed, self.drawn = len(of), min(batch, len(of)), seed, 0

    def draw(self):
        per = self.count // self.batch
        epoch, place = divmod(self.drawn, per)
        self.drawn += 1
        order = np.random.RandomState([self.seed, epoch]).permutation(self.count)
        return order[place * self.batch : (place + 1) * self.batch]

    def state(self):
        return {"drawn": self.drawn}

    def restore(self, state):
        self.drawn = state["drawn"]
