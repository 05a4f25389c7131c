"""report: Markdown from a run directory alone. A step of that run measured every number in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..arch import parent_of
from ..base import markdown
from ..base.errors import PareError
from ..base.units import count, duration, gb, readable, span
from ..base.untrusted import read_json
from ..capacity.macs import GIB
from ..gates.check import rows_of
from ..pruning.plan_file import Plan
from ..sources.open_model import StrPath
from ..store import edited, step_files
from ..store.manifest import Manifest
from ..store.places import CONTENDERS
from . import stage_table
from .fit_bars import by_memory, verdict_of
from .fit_plot import draw, drawn
from .stability_text import stability_lines
from .verdict import Found, metrics, reconstructed, verdict

BEST = 5  # candidates that are shown
MACS_NOTE = (
    "Of every memory size the Mac with the least room. Tight: more than nine tenths of the budget. The work memory in "
    "these sums is an estimate, and so is a budget with a question mark."
)


def report(run: StrPath, measured: Sequence[str] | None = None) -> Path:
    """Write RUN/report.md and its picture from the manifest and the outputs of the steps; return its path.

    If somebody changed report.md, the path is report-2.md. ``measured`` lists the contenders that belong to the result
    (default: all that are there).
    """
    run = Path(run)
    manifest = Manifest.read(run / "manifest.json", "run manifest")
    found = metrics(run, measured)
    sections = [
        _title(manifest),
        "## Was it worth it?\n\n" + verdict(found, reconstructed(manifest)),
        _gates(run),
        _contenders(found),
        _stages(run),
        _shape(run),
        _tried(run),
        _stability(run),
    ]
    sections += [_requantized(run), _recovery(run) if "recovered" in found else ""]
    sections += [_speed(run), _gguf(run), _macs(run, manifest), _warnings(run), _steps(manifest)]
    return edited.write(run / "report.md", ("\n\n".join(s for s in sections if s) + "\n").encode())


def _title(manifest: Manifest) -> str:
    chip = manifest.machine.get("chip") or "no Apple chip"
    return (
        f"# {markdown.escaped(manifest.called)}\n\n"
        f"Source `{manifest.source[:16]}`, on {manifest.machine.get('system', 'an unknown system')} ({chip}); "
        + ", ".join(f"{k} {v}" for k, v in manifest.versions.items() if v != "not installed")
        + f".{_computed_by(manifest)}"
    )


def _computed_by(manifest: Manifest) -> str:
    """Return on what the run was begun and went on; older runs do not say it."""
    places = []
    for on in manifest.computed_on:
        mac = [*filter(None, (on.get("chip"), on.get("macos") and f"macOS {on['macos']}"))]
        where = f" ({', '.join(mac)})" if mac else ""
        places.append(markdown.escaped(f"MLX {on.get('mlx')} on the {on.get('device')}{where}"))
    agree = ": the numbers agree to rounding only" if len(places) > 1 else ""
    return f" Computed by {', then by '.join(places)}{agree}." if places else ""


def _contenders(found: Found) -> str:
    if not found:
        return ""
    rows = []
    for name, title in CONTENDERS:
        if name in found:
            m, size = found[name]
            same = None if m.top1_agreement is None else f"{m.top1_agreement:.1%}"
            numbers = [_number(m.bits_per_byte, 4), _number(m.kl_divergence, 4), _number(m.kl_p95, 3), same]
            rows.append(markdown.row(title, gb(size), readable(m.perplexity, 3, m.perplexity_stderr), *numbers))
    first = next(iter(found.values()))[0]
    note = (
        f"{first.tokens:,} predictions in {first.windows} windows of {first.length} tokens, the same for all; "
        "KL in nats against the original."
    )
    columns = ["model", "weights", "perplexity", "bits/byte", "KL", "KL 95%", "same top token"]
    return f"## Contenders\n\n{markdown.table(columns, rows)}\n\n{note}"


def _gates(run: Path) -> str:
    """Return the table of gates; the rules are the user's."""
    rows = []
    for gate in rows_of(run):
        numbers = [None if gate[key] is None else readable(gate[key], 4) for key in ("value", "limit")]
        result = {True: "passed", False: "failed", None: "not checked"}[gate["passed"]]
        rows.append(markdown.row(gate["rule"], gate["stage"], *numbers, result))
    return "" if not rows else f"## Gates\n\n{markdown.table(['rule', 'after', 'value', 'limit', ''], rows)}"


def _stages(run: Path) -> str:
    """Return the results of the stages of a schedule."""
    rows = [markdown.row(*row) for row in stage_table.cells(stage_table.story(run))]
    table = markdown.table([name.lstrip("<") for name in stage_table.HEAD], rows)
    return f"## Stages\n\n{table}\n\n{stage_table.NOTE}" if rows else ""


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _shape(run: Path) -> str:
    done, planned = run / "prune" / "model" / "plan.json", run / "plan" / "plan.json"
    path = done if done.exists() else planned  # the plan that was carried out, if one was
    if not path.exists():
        return ""
    plan = Plan.load(path)
    fields = [
        ("layers", str),
        ("ffn", span),
        *([("experts", str)] if plan.before.experts else []),
        ("q_heads", span),
        ("kv_heads", span),
        ("hidden", str),
        ("parameters", count),
        ("non_embedding", count),
        ("bytes", gb),
    ]
    rows = [
        markdown.row(name.replace("_", " "), show(getattr(plan.before, name)), show(getattr(plan.after, name)))
        for name, show in fields
    ]
    dropped = sorted(set(range(plan.before.layers)) - {layer.source for layer in plan.layers})
    asked = markdown.escaped(f"Criterion {plan.criterion}; asked: {plan.target.asked}; axes {', '.join(plan.axes)}.")
    text = f"## Shape\n\n{asked}"
    if dropped:
        text += f" Layers removed: {', '.join(map(str, dropped))}{_dropped_by(run, dropped)}."
    text += f"\n\n{markdown.table(['', 'before', 'after'], rows)}"
    neighbours = Plan.load(planned).neighbours if planned.exists() else []
    if neighbours:  # a plan of widths per layer, or of stages, has none
        text += f"\n\nNeighbours: {markdown.escaped('; '.join(neighbours))}."
    config = done.with_name("config.json")
    parent = parent_of(read_json(config, "model config")) if config.exists() else None
    return f"{text}\n\n{markdown.escaped(parent.unseen)}" if parent else text


def _dropped_by(run: Path, dropped: list[int]) -> str:
    """Return the KL divergence after each drop, if trials chose these layers."""
    drops = (step_files.find(run / "plan" / "layers.json") or {"drops": {}})["drops"].values()
    chosen = next((each for each in drops if sorted(d["layer"] for d in each) == dropped), [])
    told = ", ".join(f"{drop['layer']} ({_number(drop['kl'], 4) or 'given up'})" for drop in chosen)
    return f"; in this order, with the KL divergence once each was gone too: {told}" if told else ""


def _stability(run: Path) -> str:
    found = step_files.find(run / "stability" / "stability.json")
    lines = [f"- {markdown.escaped(line)}" for line in stability_lines(found)] if found else []
    return "## Stability of the choice\n\n" + "\n".join(lines) if found else ""


def _tried(run: Path) -> str:
    """Return how the sizes were chosen: the best candidates, and what single changes predicted of them."""
    tried = step_files.find(run / "plan" / "tried.json")
    if not tried:
        return ""
    every, even, taken = tried["candidates"], tried["even"], tried["taken"]
    best = sorted(range(len(every)), key=lambda i: _or_infinite(every[i]["kl"]))[:BEST]
    shown = best + [i for i in (taken, even) if i is not None and i not in best]
    rows = []
    for i in dict.fromkeys(shown):
        marks = ", ".join(mark for mark, number in (("even split", even), ("taken", taken)) if number == i)
        numbers = [_number(every[i].get(name), 4) for name in ("kl", "reconstructed_kl")]
        rows.append(markdown.row(_sizes(every[i]) + (f" ({marks})" if marks else ""), *numbers))
    given_up = sum(row["kl"] is None for row in every)
    text = f"Widths {tried['widths']}: {len(every)} candidates tried on validation text, each part repaired for itself"
    text += f"; {given_up} of them were given up on the way." if given_up else "."
    if ranks := tried.get("rank_correlation"):
        listed = ", ".join(f"{name} {value:.2f}" for name, value in ranks.items())
        text += f" Rank correlation of the local errors of single changes with their measured KL: {listed}."
    return f"## How the sizes were chosen\n\n{text}\n\n" + markdown.table(["candidate", "KL", "KL reconstructed"], rows)


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _sizes(candidate: Mapping[str, Any]) -> str:
    """Return a candidate of tried.json as one cell. Sizes that differ between layers become a range."""
    if "level" in candidate:
        level = candidate["level"]
        return f"{level['layer']} layers, ffn {level['ffn']}, kv heads {level['kv_head']}"
    kept = [layer for layer in candidate["layers"] if layer]
    parts = [f"{len(kept)} layers"]
    for key, name in (
        ("ffn", "ffn"),
        ("kv_head", "kv heads"),
        ("ffn_bits", "ffn bits"),
        ("attention_bits", "attn bits"),
    ):
        values = [layer[key] for layer in kept if layer.get(key) is not None]
        if values:
            parts.append(f"{name} {span(values if len(set(values)) > 1 else values[0])}")
    return ", ".join(parts)


def _requantized(run: Path) -> str:
    done = step_files.find(run / "prune" / "done.json")
    if not done or not done["requantized"]:
        return ""
    errors = done["requantized"]
    worst = max(errors, key=errors.get)
    span = f"{min(errors.values()):.2%} to {errors[worst]:.2%} ({markdown.code(worst)})"
    text = f"{len(errors)} matrices were quantized again, relative error {span}"
    dense = f"; left dense: {', '.join(done['dense'])}" if done["dense"] else ""
    return f"## Requantization\n\n{text}{dense}. All other codes are those of the original."


def _recovery(run: Path) -> str:
    done = step_files.find(run / "recover" / "recovery.json")
    if not done:
        return ""
    names = sorted(done["domains"]) if len(done["domains"]) > 1 else []
    losses = [(p["loss"], *(p["losses"][n] for n in names), p.get("train_loss")) for p in done["curve"]]
    cells = [["-" if loss is None else f"{loss:.5f}" for loss in line] for line in losses]
    rows = [markdown.row(p["step"], *line) for p, line in zip(done["curve"], cells, strict=True)]
    options, kept = done["options"], done["kept"]
    outcome = "no better, so the pruned model was kept" if kept == "pruned" else f"better, {kept} kept"
    text = (
        f"{options['method']}, {options['steps']} steps, best at {done['best_step']}: validation KL "
        f"{done['kl_before']:.5f} -> {done['kl_after']:.5f} nats per token, measured on the packed result: {outcome}."
    )
    text += _each_step(options)
    if options["on_policy"]:
        text += f" The student wrote {options['on_policy']:.0%} of the rows itself ({options['kind']} divergence)."
    if "trained" in done["kl"]:
        text += f" Merging and packing: {done['kl_unmerged']:.5f} -> {done['kl']['trained']:.5f}"
        same = done["kl"].get("same scales")
        text += "." if same is None else f"; with the scales that were there {same:.5f}."
    if done["local"]:
        text += f" Block by block before that: {done['kl']['pruned']:.5f} -> {done['kl']['local']:.5f}."
    head = ["step", "validation KL", *(f"KL of {name}" for name in names), "training loss"]
    return f"## Recovery\n\n{text}\n\n" + (markdown.table(head, rows) if rows else "")


def _each_step(options: Mapping[str, Any]) -> str:
    """Return how a step of recovery used memory, because mlx-pare may have chosen that; older runs do not say it."""
    batches, rows = options.get("accumulate"), options.get("batch")
    if batches is None or rows is None:
        return ""
    parts = [f"{batches * rows} rows" + (f" in {batches} batches" if batches > 1 else "")]
    if options.get("grad_checkpoint"):
        parts.append("activations computed twice")
    if options.get("top"):
        parts.append(f"the teacher's {options['top']} most likely tokens")
    return f" Each step: {', '.join(parts)}."


def _speed(run: Path) -> str:
    done = step_files.find(run / "bench" / "bench.json")
    if not done:
        return ""
    rows = []
    for title, m in zip(("original", "result"), done["models"], strict=True):
        cells = [
            f"{m[n]['median']:.1f} ({m[n]['min']:.1f}-{m[n]['max']:.1f})"
            for n in ("prefill_tokens_per_s", "decode_tokens_per_s")
        ]
        ratio = m["ratio"]["decode_tokens_per_s"]
        rows.append(
            markdown.row(
                title,
                *cells,
                f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})",
                gb(m["peak_bytes"]["median"]),
            )
        )
    turns = f"{done['trials']} trials in turn, prompt {done['prompt_tokens']}, {done['new_tokens']} new tokens"
    note = f"{turns}; {done['backend']}."
    head = ["", "prefill tok/s", "decode tok/s", "decode ratio", "peak memory"]
    return f"## Speed\n\n{markdown.table(head, rows)}\n\n{note}"


def _gguf(run: Path) -> str:
    done = step_files.find(run / "export" / "export.json")
    if not done:
        return ""
    if done["path"] is None:
        return f"## GGUF\n\nThere is no GGUF file: {markdown.escaped(done['why'])}."
    facts = [done["kind"], f"architecture {done['architecture']}", gb(done["bytes"]), f"{done['tensors']} tensors"]
    text = f"{markdown.code(done['path'])}: {', '.join(facts)}."
    if done.get("imatrix"):
        weighed = "by an importance matrix (`export/imatrix.gguf`) of the calibration text"
        text += f" It was quantized by llama.cpp, its errors weighed {weighed}."
    checked = done.get("verify") or {}
    if checked.get("checked"):
        text += (
            f" llama.cpp against MLX on the same tokens: largest logit difference {checked['max_abs_difference']:.2g}, "
            f"same top token {checked['same_argmax']:.1%}."
        )
    else:
        text += f" Not compared in llama.cpp: {markdown.escaped(checked.get('reason', 'not asked'))}."
    notes = "".join(f"\n- {markdown.escaped(note)}" for note in done.get("notes", ()))
    return f"## GGUF\n\n{text}" + (f"\n{notes}" if notes else "")


def _macs(run: Path, manifest: Manifest) -> str:
    """Return which Macs hold the original, the result and its GGUF file: a sentence, a table and a picture."""
    fits = step_files.find(run / "export" / "fits.json")
    if not fits:
        return ""
    rows, original = fits["rows"], by_memory(fits.get("original_rows") or [])
    sizes = by_memory(rows)
    fitting = [size for size, row in sizes.items() if row["fits"]]
    text = (
        f"At {fits['context']} tokens of context the MLX result fits {sum(row['fits'] for row in rows)} of {len(rows)} "
        f"Macs; the original {fits['original_fits']}."
    )
    if fitting:
        text += f" Smallest: {fitting[0]:g} GB ({gb(sizes[fitting[0]]['headroom_bytes'])} free)."
    if gained := [f"{size:g} GB" for size in fitting if size in original and not original[size]["fits"]]:
        text += f" Memory sizes on which only the result fits: {', '.join(gained)}."
    if fits["gguf_rows"]:
        text += f" The GGUF file fits {sum(row['fits'] for row in fits['gguf_rows'])}."
    columns = {"original": original, "result (MLX)": sizes, "GGUF": by_memory(fits["gguf_rows"])}
    columns = {title: found for title, found in columns.items() if found}  # older runs say nothing about the original
    lines = [
        markdown.row(f"{n:g} GB", _budget(sizes[n]), *(_room(found[n]) for found in columns.values())) for n in sizes
    ]
    table = markdown.table(["memory", "GPU budget", *columns], lines)
    return f"## Macs\n\n{text}\n\n{table}\n\n{MACS_NOTE}\n\n{_picture(run, fits, manifest)}"


def _budget(row: Mapping[str, Any]) -> str:
    return gb(row["budget_bytes"]) + ("?" if "budget" in row.get("unsure", ()) else "")


def _room(row: Mapping[str, Any]) -> str:
    """Return one cell: the verdict, what is left or missing, and the longest context."""
    verdict, amount = verdict_of(row), abs(row["headroom_bytes"])
    size = f"{gb(amount)} ({amount / GIB:.2f} GiB)"
    longest = f"up to {row['max_context']:,} tokens" if row["max_context"] else "no context fits"
    return f"over by {size}; {longest}" if verdict == "over" else f"{verdict}, {size} left; {longest}"


def _picture(run: Path, fits: Mapping[str, Any], manifest: Manifest) -> str:
    """Draw the same as a picture next to the report. If something for drawing is missing, the report is written without
    it."""
    found, path = {"model": manifest.called, "runtime": "mlx", **fits}, run / "report-fit.svg"
    try:
        if not drawn(found, path):
            path = draw(found, path, edited.write)
    except PareError as error:
        return markdown.escaped(f"No picture: {error}")
    return f"![Memory of the original and the result on Macs, against what their GPUs may use]({path.name})"


def _warnings(run: Path) -> str:
    steps = [place / step for place in (run, *sorted(run.glob("stage-*"))) for step in ("prune", "recover")]
    found = [w for step in steps for w in (step_files.find(step / "check.json") or {}).get("warnings", [])]
    return "## Warnings\n\n" + "\n".join(f"- {markdown.escaped(w)}" for w in found) if found else ""


def _steps(manifest: Manifest) -> str:
    peaks = {name: (s.peak_bytes, s.peak_mlx_bytes, s.swap_growth_bytes) for name, s in manifest.steps.items()}
    rows = [
        markdown.row(n, duration(s.seconds), *(gb(b) if b else "-" for b in peaks[n]))
        for n, s in manifest.steps.items()
    ]
    return (
        "## Steps\n\n" + markdown.table(["step", "time", "peak memory", "... of MLX", "more swap"], rows)
        if rows
        else ""
    )
