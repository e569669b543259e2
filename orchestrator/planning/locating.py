"""The parents of a job, opened where their references lead: `path_or_URL[@revision][+adapter[@revision]]`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jobs.errors import BadInput, CorruptData
from jobs.job import Job
from jobs.yaml_nodes import quoted
from workers.checkpoints.adapters import Adapter, adapter_alone, open_adapter, with_adapter
from workers.checkpoints.configs import text_fields
from workers.checkpoints.opening import AdapterAlone, Checkpoint, Unmergeable, open_as_it_is, open_checkpoint

KINDS = "give a path, or hf://, s3://, gs:// or az://"
BUCKETS = ("s3://", "gs://", "az://", "memory://", "file://")
OPENED_AT_ONCE = 8
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def open_parents(job: Job, relative_to: Path | None, *, bare_names: bool) -> dict[str, Checkpoint]:
    """Every parent of the job; with `bare_names`, as mergekit documents have them, `org/name` is a repository.

    An adapter on a stage is itself. `BadInput` for one that cannot be opened, of whatever error.
    """
    located = {
        name: locate(reference, relative_to, job.place_of(f"parents.{name}"), bare_names=bare_names)
        for name, reference in ((name, job.parents[name]) for name in job.used_parents())
    }

    on_stages = frozenset[str]().union(*(point.adapters() for point in job.points))

    def opened(name: str) -> Checkpoint | None:
        try:
            return _adapter(job, name, *located[name]) if name in on_stages else _opened(*located[name], name)
        except AdapterAlone:
            return None
        except CorruptData as error:  # to whoever plans a merge, a damaged parent is a wrong input
            raise BadInput(f"parent {name}: {error}") from error

    with ThreadPoolExecutor(max_workers=OPENED_AT_ONCE) as pool:
        whole = dict(zip(located, pool.map(opened, located), strict=True))
    found = {name: checkpoint for name, checkpoint in whole.items() if checkpoint is not None}
    alone = {name: url for name, (url, _) in located.items() if name not in found}
    bases = {name: url for name, (url, _) in located.items() if name not in alone}
    for name, url in alone.items():
        adapter = open_adapter(url, f"parent {name}")
        base = _base_of(adapter, name, bases, relative_to)
        found[name] = with_adapter(open_checkpoint(base, name), adapter)
    return {name: found[name] for name in located}


def _adapter(job: Job, name: str, url: str, second: str | None) -> Checkpoint:
    """The adapter on a stage of that name; `BadInput` for two, and for one that is a model of its own too."""
    place = job.place_of(f"parents.{name}")
    if second is not None:
        raise BadInput(f"{place}: {name} is a model with an adapter, and is applied to a merge; name the adapter alone")
    found = adapter_alone(url, name)
    if any(name in recipe.parents() for point in job.points for recipe in point.recipes):
        raise BadInput(
            f"{place}: {name} is applied to a merge, and is a model too; in the place of the model, write its base"
            f" before it: `BASE+{job.parents[name]}`"
        )
    return found


def open_model(reference: str, name: str, place: str) -> Checkpoint:
    """The model at a reference, as a document of mergekit has it; paths count from the current folder.

    `BadInput` if it cannot be opened, or its weights cannot be computed with.
    """
    try:
        found = _opened(*locate(reference, Path.cwd(), place, bare_names=True), name)
    except CorruptData as error:
        raise BadInput(f"{place}: {error}") from error
    if found.unmergeable:
        raise BadInput(found.unmergeable)
    return found


def layers_of(reference: str, place: str) -> int:
    """The number of layers of the model at a reference, by its config; 1 where that has none."""
    return int(text_fields(open_model(reference, reference, place).config).get("num_hidden_layers", 1))


def locate(reference: str, relative_to: Path | None, place: str, *, bare_names: bool) -> tuple[str, str | None]:
    """(the URL of a model, that of the LoRA adapter after its `+` if there is one); paths become absolute.

    A folder may have any name: one that exists is never taken apart.
    """
    whole = _resolved(reference, relative_to, bare_names=bare_names)
    if whole is not None and not _is_url(whole):
        return whole, None
    without_folder: str | None = None
    for split in re.finditer(r"\+", reference):
        base = _resolved(reference[: split.start()], relative_to, bare_names=bare_names)
        if base is None:
            continue
        adapter = reference[split.end() :]
        found = _resolved(adapter, relative_to, bare_names=base.startswith(("hf://", "https://")) or bare_names)
        if found is not None and (_is_url(adapter) or not base.startswith(BUCKETS) or not found.startswith("hf://")):
            return base, found
        without_folder = without_folder or adapter
    if whole is not None and whole.startswith(BUCKETS):
        return whole, None
    if without_folder is not None:
        wanted = _path(without_folder, relative_to)
        raise BadInput(f"{place}: {quoted(reference)}: no folder {wanted} for the adapter after the +; {KINDS}")
    if whole is not None:
        return whole, None
    if re.match(r"\w+\+\w+://", reference):  # such as git+ssh://, which no store opens
        return reference, None
    raise BadInput(f"{place}: no folder {_path(reference, relative_to)}; {KINDS}")


def _resolved(text: str, relative_to: Path | None, *, bare_names: bool) -> str | None:
    """The URL or the absolute path that a name stands for; None if it is neither a URL nor a folder."""
    if _is_url(text):
        return text
    for path in (_path(text, relative_to), _path(text.removesuffix("@main"), relative_to)):
        if path.is_dir():  # which has no revisions: mergekit reads it whatever stands after the @
            return str(path.resolve())
    if text.startswith(("huggingface.co/", "hf.co/")):
        return f"https://{text}"
    return f"hf://{text}" if bare_names and _REPOSITORY.fullmatch(text) else None


def _is_url(text: str) -> bool:
    return re.match(r"\w+://", text) is not None


def _path(text: str, relative_to: Path | None) -> Path:
    path = Path(text).expanduser()
    return path if relative_to is None or path.is_absolute() else relative_to / path


def _opened(url: str, adapter: str | None, name: str) -> Checkpoint:
    if adapter is not None:
        return with_adapter(open_checkpoint(url, name), open_adapter(adapter, f"parent {name}"))
    try:
        return open_checkpoint(url, name)
    except AdapterAlone:
        raise
    except Unmergeable as refusal:  # refused where a recipe merges it
        return open_as_it_is(url, name, refusal)


def _base_of(adapter: Adapter, name: str, bases: Mapping[str, str], relative_to: Path | None) -> str:
    """The URL of the base that an adapter names: a parent of the job, a folder or a repository."""
    if adapter.base in bases:
        return bases[adapter.base]
    stated = _resolved(adapter.base, relative_to, bare_names=True) if adapter.base else None
    if stated is None:
        of = f"is of {quoted(adapter.base)}, which is not here" if adapter.base else "names no base"
        raise BadInput(
            f"parent {name} ({adapter.url}): a LoRA adapter that {of}; write its base before it: `BASE+{adapter.url}`"
        )
    same = (url for url in bases.values() if _repository(url) == _repository(stated))
    return next(same, stated)


def _repository(url: str) -> str:
    return url.split("@")[0] if url.startswith("hf://") else url
