"""Sets of items: built once, addressed by what they depend on, refused with file and line where they cannot be."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.errors import BadInput
from jobs.evaluate import Evaluation, LmEvalSpec, NeedleSpec, PerplexitySpec, RulerSpec
from jobs.evaluation_tasks import ItemSet
from workers.benchmarks.items import read_items
from workers.benchmarks.perplexity import read_windows
from workers.benchmarks.planned import PlannedSet, Reader
from workers.benchmarks.registry import planned_sets
from workers.benchmarks.ruler.documents import read_squad
from workers.benchmarks.ruler.planned import default_tasks
from workers.benchmarks.ruler.tasks import TASKS
from workers.benchmarks.scorers import SCORERS
from workers.benchmarks.sets import check_sets, stored
from workers.benchmarks.texts.tokenizer import Tokenizer
from workers.storage import Store, open_store

RULER = RulerSpec(lengths=(640, 768), tasks=("niah_single_2", "vt"), items=4, place="job.yaml:7")


def plan_ruler(
    tokenizer: Tokenizer, spec: RulerSpec = RULER, *, seed: int = 0, folder: Path | None = None, least: int = 0
):
    return planned_sets(Evaluation(benchmarks={"ruler": spec}), tokenizer, seed, Reader(folder), {"ruler": least})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "run")


def files(store: Store) -> dict[str, bytes]:
    return {info.key: bytes(store.read(info.key)) for info in store.list()}


SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"The river {name} is {number} km long.",
                    "qas": [{"question": f"How long is the {name}?", "answers": [{"text": f"{number} km"}]}],
                }
                for name, number in (("Elbe", 1094), ("Oder", 866), ("Weser", 452))
            ]
        }
    ]
}


@pytest.fixture
def squad(tmp_path: Path) -> Path:
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(SQUAD))
    return path


def part(items: ItemSet, store: Store) -> bytes:
    """The only file of a set."""
    [(_, _, key)] = items.parts
    return bytes(store.read(key))


def test_there_is_a_set_for_each_task_and_length(tokenizer: Tokenizer) -> None:
    planned = plan_ruler(tokenizer)
    assert [(entry.benchmark, entry.task, entry.length, entry.count, entry.share) for entry in planned] == [
        ("ruler", "niah_single_2", 640, 4, 1),
        ("ruler", "niah_single_2", 768, 4, 1),
        ("ruler", "vt", 640, 4, 1),
        ("ruler", "vt", 768, 4, 1),
    ]


def test_the_address_does_not_change_from_one_planning_to_the_next(tokenizer: Tokenizer) -> None:
    assert [entry.digest for entry in plan_ruler(tokenizer)] == [entry.digest for entry in plan_ruler(tokenizer)]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"spec": replace(RULER, chat=True)}, {"spec": replace(RULER, questions=2)}]
)
def test_the_address_changes_with_what_the_items_depend_on(tokenizer: Tokenizer, change) -> None:
    assert plan_ruler(tokenizer, **change)[0].digest != plan_ruler(tokenizer)[0].digest


@pytest.mark.parametrize("change", [{"least": 6}, {"spec": replace(RULER, items=5)}])
def test_the_address_is_the_same_however_many_items_are_asked_for(tokenizer: Tokenizer, change) -> None:
    assert plan_ruler(tokenizer, **change)[0].digest == plan_ruler(tokenizer)[0].digest


def test_a_run_with_the_prompts_of_an_earlier_version_is_refused_by_name(tokenizer: Tokenizer, store: Store) -> None:
    kept, changed = plan_ruler(tokenizer, replace(RULER, lengths=(1024,)))
    assert kept.superseded == ()
    # the address that fae1b0e and every earlier version gave these items
    [earlier] = changed.superseded
    assert earlier == "11cd1bde9935d727aff436d599523d69c9caaf4609cd1231e54139bfd816b917"
    store.write(replace(changed, digest=earlier).key(0, 4), b"items")
    told = (
        "job.yaml:7: this run asked vt at 1024 tokens in the words of an earlier mergeyard;"
        " finish it with that version, or give the job another `name:`"
    )
    with pytest.raises(BadInput, match=f"^{re.escape(told)}$"):
        stored(changed, store)
    assert stored(kept, store).parts
    assert stored(changed, open_store("memory://another-name")).parts


@pytest.mark.parametrize(
    ("task", "more", "stays"),
    [
        ("niah_single_1", {}, True),
        ("niah_single_1", {"questions": 2}, False),
        ("niah_multivalue", {"questions": 2}, True),
        ("cwe", {}, True),
        ("cwe", {"chat": True}, False),
        ("fwe", {}, True),
        ("fwe", {"lengths": (1024,)}, False),
        ("qa_generated", {"chat": True}, True),
    ],
)
def test_only_sets_whose_prompts_changed_have_a_new_address(tokenizer: Tokenizer, task: str, more, stays: bool) -> None:
    [planned] = plan_ruler(tokenizer, replace(RULER, **{"lengths": (2048,), "tasks": (task,), **more}))
    assert (planned.superseded == ()) == stays


def test_more_items_are_made_beside_those_that_are_there(tokenizer: Tokenizer, store: Store) -> None:
    few, more = plan_ruler(tokenizer)[0], plan_ruler(tokenizer, spec=replace(RULER, items=9))[0]
    assert [part[:2] for part in stored(few, store).parts] == [(0, 4)]
    assert [part[:2] for part in stored(more, store).parts] == [(0, 4), (4, 9)]
    assert [part[:2] for part in stored(few, store, 11).parts] == [(0, 4), (4, 9), (9, 11)]
    assert stored(few, store) == stored(more, store), "nothing was made a second time"
    whole = more.build(range(9))
    together = [item for _, _, key in stored(more, store).parts[:2] for item in read_items(bytes(store.read(key)))]
    assert together == read_items(whole)


def test_a_second_run_builds_nothing(tokenizer: Tokenizer, store: Store) -> None:
    first = [stored(entry, store) for entry in plan_ruler(tokenizer)]
    before = files(store)

    def never(_: range) -> bytes:
        raise AssertionError("built again")

    for entry in plan_ruler(tokenizer):  # what people leave in a folder that they look into
        for name in (".DS_Store", "notes.txt", "000000-000004.parquet.orig"):
            store.write(f"{entry.folder}{name}", b"")
    before = files(store)
    assert [stored(replace(entry, build=never), store) for entry in plan_ruler(tokenizer)] == first
    assert files(store) == before and set(before) >= {key for items in first for _, _, key in items.parts}


def test_two_builders_at_once_leave_one_set(tokenizer: Tokenizer, store: Store) -> None:
    planned = plan_ruler(tokenizer)[0]

    def slower(wanted: range) -> bytes:
        stored(planned, store)  # somebody else was faster
        return planned.build(wanted)

    assert stored(replace(planned, build=slower), store) == stored(planned, store)


def test_more_items_are_made_for_the_winners_of_a_race_than_are_asked_of_all(
    tokenizer: Tokenizer, store: Store
) -> None:
    [planned, *_] = plan_ruler(tokenizer, least=6)
    made = read_items(part(stored(planned, store), store))
    assert (planned.count, len(made)) == (4, 6)
    assert made[:4] == read_items(plan_ruler(tokenizer)[0].build(range(4)))


def test_all_thirteen_tasks_stand_in_with_a_generated_one_without_data(squad: Path) -> None:
    assert [*default_tasks({})] == [*TASKS[:-2], "qa_generated"]
    library = read_squad(squad)
    assert [*default_tasks({"qa_1": library})] == [*TASKS[:-1], "qa_generated"]
    assert [*default_tasks({"qa_1": library, "qa_2": library})] == [*TASKS]


def test_question_answering_reads_the_documents_of_the_job(tokenizer: Tokenizer, store: Store, squad: Path) -> None:
    spec = RulerSpec(lengths=(512,), tasks=("qa_1",), items=3, documents={"qa_1": squad.name}, place="job.yaml:7")
    [planned] = plan_ruler(tokenizer, spec, folder=squad.parent)
    items = read_items(part(stored(planned, store), store))
    assert [item.answers for item in items] == [("1094 km",), ("866 km",), ("452 km",)]
    squad.write_text(json.dumps(SQUAD).replace("Elbe", "Isar"))
    assert plan_ruler(tokenizer, spec, folder=squad.parent)[0].digest != planned.digest


def test_a_haystack_of_the_user_is_what_needles_lie_in(tokenizer: Tokenizer, store: Store, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("Rain fell on the harbour. " * 50)
    spec = replace(RULER, tasks=("niah_single_2",), lengths=(512,), haystack="prose.txt")
    [planned] = plan_ruler(tokenizer, spec, folder=tmp_path)
    [item, *_] = read_items(part(stored(planned, store), store))
    assert item.text.count("Rain fell on the harbour.") > 10


def test_a_haystack_may_lie_in_a_bucket(tokenizer: Tokenizer, store: Store) -> None:
    open_store("memory://texts").write("prose.txt", b"Rain fell on the harbour. " * 50)
    spec = replace(RULER, tasks=("niah_single_2",), lengths=(512,), haystack="memory://texts/prose.txt")
    [item, *_] = read_items(part(stored(plan_ruler(tokenizer, spec)[0], store), store))
    assert item.text.count("Rain fell on the harbour.") > 10


def test_a_chat_template_frames_every_prompt_and_counts(tokenizer: Tokenizer, store: Store) -> None:
    spec = replace(RULER, tasks=("niah_single_1",), lengths=(512,), chat=True)
    for item in read_items(part(stored(plan_ruler(tokenizer, spec)[0], store), store)):
        assert item.text.startswith("<|im_start|>user\n") and "<|im_start|>assistant\n" in item.text[-200:]
        assert item.bare and tokenizer.as_bare().count(item.text) == item.tokens <= 512 - item.max_new_tokens


def test_in_a_chat_common_words_are_asked_in_two_turns(tokenizer: Tokenizer, store: Store) -> None:
    spec = replace(RULER, tasks=("cwe",), lengths=(2048,), chat=True)
    for item in read_items(part(stored(plan_ruler(tokenizer, spec)[0], store), store)):
        roles = re.findall(r"<\|im_start\|>(\w+)\n", item.text)
        assert (roles, item.text.count("<|im_end|>\n")) == (["user", "assistant"] * 2, 3)
        assert tokenizer.count(item.text) == item.tokens <= 2048 - item.max_new_tokens


def plan_needle(tokenizer: Tokenizer, **more) -> list[PlannedSet]:
    spec = NeedleSpec(lengths=(320,), depths=3, items=2, place="job.yaml:8", **more)
    return planned_sets(Evaluation(benchmarks={"needle": spec}), tokenizer, 0, Reader())


def test_needles_come_at_every_depth_in_every_round(tokenizer: Tokenizer, store: Store) -> None:
    [planned] = plan_needle(tokenizer)
    assert (planned.count, planned.share) == (6, 3)
    items = read_items(part(stored(planned, store), store))
    assert [item.depths[0] for item in items] == pytest.approx([0, 0.5, 1] * 2, abs=0.15)


def test_noise_is_a_haystack_by_name(tokenizer: Tokenizer, store: Store) -> None:
    [planned] = plan_needle(tokenizer, haystack="noise")
    [item, *_] = read_items(part(stored(planned, store), store))
    assert item.text.count("The grass is green. The sky is blue.") > 1
    assert planned.digest != plan_needle(tokenizer)[0].digest


def test_an_answer_may_have_to_be_in_a_form(tokenizer: Tokenizer, store: Store) -> None:
    [plain], [formed] = plan_needle(tokenizer), plan_needle(tokenizer, answer='{"value": {value}}')
    assert formed.digest != plain.digest
    for before, item in zip(*(read_items(part(stored(entry, store), store)) for entry in (plain, formed)), strict=True):
        [value] = before.answers
        assert item.text == before.text and item.answers == (f'{{"value": {value}}}',)
        score = SCORERS[item.scorer]
        assert score(f' {{"value": {value}}}\n', item.answers) == 1
        assert score(f" {value}.", item.answers) == 0, "the value alone is not the form"


def test_windows_of_all_lengths_end_at_the_same_tokens(tokenizer: Tokenizer, store: Store) -> None:
    spec = PerplexitySpec(lengths=(256, 512), blocks=3, place="job.yaml:9")
    planned = planned_sets(Evaluation(benchmarks={"perplexity": spec}), tokenizer, 0, Reader())
    short, long = (read_windows(part(stored(entry, store), store)) for entry in planned)
    assert [window.pair for window in short] == [window.pair for window in long]
    assert [window.tokens.tolist() for window in short] == [window.tokens[-256:].tolist() for window in long]
    assert [window.index for window in read_windows(part(stored(planned[0], store), store), 1, 3)] == [1, 2]


def test_a_large_set_is_built_and_written_in_parts_of_whole_haystacks(tokenizer: Tokenizer, store: Store) -> None:
    asked: list[range] = []

    def build(wanted: range) -> bytes:
        asked.append(wanted)
        return b"items"

    few, many = (
        replace(plan_ruler(tokenizer, replace(RULER, questions=questions))[0], build=build, made=150)
        for questions in (1, 12)
    )
    assert [(first, last) for first, last, _ in stored(few, store).parts] == [(0, 64), (64, 128), (128, 150)]
    assert [(first, last) for first, last, _ in stored(many, store).parts] == [(0, 60), (60, 120), (120, 150)]
    assert [len(wanted) for wanted in asked] == [64, 64, 22, 60, 60, 30]
    asked.clear()
    stored(replace(few, length=1 << 20, digest="of a million tokens"), store)
    assert max(len(wanted) for wanted in asked) * (1 << 20) <= 1 << 24


def test_a_slice_of_a_large_file_is_that_slice(tokenizer: Tokenizer) -> None:
    [planned] = plan_ruler(tokenizer, replace(RULER, tasks=("niah_single_1",), lengths=(256,)))
    data = planned.build(range(140))
    everything = read_items(data)
    for first, last in ((0, 1), (60, 70), (64, 128), (127, 140), (139, 140)):
        assert read_items(data, first, last) == everything[first:last]


def test_a_task_of_the_harness_is_told_by_name_and_limit(tokenizer: Tokenizer, store: Store) -> None:
    spec = LmEvalSpec(tasks=("arc_easy",), limit=5, place="job.yaml:10")
    [planned] = planned_sets(Evaluation(benchmarks={"lm_eval": spec}), tokenizer, 0, Reader())
    told = json.loads(part(stored(planned, store), store))
    assert (told["task"], told["limit"], planned.length, planned.count) == ("arc_easy", 5, 0, 1)


def test_a_task_of_ones_own_is_another_when_its_file_is(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    spec = LmEvalSpec(tasks=("mine.yaml",), place="job.yaml:10")
    [before] = planned_sets(Evaluation(benchmarks={"lm_eval": spec}), tokenizer, 0, Reader(tmp_path))
    (tmp_path / "mine.yaml").write_text("task: mine\nnum_fewshot: 1\n")
    [after] = planned_sets(Evaluation(benchmarks={"lm_eval": spec}), tokenizer, 0, Reader(tmp_path))
    assert before.task == after.task == "mine" and before.digest != after.digest


def test_two_tasks_of_one_name_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    twice = LmEvalSpec(tasks=("mine.yaml", "mine"), place="job.yaml:10")
    with pytest.raises(BadInput, match=r"job.yaml:10: two tasks are called mine; give one"):
        planned_sets(Evaluation(benchmarks={"lm_eval": twice}), tokenizer, 0, Reader(tmp_path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(RULER, tasks=("niah_singel_1",)), r'job.yaml:7: RULER has no task "niah_singel_1"; did you mean'),
        (replace(RULER, tasks=("qa_2",)), r"job.yaml:7: qa_2 needs its data; give `documents: \{qa_2: FILE\}`"),
        (replace(RULER, haystack="none.txt"), r"job.yaml:7: .*none.txt cannot be read \(No such file or directory\)"),
        (replace(RULER, haystack="memory://texts/no.txt"), r"job.yaml:7: memory://texts/no.txt"),
        (replace(RULER, haystack="binary"), r"job.yaml:7: binary is not text in UTF-8; give prose"),
        (replace(RULER, haystack="blank"), r"job.yaml:7: the text is empty; give some prose"),
        (
            replace(RULER, chat=True),
            r"job.yaml:7: .*tokenizer.json: the checkpoint has no chat template; ask it plainly",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_with_file_and_line(
    parents: Path, tmp_path: Path, spec: RulerSpec, message: str
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00prose")
    (tmp_path / "blank").write_text("  \n\n ")
    plain = Tokenizer((parents / "base" / "tokenizer.json").read_bytes())  # without its chat template
    with pytest.raises(BadInput, match=message):
        plan_ruler(plain, spec, folder=tmp_path)


def test_a_length_in_which_nothing_fits_is_refused_with_file_and_line(tokenizer: Tokenizer, store: Store) -> None:
    planned = plan_ruler(tokenizer, replace(RULER, tasks=("vt",), lengths=(128, 2048)))
    told = r"job.yaml:7: vt: no prompt fits in 128 tokens; the smallest length that does"
    with pytest.raises(BadInput, match=told):
        stored(planned[0], store)
    with pytest.raises(BadInput, match=told):
        check_sets(planned)


def test_every_kind_of_prompt_is_tried_while_planning_and_none_at_its_full_length(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # in this tiny vocabulary, cwe's longer list from 4,096 tokens on needs more than that
    planned = plan_ruler(tokenizer, replace(RULER, tasks=("cwe",), lengths=(2048, 4096, 1 << 30)))
    with pytest.raises(BadInput, match=r"job.yaml:7: cwe: no prompt fits in 4096 tokens"):
        check_sets(planned)
    check_sets([planned[0], planned[2]])


def test_a_text_too_short_for_perplexity_is_refused_before_it_is_read_whole(tokenizer: Tokenizer) -> None:
    spec = PerplexitySpec(lengths=(256, 131_072), place="job.yaml:9")
    planned = planned_sets(Evaluation(benchmarks={"perplexity": spec}), tokenizer, 0, Reader())
    with pytest.raises(
        BadInput, match=r"job.yaml:9: perplexity: the text has \d+ tokens, the longest window 131072; give"
    ):
        check_sets(planned)
    check_sets(
        planned_sets(Evaluation(benchmarks={"perplexity": replace(spec, lengths=(256,))}), tokenizer, 0, Reader())
    )


@pytest.mark.parametrize("task", ["arc_easy", "longbench2", "flores_afr-eng", "niah_single_1"])
def test_tasks_of_the_harness_are_known_without_asking_it(tokenizer: Tokenizer, task: str) -> None:
    spec = LmEvalSpec(tasks=(task,), place="job.yaml:10")
    check_sets(planned_sets(Evaluation(benchmarks={"lm_eval": spec}), tokenizer, 0, Reader()))


def test_a_misspelt_task_of_the_harness_is_refused_with_the_nearest(tokenizer: Tokenizer) -> None:
    planned = planned_sets(
        Evaluation(benchmarks={"lm_eval": LmEvalSpec(tasks=("arc_eazy",), place="job.yaml:10")}), tokenizer, 0, Reader()
    )
    with pytest.raises(BadInput, match=r'job.yaml:10: lm_eval has no task "arc_eazy"; did you mean "arc_easy"\?'):
        check_sets(planned)


def test_more_items_than_there_are_questions_are_refused(tokenizer: Tokenizer, store: Store, squad: Path) -> None:
    spec = RulerSpec(lengths=(512,), tasks=("qa_1",), items=9, documents={"qa_1": str(squad)}, place="job.yaml:7")
    with pytest.raises(BadInput, match=r"job.yaml:7: qa: item 3 of only 3 questions; ask for fewer items"):
        stored(plan_ruler(tokenizer, spec)[0], store)
    with pytest.raises(BadInput, match=r"job.yaml:7: qa: item 8 of only 3 questions; ask for fewer items"):
        check_sets(plan_ruler(tokenizer, spec))


def test_what_a_task_names_anywhere_is_part_of_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text("task: mine\ninclude: ../common\nprocess_docs: !function own.docs\n")
    (tmp_path / "common").write_text("include: [deeper.yaml]\n")
    (tmp_path / "deeper.yaml").write_text(f"dataset_kwargs: {{data_files: {{test: {tmp_path}/far.json}}}}\n")
    read = [tmp_path / "task/own.py", tmp_path / "common", tmp_path / "deeper.yaml", tmp_path / "far.json"]
    for path in read:
        path.touch()
    spec = LmEvalSpec(tasks=("task/mine.yaml",), place="job.yaml:10")

    def digest() -> str:
        [planned] = planned_sets(Evaluation(benchmarks={"lm_eval": spec}), tokenizer, 0, Reader(tmp_path))
        return planned.digest

    found = [digest()]
    for path in read:
        with path.open("a") as file:
            file.write("\n# more\n")
        found.append(digest())
    (tmp_path / "task" / "beside.json").touch()
    assert len({*found}) == 5 and digest() == found[-1]


def test_what_a_task_of_the_harness_is_told_is_part_of_it(tokenizer: Tokenizer, parents: Path, store: Store) -> None:
    plain = LmEvalSpec(tasks=("arc_easy",), place="job.yaml:10")
    specs = [plain, replace(plain, num_fewshot=2), replace(plain, chat=True), replace(plain, metadata={"length": (8,)})]
    sets = [planned_sets(Evaluation(benchmarks={"lm_eval": spec}), tokenizer, 0, Reader())[0] for spec in specs]
    assert len({entry.digest for entry in sets}) == 4
    told = [json.loads(part(stored(entry, store), store)) for entry in sets]
    assert [entry["num_fewshot"] for entry in told] == [None, 2, None, None]
    assert told[2]["chat_template"] == (parents / "base" / "chat_template.jinja").read_text()
    assert told[3]["metadata"] == {"length": [8]}
    without = Tokenizer((parents / "base" / "tokenizer.json").read_bytes())
    with pytest.raises(BadInput, match=r"job.yaml:10: .*the checkpoint has no chat template; ask it plainly"):
        planned_sets(Evaluation(benchmarks={"lm_eval": specs[2]}), without, 0, Reader())
