"""Reports a night to a chat: one POST in the form of Slack's incoming webhooks.

The URL is a secret: it comes from the environment alone, and no message, file or error repeats it.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import urlsplit

from workers.services import passes, sentence, tls_refusal, wait_seconds

VARIABLE = "MERGEYARD_WEBHOOK"
TIMEOUT_SECONDS = 10.0
TRIES = 3
LONGEST_WAIT_SECONDS = 60.0
MOST_BYTES = 1 << 16
"""Of an answer; a chat says in a few words why it takes no message."""

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
    tries, wait = 0, 0.0
    while True:
        time.sleep(max(wait, PAUSE_SECONDS * tries))
        refusal, tries = _post(url, json.dumps(body).encode()), tries + 1
        if refusal is None:
            return None
        wait = refusal.wait
        if tries == TRIES or not refusal.passes or wait > LONGEST_WAIT_SECONDS:
            return f"the webhook in {VARIABLE} was not told: {refusal.words}, {tries} times"


@dataclass(frozen=True)
class _Refusal:
    """The fault in a few words, whether it may pass, and the seconds that the service asks to wait."""

    words: str
    passes: bool = True
    wait: float = 0.0


def _section(text: str) -> dict[str, object]:
    return {"type": "section", "text": {"type": "mrkdwn", "text": _escaped(text)[:MOST_CHARACTERS]}}


def _escaped(text: str) -> str:
    """Escapes the control characters of Slack's mrkdwn, https://docs.slack.dev/messaging/formatting-message-text."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _post(url: str, body: bytes) -> _Refusal | None:
    """The fault, None if there is none; texts of exceptions may repeat the URL and are not used."""
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
            return None
    except HTTPError as error:
        words = f"it answers {error.code}{_sentence(error, url)}"
        return _Refusal(words, passes(error.code), wait_seconds(error.headers["Retry-After"]))
    except TimeoutError:
        return _Refusal(f"no answer within {TIMEOUT_SECONDS:g} s")
    except (OSError, ValueError, HTTPException) as error:
        if refusal := tls_refusal(error):
            return _Refusal(refusal, passes=False)
        return _Refusal(f"no answer ({type(error).__name__})")


def _sentence(answer: HTTPError, url: str) -> str:
    """The service's own sentence after a colon; nothing if it has a part of the secret URL."""
    try:
        body = answer.read(MOST_BYTES)
    except (OSError, HTTPException):
        return ""
    parts = urlsplit(url)
    secrets = [part.encode() for part in re.split("[/&=]", f"{parts.path}/{parts.query}") if len(part) > 5]
    return f": {sentence(body)}" if body and not any(secret in body for secret in secrets) else ""
