"""`mergeyard measure MODEL OUT`."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from jobs.errors import BadInput
from orchestrator.commands.devices import named_device
from orchestrator.commands.inputs import print_json, watched
from orchestrator.words import shortlist


def measure(options: argparse.Namespace) -> int:
    """`mergeyard measure MODEL OUT`."""
    from workers.activations.making import make_statistics

    for option in ("count", "tokens", "block"):
        if getattr(options, option) < 2:
            raise BadInput(f"--{option}: a whole number from 2 on, not {getattr(options, option)}")

    def progress(number: int, texts: int) -> None:
        if watched(options):
            print(f"\r{number} of {texts} texts", end="\n" if number == texts else "", file=sys.stderr, flush=True)

    made = make_statistics(
        options.model,
        options.text,
        options.out,
        kind=options.what,
        count=options.count,
        most=options.tokens,
        block=options.block,
        device=named_device(options.device),
        progress=progress,
    )
    if options.json:
        print_json(dataclasses.asdict(made))
        return 0
    if not options.quiet:
        print(f"{made.file}: {made.tensors} tensors, {made.bytes:,} bytes, {made.digest}")
        print(f"read {made.tokens:,} tokens in {made.texts} texts, in {made.seconds:.1f} s")
    if made.without and made.kind == "grams":
        print(f"{shortlist(made.without)} are not linear layers of torch; regmean takes their weighted mean")
    elif made.without:
        print(f"no inputs were seen of {shortlist(made.without)}; aim leaves them as they are merged")
    if made.unreached:
        print(f"no token has reached {shortlist(made.unreached)}; aim leaves them as they are merged")
    if made.overshadowed:
        names = shortlist(made.overshadowed)
        print(f"one activation is so large that aim hardly changes the other channels of {names}")
    return 0
