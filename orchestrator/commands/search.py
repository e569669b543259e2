"""`mergeyard search GENOME.yml OUT`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jobs.genome import Genome, job_name, load_genome
from jobs.job import read_job
from jobs.yaml_nodes import node_of, yaml_text
from orchestrator.commands.devices import best_device
from orchestrator.commands.inputs import read_text
from orchestrator.commands.mergekit_options import OF_SEARCH, print_reasons
from orchestrator.commands.run import run_job


def search(options: argparse.Namespace) -> int:
    """`mergeyard search GENOME.yml OUT`: runs the search that a genome of mergekit-evolve asks for."""
    if not options.quiet:
        print_reasons(options.changes_nothing, OF_SEARCH)
    genome = load_genome(read_text(options.genome), options.genome)
    document = _document(genome, options)
    job = read_job(node_of(document, options.genome))
    if options.print_job:
        print(yaml_text(document), end="")
        return 0
    return run_job(job, Path.cwd(), options)


def _document(genome: Genome, options: argparse.Namespace) -> dict[str, Any]:
    """The job as plain data, with the settings of the command line."""
    from orchestrator.planning.locating import layers_of, locate

    layers = layers_of(genome.models[0], genome.place) if genome.layer_granularity else 1
    urls = {
        reference: "+".join(part for part in locate(reference, Path.cwd(), genome.place, bare_names=True) if part)
        for reference in genome.references()
    }
    document: dict[str, Any] = {"name": job_name(options.genome), **genome.document(urls, layers)}
    document["search"]["budget"] = {"points": options.max_fevals}
    if options.force_population_size is not None:
        document["search"]["batch"] = options.force_population_size
    if options.no_save_final_model:
        document["keep"] = "none"
    if options.vllm:
        document["engine"] = "vllm"
    if options.num_gpus or (options.num_gpus is None and best_device() != "cpu"):
        document["workers"] = {"gpus": 1} | ({"count": options.num_gpus} if options.num_gpus else {})
    if options.random_seed:
        document["seed"] = options.random_seed
    return document | {"output": options.out}
