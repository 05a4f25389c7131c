"""More criteria in float64 numpy: ranks, contributions to an output, slopes by finite differences."""

from __future__ import annotations

import numpy as np
import reference

# ---- composite ----


def variance(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.concatenate(reference.valid(x, lengths)).var(axis=0)


def rank_bounds(values: np.ndarray, slack: np.ndarray | float) -> np.ndarray:
    """[2, units]: between which ranks in [0, 1] a value lies, when every value may be off by so much; equal values
    share their mean rank."""
    v, e = values, np.broadcast_to(slack, values.shape)
    surely_below = (v[None] + e[None] < v[:, None] - e[:, None]).sum(axis=1)
    perhaps_upto = (v[None] - e[None] <= v[:, None] + e[:, None]).sum(axis=1)
    same = np.array([(v == one).sum() for one in v])
    low = np.where(same > 1, surely_below + (same - 1) / 2, surely_below)
    high = np.where(same > 1, perhaps_upto - 1 - (same - 1) / 2, perhaps_upto - 1)
    return np.stack([low, high]) / max(len(v) - 1, 1)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of ranks, equal values sharing the mean of theirs."""

    def ranks(x: np.ndarray) -> np.ndarray:
        return np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def composite(config: dict, weights: dict, i: int, a: dict, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Bounds [2, units] of the composite criterion of one layer, with equal weights, by axis."""
    magnitude, (heads, _, d) = reference.magnitude(config, weights, i), reference.sizes(config)
    active = {site: 1 - reference.hoyer(np.concatenate(reference.valid(a[site], lengths))) for site in reference.READS}
    active |= {s: 1 - reference.hoyer(np.concatenate(reference.valid(a[s], lengths))) for s in ("ffn", "attention")}
    spread = {site: variance(a[site], lengths) for site in active}
    active["attention"] = active["attention"].reshape(heads, d).mean(axis=1)
    spread["attention"] = spread["attention"].reshape(heads, d).sum(axis=1)
    found = {}
    for site in ("ffn", "attention", *reference.READS):
        views = [(v, 1e-5 * np.abs(v)) for v in (magnitude[site], spread[site])] + [(active[site], 2e-6)]
        found[site] = sum(rank_bounds(*view) for view in views) / 3
    return reference.by_axis(found, config)


# ---- iterative ----


def missing(x: np.ndarray, lengths: np.ndarray, weight: np.ndarray, gone: list[int]) -> np.ndarray:
    """For every channel: what the output lacks without it and those already gone, summed over the tokens."""
    text = np.concatenate(reference.valid(x, lengths))
    lost = text[:, gone] @ weight[:, gone].T
    every = [lost + np.outer(text[:, i], weight[:, i]) for i in range(weight.shape[1])]
    return np.array([np.sqrt((e**2).sum(axis=1) + 1e-8).sum() for e in every])


def schedule(units: int, rounds: int) -> list[int]:
    """How many go after each round: (10, 4) -> 3, 3, 2, 2."""
    return [len(part) for part in np.array_split(np.arange(units), rounds)]


def head_contribution(x: np.ndarray, lengths: np.ndarray, weight: np.ndarray, kv_heads: int) -> np.ndarray:
    """Mean over tokens of || A_g W_g^T ||."""
    text, wide = np.concatenate(reference.valid(x, lengths)), weight.shape[1] // kv_heads
    groups = [slice(g * wide, (g + 1) * wide) for g in range(kv_heads)]
    return np.array([np.linalg.norm(text[:, g] @ weight[:, g].T, axis=1).mean() for g in groups])


# ---- taylor ----


def row_losses(config: dict, weights: dict, tokens: np.ndarray, lengths: np.ndarray, blocks: dict) -> np.ndarray:
    """Nats of all predicted tokens of each row; ``blocks``: factors on what blocks add to the stream."""
    logits, _ = reference.forward(config, weights, tokens, blocks)
    nll = reference.nll(logits[:, :-1], tokens[:, 1:])
    predicted = np.arange(1, tokens.shape[1])[None] < lengths[:, None]
    return (nll * predicted).sum(axis=1)


def slopes(
    config: dict, weights: dict, tokens: np.ndarray, lengths: np.ndarray, layer: int, site: str, unit: int
) -> np.ndarray:
    """d(loss of each row) / d(factor on a unit) by central differences: a factor on an input of a matrix is one on its
    columns."""
    step, (_, kv_heads, _), found = 1e-4, reference.sizes(config), []
    role = {"ffn": "mlp.down_proj", "attention": "self_attn.o_proj"}.get(site)
    name = f"model.layers.{layer}.{role}.weight"
    for factor in (1 + step, 1 - step):
        changed, blocks = dict(weights), {}
        if site == "block":
            blocks = {layer: factor}
        else:
            changed[name] = weights[name].copy()
            wide = 1 if site == "ffn" else weights[name].shape[1] // kv_heads
            changed[name][:, unit * wide : (unit + 1) * wide] *= factor
        found.append(row_losses(config, changed, tokens, lengths, blocks))
    return (found[0] - found[1]) / (2 * step)
