"""A model is somebody else's: no code of it runs, no link leads out, nothing waits or fills the memory, no name steers
the terminal."""

from __future__ import annotations

import ast
import gc
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import xml.etree.ElementTree as xml
from pathlib import Path

import pico
import pytest

from mlx_pare import arch, lm
from mlx_pare.base import console, markdown, untrusted
from mlx_pare.base.errors import PareError, plain
from mlx_pare.base.untrusted import read_json
from mlx_pare.capacity import subject
from mlx_pare.gguf.write.tokenizer import read as read_tokenizer
from mlx_pare.model import tokenizer_files
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.model.directory import copy_tokenizer
from mlx_pare.pruning.survivors import survivors
from mlx_pare.recovery import teacher
from mlx_pare.tensors.safetensors import read_header
from mlx_pare.text import corpus

PACKAGE = Path(corpus.__file__).parents[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return pico.make(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def model(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- code ----


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return open, (str(self.witness), "w")


def test_pickles_and_code_beside_the_weights_are_left_alone(model, monkeypatch):
    witness = model.parent / "ran"
    for name in (
        "pytorch_model.bin",
        "model.bin",
        "training_args.bin",
        "tokenizer.pkl",
        "vocab.pkl",
        "spiece.model.pt",
    ):
        (model / name).write_bytes(pickle.dumps(Bomb(witness)))
    for name in ("modeling_x.py", "tokenization_x.py", "setup.py", "__init__.py", "conftest.py"):
        (model / name).write_text(f"open({str(witness)!r}, 'w')\n")
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", None]}, tokenizer_class="X")
    change(model / "config.json", auto_map={"AutoConfig": "modeling_x.C", "AutoModel": "modeling_x.M"})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    _ = Checkpoint(model).arch
    lm.load(model)
    with pytest.raises(PareError, match="trust_remote_code"):
        lm.tokenizer(model)
    assert not witness.exists()
    pickle.loads((model / "model.bin").read_bytes()).close()
    assert witness.exists()  # it was a bomb


def test_nothing_here_could_run_what_a_model_says():
    """No pickles, no eval, no shell, and every command is a list that begins with a program of ours."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "joblib", "torch", "yaml", "runpy", "code"}
    runs = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & forbidden, file
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), file
                assert called.rpartition(".")[2] not in ("spec_from_file_location", "exec_module"), file
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("shell", "False") == "False" and given.get("allow_pickle", "False") == "False", file
                assert given.get("trust_remote_code", "False") == "False", file
                if called in ("subprocess.run", "subprocess.Popen", "children.run", "children.start"):
                    runs.append((file.name, ast.unparse(node.args[0])))
    assert len(runs) >= 5  # the rule was applied to something
    ours = ("children.module(", "['/usr/sbin/", "['/usr/bin/vm_stat']", "[caffeinate, ")
    assert {(file, run) for file, run in runs if not run.startswith(ours)} == {
        ("children.py", "[*own, program, *command[1:]]"),  # what start() is given, below this Python
        ("children.py", "command"),  # the same, in the process that watches it
        ("tokenizer_files.py", "command"),  # this Python
        ("quantizer.py", "command"),  # llama-quantize as PATH has it, or this Python
        ("server_check.py", "[*command, str(port)]"),  # llama-server as PATH has it, or this Python
    }


# ---- names and links ----


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer_config.json", "merges.txt", "README.md"]
)
@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_out_of_the_directory_is_refused(model, name, absolute):
    secret = model.parent / "secret"
    if (model / name).exists():
        (model / name).rename(secret)  # even where it would be sound
    else:
        secret.write_text("secret")
    (model / name).symlink_to(secret if absolute else "../secret")
    for read in (Checkpoint, lm.load, lm.tokenizer, lambda p: subject.open_subject(str(p), subject.Form())):
        with pytest.raises(PareError, match="outside of the model's directory"):
            read(model)


def test_links_inside_and_a_link_to_the_directory_itself_are_followed(model):
    (model / "model.safetensors").rename(model / "weights")
    (model / "model.safetensors").symlink_to("weights")
    (model.parent / "link").symlink_to("model")
    for path in (model, model.parent / "link"):
        assert len(Checkpoint(path).arch.layers) == 4


def test_the_cache_of_hugging_face_is_read(model, tmp_path):
    """Its snapshots are links into blobs of the same repository; those of another one are outside."""
    home = tmp_path / "models--org--name"
    snapshot = home / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    shutil.copytree(model, home / "blobs")
    for file in model.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert len(Checkpoint(snapshot).arch.layers) == 4
    lm.load(snapshot)
    assert lm.tokenizer(snapshot).encode("abc")
    (tmp_path / "models--org--other" / "blobs").mkdir(parents=True)
    other = tmp_path / "models--org--other" / "blobs" / "x"
    other.write_text("{}")
    (snapshot / "added_tokens.json").symlink_to(other)
    with pytest.raises(PareError, match="outside"):
        Checkpoint(snapshot)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_names_of_an_index_lead_nowhere(model, name):
    (model.parent / "secret.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(PareError, match="lacks"):
        Checkpoint(model)


def test_a_link_planted_later_is_not_copied_either(model):
    opened = Checkpoint(model)
    (model.parent / "secret").write_text("secret")
    (model / "merges.txt").symlink_to("../secret")
    with pytest.raises(PareError, match="outside"):
        copy_tokenizer(opened, model.parent)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"])
def test_pipes_devices_and_directories_are_no_files(model, name):
    """Reading /dev/zero never ends, and a pipe waits for somebody to write."""
    for plant in (os.mkfifo, lambda p: p.mkdir()):
        target = model / name
        if target.is_file():
            target.unlink()
        plant(target)
        with pytest.raises(PareError):
            Checkpoint(model)
            lm.tokenizer(model)
        target.rmdir() if target.is_dir() else target.unlink()
    for read in (read_header, lambda p: read_json(p, "file")):
        with pytest.raises(PareError, match=r"regular|device"):
            read(Path("/dev/zero"))


# ---- memory and time ----

MANY = {
    "lists": ("[", "[],", "]"),
    "objects": ("[", '{"":0},', "]"),
    "objects of lists": ("[", '{"a":[]},', "]"),
    "nested": ("[", "[[]],", "]"),
    "numbers": ("[", "300,", "]"),
    "floats": ("[", "1e1,", "]"),
    "texts": ("[", '"ab",', "]"),
    "wide texts": ("[", '"\u0100",', "]"),
    "keys": ("{", None, "}"),
}


def most_that_is_read(name: str, budget: int) -> str:
    """About the largest such JSON within both limits: what it is taken to cost grows with its length."""
    opening, unit, closing = MANY[name]

    def text(count: int) -> str:
        middle = "".join(f'"{i:07x}":0,' for i in range(count)) if unit is None else unit * count
        return opening + middle[:-1] + closing

    def cost(count: int) -> int:
        with pytest.raises(ValueError) as caught:
            untrusted.check_cost(text(count), 0)
        return int(re.search(r"(\d+) MiB", str(caught.value))[1]) << 20

    count = min(budget / (cost(200_000) + (1 << 20)), untrusted.MAX_JSON / len(text(200_000).encode())) * 200_000
    return text(int(count))


@pytest.mark.parametrize("name", MANY)
def test_no_json_takes_more_than_200_mb(name):
    """One of them at the limit itself, the others at a quarter of it."""
    part = 1 if name == "nested" else 4
    budget = untrusted.BUDGET // part
    text = most_that_is_read(name, budget)
    assert len(text) > (1 << 20) / part  # the limit is not a trifle
    raw = text.encode()
    tracemalloc.start()
    gc.disable()  # nothing here refers to itself, and each collection goes through all that was read
    try:
        untrusted.loads(raw, budget)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        gc.enable()
        tracemalloc.stop()
    assert peak < 200e6 / part
    with pytest.raises(ValueError, match="memory"):
        untrusted.check_cost(text * 12, budget)


def test_json_is_not_nested_without_end(tmp_path):
    for depth in (65, 900, 100_000):
        for opening, closing in (("[", "]"), ('{"a":', "}")):
            with pytest.raises(ValueError, match="nested"):
                untrusted.loads(opening * depth + "0" + closing * depth)
    assert untrusted.loads("[" * 64 + "]" * 64)


def test_a_name_is_not_twice_in_a_header(tmp_path):
    entry = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    for head, fine in ((f"{{{entry}}}", True), (f"{{{entry},{entry}}}", False)):
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(head)) + head.encode() + b"x")
        if fine:
            assert read_header(path)["a"].nbytes == 1
        else:
            with pytest.raises(PareError, match="twice"):
                read_header(path)


@pytest.mark.parametrize("layers", [501, 10**9, 2**31, -1, 1e308, float("nan"), "4", [4], True])
def test_a_config_cannot_ask_for_any_number_of_layers(layers):
    config = {**pico.config_of("llama", vocab_size=64), "num_hidden_layers": layers}
    with pytest.raises(PareError, match="num_hidden_layers"):
        arch.describe(config)


def tokenizer_with(model: Path, pattern: str) -> None:
    file = model / "tokenizer.json"
    raw = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, raw["pre_tokenizer"]]}
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(\w|\d)*\b\B", r"\s*\s*\s*\s*\b\B", r"(", r"(?=(.*)*){9}\1"])
def test_a_pattern_that_searches_for_ever_is_refused(model, pattern, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "TRY_SECONDS", 2)
    tokenizer_with(model, pattern)
    with pytest.raises(PareError, match="cannot load the tokenizer"):
        lm.tokenizer(model)


def test_a_pattern_of_a_real_model_is_not(model):
    tokenizer_with(model, r"\p{N}{1,3}(?=(?:\p{N}{3})*\b)|\s+(?!\S)|\s+")
    assert lm.tokenizer(model).encode("a 1234567  b")


def test_a_tokenizer_that_breaks_on_a_text_is_an_error_of_one_line():
    class PanicException(BaseException):
        """As Rust throws it."""

    class Breaks:
        bos_token_id = None

        def encode(self, text, **_):
            raise PanicException("retry-limit-in-match over")

    with pytest.raises(PareError, match="retry-limit"):
        corpus.windows(Breaks(), ["some text"], 4)


def test_tokenizer_files_are_not_of_any_size(model):
    for name, size in (("tokenizer.json", 65 << 20), ("tokenizer_config.json", 17 << 20), ("merges.txt", 17 << 20)):
        with (model / name).open("ab") as file:
            file.truncate(size)
        with pytest.raises(PareError, match=f"{name} is larger"):
            lm.tokenizer(model)
        (model / name).unlink()


def test_two_ids_of_one_token_are_found_at_once():
    """A large vocabulary once took hours here."""
    vocab = {f"t{i}": i for i in range(60_000)}
    raw = {
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
        "added_tokens": [{"id": 60_000, "content": "t59999"}],
    }
    with pytest.raises(PareError, match="two ids for 't59999'"):
        read_tokenizer(raw, 60_001, "tokenizer.json")


BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}" + "{% endfor %}" * 2,
    "memory": "{% set a = 'a' * 10 ** 9 %}{{ a * 20 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "syntax": "{% for %}",
}  # fmt: skip


@pytest.fixture(scope="module")
def writers(whole, tmp_path_factory):
    """A tokenizer for a chat template, each with a process of its own."""

    def writer(template: str):
        place = Path(shutil.copytree(whole, tmp_path_factory.mktemp("chat") / "model"))
        change(place / "tokenizer_config.json", chat_template=template)
        return lm.tokenizer(place)

    return writer


@pytest.mark.parametrize("bomb", ["loops", "memory", "power"])
def test_a_template_is_a_program_with_limits(writers, bomb, monkeypatch, tmp_path):
    if bomb == "memory" and sys.platform != "linux":
        pytest.skip("macOS limits no memory")
    monkeypatch.setattr(tokenizer_files, "CHAT_SECONDS", 3)
    tokenizer, chat = writers(BOMBS[bomb]), tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "x"}]}')
    for _ in range(2 if bomb == "loops" else 1):  # the process is there again for the next one
        with pytest.raises(PareError, match="cannot write this chat"):
            corpus.read(chat, tokenizer)


def test_a_template_writes_what_the_tokenizer_itself_would(writers, tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{{ tools | tojson if tools else '' }}"
    bounded_one = writers(template)
    stock = lm.stock_tokenizer(bounded_one.apply_chat_template.directory)
    chat = [{"role": "user", "content": "naïve 日本 🙂\u2028"}, {"role": "assistant", "content": "<|endoftext|>"}]
    tools = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {}}}]
    for more in ({}, {"tools": tools}):
        assert bounded_one.apply_chat_template(chat, tokenize=False, **more) == stock.apply_chat_template(
            chat, tokenize=False, **more
        )
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": chat}))
    assert corpus.read(file, bounded_one)[0].startswith("<user>naïve")
    for bomb in ("escape", "syntax"):
        with pytest.raises(ValueError):
            writers(BOMBS[bomb]).apply_chat_template(chat)


# ---- what is said ----

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x1b[31m\rname\n\u202egnp\x9b1m\u200b\ud800"


def test_no_name_reaches_the_terminal_as_it_is(capsys):
    console.say(f"note: {HOSTILE}")
    console.warn(HOSTILE)
    console.error(HOSTILE)
    console.table(HOSTILE, ["<name"], [[HOSTILE]], HOSTILE)
    shown = "".join(capsys.readouterr())
    assert all(line.isprintable() for line in shown.split("\n")) and shown.count("\n") <= 14
    assert "\\x1b[31m" in shown and "\\u202e" in shown and "\\ud800" in shown
    error = PareError(HOSTILE, HOSTILE)
    assert str(error).isprintable() and error.problem.isprintable() and len(str(PareError("\x00" * 10**6))) < 5000
    assert plain("naïve 日本 🙂 [x]") == "naïve 日本 🙂 [x]"


def test_a_command_says_it_in_one_plain_line(model):
    """A process of its own: a library may write to the terminal past Python."""
    change(model / "config.json", model_type=HOSTILE.replace("\ud800", ""))
    done = subprocess.run(
        [sys.executable, "-m", "mlx_pare", "calibrate", str(model), "--out", str(model.parent / "run")],
        capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent,
    )  # fmt: skip
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and done.stderr.strip().isprintable()


def test_markdown_of_a_report_means_nothing_but_itself():
    said = markdown.escaped(
        f"{HOSTILE} <script>x</script> ![i](http://x/y) [a](javascript:b) **b** _c_ `d` | # &lt; ~~e~~"
    )
    assert said.isprintable() and "<" not in said and "http://" not in said
    for mark in "[]*_`|#~":
        assert said.count(mark) == said.count(f"\\{mark}"), mark
    row = markdown.row("a", f"x|y\n{HOSTILE}<b>")
    assert row.count("|") - row.count("\\|") == 3 and row.isprintable() and "<" not in row


def test_a_picture_holds_names_as_text(tmp_path):
    from mlx_pare.capacity.fit import fit
    from mlx_pare.reporting.fit_plot import draw

    found = fit("qwen3-0.6b", ["m4-24gb"]) | {"model": f"{HOSTILE}<script>alert(1)</script>&\"'$x^2$"}
    raw = draw(found, tmp_path / "fit.svg").read_bytes()
    tree = xml.fromstring(raw)
    assert b"<script" not in raw and not [e for e in tree.iter() if e.tag.endswith(("script", "foreignObject"))]


# ---- survivors come with a model ----


def test_survivors_of_units_that_are_not_there(model):
    good = {
        "source_identity": "a", "hidden": [0, 1],
        "layers": [{"layer": 0, "source": 1, "ffn": [0], "kv_head": [0], "q_head": [0]}],
    }  # fmt: skip
    file = model / "survivors.json"
    file.write_text(json.dumps(good))
    found, opened = survivors(file), Checkpoint(model)
    assert teacher.places(found, opened).kept == (0, 1)
    for changes in ({"hidden": [0, 10**6]}, {"layers": [{**good["layers"][0], "source": 99}]}):
        with pytest.raises(PareError, match="does not have"):
            teacher.places({**found, **changes}, opened)
    for changes in ({"hidden": [1, 0]}, {"hidden": [-1]}, {"layers": []}, {"layers": [{"source": 1}]}, {"hidden": "x"}):
        file.write_text(json.dumps({**good, **changes}))
        with pytest.raises(PareError, match=r"survivors.* is not valid"):
            survivors(file)
