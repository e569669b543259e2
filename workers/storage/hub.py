"""A repository of the Hugging Face hub as a store to read from: one commit of it, by ranges, never whole files.

Sizes and ETags come from the hub; bytes come from wherever it sends us. The hub counts requests to itself, so the place
that it named is asked again directly for some minutes, without the token unless it is the hub. If `HF_HUB_OFFLINE` is
set, or the first request finds no hub, a snapshot in the cache of huggingface_hub is read in its place.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar
from urllib.parse import quote, unquote, urlsplit

from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import (
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    parse_ratelimit_headers,
    validate_repo_id,
)
from typing_extensions import Buffer

from jobs.errors import (
    AccessDenied,
    BadInput,
    MergeyardError,
    ObjectChanged,
    ObjectMissing,
    StorageError,
    StorageRefused,
    StorageUnavailable,
)
from jobs.foreign_json import load_json
from workers.services import passes, sentence, tls_refusal, wait_seconds
from workers.storage.hub_cache import cached_info, cached_infos, cached_snapshot
from workers.storage.keys import check_key, check_prefix, length_within
from workers.storage.ranges import RANGE_BYTES, read_in_ranges
from workers.storage.retrying import patience_seconds, patiently, stall_seconds
from workers.storage.store import ObjectInfo, Upload

DEFAULT_ENDPOINT = "https://huggingface.co"
LOCATION_SECONDS = 300.0  # the hub's signed addresses live for an hour
LARGEST_ANSWER_BYTES = 32 << 20  # of JSON: a page of a listing has a thousand files and half a megabyte
MOST_PAGES = 10_000
FIRST_CONTACT_SECONDS = 15.0  # a hub that never answered is more likely out of reach than busy
COMMIT = re.compile(r"[0-9a-f]{40}")
REVISION = r"refs/(?:pr|convert)/[\w.-]+|[^/@]+"
URL = re.compile(rf"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>{REVISION}))?(?:/(?P<folder>.+))?")
DATASET = "hf://datasets/"
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
PAGE = re.compile(
    r"(?P<kind>datasets/)?(?P<repository>[\w.-]+/[\w.-]+)"
    r"(?:/(?P<view>tree|blob|resolve|raw|commit|commits|discussions)(?:/(?P<at>.+))?)?"
)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Located:
    """A file of the commit and the address that the hub gave for its bytes, good until `expires`."""

    info: ObjectInfo
    address: str
    expires: float


class HubStore:
    """The files of one model or dataset repository at one commit, which is looked up once, on first use."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        dataset = URL.fullmatch("hf://" + self._url.removeprefix(DATASET)) if self._url.startswith(DATASET) else None
        parts = dataset or URL.fullmatch(self._url.replace("hf://models/", "hf://", 1))
        if parts is None or self._url.startswith("hf://spaces/"):
            raise BadInput(
                f"{url}: a hub URL has the form hf://organisation/name@revision, or hf://datasets/organisation/name;"
                " other kinds of repositories are not read"
            )
        self._kind = "dataset" if dataset else "model"
        self._home = "datasets/" if dataset else ""
        self._repository: str = parts["repository"]
        folder = check_key(parts["folder"]) if parts["folder"] else ""
        self._readings = (
            _readings(unquote(parts["revision"]), folder) if parts["revision"] else {"main": _behind(folder)}
        )
        self._revision, self._folder = next(iter(self._readings.items()))
        self._endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self._lock = threading.Lock()
        self._commit = self._revision if COMMIT.fullmatch(self._revision) else ""
        self._located: dict[str, Located] = {}
        self._refused: dict[str, Located] = {}
        self._answered = False
        self._snapshot: Path | None = None

    @property
    def url(self) -> str:
        return self._url

    @property
    def pinned_url(self) -> str:
        return f"hf://{self._home}{self._repository}@{self._pinned()}/{self._folder}".rstrip("/")

    def locate(self, key: str) -> ObjectInfo:
        return self._locate(check_key(key)).info

    def read(self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None) -> Buffer:
        info = self.locate(key)
        data = bytearray(length_within(self._place(key), info.size, start, length))
        self.read_into(key, memoryview(data), start=start, etag=etag)
        return data

    def read_into(self, key: str, buffer: memoryview, *, start: int = 0, etag: str | None = None) -> None:
        info = self.locate(key)
        if etag is not None and etag != info.etag:
            raise ObjectChanged(f"{self._place(key)} is not the version that was pinned; run again to pin this one")
        target = buffer.cast("B")
        length_within(self._place(key), info.size, start, target.nbytes)

        def read_range(first: int, last: int) -> None:
            self._patiently(key, lambda: self._fetch(key, target[first:last], start + first))

        read_in_ranges(target.nbytes, read_range)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        self._pinned()
        wanted = self._folder + prefix
        folder = wanted.rpartition("/")[0]
        page = f"{self._api('tree', self._pinned())}{folder and '/' + quote(folder, safe='')}?recursive=true"
        for _ in range(MOST_PAGES):
            files, page = self._asked("", partial(self._page, page), self._cached_page)
            yield from (info for path, info in files if path.startswith(wanted))
            if page is None:
                return
        raise StorageRefused(f"{self._url}: the listing has no end; is {self._endpoint} a hub?")

    def write(self, key: str, data: Buffer, *, mode: Literal["create", "overwrite"] = "overwrite") -> ObjectInfo:
        self._refuse()

    def swap(self, key: str, data: Buffer, *, etag: str) -> ObjectInfo:
        self._refuse()

    def upload(self, key: str, *, mode: Literal["create", "overwrite"] = "overwrite") -> Upload:
        self._refuse()

    def delete(self, key: str) -> None:
        self._refuse()

    def sweep(self, prefix: str = "") -> int:
        self._refuse()

    def check_writable(self) -> None:
        self._refuse()

    def free_bytes(self) -> int | None:
        return None

    def _refuse(self) -> NoReturn:
        raise BadInput(f"{self._url} can only be read; write to a folder or bucket, then use `mergeyard publish`")

    def _place(self, key: str) -> str:
        return f"{self._url}/{key}".rstrip("/")

    def _pinned(self) -> str:
        with self._lock:
            if not self._commit:
                self._commit = self._asked(
                    "", self._ask_commit, lambda snapshot: snapshot.name, most=FIRST_CONTACT_SECONDS
                )
            return self._commit

    def _api(self, what: str, revision: str) -> str:
        return f"{self._endpoint}/api/{self._kind}s/{self._repository}/{what}/{quote(revision, safe='')}"

    def _ask_commit(self) -> str:
        """The commit of the revision; `x/y` after an @ is the folder y of the revision x, or the branch x/y."""
        validate_repo_id(self._repository)
        missing: Exception | None = None
        for revision, folder in self._readings.items():
            try:
                told = self._ask(self._api("revision", revision))[0]
            except errors.RevisionNotFoundError as error:
                missing = missing or error
                continue
            self._revision, self._folder = revision, folder
            match told:
                case {"sha": str(commit)} if COMMIT.fullmatch(commit):
                    return commit
                case _:
                    raise StorageUnavailable(f"{self._url}: the hub names no commit for this revision")
        assert missing is not None
        raise missing

    def _asked(
        self,
        key: str,
        request: Callable[[], Result],
        cached: Callable[[Path], Result],
        most: float | None = None,
    ) -> Result:
        """The hub's answer, or that of a snapshot in the cache where the first request finds no hub."""
        if self._snapshot is None:
            found = None if self._answered else cached_snapshot(self._repository, self._kind, [*self._readings])
            if not constants.is_offline_mode():
                try:
                    answer = self._patiently(key, request, most if found is None else FIRST_CONTACT_SECONDS)
                    self._answered = True
                    return answer
                except StorageUnavailable:
                    if found is None:
                        raise
            if found is None:
                raise BadInput(
                    f"{self._url}: HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not have all of this"
                    f" revision; unset it, or run `hf download {self._repository}` on a machine with a network"
                )
            self._snapshot, revision = found
            self._revision, self._folder = revision, self._readings[revision]
        return cached(self._snapshot)

    def _cached_file(self, snapshot: Path, key: str) -> Located:
        info = cached_info(snapshot, self._folder + key)
        if info is None:
            raise ObjectMissing(f"{self._place(key)} does not exist")
        return Located(replace(info, key=key), str(snapshot / info.key), math.inf)

    def _cached_page(self, snapshot: Path) -> tuple[list[tuple[str, ObjectInfo]], None]:
        infos = cached_infos(snapshot)
        return [(info.key, replace(info, key=info.key.removeprefix(self._folder))) for info in infos], None

    def _page(self, address: str) -> tuple[list[tuple[str, ObjectInfo]], str | None]:
        """Files with their whole path, and the address of the next page."""
        try:
            told, following = self._ask(address)
        except errors.EntryNotFoundError:  # no such folder: nothing begins with this prefix
            return [], None
        files: list[tuple[str, ObjectInfo]] = []
        for entry in told if isinstance(told, list) else [told]:
            match entry:
                case {"type": "directory"}:
                    continue
                case {"type": "file", "path": str(path), "size": int(size), "oid": str(oid)} if size >= 0:
                    large: Any = entry.get("lfs")
                    etag = str(large.get("oid")) if isinstance(large, dict) else oid
                    files.append((path, ObjectInfo(path.removeprefix(self._folder), size, etag)))
                case _:
                    raise StorageUnavailable(f"{self._url}: the hub's listing cannot be read")
        return files, following

    def _ask(self, address: str) -> tuple[Any, str | None]:
        """The JSON at an address of the hub, and the address of its next page."""
        with get_session().stream(
            "GET", address, headers=self._headers(address), timeout=stall_seconds(), follow_redirects=True
        ) as streamed:
            answer = bounded(streamed, self._url)
        check_status(answer)
        try:
            return load_json(answer.content), answer.links.get("next", {}).get("url")
        except ValueError as error:
            raise StorageUnavailable(f"{self._url}: the hub's answer cannot be read ({error})") from None

    def _locate(self, key: str) -> Located:
        """The file, from the hub or as the hub told us a moment ago."""
        self._pinned()
        return self._asked(key, lambda: self._locate_once(key), lambda snapshot: self._cached_file(snapshot, key))

    def _locate_once(self, key: str) -> Located:
        with self._lock:
            known = self._located.get(key)
        if known is None or time.monotonic() > known.expires:
            known = self._ask_where(key)
            with self._lock:
                self._located[key] = known
        return known

    def _ask_where(self, key: str) -> Located:
        url = hf_hub_url(
            self._repository,
            self._folder + key,
            repo_type=self._kind,
            revision=self._pinned(),
            endpoint=self._endpoint,
        )
        told = get_hf_file_metadata(url, timeout=stall_seconds(), library_name="mergeyard", endpoint=self._endpoint)
        if told.etag is None or told.size is None:
            raise StorageError(f"{self._place(key)}: the hub gives no ETag or no size for this file")
        return Located(ObjectInfo(key, told.size, told.etag), told.location, time.monotonic() + LOCATION_SECONDS)

    def _fetch(self, key: str, target: memoryview, start: int) -> None:
        """Fill `target` by one request, or from the cache."""
        if self._snapshot is not None:
            with Path(self._cached_file(self._snapshot, key).address).open("rb") as cached:
                cached.seek(start)
                cached.readinto(target)
            return
        file = self._locate_once(key)
        stop = start + target.nbytes
        with get_session().stream(
            "GET",
            file.address,
            headers={**self._headers(file.address), "Range": f"bytes={start}-{stop - 1}"},
            timeout=stall_seconds(),
            follow_redirects=True,
        ) as answer:
            skipped = self._checked_start(key, file, answer, start, stop)
            filled, most = 0, target.nbytes if answer.status_code == 206 else file.info.size
            for chunk in answer.iter_raw():
                most -= len(chunk)
                if most < 0:
                    raise StorageUnavailable(f"{self._place(key)}: more bytes came than were asked for")
                useful = memoryview(chunk)[skipped : skipped + target.nbytes - filled]
                skipped -= min(skipped, len(chunk))
                target[filled : filled + len(useful)] = useful
                filled += len(useful)
        if filled != target.nbytes:
            raise StorageUnavailable(f"{self._place(key)}: {filled} of {target.nbytes} bytes came")

    def _headers(self, address: str) -> dict[str, str]:
        token = None if _origin(address) == _origin(self._endpoint) else False  # False: the token stays with the hub
        return {**build_hf_headers(token=token, library_name="mergeyard"), "Accept-Encoding": "identity"}

    def _checked_start(self, key: str, file: Located, answer: Any, start: int, stop: int) -> int:
        """How many bytes of the answer's body lie before `start`."""
        if answer.status_code in (200, 206):
            self._refused.pop(key, None)
        if answer.status_code == 206:
            span = f"bytes {start}-{stop - 1}/{file.info.size}"
            if answer.headers.get("Content-Range") != span:
                got = answer.headers.get("Content-Range")
                raise StorageUnavailable(f"{self._place(key)}: {got!r} came where {span!r} was asked for")
            return 0
        if answer.status_code == 200 and file.info.size <= RANGE_BYTES:
            return start  # the hub itself serves small files whole
        if answer.status_code == 200:
            raise StorageUnavailable(f"{self._place(key)}: the whole file came where a range was asked for")
        with self._lock:
            self._located.pop(key, None)  # a signed address that has run out: the hub will give another
        status, host, content = answer.status_code, urlsplit(file.address).hostname, bounded(answer, self._url).content
        trouble = f"{self._place(key)}: {status} from {host}{f': {sentence(content)}' if content else ''}"
        with self._lock:
            if passes(status) or self._refused.setdefault(key, file) is file:
                raise asking_to_wait(StorageUnavailable(trouble), answer.headers)
        raise AccessDenied(f"{trouble}; download the repository elsewhere and give its folder")

    def _patiently(self, key: str, request: Callable[[], Result], most: float | None = None) -> Result:
        return patiently(request, most, translated=lambda error: self._translated(error, key))

    def _translated(self, error: Exception, key: str) -> MergeyardError:
        place = self._place(key)
        page = f"{self._endpoint}/{self._home}{self._repository}"
        match error:
            case errors.GatedRepoError():
                return AccessDenied(
                    f"{self._url} is gated{said(error)}; accept the terms at {page} and log in with `hf auth login`"
                )
            case errors.DisabledRepoError():
                return StorageRefused(f"{self._url}: the hub has disabled this repository; give another copy of it")
            case errors.RevisionNotFoundError():
                return ObjectMissing(f"{self._url}: there is no revision {self._revision!r}; see {page}/refs")
            case errors.RepositoryNotFoundError():
                return ObjectMissing(
                    f"{self._url}: there is no such repository, or it is private; check the name or run `hf auth login`"
                )
            case errors.EntryNotFoundError():
                return ObjectMissing(f"{place} does not exist")
            case errors.HFValidationError():
                return BadInput(f"{self._url}: not a repository name; use hf://organisation/name@revision")
            case errors.HfHubHTTPError(response=response) if response.status_code in (401, 403):
                return AccessDenied(
                    f"{place}: access denied ({response.status_code}{said(error)}); log in with `hf auth login` or set"
                    " HF_TOKEN"
                )
            case errors.HfHubHTTPError():
                return from_status(place, error)
            case _:
                return without_answer(place, self._endpoint, error)


def _readings(revision: str, path: str) -> dict[str, str]:
    """Revision to folder for each way to read `revision/path`, where both may have slashes; longest folder first."""
    parts = path.split("/") if path else []
    longest = 0 if COMMIT.fullmatch(revision) or "/" in revision else len(parts)
    return {"/".join([revision, *parts[:taken]]): _behind("/".join(parts[taken:])) for taken in range(longest + 1)}


def url_of_page(address: str) -> str | None:
    """The hf:// URL of a repository's page on the hub, such as https://huggingface.co/org/name/tree/main; else None.

    The page of a file (`blob`, `resolve`) is taken for its folder.
    """
    parts = urlsplit(address)
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).hostname
    if parts.hostname not in (endpoint, *HOSTS):
        return None
    page = PAGE.fullmatch(unquote(parts.path).strip("/"))
    if page is None:
        return None
    revision = (page["at"] or "") if page["view"] != "discussions" else ""
    if page["view"] in ("blob", "resolve", "raw"):
        revision = revision.rpartition("/")[0]
    return f"hf://{page['kind'] or ''}{page['repository']}" + (f"@{revision}" if revision else "")


def _behind(folder: str) -> str:
    """The folder as the beginning of a key."""
    return f"{folder}/" if folder else ""


def bounded(answer: Any, place: str) -> Any:
    """A streamed answer of httpx, read: `StorageUnavailable` if it has more than 32 MiB or takes longer than patience.

    A timeout of httpx ends one silence, not the sum of all.
    """
    content, last = bytearray(), time.monotonic() + patience_seconds()
    for chunk in answer.iter_raw():
        content += chunk
        if len(content) > LARGEST_ANSWER_BYTES or time.monotonic() > last:
            raise StorageUnavailable(f"{place}: the answer is too long: {len(content)} bytes until now")
    headers = [(name, value) for name, value in answer.headers.multi_items() if name.lower() != "content-encoding"]
    return type(answer)(answer.status_code, headers=headers, content=bytes(content), request=answer.request)


def check_status(answer: Any) -> None:
    """The error of huggingface_hub for the status of an answer, whatever its body is."""
    try:
        hf_raise_for_status(answer)
    except (AttributeError, TypeError, UnicodeDecodeError, RecursionError) as error:  # it expects an object in UTF-8
        raise errors.HfHubHTTPError(str(answer.status_code), response=answer) from error


def said(error: errors.HfHubHTTPError) -> str:
    """The hub's own sentence, after a colon; nothing if it gave none."""
    return f": {sentence(error.server_message.encode(errors='replace'))}" if error.server_message else ""


def from_status(place: str, error: errors.HfHubHTTPError) -> MergeyardError:
    """The error for a status that no other case has named."""
    status = error.response.status_code
    if passes(status):
        trouble = StorageUnavailable(f"{place}: the hub answers {status}{said(error)}")
        return asking_to_wait(trouble, error.response.headers)
    return StorageRefused(f"{place}: the hub refused with {status}{said(error)}")


def asking_to_wait(trouble: StorageUnavailable, headers: Mapping[str, str]) -> StorageUnavailable:
    """The error with the pause that the headers of an answer ask for."""
    limit = parse_ratelimit_headers(headers)
    spent = float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else 0.0
    trouble.pause = max(wait_seconds(headers.get("Retry-After")), spent)
    return trouble


def without_answer(place: str, endpoint: str, error: BaseException) -> MergeyardError:
    """The error for a request that got no answer from the hub."""
    if refusal := tls_refusal(error):
        return StorageRefused(f"{place}: {endpoint}: {refusal}")
    if type(error).__name__ == "ConnectError":
        return StorageUnavailable(f"{place}: the hub at {endpoint} cannot be reached")
    if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
        return StorageUnavailable(f"{place}: {type(error).__name__}")
    return StorageError(f"{place}: {type(error).__name__}: {' '.join(str(error).split())}")


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port
