"""`mergeyard completion SHELL`."""

from __future__ import annotations

import argparse
from typing import Any


def completion(options: argparse.Namespace) -> int:
    """`mergeyard completion SHELL`: a script on standard output that completes commands, options and files."""
    import shtab

    whole: Any = options.command_line()
    for verb in whole._subparsers._group_actions[0].choices.values():
        for action in verb._actions:
            if action.choices is None and (not action.option_strings or action.metavar == "FILE"):
                action.complete = shtab.FILE
    print(shtab.complete(whole, options.shell))
    return 0
