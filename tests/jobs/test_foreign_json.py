"""JSON of other people: what is refused, and that nothing else is changed."""

from __future__ import annotations

import json

import pytest

from jobs.foreign_json import MOST_LEVELS, load_json


def nested(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


@pytest.mark.parametrize("text", [b'{"a": [1, "\xc3\xa9", "\\ud83d\\ude00", null]}', b"7", nested(MOST_LEVELS)])
def test_a_plain_text_is_read_as_it_is(text: bytes) -> None:
    assert load_json(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (nested(MOST_LEVELS + 1), "more than 100 levels"),
        (b"[" * 200_000, "more than 100 levels"),
        (b'{"a": ["\\ud800"]}', "half of a surrogate pair"),
        (b'{"\\udfff": 1}', "half of a surrogate pair"),
        (b"\xff", "utf-8"),
        (b"{", "Expecting"),
    ],
)
def test_a_text_that_cannot_go_on_is_a_value_error(text: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_json(text)
