"""Places that hold objects, opened by URL: a folder, memory, an S3, GCS or Azure bucket, the Hugging Face hub.

`open_store(url)` is the only door; `store.py` has the promises of every store.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from jobs.errors import BadInput
from workers.storage.store import ObjectInfo, Store, Upload

__all__ = ["ObjectInfo", "Store", "Upload", "open_store"]

KNOWN_SCHEMES = "a path, file://, s3://, gs://, az://, hf:// or memory://"


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store under a path or a URL; nothing is contacted yet, and a folder need not exist yet.

    `/folder`, `file:///folder`, `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`,
    `hf://org/name@revision` or the address of its web page (read only), `memory://name` (shared by the whole process).
    `BadInput` for others, and for a URL with credentials in it, which would end up in plans, receipts and cards.
    """
    text = os.fspath(url)
    scheme = _scheme(text)
    if scheme in ("https", "http"):
        from workers.storage.hub import HubStore, url_of_page

        if (page := url_of_page(text)) is not None:
            return HubStore(page)
    if scheme not in ("", "file"):
        _refuse_credentials(text)
    match scheme:
        case "" | "file":
            from workers.storage.local import LocalStore

            return LocalStore(_folder(text))
        case "memory":
            from workers.storage.memory import named_memory_store

            return named_memory_store(text.rstrip("/"))
        case "s3" | "gs" | "az":
            from workers.storage.cloud import open_cloud_store

            return open_cloud_store(text)
        case "hf":
            from workers.storage.hub import HubStore

            return HubStore(text)
        case _:
            raise BadInput(f"{text}: unknown kind of storage {scheme}://; use {KNOWN_SCHEMES}")


def _refuse_credentials(text: str) -> None:
    place, _, query = text.partition("?")
    before, at, host = place.partition("://")[2].partition("/")[0].rpartition("@")
    if query or (at and before):
        shown = f"{_scheme(text)}://{host or place.partition('://')[2]}"
        raise BadInput(
            f"{shown}: nothing may stand before an @ or after a ? in this URL; credentials come from the environment"
        )


def _scheme(text: str) -> str:
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    return found.group(1).lower() if found else ""


def _folder(text: str) -> Path:
    if _scheme(text) == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise BadInput(f"{text}: a file:// URL has three slashes, as in file:///{parts.netloc}{parts.path}")
        text = unquote(parts.path)
    if not text:
        raise BadInput(f"an empty path is not a URL; use {KNOWN_SCHEMES}")
    return Path(os.path.abspath(Path(text).expanduser()))  # noqa: PTH100 (resolve() would follow symbolic links)
