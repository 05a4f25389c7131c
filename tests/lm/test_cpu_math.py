"""What numpy computes in place of MLX's CPU backend: the same numbers and gradients, and only while it is asked."""

from __future__ import annotations

import ctypes

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pico
import pytest
import reference

from mlx_pare import lm
from mlx_pare.lm import blas, cpu_math
from mlx_pare.stream import walk as stream
from mlx_pare.text.corpus import Rows

STOCK = {name: getattr(mx, name) for name in ("exp", "sigmoid", "tanh", "softmax", "logsumexp")}
ATTENTION = mx.fast.scaled_dot_product_attention
FUNCTIONS = {
    "exp": lambda x: mx.exp(x),
    "sigmoid": lambda x: mx.sigmoid(x),
    "silu": lambda x: nn.silu(x),
    "tanh": lambda x: mx.tanh(x),
    "gelu": lambda x: nn.gelu_approx(x),
    "softmax": lambda x: mx.softmax(x, axis=-1, precise=True),
    "logsumexp": lambda x: mx.logsumexp(x, axis=-1),
    "logsumexp with its axis": lambda x: mx.logsumexp(x, axis=-1, keepdims=True),
}
WINDOW = np.tri(200, 200, dtype=bool) & ~np.tri(200, 200, -30, dtype=bool)
MASKS = {
    "none": None,
    "causal": "causal",
    "window": mx.array(WINDOW),
    "added": mx.array(np.where(WINDOW, 0, -1e9).astype(np.float32)),
    "of a batch": mx.array(WINDOW[None, None]),
}
on_cpu = pytest.mark.skipif(not lm.cpu_backend(), reason="for the CPU backend alone")


@pytest.fixture
def every_size(monkeypatch):
    """Also for as few numbers as tests have."""
    monkeypatch.setattr(cpu_math, "SMALL", 0)


def uniform(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32))


def close(found, wanted, within: float = 2e-6) -> None:
    found, wanted = (np.array(x).astype(np.float64) for x in (found, wanted))
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= within * max(1.0, np.abs(wanted).max())


@on_cpu
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_those_of_mlx(name, every_size):
    x, weights = uniform(40, 50), uniform(40, 50, seed=1)

    def loss(x):
        return (FUNCTIONS[name](x) * weights[:, :1]).sum() + (FUNCTIONS[name](x * 0.5) ** 2).sum()

    wanted = FUNCTIONS[name](x), mx.grad(loss)(x)
    mx.eval(wanted)
    with cpu_math.swift():
        assert STOCK.get(name) is not getattr(mx, name, None) or name not in STOCK
        found = FUNCTIONS[name](x), mx.grad(loss)(x)
        mx.eval(found)
    for one, other in zip(found, wanted, strict=True):
        close(one, other)


def of_numpy(q, k, v, scale, mask) -> np.ndarray:
    """Attention in float64."""
    q, k, v = (np.array(x).astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) * scale
    if isinstance(mask, str):
        scores = np.where(np.tri(*scores.shape[-2:], k.shape[2] - q.shape[2], dtype=bool), scores, -np.inf)
    elif mask is not None:
        mask = np.array(mask)
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def heads(length: int, count: int = 4, seed: int = 0) -> mx.array:
    """[2, count, length, 8], as models hand it on: transposed."""
    return uniform(2, length, count, 8, seed=seed).transpose(0, 2, 1, 3)


@on_cpu
@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_that_of_mlx_and_of_numpy(mask, every_size):
    given = heads(200), heads(200, 2, seed=1), heads(200, 2, seed=2)
    weights = heads(200, seed=3)

    def loss(attend):
        return lambda q, k, v: (attend(q, k, v, scale=0.3, mask=MASKS[mask]) * weights).sum()

    found = cpu_math.attention(*given, scale=0.3, mask=MASKS[mask])
    close(found, of_numpy(*given, 0.3, MASKS[mask]))
    close(found, ATTENTION(*given, scale=0.3, mask=MASKS[mask]))
    slopes = (mx.grad(loss(attend), argnums=(0, 1, 2))(*given) for attend in (cpu_math.attention, ATTENTION))
    for one, other in zip(*slopes, strict=True):
        close(one, other, 1e-5)


@on_cpu
def test_attention_after_a_cache(every_size):
    """Fewer queries than keys: the last ones."""
    given = heads(70), heads(200, seed=1), heads(200, seed=2)
    close(cpu_math.attention(*given, scale=0.3, mask="causal"), of_numpy(*given, 0.3, "causal"))


@on_cpu
@pytest.mark.parametrize("change", ["half precision", "sinks", "mask by row", "nothing visible", "few"])
def test_what_numpy_does_not_take_goes_to_mlx(change, monkeypatch):
    monkeypatch.setattr(cpu_math, "SMALL", 1 << 30 if change == "few" else 0)
    given, more = (heads(20), heads(20, seed=1), heads(20, seed=2)), {"mask": "causal"}
    if change == "half precision":
        given = tuple(x.astype(mx.float16) for x in given)
    if change == "sinks":
        more["sinks"] = mx.zeros((4,))
    if change == "mask by row":
        more["mask"] = mx.array(np.tri(20, dtype=bool)[None, None].repeat(2, axis=0))
    if change == "nothing visible":
        more["mask"] = mx.array(np.tri(20, 20, -1, dtype=bool))
    seen = []
    monkeypatch.setattr(cpu_math, "_STOCK_ATTENTION", lambda *a, **k: seen.append(k) or ATTENTION(*a, **k))
    found = cpu_math.attention(*given, scale=0.3, **more)
    assert len(seen) == 1 and found.dtype == given[0].dtype
    assert mx.array_equal(found, ATTENTION(*given, scale=0.3, **more)).item()


@on_cpu
def test_other_functions_that_numpy_does_not_take(every_size):
    x = uniform(6, 7)
    with cpu_math.swift():
        assert mx.exp(x.astype(mx.float16)).dtype == mx.float16
        assert mx.array_equal(mx.softmax(x, axis=0), STOCK["softmax"](x, axis=0)).item()
        assert mx.array_equal(mx.logsumexp(x), STOCK["logsumexp"](x)).item()
        assert mx.exp(0.0).item() == 1.0


def now() -> list:
    return [*(getattr(mx, name) for name in STOCK), mx.fast.scaled_dot_product_attention]


def test_names_are_given_back():
    with pytest.raises(ZeroDivisionError), cpu_math.swift():
        with cpu_math.swift():
            assert mx.exp is not STOCK["exp"]
        assert mx.exp is not STOCK["exp"]
        raise ZeroDivisionError
    assert now() == [*STOCK.values(), ATTENTION]


def test_another_device_computes_by_itself(monkeypatch):
    monkeypatch.setattr(lm.backend, "cpu_backend", lambda: False)
    with lm.swift():
        assert now() == [*STOCK.values(), ATTENTION]


@on_cpu
@pytest.mark.parametrize("family", pico.FAMILIES)
def test_streamed_logits_are_those_of_numpy(pico_models, every_size, family):
    """The whole forward of every family, windows and soft caps among them."""
    model, data = pico_models(family), Rows.full(np.random.default_rng(5).integers(0, 500, (3, 20)))
    found = np.array(stream.walk(model, data).all_logits(slice(None)))
    np.testing.assert_allclose(found, reference.forward(*reference.load(model), data.tokens)[0], rtol=0, atol=1e-4)
    assert now() == [*STOCK.values(), ATTENTION]


# ---- threads ----


def test_one_thread_for_a_small_model(monkeypatch):
    monkeypatch.delenv(blas.VARIABLE, raising=False)
    monkeypatch.setattr(blas.sys, "platform", "linux")
    set_to = []

    class Library:
        def __init__(self, path):
            self.openblas_set_num_threads = lambda count: set_to.append((path, count))

    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(blas, "loaded", lambda: ["one", "two"])
    blas.fit(blas.LARGE)
    blas.fit(None)
    assert not set_to and blas.VARIABLE not in blas.os.environ
    blas.fit(256)
    assert set_to == [("one", 1), ("two", 1)] and blas.os.environ[blas.VARIABLE] == "1"


def test_who_set_the_number_of_threads_has_decided(monkeypatch):
    monkeypatch.setenv(blas.VARIABLE, "7")
    monkeypatch.setattr(blas, "loaded", lambda: pytest.fail("nothing is to be changed"))
    blas.fit(256)
    assert blas.os.environ[blas.VARIABLE] == "7"


@pytest.mark.skipif(blas.sys.platform != "linux", reason="reads /proc")
def test_libraries_are_found():
    """numpy brings one, in a wheel for Linux."""
    import numpy

    there = list((blas.Path(numpy.__file__).parents[1] / "numpy.libs").glob("*openblas*"))
    found = blas.loaded()
    assert {str(path) for path in there} <= set(found)
    names = [hasattr(ctypes.CDLL(path), name) for path in found for name in blas.SETTERS]
    assert sum(names) == len(found)
