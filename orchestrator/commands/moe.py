"""`mergeyard moe CONFIG OUT`."""

from __future__ import annotations

import argparse
import os
import sys

from jobs.errors import printable
from jobs.mixtures import load_mixture
from orchestrator.commands.inputs import print_json, read_text, size_option, watched
from orchestrator.commands.mergekit_options import OF_MOE, print_reasons, shard_size
from orchestrator.words import size


def moe(options: argparse.Namespace) -> int:
    """`mergeyard moe CONFIG OUT`: a mixture of experts from dense models."""
    from orchestrator.making.mixture import Mixer
    from orchestrator.planning.locating import open_model
    from orchestrator.watching import Watcher

    if options.transformers_cache:
        os.environ["HF_HUB_CACHE"] = options.transformers_cache
    if not options.quiet:
        print_reasons(options.changes_nothing, OF_MOE)
    text = read_text(options.config)
    mixture = load_mixture(text, options.config, all_same=options.i_understand_this_is_not_useful_without_training)
    if not options.quiet:
        for remark in mixture.ignored:
            print(printable(remark), file=sys.stderr)
    asked = options.out_shard_size
    shard_bytes = shard_size(asked) or size_option("--out-shard-size", asked)
    models = {name: open_model(name, f"model{n}", mixture.place) for n, name in enumerate(mixture.models())}
    mixer = Mixer(mixture, models, options.out, seed=options.random_seed, shard_bytes=shard_bytes)
    if mixer.output.is_whole():
        print(printable(f"{mixer.output.store.url}: this very mixture is there already"))
        return 0
    with Watcher(visible=watched(options), tells=not options.quiet) as watcher:
        made = mixer.run(lambda total: watcher.begin_writing(total, "writing"), watcher.advance)
    if options.json:
        print_json({"url": made.url, "architecture": made.architecture, "experts": made.experts, "bytes": made.bytes})
    elif not options.quiet:
        print(printable(f"{made.url}: {made.architecture} of {made.experts} experts, {size(made.bytes)}"))
    return 0
