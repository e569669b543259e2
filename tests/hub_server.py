"""A stand-in for the Hugging Face hub: the parts of its HTTP interface that reading needs, and a CDN beside it.

Files of `LARGE` bytes or more are redirected to the CDN with the `X-Linked-…` headers, as the hub does with LFS files;
smaller ones are served by the hub itself. Every byte is counted; the CDN refuses a request that carries a token.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 10_000
PAGE = 3
COMMIT = "c0ffee" + "0" * 34


@dataclass
class Repository:
    """What one repository holds: its branches and the files at each commit."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    token: str = ""


@dataclass
class HubServer:
    """`endpoint` is for HF_ENDPOINT; `served` counts the bytes of bodies, `requests` is what came to hub and CDN."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    served: int = 0
    leaked_tokens: list[str] = field(default_factory=list)
    cdn_faults: list[str] = field(default_factory=list)
    signature: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        self._servers = [_listen(_Hub, self), _listen(_Cdn, self)]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def publish(self, name: str, files: dict[str, bytes], *, branch: str = "main", commit: str = COMMIT) -> Repository:
        """Put files under a commit and let the branch point to it."""
        repository = self.repositories.setdefault(name, Repository())
        repository.files[commit] = files
        repository.branches[branch] = commit
        return repository


def etag_of(content: bytes) -> str:
    """As the hub: SHA-256 of a large file, git's object id of a small one."""
    if len(content) >= LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def note(self, who: str) -> None:
        with self.hub.lock:
            self.hub.requests.append((who, self.command, self.path))

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"", *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            sent = body[: len(body) // 2] if cut else body
            with self.hub.lock:
                self.hub.served += len(sent)
            self.wfile.write(sent)
        self.close_connection |= cut

    def answer_file(self, content: bytes, headers: dict[str, str], *, ranged: bool = True, cut: bool = False) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and ranged:
            first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
            self.answer(206, headers, content[first : last + 1], cut=cut)
        else:
            self.answer(200, headers, content, cut=cut)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


class _Hub(_Server):
    def do_GET(self) -> None:
        self.note("hub")
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(revision|tree)/(refs/pr/\d+|[^/]+)(?:/(.+))?", path)
        file = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        if found is None:
            return self.answer(404, {})
        repository = self.hub.repositories.get(found[1])
        if repository is None:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
            return self.answer(
                403 if repository.gated else 401, {"X-Error-Code": "GatedRepo" if repository.gated else "RepoNotFound"}
            )
        revision = found[3] if api else found[2]
        commit = repository.branches.get(revision, revision)
        if commit not in repository.files:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if file:
            return self.resolve(repository.files[commit], commit, file[3])
        if found[2] == "revision":
            return self.answer(200, {}, json.dumps({"id": found[1], "sha": commit}).encode())
        return self.tree(repository.files[commit], found[4] or "")

    do_HEAD = do_GET

    def tree(self, files: dict[str, bytes], folder: str) -> None:
        begin = f"{folder}/" if folder else ""
        entries = [tree_entry(name, content) for name, content in sorted(files.items()) if name.startswith(begin)]
        if folder and not entries:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        address = urlsplit(self.path)
        cursor = int(parse_qs(address.query).get("cursor", ["0"])[0])
        more = f"{self.hub.endpoint}{address.path}?recursive=true&cursor={cursor + PAGE}"
        links = {"Link": f'<{more}>; rel="next"'} if cursor + PAGE < len(entries) else {}
        return self.answer(200, links, json.dumps(entries[cursor : cursor + PAGE]).encode())

    def resolve(self, files: dict[str, bytes], commit: str, name: str) -> None:
        if name not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[name]
        if len(content) < LARGE:
            return self.answer_file(content, {"ETag": f'"{etag_of(content)}"', "X-Repo-Commit": commit}, ranged=False)
        linked = {
            "X-Linked-Etag": f'"{etag_of(content)}"',
            "X-Linked-Size": str(len(content)),
            "X-Repo-Commit": commit,
            "Location": f"{self.hub.cdn}/{etag_of(content)}?signature={self.hub.signature}",
        }
        return self.answer(302, linked)


class _Cdn(_Server):
    def do_GET(self) -> None:
        self.note("cdn")
        if "Authorization" in self.headers:
            self.hub.leaked_tokens.append(self.headers["Authorization"])
        address = urlsplit(self.path)
        contents = {
            etag_of(content): content
            for repository in self.hub.repositories.values()
            for files in repository.files.values()
            for content in files.values()
        }
        content = contents[address.path.lstrip("/")]
        with self.hub.lock:
            fault = self.hub.cdn_faults.pop(0) if self.hub.cdn_faults else ""
        if address.query != f"signature={self.hub.signature}":
            self.answer(403, {}, b"Request has expired")
        elif fault == "busy":
            self.answer(503, {})
        else:
            self.answer_file(
                content, {"ETag": '"the-cdn-has-its-own"'}, ranged=fault != "ignore_range", cut=fault == "truncate"
            )


def tree_entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": "1" * 40}
    if len(content) >= LARGE:
        return {**entry, "lfs": {"oid": etag_of(content), "size": len(content), "pointerSize": 134}}
    return {**entry, "oid": etag_of(content)}


def _listen(handler: type[_Server], hub: HubServer) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server
