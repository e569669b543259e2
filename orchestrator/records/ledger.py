"""The records of a run in object storage: its job, its finished units, and its driver.

A unit is done when its receipt is there and its shard is the receipt's; a point is done when its manifest is
there. Both are written once and never changed. Only the lease changes: it is moved by compare-and-swap, carries a
nonce (so that no two versions have the same bytes) and an epoch that only rises.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from jobs.errors import BadInput, CorruptData, ObjectExists, ObjectMissing, StorageUnavailable, writing
from jobs.merge_tasks import Receipt
from jobs.sealing import sealed, stamped_text
from orchestrator.records.places import Places
from workers.checkpoints.hashing import has_digests
from workers.storage import ObjectInfo, Store, open_store
from workers.storage.records import read_receipt, read_record

READS_AT_ONCE = 32


class Ledger:
    """The records of one run under its prefix."""

    def __init__(self, run_url: str, places: Places) -> None:
        self.store: Store = open_store(run_url)
        self._places = places

    def claim(self, job_text: str, plan: Mapping[str, Any]) -> None:
        """Writes job.yaml and plan.json, or finds that they were written by this very job; else `BadInput`.

        A run whose parents have changed since is refused too: its points would not be comparable.
        """
        try:
            self.store.write(self._places.record("plan.json"), sealed(plan, lines=True), mode="create")
        except ObjectExists:
            earlier = read_record(self.store, self._places.record("plan.json"))
            if earlier.get("digest") != plan["digest"]:
                raise BadInput(
                    f"{self.store.url}: this run belongs to another job, {_difference(earlier, plan)}"
                    " give the job another name, or remove that run"
                ) from None
        with writing():
            self.store.write(self._places.record("job.yaml"), stamped_text(job_text, "# {}"))

    def trusted(self, units: Mapping[str, str]) -> dict[str, Receipt]:
        """The receipts of those of these units (unit to shard key) whose shard lies there whole, by unit.

        A receipt without its shard counts for nothing: the unit will be merged again, to the same bytes. So will the
        unit of a damaged receipt, which is removed.
        """
        prefix = self._places.record("receipts/")
        there = {info.key: info for info in self.store.list()}
        listed = {key.rsplit("/", 1)[1].removesuffix(".json") for key in there if key.startswith(prefix)}
        plan = self._places.record("plan.json")
        if listed and plan not in there:  # it is older than every receipt
            with suppress(ObjectMissing):
                self.store.locate(plan)
                raise StorageUnavailable(f"{self.store.url}: the listing leaves out {plan}, which is there; run again")
        with ThreadPoolExecutor(READS_AT_ONCE, "receipts") as pool:
            receipts = list(pool.map(self._receipt, [unit for unit in units if unit in listed]))
        return {
            receipt.unit: receipt
            for receipt in receipts
            if receipt is not None and self._is_whole(there.get(receipt.key), receipt)
        }

    def _is_whole(self, shard: ObjectInfo | None, receipt: Receipt) -> bool:
        """Whether a shard is the one of this receipt; another version of it, a copy say, is hashed to know."""
        if shard is None or shard.size != receipt.size:
            return False
        if shard.etag == receipt.etag:
            return True
        with suppress(CorruptData):
            return has_digests(self.store, shard, receipt.tensors)
        return False

    def _receipt(self, unit: str) -> Receipt | None:
        key = self._places.receipt(unit)
        try:
            return read_receipt(self.store, key)
        except CorruptData:
            self.store.delete(key)
            return None

    def forget(self) -> None:
        """Removes the records of a finished run whose output stands by itself."""
        for info in list(self.store.list(self._places.records)):
            self.store.delete(info.key)


def _merges(plan: Mapping[str, Any]) -> list[str]:
    return sorted(entry["digest"] for entry in plan["points"])


def _difference(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The difference of two plans, in a few words."""
    for name, parent in now["parents"].items():
        before = earlier["parents"].get(name)
        if before is not None and before != parent:
            return f"or its parent {name} has changed since;"
    known = earlier.get("revisions", {})
    revised = [method for method, revision in now.get("revisions", {}).items() if known.get(method) != revision]
    version = f"or a version began it whose {revised[0]} has other last bits;" if revised else ""
    if not earlier["points"] or not now["points"]:  # of a search
        return version or "with another search, recipe or evaluation;"
    before_points = {entry["name"] for entry in earlier["points"]}
    points = {entry["name"] for entry in now["points"]}
    if before_points != points and _merges(earlier) == _merges(now):
        example = next(entry["name"] for entry in earlier["points"] if entry["name"] not in points)
        return f"whose points have other names, such as {example}: name them so by `point:`, or"
    if before_points != points:
        return f"with {len(before_points)} points, {len(points - before_points)} of yours not among them;"
    return version or "whose points of the same names are other merges;"
