"""Files of a run directory that were edited or damaged: one line with the file and the cure, whoever reads them."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_pare.base.errors import PareError
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import run as pipeline
from mlx_pare.planning import trial_cache
from mlx_pare.reporting.report import report
from mlx_pare.store import step_files
from mlx_pare.store.rundir import Run

ASKED = dict(
    keep=0.4, axes=("layer",), length=32, samples=8, recover_steps=2, trials=1, context=256, criterion="minitron",
    protect=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(pico_models, two_texts, tmp_path_factory) -> Path:
    """A run directory with every file that a step leaves; what this run has no use for is written by hand."""
    out = tmp_path_factory.mktemp("damaged") / "run"
    pipeline.run(pico_models("llama"), out, Settings(**two_texts, **ASKED))
    plan = json.loads((out / "prune" / "model" / "plan.json").read_text())
    gone = sorted({0, 1, 2, 3} - {layer["source"] for layer in plan["layers"]})
    drops = {"drops": {"4": [], "2": [{"layer": n, "kl": kl} for n, kl in zip(gone, (0.5, None), strict=True)]}}
    (out / "plan" / "layers.json").write_text(json.dumps(drops))
    level, layer = {"layer": 4, "ffn": 96, "kv_head": 1, "hidden": 64}, {"ffn": 96, "kv_head": 1, "ffn_bits": 4}
    candidates = [{"level": level, "kl": 0.5, "reconstructed_kl": 0.4}, {"layers": [layer, None, layer], "kl": None}]
    found = {"widths": "uniform", "candidates": candidates, "even": 0, "taken": 1, "rank_correlation": {"ffn": 0.9}}
    (out / "plan" / "tried.json").write_text(json.dumps(found))
    agreed = {"ffn": {"rank_correlation": 0.9, "same": 0.8}}
    drawn, mean = {"ffn": {"rank_correlation": 0.9, "jaccard": 0.8}}, {"mean": 1.0, "stdev": 0.1, "values": [1.0]}
    of = {"tokens": [{"tokens": 8, "axes": agreed}], "enough": None, "draws": drawn, "float": {"axes": agreed}}
    cost = {"criterion": "obs", "reconstructed": True, "perplexity": mean, "kl_divergence": mean}
    found = {"criteria": {"obs": of}, "tokens": 16, "draw_tokens": [8, 8], "cost": cost, "float": "m"}
    (out / "stability").mkdir()
    (out / "stability" / "stability.json").write_text(json.dumps(found))
    fits = json.loads((out / "export" / "fits.json").read_text())
    fits |= {key: fits[key][:2] for key in ("rows", "gguf_rows", "original_rows", "curve", "original_curve")}
    (out / "export" / "fits.json").write_text(json.dumps(fits))
    return out


@pytest.fixture
def out(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


FILES = [
    "evaluate-pruned/size.json", "evaluate-original/metrics.json", "prune/done.json", "prune/check.json",
    "recover/recovery.json", "recover/check.json", "export/export.json", "export/fits.json", "plan/tried.json",
    "plan/layers.json", "bench/bench.json", "stability/stability.json",
]  # fmt: skip
DAMAGES = {
    "empty": b"", "cut off": b'{"bytes": 1', "a list": b"[]", "null": b"null", "text": b'"x"', "nothing in it": b"{}",
    "not UTF-8": b'{"a": "\xff"}', "NaN": b'{"bytes": NaN}', "deep": b"[" * 100_000, "zeros": bytes(512),
    "a large number": b'{"bytes": 1' + b"0" * 5000 + b"}",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_f27_report_names_the_damaged_file(out, name, damage):
    (out / name).write_bytes(DAMAGES[damage])
    with pytest.raises(PareError) as found:
        report(out)
    assert str(out / name) in found.value.problem and str((out / name).parent) in found.value.cure


@pytest.mark.parametrize("name", FILES)
def test_f27_a_file_that_is_no_file(out, name):
    (out / name).unlink()
    (out / name).mkdir()
    with pytest.raises(PareError, match=f"{name}.*directory"):
        report(out)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where something stands in JSON; of lists the first entry, because all are alike."""
    if path:
        yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value[:1] if isinstance(value, list) else ())
    for key, inner in inside:
        yield from places(inner, (*path, key))


STRANGE = ["x", None, -1, 0, [], {}, True, 10**400, float("nan"), float("inf"), [None], -(10**29), 1.5]


@pytest.mark.parametrize("name", FILES)
def test_f27_no_edit_of_a_file_is_an_internal_error(out, name, monkeypatch):
    """Every value in turn replaced by strange ones, or taken out: a report is made, or the file is named."""
    if name != "export/fits.json":
        monkeypatch.setattr("mlx_pare.reporting.report._picture", lambda *_: "")
    whole, tries, refused = json.loads((out / name).read_text()), 0, 0
    for place in places(whole):
        for strange in [*STRANGE, ...]:
            edited = copy.deepcopy(whole)
            *above, last = place
            inner = edited
            for key in above:
                inner = inner[key]
            if strange is ...:
                del inner[last]
            else:
                inner[last] = strange
            (out / name).write_text(json.dumps(edited))
            tries += 1
            try:
                report(out)
                json.dumps(step_files.find(out / name) if "metrics" not in name else {}, allow_nan=False)
            except PareError as error:
                refused += 1
                assert name in error.problem and error.cure, error
    assert 0 < refused < tries


@pytest.mark.parametrize("damage", DAMAGES)
def test_f27_trials(out, damage):
    (out / "trials.json").write_bytes(DAMAGES[damage])
    with Run(out) as run:
        if damage == "nothing in it":
            assert trial_cache.Known(run).found == {}
        else:
            with pytest.raises(PareError, match=r"trials.json.*Delete it"):
                trial_cache.Known(run)


def test_f27_run_names_the_damaged_file(out, pico_models, two_texts):
    """The files that belong to a record are known by their bytes; whatever else a run reads is named as well."""
    settings = Settings(**two_texts, **ASKED)
    for name in ("export/fits.json", "evaluate-pruned/size.json", "recover/recovery.json"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(PareError, match=name):
            pipeline.run(pico_models("llama"), out, settings)
        (out / name).write_bytes(whole)


def test_f27_json_of_a_run_is_read_in_one_place():
    """Elsewhere only what this process, or its child, has just written, and the catalogue that comes with mlx-pare."""
    package = Path(step_files.__file__).parents[1]
    files = [file for file in package.rglob("*.py") if re.search(r"json\.loads?\([^)]*read_", file.read_text("utf-8"))]
    assert {file.name for file in files} <= {"llama_cpp.py", "choose_layers.py", "catalogue.py"}
