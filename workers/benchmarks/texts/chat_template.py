"""A chat template around a user's message, rendered as in transformers, except for the date."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jobs.errors import BadInput
from workers.checkpoints.chat_templates import jinja

TODAY = datetime(2024, 7, 26)
"""The day on which every prompt is asked, so that it is the same tomorrow: the fallback of Llama's template."""

_MESSAGE = "\x00message\x00"
_ANSWER = "\x00answer\x00"


def chat_frame(template: str, special_tokens: Mapping[str, str], place: str) -> tuple[str, str]:
    """The text before and after a user's message, with the assistant's turn opened.

    `BadInput` for a template that does not render, or does not show the message as it is.
    """
    before, found, after = _rendered(template, special_tokens, place, [_MESSAGE]).partition(_MESSAGE)
    if not found:
        raise BadInput(f"{place}: the chat template does not show the user's message; ask it plainly")
    return before, after


def next_turn(template: str, special_tokens: Mapping[str, str], place: str) -> str:
    """The text between an answer of the assistant and the next message of the user.

    `BadInput` for a template that does not render a conversation, or does not show it as it is.
    """
    text = _rendered(template, special_tokens, place, [_MESSAGE, _ANSWER, _MESSAGE])
    between, found, _ = text.partition(_ANSWER)[2].partition(_MESSAGE)
    if not found:
        raise BadInput(f"{place}: the chat template does not show a second message; leave out cwe, or ask it plainly")
    return between


def _rendered(template: str, special_tokens: Mapping[str, str], place: str, contents: Sequence[str]) -> str:
    """A conversation that the user begins, with the assistant's turn opened."""
    conversation: dict[str, Any] = {
        "messages": [
            {"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)
        ],
        "add_generation_prompt": True,
        "raise_exception": _refuse,
        "strftime_now": TODAY.strftime,
        **special_tokens,
    }
    try:
        return jinja().from_string(template).render(conversation)
    except BadInput:
        raise
    except Exception as error:  # a template is a program, and fails as one
        told = " ".join(str(error).split())
        raise BadInput(f"{place}: the chat template fails ({told}); ask the checkpoint plainly") from error


def _refuse(message: str) -> None:
    raise BadInput(f"chat template: {' '.join(message.split())}")
