"""Digests of tensors: which algorithm, and which digests may be compared."""

from __future__ import annotations

import hashlib
import json

import pytest
from blake3 import blake3

from jobs.errors import CorruptData
from workers.digests import TensorHash, contradict, digest_of, short, weights_digest

OF_NOTHING = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
"""The published BLAKE3 digest of the empty input; the next is that of SHA-256 over `abc`, of FIPS 180-2."""
OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_new_digests_are_blake3_and_those_without_a_name_sha256() -> None:
    assert digest_of(b"") == f"blake3:{OF_NOTHING}"
    assert digest_of(b"abc", like="0" * 64) == OF_ABC
    assert digest_of(b"", like=f"blake3:{0:064}") == f"blake3:{OF_NOTHING}"


@pytest.mark.parametrize("like", ["", "blake3:"])
def test_bytes_that_come_in_pieces_have_the_digest_of_the_whole(like: str) -> None:
    pieces = TensorHash(like)
    for piece in (b"", b"a", memoryview(b"bc")):
        pieces.update(piece)
    assert pieces.digest() == digest_of(b"abc", like=like)


def test_an_unknown_algorithm_is_refused_by_name() -> None:
    with pytest.raises(CorruptData, match=r"^the digest 'blake4:00' has an unknown algorithm; use a newer mergeyard$"):
        digest_of(b"", like="blake4:00")


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("aa", "aa", False),
        ("aa", "ab", True),
        ("blake3:aa", "blake3:aa", False),
        ("blake3:aa", "blake3:ab", True),
        ("aa", "blake3:aa", False),
        ("aa", "blake3:ab", False),
        ("blake3+sha256:aa", "blake3+sha256:ab", False),
        ("http://here#1", "http://here#2", False),
    ],
)
def test_only_digests_of_one_algorithm_contradict_each_other(one: str, other: str, expected: bool) -> None:
    assert contradict(one, other) is contradict(other, one) is expected


def test_the_digest_of_weights_names_the_algorithms_of_its_tensors() -> None:
    def listed(**tensors: str) -> bytes:
        return json.dumps(sorted(tensors.items()), separators=(",", ":")).encode()

    old, new, mixed = {"b": "1", "a": "2"}, {"b": "blake3:1", "a": "blake3:2"}, {"b": "1", "a": "blake3:2"}
    assert weights_digest(old) == hashlib.sha256(listed(**old)).hexdigest(), "as older versions wrote it"
    assert weights_digest(new) == f"blake3:{blake3(listed(**new)).hexdigest()}"
    assert weights_digest(mixed) == f"blake3+sha256:{blake3(listed(**mixed)).hexdigest()}"


def test_people_read_twelve_digits() -> None:
    assert [short(OF_ABC), short(f"blake3:{OF_NOTHING}")] == ["ba7816bf8f01", "af1349b9f5f9"]
