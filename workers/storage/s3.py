"""The parts that only S3 has: two clients with one configuration, and multipart uploads."""

from __future__ import annotations

import secrets
import socket
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, ClientError
from typing_extensions import Buffer

from jobs.errors import (
    CorruptData,
    MergeyardError,
    ObjectChanged,
    ObjectExists,
    ObjectMissing,
    StorageError,
    StorageRefused,
    StorageUnavailable,
)
from workers.storage.retrying import patiently
from workers.storage.s3_settings import S3Settings
from workers.storage.store import ObjectInfo
from workers.storage.translation import from_boto

if TYPE_CHECKING:
    from obstore.store import ClientConfig

MIB = 1 << 20
PART_BYTES = 16 * MIB
PARTS_OF_ONE_SIZE = 320  # then 16 MiB more: 5 GiB in equal parts (R2 wants equal ones), 2.5 TiB in S3's 10,000 parts
PARTS_IN_FLIGHT = 4
UPLOAD_MARK = "mergeyard-upload"


class S3Bucket:
    """One bucket as its settings describe it: an obstore store for bytes, a boto3 client for the rest."""

    def __init__(self, bucket: str, client_options: ClientConfig) -> None:
        self.name = bucket
        self._seen = False
        self.settings = S3Settings.resolved(bucket)
        self.client: Any = self.settings.client
        self.objects = self.settings.object_store(client_options)

    def exists(self) -> bool:
        """Whether the bucket is there, asked until it once was; a bucket that may not be listed counts as there."""
        if not self._seen:
            try:
                self.call(f"s3://{self.name}", lambda: self.client.head_bucket(Bucket=self.name))
            except ObjectMissing:
                return False
            except StorageRefused:
                pass
            self._seen = True
        return True

    def bucket_has_no_host(self) -> bool:
        """Whether the service has an address and the bucket's host name has none; False if the network is away."""
        host = urlsplit(self.settings.endpoint).hostname or ""
        return self.settings.virtual_hosted and _has_address(host) and not _has_address(f"{self.name}.{host}")

    def header(self, name: str) -> str:
        """One header of the answer to the smallest request, refused or not; obstore gives none of its answers."""
        try:
            answer = self.client.head_bucket(Bucket=self.name)
        except ClientError as error:
            answer = cast("dict[str, Any]", error.response)
        except BotoCoreError:
            return ""
        return str(answer["ResponseMetadata"]["HTTPHeaders"].get(name, ""))

    def call(self, place: str, request: Callable[[], Any]) -> Any:
        """The answer to one boto3 request, tried again while the service is unwell."""

        def once() -> Any:
            try:
                return request()
            except (ClientError, BotoCoreError) as error:
                raise from_boto(error, place) from None

        return patiently(once)

    def abort_uploads(self, prefix: str) -> int:
        """Abort every multipart upload open under `prefix`; how many there were."""
        place = f"s3://{self.name}/{prefix}"
        aborted, markers = 0, {}
        while True:
            page = self.call(
                place, lambda at=markers: self.client.list_multipart_uploads(Bucket=self.name, Prefix=prefix, **at)
            )
            for upload in page.get("Uploads", []):
                self.abort(upload["Key"], upload["UploadId"])
                aborted += 1
            if not page.get("IsTruncated"):
                return aborted
            markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abort(self, path: str, upload_id: str) -> None:
        """Abort one multipart upload; no error if it is gone."""
        with suppress(ObjectMissing):
            self.call(
                f"s3://{self.name}/{path}",
                lambda: self.client.abort_multipart_upload(Bucket=self.name, Key=path, UploadId=upload_id),
            )


class MultipartUpload:
    """An object sent in parts, four at a time, while the caller goes on; at most five parts are in memory.

    The upload carries a random mark as metadata, so that after a lost answer one can tell whether it came through.
    """

    def __init__(
        self,
        bucket: S3Bucket,
        key: str,
        path: str,
        write_small: Callable[[bytearray], ObjectInfo],
        mode: Literal["create", "overwrite"],
    ) -> None:
        self._bucket = bucket
        self._key = key
        self._path = path
        self._place = f"s3://{bucket.name}/{path}"
        self._write_small = write_small
        self._condition = {"IfNoneMatch": "*"} if mode == "create" else {}
        self._upload_id: str | None = None
        self._mark = secrets.token_hex(16)
        self._part = bytearray()
        self._total = 0
        self._etags: list[str] = []
        self._sending: deque[Future[str]] = deque()
        self._senders = ThreadPoolExecutor(PARTS_IN_FLIGHT, "mergeyard-upload")
        self._open = True

    def write(self, data: Buffer) -> None:
        rest = memoryview(data).cast("B")
        self._total += rest.nbytes
        while rest:
            room = _part_bytes(len(self._etags) + len(self._sending) + 1) - len(self._part)
            self._part += rest[:room]
            if rest.nbytes >= room:
                self._send()
            rest = rest[room:]

    def commit(self) -> ObjectInfo:
        try:
            if self._upload_id is None:
                return self._write_small(self._part)
            if self._part:
                self._send()
            while self._sending:
                self._finish_oldest()
            self._complete(self._upload_id)
            self._upload_id = None
            return self._verified()
        finally:
            self.abort()

    def abort(self) -> None:
        if not self._open:
            return
        self._open = False
        self._senders.shutdown(wait=True, cancel_futures=True)  # S3 may keep a part that arrives after the abort
        if self._upload_id is not None:
            with suppress(MergeyardError):  # the service is down: a run's next `sweep` finds the rest
                self._bucket.abort(self._path, self._upload_id)

    def _send(self) -> None:
        if self._upload_id is None:
            self._upload_id = self._begin()
        if len(self._sending) == PARTS_IN_FLIGHT:
            self._finish_oldest()
        number = len(self._etags) + len(self._sending) + 1
        self._sending.append(self._senders.submit(self._send_part, self._upload_id, number, self._part))
        self._part = bytearray()

    def _begin(self) -> str:
        created = self._bucket.call(
            self._place,
            lambda: self._bucket.client.create_multipart_upload(
                Bucket=self._bucket.name,
                Key=self._path,
                Metadata={UPLOAD_MARK: self._mark},
                **self._bucket.settings.encryption,
            ),
        )
        return str(created["UploadId"])

    def _send_part(self, upload_id: str, number: int, part: bytearray) -> str:
        def once() -> Any:
            if not self._open:
                raise StorageError(f"{self._place}: the upload was aborted")
            return self._bucket.client.upload_part(
                Bucket=self._bucket.name, Key=self._path, UploadId=upload_id, PartNumber=number, Body=part
            )

        try:
            return str(self._bucket.call(f"{self._place} part {number}", once)["ETag"])
        except ObjectMissing:
            raise self._swept() from None

    def _finish_oldest(self) -> None:
        wait([self._sending[0]])
        self._etags.append(self._sending.popleft().result())

    def _complete(self, upload_id: str) -> None:
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(self._etags, 1)]
        try:
            self._bucket.call(
                self._place,
                lambda: self._bucket.client.complete_multipart_upload(
                    Bucket=self._bucket.name,
                    Key=self._path,
                    UploadId=upload_id,
                    MultipartUpload={"Parts": parts},
                    **self._condition,
                ),
            )
        except (ObjectMissing, ObjectChanged) as error:
            # an earlier try may have come through and only its answer been lost
            if self._came_through():
                return
            if isinstance(error, ObjectChanged):
                raise ObjectExists(f"{self._place} is already there") from None
            raise self._swept() from None

    def _swept(self) -> StorageUnavailable:
        """Another driver's `sweep` took this upload for a dead one's: a new upload mends it."""
        return StorageUnavailable(f"{self._place}: the upload was aborted by another writer; run again")

    def _came_through(self) -> bool:
        try:
            return self._head().get("Metadata", {}).get(UPLOAD_MARK) == self._mark
        except ObjectMissing:
            return False

    def _verified(self) -> ObjectInfo:
        head = self._head()
        ours = head.get("Metadata", {}).get(UPLOAD_MARK) == self._mark
        if ours and head["ContentLength"] != self._total:
            raise CorruptData(f"{self._place}: {self._total} bytes were sent, but {head['ContentLength']} arrived")
        return ObjectInfo(self._key, int(head["ContentLength"]), str(head["ETag"]))

    def _head(self) -> Any:
        return self._bucket.call(
            self._place, lambda: self._bucket.client.head_object(Bucket=self._bucket.name, Key=self._path)
        )

    def __enter__(self) -> MultipartUpload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


def _has_address(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _part_bytes(number: int) -> int:
    return PART_BYTES * (1 + (number - 1) // PARTS_OF_ONE_SIZE)
