"""Files that carry their own digest: every flipped bit of one is noticed, or changes nothing."""

from __future__ import annotations

import hashlib
import json

import pytest

from jobs.errors import CorruptData
from jobs.sealing import BLANK, MARK, is_sealed, sealed, stamped_text, unsealed

DOCUMENT = {"finished": True, "standing": [{"point": "w0.5", "score": 0.25}], "same": {"a": "b", "ä": "c"}}


def flips(data: bytes):
    """The data with one bit flipped, for every bit."""
    for place in range(len(data)):
        for bit in range(8):
            yield place, data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


@pytest.mark.parametrize("lines", [False, True])
def test_every_flipped_bit_of_a_document_is_noticed_or_leaves_its_entries(lines: bool):
    data = sealed(DOCUMENT, lines=lines)
    assert json.loads(data) == {**DOCUMENT, "sha256": json.loads(data)["sha256"]}
    unnoticed = 0
    for _, flipped in flips(data):
        try:
            found = unsealed(flipped, older=True)
        except CorruptData:
            continue
        unnoticed += 1
        assert {name: entry for name, entry in found.items() if name in DOCUMENT} == DOCUMENT
    assert unnoticed < 8 * len("sha256\n"), "only the name of the digest may change"


def test_a_document_without_a_digest_is_taken_only_from_older_versions():
    data = json.dumps(DOCUMENT).encode()
    assert unsealed(data, older=True) == DOCUMENT
    assert not is_sealed(data, "report/evaluation.json")
    with pytest.raises(CorruptData, match=r"^damaged, or of another version of mergeyard; look there$"):
        unsealed(data, "look there")


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 100_000])
def test_what_is_no_document_is_refused(data: bytes):
    with pytest.raises(CorruptData, match=r"^damaged, not (JSON \(.*\)|a JSON object); remove it and run again$"):
        unsealed(data, older=True)


def test_every_flipped_bit_of_a_text_is_noticed_or_leaves_the_text():
    text = f"name: demo\nnote: {MARK}: {'a' * 64}\n"  # a text may hold another mark
    data = stamped_text(text, "# {}")
    blank = f"# {MARK}: {BLANK}\n{text}".encode()
    assert data == blank.replace(BLANK.encode(), hashlib.sha256(blank).hexdigest().encode())
    assert is_sealed(data, "job.yaml")
    for _, flipped in flips(data):
        with pytest.raises(CorruptData, match=r"^damaged, its digest is of something else; remove it and run again$"):
            is_sealed(flipped, "job.yaml")


@pytest.mark.parametrize("comment", ["# {}", "<!-- {} -->"])
def test_a_text_that_was_cut_is_noticed(comment: str):
    data = stamped_text("name: demo\ngrid: {w: [0, 1]}\n", comment)
    for length in range(len(data)):
        with pytest.raises(CorruptData, match=r"^damaged, .*; remove it and run again$"):
            is_sealed(data[:length], "job.yaml")


def test_a_text_of_an_older_version_has_no_digest():
    assert not is_sealed(b"name: demo\n", "job.yaml")
