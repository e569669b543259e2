"""A world of its own: processes that die, threads, a clock that only the world moves; the same seed, the same world.

Every simulated thread is a greenlet. It runs until it sleeps or waits, and it sleeps at every operation on a store, so
that the order of all operations of all processes follows from the seed alone.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent, greenlet

MOST_STEPS = 50_000


class Died(BaseException):
    """Unwinds a process that is dead: whatever it still tries to do has no effect."""


class Wrong(AssertionError):
    """The system broke one of its promises."""


class Process:
    """What dies at once: its threads, and nothing that it has written."""

    def __init__(self, world: SimulatedWorld, number: int, machine: str) -> None:
        self.world, self.number, self.machine = world, number, machine
        self.alive = True
        self.steps_left: int | None = None
        self.paused = (0.0, 0.0)
        self.cut_off = (0.0, 0.0)
        self.loss_rate = 0.0
        self.threads: list[greenlet] = []
        self.when_dead: list[Callable[[], None]] = []
        self.epoch: int | None = None
        self.knows_that_it_was_replaced = False
        self.must_stop = False

    def end(self) -> None:
        """The process is no more, by its own end or by a kill."""
        if not self.alive:
            return
        self.alive = False
        for tell in self.when_dead:
            tell()

    def count_step(self) -> None:
        """Lets the process die at the step that the schedule chose."""
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left < 0:
                self.world.count("process killed")
                self.end()
        if not self.alive:
            raise Died


class SimulatedWorld:
    """Runs simulated threads in the order of their clock."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.steps = 0
        self.counts: dict[str, int] = {}
        self.processes: dict[int, Process] = {}
        self._queue: list[tuple[float, int, greenlet, int]] = []
        self._order = itertools.count()
        self._tickets: dict[greenlet, int] = {}
        self._owners: dict[greenlet, Process] = {}
        self._hub = getcurrent()

    def count(self, what: str) -> None:
        """Takes note that something happened."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def process(self, machine: str) -> Process:
        """A new process, without a thread yet."""
        number = 1000 + len(self.processes)
        self.processes[number] = Process(self, number, machine)
        return self.processes[number]

    @property
    def current(self) -> Process:
        """The process that runs now."""
        return self._owners[getcurrent()]

    def start(self, process: Process, function: Callable[[], None], after: float = 0.0) -> None:
        """A thread of the process that begins in `after` seconds."""

        def run() -> None:
            try:
                if process.alive:
                    function()
            except Died:
                pass
            finally:
                del self._owners[thread], self._tickets[thread]
                process.threads.remove(thread)

        thread = greenlet(run, self._hub)
        self._owners[thread] = process
        process.threads.append(thread)
        self._wake(thread, self.now + after)

    def sleep(self, seconds: float) -> None:
        """The current thread goes on after so many seconds, or when it is woken."""
        thread = getcurrent()
        process = self._owners[thread]
        if not process.alive:
            raise Died
        self._wake(thread, self.now + seconds)
        self._hub.switch()
        if not process.alive:
            raise Died

    def wake(self, thread: greenlet) -> None:
        """Ends a thread's sleep now."""
        if thread in self._owners:
            self._wake(thread, self.now)

    def _wake(self, thread: greenlet, at: float) -> None:
        ticket = self._tickets[thread] = next(self._order)
        heapq.heappush(self._queue, (at, ticket, thread, ticket))

    def run_until(self, done: Callable[[], bool]) -> None:
        """Runs until that is so or nobody has anything left to do."""
        while self._queue and not done():
            at, _, thread, ticket = heapq.heappop(self._queue)
            if self._tickets.get(thread) != ticket:
                continue
            process = self._owners[thread]
            begins, ends = process.paused
            if process.alive and begins <= at < ends:
                self.count("process paused")
                self._wake(thread, ends)
                continue
            self.now = max(self.now, at)
            self.steps += 1
            if self.steps > MOST_STEPS:
                raise Wrong(f"nothing comes to an end in {MOST_STEPS} steps")
            thread.switch()

    def end(self) -> None:
        """Ends every process, so that no thread outlives its world."""
        for process in self.processes.values():
            process.alive = False
        while self._owners:
            thread = next(iter(self._owners))
            if thread.dead or not thread:
                self._owners.pop(thread)
            else:
                thread.throw(Died)


class Mailbox:
    """What one thread waits for and others send; in the order of arrival."""

    def __init__(self, world: SimulatedWorld) -> None:
        self._world = world
        self._letters: list[Any] = []
        self._reader: greenlet | None = None

    def send(self, letter: Any) -> None:
        """Puts a letter in."""
        self._letters.append(letter)
        if self._reader is not None:
            self._world.wake(self._reader)

    def receive(self, seconds: float) -> Any:
        """The next letter; None if there is none within so many seconds."""
        if not self._letters:
            self._reader = getcurrent()
            self._world.sleep(seconds)
            self._reader = None
        return self._letters.pop(0) if self._letters else None


# ---- what stands in for the standard library's modules where the code under test names them


class Time:
    """`time`, of which the code uses three functions."""

    def __init__(self, world: SimulatedWorld) -> None:
        self._world = world
        self.sleep = world.sleep

    def monotonic(self) -> float:
        """The world's clock."""
        return self._world.now

    time = monotonic


class Threading:
    """`threading`, of which the code uses events, locks and threads."""

    def __init__(self, world: SimulatedWorld) -> None:
        self.Event = lambda: Event(world)
        self.Lock = lambda: Lock(world)
        self.Thread = lambda target, name="", daemon=True: Thread(world, target)


class Event:
    """`threading.Event`."""

    def __init__(self, world: SimulatedWorld) -> None:
        self._world = world
        self._set = False
        self._waiting: list[greenlet] = []

    def is_set(self) -> bool:
        """Whether it happened."""
        return self._set

    def set(self) -> None:
        """It happens."""
        self._set = True
        for thread in self._waiting:
            self._world.wake(thread)
        self._waiting.clear()

    def clear(self) -> None:
        """It has not happened."""
        self._set = False

    def wait(self, timeout: float = 3600.0) -> bool:
        """Waits for it, `timeout` seconds at most."""
        if not self._set:
            self._waiting.append(getcurrent())
            self._world.sleep(timeout)
        return self._set


class Lock:
    """`threading.Lock`, as `with` uses it."""

    def __init__(self, world: SimulatedWorld) -> None:
        self._world = world
        self._free = Event(world)
        self._free.set()

    def __enter__(self) -> None:
        while not self._free.is_set():
            self._free.wait()
        self._free.clear()

    def __exit__(self, *_: object) -> None:
        self._free.set()


class Thread:
    """`threading.Thread`."""

    def __init__(self, world: SimulatedWorld, target: Callable[[], None]) -> None:
        self._world, self._target = world, target
        self._ended = Event(world)

    def start(self) -> None:
        """Begins to run it in the process that runs now."""

        def run() -> None:
            try:
                self._target()
            finally:
                self._ended.set()

        self._world.start(self._world.current, run)

    def join(self, timeout: float) -> None:
        """Waits for its end."""
        self._ended.wait(timeout)


class Inline:
    """`ThreadPoolExecutor` that does one thing after the other, each a step of its own."""

    def __init__(self, workers: int, name: str) -> None:
        pass

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, function: Callable[[Any], Any], values: Any) -> list[Any]:
        """The results, in order."""
        return [function(value) for value in values]
