"""A planned set of items: its size, cost and digest, known before any item is built."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.errors import BadInput, MergeyardError
from jobs.evaluation_tasks import PLAINLY, Generation
from workers.benchmarks.items import Item, write_items
from workers.benchmarks.texts.filling import TooShort
from workers.storage import open_store

PROBED = 8192
"""Tokens at which it is tried whether a task can be asked at greater lengths: from 4,096 on, all prompts are alike."""


@dataclass(frozen=True, slots=True)
class PlannedSet:
    """A set that can be built: its identity, the digest of its inputs, and a function that makes a file of its items.

    `count` items are asked of everyone, `made` are made at first. `grows` where more can be made later, as every item
    depends on its own number alone. `check` builds as little as shows that it can be built, and raises `BadInput` if it
    cannot. `superseded` are the digests that earlier versions gave other items of the same job. `place` is the line of
    the job file that asks for it. `share` neighbours are never parted; `questions` of them ask about one haystack.
    `generation` says how an item is answered, `new_tokens` with how many tokens at the most, its thought apart.
    It is not `limited` where the items set that number themselves, and `new_tokens` is a forecast, or 0.
    `too_long` questions of the task are longer than every length; the task's first set has their number.
    """

    benchmark: str
    task: str
    length: int
    count: int
    made: int
    digest: str
    build: Callable[[range], bytes]
    place: str
    share: int = 1
    questions: int = 1
    grows: bool = False
    suffix: Literal["parquet", "json"] = "parquet"
    check: Callable[[], object] = lambda: None
    superseded: tuple[str, ...] = ()
    generation: Generation = PLAINLY
    new_tokens: int = 0
    limited: bool = True
    too_long: int = 0

    @property
    def longest(self) -> int:
        """Tokens of context that an item takes at the most, thought and answer included; 0 if it is not known."""
        return self.length and self.length + self.generation.budget

    @property
    def tokens(self) -> int:
        """The most tokens that one item costs: its prompt once, its thoughts and answers; 0 if it is not known."""
        return self.length and self.length - self.new_tokens + self.generated

    @property
    def generated(self) -> int:
        """The most tokens that are generated for one item; 0 if it is not known."""
        return self.length and self.generation.samples * (self.generation.budget + self.new_tokens)

    @property
    def folder(self) -> str:
        """Where its files lie in a run."""
        return f"items/{self.digest}/"

    def key(self, first: int, last: int) -> str:
        """The file of items `[first, last)`."""
        return f"{self.folder}{first:06d}-{last:06d}.{self.suffix}"


class Reader:
    """Reads the texts that a job names: by URL, or by a path relative to `folder`."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path.cwd()

    def path(self, text: str) -> str:
        """A URL as it is; a path made absolute."""
        return text if "://" in text else str(self._folder / Path(text).expanduser())

    def read(self, text: str, place: str) -> bytes:
        """The content; `BadInput` names the place in the job file."""
        path = self.path(text)
        try:
            if "://" not in path:
                return Path(path).read_bytes()
            folder, _, name = path.rpartition("/")
            return bytes(open_store(folder).read(name))
        except OSError as error:
            raise BadInput(f"{place}: {path} cannot be read ({error.strerror}); give a text file") from None
        except MergeyardError as error:
            raise BadInput(f"{place}: {error}") from error

    def names(self, text: str, place: str) -> list[str]:
        """The files in a folder, by their paths in it; `BadInput` if there are none."""
        path = self.path(text)
        try:
            found = sorted(info.key for info in open_store(path).list())
        except MergeyardError as error:
            raise BadInput(f"{place}: {error}") from error
        if not found:
            raise BadInput(f"{place}: {path} has no files; give the folder of the published data")
        return found

    def prose(self, text: str, place: str) -> str:
        """The content as text."""
        try:
            return self.read(text, place).decode("utf-8")
        except UnicodeDecodeError:
            raise BadInput(f"{place}: {text} is not text in UTF-8; give prose") from None


@contextmanager
def located(place: str) -> Generator[None]:
    """Bad input is told with the line of the job file that asks for it."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{place}: {error}") from error


Items = Callable[[int, range], list[Item]]
"""From (length, numbers) to items."""


def file_of(items: Items, length: int) -> Callable[[range], bytes]:
    """The `build` of a set whose items are made by a rule."""
    return lambda wanted: write_items(items(length, wanted))


def check_of(items: Items, length: int, count: int) -> Callable[[], object]:
    """The `check` of such a set: its first `count` items show whether it can be built."""
    return lambda: probe(length, lambda shorter: items(shorter, range(count)))


def probe(length: int, build: Callable[[int], object]) -> None:
    """Builds at the length, or at a shorter one that shows the same."""
    try:
        build(min(length, PROBED))
    except TooShort as error:
        task, _, smallest = error.args
        if smallest > length:
            raise TooShort(task, length, smallest) from None
