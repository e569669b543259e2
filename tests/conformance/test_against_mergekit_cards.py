"""Documents as model cards have them, read by both programs as they are written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.conformance.card_documents import CARDS
from tests.conformance.conftest import merge_ours
from tests.conformance.oracle import Answer
from tests.conformance.reference import checkpoint


@pytest.mark.parametrize("name", CARDS)
def test_a_document_of_a_card_is_mergekit_s(
    name: str, mergekit: Mapping[str, Answer], parents: Path, tmp_path: Path
) -> None:
    answer = mergekit[f"card {name}"]
    assert answer.error is None
    assert merge_ours(CARDS[name].replace("PARENTS", str(parents)), tmp_path / "merge") == 0
    theirs, merged = checkpoint(str(answer.folder)), checkpoint(str(tmp_path / "merge"))
    assert merged.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        assert merged[tensor].dtype == expected.dtype, tensor
        assert torch.allclose(merged[tensor], expected, rtol=1e-5, atol=1e-7), tensor
