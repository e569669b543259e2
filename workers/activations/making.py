"""A file of statistics: from a model and texts, anywhere, to a file anywhere."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np

from jobs.errors import BadInput, writing
from jobs.merge_tasks import Parent, ParentFile
from workers.activations.deltas import delta_grams, has_delta
from workers.activations.gradients import measure_fisher
from workers.activations.measuring import Ids, Measured, measure, measure_grams
from workers.benchmarks.planned import Reader
from workers.benchmarks.texts.chat_template import ChatTemplate
from workers.benchmarks.texts.haystacks import bundled_text
from workers.benchmarks.texts.tokenizer import Tokenizer
from workers.checkpoints.activations import activations_bytes, digest_of_means
from workers.checkpoints.configs import completed, context_length, text_fields
from workers.checkpoints.fetching import fetch
from workers.checkpoints.fishers import write_fisher
from workers.checkpoints.grams import write_grams
from workers.checkpoints.opening import Checkpoint, open_checkpoint
from workers.checkpoints.side_files import is_code
from workers.checkpoints.statistics import Written, split_url
from workers.gpu_memory import part_of
from workers.methods.aim import overshadowed, relative
from workers.storage import Store, open_store

Kind = Literal["grams", "means", "deltas", "fisher"]
"""Gram matrices for regmean, of inputs or of differences from a base, mean |x| for AIM, or squares of gradients."""

FISHER_BYTES = 8
"""Bytes for each weight while its Fisher information is measured: itself and F, both in float32."""

AS_TEXTS = "give its texts as lines with a `text`"


@dataclass(frozen=True, slots=True)
class Made:
    """A file of statistics that was written, and the tensors that it has nothing of, or little.

    `without`: there are no statistics; `unreached`: experts that no token has reached; `overshadowed`: one activation
    is so large that the others hardly count in AIM.
    """

    file: str
    kind: Kind
    digest: str
    bytes: int
    tensors: int
    texts: int
    tokens: int
    seconds: float
    without: tuple[str, ...]
    unreached: tuple[str, ...] = ()
    overshadowed: tuple[str, ...] = ()


def make_statistics(
    model: str,
    texts: str | None,
    out: str,
    *,
    kind: Kind,
    count: int,
    most: int,
    block: int,
    device: str,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> Made:
    """Reads at most `count` texts of at most `most` tokens with a model, and writes the statistics to `out`.

    A text is cut to the context of the model too. `texts` is the path or URL of a text or of JSONL; None is the bundled
    prose. `block` is the most channels of a block of a Gram matrix. An existing file is not replaced. `BadInput` for
    inputs that do not fit together, or a model that is too large for its Fisher information.
    """
    target, name = _target(out)
    checkpoint = open_checkpoint(model, "model")
    if kind == "fisher":
        _check_memory(checkpoint, device)
    with tempfile.TemporaryDirectory(prefix="mergeyard-measure-") as room:
        folder = Path(checkpoint.url)
        if not folder.is_dir():
            folder = Path(room)
            fetch(_needed(checkpoint), folder)
        longest = min(most, context_length(checkpoint.config) or most)
        ids = _texts(Tokenizer.from_folder(folder), texts, count, longest)
        _check_tokens(ids, checkpoint)
        started = time.monotonic()
        tokens = sum(map(len, ids))
        read = {"texts": texts or "bundled", "texts_read": str(len(ids)), "tokens": str(tokens)}
        metadata = {"model": checkpoint.url, **read}

        def seen(number: int) -> None:
            progress(number, len(ids))

        if kind == "grams":
            measured = measure_grams(folder, checkpoint.shapes, ids, device, block, seen)
            if not measured.sums:
                raise BadInput(f"{checkpoint.url}: none of its layers is a torch.nn.Linear; regmean cannot merge it")
            found = _of_written(write_grams(target, name, measured.matrices(), metadata), measured.without)
        elif kind == "fisher":
            fisher = measure_fisher(folder, checkpoint.shapes, ids, device, seen)
            found = _of_written(write_fisher(target, name, fisher.squares, metadata), fisher.without)
            found["unreached"] = fisher.unreached
        else:
            found = _write_means(target, name, measure(folder, checkpoint.shapes, ids, device, seen), metadata)
    return Made(
        file=f"{target.url}/{name}",
        kind=kind,
        texts=len(ids),
        tokens=tokens,
        seconds=round(time.monotonic() - started, 3),
        **found,
    )


def make_delta_grams(model: str, base: str, out: str, *, block: int) -> Made:
    """Writes the Gram matrices of the differences of a model from its base to `out`; no text is read.

    One matrix at a time is in memory. `BadInput` for checkpoints that do not fit together.
    """
    target, name = _target(out)
    checkpoint, start = open_checkpoint(model, "model"), open_checkpoint(base, "base")
    if checkpoint.url == start.url:
        raise BadInput(f"--base {base}: the very checkpoint that is measured; give the one that it was trained from")
    started = time.monotonic()
    metadata = {"model": checkpoint.url, "base": start.url}
    written = write_grams(target, name, delta_grams(checkpoint, start, block), metadata)
    matrices = [each for each, shape in checkpoint.shapes.items() if len(shape) > 2 or has_delta(each, shape)]
    without = tuple(each for each in matrices if each not in written.names)
    return Made(
        file=f"{target.url}/{name}",
        kind="deltas",
        texts=0,
        tokens=0,
        seconds=round(time.monotonic() - started, 3),
        **_of_written(written, without),
    )


def _target(out: str) -> tuple[Store, str]:
    """Store and key of the file to write, which is not there yet."""
    where, name = split_url(out)
    target = open_store(where)
    target.check_writable()
    if any(info.key == name for info in target.list()):
        raise BadInput(f"{out}: there is such a file already; give another name")
    return target, name


def _of_written(written: Written, without: tuple[str, ...]) -> dict[str, Any]:
    """The fields of `Made` that depend on the statistics."""
    return {"digest": written.digest, "bytes": written.bytes, "tensors": len(written.names), "without": without}


def _write_means(target: Store, name: str, means: Measured, metadata: Mapping[str, str]) -> dict[str, Any]:
    content = activations_bytes(means.means, metadata)
    with writing():
        target.write(name, content, mode="create")
    return {
        "digest": digest_of_means(means.means),
        "bytes": len(content),
        "tensors": len(means.means),
        "without": means.without,
        "unreached": means.unreached,
        "overshadowed": tuple(name for name, each in means.means.items() if overshadowed(relative(each))),
    }


def _needed(checkpoint: Checkpoint) -> Parent:
    """The weights, the config and the files of the tokenizer."""
    beside = {key: info for key, info in checkpoint.side_files.items() if "/" not in key and not is_code(key)}
    for info in open_store(checkpoint.url).list():
        if info.key == "config.json" or ("/" not in info.key and info.key.endswith(".index.json")):
            beside[info.key] = info
    files = [ParentFile(key, info.size, info.etag) for key, info in beside.items()]
    return Parent(checkpoint.url, (*checkpoint.files, *files))


def _check_memory(checkpoint: Checkpoint, device: str) -> None:
    """Refuses a model whose weights and F do not fit into memory even without activations."""
    needed = FISHER_BYTES * sum(map(prod, checkpoint.shapes.values()))
    there = part_of(device) if device != "cpu" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        place = "this machine" if device == "cpu" else device
        raise BadInput(
            f"{checkpoint.url}: its weights and their Fisher information take {needed / 1e9:.1f} GB in float32, and"
            f" {place} has {there / 1e9:.1f} GB; measure it on one with more memory"
        )


def _check_tokens(texts: Sequence[Ids], checkpoint: Checkpoint) -> None:
    """Refuses tokens that the model has no embeddings for."""
    rows = text_fields(completed(checkpoint.config)).get("vocab_size")
    largest = max(map(max, texts))
    if isinstance(rows, int) and largest >= rows:
        raise BadInput(
            f"{checkpoint.url}: the texts have token {largest}, and the model {rows} rows of embeddings; give a"
            " checkpoint with its own tokenizer"
        )


def _texts(tokenizer: Tokenizer, file: str | None, count: int, most: int) -> list[Ids]:
    place = file or "the bundled text"
    text = Reader().prose(file, "--text") if file else bundled_text()
    as_lines = place.endswith((".jsonl", ".ndjson"))
    ids = lines_of(tokenizer, text, count, most, place) if as_lines else pieces_of(tokenizer, text, count, most)
    if not ids:
        raise BadInput(f"{place}: it has no text; give prose as a .txt file, or JSONL")
    return ids


def pieces_of(tokenizer: Tokenizer, text: str, count: int, most: int) -> list[Ids]:
    """At most `count` pieces of a long text, of at most `most` tokens each, spread evenly; they do not overlap.

    Special tokens that stand in front of a prompt stand in front of each.
    """
    front = tokenizer.encode("")
    ids, room = tokenizer.encode(text)[len(front) :], most - len(front)
    pieces = min(count, -(-len(ids) // room))
    starts = np.linspace(0, max(0, len(ids) - room), num=max(pieces, 1)).astype(int).tolist()
    return [[*front, *ids[start : start + room]] for start in starts if ids]


def lines_of(tokenizer: Tokenizer, lines: str, count: int, most: int, place: str) -> list[Ids]:
    """The first `count` texts of a JSONL file, each cut after `most` tokens; those without tokens are passed over.

    A line is a text, an object with a `text`, or one with the `messages` of a chat, which the chat template of the
    model renders; `BadInput` for another.
    """
    with ExitStack() as stack:
        chats: list[ChatTemplate] = []

        def rendered(messages: Sequence[Mapping[str, str]]) -> list[int]:
            if not chats:
                template = _template(tokenizer)
                chat = ChatTemplate(template, tokenizer.special_tokens, tokenizer.place, remedy=AS_TEXTS)
                chats.append(stack.enter_context(chat))
            return tokenizer.as_bare().encode(chats[0].render(messages, open_turn=False))

        def encoded(number: int, text: str | list[Any]) -> list[int]:
            if isinstance(text, str):
                return tokenizer.encode(text) if text.strip() else []
            try:
                return rendered(text)
            except BadInput as error:
                raise BadInput(f"{place}:{number}: {error}") from error

        texts = (encoded(number, text) for number, text in _entries(lines, place))
        return [ids[:most] for ids in islice(filter(None, texts), count)]


def _entries(lines: str, place: str) -> Iterator[tuple[int, str | list[Any]]]:
    """The number of each line, and its text or messages."""
    for number, line in enumerate(lines.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry: Any = json.loads(line)
        except ValueError:
            entry = None
        text = entry.get("text", entry.get("messages")) if isinstance(entry, dict) else entry
        if isinstance(text, str) or _is_chat(text):
            yield number, text
            continue
        raise BadInput(
            f'{place}:{number}: not a line such as {{"text": "…"}} or {{"messages": [{{"role": "user", "content":'
            ' "…"}]}; give JSONL, or prose as a .txt file'
        )


def _is_chat(value: Any) -> TypeGuard[list[Any]]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
            for each in value
        )
    )


def _template(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is None:
        raise BadInput(f"{tokenizer.place}: the checkpoint has no chat template; {AS_TEXTS}")
    return tokenizer.chat_template
