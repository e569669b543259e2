"""`mergeyard measure MODEL OUT`."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from jobs.errors import BadInput
from orchestrator.commands.devices import named_device
from orchestrator.commands.inputs import print_json, watched
from orchestrator.words import counted, shortlist


def measure(options: argparse.Namespace) -> int:
    """`mergeyard measure MODEL OUT`."""
    from workers.activations.making import make_delta_grams, make_statistics

    if (options.what == "deltas") != (options.base is not None):
        raise BadInput("--what deltas and --base BASE go together: give both, or neither")

    def progress(number: int, texts: int) -> None:
        if watched(options):
            print(f"\r{number} of {texts} texts", end="\n" if number == texts else "", file=sys.stderr, flush=True)

    if options.what == "deltas":
        made = make_delta_grams(options.model, options.base, options.out, block=options.block)
    else:
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
        read = f"{made.tokens:,} tokens in {counted(made.texts, 'text')}" if made.texts else "both checkpoints"
        print(f"read {read}, in {made.seconds:.1f} s")
    if made.without and made.kind == "deltas":
        print(f"there are no differences of {shortlist(made.without)}; regmean takes their weighted mean")
    elif made.without and made.kind == "grams":
        print(f"{shortlist(made.without)} are not linear layers of torch; regmean takes their weighted mean")
    elif made.without and made.kind == "fisher":
        print(f"{shortlist(made.without)} have no gradients; fisher takes their weighted mean")
    elif made.without:
        print(f"no inputs were seen of {shortlist(made.without)}; aim leaves them as they are merged")
    if made.unreached and made.kind == "fisher":
        print(f"all gradients of {shortlist(made.unreached)} are zero; the other models decide there")
    elif made.unreached:
        print(f"no token has reached {shortlist(made.unreached)}; aim leaves them as they are merged")
    if made.overshadowed:
        names = shortlist(made.overshadowed)
        print(f"one activation is so large that aim hardly changes the other channels of {names}")
    return 0
