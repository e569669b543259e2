"""Completion, as the shells do it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.cli import parser
from tests.orchestrator.conftest import Ended

PRESSED = """
. ./mergeyard.bash
while read -r -a COMP_WORDS; do
    [ "${COMP_WORDS[-1]}" != "''" ] || COMP_WORDS[-1]=""
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    _shtab_mergeyard mergeyard "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
    echo "${COMPREPLY[*]}"
done
"""


def test_bash_completes_commands_options_choices_and_files(mergeyard: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "mergeyard.bash").write_text(mergeyard("completion", "bash").out)
    (tmp_path / "grid.yaml").touch()
    expected = {
        "mergeyard pu": "publish",
        "mergeyard ver": "verify",
        "mergeyard run --in": "--in-process",
        "mergeyard run gr": "grid.yaml",
        "mergeyard merge --numerics ''": "float32 mergekit",
        "mergeyard gate job.yaml --junit gr": "grid.yaml",
        "mergeyard completion ''": "bash zsh fish",
    }
    typed = "".join(f"{line}\n" for line in expected)
    shell = subprocess.run(["bash", "-c", PRESSED], cwd=tmp_path, input=typed, capture_output=True, text=True)
    assert (shell.stdout.splitlines(), shell.stderr) == ([*expected.values()], "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_every_command(mergeyard: Callable[..., Ended], shell: str) -> None:
    script = mergeyard("completion", shell).out
    begun = {"zsh": "#compdef mergeyard\n", "fish": "complete -c mergeyard "}[shell]
    verbs = next(iter(parser()._subparsers._group_actions)).choices  # type: ignore[union-attr]
    assert begun in script and [verb for verb in verbs if verb not in script] == []


def test_a_shell_without_completion_is_refused(mergeyard: Callable[..., Ended]) -> None:
    ended = mergeyard("completion", "cmd")
    assert ended.code == 2 and "invalid choice: 'cmd' (choose from" in ended.err
