"""The files of a point beside its weights and its config: whose they are, and which chat template holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jobs.errors import BadInput
from jobs.recipe import Recipe
from jobs.tokenizers import AddedToken
from workers.checkpoints.chat_templates import NAMED, check_template, template_of
from workers.checkpoints.opening import Checkpoint
from workers.checkpoints.side_files import LARGEST_SIDE_FILE, has_tokenizer, is_code, is_of_tokenizer
from workers.checkpoints.tokenizer_files import with_tokens
from workers.storage import open_store

GENERATION = "generation_config.json"


def tokenizer_owner(recipe: Recipe, parents: Mapping[str, Checkpoint], donor: str) -> str:
    """The parent whose tokenizer the points get: the named one, else the donor, else the first that has one.

    A union is the donor's with further tokens.

    The donor if no parent has one. `BadInput` if the named one has none.
    """
    owners = [name for name in recipe.parents() if has_tokenizer(parents[name].side_files)]
    named = donor if recipe.tokenizer_source == "base" else recipe.tokenizer_source
    if named is None or (named == "union" and owners):
        return donor if donor in owners or not owners else owners[0]
    if named not in owners:
        remedy = f"name one that has: {', '.join(owners)}" if owners else "no parent has one, take tokenizer_source out"
        place = recipe.place_of("tokenizer" if recipe.tokenizer else "tokenizer_source")
        raise BadInput(f"{place}: {donor if named == 'union' else named} has no tokenizer; {remedy}")
    return named


def copied_files(
    donor: Checkpoint, tokenizer: Checkpoint, *, code: bool, renumbered: bool
) -> tuple[Mapping[str, Checkpoint], Mapping[str, Checkpoint]]:
    """(the files that a point takes over, those that stay behind), each with its parent.

    Files of the tokenizer come from its parent, all others from the donor; so does generation_config.json, unless the
    tokenizer gives the donor's tokens other ids (`renumbered`). Code stays behind unless asked for, and so does a file
    of more than `LARGEST_SIDE_FILE` bytes.
    """
    of_tokenizer = {name for name in tokenizer.side_files if is_of_tokenizer(name)}
    if renumbered and GENERATION in tokenizer.side_files:
        of_tokenizer.add(GENERATION)
    files = {name: donor for name in donor.side_files if not is_of_tokenizer(name)}
    files |= dict.fromkeys(of_tokenizer, tokenizer)
    left = {
        name: parent
        for name, parent in files.items()
        if (is_code(name) and not code) or parent.side_files[name].size > LARGEST_SIDE_FILE
    }
    return {name: parent for name, parent in files.items() if name not in left}, left


def without_absent_code(config: Mapping[str, Any], files: Collection[str]) -> dict[str, Any]:
    """The config without the classes of `auto_map` whose file is not among `files`.

    A class of another repository, `org/name--module.Class`, stays.
    """
    stated = config.get("auto_map")
    if not isinstance(stated, Mapping):
        return {key: value for key, value in config.items() if key != "auto_map"}

    def there(name: object) -> bool:
        return isinstance(name, str) and ("--" in name or f"{name.rpartition('.')[0].replace('.', '/')}.py" in files)

    kept: dict[str, Any] = {}
    for use, names in stated.items():
        if isinstance(names, list):  # of a tokenizer: [slow, fast], either may be null
            names = [name if there(name) else None for name in names]
            if any(names):
                kept[use] = names
        elif there(names):
            kept[use] = names
    return {key: kept if key == "auto_map" else value for key, value in config.items() if kept or key != "auto_map"}


def read_beside(checkpoints: Mapping[str, Checkpoint], owner: str, name: str) -> bytes:
    """A file beside the weights of one of the checkpoints; errors as of its store."""
    checkpoint = checkpoints[owner]
    return bytes(open_store(checkpoint.url).read(name, etag=checkpoint.side_files[name].etag))


def files_beside(
    copied: Mapping[str, str],
    added: Sequence[AddedToken],
    template: str | None,
    read: Callable[[str, str], bytes],
) -> dict[str, bytes]:
    """The files that a merge takes over, by name: `read` gives that of (owner, name), `copied` has the owners."""
    files = {name: side_file_without_absent_code(read(owner, name), copied) for name, owner in copied.items()}
    files = with_tokens(files, added)
    if template is not None:
        files.pop("chat_template.json", None)  # a processor's older form of the same
        for name in files.keys() & {"tokenizer_config.json", "processor_config.json"}:
            files[name] = with_chat_template(files[name], template)
        files["chat_template.jinja"] = template.encode()
    return files


def side_file_without_absent_code(data: bytes, files: Collection[str]) -> bytes:
    """A JSON file of a tokenizer or processor as `without_absent_code`; the same bytes if there is nothing to do."""
    config = _fields_with("auto_map", data)
    kept = without_absent_code(config, files)
    return data if kept == config else (json.dumps(kept, indent=2) + "\n").encode()


def with_chat_template(data: bytes, template: str) -> bytes:
    """The config of a tokenizer or processor with this template in place of its own; the same bytes if it has none.

    Programs that read no chat_template.jinja, as older versions of transformers, take it from there.
    """
    config = _fields_with("chat_template", data)
    return (json.dumps({**config, "chat_template": template}, indent=2) + "\n").encode() if config else data


def _fields_with(key: str, data: bytes) -> Mapping[str, Any]:
    """The fields of a JSON file that has this key; none of another file."""
    if f'"{key}"'.encode() not in data:
        return {}
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):  # damaged: the libraries say so
        return {}
    return config if isinstance(config, dict) and key in config else {}


def chat_template(recipe: Recipe, members: Sequence[Checkpoint], tokenizer_from: str) -> str | None:
    """The Jinja text that replaces the chat template of the tokenizer; None if the recipe asks for none.

    `auto` is the commonest template of the parents, blanks around it aside, as in mergekit. Among equally common ones
    it is that of the tokenizer's parent, else the first; it is None if no parent has a template.
    """
    asked = recipe.chat_template
    if asked is None or asked in NAMED:
        return NAMED.get(asked or "")
    place = recipe.place_of("chat_template")
    if asked != "auto":
        check_template(asked, place)
        return asked
    found = {member.name: text for member in members if (text := template_of(member)) is not None and text.strip()}
    texts = [text.strip() for text in found.values()]
    best = max(found, key=lambda name: (texts.count(found[name].strip()), name == tokenizer_from), default=None)
    if best is None:
        return None
    check_template(found[best], f"{place}: parent {best}", "name a template in place of `auto`")
    return found[best]
