"""A stand-in for the Hugging Face hub: the parts of its HTTP interface that we read and write by, and a CDN beside it.

Files of `LARGE` bytes or more are redirected to the CDN with the `X-Linked-…` headers, as the hub does with LFS files;
smaller ones are served by the hub itself. Every byte is counted; the CDN refuses a request that carries a token.

Writing goes as the real client does it without Xet: repository, card check, preupload, git LFS (large files in parts),
commit. What arrives is checked: an object whose sha256 is not its name, or a commit of what never arrived, is refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = 10_000
PAGE = 3
COMMIT = "c0ffee" + "0" * 34
PART = 400_000
LICENCES = {"apache-2.0", "mit", "cc-by-nc-4.0", "cc-by-nd-4.0", "llama3.1", "other"}


@dataclass
class Repository:
    """What one repository holds: its branches and the files at each commit."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    token: str = ""
    private: bool = False


@dataclass
class HubServer:
    """`endpoint` is for HF_ENDPOINT; `served` counts the bytes of bodies, `requests` is what came to hub and CDN.

    `writer` is the token that may write; `objects` what LFS holds by sha256. Of `write_faults` each (part of a path,
    status) is answered once in place of the work, or `-status` after the work was done. Of `read_faults` each
    (part of a path, answer) is given once in place of the file or the JSON.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    served: int = 0
    leaked_tokens: list[str] = field(default_factory=list)
    cdn_faults: list[str] = field(default_factory=list)
    signature: int = 0
    writer: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    write_faults: list[tuple[str, int]] = field(default_factory=list)
    read_faults: list[tuple[str, Callable[[_Server], None]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        self._servers = [_listen(_Hub, self), _listen(_Cdn, self)]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fault(self, path: str) -> int:
        """The status that this request is to be answered with; 0 for the true one."""
        with self.lock:
            for fault in self.write_faults:
                if fault[0] in path:
                    self.write_faults.remove(fault)
                    return fault[1]
        return 0

    def newest(self, name: str) -> dict[str, bytes]:
        """The files of a repository's main branch."""
        repository = self.repositories[name]
        return repository.files[repository.branches["main"]]

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
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement
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
        path = urlsplit(self.path).path
        for fault in self.hub.read_faults:
            if fault[0] in path:
                self.hub.read_faults.remove(fault)
                return fault[1](self)
        name = r"((?:datasets/)?[\w.-]+/[\w.-]+)"  # a dataset is published by that name
        api = re.fullmatch(rf"/api/(?:models/)?{name}/(revision|tree)/([^/]+)(?:/(.+))?", path)
        file = re.fullmatch(rf"/{name}/resolve/([^/]+)/(.+)", path)
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
        revision = unquote(found[3] if api else found[2])
        commit = repository.branches.get(revision, revision)
        if commit not in repository.files:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if file:
            return self.resolve(repository.files[commit], commit, unquote(file[3]))
        if found[2] == "revision":
            return self.answer(
                200, {}, json.dumps({"id": found[1], "sha": commit, "private": repository.private}).encode()
            )
        return self.tree(repository.files[commit], unquote(found[4] or ""))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.note("hub")
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.hub.fault(path)
        if fault > 0:
            return self.answer(fault, {})
        if path == "/api/validate-yaml":
            return self.tell(*checked_card(json.loads(body)["content"]))
        if completion := re.fullmatch(
            r"/(.+)\.git/info/lfs/objects/complete", path
        ):  # a signed address: no token comes
            return self.tell(*self.complete(completion[1], body))
        if not self.hub.writer or self.headers.get("Authorization") != f"Bearer {self.hub.writer}":
            return self.answer(403 if "Authorization" in self.headers else 401, {})
        for pattern, work in (
            (r"/api/repos/create", self.create),
            (r"/api/models/(.+)/preupload/main", self.preupload),
            (r"/(.+)\.git/info/lfs/objects/batch", self.batch),
            (r"/(.+)\.git/info/lfs/objects/verify", self.verify),
            (r"/api/models/(.+)/commit/main", self.commit),
        ):
            if found := re.fullmatch(pattern, path):
                status, told = work(*found.groups(), body)
                return self.tell(status, told) if fault == 0 else self.answer(-fault, {})
        return self.answer(404, {})

    def tell(self, status: int, told: Any) -> None:
        self.answer(status, {"Content-Type": "application/json"}, json.dumps(told).encode())

    def create(self, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        told = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repositories:
            return 409, told
        repository = self.hub.publish(name, {".gitattributes": b"*.safetensors filter=lfs"}, commit="0" * 40)
        repository.private = asked.get("visibility") == "private" or asked.get("private") is True
        return 200, told

    def preupload(self, name: str, body: bytes) -> tuple[int, Any]:
        there = self.hub.newest(name)
        return 200, {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                    "oid": etag_of(there[file["path"]]) if file["path"] in there else None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def batch(self, name: str, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
        return 200, {"transfer": "multipart", "objects": [self.wanted(name, file) for file in asked["objects"]]}

    def wanted(self, name: str, file: dict[str, Any]) -> dict[str, Any]:
        oid, size = file["oid"], file["size"]
        if oid in self.hub.objects:
            return file
        lfs = f"{self.hub.endpoint}/{name}.git/info/lfs/objects"
        upload: dict[str, Any] = {"href": f"{self.hub.cdn}/{oid}"}
        if size > PART:
            parts = {str(part): f"{self.hub.cdn}/{oid}/{part}" for part in range(1, -(-size // PART) + 1)}
            upload = {"href": f"{lfs}/complete", "header": {"chunk_size": str(PART), **parts}}
        return {**file, "actions": {"upload": upload, "verify": {"href": f"{lfs}/verify"}}}

    def complete(self, name: str, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        parts = [self.hub.parts[asked["oid"], part["partNumber"]] for part in asked["parts"]]
        tags = [hashlib.md5(part).hexdigest() for part in parts]
        if tags != [part["etag"].strip('"') for part in asked["parts"]]:
            return 400, {}
        return self.keep(asked["oid"], b"".join(parts))

    def keep(self, oid: str, content: bytes) -> tuple[int, Any]:
        return keep_object(self.hub, oid, content), {}

    def verify(self, name: str, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        there = self.hub.objects.get(asked["oid"])
        return (200 if there is not None and len(there) == asked["size"] else 404), {}

    def commit(self, name: str, body: bytes) -> tuple[int, Any]:
        repository = self.hub.repositories[name]
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", repository.branches["main"]) != repository.branches["main"]:
            return 412, {"error": "the branch has moved on"}
        files = dict(self.hub.newest(name))
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile" if value["oid"] in self.hub.objects and value["algo"] == "sha256":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
                case "header":
                    pass
                case _:
                    return 400, {"error": f"{value['path']} never arrived"}
        self.hub.commits.append(header["summary"])
        oid = hashlib.sha1(f"{name} {len(self.hub.commits)}".encode()).hexdigest()
        self.hub.publish(name, files, commit=oid)
        return 200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid}

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
        elif fault == "refuse":
            self.answer(403, {}, b"<Error><Message>not from this network</Message></Error>")
        elif fault == "endless":
            self.answer(206, {"Content-Range": self.headers["Range"].replace("=", " ") + f"/{len(content)}"}, content)
        else:
            self.answer_file(
                content, {"ETag": '"the-cdn-has-its-own"'}, ranged=fault != "ignore_range", cut=fault == "truncate"
            )

    def do_PUT(self) -> None:
        self.note("cdn")
        if "Authorization" in self.headers:
            self.hub.leaked_tokens.append(self.headers["Authorization"])
        oid, _, part = urlsplit(self.path).path.lstrip("/").partition("/")
        content = self.body()
        fault = self.hub.fault(self.path)
        if fault:
            return self.answer(fault, {})
        if part:
            self.hub.parts[oid, int(part)] = content
            return self.answer(200, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})
        return self.answer(keep_object(self.hub, oid, content), {})

    def body(self) -> bytes:
        """Of a known length, or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks: list[bytes] = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)


def keep_object(hub: HubServer, oid: str, content: bytes) -> int:
    """The status: an object is kept if its name is its sha256."""
    if hashlib.sha256(content).hexdigest() != oid:
        return 400
    hub.objects[oid] = content
    return 200


def checked_card(card: str) -> tuple[int, dict[str, Any]]:
    """What the hub says of a model card: it knows the licences, and names of repositories."""
    front = yaml.safe_load(card.split("---")[1])
    errors = [
        f'"base_model" with value "{base}" is not valid' for base in front.get("base_model", []) if "/" in base[:1]
    ]
    if front.get("license") not in LICENCES:
        errors.append(f'"license" must be one of {sorted(LICENCES)}')
    told = [{"message": message} for message in errors]
    return (400 if told else 200), {"errors": told, "warnings": []}


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
