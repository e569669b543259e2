"""The result of a night, in words and as JUnit XML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from orchestrator.judging.gate import GateRule, Verdict, VerdictLine
from orchestrator.judging.significance import FlipRate
from orchestrator.nightly.book import Blessed, Night

SUITE = "mergeyard nightly"


def headline(night: Night, blessed: Blessed | None) -> str:
    """One line: the night, its outcome, and whether the pointer, as it is now, names its candidate for it."""
    word = "is" if blessed is not None and blessed.nonce == night.nonce else "is not"
    return f"night {night.night}: {night.outcome}: {night.candidate} {word} blessed"


def reasons(night: Night) -> list[str]:
    """A line for every line of the verdicts, and the changed parents.

    A guard is in each verdict, and is said once: its reason names its own baseline.
    """
    said = [
        ("" if line["reason"].startswith("guard ") else f"against {_named(who, verdict['old'])}: ") + line["reason"]
        for who, verdict in night.verdicts.items()
        for line in verdict["lines"]
    ]
    found = [*dict.fromkeys(said)]
    if "blessed" not in night.verdicts and night.judged_against is not None:
        found.insert(0, "the very model that is blessed")
    noise = next((verdict["noise"] for verdict in night.verdicts.values() if verdict.get("noise")), None)
    found += [] if noise is None else [FlipRate(**noise).words]
    return [*found, f"new since the night before: {', '.join(night.changed) or 'the job'}"]


def junit(night: Night) -> str:
    """A test suite for each verdict of the night."""
    suites = ElementTree.Element("testsuites", name=SUITE)
    for verdict in night.verdicts.values():
        suites.append(ElementTree.fromstring(_verdict(verdict).to_junit_xml()))
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True)


def _named(who: str, old: str) -> str:
    return "the blessed merge" if who == "blessed" else f"the anchor {old}"


def _verdict(document: Mapping[str, Any]) -> Verdict:
    return Verdict(
        outcome=document["outcome"],
        new=document["new"],
        old=document["old"],
        rule=GateRule(**document["rule"]),
        lines=tuple(VerdictLine(**line) for line in document["lines"]),
        items_needed=document["items_needed"],
    )
