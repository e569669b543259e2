"""Tasks of lm-evaluation-harness on our engine: the scores of its own HFLM, item by item; nothing cut in silence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.errors import BadInput
from workers.benchmarks.lm_eval_adapter import SampleScore, sample_scores
from workers.engines.transformers_engine import TransformersEngine

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


def peer(folder: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What lm-evaluation-harness says itself, with its own HFLM on the same model: each sample by number."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(Path(path).parent)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=1)
    results = lm_eval.simple_evaluate(model=lm, tasks=[path], bootstrap_iters=0, log_samples=True)
    [samples] = results["samples"].values()
    return {"samples": {sample["doc_id"]: sample for sample in samples}, "results": results["results"]}


def by_metric(scores: list[SampleScore]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for score in scores:
        found.setdefault(score.metric, {})[score.item] = score.score
    return found


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
    ours: dict[int, float] = {}

    def keep(self: Any, requests: Any, original: Any = None) -> list[float]:
        values = original(self, requests)
        ours.update({request.doc_id: value for request, value in zip(requests, values, strict=True)})
        return values

    from workers.benchmarks import lm_eval_adapter

    original = lm_eval_adapter._Asking.loglikelihood_rolling
    monkeypatch.setattr(
        lm_eval_adapter._Asking, "loglikelihood_rolling", lambda self, requests: keep(self, requests, original)
    )
    with pytest.raises(BadInput, match="no metric is from 0 to 1"):
        sample_scores(engine, path, None, beginning=END)
    assert ours == {at: pytest.approx(sample["resps"][0][0], rel=1e-4) for at, sample in theirs.items()}


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
    monkeypatch.setattr(engine, "encode", lambda part: seen.append(len(encode(part))) or encode(part))
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


def test_a_task_that_samples_is_refused(engine: TransformersEngine, task: Callable[[str], str]) -> None:
    path = task(GENERATE.replace("do_sample: false", "do_sample: true, temperature: 0.7"))
    with pytest.raises(BadInput, match="tiny_generate: the task samples its answers; set do_sample: false"):
        sample_scores(engine, path, 1, beginning=END)


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
