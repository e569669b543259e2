"""A few thousand damaged inputs in every run of the tests; a hundred thousand where there is time."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.errors import CorruptData
from tests.fuzz import headers, indexes, job_texts
from workers.checkpoints.safetensors import TensorHeader

ROOT = Path(__file__).parents[2]


def test_damaged_headers_are_refused_or_are_headers_to_the_library_too() -> None:
    known = headers.corpus()
    accepted = sum(headers.check(headers.damaged(random.Random(seed), known)) for seed in range(10_000))
    assert 500 < accepted < 5_000, "both answers are met often"


def test_damaged_indexes_and_configs_are_refused_or_say_where_the_tensors_are() -> None:
    known = indexes.corpus()
    accepted = sum(indexes.check(indexes.damaged(random.Random(seed), known)) for seed in range(1500))
    assert 100 < accepted < 1000, "both answers are met often"


def test_damaged_jobs_are_refused_in_one_line_or_are_jobs() -> None:
    known = job_texts.corpus()
    accepted = sum(job_texts.check(job_texts.damaged(random.Random(seed), known)) for seed in range(1500))
    assert 50 < accepted < 1000, "both answers are met often"


def test_valid_headers_and_jobs_are_accepted() -> None:
    for text, size in headers.corpus():
        assert headers.check(len(text).to_bytes(8, "little") + text + bytes(size))
    assert all(map(indexes.check, indexes.corpus()))
    for text in job_texts.corpus():
        assert job_texts.check(text)


@pytest.mark.parametrize("slip", ["no check of the end", "no check of doubled keys", "a crash"])
def test_a_reader_with_a_slip_is_found(slip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(store: object, info: object) -> list[TensorHeader]:
        file = bytes(store.read("model.safetensors"))  # pyright: ignore
        length = int.from_bytes(file[:8], "little")
        try:
            header = json.loads(file[8 : 8 + length])
            entries = [
                TensorHeader(name, entry["dtype"], tuple(entry["shape"]), 8 + length + start, 8 + length + end)
                for name, entry in header.items()
                if name != "__metadata__"
                for start, end in [entry["data_offsets"]]
            ]
        except Exception as error:
            if slip == "a crash" and not isinstance(error, ValueError):
                raise
            raise CorruptData("memory://fuzz/model.safetensors: no") from error
        if slip == "no check of doubled keys" and (not entries or entries[-1].end != len(file)):
            raise CorruptData("memory://fuzz/model.safetensors: no")
        return entries

    monkeypatch.setattr(headers, "read_header", read)
    known = headers.corpus()
    with pytest.raises((AssertionError, TypeError, AttributeError, KeyError)):
        for seed in range(10_000):
            headers.check(headers.damaged(random.Random(seed), known))


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_inputs_give_an_answer_in_bounded_time_and_memory() -> None:
    for reader, inputs in (("headers", 100_000), ("indexes", 20_000), ("jobs", 50_000)):
        command = [sys.executable, "-m", "tests.fuzz", "--only", reader, "--inputs", str(inputs), "--seed", "100000"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        print(ended.stdout)
