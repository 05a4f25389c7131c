"""What commands write: it has a name only when it is whole, and nothing of somebody else is touched."""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pico
import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer
from typer.testing import CliRunner

from mlx_pare import export as export_verb
from mlx_pare.base.errors import Refused
from mlx_pare.cli import main as cli
from mlx_pare.exporting import mlx_directory, server_check
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pruning.prune import prune
from mlx_pare.store import rundir
from mlx_pare.store.arrays import Arrays
from tests.arch.test_uneven import plan_of
from tests.pruning.test_adapters import adapter_of


def pare(*words, code: int = 0) -> str:
    """A command to its end; its error, or what it printed."""
    done = CliRunner().invoke(cli.app, [*map(str, words), "--json"])
    assert done.exit_code == code, done.output
    found = json.loads(done.stdout)
    return found["error"] if code else done.stdout


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, links not followed."""
    return {
        str(f.relative_to(folder)): f.read_bytes() if f.is_file() and not f.is_symlink() else None
        for f in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, the same cut, an adapter, and a GGUF file."""
    folder = tmp_path_factory.mktemp("outputs")
    model = pico.make(folder / "model")
    prune(model, plan_of(model, [(64, 2)] * 4), folder / "cut")
    adapter_of(model, folder / "adapter")
    export_verb(model, folder / "m.gguf", "q8_0")
    return folder


WRITERS = ("import", "gguf", "ollama", "mlx", "hub", "adapters")


@pytest.fixture
def writing(place, tmp_path) -> Callable[[str], tuple[list, Path]]:
    """(a command that writes something, what it writes) by a short name."""
    out, alone = tmp_path / "here" / "out", "--no-verify"
    out.parent.mkdir()
    commands = {
        "import": ["import", place / "m.gguf", "-o", out],
        "gguf": ["export", place / "model", "--gguf", "q8_0", "-o", out, alone],
        "ollama": ["export", place / "model", "--gguf", "q8_0", "--ollama", out, alone],
        "mlx": ["export", place / "model", "--mlx", out, "--group-size", "32", alone],
        "hub": ["export", place / "model", "--hub-ready", out, alone],
        "adapters": ["adapters", place / "adapter", "--parent", place / "model", "--model", place / "cut", "-o", out],
    }
    return lambda name: (commands[name], out)


# ---- what lies beside an output is of somebody else ----

BESIDE = ("out.partial", ".out.part", "out.gone", "out.tmp", ".out.tmp", ".out.part.d", "out.rejected", "out.work",
          "out.lock", ".out.lock")  # fmt: skip


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("name", WRITERS)
def test_f05_names_like_temporary_ones_are_not_touched(writing, name, kind):
    command, out = writing(name)
    for beside in (out.with_name(other) for other in BESIDE):
        if kind == "directory":
            beside.mkdir()
            beside = beside / "thesis.txt"
        beside.write_text("precious")
    before = contents(out.parent)
    pare(*command)
    after = contents(out.parent)
    assert {name: after.get(name) for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"out"}


def test_f05_steps_of_the_python_interface_delete_nothing_beside_their_output(place, tmp_path):
    for name in ("cut.partial", "cut.gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("precious")
    before = contents(tmp_path)
    prune(place / "model", plan_of(place / "model", [(64, 2)] * 4), tmp_path / "cut")
    assert before.items() <= contents(tmp_path).items()


@pytest.mark.parametrize("name", ["out.work", "out.blocks"])
def test_f05_directories_to_continue_from_are_ours_or_refused(place, tmp_path, name):
    from mlx_pare.recovery.block_trainer import Options
    from mlx_pare.recovery.blockwise import local
    from mlx_pare.store.atomic import working
    from mlx_pare.text.corpus import Rows

    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("precious")
    with pytest.raises(Refused, match="mlx-pare"):
        if name == "out.work":
            with working(tmp_path / name):
                pytest.fail("somebody else's directory was taken")
        else:
            rows = Rows.full([[1, 2, 3, 4]] * 2)
            local(place / "cut", place / "model", rows, rows, tmp_path / "out", Options(steps=1))
    assert contents(tmp_path) == {name: None, f"{name}/thesis.txt": b"precious"}
    for _ in range(2):
        with working(tmp_path / "mine") as mine:
            (mine / "half").touch()
    with pytest.raises(KeyboardInterrupt), working(tmp_path / "empty"):
        raise KeyboardInterrupt
    assert (tmp_path / "mine" / "half").exists() and not (tmp_path / "empty").exists()


# ---- links where temporary files would lie ----


@pytest.mark.parametrize("name", WRITERS)
def test_f06_links_at_temporary_names_are_not_followed(writing, name, tmp_path):
    command, out = writing(name)
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("precious")
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    for number, other in enumerate(BESIDE):
        out.with_name(other).symlink_to(folder if number % 2 else victim)
    pare(*command)
    assert victim.read_text() == "precious" and contents(folder) == {"thesis.txt": b"precious"}
    assert all(out.with_name(other).is_symlink() for other in BESIDE)


@pytest.mark.parametrize("link", ["manifest.json.tmp", ".lock", "log.txt", ".DS_Store"])
def test_f06_links_do_not_make_a_directory_empty(tmp_path, link):
    victim, out = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    (tmp_path / "model").mkdir()
    out.mkdir()
    (out / link).symlink_to(victim)
    with pytest.raises(Refused, match="is not empty and is no run directory"):
        rundir.Run(out, tmp_path / "model", "identity")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("link", ["manifest.json.tmp", "recipe.toml.tmp", "step.partial", "step", "log.txt"])
def test_f06_links_in_a_run_directory_are_not_followed(tmp_path, link):
    out, victim, folder = tmp_path / "run", tmp_path / "victim", tmp_path / "folder"
    (tmp_path / "model").mkdir()
    rundir.Run(out, tmp_path / "model", "identity").close()
    victim.write_text("precious")
    folder.mkdir()
    (out / link).unlink(missing_ok=True)
    (out / link).symlink_to(folder if link.startswith("step") else victim)
    with rundir.Run(out, tmp_path / "model", "identity") as run:
        run.write_recipe({"keep": 0.5})
        if link.startswith("step"):
            with pytest.raises(Refused, match="is a link"):
                run.step("step", {}, {}, lambda directory: None)
        else:
            run.step("step", {}, {}, lambda directory: (directory / "made").write_text("made"))
    assert victim.read_text() == "precious" and not list(folder.iterdir())


def test_f06_links_at_temporary_names_of_arrays_are_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in (".scores.tmp.safetensors", "scores.safetensors.tmp"):
        (tmp_path / name).symlink_to(victim)
    Arrays({"a": mx.zeros(3)}, {}).save(tmp_path / "scores.safetensors")
    assert victim.read_text() == "precious"
    assert list(Arrays.load(tmp_path / "scores.safetensors", "scores").arrays) == ["a"]


# ---- what people changed is kept ----


@pytest.fixture
def run(place, tmp_path) -> Path:
    """A run directory in which nothing is done yet."""
    rundir.Run(tmp_path / "run", place / "model", Checkpoint(place / "model").identity()).close()
    return tmp_path / "run"


def test_f07_fit_draws_into_a_new_file_only(place, tmp_path):
    picture = tmp_path / "pic.svg"
    picture.write_text("precious")
    assert "exists already" in pare("fit", place / "model", "--plot", picture, code=3)
    assert picture.read_text() == "precious"
    pare("fit", place / "model", "--plot", tmp_path / "other.svg")
    assert (tmp_path / "other.svg").read_text().startswith("<?xml")


def test_f07_a_report_that_was_changed_is_kept(run, capsys):
    assert json.loads(pare("report", run))["report"] == str(run / "report.md")
    with (run / "report.md").open("a") as file:
        file.write("\nMy notes.\n")
    changed = (run / "report.md").read_bytes()
    for _ in range(2):
        assert json.loads(pare("report", run))["report"] == str(run / "report-2.md")
    assert (run / "report.md").read_bytes() == changed and b"My notes" not in (run / "report-2.md").read_bytes()
    (run / "report-2.md").write_text("mine as well")
    assert json.loads(pare("report", run))["report"] == str(run / "report-3.md")
    assert (run / "report-2.md").read_text() == "mine as well"
    done = CliRunner().invoke(cli.app, ["report", str(run)])
    assert f"{run / 'report.md'} was changed since mlx-pare wrote it, and is kept" in " ".join(done.output.split())


def test_f07_a_report_that_nobody_changed_is_written_again(run):
    path = run / "report.md"
    pare("report", run)
    before = path.read_text()
    with rundir.Run(run) as opened:
        opened.step("step", {}, {}, lambda directory: None)
    assert json.loads(pare("report", run))["report"] == str(path)
    assert "| step |" in path.read_text() and "| step |" not in before
    assert [file.name for file in run.glob("report*")] == ["report.md"]


@pytest.mark.parametrize("text", ["", "mine", "<!-- mlx-pare wrote this; sha256 of all above: 00 -->"])
def test_f07_somebody_elses_report_is_kept(run, text):
    (run / "report.md").write_text(text)
    pare("report", run)
    assert (run / "report.md").read_text() == text and (run / "report-2.md").exists()


# ---- weights for the hub are no links ----


def test_f08_an_edit_of_what_is_ready_for_the_hub_changes_nothing_else(writing, place):
    command, out = writing("hub")
    before = (place / "model" / "model.safetensors").read_bytes()
    pare(*command)
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff\xff\xff\xff")
    assert (place / "model" / "model.safetensors").read_bytes() == before
    assert (out / "model.safetensors").stat().st_nlink == 1


def test_f08_the_room_is_asked_for_unless_weights_are_cloned(writing, place, monkeypatch):
    command, out = writing("hub")
    free = shutil.disk_usage(out.parent)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    error = pare(*command, code=1)
    assert "needs" in error and "100 B free" in error and str(out) in error and "mlx-pare.part" not in error
    assert not list(out.parent.iterdir())
    monkeypatch.setattr(mlx_directory, "clone", lambda file, to: bool(shutil.copyfile(file, to)))
    pare(*command)
    assert Checkpoint(out).identity() == Checkpoint(place / "model").identity()


# ---- Ctrl-C, a kill, a full disk, two at once ----

SLOW = {"gguf": "llama_cpp", "ollama": "llama_cpp", "mlx": "mlx_lm", "hub": "mlx_lm"}  # output -> server that is asked


@pytest.mark.parametrize("name", SLOW)
def test_f17_after_ctrl_c_the_same_command_starts_again(writing, name, monkeypatch):
    command, out = writing(name)
    command = [word for word in command if word != "--no-verify"]

    def pressed(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_pare.exporting.llama_cpp.available", lambda: False)
    monkeypatch.setattr(server_check, SLOW[name], pressed)
    assert pare(*command, code=1) == "interrupted: nothing unfinished is left, the same command starts again"
    assert not list(out.parent.iterdir())
    monkeypatch.setattr(server_check, SLOW[name], lambda *_: {"served": False, "reason": "of a test"})
    pare(*command)
    assert out.exists()


@pytest.mark.parametrize("name", SLOW)
def test_f17_what_fails_a_check_is_kept_under_another_name(writing, name, monkeypatch):
    command, out = writing(name)
    command = [word for word in command if word != "--no-verify"]
    monkeypatch.setattr("mlx_pare.exporting.llama_cpp.available", lambda: False)
    monkeypatch.setattr(
        server_check, SLOW[name], lambda *_: server_check.ask("broken", [sys.executable, "-c", "1 / 0"], False)
    )
    error = pare(*command, code=1)
    assert f"What was written is kept as {out}.rejected" in error and "mlx-pare.part" not in error
    assert [file.name for file in out.parent.iterdir()] == ["out.rejected"]


DYING = """
import os, shutil, sys
from mlx_pare.cli import main as cli
from mlx_pare.{wing} import {module}
first, *later = {signals}
real = shutil.rmtree
def removing(*given, **named):
    if later:
        os.kill(os.getpid(), later.pop())
    real(*given, **named)
def die(*given, **named):
    shutil.rmtree = removing
    os.kill(os.getpid(), first)
{module}.{function} = die
sys.argv = ["mlx-pare", *{command}]
cli.main()
"""
LAST = {
    "import": ("gguf.read.rebuild", "write_config"),
    "gguf": ("exporting.llama_cpp", "check"),
    "ollama": ("exporting.ollama", "modelfile"),
    "mlx": ("exporting.mlx_directory", "card"),
    "hub": ("exporting.mlx_directory", "copy_tokenizer"),
}  # what is called when almost everything is written: module, function


def dying(name: str, command: list, *signals: int) -> subprocess.CompletedProcess:
    """A command whose process gets a signal when it has written almost everything, and a second one while it cleans
    up."""
    (wing, _, module), function = LAST[name][0].rpartition("."), LAST[name][1]
    code = DYING.format(
        wing=wing,
        module=module,
        function=function,
        signals=[*map(int, signals)],
        command=[str(word) for word in command],
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["import", "gguf", "hub"])
def test_f17_what_a_killed_process_leaves_is_removed_by_the_same_command(writing, name):
    command, out = writing(name)
    assert dying(name, command, signal.SIGKILL).returncode == -signal.SIGKILL
    assert not out.exists() and list(out.parent.iterdir())
    pare(*command)
    assert [file.name for file in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_f17_two_signals_in_a_row_leave_nothing(writing, sent):
    """People press Ctrl-C twice: the second comes while the first is cleaned up after."""
    command, out = writing("import")
    done = dying("import", command, sent, sent)
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().endswith("interrupted: nothing unfinished is left, the same command starts again")
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("name", LAST)
def test_f18_of_two_at_once_the_second_is_told_so(writing, name, monkeypatch):
    """The second begins when the first has written almost everything."""
    command, out = writing(name)
    module, function = (importlib.import_module(f"mlx_pare.{LAST[name][0]}"), LAST[name][1])
    real, said = getattr(module, function), []

    def second(*given, **named):
        if not said:
            said.append("begun")
            words = [sys.executable, "-m", "mlx_pare", *map(str, command)]
            done = subprocess.run(words, capture_output=True, text=True, timeout=120)
            said.append((done.returncode, done.stderr.strip()))
        return real(*given, **named)

    monkeypatch.setattr(module, function, second)
    pare(*command)
    assert said[1] == (3, f"mlx-pare: another mlx-pare is writing {out}. Wait for it, or choose another name.")
    assert [file.name for file in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
@pytest.mark.parametrize("exclusive", [True, False], ids=["renamed in one step", "in two"])
@pytest.mark.parametrize("name", ["import", "gguf"])
def test_f18_what_got_the_name_meanwhile_is_kept(writing, name, kind, exclusive, monkeypatch):
    command, out = writing(name)
    module, function = (importlib.import_module(f"mlx_pare.{LAST[name][0]}"), LAST[name][1])
    real = getattr(module, function)

    def meanwhile(*given, **named):
        {"file": out.touch, "directory": out.mkdir, "link": lambda: out.symlink_to("nowhere")}[kind]()
        return real(*given, **named)

    if not exclusive:
        atomic = pytest.importorskip("mlx_pare.store.atomic")
        monkeypatch.setattr(atomic, "_exclusive_rename", lambda source, target: False)
    monkeypatch.setattr(module, function, meanwhile)
    assert f"{out} exists already" in pare(*command, code=3)
    kept = {"file": out.is_file, "directory": lambda: not list(out.iterdir()), "link": out.is_symlink}
    assert kept[kind]()
    assert {file.name for file in out.parent.iterdir()} <= {"out", "out.rejected"}


@pytest.mark.parametrize("name", LAST)
def test_f19_what_fails_leaves_no_directories_above_it_either(writing, name, tmp_path, monkeypatch):
    command, out = writing(name)
    command = [out / "above" / "it" if word == out else word for word in command]

    def broken(*given, **named) -> None:
        raise ValueError

    monkeypatch.setattr(f"mlx_pare.{LAST[name][0]}.{LAST[name][1]}", broken)
    assert "internal error" in pare(*command, code=1)
    assert not list(out.parent.iterdir())


def test_f19_an_error_names_what_people_know(writing, monkeypatch):
    command, out = writing("import")
    out.parent.chmod(0o500)

    def forbidden(path, mode=0o777, **named) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "mkdir", forbidden)
    assert pare(*command, code=1).startswith(f"Permission denied: {out}.")


@pytest.mark.parametrize("name", LAST)
def test_f19_a_full_disk_leaves_nothing(writing, name, monkeypatch):
    command, out = writing(name)

    def full(*given, **named) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"mlx_pare.{LAST[name][0]}.{LAST[name][1]}", full)
    assert pare(*command, code=1) == "No space left on device. Make room on the disk: nothing unfinished is left."
    assert not list(out.parent.iterdir())


# ---- file systems without locks ----


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.EBADF])
def test_f15_a_file_system_without_locks_is_no_other_process(tmp_path, writing, monkeypatch, capsys, number):
    def unknown(*_) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unknown)
    (tmp_path / "model").mkdir()
    with rundir.Run(tmp_path / "run", tmp_path / "model", "identity") as run:
        assert "is on a file system without locks" in capsys.readouterr().err
        assert run.step("step", {}, {}, lambda directory: (directory / "made").write_text("made"))
        assert json.loads(pare("status", tmp_path / "run"))["state"] == "working"
    assert json.loads(pare("status", tmp_path / "run"))["state"] != "working"
    command, out = writing("import")
    pare(*command)
    assert out.exists()


def test_f15_a_lock_of_another_process_still_counts(tmp_path):
    (tmp_path / "model").mkdir()
    with rundir.Run(tmp_path / "run", tmp_path / "model", "identity"):
        with pytest.raises(Refused, match="another mlx-pare is working on"):
            rundir.Run(tmp_path / "run")
        assert json.loads(pare("status", tmp_path / "run"))["state"] == "working"


# ---- templates with names ----


def test_case_17_templates_in_a_folder_come_along(writing, place, tmp_path):
    tool = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}
    plain = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    model = Path(shutil.copytree(place / "model", tmp_path / "model"))
    (model / "chat_template.jinja").write_text(plain)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | tojson }}\n" + plain)
    cut = tmp_path / "cut"
    prune(model, plan_of(model, [(64, 2)] * 4), cut)
    found = json.loads(pare("export", cut, "--hub-ready", tmp_path / "hub", "--no-verify"))
    assert "additional_chat_templates/tool_use.jinja" in found["files"]
    pare("export", cut, "--mlx", tmp_path / "mlx", "--group-size", "32", "--no-verify")
    for directory in (model, cut, tmp_path / "hub", tmp_path / "mlx"):
        chat = [{"role": "user", "content": "hi"}]
        assert "look" in load_tokenizer(directory).apply_chat_template(chat, tools=[tool], tokenize=False), directory


def test_case_17_a_template_may_not_lead_out_of_its_model(place, tmp_path):
    model = Path(shutil.copytree(place / "model", tmp_path / "model"))
    (tmp_path / "secret").write_text("secret")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").symlink_to(tmp_path / "secret")
    assert "outside of the model's directory" in pare("export", model, "--hub-ready", tmp_path / "hub", code=1)


def test_what_is_made_inside_of_an_unfinished_output_waits_for_nobody(tmp_path, monkeypatch):
    """A command that makes a directory has its verbs write into it: the lock on it is our own."""
    from mlx_pare.store import atomic

    monkeypatch.setattr(atomic.time, "sleep", lambda seconds: pytest.fail("waits for itself"))
    with atomic.created(tmp_path / "out") as outer:
        with atomic.created(outer.with_name("inner")) as inner:
            inner.write_text("made")
        outer.mkdir()
        (outer.with_name("inner")).rename(outer / "inner")
    assert (tmp_path / "out" / "inner").read_text() == "made"
