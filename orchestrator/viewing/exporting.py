"""The page as static files in a folder or a bucket."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from jobs.errors import writing
from orchestrator.viewing.site import Site
from workers.storage import open_store

WRITES_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Export:
    """Where the page lies, and its size."""

    url: str
    files: int
    bytes: int


def export(site: Site, url: str) -> Export:
    """Writes every file of the page, and removes the answers that an earlier export left there.

    The index comes last, so that a page which is there has all of its files.
    """
    store = open_store(url)
    store.check_writable()
    *paths, run, index = site.paths()

    def write(path: str) -> int:
        return store.write(path, site.read(path)).size

    with writing():
        with ThreadPoolExecutor(WRITES_AT_ONCE, "export") as pool:
            sizes = [*pool.map(write, paths), *map(write, (run, index))]
        kept = {*paths}
        for info in store.list("rows/"):
            if info.key not in kept:
                store.delete(info.key)
    return Export(store.url, len(sizes), sum(sizes))
