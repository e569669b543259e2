"""Every option and method of the released mergekit is one of mergeyard's, or has its answer."""

from __future__ import annotations

import re

import pytest

from orchestrator.cli import parser
from tests.conformance.oracle import Oracle
from workers.methods import METHODS


@pytest.mark.parametrize(("program", "verb"), [("run_yaml", "merge"), ("extract_lora", "extract-lora"), ("moe", "moe")])
def test_a_command_takes_or_refuses_every_option_of_mergekit_s(oracle: Oracle, program: str, verb: str) -> None:
    shown = re.sub(r"-\n +", "-", oracle.ask("help_of", name=program))  # wrapped
    options = set(re.findall(r"(?<![\w-])--?[a-z](?:[\w-]*\w)?(?!-)", shown))
    assert {"--cuda", "--no-cuda", "--out-shard-size", "-j", "-v"} <= options
    verbs = next(action for action in parser()._actions if action.dest == "command")
    ours = verbs.choices[verb]._option_string_actions
    assert options - ours.keys() == set()


def test_every_method_of_mergekit_is_known_by_name(oracle: Oracle) -> None:
    names = oracle.ask("methods")
    assert names and set(names) <= METHODS.keys()
