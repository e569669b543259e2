"""Prompts against RULER's templates, written out by hand for fixed draws."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from jobs.errors import BadInput
from workers.benchmarks.items import Asked, Item
from workers.benchmarks.needle import even_depths, needle_items
from workers.benchmarks.ruler.cwe_fwe import coded_counts
from workers.benchmarks.ruler.documents import read_hotpotqa, read_squad
from workers.benchmarks.ruler.niah import Needles, Niah, pose
from workers.benchmarks.ruler.tasks import MAX_NEW_TOKENS, NIAH, TASKS, ruler_items
from workers.benchmarks.texts.draws import Draw
from workers.benchmarks.texts.haystacks import Essay, Lines, Noise
from workers.benchmarks.texts.tokenizer import Tokenizer

GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def hidden(tokenizer: Tokenizer, task: Niah, needles: Needles, haystack: Noise | Lines | Essay, places: list[float]):
    """Items with the needles at their places in exactly two units of haystack."""
    return pose(
        tokenizer,
        Asked("ruler", "niah", 4096, 0, 128),
        task,
        needles,
        context=lambda units: haystack.hide(2, needles.texts(task), places),
        forecast=lambda budget: np.asarray([0, budget + 1]),  # one unit more would be too much
        haystack="h",
        indices=range(len(needles.questions)),
    )


def test_one_needle_in_noise(tokenizer: Tokenizer) -> None:
    needles = Needles(("quiet-fox",), (("4815162",),), ((0,),))
    [item] = hidden(tokenizer, NIAH["niah_single_1"], needles, Noise(), [0.5])
    assert item.text == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
        f"{GRASS}\n"
        "One of the special magic numbers for quiet-fox is: 4815162.\n"
        f"{GRASS}\n"
        "What is the special magic number for quiet-fox mentioned in the provided text?"
        " The special magic number for quiet-fox mentioned in the provided text is"
    )
    assert item.answers == ("4815162",)
    assert item.answer_prefix == " The special magic number for quiet-fox mentioned in the provided text is"
    # 90 characters of noise and a newline come before the 59 of the needle, as many after it
    assert item.depths == (len(GRASS + "\n") / (2 * len(GRASS + "\n")),)


def test_four_values_of_one_key(tokenizer: Tokenizer) -> None:
    needles = Needles(("quiet-fox",), (("1111111", "2222222", "3333333", "4444444"),), ((0,),))
    essay = Essay("Alpha beta. Gamma delta.\n\nMore is not shown.")
    [item] = hidden(tokenizer, NIAH["niah_multivalue"], needles, essay, [1.0, 0.0, 0.0, 1.0])
    assert item.text == (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
        " One of the special magic numbers for quiet-fox is: 2222222."
        "  One of the special magic numbers for quiet-fox is: 3333333."
        " Alpha beta."
        " One of the special magic numbers for quiet-fox is: 1111111."
        "  One of the special magic numbers for quiet-fox is: 4444444. "
        "\nWhat are all the special magic numbers for quiet-fox mentioned in the provided text?"
        " The special magic numbers for quiet-fox mentioned in the provided text are"
    )
    assert item.answers == ("1111111", "2222222", "3333333", "4444444")


def test_four_keys_are_asked_for_at_once(tokenizer: Tokenizer) -> None:
    needles = Needles(("a-b", "c-d", "e-f", "g-h"), (("1",), ("2",), ("3",), ("4",)), ((2, 0, 3, 1),))
    [item] = hidden(tokenizer, NIAH["niah_multiquery"], needles, Noise(), [0.1, 0.2, 0.6, 0.7])
    assert item.prompt == (
        "\nWhat are all the special magic numbers for e-f, a-b, g-h, and c-d mentioned in the provided text?"
    )
    assert item.answer_prefix == (
        " The special magic numbers for e-f, a-b, g-h, and c-d mentioned in the provided text are"
    )
    assert item.answers == ("3", "1", "4", "2")


def test_uuids_are_asked_for_as_uuids(tokenizer: Tokenizer) -> None:
    [item] = ruler_items(tokenizer, "niah_multikey_3", 2048, indices=[0], seed=3)
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    head, *lines, question = item.text.split("\n")
    assert head == (
        "A special magic uuid is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the uuid afterwards."
    )
    assert all(re.fullmatch(f"One of the special magic uuids for {uuid} is: {uuid}.", line) for line in lines)
    [(key,)] = re.findall(f"^(?=What is the special magic uuid for ({uuid}) mentioned)", question) and [
        re.findall(f"uuid for ({uuid}) mentioned in the provided text\\?", question)
    ]
    assert f"One of the special magic uuids for {key} is: {item.answers[0]}." in lines
    assert len({line.split(" for ")[1].split(" is")[0] for line in lines}) == len(lines)


def test_running_text_is_cut_between_sentences(tokenizer: Tokenizer) -> None:
    for item in ruler_items(tokenizer, "niah_single_2", 2048, indices=range(8), seed=3):
        context = item.prefix.split("\n", 1)[1]
        before, after = context.split(" One of the special magic numbers for ")
        assert before == "" or before[-1] in ".!?\"')]”’"
        rest = after.split(". ", 1)
        assert len(rest) == 1 or re.match(r"[\"'“‘(\[]?[A-Z0-9]", rest[1])


CHINESE = "这是一个很长的中文文本，用来测试干草堆。" * 200
LOWER = "the cat sat on the mat. the dog ran far away, and back\n" * 500


@pytest.mark.parametrize(
    ("text", "seam"),
    [
        (CHINESE, r"。$"),
        (CHINESE.replace("。", "，"), r"，$"),
        (CHINESE.replace("。", "").replace("，", ""), r".$"),
        (LOWER, r"and back$"),
        (LOWER.replace("\n", " "), r"the mat\.$"),
        (LOWER.replace("\n", " ").replace(".", "").replace(",", ""), r" \w+$"),
    ],
)
@pytest.mark.parametrize("length", [2048, 8192])
def test_any_text_is_a_haystack_with_places_at_every_depth(
    tokenizer: Tokenizer, text: str, seam: str, length: int
) -> None:
    essay = Essay(text)
    for item in needle_items(tokenizer, length, depths=even_depths(5), indices=range(5), seed=3, essay=essay):
        assert length - 40 < item.tokens + item.max_new_tokens <= length
        assert item.depths[0] == pytest.approx(item.index / 4, abs=0.12)
    for item in ruler_items(tokenizer, "niah_single_2", length, indices=range(12), seed=3, essay=essay):
        assert length - 40 < item.tokens + item.max_new_tokens <= length
        before = item.prefix.split("\n", 1)[1].split(" One of the special magic")[0]
        assert before == "" or re.search(seam, before)


def test_a_needle_far_from_its_depth_is_refused(tokenizer: Tokenizer) -> None:
    essay = Essay("One sentence " + "and more words " * 60)
    told = r"needle: at 200 tokens the needle for depth 0.50 comes to lie at 0.00; give a text with shorter sentences"
    with pytest.raises(BadInput, match=told):
        needle_items(tokenizer, 200, depths=even_depths(3), indices=range(3), seed=3, essay=essay)


def test_variable_tracking_with_its_worked_example(tokenizer: Tokenizer) -> None:
    [item] = ruler_items(tokenizer, "vt", 1500, indices=[2], seed=3)
    a, b, c, d, e = item.answers
    example, real = item.text.split("\n\nMemorize and track")
    head = " the chain(s) of variable assignment hidden in the following text.\n\n"
    ending = (
        "\nQuestion: Find all variables that are assigned the value {value} in the text above."
        " Answer: According to the chain(s) of variable assignment in the text above, "
        "5 variables are assigned the value {value}, they are: "
    )
    value = re.findall(r"VAR [A-Z]{5} = (\d{5})", real)[0]
    noise = GRASS + "\n"
    chain = [f"VAR {a} = {value}\n", f"VAR {b} = VAR {a} \n", f"VAR {c} = VAR {b} \n"]
    chain += [f"VAR {d} = VAR {c} \n", f"VAR {e} = VAR {d} \n"]
    assert real.startswith(head) and real.endswith(ending.format(value=value))
    context = real.removeprefix(head).removesuffix(ending.format(value=value)) + "\n"
    assert re.fullmatch(f"({re.escape(noise)})*".join(["", *map(re.escape, chain), ""]), context)
    value = re.findall(r"VAR [A-Z]{3} = (\d{5})", example)[0]
    names = re.findall(r"VAR ([A-Z]{3}) =", example)
    assert example.startswith("Memorize and track" + head)
    assert example.endswith(ending.format(value=value) + " " + " ".join(names))
    assert 500 - 25 < tokenizer.count(example.rsplit(" ", 5)[0]) <= 500
    assert item.text.endswith(" in the text above." + item.answer_prefix)


@pytest.mark.parametrize("length", [640, 1024, 2048, 4096])
def test_noise_parts_any_two_assignments(tokenizer: Tokenizer, length: int) -> None:
    for item in ruler_items(tokenizer, "vt", length, indices=range(30), seed=42):
        context = item.text.rsplit("in the following text.\n\n", 1)[1]
        assert re.fullmatch(rf"(({GRASS}\n)*VAR [A-Z]{{5}} = .*\n({GRASS}\n)+){{4}}[\s\S]*", context)
        names = re.findall(r"VAR ([A-Z]{5}) =", context)
        assert tuple(names) == item.answers, "the chain is told in its order"
        assert list(item.depths) == sorted(item.depths)


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2"])
def test_lines_part_the_needles_of_several_questions(tokenizer: Tokenizer, task: str) -> None:
    items = list(ruler_items(tokenizer, task, 2048, indices=range(80), seed=42, questions=8))
    answers = {item.answers[0] for item in items}
    for item in items[::8]:
        lines = item.prefix.split("\n")
        needles = [number for number, line in enumerate(lines) if line.split()[-1][:-1] in answers]
        assert len(needles) == 8
        assert min(later - earlier for earlier, later in itertools.pairwise(needles)) > 1


def test_every_choice_of_lines_is_as_likely_as_any_other() -> None:
    found: Counter[str] = Counter()
    for number in range(4000):
        draw = Draw("lines", number)
        text = Lines(lambda _: ".").hide(6, ["N"] * 3, [draw.fraction() for _ in range(3)])
        found[text.replace("\n", "")] += 1
    # 3 of 6 lines: 20 choices; chi-squared with 19 degrees of freedom exceeds 43.8 once in a thousand
    assert len(found) == 20
    assert sum((count - 200) ** 2 / 200 for count in found.values()) < 43.8


@pytest.mark.parametrize(
    ("length", "often", "seldom", "example"), [(2048, 6, 1, (20, 3, 1)), (8192, 30, 3, (40, 10, 3))]
)
def test_common_words_after_one_worked_example(
    tokenizer: Tokenizer, length: int, often: int, seldom: int, example: tuple[int, int, int]
) -> None:
    [item] = ruler_items(tokenizer, "cwe", length, indices=[4], seed=3)
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    question = "\nQuestion: What are the 10 most common words in the above list?"
    prefix = " Answer: The top 10 words that appear most often in the list are:"
    empty, shown, real = item.text.split(head)
    assert empty == "" and item.answer_prefix == prefix

    def entries(text: str) -> list[str]:
        words = re.findall(r"\d+\. (.+?)(?= \d+\. |$)", text)
        assert text == " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
        return words

    listed, solution = shown.removesuffix("\n").split(question + prefix + " ")
    words, times, once = example
    assert sorted(Counter(entries(listed)).values()) == [once] * (words - 10) + [times] * 10
    assert {word for word, count in Counter(entries(listed)).items() if count == times} == set(entries(solution))
    counts = Counter(entries(real.removesuffix(question + prefix)))
    assert {word for word, count in counts.items() if count == often} == set(item.answers)
    assert set(counts.values()) == {often, seldom}


def test_the_worked_example_of_common_words_is_a_turn_of_its_own(tokenizer: Tokenizer) -> None:
    [plain] = ruler_items(tokenizer, "cwe", 2048, indices=[0], seed=3)
    frame, turns = tokenizer.chat_frame(), tokenizer.turns()
    assert frame == ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    assert turns == (frame[1], "<|im_end|>\n<|im_start|>user\n")
    [chat] = ruler_items(tokenizer, "cwe", 2048, indices=[0], seed=3, frame=frame, turns=turns)
    [theirs] = ruler_items(tokenizer, "cwe", 2048, indices=[0], seed=3, frame=("<U>", "<A>"))
    question = r"(Below [\s\S]+ most common words in the above list\?)"
    answer = r"( Answer: The top 10 words that appear most often in the list are:)"
    solution = r"( 1\. [^\n<]+10\. [\w-]+)"
    parts = re.fullmatch(f"{question}{answer}{solution}\n{question}{answer}", plain.text)
    assert parts is not None
    start, end = re.escape(frame[0]), re.escape(frame[1])
    in_chat = re.fullmatch(
        f"{start}{question}{end}{answer}{solution}{re.escape(turns[1])}{question}{end}{answer}", chat.text
    )
    assert in_chat is not None and in_chat.groups()[:3] == parts.groups()[:3]
    # RULER formats its example with the template of the model, and puts a newline before the question
    assert re.fullmatch(f"<U>{question}<A>{answer}{solution}\n<U>{question}<A>{answer}", theirs.text)


def test_coded_words_follow_zipf(tokenizer: Tokenizer) -> None:
    [item] = ruler_items(tokenizer, "fwe", 4096, indices=[4], seed=3)
    head = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    ending = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
        " Answer: According to the coded text above, the three most frequently appeared words are:"
    )
    assert item.text.startswith(head) and item.text.endswith(ending)
    counts = Counter(item.text.removeprefix(head).removesuffix(ending).split(" ")).most_common()
    assert counts[0][0] == "..."
    assert tuple(word for word, _ in counts[1:4]) == item.answers
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counts[1:])
    assert counts[3][1] > counts[4][1]


def test_the_coded_vocabulary_has_a_word_for_50_tokens_of_the_prompt() -> None:
    thirds = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    thirds.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.FixedLength(3)]
    )
    [item] = ruler_items(Tokenizer(thirds.to_str().encode()), "fwe", 500, indices=[0], seed=3)
    # RULER: (500 - 50) // 50 words, dots among them; of 165 words and more, the tenth would be one: 165 / (100 · π²/6)
    context = item.text.split("coded words. ")[1].split("\nQuestion")[0].split()
    assert len(context) >= 165
    assert len(set(context)) == 9


def test_zipf_counts_by_hand() -> None:
    # 100 / (k² · π²/6): 60.79, 15.198, 6.755, 3.7995, 2.4317
    assert coded_counts(100, 5) == [60, 15, 6, 3, 2]


SQUAD = {
    "data": [
        {
            "title": "A",
            "paragraphs": [
                {
                    "context": "The Normans were in Normandy.",
                    "qas": [
                        {"question": "Where?", "answers": [{"text": "Normandy"}, {"text": "Normandy"}]},
                        {"question": "Never?", "answers": [], "is_impossible": True},
                    ],
                },
                {"context": "They were vikings.", "qas": []},
            ],
        },
        {"title": "B", "paragraphs": [{"context": "Steam engines are engines.", "qas": []}]},
    ]
}
HOTPOT = [
    {
        "question": "Which river?",
        "answer": "Thames",
        "context": [["London", ["London is on ", "the Thames."]], ["Paris", ["It is in France."]]],
    },
    {"question": "Which sea?", "answer": "Baltic", "context": [["Kiel", ["Kiel lies on the Baltic."]]]},
]


def test_squad_question_among_all_documents(tokenizer: Tokenizer) -> None:
    library = {"qa_1": read_squad(json.dumps(SQUAD).encode())}
    instruction = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    texts = ["The Normans were in Normandy.", "They were vikings.", "Steam engines are engines."]
    expected = [
        f"{instruction}\n\nThe following are given documents.\n\nDocument 1:\n{one}\n\nDocument 2:\n{two}\n\n"
        f"Document 3:\n{three}\n\n{instruction}\n\nQuestion: Where? Answer:"
        for one, two, three in itertools.permutations(texts)
    ]
    length = max(map(tokenizer.count, expected)) + 32
    [item] = ruler_items(tokenizer, "qa_1", length, indices=[0], seed=3, documents=library)
    assert item.text in expected
    assert item.answers == ("Normandy",) and item.scorer == "part" and item.answer_prefix == " Answer:"
    place = item.text.index("Document 1")
    context = item.text[place : item.text.rindex(instruction) - 2]
    assert item.depths == (context.index(texts[0]) / (len(context) - len(texts[0])),)


def test_documents_come_again_until_the_length_is_filled_but_not_the_gold_one(
    tokenizer: Tokenizer,
) -> None:
    library = {"qa_1": read_squad(json.dumps(SQUAD).encode())}
    [item] = ruler_items(tokenizer, "qa_1", 4096, indices=[0], seed=3, documents=library)
    assert 4096 - 64 < item.tokens + item.max_new_tokens <= 4096
    assert item.text.count("The Normans were in Normandy.") == 1
    others = [item.text.count(text) for text in ("They were vikings.", "Steam engines are engines.")]
    assert min(others) > 50 and max(others) - min(others) <= 1


def test_a_library_of_nothing_but_the_answer_cannot_fill_a_length(tokenizer: Tokenizer) -> None:
    library = {"qa_2": read_hotpotqa(json.dumps(HOTPOT[:1]).encode())}
    told = r"qa_2: all there is to read makes \d+ tokens, too few for a length of 4096; give more of it, or ask"
    with pytest.raises(BadInput, match=told):
        ruler_items(tokenizer, "qa_2", 4096, indices=[0], seed=3, documents=library)


def test_questions_about_one_paragraph_are_one_cluster(tokenizer: Tokenizer) -> None:
    paragraphs = [
        {"context": f"Town {town} has {town} bridges.", "qas": [{"question": text, "answers": [{"text": str(town)}]}]}
        for town in (3, 5)
        for text in ("How many bridges?", "How many of them?")
    ]
    library = {"qa_1": read_squad(json.dumps({"data": [{"paragraphs": paragraphs}]}).encode())}
    short, long = (
        ruler_items(tokenizer, "qa_1", length, indices=range(4), seed=3, documents=library) for length in (512, 1024)
    )
    a, b, c, d = (item.haystack for item in short)
    assert a == b != c == d
    assert [item.haystack for item in long] == [a, b, c, d]
    assert len({item.pair for item in short}) == 4


def test_hotpotqa_documents_begin_with_their_title(tokenizer: Tokenizer) -> None:
    library = {"qa_2": read_hotpotqa(json.dumps(HOTPOT).encode())}
    [item] = ruler_items(tokenizer, "qa_2", 4096, indices=[0], seed=3, documents=library)
    assert ":\nLondon\nLondon is on the Thames.\n\n" in item.text and ":\nParis\nIt is in France.\n\n" in item.text
    assert item.answers == ("Thames",)


def as_parquet(rows: list[dict[str, object]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def test_the_hub_s_parquet_files_are_the_same_libraries() -> None:
    squad = [
        {
            "id": str(number),
            "title": article["title"],
            "context": paragraph["context"],
            "question": asked["question"],
            "answers": {
                "text": [answer["text"] for answer in asked["answers"]],
                "answer_start": [0] * len(asked["answers"]),
            },
        }
        for article in SQUAD["data"]
        for paragraph in article["paragraphs"]
        for number, asked in enumerate(paragraph["qas"] or [{"question": "None?", "answers": []}])
    ]
    assert read_squad(as_parquet(squad)) == read_squad(json.dumps(SQUAD).encode())
    hotpot = [
        {
            **asked,
            "context": {
                "title": [title for title, _ in asked["context"]],
                "sentences": [sentences for _, sentences in asked["context"]],
            },
        }
        for asked in HOTPOT
    ]
    assert read_hotpotqa(as_parquet(hotpot)) == read_hotpotqa(json.dumps(HOTPOT).encode())
    with pytest.raises(BadInput, match="not the columns of the hub's file"):
        read_squad(as_parquet(hotpot))


def test_question_answering_without_its_files_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match=r"qa_1: SQuAD's dev-v2\.0\.json was not given"):
        ruler_items(tokenizer, "qa_1", 4096, indices=[0], seed=3)
    with pytest.raises(BadInput, match="not SQuAD's format"):
        read_squad(b'{"rows": []}')
    with pytest.raises(BadInput, match="not JSON"):
        read_hotpotqa(b"<html>")
    with pytest.raises(BadInput, match="item 1 of only 1 questions"):
        library = {"qa_2": read_hotpotqa(json.dumps(HOTPOT[:1]).encode())}
        ruler_items(tokenizer, "qa_2", 4096, indices=[1], seed=3, documents=library)


def test_invented_answers_stand_in_the_documents_that_are_pointed_at(tokenizer: Tokenizer) -> None:
    for item in ruler_items(tokenizer, "qa_generated", 2048, indices=range(9), seed=3):
        documents = item.text.split("\n\nDocument ")[1:]
        assert item.answers[0] in item.text
        if "river" in item.prompt.rsplit("Question:", 1)[1]:
            person = re.findall(r"where (.+) lives", item.prompt)[0]
            town = re.findall(rf"home of {person} is the town of (\w+)", item.prompt)[0]
            assert f"{town} is a town on the river {item.answers[0]}." in item.prompt
            assert len(item.depths) == 2
        else:
            person = re.findall(r"(?:date was|occupation of) (\w+ \w+)(?: born)?\?$", item.prompt)[0]
            [document] = [text for text in documents if f"\n{person}\n" in text]
            assert item.answers[0] in document


def test_all_thirteen_tasks_generate_as_much_as_the_reference() -> None:
    assert len(TASKS) == 13
    expected = {**dict.fromkeys(NIAH, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    assert {task: MAX_NEW_TOKENS[task] for task in TASKS} == expected


def test_unknown_task_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match="unknown task 'niah'"):
        ruler_items(tokenizer, "niah", 4096, indices=[0], seed=1)


def test_chat_frame_surrounds_the_question_and_the_answer_is_begun_after_it(tokenizer: Tokenizer) -> None:
    frame = tokenizer.chat_frame()
    for task in ("niah_single_1", "vt", "fwe", "qa_generated"):
        item: Item = ruler_items(tokenizer, task, 2048, indices=[0], seed=1, frame=frame)[0]
        assert item.text.startswith(frame[0])
        assert item.text.endswith(frame[1] + item.answer_prefix)
        assert item.text.count("<|im_start|>") == 2
