"""How results look on a terminal: the tables of the commands."""

from __future__ import annotations

from typing import Any

from ..base import console, units
from ..base.units import duration, readable, span
from ..model.hub_name import shown
from ..reporting.stability_text import stability_lines

FIT_COLUMNS = (
    "<mac", "budget", "weights", "KV", "work", "total", "<verdict", "headroom", "(GiB)", "max context", "decode tok/s",
    "prefill tok/s",
)  # fmt: skip
CHANGES_SHOWN = 8


def fit_table(title: str, rows: list[dict[str, Any]], caption: str | None = None) -> None:
    """Print one line per Mac, with a question mark at numbers that rest on an unverified fact.

    Args:
        title: of the table.
        rows: of capacity.planner.assess.
        caption: text below the table; None: none.
    """
    console.table(title, FIT_COLUMNS, [_fit_row(row) for row in rows], caption)


def _fit_row(row: dict[str, Any]) -> list[Any]:
    def size(key: str) -> str | None:
        return None if row[key] is None else units.gb(row[key])

    def speed(key: str, cell: str) -> str | None:
        if row[key] is None:
            return None
        return f"{row[key]:.0f} ±{row['speed_error'] * row[key]:.0f}" + ("?" if cell in row["unsure"] else "")

    mark = {cell: "?" if cell in row["unsure"] else "" for cell in ("memory", "budget")}
    gib = None if row["headroom_gib"] is None else f"{row['headroom_gib']:.2f}"
    return [
        row["mac"] + mark["memory"],
        units.gb(row["budget_bytes"]) + mark["budget"],
        *(size(key) for key in ("weights_bytes", "kv_bytes", "activation_bytes", "total_bytes")),
        row["verdict"],
        size("headroom_bytes"),
        gib,
        row["max_context"],
        speed("decode_tokens_per_s", "bandwidth"),
        speed("prefill_tokens_per_s", "tflops"),
    ]


def show_gguf(title: str, found: dict[str, Any]) -> None:
    """Print the types of a GGUF file, and which of them stand in for others."""
    counted = f"{found['kind']}, {units.gb(found['bytes'])}, {found['tensors']} tensors"
    rows = [[name, of["tensors"], units.gb(of["bytes"])] for name, of in found["types"].items()]
    rows.append(["header, vocabulary, padding", None, units.gb(found["bytes"] - found["tensor_bytes"])])
    console.table(f"{title}: {counted}", ["<type", "tensors", "bytes"], rows)
    for change, count in found["fallback_types"].items():
        console.say(f"{change}: {count} tensors whose rows are no whole blocks")
    for line in found.get("notes", ()):
        console.say(f"note: {line}")


def show_fit(found: dict[str, Any]) -> None:
    """Print what `fit` answers: a row per Mac, what would make the model fit, and what is not known."""
    here = found["here"]
    if here is None:
        console.say("this computer is not a Mac: its own limits are unknown, the table's are used")
    else:
        free = units.gb(here["available_bytes"])
        console.say(f"this Mac: {here['mac']}, budget {units.gb(here['budget_bytes'])}, {free} free now")
    fit_table(_fit_title(found), found["rows"], found["note"])
    if found["file_bytes"]:
        size, rest = found["file_bytes"], found["file_bytes"] - found["weights_bytes"]
        console.say(f"the file takes {units.gb(size)}, {units.gb(rest)} of it are no weights: the vocabulary, mostly")
    for line in found["notes"]:
        console.say(f"note: {line}")
    for mac, changes in found["alternatives"].items():
        _show_changes(mac, changes)


def _fit_title(found: dict[str, Any]) -> str:
    parts = [found["form"], f"weights {units.gb(found['weights_bytes'])}"]
    if found["parameters"]:
        parts.insert(1, f"{units.count(found['parameters']['total'])} parameters")
    tokens = found["context"]
    use = f"{found['train']} training on rows of {tokens} tokens" if found["train"] else f"{tokens} tokens of context"
    parts += [use, *([f"batch {found['batch']}"] if found["batch"] > 1 else []), found["runtime"]]
    return f"{found['model']}: {', '.join(parts)}"


def _show_changes(mac: str, changes: list[dict[str, Any]]) -> None:
    if not changes:
        console.say(f"nothing makes it fit {mac}: not fewer bits, nor a shorter context, nor a cut")
        return
    console.say(
        f"\nWhat would make it fit {mac}, with the loss of perplexity to expect (an order of magnitude to sort by: "
        "`mlx-pare run` measures it):"
    )
    for change in changes[:CHANGES_SHOWN]:
        spare, longest = units.gb(change["headroom_bytes"]), change["max_context"]
        console.say(f"  {loss(change['expected_loss']):>7}  {change['change']}")
        console.say(f"           leaves {spare}, up to {longest} tokens    {change['how']}")
    if len(changes) > CHANGES_SHOWN:
        console.say(f"  and {len(changes) - CHANGES_SHOWN} more: --json lists them")


def loss(share: float | None) -> str:
    """Return an expected relative loss in words: none, <1 %, ~7 %."""
    if share is None:
        return "unknown"
    return (
        "none" if share == 0 else "<1 %" if share < 0.01 else f"~{round(100 * share, -1 if share > 0.2 else 0):.0f} %"
    )


def show_summary(summary: dict[str, Any]) -> None:
    """Print the results of a run: contenders, speed, Macs, paths, verdict."""
    from ..store.places import CONTENDERS  # it imports pydantic, which commands that only print a table do not need

    rows = []
    for name, title in CONTENDERS:
        if (m := summary["contenders"].get(name)) is not None:
            kl = None if m["kl_divergence"] is None else f"{m['kl_divergence']:.4f}"
            rows.append(
                [
                    title,
                    units.count(m["parameters"]),
                    units.gb(m["bytes"]),
                    readable(m["perplexity"], 2, m["perplexity_stderr"]),
                    kl,
                ]
            )
    console.table("Contenders", ["<model", "parameters", "weights", "perplexity", "KL"], rows)
    if summary.get("stages"):
        from ..reporting.stage_table import HEAD, cells

        console.table("Stages", HEAD, cells(summary["stages"]))
    if summary["bench"]:
        ratio = summary["bench"]["models"][1]["ratio"]
        speeds = [m["decode_tokens_per_s"]["median"] for m in summary["bench"]["models"]]
        console.say(
            f"decode {speeds[0]:.1f} -> {speeds[1]:.1f} tok/s (x {ratio['decode_tokens_per_s']['median']:.2f}), "
            f"prefill x {ratio['prefill_tokens_per_s']['median']:.2f}"
        )
    fits = summary["fits"]
    fitting = sorted((r for r in fits["rows"] if r["fits"]), key=lambda r: r["memory_gb"])
    smallest = f"; smallest {fitting[0]['mac']}" if fitting else ""
    console.say(
        f"fits {len(fitting)} of {len(fits['rows'])} Macs at {fits['context']} tokens (original: "
        f"{fits['original_fits']}){smallest}"
    )
    for name in ("model", "gguf", "report"):
        if summary[name] is not None:
            console.say(f"{name}: {summary[name]}")
    console.say(summary["verdict"].replace("**", ""))


def show_stability(found: dict[str, Any]) -> None:
    """Print how far a choice of units depends on its calibration text: rank correlations, and the units that are the
    same."""

    def cell(of: dict[str, Any], same: str = "same") -> str:
        return f"{of['rank_correlation']:.3f} {of[same]:.0%}"

    for name, of in found["criteria"].items():
        columns = {f"{row['tokens']:,} tokens": row["axes"] for row in of["tokens"]}
        columns |= {"quantized": of["float"]["axes"]} if "float" in of else {}
        axes = {axis: None for column in (*columns.values(), of.get("draws", {})) for axis in column}
        rows = [[axis, *(cell(column[axis]) for column in columns.values())] for axis in axes]
        if "draws" in of:
            rows = [[*row, cell(of["draws"][row[0]], "jaccard")] for row in rows]
        names = ["<axis", *columns, *(["draws (Jaccard)"] if "draws" in of else [])]
        note = "rank correlation within layers, and the same units kept, of all; mean over layers"
        console.table(f"{name}, against all {found['tokens']:,} tokens", names, rows, note)
    for line in stability_lines(found):
        console.say(line)


# ---- one model ----

PARTS = ("embedding", "attention", "ffn", "norm")
GROUP_COLUMNS = {"layers": "layers", "q_heads": "heads", "kv_heads": "kv heads", "head_dim": "head size", "ffn": "ffn",
                 "experts": "experts", "expert_ffn": "ffn of each", "window": "window"}  # fmt: skip


KINDS = {
    "moe": "with experts", "no_ffn": "without feed-forward", "mla": "latent attention",
    "mla_expanded": "latent attention", "conv": "convolution", "mamba_and_attention": "mamba and attention",
    "full_attention_shared": "full attention on shared keys",
    "sliding_attention_shared": "sliding attention on shared keys",
}  # fmt: skip


def show_inspect(found: dict[str, Any]) -> None:
    """Print what `inspect` answers: sizes, a line per kind of layer, and sentences on what loads the model and what can
    be cut."""
    rows = [["comes from", found["origin"]], ["stored as", found["stored"]]]
    rows.append(["weights", units.gb(found["bytes"]["total"])])
    if "parameters" in found:
        counted, tied = found["parameters"], found["tied_embedding"]
        parts = ", ".join(f"{name} {counted[name]:,}" for name in PARTS)
        rows.insert(0, ["model type", found["model_type"]])
        rows.append(["parameters", f"{counted['total']:,}: {parts}"])
        if found["experts"]:
            visited, active = found["experts_per_token"], found["active_parameters"]
            rows.append(["per token", f"{visited} experts, {active:,} parameters in the blocks"])
        rows.append(["hidden size", found["hidden"]])
        rows.append(
            ["vocabulary", f"{found['vocab']}, {'one matrix' if tied else 'two matrices'} for input and output"]
        )
    console.table(found["model"], ["<", "<"], rows)
    if "layer_groups" in found:
        _show_layers(found)
    for line in found["notes"]:
        console.say(f"note: {line}")


def _show_layers(found: dict[str, Any]) -> None:
    groups = found["layer_groups"]
    names = [name for name in GROUP_COLUMNS if any(group[name] is not None for group in groups)]
    columns = ["<kind of layer", *(GROUP_COLUMNS[name] for name in names)]
    rows = [[_kind(g["kind"]), *(None if g[n] is None else span(g[n]) for n in names)] for g in groups]
    console.table(f"{found['layers']} layers", columns, rows, "\n".join(["", *_loads(found), "", *_cuts(found)]))


def _kind(kind: str) -> str:
    """Name a kind of layer: full_attention+moe -> full attention, with experts."""
    return ", ".join(KINDS.get(word, word.replace("_", " ")) for word in kind.split("+"))


def _loads(found: dict[str, Any]) -> list[str]:
    """Return a sentence for every program: whether it loads the model, and why not."""
    lines = []
    for name, what in found["runtimes"].items():
        why = found["runtime_reasons"].get(name)
        lines.append(f"{name} does not load it: {why}." if why else f"{name} loads it as {what}.")
    return lines


def _cuts(found: dict[str, Any]) -> list[str]:
    """Return sentences on what can be cut, and on the type of the cut model."""
    if not found["cuttable"]:
        return [f"mlx-pare cannot cut this model: {found['why_not_cuttable']}. `mlx-pare fit` can plan for it."]
    exact = [axis for axis, how in found["cuttable"].items() if how == "exact"]
    rough = [axis for axis, how in found["cuttable"].items() if how != "exact"]
    lines = [f"mlx-pare can cut {_listed([*exact, *rough])}."]
    if parent := found["part_of"]:
        lines.append(f"It cuts the language model of this {parent} and keeps everything else as it is.")
    if rough:
        lines.append(f"A cut of {_listed(rough)} is approximate: norms average over these units, even over dead ones.")
    lines += [f"It cannot cut {axis}: {why}." for axis, why in found["not_cuttable"].items()]
    uneven = found["runtimes_per_layer"]
    if others := [kind for kind in found["leaves_as"] if kind not in uneven["mlx-lm"]]:
        lines.append(f"Some cuts change its type, to {_listed(others, 'or')}.")
    if uneven["mlx-lm"]:
        why = f"but not in llama.cpp: {uneven['why_not']}"
        there = f"and in llama.cpp as {uneven['llama.cpp']}" if uneven["llama.cpp"] else why
        lines.append(f"Layers of different widths load in mlx-lm as {_listed(uneven['mlx-lm'], 'or')}, {there}.")
    elif uneven["why_not"]:
        lines.append(f"All layers must keep the same width: {uneven['why_not']}.")
    return lines


def _listed(names: list[str], last: str = "and") -> str:
    """Join names: a, b and c."""
    return f"{', '.join(names[:-1])} {last} {names[-1]}" if len(names) > 1 else "".join(names)


METRICS = {
    "bits_per_byte": ("bits per byte", ".4f"), "kl_divergence": ("KL divergence to the teacher, mean", ".5f"),
    "kl_p95": ("KL divergence, 95th percentile", ".5f"), "top1_agreement": ("same most likely token", ".1%"),
    "tokens": ("predicted tokens", ",d"), "windows": ("windows", ",d"), "length": ("tokens per window", ",d"),
    "data": ("text", "s"), "teacher": ("teacher", "s"),
}  # fmt: skip


def show_metrics(found: dict[str, Any]) -> None:
    """Print what `evaluate` measured, in words. Numbers for other programs (a loss per window) stay in the JSON
    document."""
    rows = [["perplexity", readable(found["perplexity"], 4, found["perplexity_stderr"])]]
    rows += [[name, format(found[key], form)] for key, (name, form) in METRICS.items() if found.get(key) is not None]
    console.table(shown(found["model"]), ["<measured", "<value"], rows)


def show_bench(found: dict[str, Any]) -> None:
    """Print speeds of models with their spread, and the ratios to the first."""
    speeds = ("prefill_tokens_per_s", "decode_tokens_per_s")
    rows = []
    for m in found["models"]:
        cells = [f"{m[n]['median']:.1f} ({m[n]['min']:.1f}-{m[n]['max']:.1f})" for n in speeds]
        ratios = [f"{m['ratio'][n]['median']:.2f}" for n in speeds]
        rows.append([shown(m["model"]), cells[0], ratios[0], cells[1], ratios[1], units.gb(m["peak_bytes"]["median"])])
    columns = ["<model", "prefill tok/s", "ratio", "decode tok/s", "ratio", "peak"]
    console.table(f"{found['trials']} trials, {found['backend']}", columns, rows)


def show_shape(made: dict[str, Any]) -> dict[str, Any]:
    """Print sizes before and after a cut; return them unchanged."""
    before, after = made["before"], made["after"]
    written = {"parameters": units.count, "non_embedding": units.count, "bytes": units.gb}
    rows = [[k.replace("_", " "), *(written.get(k, span)(size[k]) for size in (before, after))] for k in before]
    if stages := made.get("stages"):
        names = ["stage", "share", "steps", *before]
        lines = [[written.get(k, span if k in before else str)(stage[k]) for k in names] for stage in stages]
        console.table("stages", ["<stage", *(k.replace("_", " ") for k in names[1:])], lines)
    others = "neighbours: " + "; ".join(made["neighbours"]) if made["neighbours"] else None
    console.table(made["asked"], ["<", "before", "after"], rows, caption=others)
    return made


def show_status(found: dict[str, Any]) -> None:
    """Print what `status` answers: the finished steps, and in words what is going on."""
    gb, step = units.gb, found["working"] or found["next"]
    rows = [[s["step"], f"{s['seconds']:.1f}", gb(s["peak_bytes"]), gb(s["bytes"])] for s in found["steps"]]
    console.table(f"{found['run']} of {found['model']}", ["<step", "seconds", "peak memory", "on disk"], rows)
    words = {
        "working": f"process {found['pid']} works on it since {duration(found['seconds'] or 0)}: {step}",
        "finished": "finished",
        "failed": f"ended at {step}; the same command goes on from there",
        "killed": f"its process was killed, or the machine stopped, at {step}; the same command goes on from there",
        "waiting": f"nobody works on it; next: {step}",
    }
    console.say(words[found["state"]])
    if found["state"] == "working" and found["said"]:
        console.say(f"last said ({found['said']['time']}): {found['said']['text']}")
    if found["error"]:
        console.say(f"error ({found['error']['time']}): {found['error']['text']}")
    if found["left"]:
        console.say(f"to come: {', '.join(found['left'])}")
    console.say(f"{gb(found['bytes'])} on disk" + (f", log: {found['log']}" if found["log"] else ""))


def runtimes(found: dict[str, Any]) -> str:
    """Return one line: what would load a model."""
    there = [f"{name} (as {what})" for name, what in found.items() if what]
    missing = [name for name, what in found.items() if not what]
    return f"loads in {', '.join(there)}" + (f"; not in {', '.join(missing)}" if missing else "")


def answered(found: dict[str, Any]) -> str:
    """Return one line: what a stock server said."""
    if not found["served"]:
        return f"not asked through a server: {found['reason']}"
    return f"{found['server']} answers: {found['text'].strip()[:60]!r}"
