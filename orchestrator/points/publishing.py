"""Publishing a point: its files are checked against the manifest, and the arrived files are checked again.

To the hub a point goes with its licence and its results on its card, and is seen all at once. To a folder or a bucket
go the very bytes, the manifest last.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from jobs.errors import BadInput, CorruptData, ObjectChanged
from jobs.manifest import FileEntry, Manifest
from jobs.sealing import sealed, unsealed
from orchestrator.evaluating.results import read_results, read_verdict
from orchestrator.points.copying import copy_file, file_problem, publishing_facts, read_pieces
from orchestrator.points.finding import CARD, MANIFEST, RECIPE, FoundPoint, check_files
from orchestrator.points.licences import licences_of, reconciled_licence
from orchestrator.points.published_card import published_card
from orchestrator.report.leaderboard import Line, leaderboard
from orchestrator.report.searched import facts
from orchestrator.words import size
from workers.storage import open_store

if TYPE_CHECKING:
    from workers.storage.hub_publishing import Content, HubPublication


WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


# ---- to the hub


def publish_to_hub(
    point: FoundPoint, url: str, say: Callable[[str], None], *, public: bool, licence: str | None, visible: bool = False
) -> dict[str, Any]:
    """Uploads a point, its card completed, as one commit; nothing when it is there already. `say` as for `copy_point`.

    `BadInput` when the licences of the parents do not allow it, or when other weights lie there that no manifest names.
    """
    from workers.storage.hub_publishing import HubPublication

    publication = HubPublication(url, private=not public, visible=visible)
    terms = reconciled_licence(licences_of(point.manifest.parents), licence, public=public)
    check_files(point, say)
    ours = _ours(point, terms)
    publication.check_card(ours[CARD].decode())
    there = publication.begin()
    stale = _stale(publication, there, point.manifest)
    expected: dict[str, Content] = {}
    sent = 0
    for name in [*(name for name in point.manifest.files if name not in ours), *ours]:
        with _content(point, name, ours) as content:
            expected[name] = replace(content, source=b"")
            if not content.is_at(there.get(name)):
                if name in there and name.endswith(WEIGHTS) and MANIFEST not in there:
                    raise BadInput(f"{publication.url}: holds other weights, {name}; choose another name")
                say(f"sending {name}, {size(content.size)}")
                publication.send(name, content)
                sent += content.size
    if sent or stale:
        _commit(publication, point, expected, stale)
    return publishing_facts(point, publication.page, sent) | {
        "license": terms["license"],
        "private": publication.private,
    }


def _commit(publication: HubPublication, point: FoundPoint, expected: Mapping[str, Content], stale: set[str]) -> None:
    """Commits, and checks the arrived files. A commit whose answer was lost is found by its files."""
    refusal: ObjectChanged | None = None
    try:
        publication.commit(f"Merge {point.name} ({point.manifest.digest[:12]})", removed=stale)
    except ObjectChanged as error:
        refusal = error
    arrived = publication.files()
    wrong = [name for name, content in expected.items() if not content.is_at(arrived.get(name))]
    if wrong and refusal is not None:
        raise refusal
    if wrong:
        raise CorruptData(f"{publication.url}: {wrong[0]} arrived as something else; publish again")


def _ours(point: FoundPoint, terms: Mapping[str, str]) -> dict[str, bytes]:
    """The files that the hub gets in a form of their own: card, recipe, and the manifest that tells of them, last.

    Paths of the machine that merged say nothing to others; folders are called by their names.
    """
    manifest, folders = point.manifest, _folder_names(point.manifest.parents.values())
    config = json.loads(bytes(point.store.read(f"{point.prefix}config.json")))
    line, ranked, searched = _results(point)
    card = _renamed(bytes(point.store.read(f"{point.prefix}{CARD}")).decode(), folders)
    recipe = _renamed(bytes(point.store.read(f"{point.prefix}{RECIPE}")).decode(), folders)
    changed = {
        CARD: published_card(card, terms, config, line, ranked, searched, not_on_hub=[*folders.values()]).encode(),
        RECIPE: recipe.encode(),
    }
    entries = {name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in changed.items()}
    told = unsealed(replace(manifest, files={**manifest.files, **entries}).to_json())
    quoted = {json.dumps(path)[1:-1]: json.dumps(name)[1:-1] for path, name in folders.items()}
    return {**changed, MANIFEST: sealed(json.loads(_renamed(json.dumps(told), quoted)), lines=True)}


def _folder_names(urls: Iterable[str]) -> dict[str, str]:
    """Local paths, each with as many of its last parts as tell it from the others."""
    paths = {url: Path(url).parts[1:] for url in urls if "://" not in url}
    most = max(map(len, paths.values()), default=0)
    for count in range(1, most + 1):
        names = {url: "/".join(parts[-count:]) for url, parts in paths.items()}
        if len(set(names.values())) == len(names):
            return names
    return {}


def _renamed(text: str, names: Mapping[str, str]) -> str:
    """The text with whole paths replaced: none that begins within another, as `/base` does in `hf://org/base`."""
    for path in sorted(names, key=len, reverse=True):
        text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w-]|\.\w)", lambda _, name=names[path]: name, text)
    return text


def _results(point: FoundPoint) -> tuple[Line | None, Mapping[str, float], list[str]]:
    """The point's line of its run's leaderboard, the weights of the benchmarks of its score, and the facts of a search.

    The search is the one that chose the point. None where it has no scores.
    """
    if point.run is None:
        return None, {}, []
    try:
        result = read_results(point.run)
    except BadInput:
        return None, {}, []
    names = {point.name, point.manifest.point}
    names |= {result.same[name] for name in names if name in result.same}
    lines = [line for line in leaderboard(result) if line.kind == "point" and line.name in names]
    searched: list[str] = []
    if result.search is not None and names & {result.search.steps[-1].best}:
        searched = facts(result.search, read_verdict(open_store(point.run)))
    return (lines[0] if lines else None), result.weights, searched


@contextmanager
def _content(point: FoundPoint, name: str, ours: Mapping[str, bytes]) -> Generator[Content, None, None]:
    """The content for the hub under a name, checked; a large file of a bucket lies on the local disk meanwhile."""
    from workers.storage.hub_publishing import SMALL_BYTES, Content

    if name in ours:
        data = ours[name]
        yield Content(data, len(data), hashlib.sha256(data).hexdigest(), _git_id(data))
        return
    with TemporaryDirectory(prefix="mergeyard-publish-") as temporary:
        store, key = point.store, f"{point.prefix}{name}"
        if "://" in store.url:
            local = open_store(temporary)
            copy_file(store, key, local, name)
            store, key = local, name
        if problem := file_problem(store, key.removesuffix(name), name, point.manifest):
            raise CorruptData(f"{point.store.url}/{point.prefix}{problem}; nothing was published")
        length = store.locate(key).size
        sha256 = hashlib.sha256()
        git = hashlib.sha1(b"blob %d\0" % length, usedforsecurity=False)
        for piece in read_pieces(store, key):
            sha256.update(piece)
            git.update(piece)
        source = bytes(store.read(key)) if length <= SMALL_BYTES else Path(store.url, key)
        yield Content(source, length, sha256.hexdigest(), git.hexdigest())


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _stale(publication: HubPublication, there: Mapping[str, Any], manifest: Manifest) -> set[str]:
    """Files of an earlier point in the repository that this one does not have."""
    earlier: set[str] = set()
    if MANIFEST in there:
        try:
            earlier = set(Manifest.from_json(publication.read(MANIFEST)).files)
        except CorruptData:
            earlier = set()
    gone = set(there) - manifest.files.keys() - {MANIFEST}
    if strangers := sorted(name for name in gone - earlier if name.endswith(WEIGHTS)):
        raise BadInput(f"{publication.url}: holds other weights, {strangers[0]}; choose another name")
    return gone & earlier
