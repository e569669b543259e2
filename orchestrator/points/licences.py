"""The licence of a merge, reconciled from the licences of its parents."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from jobs.errors import BadInput, CorruptData, ObjectMissing
from jobs.manifest import Manifest
from orchestrator.points.finding import CARD, MANIFEST
from orchestrator.points.published_card import front_matter
from workers.storage import open_store
from workers.storage.records import read_record

NO_COMMERCE = re.compile(r"(^|[-_. ])(nc|mrl|mnpl)([-_. ]|$)|non-?(commercial|production)|research", re.IGNORECASE)
SHARE_ALIKE = re.compile(r"^([al]?gpl|osl|odbl|llama|gemma)|(^|[-_. ])sa([-_. ]|$)|openrail", re.IGNORECASE)
"""Licences that derivatives must keep: copyleft ones, and the makers' own with terms to pass on."""

HUB = "https://huggingface.co"
HUB_URL = re.compile(r"hf://(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?")
NO_DERIVATIVES = re.compile(r"(^|[-_. ])nd([-_. ]|$)", re.IGNORECASE)


# ---- licences


@dataclass(frozen=True, slots=True)
class Licence:
    """The licence on a parent's card: `license`, and name and link if that is `other`; None without one."""

    parent: str
    terms: Mapping[str, str] | None

    @property
    def label(self) -> str:
        """As a person calls it; without a name, one that is no licence of the hub's list is told by its own link."""
        terms = self.terms or {}
        if terms.get("license") != "other":
            return terms.get("license", "no licence")
        link = terms.get("license_link", "")
        return terms.get("license_name") or f"other ({link if '://' in link else f'of {self.parent}'})"

    def says(self, pattern: re.Pattern[str]) -> bool:
        """Whether the licence or its name does."""
        terms = self.terms or {}
        return any(pattern.search(terms.get(key, "")) for key in ("license", "license_name"))


def licences_of(parents: Mapping[str, str], seen: frozenset[str] = frozenset()) -> list[Licence]:
    """The licences of the parents; of a parent that is a merge without one, those of its own parents."""
    found: list[Licence] = []
    for name, url in parents.items():
        terms = _terms(url)
        older = {} if terms is not None or url in seen else _parents_of(url)
        found += licences_of(older, seen | {url}) if older else [Licence(name, terms)]
    return found


def _parents_of(url: str) -> Mapping[str, str]:
    """The parents of a merge of ours; none of any other model."""
    try:
        return read_record(open_store(url), MANIFEST, Manifest.from_json).parents
    except (ObjectMissing, CorruptData):
        return {}


def _terms(url: str) -> dict[str, str] | None:
    try:
        told = front_matter(bytes(open_store(url).read(CARD)).decode(errors="replace"))
    except ObjectMissing:
        return None
    terms = {key: str(told[key]) for key in ("license", "license_name", "license_link") if told.get(key)}
    link, hub = terms.get("license_link", ""), HUB_URL.match(url)
    if link and "://" not in link and hub is not None:  # a file beside the parent, which does not come along
        terms["license_link"] = f"{HUB}/{hub['name']}/blob/{hub['revision'] or 'main'}/{link}"
    return terms if "license" in terms else None


def reconciled_licence(licences: list[Licence], chosen: str | None, *, public: bool) -> dict[str, str]:
    """The front matter of the merge's licence: the parents', where all have the same; else the chosen one.

    `BadInput` where they differ or say nothing and none is chosen, where the chosen one drops a parent's
    non-commercial clause or is another than one that has to be kept, and where a parent forbids the sharing of what is
    made of it. No lawyer looked at this.
    """
    for licence in licences:
        if public and licence.says(NO_DERIVATIVES):
            raise BadInput(f"{licence.parent} is under {licence.label}: derivatives may not be shared; drop --public")
    for licence in licences:
        if chosen is None or chosen == licence.label:
            continue
        if licence.says(SHARE_ALIKE) or (licence.says(NO_COMMERCE) and not NO_COMMERCE.search(chosen)):
            raise BadInput(
                f"--license {chosen}: {licence.parent} is under {licence.label}, which also holds for derivatives"
            )
    if chosen is not None:
        same = [licence.terms for licence in licences if licence.terms and chosen == licence.label]
        return dict(same[0]) if same else {"license": chosen}
    silent = [licence.parent for licence in licences if licence.terms is None]
    if silent:
        raise BadInput(f"the card of {silent[0]} names no licence; say --license NAME")
    found = {licence.label: licence for licence in licences}
    if len(found) > 1:
        said = ", ".join(f"{licence.parent} {licence.label}" for licence in found.values())
        raise BadInput(f"the parents' licences differ ({said}); say --license NAME")
    return dict(next(iter(found.values())).terms or {})
