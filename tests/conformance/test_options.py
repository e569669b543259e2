"""Every option in the help of the released mergekit is an option of `mergeyard merge`."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from orchestrator.cli import parser
from tests.conformance.oracle import MISSING, ORACLE_PYTHON


@pytest.mark.skipif(not ORACLE_PYTHON.exists(), reason=MISSING)
def test_merge_takes_or_refuses_every_option_of_mergekit_yaml(tmp_path: Path):
    shown = subprocess.run(
        [ORACLE_PYTHON.with_name("mergekit-yaml"), "--help"], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    options = set(re.findall(r"(?<![\w-])--?[a-z](?:[\w-]*\w)?(?!-)", shown))
    assert {"--cuda", "--no-cuda", "--out-shard-size", "-j", "-v"} <= options
    verbs = next(action for action in parser()._actions if action.dest == "command")
    ours = verbs.choices["merge"]._option_string_actions
    assert options - ours.keys() == set()
