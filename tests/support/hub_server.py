"""A Hugging Face hub on this machine: the listing, files by range, the redirect to a CDN of another name, troubles.

huggingface_hub's own snapshot_download works with it. It logs what was asked and how many bytes of bodies it could
send, so that tests can say what was really transferred.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from urllib.parse import quote, unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 1 << 16


@dataclass
class Asked:
    """One request: who answered it ("hub" or "cdn"), what was asked, which status and how many bytes of body it got."""

    by: str
    path: str
    range: str | None
    login: str | None
    method: str = "GET"
    status: int = 0
    sent: int = 0


@dataclass
class Repo:
    """A model: its directory, its branches, and how it is kept from others."""

    folder: Path
    refs: dict[str, str] = field(default_factory=lambda: {"main": SHA})
    gated: bool = False  # the listing is public, the files are for those with a token
    lies: dict[str, object] = field(default_factory=dict)  # changes of the listing
    headers: dict[str, dict[str, str]] = field(default_factory=dict)  # changes of the headers of a file


class HubServer:
    """``with HubServer() as server``: add Repos to ``repos``, troubles by path to ``trouble``, read ``log``.

    A trouble is taken from its list by one request each: "die" or "stall" in the middle, "hang", "more" bytes than
    there are, or a status with its headers.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.trouble: dict[str, list] = defaultdict(list)
        self.log: list[Asked] = []
        self.ranges, self.token, self.closing = True, "hf_secret", threading.Event()
        self._servers = {by: _Server(("127.0.0.1", 0), self._handler(by)) for by in ("hub", "cdn")}
        self.url, self.cdn = self._url("hub", "127.0.0.1"), self._url("cdn", "localhost")

    def _url(self, by: str, host: str) -> str:
        return f"http://{host}:{self._servers[by].server_address[1]}"

    def _handler(self, by: str) -> type:
        return type("Handler", (_Handler,), {"hub": self, "by": by})

    def __enter__(self) -> HubServer:
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def sent(self, name: str = "") -> int:
        """Bytes of bodies sent for files of this name, redirects and errors included."""
        self.settle()
        return sum(asked.sent for asked in self.log if asked.path.split("?")[0].endswith(name))

    def settle(self) -> None:
        """A client that hangs up is ahead of the server: wait until that has noticed."""
        for _ in range(200):
            if all(asked.status for asked in self.log):
                return
            time.sleep(0.01)


def large(file: Path) -> bool:
    """Whether the hub keeps a file beside git (LFS), and sends those who ask for it to the CDN."""
    return file.suffix not in (".json", ".jinja", ".md", ".txt")


def etag(file: Path) -> str:
    """What the hub calls the contents of a file by."""
    found = file.stat()
    return _etag(file, found.st_size, found.st_mtime_ns)


@functools.lru_cache(1000)
def _etag(file: Path, size: int, changed: int) -> str:
    raw = file.read_bytes()
    return hashlib.sha256(raw).hexdigest() if large(file) else hashlib.sha1(b"blob %d\0" % size + raw).hexdigest()


class _Server(ThreadingHTTPServer):
    block_on_close = False
    server_bind = TCPServer.server_bind  # HTTPServer looks its own name up, which takes seconds on some Macs

    def handle_error(self, *args: object) -> None:
        """A client that has hung up is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms between head and body
    hub: HubServer
    by: str

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        asked = Asked(self.by, self.path, self.headers["Range"], self.headers["Authorization"], self.command)
        self.hub.log.append(asked)
        status = 0
        try:
            status = self.answer(asked)
        except ConnectionError:
            self.close_connection = True
        finally:
            asked.status = status or 599

    def answer(self, asked: Asked) -> int:
        path = unquote(urlsplit(self.path).path)
        troubles = self.hub.trouble[path]
        trouble = troubles.pop(0) if troubles else None
        if trouble == "hang":
            self.hub.closing.wait(10)
            self.close_connection = True
            return 598
        if isinstance(trouble, tuple):
            return self.send(asked, trouble[0], trouble[1], trouble[2] if len(trouble) > 2 else b'{"error": "no"}')
        if self.by == "cdn":
            return self.file(asked, path, trouble)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            return self.listing(asked, *match.groups())
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            return self.tree(asked, *match.groups())
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        return self.resolve(asked, *match.groups()) if match else self.send(asked, 404, {})

    def listing(self, asked: Asked, name: str, revision: str) -> int:
        repo = self.hub.repos.get(name)
        if repo is None:  # as the hub does for those it does not know
            return self.send(asked, 401, {"X-Error-Code": "RepoNotFound"})
        sha = repo.refs.get(revision, revision if revision in repo.refs.values() else None)
        if sha is None:
            return self.send(asked, 404, {"X-Error-Code": "RevisionNotFound"})
        sizes = "blobs=true" in self.path
        files = [f for f in sorted(repo.folder.rglob("*")) if f.is_file()]
        siblings = [
            {"rfilename": f.relative_to(repo.folder).as_posix(), **({"size": f.stat().st_size} if sizes else {})}
            for f in files
        ]
        found = {"id": name, "sha": sha, "private": False, "siblings": siblings, **repo.lies}
        return self.send(asked, 200, {"Content-Type": "application/json"}, json.dumps(found).encode())

    def tree(self, asked: Asked, name: str, revision: str) -> int:
        """The files as snapshot_download asks for them."""
        repo = self.hub.repos[name]
        if repo.gated and asked.login != f"Bearer {self.hub.token}":
            return self.send(asked, 403 if asked.login else 401, {"X-Error-Code": "GatedRepo"})
        listed = []
        for file in sorted(f for f in repo.folder.rglob("*") if f.is_file()):
            path, size = file.relative_to(repo.folder).as_posix(), file.stat().st_size
            listed.append({"type": "file", "path": path, "size": size, "oid": etag(file)})
            if large(file):
                listed[-1]["lfs"] = {"oid": etag(file), "size": size, "pointerSize": 130}
        return self.send(asked, 200, {"Content-Type": "application/json"}, json.dumps(listed).encode())

    def resolve(self, asked: Asked, name: str, revision: str, file: str) -> int:
        repo = self.hub.repos[name]
        if repo.gated and asked.login != f"Bearer {self.hub.token}":
            return self.send(asked, 403 if asked.login else 401, {"X-Error-Code": "GatedRepo"})
        if not (repo.folder / file).is_file() or revision not in repo.refs.values():
            return self.send(asked, 404, {"X-Error-Code": "EntryNotFound"})
        if not large(repo.folder / file):
            return self.file(asked, f"/{name}/{file}", None, revision)
        headers = {
            "Location": f"{self.hub.cdn}/{name}/{quote(file)}?signed=1",
            "X-Linked-Size": str((repo.folder / file).stat().st_size),
            "X-Linked-ETag": f'"{etag(repo.folder / file)}"',
            "X-Repo-Commit": revision,
        }
        return self.send(asked, 302, headers | repo.headers.get(file, {}), b"Found. Redirecting")

    def file(self, asked: Asked, path: str, trouble: str | None, revision: str = SHA) -> int:
        _, org, name, file = path.split("/", 3)
        repo = self.hub.repos[f"{org}/{name}"]
        target = repo.folder / file
        size = target.stat().st_size
        first, last, status = 0, size - 1, 200
        headers = {"ETag": f'"{etag(target)}"', "X-Repo-Commit": revision}
        if asked.range and self.hub.ranges:
            first, last = (int(n or size) for n in asked.range.removeprefix("bytes=").split("-"))
            if first >= size:
                return self.send(asked, 416, {"Content-Range": f"bytes */{size}"})
            last, status = min(last, size - 1), 206
            headers |= {"Accept-Ranges": "bytes", "Content-Range": f"bytes {first}-{last}/{size}"}
        length = last - first + 1
        more = b"x" * 1000 if trouble == "more" else b""
        self.head(status, {**headers, "Content-Length": str(length + len(more)), **repo.headers.get(file, {})})
        if asked.method == "HEAD":
            return status
        with target.open("rb") as opened:
            opened.seek(first)
            left = length // 2 if trouble in ("die", "stall") else length
            while left and (data := opened.read(min(CHUNK, left))):
                self.wfile.write(data)
                asked.sent += len(data)
                left -= len(data)
        self.wfile.write(more)
        if trouble == "stall":
            self.wfile.flush()
            self.hub.closing.wait(120)
        self.close_connection = trouble in ("die", "stall")
        return status

    def send(self, asked: Asked, status: int, headers: dict[str, str], body: bytes = b'{"error": "no"}') -> int:
        self.head(status, {"Content-Length": str(len(body)), **headers})
        if asked.method != "HEAD":
            self.wfile.write(body)
            asked.sent += len(body)
        return status

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
