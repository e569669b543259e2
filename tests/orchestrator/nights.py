"""Nights that were told of by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from orchestrator.nightly.book import Night, Revision, Score

REASON = "overall: -0.90 points (-1.80 to +0.00) on 100 items in 100 haystacks; not worse by 2 or more"


def a_verdict(old: str, outcome: str = "pass") -> dict[str, Any]:
    line = {
        "scope": "overall",
        "outcome": outcome,
        "difference": -0.9,
        "low": -1.8,
        "high": 0.0,
        "standard_error": 0.5,
        "margin": 2.0,
        "p_pass": 0.01,
        "p_fail": 0.9,
        "items": 100,
        "haystacks": 100,
        "items_needed": None,
        "reason": REASON,
    }
    rule = {"margin": 2.0, "length_margin": None, "alpha": 0.025, "planned_haystacks": None}
    return {"outcome": outcome, "new": "soup", "old": old, "rule": rule, "lines": [line], "items_needed": None}


def a_night(number: int = 1, outcome: Any = "pass", judged_against: str | None = None, **more: Any) -> Night:
    """A night that was told of by hand; it passed unless `outcome` says otherwise."""
    passed = outcome == "pass"
    score = {"overall": Score(90.0, 88.0, 92.0), "512": Score(95.0, 94.0, 96.0), "4096": Score(85.0, None, None)}
    verdicts = {"anchor": a_verdict("released", outcome)}
    if judged_against is not None:
        verdicts = {"blessed": a_verdict("blessed"), **verdicts}
    found = Night(
        number=number,
        night=f"{number:04d}-abcdef01",
        fingerprint=f"{number:064x}",
        finished="2026-03-01T02:00:00+00:00",
        seconds=90.0,
        items=300,
        outcome=outcome,
        candidate="soup",
        weights=f"{number:064d}",
        point=f"/runs/nightly/nights/{number:04d}-abcdef01/points/soup" if passed else None,
        parents={"cos": Revision("hf://someone/cos@abc", "0123456789ab")},
        changed=("cos",),
        scores=dict.fromkeys(("candidate", "anchor", *(["blessed"] if judged_against else [])), score),
        verdicts=verdicts,
        alpha=0.025,
        judged_against=judged_against,
        epoch=number if passed else None,
        nonce=f"nonce {number}",
    )
    return replace(found, **more)
