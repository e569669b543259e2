"""The answers of services over HTTP: which refusals pass, how long a service asks to wait, and its own sentence."""

from __future__ import annotations

import json
import re
import ssl
import time
from email.utils import parsedate_to_datetime
from typing import Any

from jobs.yaml_nodes import quoted

LONGEST_SENTENCE = 300
LARGEST_SENTENCE_BYTES = 1 << 16
LONGEST_WAIT_SECONDS = 86_400.0


def passes(status: int) -> bool:
    """Whether a later try of the same request may succeed: the service is busy or broken, and does not refuse."""
    return status in (408, 409, 425, 429) or (status >= 500 and status not in (501, 505))


def wait_seconds(retry_after: str | None) -> float:
    """The seconds of a `Retry-After` header, a number or a date (RFC 9110, 10.2.3); 0 if it has neither."""
    text = (retry_after or "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII):
        return min(float(text), LONGEST_WAIT_SECONDS)
    try:
        left = parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(left, 0.0), LONGEST_WAIT_SECONDS)


def tls_refusal(error: BaseException) -> str | None:
    """The reason and the remedy where TLS refused a connection for good; None for any other error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    match cause:
        case ssl.SSLCertVerificationError():
            return (
                f"its certificate is not trusted ({cause.verify_message});"
                " give the file of its authority in SSL_CERT_FILE"
            )
        case ssl.SSLError(reason=str(reason)) if "VERSION" in reason or "ALERT" in reason:
            return f"TLS fails ({reason.lower().replace('_', ' ')}); check https:// and the port"
        case _:
            return None


def sentence(body: bytes) -> str:
    """The service's own sentence: one line in double quotes, cut at 300 characters, invisible characters escaped.

    It is the message in the JSON of OpenAI, the hub or FastAPI, or in the XML of S3, the title of a page, or the text.
    """
    text = body[:LARGEST_SENTENCE_BYTES].decode(errors="replace")
    return quoted(" ".join(_message(text).split()), LONGEST_SENTENCE)


def _message(text: str) -> str:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        title = re.search(r"<(?:title|message)\b[^<>]{0,100}>([^<>]*)<", text, re.IGNORECASE)
        return title[1] if title else text
    for _ in range(4):
        match found:
            case {"error": inner} | {"message": inner} | {"detail": inner} | {"msg": inner} | [inner, *_]:
                found = inner
            case _:
                break
    return found if isinstance(found, str) else text
