"""BABILong: prompts and scores as written down from the reference, stories read back from their own sentences.

Beside the reference's own code (booydar/babilong 7a6efee: `get_formatted_input`, `compare_answers`), 400 stories of
each task gave equal prompts, and 64,000 answers equal scores.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.errors import BadInput
from jobs.evaluate import BabilongSpec, Evaluation
from workers.benchmarks.babilong.items import TASKS, prompt_of, scorer_of, words
from workers.benchmarks.babilong.world import DROPS, GOES, STORIES, TAKES, Story
from workers.benchmarks.items import read_items
from workers.benchmarks.planned import PlannedSet, Reader
from workers.benchmarks.registry import planned_sets
from workers.benchmarks.scorers import score
from workers.benchmarks.texts.draws import Draw
from workers.benchmarks.texts.tokenizer import Tokenizer

MADE = BabilongSpec(lengths=(1024, 1536), items=3, tasks=("qa1", "qa2"), place="job.yaml:7")


def plan(tokenizer: Tokenizer, spec: BabilongSpec = MADE, folder: Path | None = None) -> list[PlannedSet]:
    return planned_sets(Evaluation(benchmarks={"babilong": spec}), tokenizer, 0, Reader(folder))


def story(task: str, number: int) -> Story:
    return STORIES[task](Draw("test", task, number))


def test_the_prompt_is_that_of_the_reference() -> None:
    assert prompt_of("qa4", "  The hall is north of the den.\n", "What is north of the den?") == (
        "I will give you context with the facts about different people, their location and actions, hidden in "
        "some random text and a question. "
        "You need to answer the question based only on the information from the facts.\n\n"
        "<example>\n"
        "The hallway is south of the kitchen. The bedroom is north of the kitchen. What is the kitchen south of?\n"
        "Answer: bedroom\n"
        "</example>\n"
        "<example>\n"
        "The garden is west of the bedroom. The bedroom is west of the kitchen. What is west of the bedroom?\n"
        "Answer: garden\n"
        "</example>\n\n"
        "Your answer should contain only one word - location. Do not write anything else after that.\n\n"
        "<context>\nThe hall is north of the den.\n</context>\n\n"
        "Question: What is north of the den?"
    )


@pytest.mark.parametrize(
    ("task", "question", "target", "answer", "expected"),
    [
        ("qa1", "Where is Mary?", "kitchen", " The most recent location of Mary is KITCHEN.", 1),
        ("qa1", "Where is Mary?", "kitchen", "kitchen or garden", 0),
        ("qa1", "Where is Mary?", "kitchen", "kitchen. Not the garden", 1),
        ("qa1", "Where is Mary?", "kitchen", "kitchen<context> garden", 1),
        ("qa1", "Where is Mary?", "kitchen", "", 0),
        ("qa3", "Where was the milk before the garden?", "office", "Before the garden it was in the office", 1),
        ("qa8", "What is Mary carrying?", "apple,milk", "milk, apple", 1),
        ("qa8", "What is Mary carrying?", "apple,milk", "milk", 0),
        ("qa8", "What is Mary carrying?", "apple,milk", "milk, apple, football", 0),
        ("qa19", "How do you go from the office to the garden?", "n,e", "N,E", 1),
        ("qa7", "How many objects is Mary carrying?", "none", "none", 0),  # `one` stands in it
    ],
)
def test_scores_are_those_of_the_reference(task: str, question: str, target: str, answer: str, expected: int) -> None:
    assert score(scorer_of(task, question), answer, (target,)) == expected


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_of_a_story_scores_and_no_other_label_does(task: str) -> None:
    for number in range(40):
        found = story(task, number)
        scorer = scorer_of(task, found.question)
        assert score(scorer, found.answer, (found.answer,)) == 1
        others = [label for label in words()[task]["labels"] if {*label.split(",")} != {*found.answer.split(",")}]
        assert not any(score(scorer, label, (found.answer,)) for label in others)
        assert found.support and all(0 <= at < len(found.facts) for at in found.support)
        assert [*found.support] == sorted({*found.support})


def read_back(facts: tuple[str, ...]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Where each person and each thing was, read from the sentences alone."""
    people: dict[str, list[str]] = {}
    things: dict[str, list[str]] = {}
    held: dict[str, str] = {}
    for fact in facts:
        found = re.fullmatch(r"(\w+) (.+) the (\w+)( there)?\.", fact)
        assert found is not None
        person, verb, what = found.groups()[:3]
        if verb in GOES:
            people.setdefault(person, []).append(what)
            for thing in (thing for thing, holder in held.items() if holder == person):
                things[thing].append(what)
        elif verb in TAKES:
            assert what not in held, "a thing has one holder"
            here = people[person][-1]
            assert things.get(what, [here])[-1] == here, "a thing is taken where it lies"
            held[what] = person
            if what not in things:
                things[what] = [here]
        else:
            assert verb in DROPS and held.pop(what) == person
    return people, things


def test_stories_mean_what_their_sentences_say() -> None:
    for number in range(200):
        one, two, three, six = (story(task, number) for task in ("qa1", "qa2", "qa3", "qa6"))
        person = one.question.removeprefix("Where is ").rstrip("?")
        assert read_back(one.facts)[0][person][-1] == one.answer
        thing = two.question.removeprefix("Where is the ").rstrip("?")
        assert read_back(two.facts)[1][thing][-1] == two.answer
        asked = re.fullmatch(r"Where was the (\w+) before the (\w+)\?", three.question)
        assert asked is not None
        assert read_back(three.facts)[1][asked[1]][-2:] == [three.answer, asked[2]]
        told = re.fullmatch(r"Is (\w+) in the (\w+)\?", six.question)
        assert told is not None
        assert ("yes" if read_back(six.facts)[0][told[1]][-1] == told[2] else "no") == six.answer


def test_the_deciding_facts_are_enough_to_answer() -> None:
    for number in range(200):
        two = story("qa2", number)
        said = [two.facts[at] for at in two.support]
        assert any(f"the {two.answer}." in fact for fact in said), "where it is"
        thing = two.question.removeprefix("Where is the ").rstrip("?")
        assert any(f"the {thing}" in fact for fact in said), "who brought it there"


def test_a_way_of_two_steps_leads_there() -> None:
    steps = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
    for number in range(100):
        found = story("qa19", number)
        asked = re.fullmatch(r"How do you go from the (\w+) to the (\w+)\?", found.question)
        assert asked is not None
        at = {asked[1]: (0, 0)}
        for _ in found.facts:
            for fact in found.facts:
                one, side, other = (
                    fact.removeprefix("The ").rstrip(".").replace(" of the", "").replace("is ", "").split()
                )
                dx, dy = steps[side]
                if other in at:
                    at[one] = (at[other][0] + dx, at[other][1] + dy)
                elif one in at:
                    at[other] = (at[one][0] - dx, at[one][1] - dy)
        ways = [next(step for name, step in steps.items() if name[0] == letter) for letter in found.answer.split(",")]
        assert at[asked[2]] == (sum(dx for dx, _ in ways), sum(dy for _, dy in ways))


def test_made_items_fill_their_length_with_facts_in_order(tokenizer: Tokenizer) -> None:
    sets = plan(tokenizer)
    assert [(of.task, of.length, of.count, of.grows) for of in sets] == [
        (task, length, 3, True) for task in ("qa1_generated", "qa2_generated") for length in (1024, 1536)
    ]
    short, long = (read_items(of.build(range(3))) for of in sets[2:])
    for one, other in zip(short, long, strict=True):
        for item in (one, other):
            assert item.length - 8 <= item.tokens + item.max_new_tokens <= item.length
            assert item.tokens == tokenizer.count_whole(item.text)
            context = item.text.partition("<context>\n")[2].partition("\n</context>")[0]
            facts = STORIES["qa2"](Draw("babilong", "qa2", 0, item.index, "story")).facts
            assert re.fullmatch(".*".join(map(re.escape, ["", *facts, ""])), context, re.DOTALL)
            for depth, fact in zip(item.depths, _deciding(item.index), strict=True):
                begin = round(depth * (len(context) - len(fact)))
                assert context[begin : begin + len(fact)] == fact
        assert (one.answers, one.pair, one.haystack) == (other.answers, other.pair, other.haystack)
        assert one.text.splitlines()[-1] == other.text.splitlines()[-1], "the same question at every length"


def _deciding(index: int) -> list[str]:
    found = STORIES["qa2"](Draw("babilong", "qa2", 0, index, "story"))
    return [found.facts[at] for at in found.support]


def test_an_item_depends_on_its_own_number_alone(tokenizer: Tokenizer) -> None:
    first, *_ = plan(tokenizer)
    assert read_items(first.build(range(3)))[2] == read_items(first.build(range(2, 3)))[0]
    assert plan(tokenizer, replace(MADE, items=9))[0].digest == first.digest
    assert plan(tokenizer, replace(MADE, max_new_tokens=8))[0].digest != first.digest


def published(folder: Path, sizes: dict[str, int]) -> Path:
    """Two questions of qa1 for each size, with a text of so many words."""
    for name, length in sizes.items():
        path = folder / "data" / "qa1" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "input": f"Mary went to the {place}." + " So it goes." * length,
                "question": "Where is Mary? ",
                "target": place,
            }
            for place in ("kitchen", "garden")
        ]
        path.write_text(json.dumps(rows))
    return folder


def test_a_published_question_is_asked_at_the_least_length_that_it_fits_in(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    published(tmp_path / "set", {"0k": 0, "1k": 60, "2k": 80})
    spec = BabilongSpec(lengths=(1024, 576), tasks=("qa1",), data="set", place="job.yaml:7")
    short, long = plan(tokenizer, spec, tmp_path)
    assert [(of.task, of.length, of.count, of.grows) for of in (short, long)] == [
        ("qa1", 576, 2, False),
        ("qa1", 1024, 4, False),
    ]
    [first, second] = read_items(short.build(range(2)))
    assert first.text == prompt_of("qa1", "Mary went to the kitchen.", "Where is Mary? ")
    assert (first.answers, first.pair, second.pair) == (("kitchen",), "qa1-0", "qa1-1")
    assert all(item.tokens == tokenizer.count_whole(item.text) for item in read_items(long.build(range(4))))
    # those of 1k do not fit in 576, and are not cut; the file of 2k is not even read
    [alone] = plan(tokenizer, replace(spec, lengths=(576,)), tmp_path)
    assert (alone.count, alone.too_long) == (2, 2)


def test_published_data_that_cannot_be_read_is_refused_with_its_remedy(tokenizer: Tokenizer, tmp_path: Path) -> None:
    published(tmp_path / "set", {"0k": 0})
    spec = BabilongSpec(lengths=(576,), tasks=("qa1",), data="set", place="job.yaml:7")
    for changed, said in (
        ({"tasks": ("qa1", "qa2")}, "job.yaml:7: set has no file of qa2, such as data/qa2/4k.json; give the folder"),
        ({"tasks": ("qa21",)}, 'job.yaml:7: BABILong has no task "qa21"; did you mean "qa2"?'),
        ({"data": "nowhere"}, "has no files; give the folder of the published data"),
        ({"haystack": "book.txt"}, "the published texts need no `haystack:`"),
        ({"lengths": (128,)}, "job.yaml:7: qa1: no question fits in 128 tokens; the shortest needs "),
    ):
        with pytest.raises(BadInput, match=re.escape(said)):
            plan(tokenizer, replace(spec, **changed), tmp_path)
    assert plan(tokenizer, replace(spec, tasks=("qa1",)), tmp_path)
    (tmp_path / "set" / "data" / "qa1" / "0k.json").write_text('[{"input": "x"}]')
    with pytest.raises(BadInput, match=r"0k\.json: entry 1: there is no column question; give the published file"):
        plan(tokenizer, spec, tmp_path)
