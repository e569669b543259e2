"""A chat template around a user's message, rendered as in transformers, except for the date."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jobs.errors import BadInput
from workers.checkpoints.chat_templates import jinja

TODAY = datetime(2024, 7, 26)
"""The day on which every prompt is asked, so that it is the same tomorrow: the fallback of Llama's template."""

_MESSAGE = "\x00message\x00"


def chat_frame(template: str, special_tokens: Mapping[str, str], place: str) -> tuple[str, str]:
    """The text before and after a user's message, with the assistant's turn opened.

    `BadInput` for a template that does not render, or does not show the message as it is.
    """
    conversation: dict[str, Any] = {
        "messages": [{"role": "user", "content": _MESSAGE}],
        "add_generation_prompt": True,
        "raise_exception": _refuse,
        "strftime_now": TODAY.strftime,
        **special_tokens,
    }
    try:
        text = jinja().from_string(template).render(conversation)
    except BadInput:
        raise
    except Exception as error:  # a template is a program, and fails as one
        told = " ".join(str(error).split())
        raise BadInput(f"{place}: the chat template fails ({told}); ask the checkpoint plainly") from error
    before, found, after = text.partition(_MESSAGE)
    if not found:
        raise BadInput(f"{place}: the chat template does not show the user's message; ask it plainly")
    return before, after


def _refuse(message: str) -> None:
    raise BadInput(f"chat template: {' '.join(message.split())}")
