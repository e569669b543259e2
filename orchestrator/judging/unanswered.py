"""Answers that say little about a model: a run of empty, cut or refused ones, say, scores like a bad model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from jobs.evaluation_tasks import ScoreRow

DOUBTED = 0.1
"""The share of unanswered questions above which a verdict comes with a warning."""

REFUSED = 0.5
"""The share of unanswered questions above which nothing is recommended, and nothing passes."""


@dataclass(frozen=True, slots=True)
class Unanswered:
    """How many of the questions `asked` got no answer, by the statuses of `jobs.evaluation_tasks.Status`.

    A cut answer counts only where none of the model's cut answers to its task scored: a model without instructions
    writes on after a right answer, and its limit was enough. `silent` of the cut ones have no text. An answer is
    `unended` where the thought before it did not end.
    """

    asked: int
    empty: int
    cut: int
    filtered: int
    failed: int
    silent: int
    unended: int = 0

    @property
    def count(self) -> int:
        """All unanswered questions."""
        return self.empty + self.cut + self.unended + self.filtered + self.failed

    @property
    def share(self) -> float:
        """Their share of the questions, from 0 to 1."""
        return self.count / max(1, self.asked)

    @property
    def refused(self) -> bool:
        """Whether there are too many to recommend or pass a model."""
        return self.share > REFUSED

    def words(self, model: str) -> str:
        """One clause, such as `of ties, 12 of 12 answers are empty`."""
        silent = f" ({self.silent} cut at their limit of new tokens)" if self.silent else ""
        named = {
            f"empty{silent}": self.empty + self.silent,
            "cut at their limit of new tokens": self.cut - self.silent,
            "cut inside their thought": self.unended,
            "filtered by the server": self.filtered,
            "refused by the server": self.failed,
        }
        kinds = [(count, kind) for kind, count in named.items() if count]
        said = kinds[0][1] if len(kinds) == 1 else "lost: " + ", ".join(f"{count} {kind}" for count, kind in kinds)
        return f"of {model}, {self.count} of {self.asked} answers are {said}"

    def document(self) -> dict[str, int]:
        """For `--json`."""
        return asdict(self)


def unanswered(rows: Iterable[ScoreRow]) -> Unanswered:
    """Of one model's answers; several metrics of one item are one answer, and broken logits are counted elsewhere."""
    return _counted(*_answers(rows))


def unanswered_cells(rows: Iterable[ScoreRow]) -> list[dict[str, str | int]]:
    """The counts of every benchmark, task and length that has an unanswered question, for `--json`."""
    answers, scoring = _answers(rows)
    cells: dict[tuple[str, str, int], list[ScoreRow]] = {}
    for row in answers:
        cells.setdefault((row.benchmark, _task(row), row.length), []).append(row)
    found = {cell: _counted(of_cell, scoring) for cell, of_cell in cells.items()}
    return [
        {"benchmark": benchmark, "task": task, "length": length, **counts.document()}
        for (benchmark, task, length), counts in found.items()
        if counts.count
    ]


def _answers(rows: Iterable[ScoreRow]) -> tuple[list[ScoreRow], set[tuple[str, str]]]:
    """One row for each answer, and the tasks in which a cut answer scored."""
    kept = [row for row in rows if row.finite]
    scoring = {(row.benchmark, _task(row)) for row in kept if row.status == "cut" and row.score > 0}
    answers = {
        (row.benchmark, _task(row), row.length, row.items, row.item, row.repeat, row.sample): row for row in kept
    }
    return [*answers.values()], scoring


def _counted(answers: Sequence[ScoreRow], scoring: set[tuple[str, str]]) -> Unanswered:
    lost = [row for row in answers if row.status != "cut" or (row.benchmark, _task(row)) not in scoring]
    counts = Counter(row.status for row in lost)
    silent = sum(row.status == "cut" and not row.answer.strip() for row in lost)
    return Unanswered(
        len(answers), counts["empty"], counts["cut"], counts["filtered"], counts["failed"], silent, counts["unended"]
    )


def _task(row: ScoreRow) -> str:
    """The task without the metric that the harness adds to it."""
    return row.task.partition(":")[0]
