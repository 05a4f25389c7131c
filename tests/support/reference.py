"""What the numbers should be: plain float64 numpy, written from papers and formulas, sharing no code with the package.

``forward`` runs llama, mistral, qwen2, qwen3, seed_oss, gemma3_text, gemma2, phi3, olmo2, olmo3, smollm3, granite and
ministral3, and returns the logits and, per layer, the activations that calibration looks at. Below it stand the
criteria and metrics, one short function each.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from reference_packing import float_dense

# ---- reading a model directory ----

NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}


def tensors(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file; bfloat16 becomes float32."""
    data = file.read_bytes()
    base = 8 + struct.unpack("<Q", data[:8])[0]
    found = {}
    for name, info in json.loads(data[8:base]).items():
        if name == "__metadata__":
            continue
        start, end = info["data_offsets"]
        array = np.frombuffer(data[base + start : base + end], NUMPY[info["dtype"]]).reshape(info["shape"])
        found[name] = (array.astype(np.uint32) << 16).view(np.float32) if info["dtype"] == "BF16" else array
    return found


def unpack(words: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """w = scale * code + bias; codes lie in 32-bit words, lowest bits first (bits must divide 32)."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = ((words[..., None] >> shifts) & (2**bits - 1)).reshape(words.shape[0], -1).astype(np.float64)
    repeat = codes.shape[1] // scales.shape[1]
    return codes * np.repeat(scales.astype(np.float64), repeat, 1) + np.repeat(biases.astype(np.float64), repeat, 1)


def load(directory: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(config, weights by name in float64); packed matrices are unpacked, and those that are several in one (phi3) are
    under the names of these."""
    config = json.loads((directory / "config.json").read_text())
    raw = {k: v for file in sorted(directory.glob("model*.safetensors")) for k, v in tensors(file).items()}
    weights = {}
    for name, array in raw.items():
        module, _, leaf = name.rpartition(".")
        if leaf in ("scales", "biases"):
            continue
        if array.dtype == np.uint32:
            special = config["quantization"].get(module)
            spec = special or config["quantization"]
            if spec.get("mode", "affine") == "affine":
                array = unpack(array, raw[f"{module}.scales"], raw[f"{module}.biases"], spec["bits"])
            else:
                array = float_dense(array, raw[f"{module}.scales"], spec["mode"])
        weights[name] = array.astype(np.float64)
    for name in [name for name in weights if name.endswith(("qkv_proj.weight", "gate_up_proj.weight"))]:
        block, rows = name.rpartition(".weight")[0].rpartition(".")[0], weights.pop(name)
        heads, kv_heads, d = sizes(config)
        if "qkv" in name:
            names, ends = ("q_proj", "k_proj", "v_proj"), (heads * d, (heads + kv_heads) * d)
        else:
            names, ends = ("gate_proj", "up_proj"), (len(rows) // 2,)
        weights |= {f"{block}.{n}.weight": w for n, w in zip(names, np.split(rows, ends), strict=True)}
    return config, weights


# ---- the forward pass ----


def sizes(config: dict) -> tuple[int, int, int]:
    """(query heads, kv heads, head_dim)."""
    heads = config["num_attention_heads"]
    return heads, config["num_key_value_heads"], config.get("head_dim") or config["hidden_size"] // heads


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rotary embedding of [..., tokens, head_dim] on the halves (i, i + head_dim/2)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[-2])[:, None] * angles
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], axis=-1)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def window_of(config: dict, layer: int) -> int | None:
    """How many tokens a layer looks back on, itself included; None: all."""
    if config["model_type"] == "gemma2":  # as mlx-lm computes it
        return None
    if config["model_type"] == "gemma3_text":
        sliding = (layer + 1) % config["sliding_window_pattern"] != 0
    else:
        sliding = (config.get("layer_types") or {layer: ""})[layer] == "sliding_attention"
    return config["sliding_window"] if sliding else None


def turns(config: dict, layer: int, head_dim: int) -> np.ndarray | None:
    """By what angle a position turns every pair of a head, [head_dim / 2]; None: the layer has no rope."""
    kind, half = config["model_type"], head_dim // 2
    if kind == "smollm3" and (layer + 1) % 4 == 0:
        return None
    local = kind == "gemma3_text" and window_of(config, layer)
    base = config["rope_local_base_freq"] if local else config["rope_theta"]
    plain = base ** (-np.arange(half) / half)
    if kind != "ministral3":
        return plain
    # YaRN (Peng et al. 2023, arXiv 2309.00071): pairs that turn less than beta_slow times within the original length
    # are interpolated, those that turn more than beta_fast times are not
    p = config["rope_parameters"]
    place = [
        head_dim * np.log(p["original_max_position_embeddings"] / (2 * np.pi * r)) / (2 * np.log(base))
        for r in (p["beta_fast"], p["beta_slow"])
    ]
    low, high = max(np.floor(place[0]), 0), min(np.ceil(place[1]), head_dim - 1)
    ramp = np.clip((np.arange(half) - low) / (high - low), 0, 1)
    return plain * (1 - ramp) + plain / p["factor"] * ramp


def numbers(config: dict) -> dict[str, float]:
    """What some families multiply by: attention scores, embedding, all that is added to the stream, logits; and within
    what they hold scores and logits (infinity: they do not)."""
    kind, own = config["model_type"], sizes(config)[2] ** -0.5
    found = {"scores": own, "embedding": 1.0, "added": 1.0, "logits": 1.0, "score cap": np.inf, "logit cap": np.inf}
    if kind.startswith("gemma"):
        found |= {"scores": config["query_pre_attn_scalar"] ** -0.5, "embedding": config["hidden_size"] ** 0.5}
    if kind == "gemma2":
        found |= {"score cap": config["attn_logit_softcapping"], "logit cap": config["final_logit_softcapping"]}
    if kind == "granite":
        found |= {"scores": config["attention_multiplier"], "embedding": config["embedding_multiplier"]}
        found |= {"added": config["residual_multiplier"], "logits": 1 / config["logits_scaling"]}
    return found


def capped(x: np.ndarray, cap: float) -> np.ndarray:
    return x if np.isinf(cap) else cap * np.tanh(x / cap)


def attend(config: dict, weights: dict[str, np.ndarray], x: np.ndarray, layer: int) -> np.ndarray:
    """What o_proj of a layer reads, from what attention reads."""
    kind, by, name = config["model_type"], numbers(config), f"model.layers.{layer}.self_attn"
    heads, kv_heads, head_dim = sizes(config)
    count, length = x.shape[:2]
    behind = kind.startswith("olmo")

    def split(x: np.ndarray, n: int) -> np.ndarray:
        return x.reshape(count, length, n, head_dim).transpose(0, 2, 1, 3)

    q, k, v = (linear(weights, x, f"{name}.{p}_proj") for p in "qkv")
    if behind:  # one norm over all heads
        q, k = norm(config, weights, q, f"{name}.q_norm"), norm(config, weights, k, f"{name}.k_norm")
    q, k, v = (split(a, n) for a, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if not behind and f"{name}.q_norm.weight" in weights:
        q, k = norm(config, weights, q, f"{name}.q_norm"), norm(config, weights, k, f"{name}.k_norm")
    angles = turns(config, layer, head_dim)
    if angles is not None:
        q, k = rope(q, angles), rope(k, angles)
    if kind == "ministral3":  # longer texts are looked at more sharply, step by step
        p = config["rope_parameters"]
        far = np.log(1 + np.arange(length) // p["original_max_position_embeddings"])
        q = q * (1 + p["llama_4_scaling_beta"] * far)[:, None]
    k, v = (np.repeat(a, heads // kv_heads, axis=1) for a in (k, v))
    back = np.arange(length)[:, None] - np.arange(length)[None, :]
    seen = (back >= 0) & (back < (window_of(config, layer) or length))
    found = capped(q @ k.transpose(0, 1, 3, 2) * by["scores"], by["score cap"])
    mixed = softmax(np.where(seen, found, -np.inf)) @ v
    return mixed.transpose(0, 2, 1, 3).reshape(count, length, heads * head_dim)


def norm(config: dict, weights: dict[str, np.ndarray], x: np.ndarray, name: str) -> np.ndarray:
    one = 1 if config["model_type"].startswith("gemma") else 0
    return rms_norm(x, weights[f"{name}.weight"] + one, config["rms_norm_eps"])


def linear(weights: dict[str, np.ndarray], x: np.ndarray, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def block(config: dict, weights: dict[str, np.ndarray], x: np.ndarray, layer: int) -> dict[str, np.ndarray]:
    """The activations of one layer, as ``forward`` lists them, from the stream [rows, tokens, hidden] before it."""
    kind, added, name = config["model_type"], numbers(config)["added"], f"model.layers.{layer}"
    gemma, behind = kind.startswith("gemma"), kind.startswith("olmo")
    kept = {"before": x, "attn_norm": x if behind else norm(config, weights, x, f"{name}.input_layernorm")}
    kept["attention"] = attend(config, weights, kept["attn_norm"], layer)
    r = linear(weights, kept["attention"], f"{name}.self_attn.o_proj")
    x = x + added * (norm(config, weights, r, f"{name}.post_attention_layernorm") if gemma or behind else r)
    before = f"{name}.{'pre_feedforward' if gemma else 'post_attention'}_layernorm"
    kept["ffn_norm"] = x if behind else norm(config, weights, x, before)
    gate, up = (linear(weights, kept["ffn_norm"], f"{name}.mlp.{n}_proj") for n in ("gate", "up"))
    kept["ffn"] = (gelu_tanh(gate) if gemma else silu(gate)) * up
    r = linear(weights, kept["ffn"], f"{name}.mlp.down_proj")
    after = f"{name}.post_feedforward_layernorm"
    return {**kept, "after": x + added * (norm(config, weights, r, after) if gemma or behind else r)}


def embedded(config: dict, weights: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """The stream before the first layer."""
    return weights["model.embed_tokens.weight"][tokens] * numbers(config)["embedding"]


def forward(
    config: dict, weights: dict[str, np.ndarray], tokens: np.ndarray, factors: dict[int, float] | None = None
) -> tuple[np.ndarray, list[dict]]:
    """Logits [rows, tokens, vocab], and per layer: ffn, attention (inputs of down_proj and o_proj), attn_norm, ffn_norm
    (what attention and feed-forward read), before, after (of the block). ``factors``: on what a layer adds to the
    stream."""
    by, x, layers = numbers(config), embedded(config, weights, tokens), []
    for i in range(config["num_hidden_layers"]):
        layers.append(block(config, weights, x, i))
        if i in (factors or {}):
            layers[i]["after"] = x + factors[i] * (layers[i]["after"] - x)
        x = layers[i]["after"]
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return capped(norm(config, weights, x, "model.norm") @ head.T * by["logits"], by["logit cap"]), layers


# ---- statistics of activations [rows, tokens, units] of which the first lengths[r] tokens of a row are text ----


def valid(x: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """The text of each row, [tokens, units]."""
    return [row[:n] for row, n in zip(x, lengths, strict=True)]


def row_sq(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Minitron before its root: sum over rows of (mean over tokens of |x|)^2."""
    return sum(np.abs(row).mean(axis=0) ** 2 for row in valid(x, lengths))


def moments(x: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    text = np.concatenate(valid(x, lengths))
    return {
        "row_sq": row_sq(x, lengths),
        "sum": text.sum(axis=0),
        "abs_sum": np.abs(text).sum(axis=0),
        "sq_sum": (text**2).sum(axis=0),
        "max": np.abs(text).max(axis=0),
    }


def cosine_sum(before: np.ndarray, after: np.ndarray, lengths: np.ndarray) -> float:
    a, b = np.concatenate(valid(before, lengths)), np.concatenate(valid(after, lengths))
    return float(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).sum())


def angles(layers: list[dict], lengths: np.ndarray) -> np.ndarray:
    """arccos(cos) / pi between the inputs of all blocks and the output of the last, at the last token of a row."""
    last = [[row[-1] for row in valid(x, lengths)] for x in (layers[0]["before"], *(a["after"] for a in layers))]
    found = np.zeros((len(last), len(last)))
    for i, j in np.ndindex(found.shape):
        for a, b in zip(last[i], last[j], strict=True):
            # the angle between two vectors of length 1 from their chord: no cosine near 1 is needed
            chord = np.linalg.norm(a / np.linalg.norm(a) - b / np.linalg.norm(b))
            found[i, j] += 2 * np.arcsin(chord / 2) / np.pi / len(lengths)
    return found


def hoyer(x: np.ndarray) -> np.ndarray:
    """Sparsity of each column over its n entries: (sqrt(n) - L1/L2) / (sqrt(n) - 1); a column of zeros is 1."""
    root, l2 = np.sqrt(len(x)), np.sqrt((x**2).sum(axis=0))
    ratio = np.divide(np.abs(x).sum(axis=0), l2, out=np.ones(x.shape[1]), where=l2 > 0)
    return (root - ratio) / (root - 1)


# ---- criteria: importance of units of one layer ----


def minitron(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.sqrt(row_sq(x, lengths))


def _layer(weights: dict[str, np.ndarray], layer: int, role: str) -> np.ndarray:
    part = "mlp" if role in ("gate", "up", "down") else "self_attn"
    return weights[f"model.layers.{layer}.{part}.{role}_proj.weight"]


READS = {"attn_norm": ("q", "k", "v"), "ffn_norm": ("gate", "up")}
WRITES = {"attn_norm": "o", "ffn_norm": "down"}


def by_axis(sites: dict[str, np.ndarray], config: dict) -> dict[str, np.ndarray]:
    """Values [..., units] of a layer by site -> by axis: the query heads of a kv head are summed, and so are norms."""
    found, heads = dict(sites), sites["attention"]
    _, kv_heads, _ = sizes(config)
    found["kv_head"] = heads.reshape(*heads.shape[:-1], kv_heads, -1).sum(axis=-1)
    found["hidden"] = sum(sites[norm] for norm in READS)
    return {name: values for name, values in found.items() if name not in ("attention", *READS)}


def magnitude(config: dict, weights: dict, i: int) -> dict[str, np.ndarray]:
    """L2 norm of everything that leaves with a unit; k and v of a group count in equal shares to its query heads."""
    w = {role: _layer(weights, i, role) ** 2 for role in ("q", "k", "v", "o", "gate", "up", "down")}
    heads, kv_heads, d = sizes(config)
    group = heads // kv_heads
    attention = []
    for h in range(heads):
        own, shared = slice(h * d, (h + 1) * d), slice(h // group * d, (h // group + 1) * d)
        attention.append(
            w["q"][own].sum() + w["o"][:, own].sum() + (w["k"][shared].sum() + w["v"][shared].sum()) / group
        )
    found = {
        "ffn": w["gate"].sum(1) + w["up"].sum(1) + w["down"].sum(0),
        "attention": np.array(attention),
        "layer": np.array(sum(m.sum() for m in w.values())),
    }
    found |= {n: sum(w[r].sum(0) for r in READS[n]) + w[WRITES[n]].sum(1) for n in READS}
    return {name: np.sqrt(value) for name, value in found.items()}


def wanda(x: np.ndarray, lengths: np.ndarray, *readers: np.ndarray) -> np.ndarray:
    """sum over outputs of |W_ij| * ||x_j||_2, one number per input j."""
    norms = np.sqrt((np.concatenate(valid(x, lengths)) ** 2).sum(axis=0))
    return sum(np.abs(w).sum(axis=0) for w in readers) * norms


def flap(x: np.ndarray, lengths: np.ndarray, reader: np.ndarray) -> np.ndarray:
    """WIFV: var_j * sum_i W_ij^2, one number per input j."""
    return np.concatenate(valid(x, lengths)).var(axis=0) * (reader**2).sum(axis=0)


def scores(
    criterion: str, config: dict, weights: dict, tokens: np.ndarray, lengths: np.ndarray
) -> dict[str, np.ndarray]:
    """All scores of a criterion (any but random), as the score verb arranges them."""
    _, layers = forward(config, weights, tokens)
    heads, _, d = sizes(config)
    rows = []
    for i, a in enumerate(layers):
        influence = 1 - cosine_sum(a["before"], a["after"], lengths) / lengths.sum()
        if criterion == "magnitude":
            row = magnitude(config, weights, i)
        elif criterion == "wanda":
            row = {"ffn": wanda(a["ffn"], lengths, _layer(weights, i, "down")), "layer": influence}
            row["attention"] = wanda(a["attention"], lengths, _layer(weights, i, "o")).reshape(heads, d).sum(1)
            row |= {n: wanda(a[n], lengths, *(_layer(weights, i, r) for r in READS[n])) for n in READS}
        elif criterion == "flap":
            row = {"ffn": flap(a["ffn"], lengths, _layer(weights, i, "down")), "layer": influence}
            row["attention"] = flap(a["attention"], lengths, _layer(weights, i, "o")).reshape(heads, d).sum(1)
            row |= {n: wanda(a[n], lengths, *(_layer(weights, i, r) for r in READS[n])) for n in READS}
        else:
            row = {"ffn": minitron(a["ffn"], lengths), "layer": influence}
            row["attention"] = np.sqrt(row_sq(a["attention"], lengths).reshape(heads, d).sum(1))
            row |= {n: minitron(a[n], lengths) for n in READS}
        rows.append({**by_axis(row, config), "sparsity": hoyer(np.concatenate(valid(a["ffn"], lengths)))})
    stacked = {name: np.stack([r[name] for r in rows]) for name in rows[0]}
    return {name: values.sum(0) if name == "hidden" else values for name, values in stacked.items()}


# ---- metrics ----


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, dtype=np.float64)
    peak = logits.max(axis=-1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))


def kl(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """KL(teacher || student) per token in nats, from logits."""
    p, q = log_softmax(teacher), log_softmax(student)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -np.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def percentile(values: np.ndarray, q: float) -> float:
    """With linear interpolation between the two nearest values."""
    ordered = np.sort(values)
    at = (len(ordered) - 1) * q / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (at - low) * (ordered[high] - ordered[low]))


def clustered_error(rows: list[np.ndarray]) -> float:
    """Standard error of the mean over all values when values of one row depend on each other (rows are the sample)."""
    mean, total = np.concatenate(rows).mean(), sum(map(len, rows))
    off = np.array([(row - mean).sum() for row in rows])
    return float(np.sqrt((off**2).sum() * len(rows) / (len(rows) - 1)) / total)


# ---- reconstruction: ridge least squares towards the old weights, and the two streams ----


def ridge_of(x: np.ndarray, damping: float, fixed: int = 0) -> np.ndarray:
    """The ridge of every input: a share of its sum of squares, or, if that is nothing, of 1e-9 of the mean one."""
    squares = (x**2).sum(axis=0)
    return damping * np.maximum(squares, 1e-9 * squares[: len(squares) - fixed].mean())


def ridge(x: np.ndarray, target: np.ndarray, old: np.ndarray, weight: np.ndarray, kept: list[int]) -> np.ndarray:
    """Weights [out, kept] of least squares on the stacked system: data rows, and a row towards each old weight."""
    pull = np.sqrt(weight[kept])
    rows = np.concatenate([x[:, kept], np.diag(pull)])
    scale = np.maximum(np.linalg.norm(rows, axis=0), 1e-300)  # lstsq cuts off small singular values
    found = np.linalg.lstsq(rows / scale, np.concatenate([target, pull[:, None] * old[:, kept].T]), rcond=None)[0]
    return (found / scale[:, None]).T


def loss(x: np.ndarray, target: np.ndarray, old: np.ndarray, weight: np.ndarray, kept: list[int]) -> float:
    """What is left of the objective when only these inputs are; the ridge pulls the others' weights on both sides."""
    new = ridge(x, target, old, weight, kept)
    gone = np.delete(np.arange(x.shape[1]), kept)
    away = (weight[gone] * old[:, gone] ** 2).sum() + (weight[kept] * (new - old[:, kept]) ** 2).sum()
    return float(((x[:, kept] @ new.T - target) ** 2).sum() + away)


def inputs_of(units: list[int], size: int) -> list[int]:
    return [unit * size + i for unit in units for i in range(size)]


def greedy(
    x: np.ndarray,
    target: np.ndarray,
    old: np.ndarray,
    weight: np.ndarray,
    size: int,
    count: int,
    batch: int = 1,
    fixed: int = 0,
) -> list[int]:
    """The units that are left when always those go whose removal leaves the least loss, everything solved again; the
    last ``fixed`` inputs stay."""
    alive, stay = list(range((x.shape[1] - fixed) // size)), list(range(x.shape[1] - fixed, x.shape[1]))
    while len(alive) > count:
        left = [loss(x, target, old, weight, inputs_of([v for v in alive if v != u], size) + stay) for u in alive]
        gone = {alive[i] for i in np.argsort(left, kind="stable")[: min(batch, len(alive) - count)]}
        alive = [u for u in alive if u not in gone]
    return alive


def repaired_alone(
    config: dict,
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    lengths: np.ndarray,
    kept: dict[int, tuple[list[int], list[int]]],
    damping: float,
    layers: list[dict] | None = None,
) -> dict[str, np.ndarray]:
    """The weights of the original with o_proj and down_proj (and their biases) of every layer solved anew for itself:
    inputs and target are those of the dense stream. ``kept`` as in ``two_streams``; what keeps all is left as it is.
    ``layers``: what ``forward`` gave for the original, if it is known."""
    heads, kv_heads, d = sizes(config)
    text, new = np.arange(tokens.shape[1])[None] < lengths[:, None], dict(weights)
    for i, a in enumerate(layers or forward(config, weights, tokens)[1]):
        channels, units = kept.get(i, ([], []))[::-1]
        columns = {"self_attn.o_proj": inputs_of(units, heads // kv_heads * d), "mlp.down_proj": channels}
        for (short, chosen), site in zip(columns.items(), ("attention", "ffn"), strict=True):
            name = f"model.layers.{i}.{short}"
            old, bias, x = weights[f"{name}.weight"], weights.get(f"{name}.bias"), a[site][text]
            if not chosen:
                new |= {n: np.zeros_like(weights[n]) for n in weights if n.rpartition(".")[0] == name}
            if not chosen or len(chosen) == old.shape[1]:
                continue
            data, before, left = x, old, list(chosen)
            if bias is not None:
                data = np.hstack([x, np.ones((len(x), 1))])
                before, left = np.hstack([old, np.zeros((len(old), 1))]), [*chosen, old.shape[1]]
            found = ridge(data, x @ old.T, before, ridge_of(data, damping, bias is not None), left)
            new[f"{name}.weight"] = np.zeros_like(old)
            new[f"{name}.weight"][:, chosen] = found[:, : len(chosen)]
            if bias is not None:
                new[f"{name}.bias"] = bias + found[:, -1]
    return new


def two_streams(
    config: dict,
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    lengths: np.ndarray,
    kept: dict[int, tuple[list[int], list[int]]],
    damping: float,
    residual: bool = True,
    stored: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The weights of the original with o_proj and down_proj (and their biases) solved anew, zero at what is cut.

    ``kept``: (kv heads, channels) of every layer that stays, none where it loses that part; ``residual`` False: the
    target is what the dense matrix gave, without the error that the pruned stream brings along. ``stored``: what the
    pruned stream goes through in place of what is solved (rounded, say). It runs through a layer anew behind each.
    """
    behind = config["model_type"].startswith(("gemma", "olmo"))  # a norm, which no linear solve can reach past
    factor = numbers(config)["added"]
    heads, kv_heads, d = sizes(config)
    text = np.arange(tokens.shape[1])[None] < lengths[:, None]
    dense, new, result, passed = forward(config, weights, tokens)[1], dict(weights), {}, np.zeros(())
    stream = embedded(config, weights, tokens)  # the pruned one, before the layer
    for i, a in enumerate(dense):
        names = [f"model.layers.{i}.{n}" for n in ("self_attn.o_proj", "mlp.down_proj")]
        if i not in kept:  # nothing is added to the stream: the layer is not there
            new |= {n: np.zeros_like(weights[n]) for n in weights if n.rpartition(".")[0] in names}
            continue
        columns = [inputs_of(kept[i][0], heads // kv_heads * d), kept[i][1]]
        middle = a["attention"] @ weights[f"{names[0]}.weight"].T + weights.get(f"{names[0]}.bias", 0.0)
        middle = a["before"] + factor * middle
        for name, site, chosen in zip(names, ("attention", "ffn"), columns, strict=True):
            own = block(config, new, stream, i)
            if not chosen:
                new |= {n: np.zeros_like(weights[n]) for n in weights if n.rpartition(".")[0] == name}
                passed = own["before"] if site == "attention" else passed
                continue
            old, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
            added = 0.0 if bias is None else bias
            if behind or not residual:
                target = a[site] @ old.T + added
            else:
                target = (middle if site == "attention" else a["after"]) - (
                    own["before"] if site == "attention" else passed
                )
                target = target / factor
            x, data, before, left = own[site][text], own[site][text], old, chosen
            if bias is not None:  # a constant input that always stays
                data = np.hstack([x, np.ones((len(x), 1))])
                before, left = np.hstack([old, bias[:, None]]), [*chosen, old.shape[1]]
            found = ridge(data, target[text], before, ridge_of(data, damping, bias is not None), left)
            solved = np.zeros_like(old)
            solved[:, chosen] = found[:, : len(chosen)]
            result[f"{name}.weight"] = solved
            if bias is not None:
                result[f"{name}.bias"] = found[:, -1]
            for leaf in ("weight", "bias"):
                if f"{name}.{leaf}" in result:
                    new[f"{name}.{leaf}"] = (stored or result)[f"{name}.{leaf}"]
            if site == "attention":
                passed = own[site] @ new[f"{name}.weight"].T + new.get(f"{name}.bias", 0.0)
                passed = own["before"] + factor * passed
        stream = block(config, new, stream, i)["after"]
    return {**new, **result}
