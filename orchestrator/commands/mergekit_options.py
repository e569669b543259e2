"""The options of mergekit's programs (mergekit 0.1.5, `options.py`) that a command has no use for, with the reasons.

The others are options of `merge` itself: --cuda, --device, --gpu-rich, --num-threads, --out-shard-size, --quiet,
--random-seed, --transformers-cache, --trust-remote-code.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.errors import BadInput

CHANGES_NOTHING = {
    "--allow-crimes": "parents must fit together tensor by tensor, whatever their architecture is called",
    "--async-write": "shards are always written while others are merged",
    "--clone-tensors": "every tensor is written by itself",
    "--copy-tokenizer": "the output always has a tokenizer if a parent has one",
    "--lazy-unpickle": "tensors are always read piece by piece",
    "--lora-merge-cache": "adapters are applied while they are read",
    "--lora-merge-dtype": "adapters are applied in float64 and rounded once, to the dtype of their base",
    "--low-cpu-memory": "the memory of a merge is bounded by --memory",
    "--multi-gpu": "`merge` uses one GPU; `run` uses all",
    "--no-allow-crimes": "",
    "--no-async-write": "",
    "--no-clone-tensors": "",
    "--no-cuda": "",
    "--no-lazy-unpickle": "",
    "--no-low-cpu-memory": "",
    "--no-multi-gpu": "",
    "--no-quiet": "",
    "--no-read-to-gpu": "",
    "--no-trust-remote-code": "",
    "--no-unsafe-truncate-embeddings": "",
    "--read-to-gpu": "tensors always go straight to the device that computes",
    "--safe-serialization": "the output is always safetensors",
    "--unsafe-truncate-embeddings": "no row of a token is dropped; parents that differ in padding merge without it",
    "--write-model-card": "the output always has a model card",
    "--write-threads": "--threads also sets the number of writing threads",
    "-v": "errors have one line; MERGEYARD_TRACEBACK=1 prints the whole traceback",
}
"""Accepted; those that switch off what is off have no reason to give."""

REFUSED = {
    "--no-copy-tokenizer": "a merge keeps its tokenizer; leave the option out, and remove the files afterwards",
    "--no-safe-serialization": "the output is always safetensors; leave the option out",
    "--no-write-model-card": "a merge keeps its card; leave the option out, and remove README.md afterwards",
}

OF_EXTRACTION = {
    "--allow-crimes": "model and base must fit together tensor by tensor, whatever their architecture is called",
    "--copy-tokenizer": "an adapter has no tokenizer; its base has",
    "--multi-gpu": "`extract-lora` uses one GPU",
    "--no-copy-tokenizer": "",
    "--out-shard-size": "an adapter is one file",
    "--random-seed": "nothing is drawn at random",
    "--trust-remote-code": "no code of a model is run",
    "--unsafe-truncate-embeddings": "embeddings of another size are stored whole",
}
"""`extract-lora` takes these in place of the options above of the same name."""

OF_MOE = {
    **dict.fromkeys(("--cuda", "--device", "--gpu-rich"), "`moe` computes on the CPU"),
    **dict.fromkeys(("-j", "--num-threads"), "`moe` writes up to four files at once"),
    **dict.fromkeys(("--load-in-4bit", "--load-in-8bit"), "the base answers prompts in bfloat16"),
    "--multi-gpu": "`moe` computes on the CPU",
    "--trust-remote-code": "no code of a model is run",
}
"""`moe` takes these in place of the options above of the same name."""

OF_SEARCH = {
    "--allow-crimes": CHANGES_NOTHING["--allow-crimes"],
    "--in-memory": "points are always merged in the memory of the workers that ask them",
    "--i-understand-the-depths-of-the-evils-i-am-unleashing": "no task is refused; judge the best merge by others",
    "--merge-cuda": "points are merged on the device that asks them",
    "--no-allow-crimes": "",
    "--no-in-memory": "points are always merged in the memory of the workers that ask them",
    "--no-merge-cuda": "points are merged on the device that asks them",
    "--no-reshard": "",
    "--no-trust-remote-code": "",
    "--no-vllm": "",
    "--no-wandb": "",
    "--reshard": "tensors are read from the models as they are",
    "--save-final-model": "",
    **dict.fromkeys(("-s", "--strategy"), "every worker gets the next block of items as soon as it is free"),
    "--sigma0": "the next points follow from all scores, on axes with steps",
    "--trust-remote-code": "no code of a model is run",
    **dict.fromkeys(("--wandb", "--wandb-project", "--wandb-entity"), "the run has a page, with every point and score"),
}
"""`search` takes these options of mergekit-evolve, in place of all above."""

SEARCH_REFUSED = {
    "--batch-size": "print the job with --job, and give `engine: {options: {batch: N}}`",
    **dict.fromkeys(
        ("--load-in-4bit", "--load-in-8bit"),
        "a merge answers with the weights that are written, not with coarser ones; leave the option out",
    ),
    "--storage-path": "give the folder or URL as OUT, after the genome",
    "--task-search-path": "name the task by the path of its YAML file under `tasks:`",
    "--timeout": "print the job with --job, and give `budget: {hours: N}` of one worker",
}

WITH_VALUE = {
    *("--device", "-j", "--num-threads", "--out-shard-size", "--random-seed"),
    *("--lora-merge-cache", "--lora-merge-dtype", "--write-threads"),
    *("-s", "--strategy", "--sigma0", "--wandb-project", "--wandb-entity", "--batch-size", "--storage-path"),
    *("--task-search-path", "--timeout"),
}
SIZE_IN_MERGEKIT = re.compile(r"(\d+)([kKmMbB])", re.ASCII)
THOUSANDS = {"k": 10**3, "m": 10**6, "b": 10**9}


class _Taken(argparse.Action):
    """Notes a reason to print, or refuses the option."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        option = option_string or ""
        if self.const:
            raise BadInput(f"{option}: {self.const}")
        namespace.changes_nothing = [*getattr(namespace, self.dest), option]


def add_mergekit_options(verb: argparse.ArgumentParser, own: Mapping[str, str] = {}) -> None:
    """Adds the options above, those of `own` with other reasons; `changes_nothing` lists those that were given."""
    _add(verb, {**CHANGES_NOTHING, **own}, REFUSED)


def add_options_of_evolve(verb: argparse.ArgumentParser) -> None:
    """The same for the options of mergekit-evolve."""
    _add(verb, OF_SEARCH, SEARCH_REFUSED)


def _add(verb: argparse.ArgumentParser, reasons: Mapping[str, str], refused: Mapping[str, str]) -> None:
    group = verb.add_argument_group("options of mergekit that change nothing here")
    for option in dict.fromkeys((*reasons, *refused)):
        group.add_argument(
            option,
            action=_Taken,
            nargs=None if option in WITH_VALUE else 0,
            metavar="X" if option in WITH_VALUE else None,
            const=refused[option] if option not in reasons else None,
            dest="changes_nothing",
            default=[],
            help=reasons.get(option) or argparse.SUPPRESS,
        )


def print_reasons(options: Sequence[str], own: Mapping[str, str] = {}) -> None:
    """One line on stderr for each of these options that does something in mergekit and nothing here."""
    for option in options:
        if reason := {**CHANGES_NOTHING, **own}[option]:
            print(f"{option} changes nothing: {reason}", file=sys.stderr)


def shard_size(text: str) -> int | None:
    """The bytes of a size as mergekit writes it, None for other forms: 5B is 5·10⁹, 500M is 500·10⁶.

    mergekit's help calls them parameters; its writer compares them with bytes (`tensor_writer.py`).
    """
    match = SIZE_IN_MERGEKIT.fullmatch(text)
    return int(match[1]) * THOUSANDS[match[2].lower()] if match else None
