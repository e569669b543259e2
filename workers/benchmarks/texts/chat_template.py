"""A chat template around a user's message, rendered as in transformers, except for the date.

Where nothing is to be thought, a generation prompt that opens a thought gets it closed: benchmarks give an answer fewer
tokens than a thought takes, and RULER begins the answer itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal

from jobs.errors import BadInput
from jobs.foreign_json import is_text
from jobs.specs import Scalar
from jobs.yaml_nodes import nearest, quoted
from workers.benchmarks.texts import rendering

RENDER_SECONDS = 10.0
REMEDY = "ask it plainly, with `chat: false`"
_EMPTY = {
    "</think>": ("<think>", "\n\n</think>\n\n"),
    "[/THINK]": ("[THINK]", "\n\n[/THINK]\n\n"),
    "</seed:think>": ("<seed:think>", "\n\n</seed:think>\n\n"),
    "<channel|>": ("<|channel>thought", "\n<channel|>"),
    "<|channel|>final<|message|>": (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
}
"""The text that ends a thought, the one that begins it, and what follows that one in an empty thought.

They are those of Qwen and DeepSeek, Mistral, Seed, Gemma 4 and gpt-oss.
"""

THOUGHT_ENDS = tuple(_EMPTY)

SWITCHES = ("enable_thinking", "thinking")
"""The arguments by which chat templates let a model think: Qwen's, then DeepSeek's and Granite's."""

Arguments = tuple[tuple[str, Scalar], ...]

Thoughts = Literal["closed", "empty", "open"]
"""The thought in front of an answer.

`closed` where the template opens it. `empty`: also written, without text, where the template only mentions one and its
arguments do not turn it off. `open`: the model writes it.
"""

_MESSAGE = "\x00message\x00"
_ANSWER = "\x00answer\x00"


class ChatTemplate:
    """A chat template in a process of its own, which is killed when a conversation takes `RENDER_SECONDS`.

    `place` names the template in errors. `system` is a message in front of all conversations that have none, if it has
    a text; `arguments` go to the template. `remedy` ends the errors.
    """

    def __init__(
        self,
        template: str,
        special_tokens: Mapping[str, str],
        place: str,
        *,
        system: str = "",
        arguments: Arguments = (),
        thoughts: Thoughts = "closed",
        remedy: str = REMEDY,
    ) -> None:
        self._place, self._remedy = place, remedy
        self._system = system
        self._arguments = arguments
        self._thoughts = thoughts
        self._end = thought_end(template)
        self._switches = switches(template)
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
            return self._finished(self._rendered(messages, add_generation_prompt=True))
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
        return before, self._finished(after)

    def turns(self) -> tuple[str, str]:
        """The text between a message of the user and the assistant's answer, and the text from there to the next one.

        `BadInput` for a template that does not render in time, or does not show a conversation as it is.
        """
        roles = (("user", _MESSAGE), ("assistant", _ANSWER), ("user", _MESSAGE))
        conversation = [{"role": role, "content": content} for role, content in roles]
        text = self._rendered(conversation, add_generation_prompt=True)
        asked, _, answered = text.partition(_ANSWER)
        between, found, after = answered.partition(_MESSAGE)
        if not found or _MESSAGE in after or _ANSWER in after:
            shows = "shows a message twice" if found else "does not show a second message"
            raise BadInput(f"{self._place}: the chat template {shows}; leave out cwe, or {self._remedy}")
        return asked.partition(_MESSAGE)[2], between

    def _finished(self, text: str) -> str:
        """The generation prompt, with the thought that it is to have."""
        if self._thoughts == "open" or not self._end:
            return text
        shown = text.rstrip()
        if shown.endswith(opening(self._end)):
            return f"{shown}{_EMPTY[self._end][1]}"
        if self._thoughts == "empty" and not shown.endswith(self._end) and not self._switched_off:
            return f"{text}{''.join(_EMPTY[self._end])}"
        return text

    @cached_property
    def _switched_off(self) -> bool:
        """Whether the template asks for a thought in a text of its own, which its arguments leave out here."""
        probe = [{"role": "user", "content": _MESSAGE}]
        thinking = dict.fromkeys(self._switches, True)
        return self._rendered(probe, add_generation_prompt=True) != self._rendered(
            probe, add_generation_prompt=True, **thinking
        )

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
            raise BadInput(f"{self._place}: the chat template {shows}; {self._remedy}")
        return before, rest[0]

    def _rendered(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool, **arguments: Scalar
    ) -> str:
        system = [{"role": "system", "content": self._system}] if self._system else []
        if system and messages[0]["role"] == "system":
            system = []
        conversation = {
            **dict(self._arguments),
            **arguments,
            "messages": [*system, *messages],
            "add_generation_prompt": add_generation_prompt,
        }
        match self._reply(json.dumps(conversation)):
            case {"text": str(text)} if is_text(text):
                return text
            case {"text": _}:
                raise BadInput(f"{self._place}: the chat template writes half of a surrogate pair; {self._remedy}")
            case {"refused": str(told)}:
                raise BadInput(
                    f"{self._place}: the chat template refuses the conversation ({_line(told)}); {self._remedy}"
                )
            case {"failed": str(told)}:
                raise BadInput(f"{self._place}: the chat template fails ({_line(told)}); {self._remedy}")
            case _:
                raise BadInput(
                    f"{self._place}: the chat template does not end within {RENDER_SECONDS:g} seconds; {self._remedy}"
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


@lru_cache(64)
def frame_of(
    template: str,
    special_tokens: tuple[tuple[str, str], ...],
    place: str,
    system: str,
    arguments: Arguments,
    thoughts: Thoughts,
) -> tuple[str, str]:
    """`ChatTemplate.frame`; a frame is rendered once."""
    with ChatTemplate(
        template, dict(special_tokens), place, system=system, arguments=arguments, thoughts=thoughts
    ) as chat:
        return chat.frame()


def thought_end(template: str) -> str:
    """The text that ends a thought in this template; empty if it mentions none."""
    return next((end for end in THOUGHT_ENDS if end in template or opening(end) in template), "")


def opening(end: str) -> str:
    """The text that begins a thought, by the one that ends it; for an unknown one, the same without its stroke."""
    return _EMPTY[end][0] if end in _EMPTY else end.replace("/", "", 1)


def switches(template: str) -> tuple[str, ...]:
    """Those of `SWITCHES` that the template takes."""
    return tuple(name for name in SWITCHES if re.search(rf"\b{name}\b", template))


def check_arguments(template: str, names: Iterable[str]) -> None:
    """Refuses an argument that the template never names: jinja would ignore it, and the prompts stay as they are."""
    known = {*re.findall(r"[A-Za-z_]\w*", template)}
    for name in names:
        if name not in known:
            near = nearest(name, known)
            remedy = f"did you mean {quoted(near)}?" if near else "take it out"
            raise BadInput(f"the chat template reads no {quoted(name)}; {remedy}")


def _line(text: str) -> str:
    return " ".join(text.split())
