"""Sums over tokens equal those of float64, also of inputs of very different sizes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_pare.repair import output_projection


def pieces(inputs: int, outputs: int, lengths: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Micro-batches of inputs [tokens, n] whose sizes span six digits, and of targets [tokens, out], float32."""
    random = np.random.default_rng(0)
    size, mixed = np.exp(3 * random.standard_normal(inputs)), 0.3 * random.standard_normal((inputs, inputs))
    made = []
    for length in lengths:
        x = random.standard_normal((length, inputs)) @ (np.eye(inputs) + mixed) * size
        made.append((x.astype(np.float32), (3 + random.standard_normal((length, outputs))).astype(np.float32)))
    return made


@pytest.mark.parametrize("inputs", [7, 128, 300, 1100])
@pytest.mark.parametrize("lengths", [[40], [300] * 5, [512, 100, 512, 1]])
def test_sums(monkeypatch, inputs, lengths):
    """Strips up to the diagonal, some micro-batches summed in float32: relative to the sizes of the inputs, to 1e-6."""
    monkeypatch.setattr(output_projection, "SUMMED", 1000)
    made = pieces(inputs, 9, lengths)
    gram, cross, energy = output_projection._sums((mx.array(x), mx.array(t)) for x, t in made)
    x, t = (np.concatenate(parts).astype(np.float64) for parts in zip(*made, strict=True))
    size = np.sqrt(np.square(x).sum(axis=0))
    assert np.array_equal(gram, gram.T) and gram.dtype == cross.dtype == np.float64
    assert np.abs((gram - x.T @ x) / np.outer(size, size)).max() < 1e-6
    assert np.abs((cross - x.T @ t) / np.outer(size, np.sqrt(np.square(t).sum(axis=0)))).max() < 1e-6
    assert energy == pytest.approx(np.square(t).sum(), rel=1e-6)
    alone, nothing, no_energy = output_projection._sums((mx.array(x), None) for x, _ in made)
    assert np.array_equal(alone, gram) and nothing is None and no_energy == 0


def test_the_sum_of_squares_of_many_numbers_keeps_its_digits():
    """MLX's float32 sum of half a million squares is 2e-4 too small on the CPU."""
    x, t = np.ones((1024, 4), np.float32), np.random.default_rng(0).standard_normal((1024, 576)).astype(np.float32)
    energy = output_projection._sums([(mx.array(x), mx.array(t))])[2]
    assert energy == pytest.approx(np.square(t, dtype=np.float64).sum(), rel=1e-6)
