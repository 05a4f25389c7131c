"""download: models of a hub on this machine in huggingface_hub's cache; kills, broken connections, hostile answers."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import SHA, HubServer, Repo, etag
from huggingface_hub import constants, snapshot_download

from mlx_pare.base import console, untrusted
from mlx_pare.base.errors import PareError, Refused, Unsupported, UsageError
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.model.hub_name import HubName, on_hub
from mlx_pare.sources import download, hub_cache, hub_fetch
from mlx_pare.sources.hub_files import gguf_models, kind_of, needed
from mlx_pare.sources.hub_reader import HubError, Unreachable

NAME, OTHER = "org/model", "f" * 40
API = f"/api/models/{NAME}/revision/main"
CDN = f"/{NAME}/model.safetensors"
WEIGHTS = "model.safetensors"
NOT_NEEDED = (
    "pytorch_model.bin", "consolidated.pth", "model.gguf", "training_args.bin", "tokenization_custom.py", "x.pkl",
    "onnx/model.onnx", "original/consolidated.00.pth", "original/model.safetensors", "tf_model.h5", ".gitattributes",
    "consolidated.safetensors", "picture.png", "flax_model.msgpack", "trainer_state.json", "unet/config.json",
)  # fmt: skip
BESIDE = ("LICENSE", "README.md", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "merges.txt")


@pytest.fixture(autouse=True)
def quickly(monkeypatch) -> None:
    monkeypatch.setattr(hub_fetch, "PAUSE", 0.01)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The lines that are said."""
    lines: list[str] = []
    monkeypatch.setattr(console, "say", lines.append)
    return lines


@pytest.fixture
def model(server, pico_models, tmp_path) -> Path:
    """org/model on the server: a model, and what repositories have beside one."""
    folder = tmp_path / "model"
    shutil.copytree(pico_models("llama"), folder)
    for name in (*NOT_NEEDED, *BESIDE):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"this is {name}")
    server.repos[NAME] = Repo(folder)
    return folder


def fetch(text: str = NAME) -> Path:
    return download.download(HubName.parse(text)).path


def asked(server: HubServer, name: str = WEIGHTS, by: str = "cdn") -> list[str | None]:
    """The ranges of a file that were asked for."""
    server.settle()
    return [a.range for a in server.log if a.by == by and a.method == "GET" and a.path.split("?")[0].endswith(name)]


def received(server: HubServer) -> int:
    """Bytes of bodies of files, redirects and lists aside."""
    server.settle()
    return sum(a.sent for a in server.log if "/api/" not in a.path and a.status in (200, 206))


def refused(kind: type[PareError], *words: str, text: str = NAME) -> PareError:
    """The download ends with exactly this, in one line that holds every word."""
    with pytest.raises(PareError) as caught:
        fetch(text)
    line = str(caught.value)
    assert type(caught.value) is kind, repr(caught.value)
    assert "\n" not in line and all(word in line for word in words), line
    return caught.value


def partial(folder: Path) -> Path:
    """Where the incomplete weights of a model lie."""
    return hub_cache.storage(NAME) / "blobs" / (etag(folder / WEIGHTS) + hub_fetch.INCOMPLETE)


# ---- names ----


@pytest.mark.parametrize(
    "text, parts",
    [
        (NAME, (NAME, None, None, None)),
        ("org/name@v1.0", ("org/name", "v1.0", None, None)),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1", None, None)),
        ("org/name:Q4_K_M", ("org/name", None, None, "Q4_K_M")),
        ("org/name:Q4_K_M@v1", ("org/name", "v1", None, "Q4_K_M")),
        ("org/name@v1:Q4_K_M", ("org/name", "v1", None, "Q4_K_M")),
        ("org/name/file.gguf", ("org/name", None, "file.gguf", None)),
        ("org/name/a b/x-00001-of-00002.GGUF@v1", ("org/name", "v1", "a b/x-00001-of-00002.GGUF", None)),
        ("hf.co/org/name:Q8_0", ("org/name", None, None, "Q8_0")),
        ("https://huggingface.co/org/name", ("org/name", None, None, None)),
        (Path("https://huggingface.co/org/name@main"), ("org/name", "main", None, None)),
    ],
)
def test_names(text, parts):
    found = HubName.parse(text)
    assert (found.repo, found.revision, found.file, found.tag) == parts
    assert HubName.parse(str(found)) == found


@pytest.mark.parametrize(
    "text",
    ["qwen3-8b", "/org/name", "./org/name", "org/name/", "a/b/c", "a/b/../x.gguf", "a/b//x.gguf", "a/b/..gguf/x.gguf",
     "a/b:", "a/b@", "a/b/x.gguf:Q4", "a/b@v1@v2", "models/x.gguf", "a/b/x\x1b.gguf", "a/b\\c.gguf", "", "qwen3:8b"],
)  # fmt: skip
def test_texts_that_are_no_names(text):
    assert HubName.parse(text) is None


def test_an_existing_path_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert on_hub("org/name") and on_hub("org/name:Q4_K_M")
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name:Q4_K_M").write_text("")
    assert on_hub("org/name") is None and on_hub("org/name:Q4_K_M") is None


# ---- which files ----


def test_what_reads_pictures_is_needed():
    """A multimodal model whose language model is cut keeps it."""
    files = [
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
        "chat_template.json",
    ]
    wanted = ["config.json", "model.safetensors", *files]
    assert sorted(needed(HubName(NAME), wanted)) == sorted(wanted)


def test_code_pickles_and_other_formats_are_not_needed():
    wanted = ["config.json", "tokenizer.json", WEIGHTS, *BESIDE]
    assert sorted(needed(HubName(NAME), [*NOT_NEEDED, *wanted])) == sorted(wanted)


GGUFS = [
    "M-Q4_K_M.gguf", "M-Q4_K_S.gguf", "M-UD-Q4_K_XL.gguf", "M-f16.gguf", "mmproj-M-f16.gguf", "M.imatrix.gguf",
    "Q8_0/M-Q8_0-00001-of-00002.gguf", "Q8_0/M-Q8_0-00002-of-00002.gguf", "BF16/M-BF16-00001-of-00002.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
    "text, files",
    [
        ("a/b:Q4_K_M", ["M-Q4_K_M.gguf"]),
        ("a/b:q4_k_s", ["M-Q4_K_S.gguf"]),
        ("a/b:Q4_K_XL", ["M-UD-Q4_K_XL.gguf"]),
        ("a/b:UD-Q4_K_XL", ["M-UD-Q4_K_XL.gguf"]),
        ("a/b:F16", ["M-f16.gguf"]),
        ("a/b:Q8_0", GGUFS[6:8]),
        ("a/b/Q8_0/M-Q8_0-00002-of-00002.gguf", GGUFS[6:8]),
        ("a/b/M-f16.gguf", ["M-f16.gguf"]),
    ],
)
def test_a_gguf_model_by_type_or_file(text, files):
    assert needed(HubName.parse(text), GGUFS) == files


@pytest.mark.parametrize(
    "text, kind, words",
    [
        (
            "a/b",
            UsageError,
            "a/b has 6 GGUF models (BF16, Q4_K_M, Q4_K_S, UD-Q4_K_XL, F16, Q8_0). Name one, as in a/b:Q4_K_M.",
        ),
        ("a/b:Q9_Z", PareError, "a/b has no GGUF file of type Q9_Z. There are"),
        ("a/b/M-Q4_K_L.gguf", PareError, "a/b has no M-Q4_K_L.gguf. There are M-Q4_K"),
        ("a/b:BF16", PareError, "1 of 2 parts"),
    ],
)
def test_a_gguf_model_that_is_not_named_or_not_there(text, kind, words):
    with pytest.raises(kind, match=re.escape(words)):
        needed(HubName.parse(text), GGUFS)


def test_the_only_gguf_model_needs_no_type():
    assert needed(HubName("a/b"), [*GGUFS[6:8], "README.md"]) == GGUFS[6:8]
    assert [kind_of(name) for name in gguf_models(GGUFS)] == ["BF16", "Q4_K_M", "Q4_K_S", "UD-Q4_K_XL", "F16", "Q8_0"]
    with pytest.raises(UsageError, match="2 GGUF models of type Q4_0"):
        needed(HubName.parse("a/b:Q4_0"), ["x-Q4_0.gguf", "y-Q4_0.gguf"])


# ---- downloads ----


def test_a_model_as_huggingface_hub_has_it(server, model, said):
    place = fetch()
    here = sorted(f.relative_to(place).as_posix() for f in place.rglob("*") if f.is_file())
    wanted = ["config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS, *BESIDE]
    assert here == sorted(wanted)
    assert all((place / name).read_bytes() == (model / name).read_bytes() for name in here)
    assert Checkpoint(place).identity() == Checkpoint(model).identity()
    assert received(server) == sum(
        (model / name).stat().st_size for name in [*wanted, "config.json"]
    )  # which is tried first
    assert snapshot_download(NAME, local_files_only=True, allow_patterns=wanted) == str(place), "others find it"
    assert not list(hub_cache.storage(NAME).rglob("*incomplete*"))
    assert len(said) == 1 and re.fullmatch(f"{NAME}: 7.*kB downloaded, commit 01234567", said[0])


def test_the_second_time_nothing_is_received(server, model, monkeypatch):
    place = fetch()
    server.log.clear()
    assert fetch() == place and [a.path for a in server.log] == [f"{API}?blobs=true"]
    server.log.clear()
    assert fetch(f"{NAME}@{SHA}") == place and not server.log, "a commit never changes"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch() == place and not server.log


def test_a_model_that_another_program_downloaded_serves(server, model, monkeypatch):
    place = Path(snapshot_download(NAME, allow_patterns=["config.json", "tok*.json", WEIGHTS]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch() == place
    (place / "tokenizer.json").unlink()
    (place / "tokenizer_config.json").unlink()
    refused(Unreachable, "offline mode is set", "or not all of it")


def test_part_of_a_model_does_not_serve_offline(server, model, monkeypatch):
    place = fetch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (place / "chat_template.jinja").unlink()
    refused(Unreachable, "offline mode is set", "or not all of it")


def test_only_files_that_changed_are_fetched_for_another_commit(server, model):
    fetch()
    (model / "README.md").write_text("changed")
    server.repos[NAME].refs["main"] = OTHER
    server.log.clear()
    place = fetch()
    assert place.name == OTHER and (place / "README.md").read_text() == "changed"
    assert not asked(server), "the weights are the same"


def test_a_revision(server, model):
    server.repos[NAME].refs["v1"] = OTHER
    assert fetch(f"{NAME}@v1").name == OTHER and fetch().name == SHA
    assert hub_cache.commit_of(NAME, "v1") == OTHER


@pytest.mark.parametrize("commit", [None, SHA])
def test_two_at_once_fetch_every_file_once(server, model, commit):
    found, text = [], f"{NAME}@{commit}" if commit else NAME
    threads = [threading.Thread(target=lambda: found.append(fetch(text))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(found)) == 1 and len(found) == 2 and len(asked(server)) == 1


def test_progress_has_size_and_time_left(server, model, monkeypatch, capsys):
    monkeypatch.setattr(console.Progress, "INTERVAL", 0.0)
    fetch()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"download {NAME} ")]
    assert lines and re.search(r"[\d.]+ kB/[\d.]+ kB, \d+ s left", lines[-1]), lines


# ---- broken connections ----


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_goes_on_where_it_stopped(server, model, ranges):
    size = (model / WEIGHTS).stat().st_size
    server.ranges, server.trouble[CDN] = ranges, ["die", (503, {}), "die"]
    assert (fetch() / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    first = asked(server)
    assert first[0] is None and first[1] == f"bytes={size // 2}-"
    if ranges:
        assert first[3] == f"bytes={size // 2 + (size - size // 2) // 2}-"


def test_what_is_there_is_kept_and_the_next_call_asks_for_the_rest(server, model):
    size = (model / WEIGHTS).stat().st_size
    server.trouble[CDN] = ["die"] + [(503, {})] * 20
    refused(Unreachable, "localhost answers 503", f"of {WEIGHTS} are here", "the same command again")
    left = partial(model)
    assert left.stat().st_size == size // 2
    server.trouble.clear()
    server.log.clear()
    assert (fetch() / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert asked(server) == [f"bytes={size // 2}-"] and not left.exists()


def test_a_damaged_part_is_fetched_anew(server, model):
    left = partial(model)
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x" * 1000)
    assert (fetch() / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert asked(server) == ["bytes=1000-", None]
    shutil.rmtree(hub_cache.storage(NAME))
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x" * (1 << 20))  # more than the file has
    assert (fetch() / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


def test_a_blob_that_was_cut_off_is_fetched_again(server, model):
    place = fetch()
    os.truncate((place / WEIGHTS).resolve(), 100)
    assert (fetch() / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


def test_a_blob_that_is_gone_is_fetched_again(server, model):
    place = fetch()
    (place / WEIGHTS).resolve().unlink()
    assert (fetch() / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


@pytest.mark.parametrize("trouble", ["hang", (500, {}), (429, {})])
def test_one_request_in_trouble_does_not_spoil_it(server, model, monkeypatch, trouble):
    monkeypatch.setattr("mlx_pare.sources.hub_reader.TIMEOUT", 0.3)
    server.trouble[f"/{NAME}/resolve/{SHA}/tokenizer.json"] = [trouble]
    if trouble == (429, {}):
        refused(HubError, "too many requests (429)")
    assert fetch().is_dir()


def test_segments_of_a_large_file(server, model, monkeypatch):
    size = (model / WEIGHTS).stat().st_size
    monkeypatch.setattr(hub_fetch, "SEGMENT", size // 2 + 1)
    assert (fetch() / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert asked(server) == [f"bytes=0-{size // 2}", f"bytes={size // 2 + 1}-{size - 1}"]


# ---- the room ----


def test_no_room(server, model, monkeypatch, tmp_path):
    size = (model / WEIGHTS).stat().st_size
    monkeypatch.setattr(download.shutil, "disk_usage", lambda place: SimpleNamespace(free=size // 2))
    refused(Refused, f"{NAME} takes 7", "kB more", "free", "set HF_HOME")
    assert not asked(server) and not list(tmp_path.rglob("*.incomplete"))


def test_a_disk_that_fills_up_keeps_what_is_there(server, model, monkeypatch):
    real = hub_fetch._Written.add

    def full(written: object, piece: bytes) -> None:
        if written.size:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(written, piece[:1000])

    monkeypatch.setattr(hub_fetch._Written, "add", full)
    refused(PareError, "is full: ", f"of {NAME} are here", "the same command goes on from there")
    monkeypatch.undo()


def test_what_is_there_needs_no_room(server, model, monkeypatch):
    size = (model / WEIGHTS).stat().st_size
    server.trouble[CDN] = ["die"] + [(503, {})] * 20
    refused(Unreachable, "503")
    server.trouble.clear()
    monkeypatch.setattr(download.shutil, "disk_usage", lambda place: SimpleNamespace(free=size - size // 2 + 20_000))
    assert fetch().is_dir()


# ---- hostile answers ----


@pytest.mark.parametrize("name", ["../evil.gguf", "/etc/evil.gguf", "a/../../evil.gguf", "a//evil.gguf", "./evil.gguf"])
def test_a_name_that_leads_out_is_refused(server, model, name):
    listed = [{"rfilename": n, "size": 9} for n in ("config.json", WEIGHTS, name)]
    server.repos[NAME].lies = {"siblings": listed}
    refused(HubError, "which is no name of a file")
    assert len(server.log) == 1


@pytest.mark.parametrize("tag", ["../../../evil", "/etc/evil", "..", ".hidden", "a" * 200, "", "a\\b c"])
def test_an_etag_that_is_no_name_is_refused(server, model, tag, tmp_path):
    server.repos[NAME].headers[WEIGHTS] = {"X-Linked-ETag": f'"{tag}"'}
    server.repos[NAME].headers["config.json"] = {"ETag": f'"{tag}"'}
    refused(HubError, "the ETag", "which is no name")
    assert not list(tmp_path.rglob("*evil*"))


def test_an_etag_that_changes_its_mind_is_refused(server, model, tmp_path, monkeypatch):
    """huggingface_hub would make the ETag a path."""
    made = download._make_snapshot

    def later(*given) -> None:
        server.repos[NAME].headers[WEIGHTS] = {"X-Linked-ETag": '"../../../evil"'}
        made(*given)

    monkeypatch.setattr(download, "_make_snapshot", later)
    refused(HubError, "which is no name")
    assert not list(tmp_path.rglob("*evil*"))


def test_a_file_of_another_commit_is_refused(server, model, monkeypatch, tmp_path):
    made = download._make_snapshot

    def later(*given) -> None:
        server.repos[NAME].headers["config.json"] = {"X-Repo-Commit": "../../../evil"}
        made(*given)

    monkeypatch.setattr(download, "_make_snapshot", later)
    refused(HubError, "of another commit")
    assert not list(tmp_path.rglob("*evil*"))


def test_other_bytes_than_a_moment_ago_are_not_received(server, model, monkeypatch):
    made = download._make_snapshot

    def later(*given) -> None:
        (model / WEIGHTS).write_bytes(os.urandom(5000))
        made(*given)

    monkeypatch.setattr(download, "_make_snapshot", later)
    refused(HubError, "now says other things")


def test_sizes_that_contradict_each_other_are_refused(server, model):
    server.repos[NAME].headers[WEIGHTS] = {"X-Linked-Size": "12345"}
    refused(HubError, f"says that {NAME}/{WEIGHTS} has", "and that it has 12345")
    assert not asked(server)


def test_more_bytes_than_announced_are_not_kept(server, model, tmp_path):
    server.trouble[CDN] = ["more"]
    refused(HubError, "sends more of", "bytes it said")
    assert partial(model).stat().st_size <= (model / WEIGHTS).stat().st_size


def test_other_bytes_than_the_checksum_are_refused(server, model):
    server.repos[NAME].headers[WEIGHTS] = {"X-Linked-ETag": f'"{"a" * 64}"'}
    refused(HubError, "has other bytes than its checksum says")
    assert not (hub_cache.storage(NAME) / "blobs" / ("a" * 64)).exists()
    assert not list(hub_cache.storage(NAME).rglob("*.incomplete"))


def test_a_size_of_nothing_possible_is_refused(server, model, monkeypatch):
    listed = [{"rfilename": n, "size": (model / n).stat().st_size} for n in ("config.json", WEIGHTS)]
    server.repos[NAME].lies = {"siblings": [*listed, {"rfilename": "tokenizer.json", "size": 1 << 50}]}
    server.repos[NAME].headers["tokenizer.json"] = {"Content-Length": str(1 << 50)}
    refused(HubError, "tokenizer.json has", "more than any such file")
    server.repos[NAME].lies = {"siblings": [*listed[:1], {"rfilename": WEIGHTS, "size": 1 << 60}]}
    server.repos[NAME].headers[WEIGHTS] = {"X-Linked-Size": str(1 << 60)}
    refused(Refused, "GB more, and the disk of")
    assert not asked(server)


def test_a_listing_without_end_is_refused(server, model, monkeypatch):
    monkeypatch.setattr("mlx_pare.sources.hub_reader.MAX_LISTING", 1000)
    listed = [{"rfilename": f"{i:0200}.json", "size": 9} for i in range(100)]
    server.repos[NAME].lies = {"siblings": listed}
    refused(Unreachable, "not a list of files")


def test_a_link_in_place_of_the_part_is_not_followed(server, model, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    partial(model).parent.mkdir(parents=True)
    partial(model).symlink_to(victim)
    with pytest.raises(OSError):
        fetch()
    assert victim.read_text() == "precious"


def test_what_cannot_be_cut_is_not_downloaded(server, model):
    config = json.loads((model / "config.json").read_text())
    for change, words in (
        ({"model_type": "mamba2"}, "mamba2"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ):
        (model / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(PareError, match=words):
            fetch()
    assert not asked(server)
    (model / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_moe", "num_experts": 8}))
    with pytest.raises((Unsupported, PareError)):
        fetch()
    assert not asked(server)


# ---- who may read it ----


@pytest.mark.parametrize("token, status", [(None, "401"), ("hf_other", "403")])
def test_gated(server, model, monkeypatch, token, status):
    server.repos[NAME].gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    refused(HubError, f"does not let you read {NAME}", status, "Accept its licence on the page", "hf auth login")
    assert not asked(server)


def test_the_token_opens_it_and_goes_to_the_hub_alone(server, model, monkeypatch):
    server.repos[NAME].gated = True
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert fetch().is_dir()
    server.settle()
    assert {(a.by, a.login) for a in server.log} == {("hub", f"Bearer {server.token}"), ("cdn", None)}
    assert not [a for a in server.log if "agent" in a.path], "nothing is asked but the model"


def test_a_model_that_is_there_serves_when_the_hub_refuses(server, model, said):
    place = fetch()
    server.trouble[API] = [(401, {"X-Error-Code": "RepoNotFound"}), (500, {})]
    assert fetch() == place == fetch()
    assert f"has no model {NAME}, or it is private (401): {NAME} is taken from the cache, commit 01234567" in said[1]


# ---- the cache ----


def test_models_in_the_shared_store_of_huggingface_hub_can_be_read(server, model):
    """Since 2.x blobs that came by xet are links into a store that all models share."""
    place = fetch()
    blob = (place / WEIGHTS).resolve()
    store = Path(constants.HF_HUB_CACHE) / "blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(Path("../../blobs/ab") / store.name)
    with pytest.raises(PareError, match="outside of the model's directory"):
        untrusted.check_links(place)
    (store.parents[1] / ".huggingface-shared-blobs").write_text("1")
    untrusted.check_links(place)
    assert Checkpoint(place).arch and fetch() == place


def test_a_disk_without_links_has_every_file_once(server, model, monkeypatch):
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download, "are_symlinks_supported", lambda *_: False)
    place = fetch()
    assert not any(file.is_symlink() for file in place.rglob("*"))
    assert not [file for file in (hub_cache.storage(NAME) / "blobs").iterdir() if file.stat().st_size]
    server.log.clear()
    assert fetch() == place and len(server.log) == 1


# ---- killed ----


def started(server: HubServer, home: Path, *arguments: object, **environment: str) -> subprocess.Popen:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "TRANSFORMERS_OFFLINE"}
    given = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "NO_PROXY": "*", "HOME": str(home)}
    command = [sys.executable, "-m", "mlx_pare", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=clean | given | environment, **pipes)


def incomplete(blobs: Path) -> list[int]:
    """The sizes of files that are not whole yet."""
    found = []
    for file in blobs.glob("*.incomplete"):
        with contextlib.suppress(FileNotFoundError):  # it was finished meanwhile
            found.append(file.stat().st_size)
    return found


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_that_was_killed_in_the_download_goes_on(server, model, tmp_path):
    """kill -9 while half of the weights are there: the same command asks for the other half, and does the run."""
    size, home = (model / WEIGHTS).stat().st_size, tmp_path / "hf"
    sample = tmp_path / "text.txt"
    sample.write_text("\n\n".join(f"{i}: the quick brown fox and {i * i} lazy dogs went home." for i in range(3000)))
    few = ["--data", sample, "--length", 16, "--samples", 4, "--widths", "even", "--recover-steps", 0, "--trials", 0]
    command = ["run", NAME, "--out", tmp_path / "run", "--keep", 0.75, "--criterion", "magnitude", "--no-reconstruct"]
    server.trouble[CDN] = ["stall"]
    process = started(server, home, *command, *few)
    blobs = home / "hub" / "models--org--model" / "blobs"
    until(lambda: size // 2 in incomplete(blobs))
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "run").exists()
    server.log.clear()
    out, err = (process := started(server, home, *command, *few)).communicate(timeout=300)
    assert process.returncode == 0, err
    assert asked(server) == [f"bytes={size // 2}-"], "only the missing bytes"
    assert f"{NAME}: " in out and not list(blobs.glob("*.incomplete"))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["origin"] == {"asked": NAME, "hub": f"{NAME}@{SHA}"}
    assert manifest["model"].endswith(f"models--org--model/snapshots/{SHA}")
    assert f'model = "{NAME}@{SHA}"' in (tmp_path / "run" / "recipe.toml").read_text()
    assert (tmp_path / "run" / "report.md").read_text().startswith(f"# {NAME}")


def test_ctrl_c_ends_a_download_at_once(server, model, tmp_path):
    server.trouble[CDN] = ["stall"]
    patient = {"HF_HUB_DOWNLOAD_TIMEOUT": "100"}
    process = started(server, tmp_path / "hf", "evaluate", NAME, "--data", model / "README.md", **patient)
    blobs = tmp_path / "hf" / "hub" / "models--org--model" / "blobs"
    until(lambda: (model / WEIGHTS).stat().st_size // 2 in incomplete(blobs))
    process.terminate()
    begun = time.monotonic()
    _, err = process.communicate(timeout=200)
    assert time.monotonic() - begun < 60
    assert process.returncode == 1 and "interrupted: " in err and "goes on from there" in err and "Traceback" not in err
