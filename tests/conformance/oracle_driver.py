"""Run by the oracle's own Python: answers requests to mergekit and PEFT, one after another, in one process.

stdin: a JSON line a request, `[NAME, {argument: value}]`, NAME being a function of REQUESTS. The answer is a JSON line
on stdout, `{"value": …}` or `{"error": the exception's text}`; what the programs print goes to stderr.
"""

import json
import logging
import os
import sys
from importlib import import_module


def merge(config, out, seed, shard_bytes):
    """Merges a document (YAML text) into a folder."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(random_seed=seed, out_shard_size=shard_bytes, quiet=True, device="cpu")
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(config)), out, options=options, config_source=config)


def program(name, arguments):
    """Runs a script of mergekit."""
    import_module(f"mergekit.scripts.{name}").main(arguments, standalone_mode=False)


def merge_adapter(base, adapter, out):
    """Loads an adapter with PEFT, merges it, and saves the state dict in float32."""
    import torch
    from peft import PeftModel
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    state = loaded.merge_and_unload().state_dict()
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, out)


def write_adapted(folder, name):
    """Writes a case of `peft_cases`."""
    import_module("peft_cases").write(folder, name)


def documents_of_genome(genome, genotypes):
    """The merge documents that mergekit-evolve makes of its first genotype and of these."""
    import yaml
    from mergekit.evo.genome import ModelGenome, ModelGenomeDefinition

    genome = ModelGenome(ModelGenomeDefinition.model_validate(genome))
    made = [genome.genotype_merge_config(genotype) for genotype in (genome.initial_genotype(), *genotypes)]
    return [yaml.safe_load(document.to_yaml()) for document in made]


def help_of(name):
    """The help text of a script of mergekit."""
    import click

    command = import_module(f"mergekit.scripts.{name}").main
    return command.get_help(click.Context(command))


def methods():
    """The names of mergekit's merge methods."""
    from mergekit.merge_methods import registry

    return [method.spec.name for method in registry.registered_methods()]


REQUESTS = {
    request.__name__: request
    for request in (merge, program, merge_adapter, write_adapted, documents_of_genome, help_of, methods)
}


def main():
    logging.disable(logging.WARNING)
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            name, arguments = json.loads(line)
            try:
                answer = {"value": REQUESTS[name](**arguments)}
            except Exception as problem:  # the test that asked reports it
                answer = {"error": f"{type(problem).__name__}: {problem}"}
            print(json.dumps(answer), file=answers, flush=True)


main()
