"""Reports a night to a chat: one POST in the form of Slack's incoming webhooks.

The URL is a secret: it comes from the environment alone, and no message, file or error repeats it.
"""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from urllib.error import HTTPError

VARIABLE = "MERGEYARD_WEBHOOK"
TIMEOUT_SECONDS = 10.0
TRIES = 3
PAUSE_SECONDS = 1.0
MOST_CHARACTERS = 2900
"""Slack refuses a section of more than 3,000 characters."""


def tell(text: str, sections: Sequence[str]) -> str | None:
    """Posts a line and its sections to the webhook in the environment; why it was not taken, or None.

    Does nothing if the variable is unset.
    """
    url = os.environ.get(VARIABLE)
    if not url:
        return None
    if not url.startswith(("https://", "http://")):
        return f"{VARIABLE} is not the URL of a webhook; it begins with https://"
    body = {"text": _escaped(text), "blocks": [_section(section) for section in (text, *sections)]}
    problem = ""
    for attempt in range(TRIES):
        time.sleep(PAUSE_SECONDS * attempt)
        problem = _post(url, json.dumps(body).encode())
        if not problem:
            return None
    return f"the webhook in {VARIABLE} was not told: {problem}, {TRIES} times"


def _section(text: str) -> dict[str, object]:
    return {"type": "section", "text": {"type": "mrkdwn", "text": _escaped(text)[:MOST_CHARACTERS]}}


def _escaped(text: str) -> str:
    """Escapes the control characters of Slack's mrkdwn, https://docs.slack.dev/messaging/formatting-message-text."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _post(url: str, body: bytes) -> str:
    """The fault in a few words, empty if there is none; texts of exceptions may repeat the URL and are not used."""
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
            return ""
    except HTTPError as error:
        return f"it answers {error.code}"
    except TimeoutError:
        return f"no answer within {TIMEOUT_SECONDS:g} s"
    except (OSError, ValueError, HTTPException) as error:
        return f"no answer ({type(error).__name__})"
