"""Nights from a user's chair, on the tiny parents: what is caught, blessed, told, finished and refused."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from jobs.errors import CorruptData, RunBusy
from jobs.evaluation_tasks import EvaluationTask, ScoreRow
from jobs.job import GateSpec, TokensSpec
from jobs.sealing import unsealed
from orchestrator.cluster.scripted import ScriptedEvaluators
from orchestrator.judging.samples import student_quantile
from orchestrator.nightly import webhook
from orchestrator.nightly.book import Blessed, Book, Night
from orchestrator.nightly.page import nights_page
from orchestrator.nightly.tonight import _by_length, _moved_since, _weights, gates_of
from orchestrator.nightly.words import headline, junit, reasons
from orchestrator.records.lease import Lease
from tests.benchmarks.thirty_nights import JOB, NightlyFolder, Told
from tests.orchestrator.conftest import Ended, edit, files_under
from tests.orchestrator.nights import REASON, a_night
from tests.orchestrator.scores import row, rows
from tests.orchestrator.scripts import scripted, turned_down
from workers.benchmarks.items import Item
from workers.storage import open_store

Mergeyard = Callable[..., Ended]

SMALL = {
    "evaluate": {"ruler": {"tasks": ["niah_single_1"], "lengths": [1024], "items": 12}},
    "gate": {"baseline": "released", "margin": 30, "budget": 12},
}
"""Twelve items at a fixed number: with no difference, an error of √(0.3·0.7/12) = 0.13 within a margin of 0.3."""

LARGER = {
    "evaluate": {"ruler": {"tasks": ["niah_single_1"], "lengths": [1024], "items": 24}},
    "gate": {"baseline": "released", "margin": 30, "budget": 24},
}
"""So many that three losses in four are surely more than the margin."""


class Chat:
    """A webhook's server: what it was told, and the status it answers with, next to next."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.answers: list[int | tuple[int, bytes, str]] = []
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Type"] == "application/json"
                chat.told.append(json.loads(body))
                answer = chat.answers.pop(0) if chat.answers else 200
                status, said, wait = (answer, b"", "0") if isinstance(answer, int) else answer
                self.send_response(status)
                self.send_header("Retry-After", wait)
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, format: str, *args: object) -> None:
                del format, args

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/services/T0/secret"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chat]:
    """A webhook that listens, named in the environment; pauses between tries are short."""
    server = Chat()
    monkeypatch.setenv(webhook.VARIABLE, server.url)
    monkeypatch.setattr(webhook, "PAUSE_SECONDS", 0.01)
    yield server
    server.close()


@pytest.fixture(scope="module")
def first_night(tmp_path_factory: pytest.TempPathFactory) -> tuple[NightlyFolder, Told]:
    """A yard after its first night, for tests to copy; nobody writes into it."""
    yard = NightlyFolder(tmp_path_factory.mktemp("first"), **SMALL)
    with scripted(turned_down):
        return yard, yard.night(1)


@pytest.fixture
def after_first(first_night: tuple[NightlyFolder, Told], tmp_path: Path) -> Path:
    """A copy of that yard's nights, as the output of the same job: `nightly JOB --output tmp_path/copy`."""
    shutil.copytree(first_night[0].run, tmp_path / "copy" / "soup")
    return tmp_path / "copy"


def book_at(output: Path) -> Book:
    return Book(open_store(output / "soup"))


# ---- nights


@pytest.mark.usefixtures("real_model")
def test_a_regression_is_caught_and_told_and_nothing_else_is(tmp_path: Path, chat: Chat) -> None:
    yard = NightlyFolder(tmp_path, **LARGER)
    told = list(yard.nights(4, planted={3}, quiet={2}))
    assert [(night.code, night.facts["ending"]) for night in told] == [
        (0, "recorded"),
        (0, "unchanged"),
        (1, "recorded"),
        (0, "recorded"),
    ]
    first, _, fallen, last = (night.facts for night in told)
    assert fallen["blessed"] == first["blessed"], "the pointer did not move"
    assert fallen["night"]["verdicts"]["blessed"]["lines"][0]["difference"] < -50, "base finds nothing at 1,024 tokens"
    assert fallen["night"]["point"] is None and not list(yard.run.glob("nights/0002-*/points")), "nothing was written"
    assert last["blessed"]["epoch"] == 2 and last["blessed"]["weights"] == last["night"]["weights"]
    assert [night["night"]["changed"] for night in (first, fallen, last)] == [
        ["long", "fmt", "released"],
        ["long", "fmt"],
        ["long", "fmt"],
    ]
    rules = [[found["rule"] for found in night["night"]["verdicts"].values()] for night in (first, last)]
    asked = [[(rule["margin"], rule["alpha"], rule["verdicts"]) for rule in of] for of in rules]
    assert asked == [[(30, 0.05, 1)], [(30, 0.05, 2), (60, 0.05, 2)]], "the blessed merge, then the anchor"
    seeds = [json.loads(path.read_bytes())["seed"] for path in sorted(yard.run.glob("nights/*/report/evaluation.json"))]
    assert len(seeds) == len(set(seeds)) == 3, "every night has items of its own"
    assert [message["text"].split(": ")[2] for message in chat.told] == ["pass", "fail", "pass"]
    assert sorted(path.name for path in yard.run.glob("history/*")) == ["000001.json", "000002.json", "000003.json"]
    page = (yard.run / "index.html").read_text()
    assert page.count('<span class="outcome fail">') == 1 and page.count('<span class="outcome pass">') == 2
    assert (yard.run / "nights" / last["night"]["night"] / "report" / "index.html").is_file(), "the page links it"


@pytest.mark.heavy
@pytest.mark.usefixtures("real_model")
def test_thirty_nights(tmp_path: Path) -> None:
    told = list(NightlyFolder(tmp_path).nights(30, planted={17}, quiet=range(5, 31, 5)))
    assert [night.night for night in told if night.code != 0] == [17]
    assert told[16].code == 1 and told[16].facts["night"]["outcome"] == "fail"
    assert [night.night for night in told if night.facts["ending"] == "unchanged"] == [5, 10, 15, 20, 25, 30]
    assert told[-1].facts["blessed"]["epoch"] == 23, "30 nights, six of them quiet, one failed"


def test_the_first_night_is_judged_by_the_anchor(first_night: tuple[NightlyFolder, Told]) -> None:
    yard, told = first_night
    night, blessed = told.facts["night"], told.facts["blessed"]
    assert (told.code, night["outcome"], [*night["verdicts"]]) == (0, "pass", ["anchor"])
    assert night["verdicts"]["anchor"]["old"] == "released"
    assert (blessed["epoch"], blessed["night"], blessed["nonce"]) == (1, night["night"], night["nonce"])
    manifest = json.loads((Path(blessed["point"]) / "manifest.json").read_text())
    assert manifest["weights"] == blessed["weights"] == night["weights"]
    assert night["items"] == 4 * 12, "of the candidate, of long, of fmt and of the anchor"
    assert {*night["scores"]} == {"candidate", "anchor"} and {*night["scores"]["anchor"]} == {"overall", "1024"}
    again = yard.run / "nights" / night["night"]
    assert "baseline: released" in (again / "job.yaml").read_text().replace('"', "")


def with_another_margin(yard: NightlyFolder, output: Path) -> Path:
    """The same job but for its margin, which is something new to judge over the same parents."""
    job = output.parent / "job.yaml"
    job.write_text(yard.job.read_text().replace('"margin": 30', '"margin": 31'))
    return job


def test_the_same_weights_pass_without_being_compared(
    first_night: tuple[NightlyFolder, Told], after_first: Path, mergeyard: Mergeyard
) -> None:
    job = with_another_margin(first_night[0], after_first)
    ended = mergeyard("nightly", job, "--in-process", "--output", after_first)
    assert ended.code == 0 and "\n  the very model that is blessed\n  against the anchor released: " in ended.out
    assert ended.out.splitlines()[-2].endswith(": the job")
    (first, second), blessed = book_at(after_first).nights(), book_at(after_first).blessed()
    assert blessed is not None and (blessed.epoch, blessed.nonce) == (2, second.nonce)
    assert second.weights == first.weights and [*second.verdicts] == ["anchor"]


def test_answers_of_one_point_come_from_one_model_also_where_an_older_version_asked_some() -> None:
    def answers(*weights: str) -> list[ScoreRow]:
        return [row("p", "vt", 512, number, 1.0, weights=it) for number, it in enumerate(weights)]

    assert _weights(answers("cc", "blake3:aa", "cc", "blake3:aa"), "p") == "blake3:aa"
    for several in (("cc", "cd"), ("cc", "blake3:aa", "blake3:ab")):
        with pytest.raises(CorruptData, match=rf"^the answers of p come from {len(several)} different weights"):
            _weights(answers(*several), "p")


def test_a_pointer_that_somebody_else_moved_stays_where_it_is(
    first_night: tuple[NightlyFolder, Told], after_first: Path, mergeyard: Mergeyard, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = with_another_margin(first_night[0], after_first)
    pointer = after_first / "soup" / "blessed.json"
    moved: dict[str, Any] = {}

    def moving(self: ScriptedEvaluators) -> None:
        moved.update(edit(pointer, night="by hand", nonce="somebody else's"))

    monkeypatch.setattr(ScriptedEvaluators, "close", moving)
    ended = mergeyard("nightly", job, "--in-process", "--output", after_first)
    assert ended.code == 75 and "blessed.json: moved by another writer during the night" in ended.err
    assert unsealed(pointer.read_bytes()) == moved
    assert len(book_at(after_first).nights()) == 1, "the next call compares with what is blessed now"


def test_a_pointer_that_moved_between_its_check_and_the_blessing_is_judged_against_by_the_next_call(
    first_night: tuple[NightlyFolder, Told],
    after_first: Path,
    mergeyard: Mergeyard,
    chat: Chat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = with_another_margin(first_night[0], after_first)
    pointer, record = after_first / "soup" / "blessed.json", Book.record
    moved: dict[str, Any] = {}

    def recording(book: Book, night: Night) -> None:
        record(book, night)
        moved.update(edit(pointer, night="by hand", nonce="somebody else's"))

    monkeypatch.setattr(Book, "record", recording)
    ended = mergeyard("nightly", job, "--in-process", "--output", after_first)
    assert ended.code == 75 and "blessed.json: moved by another writer during the night" in ended.err
    assert unsealed(pointer.read_bytes()) == moved and chat.told == [] and "is blessed" not in ended.out
    monkeypatch.undo()
    again = mergeyard("nightly", job, "--in-process", "--output", after_first, "--json")
    assert (again.code, again.facts["ending"], again.facts["night"]["number"]) == (0, "recorded", 3)
    assert again.facts["night"]["judged_against"] == "somebody else's"
    assert again.facts["blessed"]["nonce"] == again.facts["night"]["nonce"]


def test_without_the_pointer_the_same_parents_are_judged_anew_from_the_anchor(
    first_night: tuple[NightlyFolder, Told], after_first: Path, mergeyard: Mergeyard
) -> None:
    (after_first / "soup" / "blessed.json").unlink()
    call = ("nightly", first_night[0].job, "--in-process", "--output", after_first)
    ended = mergeyard(*call, "--json")
    night = ended.facts["night"]
    assert (ended.code, ended.facts["ending"], night["number"], night["judged_against"]) == (0, "recorded", 2, None)
    assert ended.facts["blessed"]["nonce"] == night["nonce"] and ended.facts["blessed"]["epoch"] == 2
    assert mergeyard(*call, "--json").facts["ending"] == "unchanged"


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"point": "/p"}', '{"point": 1, "weights": "", "night": "", "epoch": 1, "nonce": ""}']
)
def test_a_pointer_that_is_none_is_one_line(
    first_night: tuple[NightlyFolder, Told], after_first: Path, mergeyard: Mergeyard, text: str
) -> None:
    (after_first / "soup" / "blessed.json").write_text(text)
    ended = mergeyard("nightly", first_night[0].job, "--in-process", "--output", after_first)
    assert ended.code == 1 and ended.err.count("\n") == 1
    assert re.search(r"blessed\.json: (damaged, not |not a pointer to a blessed)", ended.err)


def test_a_night_that_died_before_the_pointer_is_finished_first(
    first_night: tuple[NightlyFolder, Told], after_first: Path, mergeyard: Mergeyard, chat: Chat, tmp_path: Path
) -> None:
    pointer = after_first / "soup" / "blessed.json"
    blessed = pointer.read_bytes()
    pointer.unlink()
    shutil.rmtree(after_first / "soup" / "concluded")
    files = files_under(after_first / "soup" / "nights")
    call = ("nightly", first_night[0].job, "--in-process", "--output", after_first)
    ended = mergeyard(*call, "--junit", tmp_path / "night.xml")
    assert ended.code == 0 and "pass: long0.9_fmt0.1 is blessed" in ended.out, ended.err
    assert pointer.read_bytes() == blessed and len(chat.told) == 1
    assert ElementTree.parse(tmp_path / "night.xml").getroot()[0].get("name", "").endswith("against released")
    again = mergeyard(*call, "--junit", tmp_path / "again.xml")
    assert again.code == 0 and again.out.startswith("nothing has changed since night 0001-"), again.err
    assert len(chat.told) == 1 and pointer.read_bytes() == blessed, "never twice"
    assert (tmp_path / "again.xml").read_text() == (tmp_path / "night.xml").read_text()
    assert files_under(after_first / "soup" / "nights") == files, "nothing was asked or merged"


def failed(run: Path) -> None:
    """Turns the first night into one that failed, so that nothing is blessed."""
    edit(run / "history" / "000001.json", outcome="fail", epoch=None, point=None)
    (run / "blessed.json").unlink()


@pytest.mark.parametrize(("outcome", "code"), [("fail", 1), ("inconclusive", 3)])
def test_a_night_that_did_not_pass_keeps_its_exit_code_until_something_changes(
    first_night: tuple[NightlyFolder, Told], after_first: Path, mergeyard: Mergeyard, outcome: str, code: int
) -> None:
    failed(after_first / "soup")
    edit(after_first / "soup" / "history" / "000001.json", outcome=outcome)
    call = ("nightly", first_night[0].job, "--in-process", "--output", after_first)
    for _ in range(2):
        ended = mergeyard(*call)
        assert ended.code == code, ended.err
        assert ended.out.startswith("nothing has changed since night 0001-") and f"(that ended: {outcome})" in ended.out


def test_going_back_to_a_night_is_kept_with_who_and_when_and_stands(
    first_night: tuple[NightlyFolder, Told], after_first: Path, mergeyard: Mergeyard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    job, book = with_another_margin(first_night[0], after_first), book_at(after_first)
    call = ("nightly", job, "--in-process", "--output", after_first)
    assert mergeyard(*call).code == 0
    first, second = book.nights()
    assert first.point != second.point
    ended = mergeyard(*call, "--bless", first.night)
    assert ended.code == 0, ended.err
    back = book.blessed()
    assert back is not None and (back.point, back.weights, back.epoch) == (first.point, first.weights, 3)
    assert back.by.startswith("ada@") and datetime.fromisoformat(back.at) <= datetime.now(UTC)
    assert ended.out == f"blessed: {first.point} (night {first.night}, by {back.by} at {back.at})\n"
    assert f"moved back by {back.by} at {back.at}" in (after_first / "soup" / "index.html").read_text()
    assert mergeyard(*call, "--bless", 1).code == 0 and book.blessed() == back, "it is there already"
    again = mergeyard(*call)
    assert again.code == 0 and again.out.startswith(f"nothing has changed since night {second.night}")
    assert book.blessed() == back, "the night that a person turned down is not blessed again"
    job.write_text(job.read_text().replace('"margin": 31', '"margin": 32'))
    assert mergeyard(*call).code == 0
    third, now = book.nights()[-1], book.blessed()
    assert third.judged_against == back.nonce and now is not None and (now.epoch, now.nonce) == (4, third.nonce)
    kept = unsealed((after_first / "soup" / "blessings" / "000003.json").read_bytes())
    assert (kept["by"], kept["at"], kept["night"]) == (back.by, back.at, first.night)


def test_a_night_that_cannot_be_blessed_is_refused_and_the_remedy_works(
    first_night: tuple[NightlyFolder, Told], after_first: Path, mergeyard: Mergeyard
) -> None:
    book, run = book_at(after_first), after_first / "soup"
    [night] = book.nights()
    call = ("nightly", first_night[0].job, "--output", after_first, "--bless")
    ended = mergeyard(*call, "0009-abcdef01")
    assert ended.code == 2
    assert ended.err == f"mergeyard: {run}: there is no night 0009-abcdef01; bless a night that passed: {night.night}\n"
    assert mergeyard(*call, ended.err.split()[-1]).code == 0
    assert mergeyard(*call, "").code == 2
    (run / "blessed.json").write_text("{")
    damaged = mergeyard(*call, night.night)
    assert damaged.code == 1 and "remove it, then bless a night with `--bless NIGHT`" in damaged.err
    (run / "blessed.json").unlink()
    assert mergeyard(*call, night.night).code == 0
    assert night.point is not None
    shutil.move(night.point, after_first / "away")
    gone = mergeyard(*call, night.night)
    shutil.move(after_first / "away", night.point)
    assert gone.code == 2 and f"night {night.night}: its point {night.point} cannot be read (" in gone.err
    assert gone.err.endswith("; no other night has passed\n")
    failed(run)
    ended = mergeyard(*call, night.night)
    assert ended.code == 2
    assert ended.err == f"mergeyard: {run}: night {night.night} ended: fail; no other night has passed\n"
    assert not (run / "blessed.json").exists()


@pytest.mark.parametrize(
    ("last", "nonce", "moved"),
    [
        (a_night(2, "fail", "nonce 1"), "nonce 1", False),
        (a_night(2, "fail", "nonce 1"), "by hand", True),
        (a_night(2, "pass", "nonce 1"), "nonce 2", False),
        (a_night(2, "pass", "nonce 1"), "by hand", False),
        (a_night(2, "pass", "nonce 1"), None, True),
        (a_night(1, "fail"), None, False),
    ],
)
def test_a_night_is_judged_again_if_its_reference_moved_and_nobody_turned_it_down(
    last: Night, nonce: str | None, moved: bool
) -> None:
    blessed = None if nonce is None else Blessed("/p", "w", "0001-abcdef01", 1, nonce)
    assert _moved_since(last, blessed) is moved


def test_a_night_that_was_recorded_and_not_told_of_is_told_of_with_its_exit_code(
    first_night: tuple[NightlyFolder, Told], after_first: Path, mergeyard: Mergeyard, chat: Chat
) -> None:
    shutil.rmtree(after_first / "soup" / "concluded")
    failed(after_first / "soup")
    call = ("nightly", first_night[0].job, "--in-process", "--output", after_first)
    assert mergeyard(*call).code == 1 and len(chat.told) == 1
    again = mergeyard(*call)
    assert again.code == 1 and "that ended: fail" in again.out and len(chat.told) == 1


def test_two_at_once_are_one(first_night: tuple[NightlyFolder, Told], after_first: Path, mergeyard: Mergeyard) -> None:
    with Lease(book_at(after_first).store, "lease.json", seconds=6, heartbeat=0.2):
        ended = mergeyard("nightly", first_night[0].job, "--in-process", "--output", after_first)
    assert ended.code == 75 and "already driven by process" in ended.err


def test_a_blessed_point_that_is_gone_is_named_with_the_way_out(
    first_night: tuple[NightlyFolder, Told], after_first: Path, mergeyard: Mergeyard
) -> None:
    job = with_another_margin(first_night[0], after_first)
    pointer = after_first / "soup" / "blessed.json"
    found = unsealed(pointer.read_bytes())
    for change, said in (
        ({"point": f"{after_first}/gone"}, "cannot be read"),
        ({"weights": f"blake3:{0:064}"}, "has other weights than that night"),
    ):
        edit(pointer, **{**found, **change})
        ended = mergeyard("nightly", job, "--in-process", "--output", after_first)
        assert ended.code == 2 and said in ended.err and len(ended.err.splitlines()) == 1, ended.err
        assert "put it back, bless another night with `--bless NIGHT`, or remove blessed.json" in ended.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": None}, "nightly.yaml: a nightly job needs a gate to pass; add `gate: {baseline: …}`"),
        (
            {"point": "blessed", "gate": {"baseline": "blessed", "margin": 30}},
            "every night calls the last merge that passed blessed; give the baseline another name",
        ),
        ({"engine": {"name": "openai", "url": "http://127.0.0.1:9"}}, "serves one model, a night compares several"),
    ],
)
def test_a_job_that_is_none_for_every_night_is_refused(
    tmp_path: Path, mergeyard: Mergeyard, change: dict[str, Any], message: str
) -> None:
    yard = NightlyFolder(tmp_path)
    lines = yard.job.read_text().splitlines()
    kept = [line for line in lines if line.split(":")[0] not in change]
    if "gate" in change:  # the anchor is a parent of the gate's alone
        kept = [line.replace(f', "released": "{tmp_path}/parents/released"', "") for line in kept]
    kept += [f"{key}: {json.dumps(value)}" for key, value in change.items() if value is not None]
    yard.job.write_text("\n".join(kept))
    ended = mergeyard("nightly", yard.job, "--in-process")
    assert ended.code == 2 and message in ended.err and not yard.run.exists(), ended.err


def test_a_parent_cannot_be_called_blessed(tmp_path: Path, mergeyard: Mergeyard) -> None:
    yard = NightlyFolder(tmp_path)
    yard.job.write_text(yard.job.read_text().replace('"released"', '"blessed"'))
    ended = mergeyard("nightly", yard.job, "--in-process")
    assert ended.code == 2 and "nightly.yaml:6: blessed is the reserved name of the last merge" in ended.err
    assert not yard.run.exists()


def test_a_point_called_blessed_is_judged_against_the_merge_that_was_blessed(tmp_path: Path) -> None:
    yard = NightlyFolder(tmp_path, point="blessed", **SMALL)
    first = yard.night(1).facts
    assert first["blessed"]["point"].endswith("/points/blessed")
    yard.train("fmt", 2)
    second = yard.night(2).facts["night"]
    assert second["weights"] != first["night"]["weights"]
    verdicts = {who: (found["new"], found["old"]) for who, found in second["verdicts"].items()}
    assert verdicts == {"blessed": ("blessed", "blessed (parent)"), "anchor": ("blessed", "released")}


# ---- what a night comes to


def test_a_drift_that_no_single_night_shows_ends_at_twice_the_margin(tmp_path: Path) -> None:
    """Each night loses 8.3 points, within the margin of 20 points."""
    right = {"released": 120.0}

    def answer(task: EvaluationTask, item: Item) -> float:
        name = "tonight" if task.point.startswith("long0.9") else task.point
        return float(item.index % 120 < right.get(name, 0))

    gate = {"baseline": "released", "margin": 20, "budget": 120}
    ruler = {"tasks": ["niah_single_1"], "lengths": [256], "items": 120}
    yard = NightlyFolder(tmp_path, gate=gate, evaluate={"ruler": ruler})
    outcomes: list[list[str]] = []
    for number in range(1, 6):
        yard.train("long", number)
        right["tonight"] = 120 - 10 * (number - 1)
        with scripted(answer):
            night = yard.night(number).facts["night"]
        outcomes.append([night["outcome"], *(found["outcome"] for found in night["verdicts"].values())])
        if night["outcome"] == "pass":
            right["blessed"] = right["tonight"]
    assert outcomes == [["pass", "pass"], *[["pass", "pass", "pass"]] * 3, ["inconclusive", "pass", "inconclusive"]]


@pytest.mark.parametrize(("at_most", "limits"), [(0.5, [None, 0.5]), (1.5, [1.5, 2.0])])
def test_tokens_are_saved_over_the_anchor_and_not_every_night_again(at_most: float, limits: list[float | None]) -> None:
    gate = GateSpec(baseline="released", margin=20, output_tokens=TokensSpec(at_most=at_most))
    found = gates_of(gate, {"blessed": "blessed", "anchor": "released"}, first=False)
    assert [None if spec.output_tokens is None else spec.output_tokens.at_most for spec in found.values()] == limits
    assert [(spec.baseline, spec.margin) for spec in found.values()] == [("blessed", 20), ("released", 40)]
    assert gates_of(gate, {"anchor": "released"}, first=True) == {"anchor": gate}


# ---- records and the pointer


@pytest.fixture(params=["folder", "memory", "s3"])
def book(request: pytest.FixtureRequest, tmp_path: Path) -> Book:
    """An empty book, on each kind of store that can be moved by compare-and-swap here."""
    if request.param == "s3":
        return Book(open_store(request.getfixturevalue("s3_url")))
    return Book(open_store(tmp_path / "nights" if request.param == "folder" else f"memory://{tmp_path.name}"))


def test_a_record_is_read_as_it_was_written(book: Book) -> None:
    nights = [a_night(1), a_night(2, "fail", "nonce 1"), a_night(10, "inconclusive", "nonce 1")]
    for night in reversed(nights):
        book.record(night)
    assert book.nights() == nights


def test_a_night_is_recorded_once(book: Book) -> None:
    book.record(a_night(1))
    with pytest.raises(RunBusy, match="another driver has recorded this night"):
        book.record(a_night(1, "fail"))
    assert book.nights() == [a_night(1)]


def test_the_pointer_moves_from_night_to_night_and_never_back(book: Book) -> None:
    first, second = a_night(1), a_night(2, judged_against="nonce 1")
    assert book.unfinished(first) and not book.overtaken(first)
    book.bless(first)
    assert not book.unfinished(first) and book.unfinished(second)
    book.bless(first)
    book.bless(second)
    latest = Blessed(second.point or "", second.weights, "0002-abcdef01", 2, "nonce 2")
    assert book.blessed() == latest and not book.unfinished(second)
    for stale in (first, a_night(3, judged_against="nonce 1"), a_night(3)):
        assert not book.unfinished(stale) and book.overtaken(stale)
        with pytest.raises(RunBusy, match="moved by another writer"):
            book.bless(stale)
    assert book.blessed() == latest


def test_a_pointer_that_was_put_back_by_hand_stays_there(tmp_path: Path) -> None:
    book, first, second = Book(open_store(tmp_path)), a_night(1), a_night(2, judged_against="nonce 1")
    for night in (first, second):
        book.record(night)
        book.bless(night)
    edit(tmp_path / "blessed.json", point=first.point, weights=first.weights)
    assert not book.unfinished(second)
    book.bless(a_night(3, judged_against="nonce 2"))


def test_what_did_not_pass_is_never_blessed(book: Book) -> None:
    for outcome in ("fail", "inconclusive"):
        assert not book.unfinished(a_night(1, outcome))


def test_of_two_that_bless_at_once_one_does(book: Book) -> None:
    book.bless(a_night(1))
    nights = [a_night(number, judged_against="nonce 1") for number in range(2, 10)]
    refused: list[RunBusy] = []

    def bless(night: Night) -> None:
        try:
            book.bless(night)
        except RunBusy as error:
            refused.append(error)

    threads = [threading.Thread(target=bless, args=(night,)) for night in nights]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == len(nights) - 1


def test_the_interval_of_a_night_without_a_wrong_answer_does_not_collapse() -> None:
    # 12 right answers, and two right and two wrong more: 14/16 right, and a variance of 14·2/16³ (Agresti & Coull 1998)
    score = _by_length(rows("soup", [1.0] * 12))["overall"]
    assert (score.mean, score.high) == (100, 100) and score.low is not None
    assert score.low == pytest.approx(100 - 100 * student_quantile(0.975, 11) * (14 * 2 / 16**3) ** 0.5, abs=1e-3)


# ---- telling


def test_a_chat_is_told_in_slacks_form(chat: Chat) -> None:
    assert webhook.tell("soup: a < b & c", ["x" * 5000]) is None
    (message,) = chat.told
    assert message["text"] == "soup: a &lt; b &amp; c"
    assert [block["text"]["type"] for block in message["blocks"]] == ["mrkdwn"] * 2
    assert all(block["type"] == "section" and len(block["text"]["text"]) <= 3000 for block in message["blocks"])


def test_a_chat_that_is_busy_is_told_at_the_third_try(chat: Chat) -> None:
    chat.answers = [500, 503, 200]
    assert webhook.tell("text", []) is None and len(chat.told) == 3


def test_a_chat_is_given_its_pause_and_its_refusal_is_passed_on_at_once(chat: Chat) -> None:
    chat.answers = [(429, b"", "1")]
    began = time.monotonic()
    assert webhook.tell("text", []) is None and len(chat.told) == 2 and time.monotonic() - began > 1
    for answer, words in (
        ((410, b"channel_is_archived\x1b[2J", "0"), 'it answers 410: "channel_is_archived\\u001b[2J", 1 times'),
        ((404, b"no hook at /services/T0/secret", "0"), "it answers 404, 1 times"),
        ((429, b"busy", "3600"), 'it answers 429: "busy", 1 times'),
    ):
        chat.answers = [answer] * 3
        chat.told.clear()
        assert webhook.tell("text", []) == f"the webhook in MERGEYARD_WEBHOOK was not told: {words}"
        assert len(chat.told) == 1


@pytest.mark.parametrize("broken", ["500", "down", "file:///etc/secret", "http://[secret", "http://host:secret/"])
def test_a_chat_that_is_away_costs_a_warning_that_keeps_the_secret(
    broken: str, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "500":
        chat.answers = [500] * 3
    elif broken == "down":
        chat.close()
    else:
        monkeypatch.setenv(webhook.VARIABLE, broken)
    warning = webhook.tell("text", [])
    assert warning is not None and webhook.VARIABLE in warning and "\n" not in warning
    assert "secret" not in warning


def test_no_webhook_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(webhook.VARIABLE, raising=False)
    assert webhook.tell("text", []) is None


def test_a_chat_that_is_away_changes_no_exit_code_and_its_url_is_nowhere(
    first_night: tuple[NightlyFolder, Told], after_first: Path, mergeyard: Mergeyard, chat: Chat
) -> None:
    (after_first / "soup" / "blessed.json").unlink()
    shutil.rmtree(after_first / "soup" / "concluded")
    chat.answers = [500] * 3
    ended = mergeyard("nightly", first_night[0].job, "--in-process", "--output", after_first)
    assert ended.code == 0
    assert ended.err == "mergeyard: warning: the webhook in MERGEYARD_WEBHOOK was not told: it answers 500, 3 times\n"
    assert not any(b"services/T0" in data for data in files_under(after_first).values())


def test_what_is_told_names_both_baselines() -> None:
    night = a_night(2, judged_against="nonce 1")
    blessed = Blessed(night.point or "", night.weights, night.night, 2, night.nonce)
    assert headline(night, blessed) == "night 0002-abcdef01: pass: soup is blessed"
    for other in (None, replace(blessed, nonce="nonce 1")):
        assert headline(night, other) == "night 0002-abcdef01: pass: soup is not blessed"
    assert reasons(night) == [
        f"against the blessed merge: {REASON}",
        f"against the anchor released: {REASON}",
        "new since the night before: cos",
    ]
    suites = ElementTree.fromstring(junit(night).encode())
    assert [suite.get("failures") for suite in suites] == ["0", "0"]
    failed = ElementTree.fromstring(junit(a_night(2, "fail", "nonce 1")).encode())
    assert [suite.get("failures") for suite in failed] == ["0", "1"]


# ---- the page


def test_the_page_shows_every_night_and_refers_to_nothing_else() -> None:
    nights = [a_night(1), a_night(2, "fail", "nonce 1"), a_night(3, "inconclusive", "nonce 1", changed=())]
    page = nights_page("soup & co", nights, Blessed("s3://b/p", "w", "0001-abcdef01", 1, "nonce 1"))
    titles = [part.split("</h3>")[0] for part in page.split("<h3>")[1:]]
    assert titles == ["All lengths alike", "512 tokens", "4K tokens"]
    assert page.count("<title>night 0002-abcdef01: fail, 90.0</title>") == 1, "a tooltip on the mark"
    assert "soup &amp; co" in page and "soup & co" not in page
    assert '<a href="nights/0003-abcdef01/report/index.html">' in page and "blessed now" in page
    within = page.replace("http://www.w3.org", "").replace("url(#", "")
    assert not [part for part in ("http://", "https://", "<script", "<img", "url(", "@import") if part in within]


def test_the_page_marks_the_nights_whose_scores_weigh_benchmarks_otherwise() -> None:
    weights = ({}, {"ruler": 2.0}, {"ruler": 2.0}, {})
    nights = [replace(a_night(number), benchmark_weights=found) for number, found in enumerate(weights, 1)]
    assert [Night.from_json(night.to_json()) for night in nights] == nights
    assert b"benchmark_weights" not in nights[0].to_json(), "an older version reads this record"
    page = nights_page("soup", nights, None)
    assert page.count("other weights from here") == 3, "once in the legend of each chart"
    assert re.findall(r"; weights: ([^<]+)<", page) == ["all 1", "ruler × 2"], "the latest night first"
    assert "weights" not in nights_page("soup", nights[1:3], None).split("<main>")[1]


def test_the_page_shows_the_last_two_months() -> None:
    page = nights_page("soup", [a_night(number) for number in range(1, 101)], None)
    assert "The last 60 nights of 100" in page and "0041-abcdef01" in page and "0040-abcdef01" not in page
    assert "Nothing is blessed yet." in page


def test_a_search_is_no_job_for_every_night(tmp_path: Path, mergeyard: Mergeyard) -> None:
    example = Path(__file__).parents[3] / "jobs" / "examples" / "search.yaml"
    ended = mergeyard("nightly", example, "--in-process", "--output", tmp_path / "runs")
    assert ended.code == 2 and ended.err.startswith(f"mergeyard: {example}:16: a night merges points that are known")
    assert len(ended.err.splitlines()) == 1 and not (tmp_path / "runs").exists()


def test_a_night_whose_best_point_loses_a_guard_to_the_anchor_fails_and_blesses_nothing(tmp_path: Path) -> None:
    """All are right at length. At the guard the first candidate has lost 3 points, and the second has lost 7."""
    questions = 400
    lost = {"blessed": 0.03}

    def answer(task: EvaluationTask, item: Item) -> float:
        return float(bool(task.items.length) or item.index < (0.9 - lost.get(task.point, 0)) * questions)

    guards = {"tasks": ["gsm8k"], "margin": 5, "alpha": 0.2}
    yard = NightlyFolder(tmp_path, **{**SMALL, "evaluate": {**SMALL["evaluate"], "guards": guards}})
    told: list[Told] = []
    with scripted(answer, questions):
        for night, lost[JOB["point"]] in enumerate((0.03, 0.07), start=1):
            yard.train("long", night)
            told.append(yard.night(night, "--junit", str(tmp_path / f"{night}.xml")))
    assert [night.code for night in told] == [0, 1]
    first, second = (night.facts for night in told)
    assert second["blessed"] == first["blessed"] and second["night"]["point"] is None
    held, broken = (
        [line for line in reasons(night) if "guard" in line] for night in book_at(yard.folder / "runs").nights()
    )
    assert len(held) == 1 and held[0].startswith("guard gsm8k -3.0 (") and "against released, not worse by 5" in held[0]
    assert len(broken) == 1 and broken[0].startswith("guard gsm8k -7.0 (")
    assert "against released, worse by more than the margin of 5" in broken[0], "only 4 points to the night before"
    assert [len(suite) for suite in ElementTree.parse(tmp_path / "2.xml").getroot()] == [1, 1]
