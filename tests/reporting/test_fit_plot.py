"""The picture of fit: every Mac is named, every length is true to the bytes, and a file is whole or not there."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.artist import Artist

from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.capacity import macs
from mlx_pare.reporting import fit_plot
from mlx_pare.reporting.fit_bars import bars_of, by_memory, describe, heading
from mlx_pare.store import atomic, edited

GB = 10**9
SVG = "{http://www.w3.org/2000/svg}"
MAC_SIZES = {"m4-10c-24gb": (24, 19), "m4-pro-20c-48gb": (48, 40), "m4-max-40c-64gb": (64, 56)}  # GiB, GB of budget

ROOT = Path(__file__).resolve().parents[2]
HERE = [str(ROOT), str(ROOT / "tests" / "support")]  # where this file and its helpers are found


def row(mac: str, memory: float, budget: int, weights: int = 18, **changes: Any) -> dict[str, Any]:
    """A row as fit makes it, in round numbers: 18 GB of weights, 2 of cache, 1 of scores, 1 of other activations."""
    total = weights + 4
    found = {
        "mac": mac, "chip": "M5" if "m5" in mac else "M4", "memory_gb": memory, "budget_bytes": budget * GB,
        "weights_bytes": weights * GB, "kv_bytes": 2 * GB, "scores_bytes": GB, "activation_bytes": 2 * GB,
        "total_bytes": total * GB, "headroom_bytes": (budget - total) * GB, "fits": total <= budget, "unsure": [],
        "max_context": 0 if budget < weights + 2 else min(4096 * (budget - weights - 2), 32768),
        "verdict": "over" if total > budget else "tight" if total > 0.9 * budget else "fits",
    }  # fmt: skip
    return found | changes


def curve(weights: int = 18) -> list[dict[str, int]]:
    contexts = [1024 << i for i in range(6)]
    found = [{"context": c, "weights_bytes": weights * GB, "kv_bytes": c * GB // 4096} for c in contexts]
    return [p | {"activation_bytes": 2 * GB, "total_bytes": p["weights_bytes"] + p["kv_bytes"] + 2 * GB} for p in found]


def found_of(rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    found = {"model": "novelist-32b", "form": "4 bits in groups of 64", "context": 8192, "batch": 1, "runtime": "mlx"}
    return found | {"train": None, "here": None, "rows": rows, "curve": curve()} | changes


@pytest.fixture
def three() -> dict[str, Any]:
    return found_of([row(mac, *sizes) for mac, sizes in MAC_SIZES.items()])


def every(**changes: Any) -> dict[str, Any]:
    """A row for each Mac that there is."""
    rows = [row(m.name, m.memory_gb, int(0.75 * m.memory_gb), chip=m.chip, **changes) for m in macs.every()]
    return found_of(rows)


@pytest.fixture
def unknown() -> dict[str, Any]:
    """Nobody knows what the model takes besides its weights."""
    nothing = dict.fromkeys(("kv_bytes", "activation_bytes", "scores_bytes", "total_bytes", "max_context", "fits"))
    rows = [row(mac, *sizes, **nothing, verdict="unknown") for mac, sizes in MAC_SIZES.items()]
    rows.append(row("m4-10c-16gb", 16, 12, **nothing | {"fits": False}, verdict="over"))
    return found_of(rows, curve=[])


def artists(found: dict[str, Any], start: str) -> dict[str, Artist]:
    """What was drawn under ids that begin so."""
    drawn = fit_plot.figure(found).findobj(lambda a: (a.get_gid() or "").startswith(start))
    ids = [a.get_gid() for a in drawn]
    assert len(set(ids)) == len(ids)
    return {a.get_gid().removeprefix(start): a for a in drawn}


def words(path: Path) -> list[str]:
    return ["".join(element.itertext()).strip() for element in ET.parse(path).iter(f"{SVG}text")]


def ids(path: Path, start: str) -> list[str]:
    return [e.get("id") for e in ET.parse(path).iter() if (e.get("id") or "").startswith(start)]


# ---- the bars ----

PARTS = {"weights": 18, "kv-cache-and-states": 2, "attention-scores": 1, "other-activations": 1}


def test_every_mac_is_named_and_has_a_budget(three, tmp_path):
    path = fit_plot.draw(three, tmp_path / "fit.svg")
    assert set(MAC_SIZES) <= set(words(path))
    assert ids(path, "budget-") == [f"budget-{mac}" for mac in MAC_SIZES]
    assert {"over", "fits", "-3.00", "18.00", "34.00", "19.00", "40.00", "56.00"} <= set(words(path))


def test_bars_are_as_long_as_their_bytes(three):
    drawn = artists(three, "bar-")
    for mac in MAC_SIZES:
        ends = 0.0
        for part, size in {
            "weights": 18,
            "kv-cache-and-states": 2,
            "attention-scores": 1,
            "other-activations": 1,
        }.items():
            bar = drawn[f"{mac}-{part}"]
            assert (bar.get_x(), bar.get_width()) == pytest.approx((ends, size))
            ends += size
    assert len(drawn) == 4 * len(MAC_SIZES)


def test_budget_is_where_it_belongs_and_what_is_over_is_hatched(three):
    marks = artists(three, "budget-")
    assert {mac: mark.get_xdata()[0] for mac, mark in marks.items()} == {m: b for m, (_, b) in MAC_SIZES.items()}
    over = artists(three, "over-")
    assert list(over) == ["m4-10c-24gb"]
    assert (over["m4-10c-24gb"].get_x(), over["m4-10c-24gb"].get_width()) == pytest.approx((19, 3))
    assert over["m4-10c-24gb"].get_hatch()


def test_budgets_far_off_are_arrows_at_the_edge():
    found = found_of([row("m4-10c-24gb", 24, 19), row("m3-ultra-80c-512gb", 512, 460)])
    mark = artists(found, "budget-")["m3-ultra-80c-512gb"]
    assert mark.get_xdata()[0] == mark.axes.get_xlim()[1] == pytest.approx(1.02 * 2.5 * 22) and mark.get_marker() == ">"


@pytest.mark.parametrize("budget, verdict", [(30, "fits"), (23, "tight"), (21, "over")])
def test_verdict_is_a_word(budget, verdict, tmp_path):
    path = fit_plot.draw(found_of([row("m4-10c-24gb", 24, budget)]), tmp_path / "one.svg")
    assert words(path).count(verdict) == 1
    assert bool(ids(path, "over-")) == (verdict == "over")


def test_many_macs_become_a_bar_per_memory_size(tmp_path):
    found = every()
    sizes = sorted({m.memory_gb for m in macs.every()})
    path = fit_plot.draw(found, tmp_path / "all.svg")
    counted = {size: sum(m.memory_gb == size for m in macs.every()) for size in sizes}
    assert [bar.name for bar in bars_of(found)] == [f"{size} GB, {n} Macs" for size, n in counted.items()]
    assert len(ids(path, "budget-")) == len(sizes) <= 25 and len(found["rows"]) > 90
    assert {bar.name for bar in bars_of(found)} <= set(words(path))


def test_macs_of_one_size_that_differ_have_bars_of_their_own():
    """A chip may need less for the same: its Macs are told by their chips."""
    found = every()
    for r in found["rows"]:
        if r["chip"].startswith(("M5", "M6")):
            r.update(total_bytes=21 * GB, activation_bytes=GB, scores_bytes=0)
    names = [bar.name for bar in bars_of(found)]
    assert len(set(names)) == len(names) <= 25
    assert any(re.fullmatch(r"24 GB, \d+ M2 to M4 Macs", name) for name in names)
    assert any(re.fullmatch(r"24 GB, \d+ M5 to M6 Macs", name) for name in names)


def test_never_more_bars_than_can_be_read():
    found = found_of([row(f"{size}gb", size, size) for size in range(1, 200)])
    bars = bars_of(found)
    assert len(bars) == 25
    assert [bar.budget // GB for bar in bars] == list(range(10, 35))  # around the 22 GB that decide


def test_scores_that_only_some_macs_need_are_not_told_apart():
    found = every()
    found["rows"][0]["scores_bytes"] = 0
    assert {bar.parts["attention scores"] for bar in bars_of(found)} == {0, GB}
    assert {bar.total for bar in bars_of(found)} == {22 * GB}


def test_this_mac_comes_first_with_its_own_budget():
    mine = row("m4-10c-24gb", 24, 21)
    found = every() | {"here": {"mac": "m4-10c-24gb", "budget_bytes": 21 * GB}}
    found["rows"].insert(0, mine)
    assert [bar.name for bar in bars_of(found)][:2] == ["this Mac (m4-10c-24gb)", "8 GB, 6 Macs"]


def test_a_mac_that_is_named_twice_is_one_bar():
    assert [bar.name for bar in bars_of(found_of([row("m4-10c-24gb", 24, 19)] * 2))] == ["m4-10c-24gb"]


def test_training_is_named_so(three, tmp_path):
    for r in three["rows"]:
        r.update(kv_bytes=0, scores_bytes=0, activation_bytes=4 * GB)
    for point in three["curve"]:
        point.update(kv_bytes=0, activation_bytes=point["activation_bytes"] + point["kv_bytes"])
    path = fit_plot.draw(three | {"train": "lora", "context": 2048}, tmp_path / "train.svg")
    said = words(path)
    assert "training" in said and "tokens per row (k = 1,024)" in said and "KV cache and states" not in said
    assert artists(three | {"train": "lora"}, "bar-")["m4-10c-24gb-training"].get_width() == pytest.approx(4)


def test_unknown_model_has_its_weights_alone(unknown, tmp_path):
    path = fit_plot.draw(unknown, tmp_path / "unknown.svg")
    assert {gid.removeprefix("bar-") for gid in ids(path, "bar-")} == {
        f"{mac}-weights" for mac in [*MAC_SIZES, "m4-10c-16gb"]
    }
    said = words(path)
    assert "novelist-32b: weights take 18.00 GB, the rest is unknown" in said
    assert said.count("unknown") == 3 and said.count("over") == 1 and "< 22.00" in said
    assert not ids(path, "area-")


# ---- memory over the context ----


def test_areas_are_stacked_as_the_curve_says(three):
    areas = artists(three, "area-")
    tops = {}
    for name, area in areas.items():
        vertices = area.get_paths()[0].vertices
        tops[name] = max(y for x, y in vertices if x == 32768)
    assert tops == pytest.approx(
        {"weights": 18, "kv-cache-and-states": 26, "attention-scores": 26, "other-activations": 28}
    )


def test_what_is_straight_over_the_context_is_drawn_so(three):
    """The cache grows by as much per token everywhere, also between the contexts that were counted."""
    top = artists(three, "area-kv-cache-and-states")[""].get_paths()[0].vertices
    assert {x: y for x, y in top if y > 18}[1024 * 12] == pytest.approx(18 + 3)


def test_training_between_the_counted_contexts_is_a_parabola():
    points = [{"context": c, "total_bytes": 5 + c * c} for c in (1024, 2048, 4096)]
    drawn = fit_plot._between(points, bent=True)
    assert all(point["total_bytes"] == pytest.approx(5 + point["context"] ** 2) for point in drawn)
    assert all(a["context"] < b["context"] for a, b in pairwise(drawn))


def test_budgets_run_across_with_the_longest_context_on_each(three):
    lines, marks = artists(three, "limit-"), artists(three, "longest-")
    assert {mac: line.get_ydata()[0] for mac, line in lines.items()} == {"m4-10c-24gb": 19, "m4-pro-20c-48gb": 40}
    assert {mac: (m.get_xdata()[0], m.get_ydata()[0]) for mac, m in marks.items()} == {"m4-pro-20c-48gb": (32768, 40)}
    assert artists(three, "asked")[""].get_xdata()[0] == 8192


def test_budgets_too_small_for_the_weights_are_told_once(tmp_path):
    rows = [row(f"m4-10c-{size}gb", size, size - 4) for size in (8, 16, 18, 24, 32)]
    path = fit_plot.draw(found_of(rows), tmp_path / "small.svg")
    assert ids(path, "limit-") == ["limit-m4-10c-18gb", "limit-m4-10c-24gb", "limit-m4-10c-32gb"]
    assert "2 smaller budgets" in words(path)


def test_a_context_beyond_the_model_is_marked(three, tmp_path):
    path = fit_plot.draw(three | {"context": 131072}, tmp_path / "long.svg")
    assert {"asked: 131,072", "made for 32,768 tokens", "128k"} <= set(words(path))


@pytest.mark.parametrize("points", [[], curve()[:1]])
def test_without_a_curve_there_is_one_panel(three, points):
    assert len(fit_plot.figure(three | {"curve": points}).axes) == 1
    assert len(fit_plot.figure(three).axes) == 2


def test_labels_keep_apart():
    placed = fit_plot._spread([1, 1.1, 1.2, 5, 9.9, 10], 0.5, 1, 10)
    assert all(b - a >= 1 - 1e-9 for a, b in pairwise(placed)) and placed[0] >= 0.5 and placed[-1] <= 10
    assert fit_plot._spread([2, 5], 0.5, 1, 10) == [2, 5]


# ---- original and result ----


@pytest.fixture
def pruned() -> dict[str, Any]:
    sizes = [(8, 5), (16, 12), (24, 19), (32, 27), (48, 40), (64, 56)]
    original, result = ([row(f"{n}gb", n, budget, weights) for n, budget in sizes] for weights in (18, 10))
    return found_of(result, original_rows=original, curve=curve(10), original_curve=curve(18))


def test_original_and_result_stand_side_by_side(pruned, tmp_path):
    path = fit_plot.draw(pruned, tmp_path / "report.svg")
    assert [bar.name for bar in bars_of(pruned)] == [
        f"{size} GB, {which}" for size in (8, 16, 24, 32) for which in ("original", "result")
    ]  # both fit 32 GB, and so they do everything above
    assert words(path).count("result") == 4 and len(ids(path, "budget-")) == 8 and ids(path, "original")
    drawn = artists(pruned, "bar-")
    assert [drawn[f"24-gb-{which}-weights"].get_width() for which in ("original", "result")] == [18, 10]
    assert (
        heading(pruned, bars_of(pruned)) == "novelist-32b takes 14.00 GB instead of 22.00 GB at 8,192 tokens of context"
    )


def test_legend_names_only_what_is_there(pruned, tmp_path):
    short = pruned | {"curve": curve(10)[:1], "original_curve": curve(18)[:1]}
    said = [words(fit_plot.draw(found, tmp_path / f"{name}.svg")) for name, found in (("a", pruned), ("b", short))]
    assert ["original" in line for line in said] == [True, False]
    assert "too much" in said[0] and "training" not in said[0]


def test_by_memory_takes_the_mac_with_least_room():
    rows = [row("a", 24, 19), row("b", 24, 18), row("c", 8, 5)]
    assert [r["mac"] for r in by_memory(rows).values()] == ["c", "b"]


# ---- files ----

SIGNATURES = {".svg": b"<?xml", ".png": b"\x89PNG\r\n\x1a\n", ".pdf": b"%PDF"}


@pytest.mark.parametrize("suffix", [*SIGNATURES, ".SVG"])
def test_suffix_decides_and_the_same_input_makes_the_same_bytes(three, tmp_path, suffix):
    first, second = (fit_plot.draw(three, tmp_path / f"{name}{suffix}").read_bytes() for name in "ab")
    assert first == second and first.startswith(SIGNATURES[suffix.lower()])
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"a{suffix}", f"b{suffix}"]


DRAW = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
sys.path[:0] = sys.argv[2:-1]
from tests.reporting import test_fit_plot as t
t.fit_plot.draw(t.every(), folder / sys.argv.pop())
(folder / "toolkit").write_text(str("matplotlib.pyplot" in sys.modules))
if not (folder / "a.svg").exists():
    t.fit_plot.draw(t.every(), folder / "a.svg")
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two folders with a picture, by processes of different seeds for the order of sets. The first draws a PNG before,
    and notes what that loads."""
    folders = [tmp_path_factory.mktemp("drawn") for _ in "12"]
    for seed, folder, first in zip("12", folders, ("a.png", "a.svg"), strict=True):
        command = [sys.executable, "-c", DRAW, str(folder), *HERE, first]
        assert subprocess.run(command, env={"PYTHONHASHSEED": seed}, timeout=60).returncode == 0
    return folders


def test_another_process_makes_the_same_bytes(drawn):
    made = [(folder / "a.svg").read_bytes() for folder in drawn]
    assert made[0] == made[1]


def test_the_picture_is_told_in_words(three, tmp_path):
    root = ET.parse(fit_plot.draw(three, tmp_path / "fit.svg")).getroot()
    assert root.get("role") == "img"
    assert root.findtext(f"{SVG}title") == "novelist-32b takes 22.00 GB at 8,192 tokens of context"
    told = root.findtext(f"{SVG}desc")
    assert told == describe(three)
    assert "Fits 2 of 3 Macs" in told and "m4-10c-24gb: 22.00 GB of 19.00 GB, over, longest context none" in told


def test_a_picture_knows_what_it_is_of(three, tmp_path):
    path = fit_plot.draw(three | {"model": "a & b"}, tmp_path / "fit.svg")
    assert fit_plot.drawn(three | {"model": "a & b"}, path)
    assert not fit_plot.drawn(three, path) and not fit_plot.drawn(three, tmp_path / "none.svg")


@pytest.mark.parametrize("name", ["a$b$ & <script>]]>", "x\ny\0z", "模型", "n" * 300])
def test_any_name_of_a_model_makes_a_picture(three, tmp_path, name):
    path = fit_plot.draw(three | {"model": name}, tmp_path / "name.svg")
    title = next(said for said in words(path) if "takes" in said)
    assert len(title) < 90 and title.startswith(name[:1])
    assert fit_plot.draw(three | {"model": name}, tmp_path / "name.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["fit", "fit.jpg", "fit.svg.gz", ".svg"])
def test_another_suffix_is_refused_with_the_cure(three, tmp_path, name):
    with pytest.raises(UsageError, match=r"\.svg, \.png or \.pdf"):
        fit_plot.draw(three, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_missing_directory_is_one_line(three, tmp_path):
    with pytest.raises(PareError, match="no directory") as error:
        fit_plot.draw(three, tmp_path / "nowhere" / "fit.svg")
    assert "\n" not in str(error.value) and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("write", [atomic.create_file, edited.write])
def test_nothing_half_written_is_left(three, tmp_path, monkeypatch, write):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PareError, match="No space left on device"):
        fit_plot.draw(three, tmp_path / "fit.svg", write)
    assert not list(tmp_path.iterdir())


def test_f07_a_picture_replaces_nothing(three, tmp_path):
    path = tmp_path / "fit.svg"
    path.write_text("mine")
    with pytest.raises(Refused, match="exists already"):
        fit_plot.draw(three, path)
    assert path.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_picture_that_cannot_be_drawn_writes_nothing(three, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_plot, "_bars", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit_plot.draw(three, tmp_path / "fit.svg")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_cure_is_named(three, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PareError, match=r"without matplotlib.*: pip install matplotlib"):
        fit_plot.draw(three, tmp_path / "fit.svg")


# ---- what it leaves alone ----


@pytest.fixture
def own_settings() -> Iterator[None]:
    with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "red", "svg.fonttype": "path"}):
        yield


def test_settings_of_the_user_neither_matter_nor_change(three, tmp_path, request):
    plain = fit_plot.draw(three, tmp_path / "a.svg").read_bytes()
    request.getfixturevalue("own_settings")
    before = dict(matplotlib.rcParams)
    assert fit_plot.draw(three, tmp_path / "b.svg").read_bytes() == plain
    assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_imported_only_to_draw(tmp_path):
    code = """
import sys
from mlx_pare.capacity.fit import fit
import mlx_pare.reporting.fit_plot, mlx_pare.reporting.report
fit("qwen2.5-32b", ["m4-24gb"])
sys.exit(", ".join(sorted({"matplotlib", "numpy", "mlx"} & set(sys.modules))) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_no_window_toolkit_is_loaded(drawn):
    assert (drawn[0] / "a.png").exists() and (drawn[0] / "toolkit").read_text() == "False"
