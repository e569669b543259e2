"""A small S3 in memory that refuses, ignores and forgets on order: services that no real server here can play.

    server.refuse = lambda asked: (403, "RequestTimeTooSkewed", "The difference …", {})   or None to let it pass
    server.quirks.add("ignore_conditions")

Quirks: `ignore_conditions` (If-None-Match and If-Match are not read), `ignore_if_match` (only If-Match is not read),
`no_tokens` (a long listing is truncated and names no token), `forget_listed` (a listing leaves the newest key out).
Signatures are not checked. A request through a proxy, or with the bucket in the host name, is understood.
"""

from __future__ import annotations

import datetime
import hashlib
import re
import ssl
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

BUCKET = "bucket"
PAGE = 1000
Refusal = tuple[int, str, str, dict[str, str]]


@dataclass(frozen=True)
class Asked:
    """One request: `key` within the bucket, header names in lower case."""

    method: str
    key: str
    query: dict[str, list[str]]
    headers: dict[str, str]


@dataclass
class QuirkyS3:
    """`endpoint` is for AWS_ENDPOINT_URL; `seen` has every request; with `certificate`, a PEM file, it speaks TLS."""

    certificate: Path | None = None
    quirks: set[str] = field(default_factory=set)
    refuse: Callable[[Asked], Refusal | None] = lambda asked: None
    seen: list[Asked] = field(default_factory=list)
    objects: dict[str, tuple[bytes, str, dict[str, str]]] = field(default_factory=dict)
    uploads: dict[str, tuple[str, dict[int, bytes], dict[str, str]]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def start(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"service": self}))
        self._server.daemon_threads = True
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        scheme = "https" if self.certificate else "http"
        self.endpoint = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def writes(self) -> list[Asked]:
        """The requests that made an object or began one."""
        return [
            asked
            for asked in self.seen
            if (asked.method == "PUT" and "partNumber" not in asked.query)
            or (asked.method == "POST" and "uploads" in asked.query)
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    service: QuirkyS3

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def do(self) -> None:
        address = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        path = unquote(address.path).lstrip("/")
        key = path if headers["host"].startswith(f"{BUCKET}.") else path.partition("/")[2]
        asked = Asked(self.command, key, parse_qs(address.query, keep_blank_values=True), headers)
        content = self._content(headers)
        with self.service.lock:
            self.service.seen.append(asked)
            refusal = self.service.refuse(asked)
            if refusal is None and self.command == "PUT" and "uploadId" not in asked.query:
                refusal = self._conflict(asked)
            if refusal is not None:
                status, code, message, more = refusal
                text = f"<Error><Code>{code}</Code><Message>{escape(message)}</Message></Error>"
                self._answer(status, text.encode(), more)
            else:
                self._carry_out(asked, content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do

    def _content(self, headers: dict[str, str]) -> bytes:
        sent = self.rfile.read(int(headers.get("content-length") or 0))
        while headers.get("transfer-encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
            sent += self.rfile.read(size)
            self.rfile.readline()
        if "aws-chunked" not in headers.get("content-encoding", ""):
            return sent
        content = b""
        while size := int(re.split(rb"[;\r]", sent, maxsplit=1)[0], 16):
            chunk = sent.partition(b"\r\n")[2]
            content, sent = content + chunk[:size], chunk[size + 2 :]
        return content

    def _conflict(self, asked: Asked) -> Refusal | None:
        there, quirks = self.service.objects.get(asked.key), self.service.quirks
        refused = (412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold", {})
        if "ignore_conditions" in quirks:
            return None
        if "if-none-match" in asked.headers and there:
            return refused
        wanted = asked.headers.get("if-match")
        if wanted and "ignore_if_match" not in quirks and (there is None or there[1] != wanted):
            return refused
        return None

    def _carry_out(self, asked: Asked, content: bytes) -> None:
        objects, uploads = self.service.objects, self.service.uploads
        metadata = {name: value for name, value in asked.headers.items() if name.startswith("x-amz-meta-")}
        match asked.method, asked.key, [*asked.query]:
            case "GET", "", ["uploads", *_]:
                self._xml("ListMultipartUploadsResult", "<IsTruncated>false</IsTruncated>")
            case "GET", "", _:
                self._list(asked.query)
            case "POST", key, ["uploads", *_]:
                upload = uuid.uuid4().hex
                uploads[upload] = (key, {}, metadata)
                self._xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
            case "POST", key, _:
                _, parts, metadata = uploads.pop(asked.query["uploadId"][0])
                whole = b"".join(parts[number] for number in sorted(parts))
                objects[key] = (whole, _etag(whole), metadata)
                self._xml("CompleteMultipartUploadResult", f"<ETag>{escape(_etag(whole))}</ETag>")
            case "PUT", _, names if "uploadId" in names:
                uploads[asked.query["uploadId"][0]][1][int(asked.query["partNumber"][0])] = content
                self._answer(200, b"", {"ETag": _etag(content)})
            case "PUT", key, _:
                objects[key] = (content, _etag(content), metadata)
                self._answer(200, b"", {"ETag": _etag(content)})
            case "DELETE", key, names:
                uploads.pop(asked.query.get("uploadId", [""])[0], None)
                if "uploadId" not in names:
                    objects.pop(key, None)
                self._answer(204, b"", {})
            case _, key, _ if key and key not in objects:
                self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>", {})
            case _, key, _:
                self._send(asked, *objects.get(key, (b"", "", {})))

    def _send(self, asked: Asked, content: bytes, etag: str, metadata: dict[str, str]) -> None:
        headers = {"ETag": etag, "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", **metadata}
        span = re.match(r"bytes=(\d+)-(\d+)", asked.headers.get("range", ""))
        if span is None:
            return self._answer(200, content, headers)
        first, last = int(span[1]), min(int(span[2]), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._answer(206, content[first : last + 1], headers)

    def _list(self, query: dict[str, list[str]]) -> None:
        prefix, most = query.get("prefix", [""])[0], int(query.get("max-keys", [str(PAGE)])[0])
        after = (query.get("continuation-token") or query.get("start-after") or [""])[0]
        keys = sorted(key for key in self.service.objects if key.startswith(prefix))
        if "forget_listed" in self.service.quirks:
            keys = [key for key in keys if key != [*self.service.objects][-1]]
        left = [key for key in keys if key > after]
        page = left[:most]
        shown = [
            f"<Contents><Key>{quote(key) if 'encoding-type' in query else escape(key)}</Key>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(self.service.objects[key][1])}</ETag><Size>{len(self.service.objects[key][0])}</Size>"
            "</Contents>"
            for key in page
        ]
        more = len(left) > len(page)
        if more and "no_tokens" not in self.service.quirks:
            shown.append(f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>")
        shown.append(f"<KeyCount>{len(page)}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>")
        self._xml("ListBucketResult", "".join(shown))

    def _xml(self, name: str, inner: str) -> None:
        self._answer(200, f"<?xml version='1.0'?><{name}>{inner}</{name}>".encode(), {"Content-Type": "text/xml"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def company_certificates(folder: Path) -> tuple[Path, Path]:
    """Two PEM files: key and certificate of a server at 127.0.0.1, and the company's authority that signed it."""
    authority, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("company", "storage")]
    now = datetime.datetime.now(datetime.UTC)

    def signed(subject: int, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> bytes:
        address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[subject])
            .issuer_name(names[0])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(address, critical=False)
        )
        return builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    served, trusted = folder / "server.pem", folder / "company.pem"
    served.write_bytes(server.private_bytes(*form) + signed(1, server, ca=False))
    trusted.write_bytes(signed(0, authority, ca=True))
    return served, trusted
