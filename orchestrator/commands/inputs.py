"""Inputs and outputs that several verbs share."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from jobs.errors import BadInput
from jobs.job import Job, load_job
from jobs.yaml_nodes import load_document


def read_job(options: argparse.Namespace) -> tuple[Job, Path]:
    """The job, and the folder that its relative parents count from: the job file's."""
    job = load_job(read_text(options.job), options.job, options.output or None)
    return job, Path.cwd() if options.job == "-" else Path(options.job).resolve().parent


def read_text(path: str) -> str:
    if path == "-":
        return sys.stdin.read()
    if not path or "\0" in path:
        raise BadInput(f"{path!r}: not a path; name a YAML file")
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: a folder, not a YAML file") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None


def size_option(option: str, text: str) -> int:
    try:
        return load_document(text, option).size_bytes()
    except BadInput:
        raise BadInput(f"{option}: a size such as 500MB or 2GiB, not {text!r}") from None


def run_url(run: str) -> str:
    """A run's URL: given as such, or through its job file."""
    from workers.storage import open_store

    if run.endswith((".yaml", ".yml")) and "://" not in run and Path(run).is_file():
        job = load_job(read_text(run), run)
        return f"{open_store(job.output).url}/{job.name}"
    return open_store(run).url


def watched(options: argparse.Namespace) -> bool:
    return not options.quiet and sys.stderr.isatty()


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def check_file(option: str, path: str | None) -> None:
    """Refuses a file that cannot be written, before the work whose result goes there."""
    if path is None:
        return
    file = Path(path)
    if not file.parent.is_dir():
        raise BadInput(f"{option} {path}: there is no folder {file.parent}")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise BadInput(f"{option} {path}: cannot be written; name a file in a folder of yours")
