"""How far a choice depends on its text, in sentences for the terminal and the report."""

from __future__ import annotations

from typing import Any

from ..base.units import readable


def stability_lines(found: dict[str, Any]) -> list[str]:
    """Return the answers of ``stability``, one sentence each."""
    lines = []
    for name, of in found["criteria"].items():
        lines.append(
            f"{name}: {of['enough']:,} tokens would have been enough (rank correlation > 0.99, or the same units)"
            if of["enough"]
            else f"{name}: half of the {found['tokens']:,} tokens would not have been enough; more may choose otherwise"
        )
        if "float" in of:
            same = ", ".join(f"{of_axis['same']:.1%} of {axis}" for axis, of_axis in of["float"]["axes"].items())
            lines.append(f"{name}: the quantized model keeps the same units as the float one: {same}")
    if cost := found["cost"]:
        ppl, kl, draws = cost["perplexity"], cost["kl_divergence"], found["draw_tokens"]
        how = "reconstructed" if cost["reconstructed"] else "not reconstructed"
        lines.append(
            f"{len(draws)} draws of {draws[0]:,} tokens, {cost['criterion']}, {how}: perplexity "
            f"{readable(ppl['mean'], 3, ppl['stdev'])}, KL {kl['mean']:.4f} ± {kl['stdev']:.4f} "
            "(standard deviation between draws)"
        )
    return lines
