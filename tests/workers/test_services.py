"""Refusals that pass, pauses and sentences of services."""

from __future__ import annotations

import json
import ssl
import time
from email.utils import formatdate

import pytest

from workers.services import passes, sentence, tls_refusal, wait_seconds


def test_a_busy_or_broken_service_is_asked_again_and_a_refusal_is_not() -> None:
    assert [status for status in range(300, 600) if passes(status)] == [
        *(408, 409, 425, 429, 500, 502, 503, 504), *range(506, 600)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7), (" 0.5 ", 0.5), ("300", 300), ("9" * 9, 86_400), (None, 0), ("", 0), ("-5", 0), ("soon", 0),
        ("1e9", 0), ("nan", 0), ("٣", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Wed, 99 Oct 2015 07:28:00 GMT", 0),
    ],
)  # fmt: skip
def test_a_pause_is_a_number_of_seconds_or_a_date(header: str | None, seconds: float) -> None:
    assert wait_seconds(header) == seconds
    assert wait_seconds(formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60, abs=3)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": {"message": "no\\n such  model", "code": 404}}', '"no such model"'),
        (b'{"error": "Repository is gated"}', '"Repository is gated"'),
        (b'{"detail": [{"loc": ["body"], "msg": "field required"}]}', '"field required"'),
        (b'{"error": [{"message": "first"}, {"message": "second"}]}', '"first"'),
        (b'{"ok": false}', '"{\\"ok\\": false}"'),
        (b"<html><head><title>502 Bad Gateway</title></head><body><h1>x</h1></body></html>", '"502 Bad Gateway"'),
        (b"<?xml version='1.0'?><Error><Code>X</Code><Message>it has expired</Message></Error>", '"it has expired"'),
        (b"no_service", '"no_service"'),
        (b"", '""'),
        (b"\x1b]0;title\x07\x1b[2J\nall is well", '"\\u001b]0;title\\u0007\\u001b[2J all is well"'),
        (b'{"error": "\\ud800 \\u202e"}', '"\\ud800 \\u202e"'),
        (b"\xff" * 1000, '"' + "�" * 297 + '..."'),
        (b"[" * (1 << 20), '"' + "[" * 297 + '..."'),
    ],
)  # fmt: skip
def test_a_services_own_sentence_is_one_short_line_of_visible_characters(body: bytes, words: str) -> None:
    assert sentence(body) == words


def test_a_refusal_of_tls_is_found_below_the_errors_of_libraries() -> None:
    untrusted = ssl.SSLCertVerificationError(1, "x")
    untrusted.verify_message = "self-signed certificate"
    above = OSError("the connection failed")
    above.__cause__ = untrusted
    assert tls_refusal(above) == (
        "its certificate is not trusted (self-signed certificate); give the file of its authority in SSL_CERT_FILE"
    )
    assert tls_refusal(ssl.SSLEOFError(8, "EOF occurred in violation of protocol")) is None
    assert tls_refusal(OSError("no route to host")) is None


def test_every_sentence_can_be_printed() -> None:
    for text in ("\ud800", "\u2028", "\x00", "\x9b31m", "\N{RIGHT-TO-LEFT OVERRIDE}", "é", "語"):
        shown = sentence(json.dumps({"error": text}).encode())
        assert shown.isprintable() and shown.encode()
