"""A chat template in a process of its own, which `chat_template` starts: a template is a program that may never end.

Each line of the input is one JSON object, first the template, then conversations. Each conversation's answer is a line
of the output.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any

from workers.checkpoints.chat_templates import jinja

TODAY = datetime(2024, 7, 26)
"""The day on which every prompt is asked, so that it is the same tomorrow: the fallback of Llama's template."""

MEMORY_BYTES = 1 << 29


class _RefusedError(Exception):
    """The template itself refuses the conversation."""


def _refuse(message: str) -> None:
    raise _RefusedError(message)


def _renderer(template: str, special_tokens: Mapping[str, str]) -> Callable[..., str]:
    """A function that renders `messages` and `add_generation_prompt` as transformers does, except for the date."""
    always = {"tools": None, "documents": None, "raise_exception": _refuse, "strftime_now": TODAY.strftime}
    return partial(jinja().from_string(template).render, **{**always, **special_tokens})


def _answer(work: Callable[[], Any]) -> Any:
    """The result of `work`; the reason why there is none is written to the output."""
    try:
        return work()
    except _RefusedError as error:
        print(json.dumps({"refused": str(error)}), flush=True)
    except Exception as error:  # a template is a program, and fails as one
        print(json.dumps({"failed": str(error) or type(error).__name__}), flush=True)
    return None


def serve() -> None:
    """Renders every conversation of the input, until the input ends."""
    with suppress(ValueError, OSError):  # not every system limits it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    render = _answer(lambda: _renderer(**json.loads(sys.stdin.readline())))
    for line in sys.stdin if render else ():
        text = _answer(lambda line=line: render(**json.loads(line)))
        if text is not None:
            print(json.dumps({"text": text}), flush=True)


if __name__ == "__main__":
    serve()
