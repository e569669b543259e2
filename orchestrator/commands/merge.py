"""`mergeyard merge CONFIG OUT`."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from jobs.errors import writing
from jobs.job import WorkerSpec, load_merge_document
from orchestrator.commands.devices import named_device
from orchestrator.commands.inputs import read_text, size_option, watched
from orchestrator.commands.mergekit_options import print_reasons, shard_size


def merge(options: argparse.Namespace) -> int:
    """`mergeyard merge CONFIG OUT`."""
    from orchestrator.cluster.in_process import InProcessPool
    from orchestrator.merging.driver import drive
    from orchestrator.planning.plan import make_plan
    from orchestrator.records.ledger import Ledger
    from orchestrator.report.terminal.run import print_merge
    from orchestrator.watching import Watcher

    if options.transformers_cache:
        os.environ["HF_HUB_CACHE"] = options.transformers_cache
    device = named_device(options.device)
    if not options.quiet:
        print_reasons(options.changes_nothing)
    text = read_text(options.config)
    job = load_merge_document(text, options.config, options.out)
    threads = options.threads or os.cpu_count() or 1
    shard_bytes = job.shard_bytes
    if size := options.out_shard_size:
        shard_bytes = shard_size(size) or size_option("--out-shard-size", size)
    memory = size_option("--memory", options.memory) if options.memory else WorkerSpec().memory_bytes
    job = replace(
        job,
        seed=options.random_seed,
        numerics=options.numerics,
        config_from=options.config_from,
        copy_code=options.copy_code,
        shard_bytes=shard_bytes,
        workers=WorkerSpec(cpus=float(threads), memory_bytes=memory),
    )
    plan = make_plan(job, relative_to=Path.cwd(), flat=True)
    plan.check_room()
    with Watcher(visible=watched(options), tells=not options.quiet) as watcher:
        result = drive(plan, InProcessPool(device=device), watcher)
    with writing():
        Ledger(plan.run_url, plan.places).forget()
    if not options.quiet:
        print_merge(result)
    result.check_finite()
    return 0
