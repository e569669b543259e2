"""Run by the oracle's own Python: the merge documents that mergekit-evolve makes of genotypes.

stdin: a JSON list of {genome (as in its YAML), genotypes (flat lists)}. stdout: one line `result ` and a JSON list with
a list of documents for each genome.
"""

import json
import logging
import sys

import yaml
from mergekit.evo.genome import ModelGenome, ModelGenomeDefinition


def documents(case):
    genome = ModelGenome(ModelGenomeDefinition.model_validate(case["genome"]))
    made = [genome.genotype_merge_config(genotype) for genotype in case["genotypes"]]
    first = genome.genotype_merge_config(genome.initial_genotype())
    return [yaml.safe_load(document.to_yaml()) for document in (first, *made)]


def main():
    logging.disable(logging.WARNING)
    print("result " + json.dumps([documents(case) for case in json.load(sys.stdin)]), flush=True)


main()
