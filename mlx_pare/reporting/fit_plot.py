"""The picture of `fit`: what a model takes on every Mac, next to what its GPU may use, and how it grows with the
context.

Above is one bar per Mac (per memory size if there are many) on a track as long as the budget. The dark end of the track
is its last tenth, in which a model is called tight. The hatched part is too much. Below is memory over the context. The
picture is drawn on its own matplotlib Figure, without pyplot: no window opens, and no setting outlives the call.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from ..base.errors import PareError, UsageError
from ..capacity.planner import TIGHT
from ..store.atomic import create_file, refuse_existing
from .fit_bars import COLUMNS, Bar, bars_of, describe, finding, heading, parts_of, slug, use

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png", ".pdf")
GB = 1e9

# Neighbours in a stack differ in lightness, not in hue alone: told apart without seeing colours, and in a grey print.
COLOURS = {
    "weights": "#2b62a3",
    "KV cache and states": "#e69f00",
    "training": "#e69f00",
    "attention scores": "#96406f",
    "other activations": "#a9c9e2",
}
VERDICTS = {"fits": "#006b54", "tight": "#7a5600", "over": "#a83200", "unknown": "#444444"}
TRACK, LAST_TENTH, INK, QUIET = "#ebebeb", "#c4c4c4", "#1a1a1a", "#555555"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],  # Verdana: on every Mac, and as wide
    "font.size": 9.0,
    "text.parse_math": False,  # a $ in the name of a model is a $
    "hatch.linewidth": 1.2,
    "svg.fonttype": "none",  # text stays text, to be searched and read aloud
    "svg.hashsalt": "mlx-pare",
    "savefig.dpi": 160.0,
}

# Inches. Text is as large in a picture of one bar as in one of 25, so that its places are known beforehand.
WIDTH, MARGIN, TABLE, HEAD, FOOT = 10.5, 0.25, 3.85, 1.4, 0.6
LINE, APART, GROWTH, BETWEEN = 0.21, 0.35, 3.1, 1.2
LETTER, TICK = 0.078, 0.42  # the width of a letter, and of a number under an axis
TITLE = {"loc": "left", "fontsize": 10, "fontweight": "bold", "color": INK}  # of a panel
ENDS = (0.75, 1.7, 2.55, 3.65)  # of the columns next to the bars, to the right of their panel


def draw(found: Mapping[str, Any], path: Path, write: Callable[[Path, bytes], Path] = create_file) -> Path:
    """Draw what ``fit`` returned, as SVG, PNG or PDF. The same input gives the same bytes.

    Args:
        found: of ``fit``. With ``original_rows`` and ``original_curve``, as a run has them, the original is drawn next
            to the result.
        path: the picture; its suffix sets the format.
        write: writes the bytes to the path, and returns where they are. Default: a new file.
    Returns:
        The file that was written.
    Raises:
        UsageError: the suffix is another one.
        Refused: the file exists (from the default ``write``).
        PareError: nothing can be written there, or matplotlib is missing.
    """
    path = Path(path)
    _check_place(path)
    try:
        return write(path, _rendered(found, path.suffix.lower().removeprefix(".")))
    except OSError as error:
        raise PareError(f"cannot write {path}: {error.strerror}", "write elsewhere") from error


def preflight(path: Path) -> None:
    """Check what can be known of a new picture before there is something to draw. Raises as ``draw``."""
    _check_place(path)
    refuse_existing(path)


def _check_place(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"cannot draw a picture into {path.name!r}", f"name it {path.stem}.svg, .png or .pdf")
    if not path.parent.is_dir():
        raise PareError(f"no directory {path.parent} to write {path.name} into", "make it first, or write elsewhere")


def drawn(found: Mapping[str, Any], path: Path) -> bool:
    """Tell whether ``path`` is already the SVG picture of this, by its description. This does not import matplotlib."""
    return path.is_file() and _desc(found) in path.read_text("utf-8", errors="replace")


def _desc(found: Mapping[str, Any]) -> str:
    """Return the element that screen readers look for."""
    return f"<desc>{escape(describe(found))}</desc>"


def figure(found: Mapping[str, Any]) -> Figure:
    """Return the picture, not yet in a file."""
    with _style():
        from matplotlib.figure import Figure

        bars = bars_of(found)
        curve = len(found.get("curve") or ()) > 1  # one point is no curve
        places = list(accumulate(1 if bar.second else 1 + APART for bar in bars))
        tall, below = LINE * (places[-1] - places[0] + 1.2), curve * (BETWEEN + GROWTH)
        left = MARGIN + LETTER * max(len(bar.label) for bar in bars)
        left = max(left, 0.8)  # the numbers of the lower panel
        height = HEAD + tall + below + FOOT
        fig = Figure(figsize=(WIDTH, height))

        def panel(bottom: float, tall: float) -> Axes:
            return fig.add_axes((left / WIDTH, bottom / height, 1 - (left + TABLE) / WIDTH, tall / height))

        _head(fig, found, bars)
        _bars(panel(FOOT + below, tall), bars, places)
        if curve:
            _growth(panel(FOOT, GROWTH), found, bars)
    return fig


@contextmanager
def _style() -> Iterator[None]:
    """Set matplotlib's defaults, whatever the user's matplotlibrc says, and restore the settings afterwards."""
    try:
        import matplotlib
    except ImportError as error:
        raise PareError(f"cannot draw without matplotlib: {error}", "install it: pip install matplotlib") from error
    shipped = {name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")}
    with matplotlib.rc_context(shipped | STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # DejaVu lacks some letters; the reader of the SVG may have them
        yield


def _rendered(found: Mapping[str, Any], kind: str) -> bytes:
    """Return the bytes of a file, with a description for readers who cannot see it, and without a date."""
    picture, title, told = figure(found), heading(found, bars_of(found)), describe(found)
    about = {
        "svg": {"Title": title, "Description": told, "Creator": "mlx-pare", "Date": None},
        "png": {"Title": title, "Description": told, "Software": "mlx-pare"},
        "pdf": {"Title": title, "Subject": told, "Creator": "mlx-pare", "CreationDate": None},
    }[kind]
    buffer = BytesIO()
    with _style():
        picture.savefig(buffer, format=kind, metadata=about, facecolor="white")
    if kind != "svg":
        return buffer.getvalue()
    text = buffer.getvalue().decode().replace("</title>", f"</title>\n {_desc(found)}", 1)
    return text.replace("<svg ", '<svg role="img" ', 1).encode()


# ---- the drawing ----


def _head(fig: Figure, found: Mapping[str, Any], bars: Sequence[Bar]) -> None:
    """Draw the title, the use, and the meaning of the colours."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    left, height = MARGIN / WIDTH, fig.get_figheight()
    fig.text(left, 1 - 0.18 / height, heading(found, bars), size=12, weight="bold", va="top", color=INK, gid="title")
    fig.text(left, 1 - 0.47 / height, f"{finding(found)}; {use(found, bars)}", va="top", color=QUIET)
    handles = [Patch(fc=colour, label=n) for n, colour in COLOURS.items() if any(bar.parts.get(n) for bar in bars)]
    handles.append(Line2D([], [], color=INK, marker="|", markersize=11, mew=2.2, ls="", label="budget of the GPU"))
    handles.append(Patch(fc=LAST_TENTH, label="last tenth: tight"))
    if any(bar.verdict == "over" for bar in bars):
        handles.append(Patch(fc="white", ec=VERDICTS["over"], hatch="/////", label="too much"))
    if len(found.get("original_curve") or ()) > 1:
        handles.append(Line2D([], [], color=INK, ls=(0, (3, 1.5)), label="original"))
    place = {"loc": "upper left", "bbox_to_anchor": (left, 1 - 0.74 / height), "borderaxespad": 0, "borderpad": 0}
    look = {"frameon": False, "handlelength": 1.3, "handletextpad": 0.5, "columnspacing": 1.3}
    fig.legend(handles=handles, ncols=len(handles), **place, **look)


def _bars(axes: Axes, bars: Sequence[Bar], places: Sequence[float]) -> None:
    """Draw one bar per Mac on its track, and next to it the numbers."""
    end = _scale(bars)
    for bar, place in zip(bars, places, strict=True):
        _track(axes, bar, place, end)
        start = 0.0
        for name, size in bar.parts.items():
            gid = f"bar-{bar.key}-{slug(name)}"
            axes.barh(place, size / GB, 0.6, left=start, color=COLOURS[name], lw=0, zorder=3, gid=gid)
            start += size / GB
        if start > bar.budget / GB:
            look = {"fc": "#ffffff99", "ec": VERDICTS["over"], "hatch": "/////", "gid": f"over-{bar.key}"}
            axes.barh(place, start - bar.budget / GB, 0.6, left=bar.budget / GB, lw=0.8, zorder=4, **look)
        for x, cell in zip(ENDS, bar.cells, strict=True):
            verdict = {"color": VERDICTS[bar.verdict], "weight": "bold"}
            _beside(axes, place, x, cell, **verdict if cell == bar.verdict else {"color": INK})
        if bar.unsure:
            _beside(axes, place, ENDS[2] + 0.03, "?", "left", color=INK)
    for x, column in zip(ENDS, COLUMNS, strict=True):
        _above(axes, x, column)
    axes.set_title("Memory on each Mac", **TITLE, pad=6)
    axes.set_xlim(0, end)
    axes.set_ylim(places[-1] + 0.6, places[0] - 0.6)
    axes.set_yticks(places, [bar.label for bar in bars])
    axes.tick_params(axis="y", length=0, pad=6)
    axes.set_xlabel("memory, GB", color=QUIET)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _beside(axes: Axes, y: float, inches: float, text: str, ha: str = "right", **look: Any) -> None:
    """Write a line of text, this far to the right of the axes."""
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(text, (1, y), (72 * inches, 0), ha=ha, va="center", **place, **look)


def _above(axes: Axes, inches: float, text: str, ha: str = "right") -> None:
    """Write the head of a column, this far to the right of the axes."""
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(text, (1, 1), (72 * inches, 6), ha=ha, size=8, color=QUIET, **place)


def _scale(bars: Sequence[Bar]) -> float:
    """Return where the axis ends, in GB. Budgets far above what the model takes would press the bars flat."""
    totals, budgets = [bar.total for bar in bars], [bar.budget for bar in bars]
    return 1.02 * min(max(budgets + totals), max(2.5 * max(totals), min(budgets))) / GB


def _track(axes: Axes, bar: Bar, place: float, end: float) -> None:
    """Draw the budget as a track: its last tenth darker, its end marked, or an arrow if the end is off the scale."""
    budget, tight = bar.budget / GB, TIGHT * bar.budget / GB
    axes.barh(place, min(tight, end), 0.95, color=TRACK, zorder=1)
    axes.barh(place, max(min(budget, end) - tight, 0), 0.95, left=tight, color=LAST_TENTH, zorder=1)
    look = {"color": INK, "zorder": 5, "clip_on": False, "gid": f"budget-{bar.key}"}
    if budget <= end:
        axes.plot([budget] * 2, [place - 0.5, place + 0.5], lw=2.2, solid_capstyle="butt", **look)
    else:
        axes.plot([end], [place], marker=">", markersize=6, **look)


def _growth(axes: Axes, found: Mapping[str, Any], bars: Sequence[Bar]) -> None:
    """Draw memory over the context, and across it the budgets, each with the longest context that fits."""
    train, asked = bool(found.get("train")), found["context"]
    points, before = (_between(found.get(key) or [], train) for key in ("curve", "original_curve"))
    contexts = [point["context"] for point in points]
    stack = [parts_of(point, train) for point in points]
    for name in stack[0]:
        lower, upper = ([_up_to(parts, name, inclusive) for parts in stack] for inclusive in (False, True))
        look = {"color": COLOURS[name], "lw": 0, "zorder": 2}
        axes.fill_between(contexts, lower, upper, gid=f"area-{slug(name)}", **look)
    if before:
        line = [[point["context"] for point in before], [point["total_bytes"] / GB for point in before]]
        axes.plot(*line, color=INK, ls=(0, (3, 1.5)), lw=1.4, zorder=4, gid="original")
    top = _top(bars, max(point["total_bytes"] for point in points + before))
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(asked, contexts[0]), max(asked, contexts[-1]))
    axes.set_ylim(0, top)
    _asked(axes, asked, contexts[-1])
    _ticks(axes, contexts[-1])
    whole = "scores_bytes" in points[0] or not any(bar.parts.get("attention scores") for bar in bars)
    what = "How it grows with the context" if whole else "How it grows with the context (activations with scores)"
    axes.set_title(what, **TITLE, pad=22)
    axes.set_xlabel(f"{'tokens per row' if train else 'context, tokens'} (k = 1,024)", color=QUIET)
    axes.set_ylabel("memory, GB", color=QUIET)
    axes.spines[["top", "right"]].set_visible(False)
    _limits(axes, bars, top)


def _up_to(parts: Mapping[str, float], name: str, inclusive: bool) -> float:
    """Return the GB of a stack below a part, or including it."""
    names = list(parts)
    return sum(parts[n] for n in names[: names.index(name) + inclusive]) / GB


def _asked(axes: Axes, asked: int, made_for: float) -> None:
    """Draw a line at the context that was asked for, and a note if the model was not made for that many tokens."""
    place, (left, right) = axes.transData.transform((asked, 0))[0], axes.bbox.intervalx
    ha = "left" if place < left + 40 else "right" if place > right - 40 else "center"
    axes.axvline(asked, color=INK, lw=1.2, ls=(0, (1, 1.5)), zorder=3, gid="asked")
    top = axes.get_ylim()[1]
    axes.annotate(f"asked: {asked:,}", (asked, top), (0, 6), textcoords="offset points", ha=ha, color=INK)
    if asked > made_for:
        look = {"rotation": 90, "color": QUIET, "bbox": {"fc": "white", "lw": 0, "pad": 1}, "zorder": 7}
        said = f"made for {made_for:,.0f} tokens"
        axes.annotate(said, (made_for, 0), (5, 6), textcoords="offset points", va="bottom", **look)


def _top(bars: Sequence[Bar], most: float) -> float:
    """Return where the axis ends, in GB: it shows near budgets, and leaves out what only far longer contexts take."""
    now = max(bar.total for bar in bars)
    most = max(now, min(most, 4 * now))
    return 1.1 * max([most, *(bar.budget for bar in bars if bar.budget < 1.5 * most)]) / GB


def _between(curve: Sequence[Mapping[str, Any]], bent: bool, steps: int = 16) -> list[dict[str, float]]:
    """Add points between the known ones of a curve: a straight line over the context bends on an axis of doublings.

    ``bent``: training grows with the square of the context, which a third point determines.
    """
    found = [dict(point) for point in curve[:1]]
    for i, (a, b) in enumerate(pairwise(curve)):
        c = curve[i - 1] if i else curve[-1]
        x, y, z = (point["context"] for point in (a, b, c))
        for at in (x + (y - x) * step / steps for step in range(1, steps + 1)):
            point = {"context": at}
            for key in b.keys() - point.keys():
                slope = (b[key] - a[key]) / (y - x)
                bend = ((c[key] - b[key]) / (z - y) - slope) / (z - x) if bent and z != y else 0
                point[key] = a[key] + slope * (at - x) + bend * (at - x) * (at - y)
            found.append(point)
    return found


def _ticks(axes: Axes, made_for: int) -> None:
    """Write doublings under the axis, as many as there is room for, and what the model was made for."""
    low, high = axes.get_xlim()
    room = TICK * math.log2(high / low) / (axes.get_position().width * WIDTH)  # of a number, in doublings
    powers = [1 << i for i in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    shown = powers[:: math.ceil(room)] or [low]
    if all(abs(math.log2(made_for / tick)) > room for tick in shown):
        shown.append(made_for)
    axes.set_xticks(shown, [f"{c // 1024}k" if c % 1024 == 0 else f"{c:,}" for c in shown])
    axes.minorticks_off()


def _limits(axes: Axes, bars: Sequence[Bar], top: float) -> None:
    """Draw budgets as lines, named at their ends, each with a mark at the longest context that fits. Of the budgets
    below the weights, the nearest is enough."""
    paired = any(bar.second for bar in bars)
    alike: dict[float, list[Bar]] = {}
    for bar in sorted(bars, key=lambda bar: bar.budget):
        if bar.second == paired:
            alike.setdefault(bar.budget / GB, []).append(bar)
    small = [budget for budget, (bar, *_) in alike.items() if budget < bar.parts["weights"] / GB][:-1]
    shown = [budget for budget in alike if budget <= top and budget not in small]
    gap = 0.18 * top / GROWTH
    for budget, place in zip(shown, _spread(shown, gap * 1.5, gap, top - gap), strict=True):
        _limit(axes, budget, alike[budget], place)
    if small:
        _beside(axes, gap / 2, 0.25, f"{len(small)} smaller budget{'s' * (len(small) > 1)}", "left", color=QUIET)
        _beside(axes, gap / 2, ENDS[-1], "none", color=QUIET)
    off = len(alike) - len(shown) - len(small)
    _above(axes, 0.25, f"{off} larger budget{'s' * (off > 1)} off the scale" if off else "budget", "left")
    _above(axes, ENDS[-1], "longest context \u25c6")


def _limit(axes: Axes, budget: float, bars: Sequence[Bar], place: float) -> None:
    """Draw one budget across the panel, with its label at ``place``."""
    key, longest = bars[0].key, min(bar.longest or 0 for bar in bars)
    axes.axhline(budget, color="#ffffffb0", lw=2.4, zorder=4)
    axes.axhline(budget, color=INK, lw=0.9, zorder=5, gid=f"limit-{key}")
    axes.plot([1, 1.03], [budget, place], color=QUIET, lw=0.6, transform=axes.get_yaxis_transform(), clip_on=False)
    if longest >= axes.get_xlim()[0]:
        look = {"marker": "D", "markersize": 6, "color": INK, "mec": "white", "clip_on": False, "zorder": 6}
        axes.plot([longest], [budget], gid=f"longest-{key}", **look)
    more = f" and {len(bars) - 1} more" if len(bars) > 1 else ""
    _beside(axes, place, 0.25, bars[0].name + more, "left", color=INK)
    _beside(axes, place, ENDS[-1], f"{longest:,}" if longest else "none", color=INK)


def _spread(places: Sequence[float], low: float, gap: float, high: float) -> list[float]:
    """Return places for labels, as near to where they belong as a gap between them allows; ``places`` ascend."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + gap if found else low))
    for i in reversed(range(len(found))):
        found[i] = min(found[i], high)
        high = found[i] - gap
    return found
