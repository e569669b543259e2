"""Tasks of lm-evaluation-harness on our engine: the scores of its own HFLM, item by item; nothing cut in silence."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.errors import BadInput
from jobs.evaluation_tasks import Generation
from workers.benchmarks.harness.adapter import OneMetric, SampleScore, leaves_of, sample_scores
from workers.benchmarks.harness.asking import Asking
from workers.benchmarks.texts.tokenizer import Tokenizer
from workers.engines.engine import Answer, Progress, Prompt
from workers.engines.transformers_engine import TransformersEngine

pytestmark = pytest.mark.usefixtures("harness_index")

END = "<|endoftext|>"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEYS = ("quiet-river", "brave-garden", "golden-engine", "ancient-mirror", "silent-forest", "rapid-window")


def needle(key: str, value: int, lines: int) -> str:
    """RULER's niah_single_1 prompt, up to where the answer begins."""
    text = [NOISE] * lines
    text.insert(lines // 2, f"One of the special magic numbers for {key} is: {value}.")
    return (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
        + "\n".join(text)
        + f"\nWhat is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )


DOCS = [
    {
        "prompt": needle(key, 1111111 * (at + 1), 3 + at),
        "answer": str(1111111 * (at + 1)),
        "choices": [str(1111111 * (at + 1)), str(9876543 - at), "blue"],
        "label": 0 if at % 3 else 1,  # every third is wrong on purpose: a model that finds the needle scores 2/3
        "max_length": 256 if at < 3 else 512,
    }
    for at, key in enumerate(KEYS)
]

COMMON = """\
dataset_path: json
dataset_kwargs: {data_files: {test: docs.json}}
test_split: test
doc_to_text: "{{prompt}}"
"""
CHOICE = f"""\
task: tiny_choice
output_type: multiple_choice
{COMMON}
doc_to_target: label
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATE = f"""\
task: tiny_generate
output_type: generate_until
{COMMON}
doc_to_target: answer
generation_kwargs: {{until: ["."], max_gen_toks: 16, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_punctuation: true}}]
filter_list:
  - {{name: stripped, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}
"""
ROLLING = f"""\
task: tiny_rolling
output_type: loglikelihood_rolling
{COMMON.replace('"{{prompt}}"', '""')}
doc_to_target: "{{{{prompt}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def task(tmp_path: Path) -> Callable[[str], str]:
    """task(YAML): the path of a task, with its data beside it."""
    (tmp_path / "docs.json").write_text("\n".join(json.dumps(doc) for doc in DOCS))

    def write(text: str) -> str:
        (tmp_path / "task.yaml").write_text(text)
        return str(tmp_path / "task.yaml")

    return write


@pytest.fixture(scope="module")
def engine(parents: Path) -> Iterator[TransformersEngine]:
    """`long` in float32, so that no near tie hides behind rounding."""
    engine = TransformersEngine.from_folder(parents / "long", version="long", dtype=torch.float32, device="cpu")
    yield engine
    engine.close()


def peer(folder: Path, path: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> dict[str, Any]:
    """What lm-evaluation-harness says itself, with its own HFLM on the same model: each sample by number."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(Path(path).parent)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=1)
    results = lm_eval.simple_evaluate(model=lm, tasks=[path], bootstrap_iters=0, log_samples=True, **more)
    [samples] = results["samples"].values()
    return {"samples": {sample["doc_id"]: sample for sample in samples}, "results": results["results"]}


def by_metric(scores: list[SampleScore]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for score in scores:
        found.setdefault(score.metric, {})[score.item] = score.score
    return found


@pytest.mark.parametrize(("text", "metric"), [(CHOICE, "acc_norm"), (GENERATE, "exact_match")])
def test_items_that_are_asked_by_themselves_score_as_in_the_whole_task(
    engine: TransformersEngine, parents: Path, task: Callable[[str], str], text: str, metric: str
) -> None:
    path, tokenizer = task(text), Tokenizer.from_folder(parents / "long")
    [leaf] = leaves_of({"task": path, "limit": 2}, metric, tokenizer, Generation())
    assert leaf.count == 4, "two of each length"
    whole = {score.item: score for score in sample_scores(engine, path, 2, beginning=END) if metric in score.metric}
    assert max(score.tokens for score in whole.values()) / (3 if text == CHOICE else 1) < leaf.longest
    one = OneMetric(leaf.name, metric, range(1, 3))
    scores = sample_scores(engine, path, 2, beginning=END, one=one)
    assert [(score.metric, score.item) for score in scores] == [(f"{leaf.name}:{metric}", item) for item in (1, 2)]
    third = [*whole][2]
    assert [score.score for score in scores] == [whole[1].score, whole[third].score]
    assert [score.tokens for score in scores] == [whole[1].tokens, whole[third].tokens]


def test_an_item_has_the_same_examples_in_each_part_of_its_task(
    engine: TransformersEngine, task: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness draws the examples of one item after those of another."""
    path = task(GENERATE + "fewshot_split: test\nnum_fewshot: 2\n")
    seen: list[str] = []
    generate = engine.generate

    def listening(prompts: Sequence[Prompt], *, progress: Progress | None = None) -> list[Answer]:
        seen.extend(str(prompt) for prompt in prompts)
        return generate(prompts, progress=progress)

    monkeypatch.setattr(engine, "generate", listening)
    sample_scores(engine, path, None, beginning=END)
    whole = [*seen]
    seen.clear()
    for items in (range(1), range(1, 4), range(4, 6)):
        one = OneMetric("tiny_generate", "exact_match", items)
        scores = sample_scores(engine, path, None, beginning=END, one=one)
        assert [score.item for score in scores] == [*items]
    assert len({*whole}) == 6 and sorted(seen) == sorted(whole)


def test_a_metric_that_a_task_does_not_have_is_refused_before_a_model_is_asked(
    parents: Path, task: Callable[[str], str]
) -> None:
    path, tokenizer = task(CHOICE), Tokenizer.from_folder(parents / "long")
    with pytest.raises(BadInput, match=r'it has no metric "acc_nrm"; did you mean "acc_norm"\?$'):
        leaves_of({"task": path, "limit": None}, "acc_nrm", tokenizer, Generation())
    with pytest.raises(BadInput, match="it scores whole texts, which are not asked one by one; take another task"):
        leaves_of({"task": task(ROLLING), "limit": None}, "word_perplexity", tokenizer, Generation())


def test_choices_score_as_with_the_harness_own_model(
    engine: TransformersEngine, parents: Path, task: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = task(CHOICE)
    scores = by_metric(sample_scores(engine, path, None, beginning=END))
    samples = peer(parents / "long", path, monkeypatch)["samples"]
    assert scores.keys() == {"tiny_choice:acc", "tiny_choice:acc_norm"}
    for metric in ("acc", "acc_norm"):
        assert scores[f"tiny_choice:{metric}"] == {number: sample[metric] for number, sample in samples.items()}
    assert sum(scores["tiny_choice:acc"].values()) == 4, "four of six labels are right, and it finds every needle"


def test_log_likelihoods_are_those_of_the_harness_own_model(
    engine: TransformersEngine, parents: Path, task: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = task(CHOICE.replace('"{{prompt}}"', "\"{{prompt if max_length == 256 else ''}}\""))  # some without context
    answers = {score.item: json.loads(score.answer) for score in sample_scores(engine, path, None, beginning=END)}
    for number, sample in peer(parents / "long", path, monkeypatch)["samples"].items():
        theirs = [response[0] for response in sample["filtered_resps"]]
        assert [value for value, _ in answers[number]] == pytest.approx(theirs, abs=1e-3)
        assert [greedy for _, greedy in answers[number]] == [response[1] for response in sample["filtered_resps"]]


def test_generated_answers_are_those_of_the_harness_own_model(
    engine: TransformersEngine, parents: Path, task: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = task(GENERATE)
    scores = sample_scores(engine, path, None, beginning=END)
    theirs = peer(parents / "long", path, monkeypatch)["samples"]
    assert [score.answer for score in scores] == [theirs[at]["filtered_resps"][0] for at in range(6)]
    assert by_metric(scores) == {"tiny_generate:exact_match": {at: theirs[at]["exact_match"] for at in range(6)}}
    assert all(score.tokens > 100 and score.seconds > 0 and score.finite for score in scores)


def test_a_rolling_likelihood_is_the_harness_own(
    engine: TransformersEngine, parents: Path, task: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = task(ROLLING)
    theirs = peer(parents / "long", path, monkeypatch)["samples"]
    expected: dict[str, dict[int, Any]] = {"inverse_word_perplexity": {}, "inverse_byte_perplexity": {}}
    for at, sample in theirs.items():  # 1 / perplexity = exp(log-likelihood / count), as the harness defines it
        for metric, counted in (("word", DOCS[at]["prompt"].split()), ("byte", DOCS[at]["prompt"].encode())):
            value = math.exp(sample["resps"][0][0] / len(counted))
            expected[f"inverse_{metric}_perplexity"][at] = pytest.approx(value, rel=1e-4)
    scores = by_metric(sample_scores(engine, path, None, beginning=END))
    assert scores == {f"tiny_rolling:{metric}": values for metric, values in expected.items()}


def of_own(folder: Path, code: str) -> None:
    """The module `own` beside the task, under a name that no other test's has."""
    (folder / "own.py").write_text(code)


OWN = GENERATE.replace("tiny_generate", "tiny_own").replace(
    "generation_kwargs", "process_results: !function own.results\ngeneration_kwargs"
)
OWN = OWN[: OWN.index("metric_list")] + "metric_list:\n"
FOUND = "def results(doc, results):\n    found = float(doc['answer'] in results[0] and doc['label'] == 0)\n"


def own_metric(name: str, aggregation: str = "mean", better: str = "true") -> str:
    return f"  - {{metric: {name}, aggregation: {aggregation}, higher_is_better: {better}}}\n"


def test_a_metric_to_100_is_the_same_metric_in_hundredths(
    engine: TransformersEngine, task: Callable[[str], str], tmp_path: Path
) -> None:
    of_own(tmp_path, FOUND + "    return {'acc': found, 'em': found * 100.0}\n")
    remarks: list[str] = []
    text = OWN + own_metric("acc") + own_metric("em")
    scores = by_metric(sample_scores(engine, task(text), None, beginning=END, remark=remarks.append))
    right = {at: float(DOCS[at]["label"] == 0) for at in range(6)}
    assert scores == {"tiny_own:acc": right, "tiny_own:em": right}
    assert len(remarks) == 1 and remarks[0].endswith("task.yaml: em runs to 100 and counts in hundredths")


def test_a_metric_that_no_answer_reached_is_known_by_the_reference(
    engine: TransformersEngine, task: Callable[[str], str], tmp_path: Path
) -> None:
    of_own(tmp_path, "def results(doc, results):\n    return {'em': 100.0 if results[0] == doc['answer'] else 1.0}\n")
    path = task(OWN.replace('until: ["."]', "until: []") + own_metric("em"))  # the full stop makes every answer wrong
    assert by_metric(sample_scores(engine, path, None, beginning=END)) == {"tiny_own:em": dict.fromkeys(range(6), 0.01)}


def test_a_metric_that_is_no_score_is_left_out_for_every_item(
    engine: TransformersEngine, task: Callable[[str], str], tmp_path: Path
) -> None:
    of_own(tmp_path, FOUND + "    return {'acc': found, 'distance': found, 'gain': found * 2 - 1}\n")
    text = OWN + own_metric("acc") + own_metric("distance", better="false") + own_metric("gain")
    told: list[str] = []
    scores = sample_scores(engine, task(text), None, beginning=END, remark=told.append)
    assert by_metric(scores).keys() == {"tiny_own:acc"}
    [remark] = told
    assert "distance is left out: less of it is better" in remark and "gain is left out: it is not from 0" in remark


def test_pairs_of_answer_and_reference_are_scored_by_the_task_own_aggregation(
    engine: TransformersEngine, task: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sacrebleu import corpus_chrf

    code = "def results(doc, results):\n    pair = (doc['answer'], results[0].strip())\n"
    of_own(tmp_path, code + "    return {'chrf': pair, 'of_all': pair}\ndef of_all(pairs):\n    return pairs[1]\n")
    text = OWN + own_metric("chrf", "chrf") + own_metric("of_all", "!function own.of_all")
    told: list[str] = []
    scores = sample_scores(engine, task(text), None, beginning=END, remark=told.append)
    assert {score.metric for score in scores} == {"tiny_own:chrf"}
    for score in scores:
        expected = corpus_chrf([score.answer], [[DOCS[score.item]["answer"]]]).score / 100
        assert score.score == pytest.approx(expected, abs=1e-6)
    assert len(told) == 1 and "of_all is left out: a single item has none" in told[0]


def test_a_task_without_a_metric_to_keep_is_refused_before_anything_is_asked(
    engine: TransformersEngine, task: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_own(tmp_path, "def results(doc, results):\n    return {'length': -len(results[0])}\n")
    monkeypatch.setattr(engine, "generate", None)
    with pytest.raises(BadInput, match=r"no metric can be kept \(length is left out: it is not from 0"):
        sample_scores(engine, task(OWN + own_metric("length")), None, beginning=END)


def test_what_a_task_own_code_raises_is_one_line_and_what_ours_does_is_not_taken_for_it(
    engine: TransformersEngine, task: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_own(tmp_path, "def results(doc, results):\n    return {'acc': doc['nothing']}\n")
    with pytest.raises(BadInput, match="KeyError: 'nothing'; see the task's own documentation"):
        sample_scores(engine, task(OWN + own_metric("acc")), None, beginning=END)

    def broken(prompts: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(engine, "generate", broken)
    with pytest.raises(KeyError, match="ours"):
        sample_scores(engine, task(GENERATE), None, beginning=END)


def test_the_items_of_a_task_that_shuffles_are_the_same_on_every_worker(
    engine: TransformersEngine, task: Callable[[str], str], tmp_path: Path
) -> None:
    code = "import random\ndef docs(dataset):\n    return dataset.select(random.sample(range(len(dataset)), 3))\n"
    of_own(tmp_path, code)
    path = task(CHOICE + "process_docs: !function own.docs\n")
    first, second = (sample_scores(engine, path, None, beginning=END) for _ in range(2))
    assert [score.tokens for score in first] == [score.tokens for score in second], "prompts of six different lengths"


def test_a_task_is_told_what_the_job_and_the_tokenizer_say(
    engine: TransformersEngine, parents: Path, task: Callable[[str], str], tmp_path: Path
) -> None:
    of_own(
        tmp_path,
        "import datasets, transformers\n"
        "def docs(**told):\n"
        "    tokens = transformers.AutoTokenizer.from_pretrained(told['tokenizer'])('The sky')['input_ids']\n"
        "    rows = [{'prompt': f'{length} ' * len(tokens), 'answer': 'x'} for length in told['max_seq_lengths']]\n"
        "    return {'test': datasets.Dataset.from_list(rows)}\n",
    )
    text = GENERATE.replace("dataset_path: json\n", "custom_dataset: !function own.docs\n")
    path = task(text.replace("dataset_kwargs: {data_files: {test: docs.json}}\n", ""))
    scores = sample_scores(
        engine, path, None, beginning=END, tokenizer=parents / "long", metadata={"max_seq_lengths": [64, 128]}
    )
    assert len(scores) == 2


def test_examples_and_the_chat_template_stand_in_the_prompt_as_with_the_harness_own_model(
    engine: TransformersEngine, parents: Path, task: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = GENERATE.replace("doc_to_target: answer", "doc_to_target: answer\nfewshot_split: test\n")
    path = task(text.replace("max_gen_toks: 16", "max_gen_toks: 1"))
    asked: list[str] = []
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda prompts: asked.extend(p.whole for p in prompts) or generate(prompts))
    template = (parents / "long" / "chat_template.jinja").read_text()
    sample_scores(
        engine, path, None, beginning=END, tokenizer=parents / "long", num_fewshot=2, chat={"chat_template": template}
    )
    theirs = peer(parents / "long", path, monkeypatch, num_fewshot=2, apply_chat_template=True)["samples"]
    assert asked == [theirs[at]["arguments"][0][0] for at in range(6)]
    assert all(prompt.count("special magic number is hidden") == 3 for prompt in asked)


class Request:
    """As much of an `Instance` of the harness as is looked at."""

    task_name, doc_id = "tiny", 0

    def __init__(self, *args: str) -> None:
        self.args = args


@pytest.fixture(scope="module")
def marking(tmp_path_factory: pytest.TempPathFactory, parents: Path) -> Path:
    """A tokenizer that puts a beginning-of-text token before every text, as Llama's does."""
    folder = tmp_path_factory.mktemp("marking")
    content = json.loads((parents / "long" / "tokenizer.json").read_text())
    mark = {"SpecialToken": {"id": END, "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [mark, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("marks", [False, True], ids=["plain", "marking"])
def test_log_likelihoods_are_of_the_tokens_that_the_harness_own_model_takes(
    parents: Path, marking: Path, marks: bool
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    engine = TransformersEngine.from_folder(parents / "long", dtype=torch.float32, device="cpu")
    if marks:
        engine.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(marking), bos_token=END, eos_token="<|im_end|>")
        assert engine.encode("The sky")[0] == engine.encode(END)[-1]
    model = AutoModelForCausalLM.from_pretrained(parents / "long", dtype=torch.float32)
    lm = HFLM(pretrained=model, tokenizer=engine.tokenizer, batch_size=1)
    pairs = [
        ("The grass is green.\n", "The sky"), ("Q: sky?\nA:\n\n", "blue is the sun"), ("The grass is", " green"),
        ("The grass is ", "green"), ("x\t", "y z"), ("", "The sky is blue"), ("", f"{END}The sky"), (" ", "The sky"),
        (f"{END}The grass is", " green"),
    ]  # fmt: skip
    if not marks:
        pairs.remove((" ", "The sky"))  # the harness asserts that a context has a token
    ours = Asking(engine, END).ask("loglikelihood", [Request(*pair) for pair in pairs])  # type: ignore[list-item]
    theirs = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    for pair, (value, greedy), (expected, expected_greedy) in zip(pairs, ours, theirs, strict=True):
        assert (value, greedy) == (pytest.approx(expected, abs=1e-3), expected_greedy), pair


def test_a_context_is_encoded_once_for_all_of_its_choices(
    engine: TransformersEngine, task: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    encode = engine.encode
    monkeypatch.setattr(engine, "encode", lambda text, **how: seen.append(text) or encode(text, **how))
    sample_scores(engine, task(CHOICE), 1, beginning=END)
    for doc in (DOCS[0], DOCS[3]):
        assert seen.count(doc["prompt"]) == 1
        assert sum(text.startswith(doc["prompt"]) for text in seen) == 1 + len(doc["choices"])


def test_a_limit_takes_the_first_items_of_each_length(engine: TransformersEngine, task: Callable[[str], str]) -> None:
    scores = sample_scores(engine, task(GENERATE), 1, beginning=END)
    assert [score.item for score in scores] == [0, 3]
    everything = {score.item: score for score in sample_scores(engine, task(GENERATE), None, beginning=END)}
    assert [(score.answer, score.score) for score in scores] == [
        (everything[at].answer, everything[at].score) for at in (0, 3)
    ]


@pytest.mark.parametrize("text", [CHOICE, GENERATE], ids=["choice", "generate"])
def test_what_exceeds_the_context_is_counted_and_never_cut(
    engine: TransformersEngine, task: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    lengths = [len(engine.encode(doc["prompt"])) for doc in DOCS]
    monkeypatch.setattr(engine.config, "max_position_embeddings", lengths[3] + 20)
    seen: list[int] = []
    encode = engine.encode
    monkeypatch.setattr(engine, "encode", lambda part, **how: seen.append(len(encode(part))) or encode(part, **how))
    scores = by_metric(sample_scores(engine, task(text), None, beginning=END))
    [over] = [metric for metric in scores if metric.endswith(":over_long")]
    assert scores.pop(over) == {0: 0, 1: 0, 2: 0, 3: 0, 4: 1, 5: 1}
    assert all(list(items) == [0, 1, 2, 3] for items in scores.values())


def test_a_task_that_fits_nowhere_is_refused(
    engine: TransformersEngine, task: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.config, "max_position_embeddings", 50)
    with pytest.raises(BadInput, match="every item exceeds the model's 50 tokens"):
        sample_scores(engine, task(GENERATE), None, beginning=END)


def test_a_thought_that_fits_nowhere_is_told_with_one_that_does(
    engine: TransformersEngine, task: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.config, "max_position_embeddings", 512)
    thought = Generation(end="</think>", budget=512)
    with pytest.raises(BadInput, match="every item exceeds the model's 512 tokens with a thought of 512;") as refused:
        sample_scores(engine, task(GENERATE), None, beginning=END, generation=thought)
    [budget] = re.findall(r"take `thinking: {budget: (\d+)}` or less, or set `thinking: off`$", str(refused.value))
    fits = replace(thought, budget=int(budget))
    scores = by_metric(sample_scores(engine, task(GENERATE), None, beginning=END, generation=fits))
    assert scores["tiny_generate:over_long"] == {0: 0, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1}, "room for the shortest"
    assert sample_scores(engine, task(GENERATE), 1, beginning=END), "the other remedy"
    monkeypatch.setattr(engine.config, "max_position_embeddings", 50)
    with pytest.raises(BadInput, match="every item exceeds the model's 50 tokens; take another task"):
        sample_scores(engine, task(GENERATE), None, beginning=END, generation=thought)


def test_broken_weights_score_nothing(parents: Path, task: Callable[[str], str]) -> None:
    broken = TransformersEngine.from_folder(parents / "long", dtype=torch.float32, device="cpu")
    with torch.no_grad():
        broken.model.model.norm.weight[0] = float("nan")
    for text in (CHOICE, GENERATE):
        scores = sample_scores(broken, task(text), 2, beginning=END)
        assert {(score.finite, score.score) for score in scores} == {(False, 0.0)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arc_eazy", 'lm_eval has no task "arc_eazy"; did you mean "arc_easy"'),
        ("/nowhere/mine.yaml", "no such file on this worker; put it where every worker can read it"),
    ],
)
def test_a_task_that_is_not_there_is_named(engine: TransformersEngine, name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        sample_scores(engine, name, 1, beginning=END)


def test_data_that_are_not_there_are_one_line(
    engine: TransformersEngine, task: Callable[[str], str], tmp_path: Path
) -> None:
    path = task(CHOICE)
    (tmp_path / "docs.json").unlink()
    with pytest.raises(BadInput, match=r"task\.yaml: cannot be loaded .*are its data here\?") as caught:
        sample_scores(engine, path, 1, beginning=END)
    assert "\n" not in str(caught.value)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scrolls_qasper", r"it needs transformers\.data\.metrics, which transformers \S+ no longer has"),
        ("longbench_qasper", r"cannot be loaded \(.*\); are its data here\?"),  # the modules that it needs are here
    ],
)
def test_the_harness_own_long_tasks_are_known_or_told_in_a_line(
    engine: TransformersEngine, name: str, message: str
) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        sample_scores(engine, name, 1, beginning=END)
    assert "\n" not in str(caught.value)


@pytest.mark.heavy
def test_the_harness_own_ruler_takes_its_lengths_and_tokenizer(engine: TransformersEngine, parents: Path) -> None:
    told = {"max_seq_lengths": [512, 1024]}
    scores = sample_scores(engine, "niah_single_1", 2, beginning=END, tokenizer=parents / "long", metadata=told)
    assert {(score.metric, score.item) for score in scores} == {
        ("niah_single_1:512", 0), ("niah_single_1:512", 1), ("niah_single_1:1024", 500), ("niah_single_1:1024", 501),
    }  # fmt: skip
    assert all(0 <= score.score <= 1 for score in scores)


def test_a_task_that_samples_is_refused(engine: TransformersEngine, task: Callable[[str], str]) -> None:
    path = task(GENERATE.replace("do_sample: false", "do_sample: true, temperature: 0.7"))
    with pytest.raises(BadInput, match="tiny_generate: the task samples its answers; give `lm_eval:` a `temperature:`"):
        sample_scores(engine, path, 1, beginning=END)


def test_each_repeat_of_a_vote_is_drawn_by_itself(
    engine: TransformersEngine, task: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vote = """\
  - {name: first, filter: [{function: take_first}]}
  - {name: vote, filter: [{function: majority_vote}, {function: take_first}]}
"""
    text = GENERATE[: GENERATE.index("  - {name: stripped")].replace("max_gen_toks: 16", "max_gen_toks: 2") + vote
    drawn = Generation(temperature=2.0, seed=5)
    seen: list[str] = []
    generate = engine.generate

    def listening(prompts: Sequence[Prompt], *, progress: Progress | None = None) -> list[Answer]:
        answers = generate(prompts, progress=progress)
        seen.extend(answer.text for answer in answers)
        return answers

    monkeypatch.setattr(engine, "generate", listening)
    once = sample_scores(engine, task(text), None, beginning=END, generation=drawn)
    assert len(seen) == len(DOCS)
    seen.clear()
    scores = sample_scores(engine, task(text + "repeats: 9\n"), None, beginning=END, generation=drawn)
    of_item = [seen[begin : begin + 9] for begin in range(0, 9 * len(DOCS), 9)]
    assert len(seen) == 9 * len(DOCS) and all(len({*answers}) > 1 for answers in of_item)
    answers = {name: [score.answer for score in scores if score.metric.endswith(name)] for name in ("first", "vote")}
    assert (
        answers["first"] == [nine[0] for nine in of_item] == [score.answer for score in once if "first" in score.metric]
    )
    assert answers["vote"] == [Counter(nine).most_common(1)[0][0] for nine in of_item] != answers["first"]
    seen.clear()
    sample_scores(engine, task(text + "repeats: 9\n"), None, beginning=END)
    assert len(seen) == len(DOCS), "greedy answers are asked for once"


def test_the_harness_prints_nothing(
    engine: TransformersEngine, task: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    sample_scores(engine, task(CHOICE), 1, beginning=END)
    assert capfd.readouterr() == ("", "")


def test_the_extra_that_is_missing_is_named(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BadInput, match=r"pip install 'mergeyard\[lm-eval\]'"):
        sample_scores(engine, "arc_easy", 1, beginning=END)
