"""Any name of a file or directory is only a name: [ ] * ? in it are no pattern, a leading dash is no option."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_pare import lm
from mlx_pare.base import plain_path
from mlx_pare.base.errors import PareError
from mlx_pare.exporting import server_check
from mlx_pare.exporting.export import export

LAYERS = {"num_hidden_layers": 2}  # whole runs take half the time of four
QUICK = ["--samples", 4, "--length", 32, "--recover-steps", 0, "--widths", "even", "--trials", 0, "--axes", "ffn"]
QUICK += ["--keep", 0.9]
STRANGE = ["v[12]", "v [4bit]", "v*", "v?", "-v", "v\nw", "[!a]", "v'\"$(x);#%~"]
LONG = "v[12]/" + "x" * 200 + "/" + "é" * 100


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLX_PARE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def texts(two_texts) -> list[str]:
    return ["--data", two_texts["data"], "--test-data", two_texts["test_data"]]


def copied(model: Path, to: Path) -> Path:
    return Path(shutil.copytree(model, to))


def decoy(model: Path, to: Path) -> Path:
    """The same model with other weights."""
    copied(model, to)
    weights = mx.load(str(to / "model.safetensors"))
    mx.save_safetensors(str(to / "model.safetensors"), {k: 0 * v + 0.01 for k, v in weights.items()})
    return to


def weights_of(model) -> mx.array:
    return model.model.layers[0].mlp.down_proj.weight


# ---- F1, public case 21 ----


@pytest.mark.parametrize("name", [*STRANGE, LONG], ids=ascii)
def test_f01_a_model_is_loaded_from_its_own_directory(pico_models, tmp_path, name):
    own = copied(pico_models("llama", **LAYERS), tmp_path / name)
    for other in ("v1", "v2", "v 4", "vx", "a", "b"):
        decoy(pico_models("llama", **LAYERS), tmp_path / other)
    found = lm.load(own)
    expected = mx.load(str(pico_models("llama", **LAYERS) / "model.safetensors"))
    assert mx.array_equal(weights_of(found), expected["model.layers.0.mlp.down_proj.weight"])
    assert lm.tokenizer(own).encode("The") == lm.tokenizer(pico_models("llama", **LAYERS)).encode("The")


def test_f01_evaluate_measures_the_model_that_was_named(pare, pico_models, tmp_path, texts):
    def perplexity(model):
        done = pare("evaluate", model, "--data", texts[3], "--length", 32, "--samples", 2, "--json")
        assert done.code == 0, done.err
        return done.document["perplexity"]

    own = copied(pico_models("llama", **LAYERS), tmp_path / "v[12]")
    decoy(pico_models("llama", **LAYERS), tmp_path / "v1")
    assert perplexity(own) == perplexity(pico_models("llama", **LAYERS)) != perplexity(tmp_path / "v1")


def test_f01_a_relative_name_that_begins_with_a_dash(pico_models, tmp_path, monkeypatch):
    copied(pico_models("llama", **LAYERS), tmp_path / "-m[1]")
    monkeypatch.chdir(tmp_path)
    assert len(lm.load(Path("-m[1]")).layers) == 2


@pytest.mark.parametrize("name", ["model [Q8].gguf", "-[a]*?.gguf", "m\n.gguf"], ids=ascii)
def test_f01_a_gguf_file_may_be_called_anything(pare, pico_models, tmp_path, texts, name):
    export(pico_models("llama", **LAYERS), tmp_path / "plain.gguf", "f32")
    strange = Path(shutil.copy(tmp_path / "plain.gguf", tmp_path / name))
    asked = ["--data", texts[3], "--length", 32, "--samples", 2, "--json"]
    plain, found = (pare("evaluate", *asked, "--", file) for file in (tmp_path / "plain.gguf", strange))
    assert plain.code == found.code == 0, found.err
    assert plain.document["perplexity"] == found.document["perplexity"]


def test_f01_the_cache_may_be_anywhere(pare, pico_models, tmp_path, monkeypatch, texts):
    export(pico_models("llama", **LAYERS), tmp_path / "m.gguf", "q8_0")
    monkeypatch.setenv("MLX_PARE_CACHE", str(tmp_path / "ca[ch]e*"))
    done = pare("evaluate", tmp_path / "m.gguf", "--data", texts[3], "--length", 32, "--samples", 2)
    assert done.code == 0, done.err
    assert [p for p in (tmp_path / "ca[ch]e*").iterdir() if p.is_dir()]


def test_f01_case_21_run_into_a_directory_with_brackets(pare, pico_models, tmp_path, texts):
    own = copied(pico_models("llama", **LAYERS), tmp_path / "m [4bit]")
    out = tmp_path / "run [draft]"
    done = pare("run", own, "--out", out, *texts, *QUICK, "--json")
    assert done.code == 0, done.err
    assert Path(done.document["model"]) == out / "prune" / "model"
    note = "\n".join(json.loads((out / "prune" / "check.json").read_text())["warnings"])
    assert "move" in note and "[" in note  # stock mlx_lm.load would look for files of another name there
    assert pare("run", own, "--out", out, *texts, *QUICK).code == 0  # and again
    plain = pare("run", pico_models("llama", **LAYERS), "--out", tmp_path / "plain", *texts, *QUICK, "--json")
    assert plain.document["after"]["perplexity"] == done.document["after"]["perplexity"]
    assert not json.loads((tmp_path / "plain" / "prune" / "check.json").read_text())["warnings"]


def test_f01_hub_ready_packed_and_bench(pare, pico_models, tmp_path):
    own = copied(pico_models("llama", **LAYERS), tmp_path / "m[1]")
    done = pare("export", own, "--hub-ready", tmp_path / "h[1]", "--json")
    assert done.code == 0, done.err
    assert done.document["served"]["served"] and "move" in done.err  # asked through mlx_lm.server
    packed = pare("export", own, "--mlx", tmp_path / "p[1]", "--bits", 8, "--no-verify", "--json")
    assert packed.code == 0, packed.err
    asked = pare("bench", tmp_path / "h[1]", tmp_path / "p[1]", "--trials", 1, "--prompt", 8, "--new", 2)
    assert asked.code == 0, asked.err
    for directory in ("h[1]", "p[1]"):
        for file in (tmp_path / directory).glob("*.json"):
            assert plain_path.PREFIX not in file.read_text()


def test_f01_transformers_takes_a_directory_for_a_directory(pare, pico_models, tmp_path, monkeypatch):
    """A relative path with one slash looks like the name of a model on the hub."""
    copied(pico_models("llama", **LAYERS), tmp_path / "org" / "m[1]")
    monkeypatch.chdir(tmp_path)
    assert lm.tokenizer(Path("org/m[1]")).encode("The")


def test_f01_chats_are_written_by_the_template_of_the_directory(pico_models, tmp_path):
    own = copied(pico_models("llama", **LAYERS), tmp_path / "c[12]")
    (copied(pico_models("llama", **LAYERS), tmp_path / "c1") / "chat_template.jinja").write_text("wrong")
    (own / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert lm.tokenizer(own).apply_chat_template([{"role": "user", "content": "hi"}]) == "<hi>"


def test_f01_an_error_names_the_directory_that_was_given(pico_models, tmp_path):
    own = copied(pico_models("llama", **LAYERS), tmp_path / "m[1]")
    config = json.loads((own / "config.json").read_text()) | {"num_hidden_layers": 7}
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(PareError) as error:
        lm.load(own)
    assert str(own) in str(error.value) and plain_path.PREFIX not in str(error.value)


# ---- the name that stock programs get ----


def test_f01_a_plain_name_is_handed_on_as_it_is(tmp_path):
    with plain_path.plain(tmp_path / "model 4bit, v1.2") as name:
        assert name == tmp_path / "model 4bit, v1.2"


def test_f01_the_link_goes_with_its_use(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_path.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "m[1]").mkdir()
    with plain_path.plain(tmp_path / "m[1]") as name:
        assert name.resolve() == (tmp_path / "m[1]").resolve() and "[" not in str(name)
        assert len(list(tmp_path.iterdir())) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["m[1]"]


def test_f01_the_folder_for_temporary_files_may_have_such_a_name_itself(tmp_path, monkeypatch, pico_models):
    (tmp_path / "t[mp]").mkdir()
    monkeypatch.setattr(plain_path.tempfile, "tempdir", str(tmp_path / "t[mp]"))
    own = copied(pico_models("llama", **LAYERS), tmp_path / "m[1]")
    assert len(lm.load(own).layers) == 2
    monkeypatch.setattr(plain_path, "PLACES", ())
    with pytest.raises(PareError, match="characters"):
        lm.load(own)


def test_f01_weights_are_read_after_the_link_is_gone(pico_models, tmp_path):
    found = lm.load(copied(pico_models("llama", **LAYERS), tmp_path / "lazy[1]"))
    mx.eval(found.parameters())
    assert mx.all(mx.isfinite(weights_of(found)))


def test_f01_servers_get_a_plain_name(tmp_path, monkeypatch):
    asked = []

    def ask(_, command, chat):
        given = Path(command[command.index("--model" if "--model" in command else "-m") + 1])
        asked.append((given, given.exists()))
        return {"served": True}

    monkeypatch.setattr(server_check, "ask", ask)
    monkeypatch.setattr(server_check.shutil, "which", lambda _: "llama-server")
    monkeypatch.chdir(tmp_path)
    Path("-m[1]").mkdir()
    Path("-m[1].gguf").write_bytes(b"GGUF")
    server_check.mlx_lm(Path("-m[1]"), False)
    server_check.llama_cpp(Path("-m[1].gguf"), False)
    for given, there in asked:
        assert there and os.path.isabs(given) and "[" not in str(given)
    assert str(asked[1][0]).endswith(".gguf")


@pytest.mark.skipif(os.uname().sysname == "Darwin", reason="macOS has no such names")
def test_f01_a_name_that_is_not_utf8_is_refused_at_once(pare, pico_models, tmp_path, texts):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/v\xff")
    model = pico_models("llama", **LAYERS)
    for asked in ([copied(model, Path(odd)), "--out", tmp_path / "run"], [model, "--out", odd + "-run"]):
        done = pare("calibrate", *asked, *texts, "--samples", 2, "--length", 32)
        assert done.code == 1 and "not UTF-8" in done.err and not Path(asked[-1]).exists()


def test_f01_a_gguf_file_whose_name_is_not_utf8(pico_models, tmp_path):
    export(pico_models("llama", **LAYERS), tmp_path / "m.gguf", "q8_0")
    odd = (tmp_path / "m.gguf").rename(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.gguf"))
    assert len(lm.load(odd).layers) == 2  # it is known in the cache by another name
