"""Processes that mlx-pare starts end with it, however it ends: a closed terminal, kill -9, Ctrl-C, a limit of time."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mlx_pare.base import children
from mlx_pare.cli import interrupts
from mlx_pare.model import tokenizer_files

ROOT = Path(__file__).resolve().parents[2]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}" + "{% endfor %}" * 2
WAYS = ["exec", "watch"] if sys.platform == "linux" else ["watch"]
SERVER = """
import http.server, sys
class Deaf(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
    def do_POST(self): import time; time.sleep(600)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Deaf).serve_forever()
"""
STARTS = {  # what a process does that ends only with its child
    "server": "from mlx_pare.exporting import server_check; "
    f"server_check.ask('server', [sys.executable, '-c', {SERVER!r}], False)",
    "chat": "from mlx_pare.model.tokenizer_files import Chats; "
    "import mlx_pare.model.tokenizer_files as t; t.CHAT_SECONDS = 300; "
    "Chats(Path(sys.argv[1]))([{'role': 'user', 'content': 'x'}])",
    "quantizer": "from mlx_pare.gguf.write import quantizer; "
    "quantizer.quantize(Path('a.gguf'), Path('b.gguf'), 'q4_k_m', 1)",
    "judge": "from mlx_pare.exporting import llama_cpp; llama_cpp.tokenize(Path('a.gguf'), ['x'])",
}


@pytest.fixture(scope="module")
def place(pico_models, tmp_path_factory) -> Path:
    """A model whose template never ends, a llama-quantize and a llama_cpp that never answer."""
    place = tmp_path_factory.mktemp("place")
    model = Path(shutil.copytree(pico_models("llama"), place / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": LOOPS}))
    (place / "bin").mkdir()
    (place / "bin" / "llama-quantize").write_text(f"#!{sys.executable}\nimport time\ntime.sleep(600)\n")
    (place / "bin" / "llama-quantize").chmod(0o755)
    (place / "llama_cpp").mkdir()
    (place / "llama_cpp" / "__init__.py").write_text("import time\ntime.sleep(600)\n")
    return place


def started(place: Path, code: str, way: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A process that runs ``code`` as the command line would, and its child once that is at work."""
    head = "import sys; from pathlib import Path; from mlx_pare.base import children; "
    head += "from mlx_pare.cli import interrupts; interrupts.listen(); "
    head += f"children.WAY = {way!r}; "
    path = os.pathsep.join([str(ROOT), str(place), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen([sys.executable, "-c", head + code, place / "model"], env=env, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        below = psutil.Process(process.pid).children(recursive=True)
        ours = sum("children.py" in " ".join(p.cmdline()) for p in below)
        if len(below) > ours and ours == (way == "watch"):
            time.sleep(0.5)
            return process, psutil.Process(process.pid).children(recursive=True)
        assert process.poll() is None
        time.sleep(0.05)
    raise AssertionError("no child was started")


def gone(below: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that are still there after some time."""
    _, left = psutil.wait_procs(below, timeout=seconds)
    return [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


ENDINGS = [(name, signal.SIGKILL, WAYS[0]) for name in STARTS]
ENDINGS += [("server", signal.SIGHUP, WAYS[0]), ("server", signal.SIGTERM, WAYS[0]), ("chat", signal.SIGHUP, WAYS[0])]
ENDINGS += [("server", signal.SIGKILL, "watch"), ("chat", signal.SIGKILL, "watch"), ("judge", signal.SIGHUP, "watch")]


@pytest.mark.parametrize(("name", "sent", "way"), ENDINGS, ids=str)
def test_f14_no_child_is_left(place, name, sent, way):
    process, below = started(place, STARTS[name], way)
    assert below
    process.send_signal(sent)
    process.wait(20)
    left = gone(below, 10)
    for each in left:
        each.kill()
    assert not left


def test_f14_hangup_is_told_in_one_line_and_a_second_one_does_not_stop_the_clean_up():
    code = """
import time
from mlx_pare.cli import main as cli
from mlx_pare.base import errors
from mlx_pare.cli import interrupts
interrupts.listen()
try:
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(1)
        print("clean", flush=True)
except KeyboardInterrupt as error:
    print(errors.told(error)[0])
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "clean\n"
        assert process.stdout.readline().startswith("interrupted")
    assert process.returncode == 0


def test_f14_nohup_is_respected():
    code = "from mlx_pare.cli import interrupts; import os, signal; interrupts.listen(); "
    code += "os.kill(os.getpid(), signal.SIGHUP)"

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    assert subprocess.run([sys.executable, "-c", code], preexec_fn=ignore).returncode == 0


def test_an_interrupt_inside_of_generated_code_ends_with_the_exit_code():
    """CPython ends by SIGINT, whatever the exit code, when a bare KeyboardInterrupt went through exec() of a text."""
    code = """
import os, signal, sys
from mlx_pare.cli import interrupts
interrupts.listen()
try:
    exec("os.kill(os.getpid(), signal.SIGINT)\\nfor i in range(10**9): pass")
except KeyboardInterrupt:
    sys.exit(7)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 7


def test_f14_the_writer_of_chats_ends_itself(place):
    """Its parent may be stopped, or too busy to keep the time."""
    process = children.start(
        children.module("lm.chat_writer", str(place / "model"), "1"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == b"{}\n"
        question = {"messages": [{"role": "user", "content": "x"}], "tools": None, "answer": False, "now": "2026-11-01"}
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
        assert process.wait(15) != 0
    finally:
        children.end(process)


def test_f14_idle_seconds_do_not_count_against_a_chat(pico_models, tmp_path):
    model = Path(shutil.copytree(pico_models("llama"), tmp_path / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages[0].content }}"}))
    write = tokenizer_files.Chats(model)
    for text in "abc":
        assert write([{"role": "user", "content": text}]) == text
    write._process.stdin.flush()
    time.sleep(1.5)
    assert write([{"role": "user", "content": "later"}]) == "later"


@pytest.mark.parametrize("way", WAYS)
def test_a_child_is_what_was_started(monkeypatch, way):
    """Arguments, streams, environment and exit code are those of the command; a signal is told as one."""
    monkeypatch.setattr(children, "WAY", way)
    code = "import os, sys; print(sys.argv[1:], os.environ['A'], sys.stdin.read()); sys.exit(5)"
    done = children.run([sys.executable, "-c", code, "-x", "a b"], "given", env={**os.environ, "A": "é"})
    assert (done.returncode, done.stdout) == (5, "['-x', 'a b'] é given\n")
    assert children.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]).returncode == -9
    assert children.run([sys.executable, "-c", "import sys; sys.stderr.write('no')"]).stderr == "no"
    with pytest.raises(FileNotFoundError):
        children.run(["no-such-program"])
    begun = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        children.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=1)
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("way", WAYS)
def test_a_polite_end_waits_for_the_child(monkeypatch, tmp_path, way):
    monkeypatch.setattr(children, "WAY", way)
    code = "import signal, sys, time\nfrom pathlib import Path\n"
    code += "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), Path(sys.argv[1]).touch(), sys.exit(0)))\n"
    code += "print('ready', flush=True)\ntime.sleep(60)"
    process = children.start([sys.executable, "-c", code, str(tmp_path / "clean")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    children.end(process, 10)
    assert (tmp_path / "clean").exists() and process.returncode == 0


GROWS = """
import subprocess, sys, time
begun = time.monotonic()
while time.monotonic() - begun < 1.5:
    subprocess.run([sys.executable, "-I", "-S", "-c", ""])
subprocess.run([sys.executable, "-I", "-S", "-c", "import time; held = b'x' * 200_000_000; time.sleep(60)"])
"""


def test_memory_is_watched_while_processes_of_a_child_come_and_go():
    """The one that takes too much begins late, when the family is read less often."""
    command = [sys.executable, "-c", GROWS]
    with pytest.raises(subprocess.TimeoutExpired):
        children.run(command, timeout=3.5, most=1 << 30)
    assert children.run(command, timeout=60, most=100_000_000).returncode == -signal.SIGKILL


def test_watching_memory_takes_little_time(monkeypatch):
    """After ten looks it asks only at every tenth for all processes of the computer."""
    looked, asked, real = [], [], psutil.Process.children
    monkeypatch.setattr(children, "MEMORY_POLL_S", 0.001)
    monkeypatch.setattr(children, "_resident", lambda process: looked.append(process) or 0)
    monkeypatch.setattr(psutil.Process, "children", lambda *a, **k: asked.append(0) or real(*a, **k))
    waiting = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    children.bound(waiting, 1 << 40)
    begun = time.monotonic()
    while len(looked) < 55 and time.monotonic() - begun < 60:
        time.sleep(0.01)
    waiting.communicate()
    assert len(looked) >= 55
    assert len(asked) == children.FAMILY_LOOKS + (len(looked) - 1) // 10


def test_all_children_are_started_in_one_place():
    starts = re.compile(r"(subprocess\.|os\.(spawn|fork|posix))|Popen$")
    called = {
        file.name
        for file in (ROOT / "mlx_pare").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call) and starts.match(ast.unparse(node.func))
    }
    assert called == {"children.py", "machine.py"}  # there: short questions to macOS


def test_interrupted_is_a_keyboard_interrupt():
    assert issubclass(interrupts.Interrupted, KeyboardInterrupt)
