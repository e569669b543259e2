"""A chat template around a user's message, rendered as in transformers, except for the date.

A generation prompt that opens a block of thoughts gets it closed: benchmarks give an answer fewer tokens than thoughts
take, and RULER begins the answer itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jobs.errors import BadInput
from jobs.foreign_json import is_text
from workers.benchmarks.texts import rendering

RENDER_SECONDS = 10.0
REMEDY = "ask it plainly, with `chat: false`"
OPEN_THOUGHTS = re.compile(r"<think>\s*\Z")
CLOSING = "\n\n</think>\n\n"

_MESSAGE = "\x00message\x00"
_ANSWER = "\x00answer\x00"


class ChatTemplate:
    """A chat template in a process of its own, which is killed when a conversation takes `RENDER_SECONDS`.

    `place` names the template in errors.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str], place: str) -> None:
        self._place = place
        self._begin = json.dumps({"template": template, "special_tokens": dict(special_tokens)})
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def render(self, messages: Sequence[Mapping[str, str]], *, open_turn: bool = True) -> str:
        """A conversation up to where the model goes on: in a turn of its own, or at the end of the last message.

        `BadInput` for a template that does not render in time.
        """
        if open_turn:
            return _closed(self._rendered(messages, add_generation_prompt=True))
        *earlier, last = messages
        shown = [*earlier, {**last, "content": _MESSAGE}]
        before, _ = self._around(self._rendered(shown, add_generation_prompt=False), "last")
        return before + last["content"]

    def frame(self) -> tuple[str, str]:
        """The text before and after a user's message, with the assistant's turn opened.

        `BadInput` for a template that does not render in time, or does not show the message exactly once as it is.
        """
        text = self._rendered([{"role": "user", "content": _MESSAGE}], add_generation_prompt=True)
        before, after = self._around(text, "user's")
        return before, _closed(after)

    def next_turn(self) -> str:
        """The text between an answer of the assistant and the next message of the user.

        `BadInput` for a template that does not render in time, or does not show a conversation as it is.
        """
        roles = (("user", _MESSAGE), ("assistant", _ANSWER), ("user", _MESSAGE))
        conversation = [{"role": role, "content": content} for role, content in roles]
        text = self._rendered(conversation, add_generation_prompt=True)
        between, found, after = text.partition(_ANSWER)[2].partition(_MESSAGE)
        if not found or _MESSAGE in after or _ANSWER in after:
            shows = "shows a message twice" if found else "does not show a second message"
            raise BadInput(f"{self._place}: the chat template {shows}; leave out cwe, or {REMEDY}")
        return between

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _around(self, text: str, whose: str) -> tuple[str, str]:
        before, *rest = text.split(_MESSAGE)
        if len(rest) != 1:
            shows = f"shows the {whose} message {len(rest)} times" if rest else f"does not show the {whose} message"
            raise BadInput(f"{self._place}: the chat template {shows}; {REMEDY}")
        return before, rest[0]

    def _rendered(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        conversation = {"messages": [*messages], "add_generation_prompt": add_generation_prompt}
        match self._reply(json.dumps(conversation)):
            case {"text": str(text)} if is_text(text):
                return text
            case {"text": _}:
                raise BadInput(f"{self._place}: the chat template writes half of a surrogate pair; {REMEDY}")
            case {"refused": str(told)}:
                raise BadInput(f"{self._place}: the chat template refuses the conversation ({_line(told)}); {REMEDY}")
            case {"failed": str(told)}:
                raise BadInput(f"{self._place}: the chat template fails ({_line(told)}); {REMEDY}")
            case _:
                raise BadInput(
                    f"{self._place}: the chat template does not end within {RENDER_SECONDS:g} seconds; {REMEDY}"
                )

    def _reply(self, line: str) -> dict[str, Any]:
        """The process's answer to a line; an empty one if it had to be killed."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", rendering.__name__],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            line = f"{self._begin}\n{line}"
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(RENDER_SECONDS, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline() or "{}")
        except BrokenPipeError:
            return {}
        finally:
            timer.cancel()


def next_turn(template: str, special_tokens: Mapping[str, str], place: str) -> str:
    """`ChatTemplate.next_turn` of one template."""
    with ChatTemplate(template, special_tokens, place) as chat:
        return chat.next_turn()


def chat_frame(template: str, special_tokens: Mapping[str, str], place: str) -> tuple[str, str]:
    """`ChatTemplate.frame` of one template; a frame is rendered once."""
    return _frame(template, tuple(sorted(special_tokens.items())), place)


@lru_cache(64)
def _frame(template: str, special_tokens: tuple[tuple[str, str], ...], place: str) -> tuple[str, str]:
    with ChatTemplate(template, dict(special_tokens), place) as chat:
        return chat.frame()


def _closed(text: str) -> str:
    return text.rstrip() + CLOSING if OPEN_THOUGHTS.search(text) else text


def _line(text: str) -> str:
    return " ".join(text.split())
