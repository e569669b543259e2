"""Every option and method of the released mergekit is one of mergeyard's, or has its answer."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from orchestrator.cli import parser
from tests.conformance.oracle import MISSING, ORACLE_PYTHON
from workers.methods import METHODS


@pytest.mark.skipif(not ORACLE_PYTHON.exists(), reason=MISSING)
@pytest.mark.parametrize(
    ("program", "verb"),
    [("mergekit-yaml", "merge"), ("mergekit-extract-lora", "extract-lora"), ("mergekit-moe", "moe")],
)
def test_a_command_takes_or_refuses_every_option_of_mergekit_s(tmp_path: Path, program: str, verb: str):
    shown = subprocess.run(
        [ORACLE_PYTHON.with_name(program), "--help"], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    shown = re.sub(r"-\n +", "-", shown)  # wrapped
    options = set(re.findall(r"(?<![\w-])--?[a-z](?:[\w-]*\w)?(?!-)", shown))
    assert {"--cuda", "--no-cuda", "--out-shard-size", "-j", "-v"} <= options
    verbs = next(action for action in parser()._actions if action.dest == "command")
    ours = verbs.choices[verb]._option_string_actions
    assert options - ours.keys() == set()


@pytest.mark.skipif(not ORACLE_PYTHON.exists(), reason=MISSING)
def test_every_method_of_mergekit_is_known_by_name():
    script = "from mergekit.merge_methods import registry; print(*(m.spec.name for m in registry.registered_methods()))"
    names = subprocess.run([ORACLE_PYTHON, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert names and set(names) <= METHODS.keys()
