"""Run by the oracle's own Python: merges every case it is given with mergekit, in one process.

stdin: a JSON list of {name, config (YAML text), out (folder), seed, shard_bytes}. stdout: one JSON line a case,
{name, error: null or the exception's text}, the last lines of the process.
"""

import json
import logging
import sys

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def merge(case):
    options = MergeOptions(random_seed=case["seed"], out_shard_size=case["shard_bytes"], quiet=True, device="cpu")
    configuration = MergeConfiguration.model_validate(yaml.safe_load(case["config"]))
    run_merge(configuration, case["out"], options=options, config_source=case["config"])


def main():
    logging.disable(logging.WARNING)
    for case in json.load(sys.stdin):
        error = None
        try:
            merge(case)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        print("result " + json.dumps({"name": case["name"], "error": error}), flush=True)


main()
