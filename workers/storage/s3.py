"""The parts that only S3 has: credentials from boto3's chain, the operator's endpoint, and multipart uploads."""

from __future__ import annotations

import os
import secrets
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3.session
from botocore import UNSIGNED
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.store import S3Store
from typing_extensions import Buffer

from jobs.errors import AccessDenied, CorruptData, MergeyardError, ObjectMissing, StorageError, StorageUnavailable
from workers.storage.retrying import CONNECT_SECONDS, patiently, stall_seconds
from workers.storage.store import ObjectInfo
from workers.storage.translation import denied, from_boto

if TYPE_CHECKING:
    from obstore.store import ClientConfig

MIB = 1 << 20
PART_BYTES = 16 * MIB
PARTS_OF_ONE_SIZE = 320  # then 16 MiB more: 5 GiB in equal parts (R2 wants equal ones), 2.5 TiB in S3's 10,000 parts
PARTS_IN_FLIGHT = 4
CONNECTIONS = 32
UPLOAD_MARK = "mergeyard-upload"


class S3Bucket:
    """One bucket as the environment describes it: an obstore store for bytes, a boto3 client for the rest."""

    def __init__(self, bucket: str, client_options: ClientConfig) -> None:
        self.name = bucket
        self._seen = False
        unsigned = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true")
        try:
            session = boto3.session.Session()
            region = session.region_name or os.environ.get("AWS_REGION") or "us-east-1"
            self.client: Any = _client(session, region, unsigned)
            self.objects = _object_store(
                session, bucket, region, unsigned, str(self.client.meta.endpoint_url), client_options
            )
        except BotoCoreError as error:
            raise from_boto(error, f"s3://{bucket}") from None

    def exists(self) -> bool:
        """Whether the bucket is there, asked until it once was; a bucket that may not be listed counts as there."""
        if not self._seen:
            try:
                self.call(f"s3://{self.name}", lambda: self.client.head_bucket(Bucket=self.name))
            except ObjectMissing:
                return False
            except AccessDenied:
                pass
            self._seen = True
        return True

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

    def __init__(self, bucket: S3Bucket, key: str, path: str, write_small: Callable[[bytearray], ObjectInfo]) -> None:
        self._bucket = bucket
        self._key = key
        self._path = path
        self._place = f"s3://{bucket.name}/{path}"
        self._write_small = write_small
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
            with suppress(MergeyardError):  # the service is down: `sweep` finds the rest later
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
                Bucket=self._bucket.name, Key=self._path, Metadata={UPLOAD_MARK: self._mark}
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
                    Bucket=self._bucket.name, Key=self._path, UploadId=upload_id, MultipartUpload={"Parts": parts}
                ),
            )
        except ObjectMissing:
            # an earlier try may have come through and only its answer been lost
            if not self._came_through():
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


def _part_bytes(number: int) -> int:
    return PART_BYTES * (1 + (number - 1) // PARTS_OF_ONE_SIZE)


def _client(session: boto3.session.Session, region: str, unsigned: bool) -> Any:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=stall_seconds(),
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=CONNECTIONS,
        s3={"addressing_style": "path"} if endpoint else {},
        **({"signature_version": UNSIGNED} if unsigned else {}),
    )
    return session.client("s3", region_name=region, config=options)


def _object_store(
    session: boto3.session.Session,
    bucket: str,
    region: str,
    unsigned: bool,
    endpoint: str,
    client_options: ClientConfig,
) -> S3Store:
    address = urlsplit(endpoint)
    amazon = (address.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
    where: dict[str, Any] = {"virtual_hosted_style_request": "." not in bucket} if amazon else {"endpoint": endpoint}
    if not unsigned and session.get_credentials() is None:
        raise denied(f"s3://{bucket}", "no credentials found")
    return S3Store(
        bucket,
        region=region,
        disable_bulk_delete=True,
        checksum_algorithm="SHA256",  # the service refuses damaged bytes; boto3 does the same for parts
        skip_signature=unsigned,
        client_options={**client_options, "allow_http": address.scheme == "http"},
        retry_config={"max_retries": 0},
        credential_provider=None if unsigned else Boto3CredentialProvider(session),
        **where,
    )
