"""The run directory: the same step is skipped, anything else is refused by name, nothing is ever half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_pare.base import machine
from mlx_pare.base.errors import PareError, Refused
from mlx_pare.store import atomic, rundir
from mlx_pare.store.rundir import Run, fingerprint

PARAMETERS = {"rows": 4, "axes": ["ffn", "kv_head"], "keep": None, "rate": 1e-5}
INPUTS = {"model": "m0", "data": "d0"}


@pytest.fixture
def model(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "run"


def write(text: str = "made", name: str = "out.txt") -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(text)


def never(_: Path) -> None:
    pytest.fail("the work was done again")


def begun(out: Path, model: Path, editable: bool = False) -> None:
    """A run with one finished step."""
    with Run(out, model, "identity") as run:
        assert run.step("score", PARAMETERS, INPUTS, write(), editable)


def contents(path: Path) -> dict[str, bytes]:
    """Of all files but the log, which every process adds to."""
    files = (f for f in sorted(path.rglob("*")) if f.is_file() and f.name != "log.txt")
    return {str(f.relative_to(path)): f.read_bytes() for f in files}


# ---- skip, or refuse ----


def test_step_is_recorded_whole(out, model):
    begun(out, model)
    manifest = json.loads((out / "manifest.json").read_text())
    record = manifest["steps"]["score"]
    assert record["parameters"] == PARAMETERS and record["inputs"] == INPUTS
    assert record["outputs"] == {n: fingerprint(out / "score" / n) for n in ("out.txt", "step.json")}
    assert record["seconds"] >= 0 and record["peak_bytes"] > 1 << 20
    assert manifest["source"] == "identity" and manifest["model"] == str(model)
    assert "mlx" in manifest["versions"] and manifest["machine"]["memory_bytes"] > 0
    assert not (out / "score.partial").exists()


def test_same_step_is_skipped(out, model):
    begun(out, model)
    before = contents(out)
    with Run(out, model, "identity") as run:
        assert run.step("score", dict(reversed(PARAMETERS.items())), INPUTS, never) is False
    with Run(out) as run:  # and without naming the model
        assert run.step("score", {**PARAMETERS, "axes": ("ffn", "kv_head")}, INPUTS, never) is False
    assert contents(out) == before


CHANGES = [
    ({"rows": 5}, {}, ["rows was 4, now it is 5"]),
    ({"axes": ["ffn"]}, {}, ["axes was ['ffn', 'kv_head'], now it is ['ffn']"]),
    ({"keep": 0.5}, {}, ["keep was None, now it is 0.5"]),
    ({"seed": 1}, {}, ["seed was None, now it is 1"]),
    ({}, {"data": "d1"}, ["input data changed"]),
    ({}, {"plan": "p0"}, ["input plan changed"]),
]


@pytest.mark.parametrize("parameters, inputs, named", CHANGES)
def test_another_parameter_or_input_is_refused(out, model, parameters, inputs, named):
    begun(out, model)
    before = contents(out)
    with Run(out) as run, pytest.raises(Refused) as refused:
        run.step("score", PARAMETERS | parameters, INPUTS | inputs, never)
    assert all(words in str(refused.value) for words in [*named, "score", str(out)])
    assert refused.value.exit_code == 3
    assert contents(out) == before


def test_fewer_inputs_are_refused(out, model):
    begun(out, model)
    with Run(out) as run, pytest.raises(Refused, match="input data changed"):
        run.step("score", PARAMETERS, {"model": "m0"}, never)


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_damaged_output_is_refused(out, model, damage):
    begun(out, model)
    file = out / "score" / "out.txt"
    file.unlink() if damage == "missing" else file.write_text("made?")
    with Run(out) as run, pytest.raises(Refused, match=f"out.txt.*{damage}"):
        run.step("score", PARAMETERS, INPUTS, never)


def test_editable_output_may_change_but_not_vanish(out, model):
    begun(out, model, editable=True)
    (out / "score" / "out.txt").write_text("edited by hand")
    with Run(out) as run:
        assert run.step("score", PARAMETERS, INPUTS, never, editable=True) is False
    (out / "score" / "out.txt").unlink()
    with Run(out) as run, pytest.raises(Refused, match="missing"):
        run.step("score", PARAMETERS, INPUTS, never, editable=True)


def test_deleted_step_is_done_again_with_other_parameters(out, model):
    """What the refusal tells people to do must work."""
    begun(out, model)
    for file in (out / "score").iterdir():
        file.unlink()
    (out / "score").rmdir()
    with Run(out) as run:
        assert run.step("score", {"rows": 9}, INPUTS, write("again"))
    assert (out / "score" / "out.txt").read_text() == "again"


@pytest.mark.parametrize("size", [0, 10, rundir.BIG_FILE + 1])
def test_fingerprint_sees_a_changed_byte(tmp_path, size):
    file = tmp_path / "big"
    with file.open("wb") as opened:
        opened.truncate(size)
    before = fingerprint(file)
    assert before == fingerprint(file) and before.startswith("quick:") == (size > rundir.BIG_FILE)
    with file.open("r+b") as opened:
        opened.write(b"x")
    assert fingerprint(file) != before


# ---- opening ----


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"schema_version": 1}', b"\xff\xfe", b"null"])
def test_corrupt_manifest_is_an_error_and_never_a_fresh_start(out, model, damage):
    begun(out, model)
    (out / "manifest.json").write_bytes(damage)
    before = contents(out)
    for arguments in [(out, model, "identity"), (out,)]:
        with pytest.raises(PareError, match="damaged") as error:
            Run(*arguments)
        assert error.value.exit_code == 1
    assert contents(out) == before


@pytest.mark.parametrize("change", [{"schema_version": 99}, {"surprise": 1}, {"steps": {"score": {}}}])
def test_manifest_of_another_schema_is_an_error(out, model, change):
    begun(out, model)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(PareError, match=f"damaged.*{next(iter(change))}"):
        Run(out)


def test_foreign_directory_is_refused_and_not_touched(out, model):
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(Refused, match=r"no run directory \(thesis.txt"):
        Run(out, model, "identity")
    assert contents(out) == {"thesis.txt": b"mine"}


def test_file_in_place_of_the_directory_is_refused(out, model):
    out.write_text("a file")
    with pytest.raises(Refused, match="not a directory"):
        Run(out, model, "identity")


def test_no_run_is_an_error_and_makes_nothing(out):
    with pytest.raises(PareError, match="no run at"):
        Run(out)
    assert not out.exists()


@pytest.mark.parametrize("left", [[], [f".manifest.json.{'0' * 16}.mlx-pare.tmp"], [".lock"], [".DS_Store"]])
def test_what_a_killed_start_leaves_is_no_obstacle(out, model, left):
    out.mkdir()
    for name in left:
        (out / name).write_text("{")
    begun(out, model)


def test_another_model_is_refused(out, model):
    begun(out, model)
    before = contents(out)
    with pytest.raises(Refused, match="another model"):
        Run(out, model, "other")
    assert contents(out) == before


def test_moved_model_is_followed(out, model, tmp_path):
    begun(out, model)
    model.rename(tmp_path / "elsewhere")
    with Run(out, tmp_path / "elsewhere", "identity") as run:
        assert run.model == tmp_path / "elsewhere"


def test_output_of_a_step_that_was_not_done(out, model):
    with Run(out, model, "identity") as run, pytest.raises(PareError, match=r"no finished score step.*mlx-pare score"):
        run.output("score", "scores.safetensors")


# ---- the lock ----

SECOND = """
import sys
from mlx_pare.base.errors import PareError
from mlx_pare.store.rundir import Run
try:
    Run(sys.argv[1])
except PareError as error:
    sys.stdout.write(str(error))
    sys.exit(error.exit_code)
"""


def second(out: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", SECOND, str(out)], capture_output=True, text=True, timeout=60)


def test_second_process_is_refused(out, model):
    begun(out, model)
    with Run(out, model, "identity"):
        done = second(out)
        assert done.returncode == 3 and "another mlx-pare is working on" in done.stdout
    assert second(out).returncode == 0


def test_failed_opening_lets_go_of_the_lock(out, model):
    begun(out, model)
    with pytest.raises(Refused):
        Run(out, model, "other")
    Run(out).close()


# ---- killed at a bad moment ----


def failing(monkeypatch, module, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
    """Make ``module.name`` raise, as a full disk or a kill would, when its arguments say so."""
    real = getattr(module, name)

    def call(*args, **kwargs):
        if when(*args):
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, call)


def test_killed_between_rename_and_manifest_is_continued(out, model, monkeypatch):
    with Run(out, model, "identity") as run, monkeypatch.context() as patch:
        failing(patch, rundir, "replace_file", lambda path, _: path.name == "manifest.json")
        with pytest.raises(OSError):
            run.step("score", PARAMETERS, INPUTS, write("first"), resumes=True)
    assert (out / "score" / "out.txt").read_text() == "first"

    def goes_on(directory: Path) -> None:
        assert (directory / "out.txt").read_text() == "first"  # a verb that can resume finds its work
        (directory / "out.txt").write_text("second")

    with Run(out, model, "identity") as run:
        assert run.step("score", PARAMETERS, INPUTS, goes_on, resumes=True)
        assert run.step("score", PARAMETERS, INPUTS, never, resumes=True) is False
    assert (out / "score" / "out.txt").read_text() == "second"


def test_killed_between_rename_and_manifest_is_not_continued_differently(out, model, monkeypatch):
    with Run(out, model, "identity") as run, monkeypatch.context() as patch:
        failing(patch, rundir, "replace_file", lambda path, _: path.name == "manifest.json")
        with pytest.raises(OSError):
            run.step("score", PARAMETERS, INPUTS, write())
    with Run(out) as run, pytest.raises(Refused, match="rows was 4, now it is 5"):
        run.step("score", PARAMETERS | {"rows": 5}, INPUTS, never, resumes=True)


def test_work_that_raises_leaves_its_partial_and_no_record(out, model):
    def breaks(directory: Path) -> None:
        (directory / "half.txt").write_text("half")
        raise PareError("broken")

    with Run(out, model, "identity") as run, pytest.raises(PareError, match="broken"):
        run.step("score", PARAMETERS, INPUTS, breaks)
    assert not (out / "score").exists() and (out / "score.partial" / "half.txt").exists()
    with Run(out) as run:
        assert run.manifest.steps == {}
        with pytest.raises(Refused, match="keep was None, now it is 1"):
            run.step("score", PARAMETERS | {"keep": 1}, INPUTS, never, resumes=True)
        with pytest.raises(Refused, match="input data changed"):
            run.step("score", PARAMETERS, INPUTS | {"data": "d1"}, never, resumes=True)
        # a step that cannot go on is done again from nothing, also differently: that may be the cure
        assert run.step("score", PARAMETERS | {"keep": 1}, INPUTS, write())
    assert not (out / "score" / "half.txt").exists()
    assert not (out / "score.partial").exists()


def test_what_was_refused_at_once_commits_to_nothing(out, model):
    """The cure of a refusal is often another parameter."""

    def refusing(directory: Path) -> None:
        raise Refused("too much", "ask for less")

    with Run(out, model, "identity") as run:
        with pytest.raises(Refused, match="too much"):
            run.step("score", PARAMETERS, INPUTS, refusing, resumes=True)
        assert run.step("score", PARAMETERS | {"keep": 1}, INPUTS, write(), resumes=True)


def test_damaged_note_of_what_was_begun_is_an_error(out, model):
    with Run(out, model, "identity") as run:
        (out / "score.partial").mkdir()
        (out / "score.partial" / "step.json").write_text('{"parameters": 3')
        with pytest.raises(PareError, match=r"step\.json is damaged.*[Dd]elete"):
            run.step("score", PARAMETERS, INPUTS, never, resumes=True)


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2])
def test_manifest_is_never_half_written(out, model, monkeypatch, name, nth):
    begun(out, model)
    before = (out / "manifest.json").read_bytes()
    calls = iter(range(1, 9))
    with Run(out) as run, monkeypatch.context() as patch:
        failing(patch, os, name, lambda *_: next(calls) == nth)  # 1: the note of what was begun, 2: the manifest
        with pytest.raises(OSError):
            run.step("plan", {}, {}, write())
    assert (out / "manifest.json").read_bytes() == before
    with Run(out) as run:
        assert list(run.manifest.steps) == ["score"]
        assert run.step("plan", {}, {}, write())
        assert run.step("score", PARAMETERS, INPUTS, never) is False


def test_half_written_bytes_stay_beside_the_file(tmp_path, monkeypatch):
    file = tmp_path / "plan.json"
    atomic.replace_file(file, b"old")
    failing(monkeypatch, os, "fsync")
    with pytest.raises(OSError):
        atomic.replace_file(file, b"new")
    assert file.read_bytes() == b"old"


# ---- recipe ----


def test_recipe_is_toml_and_holds_what_was_asked(out, model):
    asked = {
        "model": 'C:\\a "quoted" \U0001f600 model\x7f\n[x]', "keep": 0.75, "rate": 1e-05, "big": 1e16, "none": None,
        "axes": ("ffn", "kv_head"), "protect": True, "seed": 0, "path": Path("b/ö"), "empty": "", "no": [],
    }  # fmt: skip
    with Run(out, model, "identity") as run:
        run.write_recipe(asked)
    read = tomllib.loads((out / "recipe.toml").read_text("utf-8"))
    changed = {"axes": ["ffn", "kv_head"], "path": "b/ö"}
    assert read == {k: v for k, v in asked.items() if v is not None} | changed
    assert read["protect"] is True and read["seed"] is not False


def test_recipe_of_a_run_is_replaced_only_when_told(out, model):
    with Run(out, model, "identity") as run:
        run.write_recipe({"keep": 0.5}, replace=False)
        run.write_recipe({"keep": 0.6}, replace=False)
        assert tomllib.loads((out / "recipe.toml").read_text()) == {"keep": 0.5}
        run.write_recipe({"keep": 0.7})
        assert tomllib.loads((out / "recipe.toml").read_text()) == {"keep": 0.7}


def test_f07_comments_in_a_recipe_stay_while_it_says_the_same(out, model):
    with Run(out, model, "identity") as run:
        run.write_recipe({"keep": 0.5})
        commented = "# why a half\nkeep = 0.50\n"
        (out / "recipe.toml").write_text(commented)
        run.write_recipe({"keep": 0.5})
        assert (out / "recipe.toml").read_text() == commented
        run.write_recipe({"keep": 0.7})
        assert tomllib.loads((out / "recipe.toml").read_text()) == {"keep": 0.7}


@pytest.mark.skipif(sys.platform != "linux", reason="the system counts resident peaks from the start of the process")
def test_the_peak_is_that_of_the_step(out, model):
    """What an earlier step took does not count."""
    sizes = {"large": 300 << 20, "small": 1 << 20}
    with Run(out, model, "identity") as run:
        for name, size in sizes.items():
            run.step(name, {}, {}, lambda directory, size=size: bytearray(size).find(b"x"))
        large, small = (run.manifest.steps[name].peak_bytes for name in sizes)
    assert large - small > 200 << 20


# ---- what macOS writes by itself ----


@pytest.mark.parametrize("name", [".DS_Store", "._model.safetensors"])
def test_files_of_the_finder_are_no_outputs(tmp_path, name):
    """They come into a step before it ends or after, change, and go; the step stays done."""
    (tmp_path / "model").mkdir()

    def work(directory: Path) -> None:
        (directory / "made").write_text("made")
        (directory / name).write_text("of the Finder")

    with rundir.Run(tmp_path / "run", tmp_path / "model", "identity") as run:
        assert run.step("step", {}, {}, work)
        assert list(run.manifest.steps["step"].outputs) == ["made", "step.json"]
        for content in ("changed", None):
            file = tmp_path / "run" / "step" / name
            file.write_text(content) if content else file.unlink()
            assert not run.step("step", {}, {}, work)


def test_a_new_run_directory_may_hold_what_the_finder_wrote(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "run").mkdir()
    for name in (".DS_Store", "._log.txt"):
        (tmp_path / "run" / name).touch()
    rundir.Run(tmp_path / "run", tmp_path / "model", "identity").close()


def test_a_folder_with_such_a_name_is_somebodys(tmp_path):
    from mlx_pare.store.atomic import working

    (tmp_path / "work" / "._mine").mkdir(parents=True)
    (tmp_path / "work" / "._mine" / "thesis.txt").write_text("precious")
    with pytest.raises(Refused), working(tmp_path / "work"):
        pytest.fail("somebody else's directory was taken")
    (tmp_path / "new").mkdir()
    with working(tmp_path / "new") as place:
        (place / "._mine").mkdir()
        (place / "._mine" / "thesis.txt").write_text("precious")
    assert (tmp_path / "new" / "._mine" / "thesis.txt").read_text() == "precious"


def test_a_working_directory_may_hold_what_the_finder_wrote(tmp_path):
    from mlx_pare.store.atomic import working

    (tmp_path / "work").mkdir()
    (tmp_path / "work" / ".DS_Store").touch()
    with working(tmp_path / "work") as place:
        (place / "._half").touch()
    assert not (tmp_path / "work").exists()


# ---- on what it was computed ----

MAC = {"mlx": "0.32.0", "device": "gpu", "chip": "Apple M1", "macos": "15.1"}
OTHER = MAC | {"chip": "Apple M4"}


@pytest.fixture
def on(monkeypatch) -> Callable[[dict], None]:
    """``on(place)``: from now on this computer is that one."""
    return lambda place: monkeypatch.setattr(machine, "computes_on", lambda: dict(place))


def computed_on(out: Path) -> list:
    return json.loads((out / "manifest.json").read_text())["computed_on"]


def test_a_run_says_on_what_it_was_computed(out, model):
    begun(out, model)
    assert computed_on(out) == [machine.computes_on()]


def test_a_run_that_goes_on_elsewhere_says_so(out, model, on, capsys):
    """It is not refused. What has been done is not computed again, so nothing is said of it."""
    on(MAC)
    begun(out, model)
    on(OTHER)
    with Run(out) as run:
        assert run.step("score", PARAMETERS, INPUTS, never) is False
        assert computed_on(out) == [MAC] and not capsys.readouterr().err
        for name in ("plan", "prune"):
            assert run.step(name, PARAMETERS, INPUTS, lambda place: (write()(place), machine.went_on([MAC])))
    assert computed_on(out) == [MAC, OTHER]
    told = capsys.readouterr().err
    assert told.count("warning: ") == told.count("\n") == 1
    assert "chip was Apple M1, now it is Apple M4" in told and "results agree to rounding only" in told
    on(MAC)
    with Run(out) as run:
        assert run.step("export", PARAMETERS, INPUTS, write())
    assert computed_on(out) == [MAC, OTHER] and not capsys.readouterr().err


def test_a_run_of_an_earlier_version_did_not_note_it(out, model, on, capsys):
    begun(out, model)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["computed_on"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    on(OTHER)
    with Run(out) as run:
        assert run.step("plan", PARAMETERS, INPUTS, write())
    assert computed_on(out) == [] and not capsys.readouterr().err
