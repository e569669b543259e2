"""One schedule: a small run driven through crashes, and what must be true at every step and at the end.

Real: planner, ledger, lease, driver, gatherer, what a worker writes (`ShardWriter`: shard, then receipt), and the
store's semantics, and the queue of tasks: which is next, which again, and when. Not real: the arithmetic (a tensor's
bytes are a hash of its name and its setting), the workers (as on Ray, they answer in order of arrival, and one that is
given up may go on), threads and the clock.

A schedule has one to three drivers, which may overlap, on two machines; each of them and of their workers may be killed
between any two store operations, or in one, before or after its effect; paused; cut off from the store; or given up
though it lives. Requests and answers get lost. Then one driver is left alone and must finish, while workers that were
given up go on. Some schedules remove or cut a shard before that, some have a worker whose memory is bad.

Wrong is: a point's byte that an undisturbed run does not write; a manifest before its files; a receipt before its
shard, or trusted without it; work done again that was listed as done; two workers that disagree, unnoticed; a lease
taken from a living driver that renews it; a driver that writes after it learnt that it was replaced, or that gives up
though it was not; an end that is not whole; any error that tells a user less than what happened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import orchestrator.merging.gathering
import orchestrator.planning.beside
import orchestrator.records.lease
import orchestrator.records.ledger
import workers.checkpoints.hashing
from jobs.errors import CorruptData, MergeyardError, RunBusy, StorageUnavailable, WorkerLost
from jobs.job import load_job
from jobs.manifest import Manifest
from jobs.merge_tasks import MergeTask, Receipt, Setting, TensorMerge
from orchestrator.cluster.again import Failure, Queue
from orchestrator.cluster.pool import Progress, unit
from orchestrator.merging.driver import RunResult, drive
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.watching import Watcher
from tests.simulation.faulty_store import FaultyStore
from tests.simulation.world import Inline, Mailbox, Process, SimulatedWorld, Threading, Time, Wrong
from workers.checkpoints.hashing import has_digests
from workers.checkpoints.safetensors import header_bytes
from workers.merging.writing import ShardWriter
from workers.storage import ObjectInfo, open_store
from workers.storage.memory import MemoryStore

CONFIG = {"model_type": "qwen2", "num_hidden_layers": 2, "max_position_embeddings": 512, "vocab_size": 8}
TENSORS: list[tuple[str, str, tuple[int, ...]]] = [
    ("model.embed_tokens.weight", "BF16", (8, 4)),
    ("model.layers.0.mlp.weight", "BF16", (4, 4)),
    ("model.layers.1.mlp.weight", "BF16", (4, 4)),
    ("model.norm.weight", "BF16", (4,)),
]
LINEAR = (
    '{merge_method: linear, models: [{model: a, parameters: {weight: "${w}"}}, {model: b, parameters: {weight: 1}}]}'
)
SCALED = LINEAR.replace("weight: 1", 'weight: "${w}"')
TIES = (
    '{merge_method: ties, base_model: a, models: [{model: b, parameters: {weight: 1, density: "${w}"}}],'
    " parameters: {normalize: true}}"
)
JOBS = {
    "one point, one shard": (LINEAR, "[0.5]", "1GB", None),
    "three points, one shard": (LINEAR, "[0.25, 0.5, 0.75]", "1GB", None),
    "two points, three shards": (LINEAR, "[0.25, 0.5]", "70", None),
    "a twin": (SCALED, "[1, 2]", "100", None),
    "two of three points kept": (TIES, "[0.25, 0.5, 1]", "100", ("w0.25", "w1")),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A run, planned twice as two drivers would, and everything it must write."""

    name: str
    plans: tuple[Plan, Plan]
    expected: Mapping[str, bytes]
    tensors: Mapping[str, Mapping[str, str]]
    sizes: Mapping[str, int]


def cases() -> list[Case]:
    """The runs that schedules choose from."""
    for name in ("a", "b"):
        store = open_store(f"memory://simulated-{name}")
        store.write("config.json", json.dumps({**CONFIG, "torch_dtype": "bfloat16"}).encode())
        store.write("tokenizer.json", b'{"model": {"type": "WordLevel", "vocab": {"x": 0}}}')
        header = header_bytes(TENSORS)
        store.write("model.safetensors", header + bytes(2 * (8 * 4 + 2 * 4 * 4 + 4)))
    return [_case(name, *job) for name, job in JOBS.items()]


def _case(name: str, recipe: str, grid: str, shard_size: str, kept: tuple[str, ...] | None) -> Case:
    text = (
        "name: run\nparents: {a: 'memory://simulated-a', b: 'memory://simulated-b'}\n"
        f"recipe: {recipe}\ngrid: {{w: {grid}}}\nshard_size: {shard_size}\noutput: memory://simulated\n"
    )
    plans = [make_plan(load_job(text, "job.yaml")) for _ in range(2)]
    first, second = (plan if kept is None else plan.keeping(kept) for plan in plans)
    undisturbed = Schedule(0, Case(name, (first, second), {}, {}, {}), disturbed=False)
    undisturbed.run()
    shards = {key: data for key, data in undisturbed.points().items() if key.endswith(".safetensors")}
    assert shards == _by_arithmetic(first), "an undisturbed run writes what can be said beforehand"
    receipts = [
        Receipt.from_json(bytes(undisturbed.store.read(info.key))) for info in undisturbed.store.list("receipts/")
    ]
    return Case(
        name,
        (first, second),
        undisturbed.points(),
        {receipt.unit: receipt.tensors for receipt in receipts},
        {receipt.key: receipt.size for receipt in receipts},
    )


def _by_arithmetic(plan: Plan) -> dict[str, bytes]:
    """Every shard of a plan, without any of the code under test but its layout."""
    return {
        plan.places.file(planned.name, shard.name): header_bytes(
            [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard.tensors]
        )
        + b"".join(merged_bytes(planned.settings[tensor.setting], tensor) for tensor in shard.tensors)
        for planned in plan.written
        if planned.same_as is None
        for shard in planned.layout.shards
    }


def merged_bytes(setting: Setting, tensor: TensorMerge) -> bytes:
    """What the simulated arithmetic gives."""
    return hashlib.shake_128(f"{setting}{tensor.name}".encode()).digest(tensor.bytes)


@dataclass(slots=True)
class Outcome:
    """How a driver ended; neither result nor error if it was killed."""

    result: RunResult | None = None
    error: MergeyardError | None = None


class Schedule:
    """One run of a case, from an empty store to the end."""

    def __init__(self, seed: int, case: Case, *, disturbed: bool = True) -> None:
        self.world = SimulatedWorld(seed)
        self.case = case
        self.disturbed = disturbed
        self.store = MemoryStore("memory://simulated/run")
        self.bad_memory = disturbed and self.world.random.random() < 0.1
        self.loss_rate = self.world.random.choice([0, 0, 0.01, 0.05]) if disturbed else 0.0
        self.done_when_listed: dict[Process, set[str]] = {}
        self.published: dict[str, set[str]] = {}
        self.removed: set[str] = set()
        self.lease: tuple[dict[str, Any], Process, float] | None = None

    # the story

    def run(self) -> dict[str, int]:
        """Plays the schedule; how often each thing happened. `Wrong` when a promise is broken."""
        try:
            with _standing_in(self):
                if self.disturbed:
                    self._disturbed()
                    self.disturbed = False
                    self._meddle()
                outcome = self._drive_alone()
                if self.bad_memory and isinstance(outcome.error, CorruptData):
                    return self.world.counts
                if outcome.result is None:
                    raise Wrong(f"a driver left alone did not finish: {outcome.error!r}") from outcome.error
                self._check_end(outcome.result)
                self.world.run_until(lambda: False)
                self._check_store()
                if self.case.expected and self.world.random.random() < 0.3:
                    self._check_repeated()
                return self.world.counts
        finally:
            self.world.end()

    def _disturbed(self) -> None:
        random = self.world.random
        drivers: list[Process] = []
        at = 0.0
        for _ in range(random.choice([1, 1, 2, 3])):
            process = self._troubled(self.world.process(random.choice("AB")))
            self._start_driver(process, Outcome(), after=at)
            drivers.append(process)
            at += random.choice([0.2, 5.0, 60.0]) * random.random()
        self.world.run_until(lambda: not any(driver.alive for driver in drivers))

    def _troubled(self, process: Process) -> Process:
        random, world = self.world.random, self.world
        process.loss_rate = self.loss_rate
        if random.random() < 0.5:
            process.steps_left = int(2 ** random.uniform(0, 8))
        if random.random() < 0.1:
            begins = world.now + random.uniform(0, 10)
            process.paused = (begins, begins + random.uniform(10, 100))
        if random.random() < 0.05:
            begins = world.now + random.uniform(0, 10)
            process.cut_off = (begins, begins + random.uniform(1, 60))
        return process

    def _meddle(self) -> None:
        """Somebody removes or cuts a shard while nobody drives."""
        shards = sorted(info.key for info in self.store.list("points/") if info.key.endswith(".safetensors"))
        if shards and self.world.random.random() < 0.25:
            self.world.count("shard removed or cut")
            key = self.world.random.choice(shards)
            self.removed.add(key)
            if self.world.random.random() < 0.5:
                self.store.delete(key)
            else:
                self.store.write(key, bytes(self.store.read(key))[:-1])

    def _drive_alone(self) -> Outcome:
        outcome = Outcome()
        process = self.world.process("A")
        self._start_driver(process, outcome)
        self.world.run_until(lambda: not process.alive)
        return outcome

    def _start_driver(self, process: Process, outcome: Outcome, after: float = 0.0) -> None:
        plan = self.case.plans[process.number % 2]

        def run() -> None:
            self.world.count("driver started")
            try:
                outcome.result = drive(plan, SimulatedPool(self, process, self.disturbed), Watcher(visible=False))
            except MergeyardError as error:
                outcome.error = error
                self.world.count(f"driver ended: {type(error).__name__}")
                self._check_error(process, error)
            finally:
                process.end()

        self.world.start(process, run, after)

    # what must be true

    def _check_error(self, process: Process, error: MergeyardError) -> None:
        match error:
            case StorageUnavailable() | WorkerLost():
                return
            case CorruptData() if self.bad_memory:
                return
            case RunBusy() if "took this run over" in str(error):
                if self.lease is not None and self.lease[0]["epoch"] == process.epoch:
                    raise Wrong("a driver gave up its run, and nobody had taken it over") from error
            case RunBusy():
                return
            case _:
                raise Wrong(f"a driver ended with {type(error).__name__}: {error}") from error

    def seen(self, process: Process, operation: str, key: str) -> None:
        """A change that all can see now, or a listing."""
        if operation == "list" and key == "receipts/":
            self.done_when_listed[process] = self._done()
        if operation not in ("write", "swap", "commit"):
            return
        if key == "lease.json":
            self._check_lease(process, json.loads(bytes(self.store.read(key))))
        elif key.startswith("receipts/"):
            self._check_receipt(Receipt.from_json(bytes(self.store.read(key))))
        elif operation == "write" and process.epoch is None:
            raise Wrong(f"{key} was written without holding the lease")
        elif operation == "write" and process.must_stop:
            raise Wrong(f"{key} was written by a driver that knew that it was replaced")
        if key.startswith("points/") and self.case.expected:
            self._check_file(key)

    def _check_lease(self, process: Process, lease: dict[str, Any]) -> None:
        now = self.world.now
        if self.lease is not None:
            before, holder, since = self.lease
            if lease["nonce"] == before["nonce"]:
                raise Wrong("two versions of the lease have the same nonce")
            if lease["epoch"] == before["epoch"]:
                if process is not holder:
                    raise Wrong(f"two drivers hold epoch {lease['epoch']}")
            elif lease["epoch"] != before["epoch"] + 1:
                raise Wrong(f"epoch {lease['epoch']} followed {before['epoch']}")
            elif not before["released"] and holder.alive and now - since < before["seconds"]:
                raise Wrong(f"the lease of a living driver was taken {now - since:.1f} s after it was renewed")
            else:
                self.world.count("lease taken over")
        process.epoch = lease["epoch"]
        self.lease = (lease, process, now)

    def _check_receipt(self, receipt: Receipt) -> None:
        if receipt.key not in self._keys() and receipt.key not in self.removed:
            raise Wrong(f"the receipt of {receipt.key} was there before its shard")
        if self.case.tensors and not self.bad_memory and self.case.tensors[receipt.unit] != receipt.tensors:
            raise Wrong(f"the receipt of {receipt.key} tells of other bytes")

    def _check_file(self, key: str) -> None:
        if not self.bad_memory and bytes(self.store.read(key)) != self.case.expected.get(key):
            raise Wrong(f"{key} is not what an undisturbed run writes")
        if key.endswith("/manifest.json"):
            manifest = Manifest.from_json(bytes(self.store.read(key)))
            for name, entry in manifest.files.items():
                there = self._keys().get(key.replace("manifest.json", name))
                if there != entry.size:
                    raise Wrong(f"{key} was there before {name}")

    def _keys(self) -> dict[str, int]:
        return {info.key: info.size for info in self.store.list("points/")}

    def _done(self) -> set[str]:
        """The units whose shard is the one that their receipt tells of, by its version or by its bytes."""
        shards = {info.key: info for info in self.store.list("points/")}
        receipts = [Receipt.from_json(bytes(self.store.read(info.key))) for info in self.store.list("receipts/")]
        return {receipt.unit for receipt in receipts if self._lies_there(shards.get(receipt.key), receipt)}

    def _lies_there(self, shard: ObjectInfo | None, receipt: Receipt) -> bool:
        if shard is None or shard.size != receipt.size:
            return False
        return shard.etag == receipt.etag or has_digests(self.store, shard, receipt.tensors)

    def check_tasks(self, driver: Process, tasks: Sequence[MergeTask]) -> None:
        """Nothing is done again that was there when the driver looked, and nothing twice."""
        units = [point.unit for task in tasks for point in task.points]
        if len(set(units)) < len(units):
            raise Wrong("a unit is in two tasks")
        if again := self.done_when_listed.get(driver, set()) & set(units):
            raise Wrong(f"{len(again)} units are merged again that were done")

    def note_published(self, receipt: Receipt) -> None:
        """A worker was told that its unit is done."""
        told = self.published.setdefault(receipt.unit, set())
        told.add(json.dumps(dict(receipt.tensors), sort_keys=True))
        if len(told) > 1:
            raise Wrong(f"two workers merged {receipt.key} to different bytes and neither was told")

    def points(self) -> dict[str, bytes]:
        """Everything under points/."""
        return {info.key: bytes(self.store.read(info.key)) for info in self.store.list("points/")}

    def _check_end(self, result: RunResult) -> None:
        plan = self.case.plans[0]
        if result.points.keys() != {planned.name for planned in plan.written}:
            raise Wrong("the result does not hold every point once")
        if result.units_merged + result.units_found != len(plan.units):
            raise Wrong(f"{result.units_merged} units merged and {result.units_found} found are not all of them")
        self._check_store()

    def _check_store(self) -> None:
        if self.case.expected and not self.bad_memory and self.points() != self.case.expected:
            wrong = sorted(key for key, data in self.case.expected.items() if self.points().get(key) != data)
            raise Wrong(f"the run is over and not whole: {wrong or 'there is more than there should be'}")
        if self._done() != set(self.case.plans[0].units):
            raise Wrong("the run is over and not every unit has its receipt and its shard")

    def _check_repeated(self) -> None:
        outcome = self._drive_alone()
        if outcome.result is None or outcome.result.units_merged:
            raise Wrong(f"a finished run was not found to be finished: {outcome}")


class SimulatedPool:
    """A pool of simulated workers."""

    def __init__(self, schedule: Schedule, driver: Process, disturbed: bool) -> None:
        self._schedule, self._driver, self._world, self._disturbed = schedule, driver, schedule.world, disturbed
        self.workers = self._world.random.randint(1, 4)

    def run(self, tasks: Sequence[MergeTask], progress: Progress) -> Iterator[list[Receipt]]:
        self._schedule.check_tasks(self._driver, tasks)
        queue = Queue(tasks, unit)
        running: dict[int, MergeTask] = {}
        numbers, mail = count(), Mailbox(self._world)
        while queue or running:
            while len(running) < 2 * self.workers and (task := queue.next(self._world.now)) is not None:
                number = next(numbers)
                running[number] = task
                self._send(task, number, mail)
            letter = mail.receive(queue.pause(self._world.now))
            if letter is None:
                continue
            number, answer = letter
            if number not in running:
                continue
            task = running.pop(number)
            if isinstance(answer, Failure):
                queue.again(task, answer, self._world.now)
                continue
            self._driver.must_stop = self._driver.knows_that_it_was_replaced
            yield answer

    def close(self) -> None:
        """Nothing to let go of."""

    def _send(self, task: MergeTask, number: int, mail: Mailbox) -> None:
        random, world = self._world.random, self._world
        self._start_worker(task, number, mail)
        if self._disturbed and random.random() < 0.05:
            world.count("task done twice")
            self._start_worker(task, number, mail)
        if self._disturbed and random.random() < 0.1:
            lost = (number, Failure(WorkerLost("given up"), node_lost=random.random() < 0.5))
            world.count("node lost" if lost[1].node_lost else "worker given up")
            world.start(self._driver, lambda: mail.send(lost), after=random.uniform(0, 5))

    def _start_worker(self, task: MergeTask, number: int, mail: Mailbox) -> None:
        random, world = self._world.random, self._world
        process = world.process("W")
        bad = self._disturbed and self._schedule.bad_memory and random.random() < 0.2
        ended = False

        def run() -> None:
            nonlocal ended
            answer: Any
            try:
                answer = _merge(self._schedule, process, task, bad)
            except MergeyardError as error:
                answer = Failure(error)
            ended = True
            if not self._driver.alive:
                world.count("worker of a dead driver finished")
            mail.send((number, answer))
            process.end()

        def died() -> None:
            if not ended and self._driver.alive:
                lost = (number, Failure(WorkerLost("died")))
                world.start(self._driver, lambda: mail.send(lost), after=random.uniform(0, 20))

        process.when_dead.append(died)
        if self._disturbed:
            self._schedule._troubled(process)
            if random.random() < 0.5:
                self._driver.when_dead.append(process.end)
        else:
            self._driver.when_dead.append(process.end)
        world.start(process, run, after=0.01)


def _merge(schedule: Schedule, process: Process, task: MergeTask, bad: bool) -> list[Receipt]:
    """`workers.merging.merge_task` with simulated arithmetic."""
    store = FaultyStore(schedule.store, process, schedule.seen)
    with ExitStack() as stack:
        writers = [stack.enter_context(ShardWriter(store, point, task.tensors, _nothing)) for point in task.points]
        header = header_bytes([(tensor.name, tensor.dtype, tensor.shape) for tensor in task.tensors])
        for writer in writers:
            writer.begin(header)
            for tensor in task.tensors:
                data = merged_bytes(writer.point.settings[tensor.setting], tensor)
                data = bytes([data[0] ^ 1]) + data[1:] if bad else data
                writer.hash(data)
                writer.write(data)
        schedule.world.sleep(schedule.world.random.uniform(0.1, 3.0))
        receipts: list[Receipt] = []
        for writer in writers:
            try:
                receipts.append(writer.publish([], task.bytes_read, 0.1))
            except CorruptData:
                schedule.world.count("contradiction noticed")
                raise
            schedule.note_published(receipts[-1])
        return receipts


def _nothing(read: int, written: int) -> None:
    """Nobody watches."""


@contextmanager
def _standing_in(schedule: Schedule) -> Generator[None]:
    """Puts the world's clock, threads, processes and network where the code names the real ones."""
    world = schedule.world
    stores = {schedule.store.url: schedule.store}
    nonces = count()

    def open_simulated(url: str) -> FaultyStore:
        inner: Any = stores.get(url) or open_store(url)
        return FaultyStore(inner, world.current, schedule.seen if url in stores else _unseen)

    def stat(number: int) -> SimpleNamespace:
        process = world.processes[number]
        begins, ends = process.paused
        state = "T" if begins <= world.now < ends else "S"
        return SimpleNamespace(state=state, started="at boot" if process.alive else None)

    of_the_lease = {
        "time": Time(world),
        "threading": Threading(world),
        "secrets": SimpleNamespace(token_hex=lambda size: f"{next(nonces):032x}"),
        "os": SimpleNamespace(getpid=lambda: world.current.number),
        "_machine": lambda: world.current.machine,
        "_process": stat,
        "_exists": lambda number: world.processes[number].alive,
    }
    with (
        patch.multiple(orchestrator.records.lease, **of_the_lease),
        patch.multiple(orchestrator.records.ledger, open_store=open_simulated, ThreadPoolExecutor=Inline),
        patch.object(orchestrator.planning.beside, "open_store", open_simulated),
        patch.object(orchestrator.merging.gathering, "ThreadPoolExecutor", Inline),
        patch.object(workers.checkpoints.hashing, "ThreadPoolExecutor", Inline),
    ):
        yield


def _unseen(process: Process, operation: str, key: str) -> None:
    """Parents do not change."""
