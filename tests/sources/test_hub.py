"""hub: what is known of a model without its weights, from a server that logs each byte it sends, and its troubles."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hub_server import SHA, Repo
from huggingface_hub import constants
from safetensors.numpy import save_file

from mlx_pare.base.errors import PareError, UsageError
from mlx_pare.sources import hub_reader
from mlx_pare.sources.hub_cache import Remote, RemoteTensor
from mlx_pare.sources.hub_reader import GUESS, HubError, Unreachable, looks_like_repo, remote
from mlx_pare.tensors.safetensors import read_header

NAME = "org/model"
OTHER = "f" * 40
CONFIG = {"model_type": "llama", "hidden_size": 64}
API, CDN = f"/api/models/{NAME}/revision/main", f"/{NAME}/model.safetensors"


@pytest.fixture
def model(server, tmp_path) -> Path:
    """org/model on the server: a config, a weight file, a GGUF file and a text."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "README.md").write_text("# A model\n")
    (folder / "model-q8_0.gguf").write_bytes(b"GGUF" * 5)
    save_file(arrays("model.embed", 3), folder / "model.safetensors")
    server.repos[NAME] = Repo(folder)
    return folder


def arrays(prefix: str, count: int) -> dict[str, np.ndarray]:
    kinds = (np.float32, np.float16, np.uint32)
    return {f"{prefix}.{i}.weight": np.zeros((i + 1, 8), kinds[i % 3]) for i in range(count)}


def shard(folder: Path, count: int) -> list[Path]:
    """The weight file replaced by ``count`` shards with an index."""
    (folder / "model.safetensors").unlink()
    files = [folder / f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for i, file in enumerate(files):
        save_file(arrays(f"model.layers.{i}", 3), file)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    return files


def large(file: Path, tensors: int = 1, data: int = 50_000_000) -> int:
    """A sparse weight file of that many bytes of data; returns where its header ends."""
    step = data // tensors
    table = {
        f"t.{i}": {"dtype": "U8", "shape": [step], "data_offsets": [i * step, (i + 1) * step]} for i in range(tensors)
    }
    header = json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(file, 8 + len(header) + step * tensors)
    return 8 + len(header)


def local(*files: Path) -> dict[str, RemoteTensor]:
    return {n: RemoteTensor(e.dtype, e.shape, e.nbytes) for file in files for n, e in read_header(file).items()}


def refused(kind: type[PareError], *words: str, repo: str = NAME) -> PareError:
    """``remote`` raises exactly this, in one line that holds every word."""
    with pytest.raises(PareError) as caught:
        remote(repo)
    line = str(caught.value)
    assert type(caught.value) is kind, repr(caught.value)
    assert "\n" not in line and all(word in line for word in words), line
    return caught.value


# ---- names ----


@pytest.mark.parametrize(
    "text",
    [NAME, "Qwen/Qwen3-32B", "mlx-community/Qwen3-0.6B-4bit", "a/b@main", "a/b@v1.0", "a/b@refs/pr/1", f"a/b@{SHA}"],
)
def test_names_of_models(text):
    assert looks_like_repo(text) and looks_like_repo(Path(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "qwen3",
        "/a/b",
        "./a/b",
        "../a",
        "a/..",
        "a/b/c",
        "~/a",
        "a/b@",
        "a/b@../x",
        "a--b/c",
        "a/b c",
        "a/b\n",
        "é/b",
    ],
)
def test_other_texts(text):
    assert not looks_like_repo(text)
    with pytest.raises(UsageError, match="org/name@revision"):
        remote(text)


def test_an_existing_path_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert looks_like_repo("runs/demo")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert not looks_like_repo("runs/demo")


# ---- what is read, and what is transferred ----


def test_single_file(server, model):
    found = remote(NAME)
    assert found.tensors == local(model / "model.safetensors") and len(found.tensors) == 3
    assert (found.repo, found.revision, found.config) == (NAME, SHA, CONFIG)
    assert found.files == ("README.md", "config.json", "model-q8_0.gguf", "model.safetensors")
    assert found.gguf == (("model-q8_0.gguf", 20),)
    assert [(asked.by, asked.path.split("?")[0]) for asked in server.log] == [
        ("hub", API),
        ("hub", f"/{NAME}/resolve/{SHA}/config.json"),
        ("hub", f"/{NAME}/resolve/{SHA}/model.safetensors"),
        ("cdn", CDN),
    ]
    redirects = sum(asked.sent for asked in server.log if asked.status == 302)
    assert found.downloaded_bytes == server.sent() - redirects


def test_shards(server, model):
    files, said = shard(model, 17), []
    found = remote(NAME, said.append)
    assert found.tensors == local(*files) and list(found.tensors) == list(local(*files))
    assert said[-1] == "reading headers 17 of 17"
    assert not [asked for asked in server.log if "index.json" in asked.path]
    assert len(server.log) == 2 + 2 * 17


@pytest.mark.parametrize(("seconds", "told"), [(1, [1, 2, 3]), (0.5, [2, 3]), (0, [3])])
def test_progress_is_said_once_a_second(server, model, monkeypatch, seconds, told):
    shard(model, 3)
    clock = itertools.count(0, seconds)
    monkeypatch.setattr(hub_reader, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    said = []
    remote(NAME, said.append)
    assert said == [f"reading headers {i} of 3" for i in told]


def test_names_are_quoted(server, model):
    (model / "model.safetensors").rename(model / "model v2#1?%41.safetensors")
    assert remote(NAME).tensors == local(model / "model v2#1?%41.safetensors")


def test_weights_are_not_transferred(server, model):
    file = model / "model.safetensors"
    end = large(file)
    found = remote(NAME)
    server.settle()
    assert found.tensors == local(file) and end < 200
    ((asked),) = [a for a in server.log if a.by == "cdn"]
    assert (asked.range, asked.sent, asked.status) == (f"bytes=0-{GUESS - 1}", GUESS, 206)
    assert found.downloaded_bytes < GUESS + 2000


def test_long_header_is_read_to_its_last_byte_and_no_further(server, model):
    file = model / "model.safetensors"
    end = large(file, tensors=5000)
    assert end > 3 * GUESS
    assert remote(NAME).tensors == local(file)
    cdn = [asked for asked in server.log if asked.by == "cdn"]
    assert [a.range for a in cdn] == [f"bytes=0-{GUESS - 1}", f"bytes={GUESS}-{end - 1}"]
    assert server.sent("model.safetensors") == end + 2 * len(b"Found. Redirecting")


@pytest.mark.parametrize("tensors", [1, 5000])
def test_server_without_ranges_is_not_read_to_the_end(server, model, tensors):
    server.ranges = False
    file = model / "model.safetensors"
    end = large(file, tensors)
    found = remote(NAME)
    assert found.tensors == local(file)
    assert found.downloaded_bytes < 2 * end + 400_000
    assert server.sent("model.safetensors") < 30_000_000  # what the sockets of both sides hold
    assert {asked.status for asked in server.log if asked.by == "cdn"} == {599}, "the client hung up"


def test_gguf_alone(server, model):
    (model / "model.safetensors").unlink()
    (model / "config.json").unlink()
    found = remote(NAME)
    assert (found.config, found.tensors, found.gguf) == ({}, {}, (("model-q8_0.gguf", 20),))


def test_renamed_model_is_followed(server, model):
    server.trouble["/api/models/old/name/revision/main"] = [(307, {"Location": API + "?blobs=true"})]
    server.trouble[f"/old/name/resolve/{SHA}/config.json"] = [(307, {"Location": f"/{NAME}/resolve/{SHA}/config.json"})]
    server.trouble[f"/old/name/resolve/{SHA}/model.safetensors"] = [
        (307, {"Location": f"/{NAME}/resolve/{SHA}/model.safetensors"})
    ]
    assert remote("old/name").tensors == local(model / "model.safetensors")


# ---- revisions and the cache ----


def test_revision_is_pinned(server, model):
    server.repos[NAME].refs = {"main": OTHER, "refs/pr/1": SHA}
    for asked, commit in ((NAME, OTHER), (f"{NAME}@refs/pr/1", SHA), (f"{NAME}@{OTHER}", OTHER)):
        server.log.clear()
        assert remote(asked).revision == commit
        assert all(f"/resolve/{commit}/" in a.path for a in server.log[1:] if a.by == "hub")
        assert "/refs/" not in server.log[0].path, "the hub takes a name with slashes in one piece"
    refused(HubError, "org/model has no revision nope", "branch", repo=f"{NAME}@nope")


def test_second_call_asks_for_the_commit_alone(server, model):
    first = remote(NAME)
    server.log.clear()
    second = remote(NAME)
    assert second == first and [asked.path for asked in server.log] == [API + "?blobs=true"]
    assert second.downloaded_bytes == server.sent() < 1000


def test_a_commit_needs_no_network_twice(server, model):
    first = remote(f"{NAME}@{SHA}")
    server.log.clear()
    assert remote(f"{NAME}@{SHA}") == first
    assert not server.log and remote(f"{NAME}@{SHA}").downloaded_bytes == 0


def test_what_changed_is_read_again(server, model):
    remote(NAME)
    save_file(arrays("new", 2), model / "model.safetensors")
    server.repos[NAME].refs["main"] = OTHER
    assert remote(NAME).tensors == local(model / "model.safetensors")
    assert remote(NAME).revision == OTHER


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "tensors": [], "gguf": 3}'])
def test_damaged_cache_is_read_anew(server, model, content):
    first = remote(NAME)
    (kept,) = Path(constants.HF_ASSETS_CACHE).rglob("*.json")
    kept.write_text(content)
    assert remote(NAME) == first
    assert json.loads(kept.read_text())["revision"] == SHA


def test_cache_that_cannot_be_written(server, model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "file"))
    assert remote(NAME).tensors == remote(NAME).tensors == local(model / "model.safetensors")


def test_offline(server, model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(Unreachable, "offline mode is set (HF_HUB_OFFLINE)", "Unset it", "catalogue")
    assert not server.log
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    first = remote(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.log.clear()
    said = []
    assert remote(NAME, said.append) == first and not server.log
    assert "offline mode is set" in said[0] and "as of commit 01234567" in said[0]


def test_offline_a_downloaded_model_serves(server, model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = Path(constants.HF_HUB_CACHE) / "models--org--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(OTHER)
    shutil.copytree(model, cached / "blobs")
    snapshot = cached / "snapshots" / OTHER
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/config.json")
    refused(Unreachable, "offline mode is set")  # a part of it is none
    for name in ("model.safetensors", "model-q8_0.gguf"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    found = remote(NAME)
    assert found == Remote(
        NAME, OTHER, CONFIG, local(model / "model.safetensors"),
        ("config.json", "model-q8_0.gguf", "model.safetensors"), (("model-q8_0.gguf", 20),),
    )  # fmt: skip
    assert found.downloaded_bytes == 0 and not server.log


# ---- who may read it ----


def test_token_goes_to_the_hub_and_not_to_the_cdn(server, model, monkeypatch):
    server.repos[NAME].gated = True
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert remote(NAME).tensors
    assert {(asked.by, asked.login) for asked in server.log} == {("hub", f"Bearer {server.token}"), ("cdn", None)}


@pytest.mark.parametrize(("token", "status"), [(None, "401"), ("hf_other", "403")])
def test_gated(server, model, monkeypatch, token, status):
    server.repos[NAME].gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    page = "https://huggingface.co/org/model"
    refused(
        HubError, "does not let you read org/model", status, f"Accept its licence on the page {page}", "hf auth login"
    )
    assert not [asked for asked in server.log if asked.by == "cdn"]


def test_implicit_token_can_be_switched_off(server, model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    remote(NAME)
    assert {asked.login for asked in server.log} == {None}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, {}), ["has no model org/model", "(404)", "Check the name", "catalogue"]),
        ((401, {"X-Error-Code": "RepoNotFound"}), ["has no model org/model", "(401)", "private", "hf auth login"]),
        ((401, {"X-Error-Message": "Invalid credentials in Authorization header"}), ["not accept your token", "again"]),
        ((403, {}), ["does not let you read org/model", "hf auth login"]),
        ((429, {}), ["too many requests (429)", "Try again later"]),
        ((418, {}), ["answers 418"]),
    ],
)
def test_refusals(server, model, answer, words):
    server.trouble[API] = [answer]
    refused(HubError, *words)
    assert len(server.log) == 1


def test_unknown_model(server):
    refused(HubError, "has no model no/such", "Check the name, or give a name of the catalogue", repo="no/such")


# ---- a network in trouble ----


def test_no_server(server, monkeypatch):
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", "http://{}:{}".format(*bound.getsockname()))
        refused(Unreachable, "the connection to 127.0.0.1 failed", "refused", "catalogue")


def test_no_name_server(server, monkeypatch):
    def failing(*args: object, **more: object) -> None:
        raise socket.gaierror(8, "nodename nor servname provided, or not known")

    monkeypatch.setattr(socket, "getaddrinfo", failing)
    monkeypatch.setattr(constants, "ENDPOINT", "https://name:secret@hub.example")
    error = refused(Unreachable, "the connection to hub.example failed", "not known", "catalogue")
    assert "secret" not in str(error)


@pytest.mark.parametrize("endpoint", ["nonsense", "http://a b", "http://a:port"])
def test_endpoint_that_is_none(server, monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    refused(Unreachable, "the connection to", "failed (")


def test_server_that_never_answers(server, model, monkeypatch):
    monkeypatch.setattr(hub_reader, "TIMEOUT", 0.2)
    server.trouble[API] = ["hang"]
    start = time.monotonic()
    refused(Unreachable, "timed out", "catalogue")
    assert time.monotonic() - start < 2 and len(server.log) == 1


def test_name_server_that_never_answers(server, monkeypatch):
    monkeypatch.setattr(hub_reader, "PATIENCE", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(1.5))
    start = time.monotonic()
    refused(Unreachable, "did not answer within 0.2 seconds")
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("trouble", ["die", "hang", (503, {})])
def test_one_broken_connection_is_tried_again(server, model, monkeypatch, trouble):
    monkeypatch.setattr(hub_reader, "TIMEOUT", 0.2)
    server.trouble[CDN] = [trouble]
    assert remote(NAME).tensors == local(model / "model.safetensors")


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("die", ["peer closed connection"]),
        ("hang", ["timed out"]),
        ((503, {}), ["localhost answers 503"]),
        ((403, {}), ["localhost answers 403"]),
        ((206, {"Content-Range": "bytes 5-9/900"}), ["other bytes"]),
        ((302, {"Location": "ftp://a/b"}), ["failed (Request URL has an unsupported protocol"]),
    ],
)
def test_broken_for_good(server, model, monkeypatch, trouble, words):
    files = shard(model, 12)
    monkeypatch.setattr(hub_reader, "TIMEOUT", 0.2)
    server.trouble[f"/{NAME}/{files[1].name}"] = [trouble] * 2
    refused(Unreachable, *words)
    assert not list(Path(constants.HF_ASSETS_CACHE).rglob("*.json")), "half of a model is not kept"


def test_last_answer_serves_when_the_hub_is_in_trouble(server, model):
    first, said = remote(NAME), []
    server.trouble[API] = [(502, {}), (200, {}, b"<html>Welcome to the hotel</html>")]
    assert remote(NAME, said.append) == first == remote(NAME, said.append)
    assert "answers 502" in said[0] and "not a list of files" in said[1]


# ---- nothing that is sent is believed ----


def entry(start: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def packed(table: object) -> bytes:
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(header)) + header


HOSTILE = {
    "empty": (b"", "is cut off"),
    "short": (b"\x00\x01", "is cut off"),
    "huge-length": (struct.pack("<Q", 1 << 60) + b"{}", "is cut off"),
    "length-over-file": (struct.pack("<Q", 1000) + b"{}", "is cut off"),
    "garbage": (packed(b"{nothing of this is JSON"), "is damaged"),
    "not-utf8": (packed(b'{"\xff\xfe": 1}'), "is damaged"),
    "list": (packed([1, 2]), "is damaged"),
    "deep": (packed(b"[" * 100_000), "is damaged"),
    "no-offsets": (packed({"a": {"dtype": "F32", "shape": [1]}}), "is damaged"),
    "wrong-bytes": (packed({"a": entry(0, 8, [3])}) + bytes(8), "8 bytes for F32 [3]"),
    "backwards": (packed({"a": entry(8, 0, [-2])}), "is damaged"),
    "overlap": (packed({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}) + bytes(12), "starts at byte 4"),
    "gap": (packed({"a": entry(8, 16, [2])}) + bytes(16), "starts at byte 8"),
    "floats": (packed({"a": entry(0, 4, [1.0])}) + bytes(4), "not whole numbers"),
    "cut-off": (packed({"a": entry(0, 800, [200])}) + bytes(8), "its header describes"),
    "dtype": (
        packed({"a": entry(0, 4, [4], "F9_E5M3")}) + bytes(4),
        "F9_E5M3, which is not supported",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header(server, model, name):
    raw, words = HOSTILE[name]
    (model / "model.safetensors").write_bytes(raw)
    error = refused(PareError, "org/model/model.safetensors", words)
    assert error.cure == "look for another copy or conversion of the model"
    with pytest.raises(PareError) as caught:
        read_header(model / "model.safetensors")
    assert caught.value.problem == error.problem.replace(NAME, str(model)), "as of a local file"


def test_names_cannot_write_on_the_terminal(server, model):
    raw = packed({"\x1b[2J\n" + "x" * 5000: entry(0, 8, [3])}) + bytes(8)
    (model / "model.safetensors").write_bytes(raw)
    assert len(str(refused(PareError, "is damaged"))) < 400
    table = {"\x1b[2J": entry(0, 4, [1], "\x1b[31mF32")}
    (model / "model.safetensors").write_bytes(packed(table) + bytes(4))
    refused(PareError, "tensors of type \\x1b[31mF32")


def test_header_of_more_than_the_limit_is_not_read(server, model):
    file = model / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 200 << 20))
    os.truncate(file, 300 << 20)
    refused(PareError, "not a safetensors file")
    assert server.sent("model.safetensors") < GUESS + 100


def test_all_headers_together_are_bounded(server, model, monkeypatch):
    monkeypatch.setattr(hub_reader, "MAX_RECEIVED", 1000)
    shard(model, 30)
    refused(PareError, "are larger than")
    assert len(server.log) < 2 + 2 * 20


@pytest.mark.parametrize("config", ["", "[1]", "{", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"])
def test_damaged_config(server, model, config):
    (model / "config.json").write_text(config)
    refused(PareError, "model config org/model/config.json")


@pytest.mark.parametrize(
    ("listing", "kind", "words"),
    [
        (b"<html>", Unreachable, "not a list of files"),
        (b"[" * 100_000, Unreachable, "not a list of files"),
        ({"sha": "../../x", "siblings": []}, Unreachable, "not a list of files"),
        ({"sha": 7, "siblings": []}, Unreachable, "not a list of files"),
        ({"sha": SHA, "siblings": {"a": 1}}, Unreachable, "not a list of files"),
        ({"sha": SHA, "siblings": []}, PareError, "neither model*.safetensors nor *.gguf"),
        ({"sha": SHA, "siblings": [{"rfilename": "x\x1b[2J.gguf", "size": 5}]}, PareError, "neither"),
        ({"sha": SHA, "siblings": [{"rfilename": "x.gguf"}]}, PareError, "how large org/model/x.gguf is"),
        ({"sha": SHA, "siblings": [{"rfilename": "x.gguf", "size": -1}]}, PareError, "how large"),
        ({"sha": SHA, "siblings": [{"rfilename": "model.safetensors", "size": 99}]}, PareError, "has no config.json"),
        (
            {"sha": SHA, "siblings": [{"rfilename": f"model{i}.safetensors", "size": 9} for i in range(1001)]},
            PareError,
            "has 1001 weight files, more than 1000",
        ),
    ],
)
def test_hostile_listing(server, listing, kind, words):
    body = listing if isinstance(listing, bytes) else json.dumps(listing).encode()
    server.trouble[API] = [(200, {}, body)]
    refused(kind, words)
    assert len(server.log) == 1


def test_file_that_is_listed_and_not_there(server, model):
    listed = [{"rfilename": n, "size": 900} for n in ("config.json", "model-1.safetensors")]
    server.repos[NAME].lies = {"siblings": listed}
    (model / "config.json").write_text(json.dumps(CONFIG) + " " * 900)
    refused(HubError, "answers 404 when asked for org/model")


def test_missing_shard(server, model):
    shard(model, 4)[2].unlink()
    refused(PareError, "org/model has 3 of 4 weight files")


def test_tensor_in_two_files(server, model):
    save_file(arrays("model.embed", 1), model / "model-copy.safetensors")
    refused(PareError, "tensor model.embed.0.weight is in two weight files of org/model")


def test_case_14_a_second_set_of_shards_that_the_index_does_not_name(server, model):
    """As granite-3.2-8b-instruct was uploaded."""
    files = shard(model, 3)
    every = {n: a for i in range(3) for n, a in arrays(f"model.layers.{i}", 3).items()}
    names = {n: file.name for i, file in enumerate(files) for n in arrays(f"model.layers.{i}", 3)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    save_file({n: a for n, a in list(every.items())[:5]}, model / "model-00001-of-00002.safetensors")
    save_file({n: a for n, a in list(every.items())[5:]}, model / "model-00002-of-00002.safetensors")
    told: list[str] = []
    found = remote(NAME, told.append)
    assert set(found.tensors) == set(every)
    assert any("2 weight files are left over" in line for line in told)


# ---- the environment, as a user sets it ----


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "TRANSFORMERS_OFFLINE"}
    environment = clean | {"NO_PROXY": "*"} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


SHOW = f"from mlx_pare.sources.hub_reader import remote; print(remote('{NAME}').revision)"


def test_variables_of_huggingface_hub_are_honoured(server, model, tmp_path):
    server.repos[NAME].gated = True
    home = tmp_path / "elsewhere"
    given = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_TOKEN": server.token, "HOME": str(tmp_path / "user")}
    done = in_a_process(SHOW, **given)
    assert (done.stdout.strip(), done.stderr) == (SHA, "")
    written = sorted(f.relative_to(tmp_path).as_posix() for f in (home, tmp_path / "user") for f in f.rglob("*.*"))
    assert written == ["elsewhere/assets/mlx-pare/hub/headers/org--model@main.json"]
    assert not [asked for asked in server.log if "agent" in asked.path], "nothing is asked but the model"

    server.log.clear()
    done = in_a_process(SHOW, **given, HF_HUB_OFFLINE="1")
    assert (done.stdout.strip(), server.log) == (SHA, [])
    done = in_a_process(SHOW, **given | {"HF_HOME": str(tmp_path / "empty")}, HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "offline mode is set (HF_HUB_OFFLINE)" in done.stderr and not server.log


def test_huggingface_hub_is_imported_for_a_name_and_not_before():
    code = "import sys; from mlx_pare.sources import hub_reader as hub; hub.looks_like_repo('a/b'); "
    code += "print({'huggingface_hub', 'httpx', 'httpx2', 'mlx', 'numpy'} & set(sys.modules))"
    assert in_a_process(code).stdout.strip() == "set()"
