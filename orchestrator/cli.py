"""`mergeyard`: the command line. Each verb is a file of `orchestrator.commands`; its options are here.

Exit codes: 0 done, 1 failed (or, for `diff` and `verify`, different), 2 bad input, 3 inconclusive, 75 try again.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from types import FrameType
from typing import Any, NoReturn

from jobs import stopping
from jobs.errors import BadInput, Interrupted, MergeyardError, printable
from orchestrator.commands.mergekit_options import OF_EXTRACTION, OF_MOE, add_mergekit_options, add_options_of_evolve


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    stopping.stopped = False
    heeded = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        heeded.append(signal.SIGINT)
    previous = [signal.signal(each, _stop) for each in heeded]
    try:
        check_values(sys.argv[1:] if arguments is None else arguments)
        options = parser().parse_args(arguments)
        name = options.command.replace("-", "_")
        verb = import_module(f"orchestrator.commands.{name}")
        return int(getattr(verb, name)(options))
    except KeyboardInterrupt:
        return _refuse(Interrupted("stopped; run the same command to continue"))
    except MergeyardError as error:
        if os.environ.get("MERGEYARD_TRACEBACK"):
            raise
        return _refuse(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        for each, handler in zip(heeded, previous, strict=True):
            signal.signal(each, handler)


def _refuse(error: MergeyardError) -> int:
    print("mergeyard:", *map(printable, str(error).splitlines()), file=sys.stderr)  # a file's text may be in it
    return error.exit_code


def _stop(signum: int, frame: FrameType | None) -> None:
    stopping.stopped = True  # this thread may be waiting for others
    raise KeyboardInterrupt


def check_values(arguments: Sequence[str]) -> None:
    """Refuses an option with an empty value: an unset variable of a shell, which would count as no option."""
    for option, value in pairwise((*arguments, "-")):
        name, equals, given = option.partition("=")
        if name.startswith("--") and not (given if equals else value):
            raise BadInput(f"{name}: the value is empty; give one, or leave the option out")


class _Parser(argparse.ArgumentParser):
    """Refuses a wrong command line as all other input: in a line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see `{self.prog} --help`")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="mergeyard",
        description="Merge whole grids of LLM checkpoints on Ray, straight out of object storage.",
        epilog="Exit codes: 0 done, 1 failed or different, 2 bad input, 3 inconclusive, 75 try again.",
    )
    top.add_argument("--version", action="version", version=f"mergeyard {_version()}")
    verbs = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    plan = _verb(verbs, "plan", "print the work of a job: bytes, tasks, memory, finished shards; reads headers only")
    _job(plan)
    plan.add_argument("--address", help="the Ray cluster that will run it, as for run or submit")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")

    run = _verb(verbs, "run", "merge, evaluate and keep the points of a job; run again, it continues")
    _job(run)
    _where(run)

    evaluate = _verb(verbs, "evaluate", "score the points of a job, or any checkpoints, without writing them")
    evaluate.add_argument("models", nargs="+", metavar="JOB.yaml|MODEL", help="a job file, or models by URL")
    evaluate.add_argument(
        "--output", metavar="URL", help="folder or bucket of the run; default: that of the job, or runs"
    )
    evaluate.add_argument("--name", help="name of the run, for models; default: made of their names")
    evaluate.add_argument(
        "--lengths",
        type=_numbers,
        default=(4096,),
        metavar="N,N,…",
        help="context lengths of RULER in tokens; default 4096",
    )
    evaluate.add_argument(
        "--items", type=_from(1), default=100, metavar="N", help="items per task and length; default 100"
    )
    evaluate.add_argument("--tasks", type=_words, default=(), metavar="T,T,…", help="tasks of RULER; default: all")
    evaluate.add_argument("--server", metavar="URL", help="ask this OpenAI-compatible server of the MODEL")
    evaluate.add_argument(
        "--served", metavar="NAME", help="name of the MODEL on the server; default: the last part of its URL"
    )
    _where(evaluate)

    merge = _verb(
        verbs, "merge", "merge one mergekit document into one folder, in this process, as mergekit-yaml CONFIG OUT"
    )
    merge.add_argument("config", metavar="CONFIG", help="a mergekit document (YAML)")
    merge.add_argument("out", metavar="OUT", help="folder or URL of the merged checkpoint")
    merge.add_argument(
        "--out-shard-size",
        default=None,
        metavar="SIZE",
        help="size of an output file, such as 5GB, or as mergekit writes it: 5B, 500M; default 1GB",
    )
    merge.add_argument("--random-seed", type=int, default=0, metavar="N", help="seed of the dare methods; default 0")
    merge.add_argument("--memory", default=None, metavar="SIZE", help="memory limit; default 4GB")
    _machine(merge)
    merge.add_argument(
        "--numerics",
        choices=("float32", "mergekit"),
        default="float32",
        help="float32 rounded once (default), or mergekit's arithmetic in the document's dtype",
    )
    merge.add_argument(
        "--config-from", metavar="MODEL", help="take config.json from this model if the parents disagree"
    )
    merge.add_argument(
        "--copy-code",
        "--trust-remote-code",
        action="store_true",
        help="also copy the parents' files of code, such as modeling_*.py; none is run",
    )
    _quiet(merge)
    add_mergekit_options(merge)

    search = _verb(
        verbs, "search", "search the best merge of a genome, as mergekit-evolve GENOME.yml --storage-path OUT"
    )
    search.add_argument("genome", metavar="GENOME.yml", help="a genome of mergekit-evolve, with its tasks")
    search.add_argument("out", metavar="OUT", help="folder or bucket of the run")
    search.add_argument(
        "--job", dest="print_job", action="store_true", help="print the job that the genome is, and run nothing"
    )
    search.add_argument(
        "--max-fevals", type=_from(1), default=100, metavar="N", help="points that are asked; default 100"
    )
    search.add_argument(
        "--force-population-size", type=_from(1), metavar="N", help="points that are proposed together; default 8"
    )
    search.add_argument("--random-seed", type=int, default=0, metavar="N", help="seed of the job; default 0")
    search.add_argument("--vllm", action="store_true", help="answer with vLLM, at any length of context")
    search.add_argument(
        "--num-gpus", type=_from(0), metavar="N", help="workers, each with a GPU; default: as many as there are"
    )
    search.add_argument("--no-save-final-model", action="store_true", help="search without writing the best merge")
    _where(search)
    add_options_of_evolve(search)

    extract = _verb(
        verbs, "extract-lora", "make a LoRA adapter of the change of a fine-tuned model, as mergekit-extract-lora"
    )
    extract.add_argument("given", nargs="*", metavar="MODEL BASE OUT", help="in place of the next three options")
    extract.add_argument("--model", metavar="MODEL", help="the fine-tuned model: a path, a URL or org/name")
    extract.add_argument("--base-model", metavar="BASE", help="the model that it was tuned from")
    extract.add_argument("--out-path", metavar="OUT", help="folder or URL of the adapter")
    extract.add_argument(
        *("--max-rank", "--rank"), type=int, default=128, metavar="N", help="largest rank of a tensor; default 128"
    )
    extract.add_argument(
        "--distribute-scale",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="give both factors the root of each singular value (default); --no-…: all of it to A",
    )
    extract.add_argument(
        "--embed-lora",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="low rank for embeddings and head too; else they are stored whole if they changed",
    )
    extract.add_argument(
        "--save-module", action="append", default=[], metavar="NAME", help="store this module whole; may be repeated"
    )
    for short, name, what in (("-e", "exclude", "leave out"), ("-i", "include", "take only")):
        extract.add_argument(
            *(short, f"--{name}-regex"),
            action="append",
            default=[],
            metavar="REGEX",
            help=f"{what} modules whose name matches",
        )
    extract.add_argument(
        "--sv-epsilon", type=float, default=0.0, metavar="X", help="drop singular values of at most X; default 0"
    )
    extract.add_argument(
        "--skip-undecomposable", action="store_true", help="leave norms and biases out in place of storing them whole"
    )
    extract.add_argument("--json", action="store_true", help="print every tensor with its rank and error as JSON")
    _machine(extract)
    _quiet(extract)
    add_mergekit_options(extract, OF_EXTRACTION)

    moe = _verb(verbs, "moe", "make a mixture of experts from dense models, as mergekit-moe CONFIG OUT")
    moe.add_argument("config", metavar="CONFIG", help="a document of mergekit-moe (YAML)")
    moe.add_argument("out", metavar="OUT", help="folder or URL of the mixture")
    moe.add_argument(
        "--i-understand-this-is-not-useful-without-training",
        action="store_true",
        help="allow experts that are all one model",
    )
    moe.add_argument(
        "--out-shard-size", default="1GB", metavar="SIZE", help="size of an output file, such as 5GB; default 1GB"
    )
    moe.add_argument("--random-seed", type=int, default=0, metavar="N", help="seed of random gates; default 0")
    moe.add_argument(
        "--transformers-cache", metavar="FOLDER", help="cache of models from the hub, in place of HF_HUB_CACHE"
    )
    moe.add_argument("--json", action="store_true", help="print the result as JSON")
    _quiet(moe)
    add_mergekit_options(moe, OF_MOE)

    report = _verb(verbs, "report", "print the leaderboard of a run and write its page")
    report.add_argument("run", metavar="RUN", help="job file, or folder or URL of the run")
    report.add_argument("--csv", metavar="FILE", help="write every score to FILE, one row per item; `-` prints it")
    report.add_argument("--mlflow", metavar="URI", help="also log the run to an MLflow tracking server or folder")
    report.add_argument("--json", action="store_true", help="print the leaderboard as JSON")

    view = _verb(verbs, "view", "open a page with every answer of a run in a browser, or export it as static files")
    view.add_argument("run", metavar="RUN", help="job file, or folder or URL of the run")
    view.add_argument(
        "--export",
        nargs="?",
        const="",
        metavar="URL",
        help="write the page to this folder or bucket; without URL: to report/view in the run, which links to it",
    )
    view.add_argument("--at", metavar="ADDRESS", help="open the page at this part of its address, such as 'point=a'")
    view.add_argument(
        "--port", type=_from(0), default=8642, metavar="N", help="port on 127.0.0.1; default 8642; 0: a free one"
    )
    view.add_argument("--no-browser", action="store_true", help="print the address, and open no browser")
    view.add_argument("--json", action="store_true", help="print the address or the export as JSON")

    compare = _verb(
        verbs, "compare", "print paired differences of two models by task and length, and the items that flipped"
    )
    compare.add_argument(
        "a",
        metavar="A",
        help="RUN/POINT, RUN for its best point, RUN/PARENT (or RUN/parents/PARENT), or a checkpoint",
    )
    compare.add_argument("b", metavar="B", help="the other model; differences are B − A")
    compare.add_argument("--flips", type=_from(0), default=10, metavar="N", help="items to show; default 10")
    compare.add_argument("--json", action="store_true", help="print it as JSON")

    gate = _verb(
        verbs, "gate", "test whether a point is not worse than the baseline; asks more items while the verdict is open"
    )
    _job(gate)
    gate.add_argument("--point", help="the point to judge; default: the best of the run")
    gate.add_argument("--junit", metavar="FILE", help="also write the verdict as JUnit XML")
    _where(gate)

    nightly = _verb(
        verbs, "nightly", "merge the newest parents, compare with the blessed merge, and bless a merge that passes"
    )
    _job(nightly)
    either = nightly.add_mutually_exclusive_group()
    either.add_argument("--junit", metavar="FILE", help="also write the verdict as JUnit XML")
    either.add_argument("--bless", metavar="NIGHT", help="only go back to the point of this night, which passed")
    _where(nightly)

    publish = _verb(verbs, "publish", "verify a finished point and upload it with its card and results")
    publish.add_argument("point", metavar="RUN/POINT", help="folder or URL of the point")
    publish.add_argument("to", metavar="DESTINATION", help="hf://ORG/NAME, or the URL of a folder in a bucket")
    publish.add_argument(
        "--public", action="store_true", help="make the repository on the hub public; default: private"
    )
    publish.add_argument("--license", metavar="NAME", help="licence, if the licences of the parents do not settle it")
    publish.add_argument("--json", action="store_true", help="print the result as JSON")
    _quiet(publish)

    prune = _verb(verbs, "prune", "list the points of a run; --yes removes those that lost")
    prune.add_argument("run", metavar="RUN", help="job file, or folder or URL of the run")
    prune.add_argument("--keep", type=_from(0), default=3, metavar="N", help="best points to keep; default 3")
    prune.add_argument("--yes", action="store_true", help="remove the listed points")
    prune.add_argument("--json", action="store_true", help="print it as JSON")

    submit = _verb(verbs, "submit", "send a job to a Ray cluster and follow it; the same job never starts twice")
    _job(submit)
    submit.add_argument("--address", required=True, help="the cluster's dashboard, such as http://127.0.0.1:8265")
    submit.add_argument("--no-wait", action="store_true", help="return after the submission")
    submit.add_argument("--cancel", action="store_true", help="stop the job")
    submit.add_argument("--json", action="store_true", help="print the result as JSON")
    _quiet(submit)

    status = _verb(verbs, "status", "print the progress of a run, from its folder or bucket alone")
    status.add_argument("run", metavar="RUN", help="job file, or folder or URL of a run, or of a folder of runs")
    status.add_argument("--follow", action="store_true", help="print a line when the stage moves, until the run ends")
    status.add_argument("--json", action="store_true", help="print it as JSON")

    verify = _verb(verbs, "verify", "hash every file of a run or a point and compare it with its digest")
    verify.add_argument("run", metavar="RUN", help="folder or URL of a run, of one of its points, or of a merge")
    verify.add_argument("--json", action="store_true", help="print it as JSON")

    check = _verb(verbs, "check", "print the settings of a store, and try every kind of request that a run sends")
    check.add_argument("url", metavar="URL", help="folder or bucket, such as the `output:` of a job")
    check.add_argument("--json", action="store_true", help="print it as JSON")

    _verb(verbs, "schema", "print the JSON Schema of a job file, for editors")

    completion = _verb(verbs, "completion", "print a script with which a shell completes commands, options and files")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell that reads the script")
    completion.set_defaults(command_line=parser)

    measure = _verb(verbs, "measure", "read texts with a model, and write statistics for `grams:`, `fisher:` or `aim:`")
    measure.add_argument("model", metavar="MODEL", help="folder or URL of a checkpoint: a parent, or the base for aim")
    measure.add_argument("out", metavar="OUT", help="path or URL of the file, which ends in .safetensors")
    measure.add_argument(
        "--text",
        metavar="FILE",
        help="a text file, or JSONL with a `text` or the `messages` of a chat a line; default: bundled prose",
    )
    measure.add_argument(
        "--what",
        choices=("grams", "means", "deltas", "fisher"),
        default="grams",
        help="grams (default): products of the inputs of linear layers, for regmean; means: mean |x|, for aim; deltas:"
        " products of the differences from --base, for regmean without texts; fisher: squares of gradients, for fisher",
    )
    measure.add_argument("--base", metavar="BASE", help="for --what deltas: the checkpoint that MODEL was trained from")
    measure.add_argument("--count", type=_from(1), default=256, metavar="N", help="most texts to read; default 256")
    measure.add_argument("--tokens", type=_from(2), default=512, metavar="N", help="most tokens of a text; default 512")
    measure.add_argument(
        "--block",
        type=_from(2),
        default=1024,
        metavar="N",
        help="most channels of a block, for inputs wider than the hidden states; default 1024",
    )
    measure.add_argument(
        "--device", default="auto", help="device that reads: cpu, cuda, cuda:1 …; auto (default): a GPU if there is one"
    )
    measure.add_argument("--json", action="store_true", help="print the result as JSON")
    _quiet(measure)

    diff = _verb(verbs, "diff", "compare two checkpoints, tensor by tensor")
    diff.add_argument("a", metavar="A", help="folder or URL of a checkpoint")
    diff.add_argument("b", metavar="B", help="folder or URL of another")
    diff.add_argument("--json", action="store_true", help="print it as JSON")
    return top


def _verb(verbs: Any, name: str, text: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")


def _job(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("job", metavar="JOB.yaml", help="the job file; `-` reads it from standard input")
    verb.add_argument("--output", metavar="URL", help="use this in place of the job's `output:`")


def _machine(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        *("-j", "--threads", "--num-threads"),
        type=_from(1),
        default=None,
        metavar="N",
        help="threads; default: one per processor",
    )
    verb.add_argument(
        "--device",
        default="cpu",
        help="device that computes: cpu (default), cuda, cuda:1 …; auto: a GPU if there is one",
    )
    verb.add_argument(
        *("--cuda", "--gpu-rich"), dest="device", action="store_const", const="cuda", help="the same as --device cuda"
    )
    verb.add_argument(
        "--transformers-cache", metavar="FOLDER", help="cache of models from the hub, in place of HF_HUB_CACHE"
    )


def _where(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--address", help="a running Ray cluster, as for ray.init; default: start one here")
    verb.add_argument("--in-process", action="store_true", help="without Ray: one worker, in this process")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    _quiet(verb)


def _from(least: int) -> Callable[[str], int]:
    """Reads a whole number that is not below `least`."""

    def number(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"give a whole number from {least} on, not {text!r}")
        return int(text)

    return number


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"give whole numbers such as 4096,8192, not {text!r}") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _quiet(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-q", "--quiet", action="store_true", help="no progress; of a merge, no closing lines")


def _version() -> str:
    return version("mergeyard")


if __name__ == "__main__":
    sys.exit(main())
