"""Publishing a point: what leaves is what the manifest says, and what arrived is looked at again.

To the hub a point goes with its licence and its results on its card, and is seen all at once. To a folder or a bucket
go the very bytes, the manifest last.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from jobs.errors import BadInput, CorruptData, ObjectChanged, ObjectMissing
from jobs.manifest import FileEntry, Manifest
from jobs.records import sealed, unsealed
from orchestrator.evaluating.results import EvaluationResult, read_results
from orchestrator.inspecting import file_problems, point_problems
from orchestrator.model_card import front_matter, published_card
from orchestrator.report.leaderboard import Line, leaderboard
from orchestrator.words import size
from workers.records import read_record
from workers.storage import Store, open_store

if TYPE_CHECKING:
    from workers.storage.hub_publishing import Content, HubPublication

CHUNK_BYTES = 16 << 20
MANIFEST, CARD, RECIPE = "manifest.json", "README.md", "mergekit_config.yml"
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
NO_COMMERCE = re.compile(r"(^|[-_. ])(nc|mrl|mnpl)([-_. ]|$)|non-?(commercial|production)|research", re.IGNORECASE)
SHARE_ALIKE = re.compile(r"^([al]?gpl|osl|odbl|llama|gemma)|(^|[-_. ])sa([-_. ]|$)|openrail", re.IGNORECASE)
"""Licences that what is made of a model has to keep: copyleft ones, and the makers' own with terms to pass on."""

HUB = "https://huggingface.co"
HUB_URL = re.compile(r"hf://(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?")
NO_DERIVATIVES = re.compile(r"(^|[-_. ])nd([-_. ]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class FoundPoint:
    """A finished point: its files lie in `store` under `prefix`, as `manifest` says; `run` is None for a lone merge.

    `name` is what was asked for; `manifest.point` another where the two are the same merge.
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


def find_merge(url: str) -> FoundPoint:
    """A point by the URL of its folder, in a run or alone."""
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


def _check(point: FoundPoint, say: Callable[[str], None]) -> None:
    """`CorruptData` unless every file is what the manifest says."""
    say(f"verifying {point.name}, {size(sum(entry.size for entry in point.manifest.files.values()))}")
    for problem in point_problems(point.store, point.prefix, point.manifest):
        raise CorruptData(f"{point.store.url}/{point.prefix}{problem}; nothing was published")


# ---- to a folder or a bucket


def copy_point(point: FoundPoint, url: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The same bytes elsewhere; goes on where an earlier copy stopped. `BadInput` where something else lies.

    `say` gets a line for each thing that takes its time.
    """
    _check(point, say)
    target, files = open_store(url), point.manifest.files
    there = {info.key for info in target.list()}
    manifest = bytes(point.store.read(f"{point.prefix}{MANIFEST}"))
    if MANIFEST in there and bytes(target.read(MANIFEST)) != manifest:
        raise BadInput(f"{target.url}: another point lies there; choose another folder")
    if strangers := sorted(there - files.keys() - {MANIFEST}):
        raise BadInput(f"{target.url}: not empty, it holds {strangers[0]}; choose another folder")
    sent = 0
    for name in files:
        if name in there:
            problem = _problem(target, "", name, point.manifest)
            if problem is None:
                continue
            if MANIFEST not in there:  # files come whole: this one is not ours to replace
                raise BadInput(f"{target.url}: holds something else, {problem}; choose another folder")
        say(f"sending {name}, {size(files[name].size)}")
        sent += _copy(point.store, f"{point.prefix}{name}", target, name)
        if damage := _problem(target, "", name, point.manifest):
            raise CorruptData(f"{target.url}: arrived damaged: {damage}; publish again")
    if MANIFEST not in there:
        target.write(MANIFEST, manifest)  # last: readers take its presence for the whole
    return _facts(point, target.url, sent)


def _problem(store: Store, prefix: str, name: str, manifest: Manifest) -> str | None:
    """What is wrong with a file, if anything."""
    try:
        return next(file_problems(store, prefix, name, manifest), None)
    except CorruptData as error:
        return str(error)


def _copy(store: Store, key: str, target: Store, name: str) -> int:
    """How many bytes were copied, piece by piece."""
    info = store.locate(key)
    with target.upload(name) as upload:
        for piece in _pieces(store, key):
            upload.write(piece)
        upload.commit()
    return info.size


def _pieces(store: Store, key: str) -> Iterator[memoryview]:
    """The object in pieces, each good until the next is asked for."""
    info, buffer = store.locate(key), memoryview(bytearray(CHUNK_BYTES))
    for start in range(0, info.size, CHUNK_BYTES):
        piece = buffer[: min(CHUNK_BYTES, info.size - start)]
        store.read_into(key, piece, start=start, etag=info.etag)
        yield piece


def _facts(point: FoundPoint, url: str, sent: int) -> dict[str, Any]:
    return {
        "point": point.name,
        "same_as": None if point.name == point.manifest.point else point.manifest.point,
        "url": url,
        "weights": point.manifest.weights,
        "files": len(point.manifest.files) + 1,
        "bytes_sent": sent,
    }


# ---- to the hub


def publish_to_hub(
    point: FoundPoint, url: str, say: Callable[[str], None], *, public: bool, licence: str | None, visible: bool = False
) -> dict[str, Any]:
    """Uploads a point, its card completed, as one commit; nothing when it is there already. `say` as for `copy_point`.

    `BadInput` when the licences of the parents do not allow it, or when other weights lie there that no manifest names.
    """
    from workers.storage.hub_publishing import HubPublication

    publication = HubPublication(url, private=not public, visible=visible)
    terms = reconciled_licence(_licences(point.manifest.parents), licence, public=public)
    _check(point, say)
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
    return _facts(point, publication.page, sent) | {"license": terms["license"], "private": publication.private}


def _commit(publication: HubPublication, point: FoundPoint, expected: Mapping[str, Content], stale: set[str]) -> None:
    """Commits, and looks at what arrived. A commit whose answer was lost is found by what lies there."""
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
    line, ranked = _results(point)
    card = _renamed(bytes(point.store.read(f"{point.prefix}{CARD}")).decode(), folders)
    recipe = _renamed(bytes(point.store.read(f"{point.prefix}{RECIPE}")).decode(), folders)
    changed = {
        CARD: published_card(card, terms, config, line, ranked, not_on_hub=[*folders.values()]).encode(),
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


def _results(point: FoundPoint) -> tuple[Line | None, tuple[str, ...]]:
    """The point's line of its run's leaderboard, and the benchmarks it ranks by; None where it has no scores."""
    if point.run is None:
        return None, ()
    try:
        result = read_results(point.run)
    except BadInput:
        return None, ()
    scored = {point.name, point.manifest.point, _scored_as(result, point)}
    lines = [line for line in leaderboard(result) if line.name in scored]
    return (lines[0] if lines else None), result.ranked


def _scored_as(result: EvaluationResult, point: FoundPoint) -> str:
    return result.same.get(point.name, result.same.get(point.manifest.point, point.name))


@contextmanager
def _content(point: FoundPoint, name: str, ours: Mapping[str, bytes]) -> Generator[Content, None, None]:
    """What the hub is to get under a name, checked; a large file of a bucket lies on the local disk meanwhile."""
    from workers.storage.hub_publishing import SMALL_BYTES, Content

    if name in ours:
        data = ours[name]
        yield Content(data, len(data), hashlib.sha256(data).hexdigest(), _git_id(data))
        return
    with TemporaryDirectory(prefix="mergeyard-publish-") as temporary:
        store, key = point.store, f"{point.prefix}{name}"
        if "://" in store.url:
            local = open_store(temporary)
            _copy(store, key, local, name)
            store, key = local, name
        if problem := _problem(store, key.removesuffix(name), name, point.manifest):
            raise CorruptData(f"{point.store.url}/{point.prefix}{problem}; nothing was published")
        length = store.locate(key).size
        sha256 = hashlib.sha256()
        git = hashlib.sha1(b"blob %d\0" % length, usedforsecurity=False)
        for piece in _pieces(store, key):
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


# ---- licences


@dataclass(frozen=True, slots=True)
class Licence:
    """What a parent's card says: `license`, and name and link where that is `other`; None where it says nothing."""

    parent: str
    terms: Mapping[str, str] | None

    @property
    def label(self) -> str:
        """As a person calls it; without a name, one that is no licence of the hub's list is told by its own link."""
        terms = self.terms or {}
        if terms.get("license") != "other":
            return terms.get("license", "no licence")
        link = terms.get("license_link", "")
        return terms.get("license_name") or f"other ({link if '://' in link else f'of {self.parent}'})"

    def says(self, pattern: re.Pattern[str]) -> bool:
        """Whether the licence or its name does."""
        terms = self.terms or {}
        return any(pattern.search(terms.get(key, "")) for key in ("license", "license_name"))


def _licences(parents: Mapping[str, str], seen: frozenset[str] = frozenset()) -> list[Licence]:
    """What the parents' cards say; of a parent that is a merge and says nothing, what its own parents' say."""
    found: list[Licence] = []
    for name, url in parents.items():
        terms = _terms(url)
        older = {} if terms is not None or url in seen else _parents_of(url)
        found += _licences(older, seen | {url}) if older else [Licence(name, terms)]
    return found


def _parents_of(url: str) -> Mapping[str, str]:
    """The parents of a merge of ours; none of any other model."""
    try:
        return read_record(open_store(url), MANIFEST, Manifest.from_json).parents
    except (ObjectMissing, CorruptData):
        return {}


def _terms(url: str) -> dict[str, str] | None:
    try:
        told = front_matter(bytes(open_store(url).read(CARD)).decode(errors="replace"))
    except ObjectMissing:
        return None
    terms = {key: str(told[key]) for key in ("license", "license_name", "license_link") if told.get(key)}
    link, hub = terms.get("license_link", ""), HUB_URL.match(url)
    if link and "://" not in link and hub is not None:  # a file beside the parent, which does not come along
        terms["license_link"] = f"{HUB}/{hub['name']}/blob/{hub['revision'] or 'main'}/{link}"
    return terms if "license" in terms else None


def reconciled_licence(licences: list[Licence], chosen: str | None, *, public: bool) -> dict[str, str]:
    """The front matter of the merge's licence: the parents', where all have the same; else the chosen one.

    `BadInput` where they differ or say nothing and none is chosen, where the chosen one drops a parent's
    non-commercial clause or is another than one that has to be kept, and where a parent forbids the sharing of what is
    made of it. No lawyer looked at this.
    """
    for licence in licences:
        if public and licence.says(NO_DERIVATIVES):
            raise BadInput(
                f"{licence.parent} is under {licence.label}: what is made of it may not be shared; drop --public"
            )
    for licence in licences:
        if chosen is None or chosen == licence.label:
            continue
        if licence.says(SHARE_ALIKE) or (licence.says(NO_COMMERCE) and not NO_COMMERCE.search(chosen)):
            raise BadInput(
                f"--license {chosen}: {licence.parent} is under {licence.label}, which holds for what is made of it"
            )
    if chosen is not None:
        same = [licence.terms for licence in licences if licence.terms and chosen == licence.label]
        return dict(same[0]) if same else {"license": chosen}
    silent = [licence.parent for licence in licences if licence.terms is None]
    if silent:
        raise BadInput(f"the card of {silent[0]} names no licence; say --license NAME")
    found = {licence.label: licence for licence in licences}
    if len(found) > 1:
        said = ", ".join(f"{licence.parent} {licence.label}" for licence in found.values())
        raise BadInput(f"the parents' licences differ ({said}); say --license NAME")
    return dict(next(iter(found.values())).terms or {})
