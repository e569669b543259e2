"""`mergeyard extract-lora MODEL BASE OUT`."""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from typing import TYPE_CHECKING

from jobs.errors import BadInput, printable
from orchestrator.commands.devices import named_device
from orchestrator.commands.inputs import print_json, watched
from orchestrator.commands.mergekit_options import OF_EXTRACTION, print_reasons
from orchestrator.words import size

if TYPE_CHECKING:
    from orchestrator.making.extraction import Extraction, Kept

NAMES = {"model": "--model", "base_model": "--base-model", "out_path": "--out-path"}


def extract_lora(options: argparse.Namespace) -> int:
    """`mergeyard extract-lora MODEL BASE OUT`, or the same three as options."""
    from orchestrator.making.extraction import Extractor, Wish
    from orchestrator.planning.locating import open_model
    from orchestrator.watching import Watcher

    model, base, out = _three(options)
    if options.transformers_cache:
        os.environ["HF_HUB_CACHE"] = options.transformers_cache
    device = named_device(options.device)
    if not options.quiet:
        print_reasons(options.changes_nothing, OF_EXTRACTION)
    wish = Wish(
        max_rank=options.max_rank,
        distribute_scale=options.distribute_scale,
        embed_lora=options.embed_lora,
        save_modules=tuple(options.save_module),
        exclude=tuple(options.exclude_regex),
        include=tuple(options.include_regex),
        sv_epsilon=options.sv_epsilon,
        skip_undecomposable=options.skip_undecomposable,
    )
    opened = open_model(model, "model", "MODEL"), open_model(base, "base", "BASE")
    extractor = Extractor(*opened, wish, out, device=device, threads=options.threads or os.cpu_count() or 1)
    if extractor.output.is_whole():
        print(printable(f"{extractor.output.store.url}: this very adapter is there already"))
        return 0
    with Watcher(visible=watched(options), tells=not options.quiet) as watcher:
        watcher.begin_writing(extractor.bytes_to_read, "extracting")
        extraction = extractor.run(watcher.advance)
    if options.json:
        print_json(
            {"url": extraction.url, "rank": extraction.rank, "tensors": [one.document() for one in extraction.kept]}
        )
    elif not options.quiet:
        _print(extraction)
    return 0


def _three(options: argparse.Namespace) -> list[str]:
    """Model, base and output: the options, and the rest by position."""
    rest = list(options.given)
    found: list[str] = [getattr(options, name) or (rest.pop(0) if rest else "") for name in NAMES]
    missing = [option for option, value in zip(NAMES.values(), found, strict=True) if not value]
    if missing or rest:
        wrong = f"one argument too many, {rest[0]!r}" if rest else f"{missing[0]} is missing"
        raise BadInput(f"extract-lora: {wrong}; it takes a fine-tuned model, its base and a folder: MODEL BASE OUT")
    return found


def _print(extraction: Extraction) -> None:
    """A table with a row for each kind of module, and the size of the adapter."""
    from orchestrator.making.extraction import relative

    kinds: dict[tuple[str, str], list[Kept]] = defaultdict(list)
    for one in extraction.kept:
        kinds[".".join(one.tensor.split(".")[-2:]), one.how].append(one)
    rows = [("tensors", "number", "rank", "relative error")]
    for (name, how), group in kinds.items():
        ranks = sorted({one.rank for one in group if one.rank is not None})
        rank = how if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        rows.append((name, str(len(group)), rank, f"{relative(group):.3g}"))
    rows.append(("all", str(len(extraction.kept)), f"{extraction.rank}", f"{relative(extraction.kept):.3g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, *cells in rows:
        numbers = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        print(printable(f"{name:<{widths[0]}}  {numbers}"))
    print()
    print(printable(f"{extraction.url}: an adapter of {size(extraction.bytes)}"))
