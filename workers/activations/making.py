"""The file of statistics for AIM: from a model and texts, anywhere, to a file anywhere."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.errors import BadInput, writing
from jobs.merge_tasks import Parent, ParentFile
from workers.activations.measuring import Ids, measure
from workers.benchmarks.planned import Reader
from workers.benchmarks.texts.haystacks import bundled_text
from workers.benchmarks.texts.tokenizer import Tokenizer
from workers.checkpoints.activations import activations_bytes, digest_of_means, split_url
from workers.checkpoints.configs import completed, context_length, text_fields
from workers.checkpoints.fetching import fetch
from workers.checkpoints.opening import Checkpoint, open_checkpoint
from workers.checkpoints.side_files import is_code
from workers.methods.aim import overshadowed, relative
from workers.storage import open_store


@dataclass(frozen=True, slots=True)
class Made:
    """A file of statistics that was written, and the tensors that AIM leaves as they are, or nearly.

    `without`: no inputs were seen; `unreached`: experts that no token has reached; `overshadowed`: one activation is so
    large that the others hardly count.
    """

    file: str
    digest: str
    bytes: int
    tensors: int
    texts: int
    tokens: int
    seconds: float
    without: tuple[str, ...]
    unreached: tuple[str, ...]
    overshadowed: tuple[str, ...]


def make_activations(
    model: str,
    texts: str | None,
    out: str,
    *,
    count: int,
    most: int,
    device: str,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> Made:
    """Reads at most `count` texts of at most `most` tokens with a model, and writes the statistics to `out`.

    A text is cut to the context of the model too. `texts` is the path or URL of a text or of JSONL; None is the bundled
    prose. An existing file is never replaced. `BadInput` for inputs that do not fit together.
    """
    where, name = split_url(out)
    target = open_store(where)
    target.check_writable()
    if any(info.key == name for info in target.list()):
        raise BadInput(f"{out}: there is such a file already; give another name")
    checkpoint = open_checkpoint(model, "model")
    with tempfile.TemporaryDirectory(prefix="mergeyard-activations-") as room:
        folder = Path(checkpoint.url)
        if not folder.is_dir():
            folder = Path(room)
            fetch(_needed(checkpoint), folder)
        longest = min(most, context_length(checkpoint.config) or most)
        ids = _texts(Tokenizer.from_folder(folder), texts, count, longest)
        _check_tokens(ids, checkpoint)
        started = time.monotonic()
        measured = measure(folder, checkpoint.shapes, ids, device, lambda number: progress(number, len(ids)))
        seconds = time.monotonic() - started
    read = {"texts": texts or "bundled", "texts_read": str(len(ids)), "tokens": str(measured.tokens)}
    data = activations_bytes(measured.means, {"model": checkpoint.url, **read})
    with writing():
        target.write(name, data, mode="create")
    return Made(
        file=f"{target.url}/{name}",
        digest=digest_of_means(measured.means),
        bytes=len(data),
        tensors=len(measured.means),
        texts=len(ids),
        tokens=measured.tokens,
        seconds=round(seconds, 3),
        without=measured.without,
        unreached=measured.unreached,
        overshadowed=tuple(name for name, means in measured.means.items() if overshadowed(relative(means))),
    )


def _needed(checkpoint: Checkpoint) -> Parent:
    """The weights, the config and the files of the tokenizer."""
    beside = {key: info for key, info in checkpoint.side_files.items() if "/" not in key and not is_code(key)}
    for info in open_store(checkpoint.url).list():
        if info.key == "config.json" or ("/" not in info.key and info.key.endswith(".index.json")):
            beside[info.key] = info
    files = [ParentFile(key, info.size, info.etag) for key, info in beside.items()]
    return Parent(checkpoint.url, (*checkpoint.files, *files))


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
    text = Reader().prose(file, "TEXTS") if file else bundled_text()
    as_lines = place.endswith((".jsonl", ".ndjson"))
    ids = lines_of(tokenizer, text, count, most, place) if as_lines else pieces_of(tokenizer, text, count, most)
    if not ids:
        raise BadInput(f"{place}: there is no text in it; give prose as a .txt file, or JSONL")
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
    """The first `count` texts of a JSONL file, each cut after `most` tokens; empty ones are passed over.

    A line is a text, or an object with a `text`; `BadInput` for another.
    """
    found: list[Ids] = []
    for number, line in enumerate(lines.splitlines(), start=1):
        if len(found) == count:
            break
        if not line.strip():
            continue
        try:
            entry: Any = json.loads(line)
        except ValueError:
            entry = None
        text = entry.get("text") if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            raise BadInput(f'{place}:{number}: not a line such as {{"text": "…"}}; give JSONL, or prose as a .txt file')
        if text.strip():
            found.append(tokenizer.encode(text)[:most])
    return found
