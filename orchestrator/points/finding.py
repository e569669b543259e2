"""A point by its URL or by run and name, with its manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jobs.errors import CorruptData, ObjectMissing
from jobs.manifest import Manifest
from orchestrator.points.verifying import point_problems
from orchestrator.words import size
from workers.storage import Store, open_store
from workers.storage.records import read_record

MANIFEST, CARD, RECIPE = "manifest.json", "README.md", "mergekit_config.yml"


@dataclass(frozen=True, slots=True)
class FoundPoint:
    """A finished point: `manifest` lists its files in `store` under `prefix`; `run` is None for a merge outside a run.

    `name` is the requested name. `manifest.point` differs from it if the point repeats another point's merge.
    """

    name: str
    store: Store
    prefix: str
    manifest: Manifest
    run: str | None


def find_point(run: str, point: str) -> FoundPoint:
    """A point of a run by its name; `ObjectMissing` when it is not there or not complete."""
    store = open_store(run)
    manifest = _manifest(store, f"points/{point}/")
    owner = manifest.same_as or point
    if manifest.same_as is not None:
        manifest = _manifest(store, f"points/{owner}/")
    return FoundPoint(point, store, f"points/{owner}/", manifest, run)


def finished_points(run: str) -> list[str]:
    """The names of the points of a run that have their manifests; none where there is no run."""
    keys = (info.key.split("/") for info in open_store(run).list("points/"))
    return sorted(parts[1] for parts in keys if parts[2:] == [MANIFEST])


def find_merge(url: str) -> FoundPoint:
    """A point by the URL of its folder, inside or outside a run."""
    store = open_store(url)
    run, inside, point = store.url.rpartition("/points/")
    if inside and "/" not in point:
        return find_point(run, point)
    manifest = _manifest(store, "")
    return FoundPoint(manifest.point, store, "", manifest, None)


def _manifest(store: Store, prefix: str) -> Manifest:
    try:
        return read_record(store, f"{prefix}{MANIFEST}", Manifest.from_json)
    except ObjectMissing:
        place = f"{store.url}/{prefix}".rstrip("/")
        raise ObjectMissing(f"{place}: no finished point there; see `mergeyard status`") from None


def check_files(point: FoundPoint, say: Callable[[str], None]) -> None:
    """Raises `CorruptData` unless every file matches the manifest."""
    say(f"verifying {point.name}, {size(sum(entry.size for entry in point.manifest.files.values()))}")
    for problem in point_problems(point.store, point.prefix, point.manifest):
        raise CorruptData(f"{point.store.url}/{point.prefix}{problem}; nothing was published")
