"""Models that are handed on: packed by mlx-lm, ready for the hub, with a card; and what stock servers answer."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import mlx_lm
import pico
import pytest
import yaml
from typer.testing import CliRunner

from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.cli import main as cli
from mlx_pare.exporting import mlx_directory, server_check
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pruning.prune import prune
from mlx_pare.reporting import card
from tests.arch.test_uneven import COUNTS, model, plan_of  # noqa: F401 (model is a fixture)
from tests.pruning.test_adapters import adapter_of


@pytest.fixture
def pruned(model, tmp_path):  # noqa: F811
    """A directory that was cut, in the place of one of a run."""
    source = model("llama")
    out = tmp_path / "pruned"
    prune(source, plan_of(source, [(64, 2)] * 4), out)
    return out


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("counts", ["alike", "differ"])
def test_packed_by_mlx_lm(model, tmp_path, mix, counts):  # noqa: F811
    source, out = model("llama-untied"), tmp_path / "packed"
    prune(source, plan_of(source, [(64, 4)] * 4 if counts == "alike" else COUNTS["ffn"]), tmp_path / "cut")
    done = mlx_directory.packed(tmp_path / "cut", out, 4, 32, mix)
    checkpoint, config = Checkpoint(out), json.loads((out / "config.json").read_text())
    assert done["bytes"] == checkpoint.nbytes() < Checkpoint(tmp_path / "cut").nbytes() / 3
    rich = {name for name, value in config["quantization"].items() if isinstance(value, dict) and value["bits"] == 6}
    assert len(rich) == done["modules_with_more"] == (0 if not mix else len(rich)) and bool(rich) == mix
    if mix and counts == "alike":
        layers = {0: 0, 1: 0, 2: 1, 3: 1}  # of four: the last eighth is none, every third and what is behind 7/8
        down = {n for n in rich if "down_proj" in n}
        assert "lm_head" in rich and down and all(int(n.split(".")[2]) in layers for n in down)
        assert not any("up_proj" in n or "q_proj" in n for n in rich)
    mlx_lm.load(str(out))
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "survivors.json").exists() and "4 bits in groups of 32" in (out / "README.md").read_text()
    with pytest.raises(PareError, match="packed already"):
        mlx_directory.packed(out, tmp_path / "again", 4)
    with pytest.raises(Refused, match="exists already"):
        mlx_directory.packed(tmp_path / "cut", out, 4)
    with pytest.raises(UsageError, match="--bits 7 is not allowed"):
        mlx_directory.packed(tmp_path / "cut", tmp_path / "seven", 7)
    assert not list(tmp_path.glob("*.partial"))


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_ready_for_the_hub(pruned, tmp_path):
    (pruned / "LICENSE").write_text("MIT")
    (pruned / "stray.py").write_text("print('run me')")
    done = mlx_directory.hub_ready(pruned, tmp_path / "hub")
    assert {"config.json", "model.safetensors", "tokenizer.json", "survivors.json", "LICENSE"} <= set(done["files"])
    assert (
        "stray.py" not in done["files"] and front((tmp_path / "hub" / "README.md").read_text())["library_name"] == "mlx"
    )
    assert len(done["notes"]) == 2 and Checkpoint(tmp_path / "hub").identity() == Checkpoint(pruned).identity()
    mlx_lm.load(str(tmp_path / "hub"))
    (tmp_path / "hub" / "config.json").write_text("{}")  # what is edited there is not edited here
    assert Checkpoint(pruned).arch
    with pytest.raises(Refused, match="exists already"):
        mlx_directory.hub_ready(pruned, tmp_path / "hub")


def test_the_licence_and_the_base_come_from_the_original(pruned, tmp_path, monkeypatch):
    original = tmp_path / "models--owner--Name-7B" / "snapshots" / "abc"
    pico.make(original)
    (original / "README.md").write_text("---\nlicense: apache-2.0\nevil: x\n---\n")
    (original / "LICENSE").write_text("Apache")
    run = tmp_path / "run"
    (run / "prune").mkdir(parents=True)
    pruned.rename(run / "prune" / "model")
    manifest = {
        "schema_version": 1,
        "model": str(original),
        "source": "0" * 64,
        "versions": {},
        "machine": {},
        "steps": {},
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "recipe.toml").write_text('keep = 0.75\ndata = "/home/me/secret.txt"\nseed = 0\n')
    done = mlx_directory.hub_ready(run / "prune" / "model", tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert front(text)["license"] == "apache-2.0" and front(text)["base_model"] == "owner/Name-7B"
    assert "keep = 0.75" in text and "secret" not in text and "0" * 64 in text
    assert done["notes"] == [] and (tmp_path / "hub" / "LICENSE").read_text() == "Apache"


def test_a_card_says_what_was_measured(pruned, tmp_path):
    text = card.card(pruned)
    assert "parameters in 4 layers, not quantized" in text and "Was it worth it" not in text


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_mlx_lm_serves_it(pruned, kind):
    file = pruned / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("chat_template", None)
    if kind == "chat":
        settings["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    file.write_text(json.dumps(settings))
    found = server_check.mlx_lm(pruned, kind == "chat")
    assert found["served"] and found["server"] == "mlx_lm.server" and found["text"].strip()


def test_a_server_that_ends_is_told_at_once():
    begun = time.monotonic()
    with pytest.raises(PareError, match="broken does not start: no such thing"):
        server_check.ask("broken", [sys.executable, "-c", "print('no such thing'); raise SystemExit(1)"], False)
    assert time.monotonic() - begun < server_check.START_SECONDS / 2


def test_a_server_that_never_answers_is_told(monkeypatch):
    monkeypatch.setattr(server_check, "START_SECONDS", 2.0)
    with pytest.raises(PareError, match="deaf does not start: nothing"):
        server_check.ask("deaf", [sys.executable, "-c", "import time; time.sleep(60)"], False)


def test_somebody_elses_manifest_is_no_run(pruned, tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    assert card.run_of(pruned) is None and "Was it worth it" not in card.card(pruned)


ANSWERS = """
import http.server, json, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.say({})
    def do_POST(self): self.say(%s)
    def say(self, what):
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(what).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ({"choices": []}, "does not answer"),
        ({"choices": [{"text": "  "}]}, "nothing"),
        ({"choices": [{"text": 7}]}, "nothing"),
    ],
)
def test_a_wrong_answer_is_no_answer(answer, why):
    with pytest.raises(PareError, match=why):
        server_check.ask("server", [sys.executable, "-c", ANSWERS % repr(answer)], False)


def test_without_a_server_of_llama_cpp_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(server_check, "LLAMA_SERVER", ("no_such_module",))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert server_check.llama_cpp(tmp_path / "m.gguf", False)["served"] is False


# ---- the command line ----


def command(*words, code: int = 0) -> dict:
    done = CliRunner().invoke(cli.app, [*map(str, words), "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def test_a_directory_for_ollama(pruned, tmp_path):
    found = command(
        "export", pruned, "--ollama", tmp_path / "for", "--gguf", "q8_0", "--for", "m4-24gb", "--context", "300"
    )
    assert sorted(f.name for f in (tmp_path / "for").iterdir()) == ["Modelfile", "model-q8_0.gguf"]
    assert found["modelfile"] == str(tmp_path / "for" / "Modelfile") and found["num_ctx"] == 300
    assert "PARAMETER num_ctx 300" in (tmp_path / "for" / "Modelfile").read_text()
    assert found["verify"]["checked"] and found["fits"][0]["fits"] and Path(found["path"]).exists()
    assert found["served"]["served"] and found["served"]["text"].strip()
    assert "exists already" in command("export", pruned, "--ollama", tmp_path / "for", code=3)["error"]
    assert not list(tmp_path.glob("*.partial"))


def test_packed_and_hub_by_command(pruned, tmp_path):
    found = command("export", pruned, "--mlx", tmp_path / "mlx", "--bits", "4", "--group-size", "32", "--mixed")
    assert found["served"]["server"] == "mlx_lm.server" and found["bytes"] == Checkpoint(tmp_path / "mlx").nbytes()
    found = command("export", tmp_path / "mlx", "--hub-ready", tmp_path / "hub", "--no-verify")
    assert found["served"] == {"served": False, "reason": "not asked"} and "README.md" in found["files"]
    assert (
        "writes one thing" in command("export", pruned, "--mlx", tmp_path / "a", "-o", tmp_path / "b", code=2)["error"]
    )
    assert "writes one thing" in command("export", pruned, code=2)["error"]


def test_adapters_by_command(model, tmp_path):  # noqa: F811
    source = model("llama")
    adapter = adapter_of(source, tmp_path / "adapter")
    prune(source, plan_of(source, [(64, 2)] * 4), tmp_path / "cut")
    found = command("adapters", adapter, "--parent", source, "--model", tmp_path / "cut", "-o", tmp_path / "out")
    assert found["layers"] == [0, 1, 2, 3] and (tmp_path / "out" / "adapters.safetensors").exists()
