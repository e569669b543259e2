"""Writing to the hub: files are sent one by one, and seen all at once, by one commit at the end.

After an interruption, files that arrived are not sent again: the hub finds large files by their sha256.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, get_token
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, get_session

from jobs.errors import AccessDenied, BadInput, MergeyardError, ObjectChanged, StorageError, StorageUnavailable
from jobs.foreign_json import load_json
from workers.services import sentence
from workers.storage.hub import (
    DEFAULT_ENDPOINT,
    URL,
    HubStore,
    bounded,
    check_status,
    from_status,
    said,
    without_answer,
)
from workers.storage.retrying import patiently, stall_seconds
from workers.storage.store import ObjectInfo

SMALL_BYTES = 10 << 20
"""Above this size the hub takes a file as a large one in any repository."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Content:
    """A file to send: its bytes or where they lie, their size and sha256, and the id that git has for them."""

    source: bytes | Path
    size: int
    sha256: str
    git_id: str

    def is_at(self, found: ObjectInfo | None) -> bool:
        """Whether the hub has this content there."""
        return found is not None and found.size == self.size and found.etag in (self.sha256, self.git_id)


class HubPublication:
    """The next commit to the main branch of a model repository, which is made if it is not there.

    Raises `BadInput` unless the URL is a plain `hf://organisation/name`, and if a private one is wanted but it is
    public; `AccessDenied` without a token that may write; `ObjectChanged` when another writer commits meanwhile.
    `visible` shows the hub's own progress bars. `private` is the wish, and after `begin` the state of the repository.
    """

    def __init__(self, url: str, *, private: bool, visible: bool = False) -> None:
        parts = URL.fullmatch(url.rstrip("/"))
        if parts is None or parts["revision"] or parts["folder"]:
            raise BadInput(f"{url}: publish to hf://organisation/name, which has neither revision nor folder")
        self._repository: str = parts["repository"]
        self._endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self._api = HfApi(endpoint=self._endpoint, library_name="mergeyard")
        if get_token() is None:
            raise AccessDenied(f"hf://{self._repository}: not logged in; run `hf auth login` or set HF_TOKEN")
        self.private = private
        self._additions: list[CommitOperationAdd] = []
        self._parent = ""
        self.url = f"hf://{self._repository}"
        self.page = f"{self._endpoint}/{self._repository}"
        if not visible:
            disable_progress_bars()

    def check_card(self, card: str) -> None:
        """`BadInput` when the hub objects to a model card, before anything is sent."""
        answer = self._patiently(lambda: self._validate(card))
        for complaint in answer:
            raise BadInput(f"{self.url}: the hub refuses the model card: {complaint}")

    def begin(self) -> dict[str, ObjectInfo]:
        """Creates the repository if it is missing; returns its files by name."""
        self._patiently(lambda: self._api.create_repo(self._repository, private=self.private, exist_ok=True))
        told = self._patiently(lambda: self._api.model_info(self._repository, revision="main", timeout=stall_seconds()))
        if self.private and told.private is False:
            raise BadInput(f"{self.url} is public already; say --public, or choose another name")
        self.private = (
            self.private if told.private is None else told.private
        )  # an existing repository keeps its visibility
        self._parent = told.sha or ""
        return self.files()

    def files(self) -> dict[str, ObjectInfo]:
        """The files of the newest commit, by name."""
        return {info.key: info for info in HubStore(self.url).list()}

    def read(self, name: str) -> bytes:
        """A small file of the newest commit."""
        return bytes(HubStore(self.url).read(name))

    def send(self, name: str, content: Content) -> None:
        """Sends a file, unless the hub has those bytes; it is seen when `commit` has returned."""
        addition = CommitOperationAdd(name, content.source)
        addition.upload_info.sha256 = bytes.fromhex(content.sha256)
        self._patiently(
            lambda: self._api.preupload_lfs_files(self._repository, [addition], revision="main", num_threads=1)
        )
        self._additions.append(addition)

    def commit(self, message: str, *, removed: Collection[str] = ()) -> None:
        """Shows everything that was sent, and takes the files named in `removed` away."""
        operations = [*self._additions, *(CommitOperationDelete(name) for name in sorted(removed))]
        self._patiently(
            lambda: self._api.create_commit(
                self._repository,
                operations,
                commit_message=message,
                revision="main",
                parent_commit=self._parent or None,
            )
        )

    def _validate(self, card: str) -> list[str]:
        with get_session().stream(
            "POST",
            f"{self._endpoint}/api/validate-yaml",
            json={"content": card, "repoType": "model"},
            headers=build_hf_headers(library_name="mergeyard"),
            timeout=stall_seconds(),
        ) as streamed:
            answer = bounded(streamed, self.url)
        if answer.status_code != 400:
            check_status(answer)
        match load_json(answer.content):
            case {"errors": [*problems]}:
                return [sentence(json.dumps(problem).encode()) for problem in problems]
            case _:
                return []

    def _patiently(self, request: Callable[[], Result]) -> Result:
        return patiently(request, translated=self._translated)

    def _translated(self, error: BaseException) -> MergeyardError:
        match error:
            case errors.HfHubHTTPError():
                return self._from_status(error)
            case errors.HFValidationError():
                return BadInput(f"{self.url}: not a name that the hub allows; use hf://organisation/name")
            case errors.OfflineModeIsEnabled():
                return BadInput(f"{self.url} cannot be written while HF_HUB_OFFLINE is set; unset it")
            case RuntimeError() if error.__cause__ is not None:  # "Error while uploading …", with the reason below
                return self._translated(error.__cause__)
            case _ if type(error).__name__ == "XetAuthenticationError":
                return self._denied("401")
            case ConnectionError() | TimeoutError():  # Xet raises these, whatever the hub or the network answered
                return StorageUnavailable(f"{self.url}: the upload broke off")
            case json.JSONDecodeError():
                return StorageUnavailable(f"{self.url}: the hub's answer cannot be read")
            case ValueError():
                return BadInput(f"{self.url}: {' '.join(str(error).split())}")
            case OSError(strerror=str(reason)):
                return StorageError(f"{self.url}: {reason}")
            case _:
                return without_answer(self.url, self._endpoint, error)

    def _from_status(self, error: errors.HfHubHTTPError) -> MergeyardError:
        status = error.response.status_code
        if status in (401, 403, 404):
            return self._denied(f"{status}{said(error)}")
        if status in (409, 412):
            return ObjectChanged(
                f"{self.url}: another writer committed meanwhile ({status}{said(error)}); publish again"
            )
        return from_status(self.url, error)

    def _denied(self, reason: str) -> AccessDenied:
        return AccessDenied(
            f"{self.url}: this token may not write there ({reason}); log in with one that may, by `hf auth login` or"
            " HF_TOKEN"
        )
