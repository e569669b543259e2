"""Every file of the page, by its path below the page's folder. A server and an export give the same bytes."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from jobs.errors import ObjectMissing
from jobs.evaluation_tasks import ScoreRow
from jobs.sealing import stamped_text
from orchestrator.evaluating.results import AGAIN, RESULTS, read_results
from orchestrator.viewing.columns import FRACTIONS, NUMBERS, OUTCOMES, Columns, chunks, columns_of
from workers.benchmarks.items import Item, read_items
from workers.benchmarks.registry import BENCHMARKS
from workers.storage import open_store
from workers.storage.records import read_record, read_sealed

HERE = Path(__file__).parent
INDEX, RUN = "index.html", "run.json"
PART_NAME = re.compile(r"items/(?P<digest>\w+)/(?P<first>\d{6,})-(?P<last>\d{6,})\.parquet")
PROMPT_NAME = re.compile(r"prompts/(?P<digest>\w+)/(?P<item>\d+)\.json\.gz")
ROWS_NAME = re.compile(r"rows/(?P<version>\w+)/(?P<kind>numbers|answers|thoughts)(?:-(?P<chunk>\d+))?\.\w+\.gz")
RENEW_SECONDS = 10.0
"""The page of a run that goes on asks the server for newer answers so often."""

FILES_IN_MEMORY = 4
"""Files of at most 64 items, decoded: the next item is mostly in the same one."""

Part = tuple[int, int, str]
"""A file of items: first item, one after the last, key in the run."""


@lru_cache(1)
def page() -> bytes:
    """The page: one HTML file, whose only scripts and styles are its own."""
    html, style, script = ((HERE / f"view.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    for mark, text in (("DIGEST", digest), ("STYLE", style), ("SCRIPT", script)):
        html = html.replace(f"{{{{ {mark} }}}}", text)
    return stamped_text(html, "<!-- {} -->")


@dataclass(frozen=True)
class Site:
    """The answers of a run as they were when it was read, and its prompts. `live`: the page looks for newer ones."""

    run_url: str
    columns: Columns
    version: str
    document: Mapping[str, Any]
    parts: Mapping[str, Sequence[Part]]

    def read(self, path: str) -> bytes:
        """The bytes of one file; `ObjectMissing` for any other path."""
        if path == INDEX:
            return page()
        if path == RUN:
            return json.dumps(self.document, separators=(",", ":")).encode()
        if (name := ROWS_NAME.fullmatch(path)) and name["version"] == self.version:
            return self._rows(name["kind"], int(name["chunk"] or 0))
        if name := PROMPT_NAME.fullmatch(path):
            return packed(_prompt(self._item(name["digest"], int(name["item"]))))
        raise ObjectMissing(f"{path}: the page has no such file")

    def paths(self) -> Iterator[str]:
        """Every path, the index last: a page that is being written is not seen before its files are there."""
        rows = f"rows/{self.version}"
        yield f"{rows}/numbers.bin.gz"
        for kind in ("answers", "thoughts"):
            yield from (f"{rows}/{kind}-{chunk}.json.gz" for chunk in range(len(self.document[kind])))
        cells = self.columns.cells
        asked = {(cells[cell][3], item) for cell, item in self._asked() if self.document["cells"][cell]["prompts"]}
        for digest, item in sorted(asked):
            if self._part(digest, item) is not None:
                yield f"prompts/{digest}/{item}.json.gz"
        yield from (RUN, INDEX)

    def _asked(self) -> set[tuple[int, int]]:
        number = {cell: index for index, cell in enumerate(self.columns.cells)}
        return {(number[row.benchmark, row.task, row.length, row.items], row.item) for row in self.columns.rows}

    def _rows(self, kind: str, chunk: int) -> bytes:
        if kind == "numbers":
            return self._numbers
        starts = [*self.document[kind], len(self.columns.rows)]
        if chunk >= len(starts) - 1:
            raise ObjectMissing(f"{kind}-{chunk}: the page has no such file")
        return packed([_text(row, kind) for row in self.columns.rows[starts[chunk] : starts[chunk + 1]]])

    @cached_property
    def _numbers(self) -> bytes:
        return gzip.compress(self.columns.numbers(), 6, mtime=0)

    def _part(self, digest: str, item: int) -> Part | None:
        return next((part for part in self.parts.get(digest, ()) if part[0] <= item < part[1]), None)

    def _item(self, digest: str, item: int) -> Item:
        part = self._part(digest, item)
        found = [] if part is None else _items(self.run_url, part[2])
        try:
            return next(entry for entry in found if entry.index == item)
        except StopIteration:
            raise ObjectMissing(f"{self.run_url}: item {item} of the set {digest[:12]} is no longer there") from None


def read_site(run_url: str, *, live: bool) -> Site:
    """Reads the answers of a run; `BadInput` where nothing was evaluated. No prompt is read yet."""
    result = read_results(run_url)
    store = open_store(run_url)
    version = hashlib.sha256(read_sealed(store, RESULTS, AGAIN)).hexdigest()[:16]
    columns = columns_of(result)
    parts: dict[str, list[Part]] = {}
    for info in store.list("items/"):
        if name := PART_NAME.fullmatch(info.key):
            parts.setdefault(name["digest"], []).append((int(name["first"]), int(name["last"]), info.key))
    document = {
        "run": _name(run_url),
        "url": run_url,
        "version": version,
        "finished": result.finished,
        "renews": RENEW_SECONDS if live else 0,
        "rows": len(columns.rows),
        "points": [
            {
                "name": name,
                "title": result.parent_name(name),
                "parent": name in result.parent_labels,
                "same": [twin for twin, point in result.same.items() if point == name],
            }
            for name in columns.points
        ],
        "cells": [
            {
                "benchmark": benchmark,
                "task": task,
                "length": length,
                "digest": digest,
                "prompts": BENCHMARKS[benchmark].expected is not None and digest in parts,
            }
            for benchmark, task, length, digest in columns.cells
        ],
        "outcomes": OUTCOMES,
        "numbers": NUMBERS,
        "fractions": FRACTIONS,
        "answers": [*chunks([row.answer for row in columns.rows])],
        "thoughts": [*chunks([row.thought for row in columns.rows])]
        if any(row.thought for row in columns.rows)
        else [],
    }
    return Site(run_url, columns, version, document, parts)


def _name(run_url: str) -> str:
    try:
        return str(read_record(open_store(run_url), "plan.json")["job"])
    except (ObjectMissing, KeyError):
        return run_url.rstrip("/").rpartition("/")[2]


def _text(row: ScoreRow, kind: str) -> str:
    return row.answer if kind == "answers" else row.thought


def _prompt(item: Item) -> dict[str, Any]:
    """The parts of an item that the page shows."""
    found = asdict(item)
    shown = ("answer_prefix", "answers", "scorer", "max_new_tokens", "tokens")
    depths = [depth for depth in item.depths if math.isfinite(depth)]
    return {"text": item.prefix + item.prompt, "depths": depths} | {name: found[name] for name in shown}


@lru_cache(FILES_IN_MEMORY)
def _items(run_url: str, key: str) -> list[Item]:
    return read_items(read_sealed(open_store(run_url), key))


def packed(value: Any) -> bytes:
    """A value as JSON in gzip; the same value gives the same bytes."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return gzip.compress(text.encode("utf-8", "surrogatepass"), 6, mtime=0)
