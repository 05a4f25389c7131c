"""How results look on a terminal: the tables of the commands."""

from __future__ import annotations

from typing import Any

from . import console

FIT_COLUMNS = ("<mac", "budget", "weights", "KV", "work", "total", "<fits", "headroom", "max context", "decode tok/s")


def fit_table(title: str, rows: list[dict[str, Any]], caption: str | None = None) -> None:
    """One line per Mac."""
    console.table(title, [*FIT_COLUMNS, "prefill tok/s"], [_fit_row(row) for row in rows], caption)


def _fit_row(row: dict[str, Any]) -> list[Any]:
    sizes = ("budget_bytes", "weights_bytes", "kv_bytes", "activation_bytes", "total_bytes")
    speeds = [None if row[k] is None else f"{row[k]:.0f}" for k in ("decode_tokens_per_s", "prefill_tokens_per_s")]
    fits = "yes" if row["fits"] else "no"
    spare = console.gb(row["headroom_bytes"])
    return [row["mac"], *(console.gb(row[k]) for k in sizes), fits, spare, row["max_context"], *speeds]


def show_summary(summary: dict[str, Any]) -> None:
    """What a run has made: contenders, speed, Macs, paths, verdict."""
    from .artifacts import CONTENDERS  # pydantic: not for commands that only print a table

    rows = []
    for name, title in CONTENDERS:
        if (m := summary["contenders"].get(name)) is not None:
            kl = None if m["kl_divergence"] is None else f"{m['kl_divergence']:.4f}"
            rows.append(
                [
                    title,
                    console.count(m["parameters"]),
                    console.gb(m["bytes"]),
                    f"{m['perplexity']:.2f} ± {m['perplexity_stderr']:.2f}",
                    kl,
                ]
            )
    console.table("Contenders", ["<model", "parameters", "weights", "perplexity", "KL"], rows)
    if summary["bench"]:
        ratio = summary["bench"]["models"][1]["ratio"]
        speeds = [m["decode_tokens_per_s"]["median"] for m in summary["bench"]["models"]]
        console.say(
            f"decode {speeds[0]:.1f} -> {speeds[1]:.1f} tok/s (x {ratio['decode_tokens_per_s']['median']:.2f}), "
            f"prefill x {ratio['prefill_tokens_per_s']['median']:.2f}"
        )
    fits = summary["fits"]
    fitting = [r["mac"] for r in fits["rows"] if r["fits"]]
    console.say(
        f"fits {len(fitting)} of {len(fits['rows'])} Macs at {fits['context']} tokens (original: "
        f"{fits['original_fits']}){'; smallest ' + fitting[0] if fitting else ''}"
    )
    for name in ("model", "gguf", "report"):
        console.say(f"{name}: {summary[name]}")
    console.say(summary["verdict"].replace("**", ""))


def plain(value: Any) -> str:
    """A value of inspect in one cell."""
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def show_shape(made: dict[str, Any]) -> dict[str, Any]:
    """Sizes before and after a cut; returns them unchanged."""
    before, after = made["before"], made["after"]
    written = {"parameters": console.count, "non_embedding": console.count, "bytes": console.gb}
    rows = [[k.replace("_", " "), written.get(k, str)(before[k]), written.get(k, str)(after[k])] for k in before]
    console.table(made["asked"], ["<", "before", "after"], rows, caption="neighbours: " + "; ".join(made["neighbours"]))
    return made
