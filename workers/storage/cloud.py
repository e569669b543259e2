"""Buckets of S3, GCS and Azure: ranged reads that are checked, conditional writes, uploads in parts.

obstore moves the bytes (outside the GIL); the parts that only S3 has are in `s3.py`. One loop, `retrying.patiently`,
retries, so that every answer is checked first; obstore retries the requests of `Bucket.retrying`. A flipped bit is
not detected here; callers that have a digest detect it.
"""

from __future__ import annotations

import functools
import mmap
import os
import queue
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy
import obstore
import obstore.exceptions
from obstore.store import AzureStore, GCSStore
from typing_extensions import Buffer

from jobs.errors import (
    BadInput,
    BucketMissing,
    CorruptData,
    MergeyardError,
    ObjectChanged,
    ObjectExists,
    ObjectMissing,
    StorageError,
    StorageRefused,
    StorageUnavailable,
)
from workers.storage.keys import check_key, check_prefix, length_within
from workers.storage.ranges import RANGE_BYTES, read_in_ranges
from workers.storage.retrying import CONNECT_SECONDS, patience_seconds, patiently, stall_seconds
from workers.storage.s3 import MIB, PARTS_IN_FLIGHT, MultipartUpload, S3Bucket
from workers.storage.store import ObjectInfo, Upload
from workers.storage.translation import ENDPOINTS, denied, from_obstore, missing

if TYPE_CHECKING:
    from obstore import Attributes, GetOptions, GetResult, ObjectMeta
    from obstore.store import ClientConfig, GCSConfig, ObjectStore, RetryConfig

HTML: Attributes = {"Content-Type": "text/html; charset=utf-8"}  # a browser saves a page of another type as a file
LARGEST_SINGLE_PUT = 16 * MIB
LIST_PAGE = 1000
STREAM_MARK = "mergeyard_upload"  # Azure takes no hyphen
STREAMED_PART_BYTES = 32 * MIB  # GCS takes 10,000 parts: 312 GiB
REQUEST_SECONDS = 900.0  # one range or part on the slowest link; a silent one is given up much earlier
ENVIRONMENT = re.compile(
    "(AWS|AZURE|GOOGLE|MERGEYARD_STORAGE)_.*|STORAGE_EMULATOR_HOST|REQUESTS_CA_BUNDLE|SSL_CERT_.*|.*_PROXY",
    re.IGNORECASE,
)
BUCKET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")


Result = TypeVar("Result")


@dataclass(frozen=True)
class Bucket:
    """A bucket or container that was connected to; `s3` is None for other services.

    `retrying` tries a part of a stream and a page of a listing again by itself: nobody else can repeat a part, and not
    every service of Azure can begin a listing behind a key. Every other request is `patiently`'s.
    """

    scheme: str
    name: str
    objects: ObjectStore
    retrying: ObjectStore
    s3: S3Bucket | None


def open_cloud_store(url: str) -> CloudStore:
    """The store for `s3://bucket/prefix`, `gs://…` or `az://…`; connections are shared by all of one bucket."""
    scheme, _, rest = url.partition("://")
    name, _, prefix = rest.partition("/")
    scheme, prefix = scheme.lower(), prefix.strip("/")
    if not BUCKET_NAME.fullmatch(name):
        raise BadInput(f"{url}: the URL of a bucket has the form {scheme}://bucket/prefix, with a valid bucket name")
    if prefix:
        check_key(prefix)
    environment = tuple(sorted(item for item in os.environ.items() if ENVIRONMENT.fullmatch(item[0])))
    return CloudStore(_connected(scheme, name, environment), prefix)


class CloudStore:
    """Objects of one bucket under one prefix."""

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self._bucket = bucket
        self._objects = bucket.objects
        self._prefix = f"{prefix}/" if prefix else ""
        self._url = f"{bucket.scheme}://{bucket.name}/{prefix}".rstrip("/")

    @property
    def url(self) -> str:
        return self._url

    @property
    def pinned_url(self) -> str:
        return self._url

    def locate(self, key: str) -> ObjectInfo:
        check_key(key)
        return self._patiently(key, lambda: self._info(key, obstore.head(self._objects, self._path(key))))

    def read(self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None) -> Buffer:
        check_key(key)
        if start == 0 and length is None:
            found = self._patiently(key, lambda: self._whole_unless_large(key, etag))
            if not isinstance(found, ObjectInfo):
                return found
            length, etag = found.size, found.etag
        if length is None or not 0 < length <= RANGE_BYTES:
            length, etag = self._length(key, start, length, etag)
        if length == 0:
            return b""
        if length <= RANGE_BYTES:
            wanted = length
            return self._patiently(key, lambda: self._range(key, start, wanted, etag))
        # not a bytearray, which would be zeroed first while every other thread waits
        whole = memoryview(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.read_into(key, whole, start=start, etag=etag)
        return whole

    def read_into(self, key: str, buffer: memoryview, *, start: int = 0, etag: str | None = None) -> None:
        check_key(key)
        target = numpy.frombuffer(buffer, numpy.uint8)
        if target.nbytes == 0 or (target.nbytes > RANGE_BYTES and etag is None):
            _, etag = self._length(key, start, target.nbytes, etag)  # all ranges must be of one version

        def fill(first: int, last: int) -> None:
            data = self._patiently(key, lambda: self._range(key, start + first, last - first, etag))
            target[first:last] = numpy.frombuffer(memoryview(data), numpy.uint8)  # numpy copies outside the GIL

        read_in_ranges(target.nbytes, fill)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        wanted = self._prefix + check_prefix(prefix)
        folder = wanted.rpartition("/")[0]
        pages: Iterator[Sequence[ObjectMeta]] | None = None
        last: str | None = None

        def next_page() -> Sequence[ObjectMeta]:
            nonlocal pages
            if pages is None:
                pages = iter(obstore.list(self._bucket.retrying, folder or None, offset=last, chunk_size=LIST_PAGE))
            try:
                return next(pages, ())
            except Exception:
                pages = None  # begin again behind the last key that came
                raise

        confirmed: str | None = None
        while True:
            page = self._patiently(prefix, next_page)
            if page and confirmed is not None and page[0]["path"] <= confirmed:  # an order of the service's own
                return
            if not page:
                if self._bucket.s3 is None or last == confirmed:
                    return
                pages, confirmed = None, last  # some services end a listing early: nothing may follow its last key
                continue
            for meta in page:
                if meta["path"].startswith(wanted):
                    yield self._info(meta["path"].removeprefix(self._prefix), meta)
            last = page[-1]["path"]

    def write(self, key: str, data: Buffer, *, mode: Literal["create", "overwrite"] = "overwrite") -> ObjectInfo:
        content = memoryview(data).cast("B")
        if mode == "overwrite" and content.nbytes > LARGEST_SINGLE_PUT:
            with self.upload(key) as upload:
                upload.write(content)
                return upload.commit()
        return self._put(check_key(key), content, mode)

    def swap(self, key: str, data: Buffer, *, etag: str) -> ObjectInfo:
        check_key(key)
        replaced = {"e_tag": etag}
        if self._bucket.scheme == "gs":  # whose conditions are on generations
            meta: ObjectMeta | None = None
            with suppress(ObjectMissing):
                meta = self._patiently(key, lambda: obstore.head(self._objects, self._path(key)))
            if meta is None or meta["e_tag"] != etag:
                raise ObjectChanged(f"{self._place(key)} was replaced by another writer")
            replaced["version"] = meta["version"] or ""
        return self._put(key, memoryview(data).cast("B"), replaced)

    def upload(self, key: str, *, mode: Literal["create", "overwrite"] = "overwrite") -> Upload:
        path = self._path(check_key(key))
        if self._bucket.s3:
            return MultipartUpload(
                self._bucket.s3, key, path, lambda data: self._put(key, memoryview(data), mode), mode
            )
        return StreamedUpload(self, key, mode)

    def delete(self, key: str) -> None:
        check_key(key)
        with suppress(ObjectMissing):
            self._patiently(key, lambda: obstore.delete(self._objects, self._path(key)))

    def sweep(self, prefix: str = "") -> int:
        """As `Store` promises, on S3. GCS and Azure drop uncommitted parts by their own rules: always 0 there."""
        wanted = self._prefix + check_prefix(prefix)
        return self._bucket.s3.abort_uploads(wanted) if self._bucket.s3 else 0

    def check_writable(self) -> None:
        """By a conditional write that has nothing to replace."""
        key = ".mergeyard-writable"
        with suppress(ObjectChanged, ObjectMissing):
            self._put(key, memoryview(b""), {"e_tag": '"0"', "version": "1"})  # GCS compares the version
            self.delete(key)  # a service that ignores conditions has written it

    def free_bytes(self) -> int | None:
        return None

    def put_stream(self, key: str, parts: Iterator[bytes]) -> None:
        """Write the object from parts as they come; an exception out of `parts` leaves nothing behind."""
        mark = secrets.token_hex(16)
        try:
            obstore.put(
                self._bucket.retrying,
                self._path(key),
                parts,
                attributes={STREAM_MARK: mark},
                chunk_size=STREAMED_PART_BYTES,
                max_concurrency=PARTS_IN_FLIGHT,
            )
        except UploadAborted:
            raise
        except Exception as error:
            told = self._translated(error, key)
            if not isinstance(told, ObjectMissing) or isinstance(told, BucketMissing):
                raise told from None
            # GCS has no such upload: an earlier commit may have come through and only its answer been lost
            if not self._is_marked(key, mark):
                raise StorageUnavailable(f"{self._place(key)}: the upload was aborted by another; run again") from None

    def _is_marked(self, key: str, mark: str) -> bool:
        path, first = self._path(key), (0, 1)
        with suppress(ObjectMissing):
            found = self._patiently(key, lambda: obstore.get(self._objects, path, options={"range": first}))
            return found.attributes.get(STREAM_MARK) == mark
        return False

    def _path(self, key: str) -> str:
        return self._prefix + key

    def _place(self, key: str) -> str:
        return f"{self._url}/{key}"

    def _patiently(self, key: str, request: Callable[[], Result]) -> Result:
        return patiently(request, translated=lambda error: self._translated(error, key))

    def _translated(self, error: Exception, key: str) -> MergeyardError:
        s3, place = self._bucket.s3, self._place(key)
        told = from_obstore(error, place, s3.header) if s3 else from_obstore(error, place)
        if isinstance(told, ObjectMissing) and s3 and not s3.exists():
            return missing(place, "NoSuchBucket")
        if s3 and "failed to lookup address" in str(error) and s3.bucket_has_no_host():
            return StorageRefused(
                f"{place}: the bucket has no host name of its own at {s3.settings.endpoint};"
                " set AWS_VIRTUAL_HOSTED_STYLE_REQUEST=false"
            )
        if isinstance(told, StorageRefused) and "performing HEAD" in str(error):
            return self._refusal_of_get(key) or told  # the answer to a HEAD has no body, so no reason
        return told

    def _refusal_of_get(self, key: str) -> StorageRefused | None:
        try:
            obstore.get(self._objects, self._path(key), options={"range": (0, 1)})
        except Exception as error:
            told = self._translated(error, key)
            return told if isinstance(told, StorageRefused) else None
        return None

    def _info(self, key: str, meta: ObjectMeta) -> ObjectInfo:
        return ObjectInfo(key, meta["size"], self._etag(key, meta["e_tag"]))

    def _etag(self, key: str, etag: str | None) -> str:
        if not etag:
            raise StorageError(
                f"{self._place(key)}: this service gives no ETags, so a changed object would go unnoticed"
            )
        return etag if etag.endswith('"') else f'"{etag}"'  # Azure gives quotes, but not in listings

    def _length(self, key: str, start: int, length: int | None, etag: str | None) -> tuple[int, str]:
        """How long the read will be and of which version, by asking for the object's size."""
        info = self.locate(key)
        if etag is not None and etag != info.etag:
            raise self._changed(key)
        return length_within(self._place(key), info.size, start, length), info.etag

    def _whole_unless_large(self, key: str, etag: str | None) -> Buffer | ObjectInfo:
        """The object in one request, or its `ObjectInfo` if it is better read in several."""
        result = obstore.get(self._objects, self._path(key), options=_options(etag))
        info = self._info(key, result.meta)
        if info.size > RANGE_BYTES:
            return info
        return self._checked(key, result, (0, info.size), etag)

    def _range(self, key: str, start: int, length: int, etag: str | None) -> Buffer:
        """One range by one request, of exactly that length and version."""
        options = _options(etag)
        options["range"] = (start, start + length)
        try:
            result = obstore.get(self._objects, self._path(key), options=options)
        except Exception as error:
            if re.search("416 Range Not Satisfiable|Wanted range starting at", str(error)):
                self._length(key, start, length, etag)
            raise
        return self._checked(key, result, (start, start + length), etag)

    def _checked(self, key: str, result: GetResult, span: tuple[int, int], etag: str | None) -> Buffer:
        info = self._info(key, result.meta)
        if etag is not None and info.etag != etag:
            if self.locate(key).etag == etag:
                raise StorageUnavailable(f"{self._place(key)}: an answer told of another version than the one there")
            raise self._changed(key)
        length = length_within(self._place(key), info.size, span[0], span[1] - span[0])
        data = result.bytes()
        if tuple(result.range) != span or len(data) != length:
            raise StorageUnavailable(f"{self._place(key)}: bytes {result.range} came for {span}, {len(data)} of them")
        return data

    def _changed(self, key: str) -> ObjectChanged:
        return ObjectChanged(f"{self._place(key)} changed while it was in use; run again to pin the new version")

    def _put(self, key: str, content: memoryview, mode: Any) -> ObjectInfo:
        tries = 0

        def once() -> ObjectInfo:
            nonlocal tries
            tries += 1
            try:
                result = obstore.put(
                    self._objects,
                    self._path(key),
                    content,
                    attributes=HTML if key.endswith(".html") else None,
                    mode=mode,
                    use_multipart=False,
                )
            except Exception as error:
                told = self._translated(error, key)
                if mode != "overwrite" and "status code: 501" in str(error):
                    raise StorageRefused(
                        f"{self._place(key)}: this service has no conditional writes (501 NotImplemented); give an"
                        " `output:` on another, which `mergeyard check` tries"
                    ) from None
                refused = isinstance(told, (ObjectExists, ObjectChanged, ObjectMissing))
                # an earlier try may have come through and only its answer been lost
                if refused and tries > 1 and (ours := self._already_there(key, content)):
                    return ours
                if isinstance(mode, dict) and refused and not isinstance(told, BucketMissing):
                    told = ObjectChanged(f"{self._place(key)} was replaced by another writer")
                raise told from None
            return ObjectInfo(key, content.nbytes, self._etag(key, result["e_tag"]))

        return patiently(once)

    def _already_there(self, key: str, content: memoryview) -> ObjectInfo | None:
        try:
            info = self.locate(key)
            same = memoryview(self.read(key, etag=info.etag)) == content
        except (ObjectMissing, ObjectChanged):
            return None
        return info if same else None


class UploadAborted(Exception):
    """Ends the stream of an upload that is not to be committed."""


class StreamedUpload:
    """An object of GCS or Azure sent in parts by obstore, on a thread of its own, while the caller goes on."""

    def __init__(self, store: CloudStore, key: str, mode: Literal["create", "overwrite"]) -> None:
        self._store = store
        self._key = key
        self._mode: Literal["create", "overwrite"] = mode
        self._total = 0
        self._part = bytearray()
        self._parts: queue.Queue[bytes | UploadAborted | None] = queue.Queue(maxsize=1)
        self._sender = ThreadPoolExecutor(1, "mergeyard-upload")
        self._sent: Future[None] | None = None

    def write(self, data: Buffer) -> None:
        rest = memoryview(data).cast("B")
        self._total += rest.nbytes
        while rest:
            room = STREAMED_PART_BYTES - len(self._part)
            self._part += rest[:room]
            rest = rest[room:]
            if len(self._part) == STREAMED_PART_BYTES:
                self._send(bytes(self._part))
                self._part.clear()

    def commit(self) -> ObjectInfo:
        if self._sent is None and self._total <= LARGEST_SINGLE_PUT:
            return self._store.write(self._key, self._part, mode=self._mode)
        if self._mode == "create" and any(info.key == self._key for info in self._store.list(self._key)):
            raise ObjectExists(f"{self._store.url}/{self._key} is already there")
        return self._finish()

    def abort(self) -> None:
        if self._sent is not None:
            with suppress(MergeyardError, UploadAborted):
                self._send(UploadAborted())
                self._sent.result()
            self._sent = None
        self._sender.shutdown()

    def _finish(self) -> ObjectInfo:
        self._send(bytes(self._part))
        self._send(None)
        if self._sent is not None:
            self._sent.result()
            self._sent = None
        info = self._store.locate(self._key)
        if info.size != self._total:
            raise CorruptData(f"{self._store.url}/{self._key}: {self._total} bytes were sent, but {info.size} arrived")
        return info

    def _send(self, part: bytes | UploadAborted | None) -> None:
        if self._sent is None:
            self._sent = self._sender.submit(self._store.put_stream, self._key, iter(self._next_part, None))
        while True:
            with suppress(queue.Full):
                self._parts.put(part, timeout=0.1)
                return
            if self._sent.done():
                self._sent.result()  # raises the error that ended it
                raise StorageError(f"{self._store.url}/{self._key}: the upload ended early; run again")

    def _next_part(self) -> bytes | None:
        part = self._parts.get()
        if isinstance(part, UploadAborted):
            raise part
        return part

    def __enter__(self) -> StreamedUpload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


@functools.lru_cache(maxsize=64)
def _connected(scheme: str, name: str, environment: tuple[tuple[str, str], ...]) -> Bucket:
    """The connection for one bucket under one environment, which is part of the key because credentials lie there."""
    options: ClientConfig = {
        "timeout": timedelta(seconds=REQUEST_SECONDS),
        "read_timeout": timedelta(seconds=stall_seconds()),
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "user_agent": "mergeyard",
    }
    if scheme == "s3":
        s3 = S3Bucket(name, options)
        return Bucket(scheme, name, s3.objects, s3.objects, s3)
    endpoint = os.environ.get(ENDPOINTS[scheme], "")
    if scheme == "gs" and endpoint and "://" not in endpoint:
        endpoint = f"http://{endpoint}"  # Google's libraries take both forms of STORAGE_EMULATOR_HOST
    options["allow_http"] = endpoint.startswith("http://")
    # a token of its own, so that no real one goes to an emulator, and none is asked for
    config: GCSConfig = {"base_url": endpoint, "bearer_token": "emulator"} if endpoint else {}

    def connected(retries: RetryConfig) -> ObjectStore:
        if scheme == "gs":
            return GCSStore(name, config=config, client_options=options, retry_config=retries)
        return AzureStore(name, client_options=options, retry_config=retries)

    try:
        retrying = connected({"retry_timeout": timedelta(seconds=patience_seconds())})
        return Bucket(scheme, name, connected({"max_retries": 0}), retrying, None)
    except obstore.exceptions.BaseError:
        raise denied(f"{scheme}://{name}", "account or credentials are not set") from None


def _options(etag: str | None) -> GetOptions:
    return {} if etag is None else {"if_match": etag}
