"""A job file is checked whole before anything else happens: every refusal is one line with file and place."""

from __future__ import annotations

import pickle
from fractions import Fraction

import pytest

from jobs.engine import EngineSpec
from jobs.errors import BadInput
from jobs.evaluate import Evaluation, LmEvalSpec, NeedleSpec, PerplexitySpec, RaceSpec, RulerSpec
from jobs.job import GateSpec, Job, Keep, WorkerSpec, load_job, load_merge_document
from tests.growth import growth

SEED = """\
name: soup
parents:
  cos: hf://someone/cos@main
  fmt: s3://models/fmt
recipe:
  merge_method: linear
  models:
    - {model: cos, parameters: {weight: "${w}"}}
    - {model: fmt, parameters: {weight: "${1 - w}"}}
  dtype: bfloat16
grid:
  w: {from: 0.0, to: 1.0, step: 0.1}
point: cos{w}fmt{1-w}
output: s3://bucket/runs
"""


def with_line(addition: str) -> str:
    """The seed job and more; the first line added is line 15."""
    return f"{SEED}{addition}\n"


def replaced(old: str, new: str) -> str:
    assert SEED.count(old) == 1
    return SEED.replace(old, new)


def test_the_job_of_a_night_keeps_the_anchor_beside_the_blessed_point() -> None:
    text = replaced("  fmt: s3", "  anchor: x\n  blessed: y\n  fmt: s3")
    text += "evaluate: {ruler: {lengths: [64]}}\ngate: {baseline: blessed}\n"
    assert set(load_job(text, "job.yaml").parents) == {"anchor", "blessed", "cos", "fmt"}
    with pytest.raises(BadInput, match='the parent "anchor" is used nowhere'):
        load_job(text.replace("blessed", "old"), "job.yaml")


def load(text: str) -> Job:
    return load_job(text, "job.yaml")


def refusal(text: str) -> str:
    with pytest.raises(BadInput) as caught:
        load(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_seed_job_means_what_its_author_did_by_hand() -> None:
    job = load(SEED)
    assert len(job.points) == 11
    blessed = job.points[7]
    assert blessed.name == "cos0.7fmt0.3"
    assert blessed.bindings == {"w": Fraction(7, 10)}
    assert blessed.recipe.document() == {
        "merge_method": "linear",
        "models": [
            {"model": "cos", "parameters": {"weight": 0.7}},
            {"model": "fmt", "parameters": {"weight": 0.3}},
        ],
        "dtype": "bfloat16",
    }
    assert job.parents == {"cos": "hf://someone/cos@main", "fmt": "s3://models/fmt"}
    assert job.output == "s3://bucket/runs"
    assert job.source == "job.yaml"


def test_defaults_are_those_of_the_reference() -> None:
    job = load(SEED)
    assert (job.evaluate, job.gate, job.config_from) == (None, None, None)
    assert job.keep == Keep(kind="all", count=None)
    assert job.workers == WorkerSpec(gpus=0.0, cpus=1.0, memory_bytes=4 * 10**9, count=None)
    assert job.engine == EngineSpec(name="transformers", url=None, options={})
    assert (job.shard_bytes, job.seed, job.numerics) == (10**9, 0, "float32")


def test_every_section_is_read() -> None:
    job = load(
        with_line(
            """\
evaluate:
  ruler: {lengths: [4096, 8192], items: 24, tasks: [niah_single_1], haystack: essays.txt, questions: 8}
  needle: {lengths: [4096], depths: 5, items: 2, questions: 4, answer: '<{value}>', haystack: s3://texts/x.txt}
  perplexity: {lengths: [1024], text: book.txt, blocks: 4}
  lm_eval:
    {tasks: [longbench2], limit: 10, num_fewshot: 0, chat: true, metadata: {lengths: [4096, 8192], kind: 4k}}
  race: {keep: 3, alpha: 0.01}
gate: {baseline: cos, margin: 0.5, length_margin: 2, alpha: 0.1}
keep: {best: 3}
engine: {name: vllm, options: {max_num_seqs: 64, gpu_memory_utilization: 0.8, enforce_eager: true, dtype: auto}}
workers: {gpus: 0.5, cpus: 4, memory: 8GB, count: 2}
shard_size: 512MiB
seed: 7
numerics: mergekit
config_from: fmt"""
        )
    )
    assert job.evaluate == Evaluation(
        benchmarks={
            "ruler": RulerSpec(
                lengths=(4096, 8192), items=24, tasks=("niah_single_1",), haystack="essays.txt", questions=8
            ),
            "needle": NeedleSpec(
                lengths=(4096,), depths=5, items=2, questions=4, answer="<{value}>", haystack="s3://texts/x.txt"
            ),
            "perplexity": PerplexitySpec(lengths=(1024,), text="book.txt", blocks=4),
            "lm_eval": LmEvalSpec(
                tasks=("longbench2",),
                limit=10,
                num_fewshot=0,
                chat=True,
                metadata={"lengths": (4096, 8192), "kind": "4k"},
            ),
        },
        race=RaceSpec(keep=3, alpha=0.01),
    )
    assert job.evaluate.benchmarks["ruler"].place == "job.yaml:16"
    assert job.gate == GateSpec(baseline="cos", margin=0.5, length_margin=2.0, alpha=0.1)
    assert job.keep == Keep(kind="best", count=3)
    assert job.engine == EngineSpec(
        name="vllm",
        options={"max_num_seqs": 64, "gpu_memory_utilization": 0.8, "enforce_eager": True, "dtype": "auto"},
    )
    assert job.workers == WorkerSpec(gpus=0.5, cpus=4.0, memory_bytes=8 * 10**9, count=2)
    assert (job.shard_bytes, job.seed, job.numerics, job.config_from) == (2**29, 7, "mergekit", "fmt")


@pytest.mark.parametrize(
    ("race", "expected"),
    [
        ("off", None),
        ("false", None),
        ("on", RaceSpec()),
        ("{keep: 2}", RaceSpec(keep=2)),
        ("{output_tokens: on}", RaceSpec(output_tokens=True)),
    ],
)
def test_a_race_may_be_off(race: str, expected: RaceSpec | None) -> None:
    job = load(with_line(f"evaluate: {{needle: {{lengths: [64]}}, race: {race}}}"))
    assert job.evaluate is not None and job.evaluate.race == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("samples: 4", r"samples needs a `temperature:` above 0"),
        ("top_p: 0.9", r"top_p needs a `temperature:` above 0"),
        ("temperature: 3", r"must be at most 2, as in vLLM"),
        ("temperature: 1, top_p: 1.5", r"must be above 0 and at most 1, not 1.5"),
        ("system: Think., thinking: on", r"`system:` has an effect only in a chat; set `chat: true`, or take it out"),
        ("thinking: {template: {a: 1}}", r"`thinking.template` has an effect only in a chat; set `chat: true`, or"),
        (r'thinking: {end: " \n"}', r"a thought may hold white space; give the text that ends it, such as </think>"),
        ("thinking: maybe", r"thinking must be `on`, `off` or settings such as `\{budget: 4096\}`"),
        ("chat: {messages: x}", r"mergeyard sets \"messages\", the conversation itself"),
    ],
)
def test_keys_of_answers_that_do_not_agree_are_refused(keys: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load(with_line(f"evaluate: {{needle: {{lengths: [64], {keys}}}}}"))


@pytest.mark.parametrize(
    "keys",
    [
        "system: Think., thinking: on, chat: true",
        "thinking: {template: {a: 1}}, chat: true",
        "thinking: {template: {}}",
        "thinking: {end: </think>}",
    ],
)
def test_the_remedies_of_answers_are_read(keys: str) -> None:
    assert load(with_line(f"evaluate: {{needle: {{lengths: [64], {keys}}}}}")).evaluate is not None


def test_weights_of_benchmarks_are_read_and_weights_of_one_are_none() -> None:
    both = "evaluate: {ruler: {lengths: [64]}, needle: {lengths: [64]}"
    plain = load(with_line(both + "}"))
    weighted, alike = (
        load(with_line(f"{both}, weights: {found}}}")) for found in ("{ruler: 3, needle: 1}", "{ruler: 1.0, needle: 1}")
    )
    assert weighted.evaluate is not None and weighted.evaluate.weights == {"ruler": 3.0}
    assert alike.digest() == plain.digest() != weighted.digest()
    assert weighted.evaluate.document()["weights"] == {"ruler": 3.0}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("{needle: 0}", "a weight must be above 0, not 0; to ignore needle, take it out"),
        ("{needle: .inf}", "weights.needle"),
        ("{ruler: 2}", 'unknown key "ruler"'),
    ],
)
def test_weights_that_say_nothing_are_refused(weights: str, message: str) -> None:
    with pytest.raises(BadInput) as raised:
        load(with_line(f"evaluate: {{needle: {{lengths: [64]}}, weights: {weights}}}"))
    assert message in str(raised.value)


def test_keys_of_answers_leave_the_digest_of_jobs_without_them() -> None:
    def digest(keys: str) -> str:
        return load(with_line(f"evaluate: {{needle: {{lengths: [64]{keys}}}}}")).digest()

    plain = digest("")
    assert digest(", temperature: 0, samples: 1, answer_prefix: true") == plain
    others = ["thinking: on", "thinking: off", "temperature: 1", "max_new_tokens: 9", "answer_prefix: false"]
    assert len({plain, *(digest(f", {other}") for other in others)}) == 1 + len(others)


def test_a_parent_may_be_there_for_the_gate_alone() -> None:
    text = replaced("parents:\n", "parents:\n  blessed: s3://models/blessed\n")
    gated = f"{text}evaluate: {{needle: {{lengths: [64]}}}}\ngate: {{baseline: blessed}}\n"
    assert load(gated).gate == GateSpec(baseline="blessed", margin=1.0)


def test_a_point_may_be_the_baseline() -> None:
    job = load(with_line("evaluate: {needle: {lengths: [64]}}\ngate: {baseline: cos0.7fmt0.3}"))
    assert job.gate is not None and job.gate.baseline == "cos0.7fmt0.3"


def test_a_parent_may_be_an_axis() -> None:
    text = replaced("model: fmt,", 'model: "${other}",')
    text = (
        text.replace("grid:\n", "grid:\n  other: [fmt, len]\n")
        .replace("point: ", 'point: "{other}-')
        .replace("{1-w}\n", '{1-w}"\n')
    )
    job = load(text.replace("  fmt:", "  len: s3://models/len\n  fmt:"))
    assert len(job.points) == 22
    assert job.points[-1].recipe.references() == ("cos", "len")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (with_line("evalute: {}"), 'job.yaml:15: unknown key "evalute"; did you mean "evaluate"?'),
        (replaced("name: soup\n", ""), 'job.yaml:1: the document needs the key "name"'),
        (replaced("output: s3://bucket/runs\n", ""), 'job.yaml:1: the document needs the key "output"'),
        ("name: x\noutput: y\nparents: {a: b}\n", 'job.yaml:1: the document needs the key "recipe"'),
        (replaced("name: soup", "name: a/b"), 'job.yaml:1: "a/b" cannot name a job'),
        (replaced("name: soup", "name: 7"), 'job.yaml:1: "name" must be a string, not a number 7; put it in quotes'),
        (replaced("  cos: hf://someone/cos@main", "  cos: 3"), 'job.yaml:3: "parents.cos" must be a string'),
        (replaced("  cos: hf://someone/cos@main", "  co s: x"), 'job.yaml:3: "co s" cannot name a parent'),
        (replaced("model: cos,", "model: csο,"), 'job.yaml:8: "csο" is not in `parents:`; did you mean "cos"?'),
        (replaced("  dtype: bfloat16", "  base_model: bsae"), 'job.yaml:10: "bsae" is not in `parents:`'),
        (replaced("  fmt: s3", "  old: x\n  fmt: s3"), 'job.yaml:4: the parent "old" is used nowhere'),
        (replaced('"${1 - w}"', '"${1 - v}"'), 'job.yaml:9: unknown axis "v"; choose from w'),
        (replaced('"${1 - w}"', '"${max(w, 1)}"'), 'job.yaml:9: "," is not arithmetic in "max(w, 1)"'),
        (replaced("grid:\n", "grid:\n  density: [1, 2]\n"), 'job.yaml:12: the axis "density" is used nowhere'),
        (replaced("  w: {from: 0.0, to: 1.0, step: 0.1}", "  w: []"), 'job.yaml:12: "grid.w" is an empty list'),
        (replaced("point: cos{w}fmt{1-w}", "point: same"), 'are both called "same"; name every axis in `point:`'),
        (replaced("point: cos{w}fmt{1-w}", "point: cos{w"), "job.yaml:13: a brace is opened and not closed"),
        (with_line("evaluate: {}"), "job.yaml:15: nothing to evaluate; name a benchmark"),
        (with_line("evaluate: {race: {keep: 1}}"), "job.yaml:15: nothing to evaluate"),
        (with_line("evaluate:\n  rulr: {}"), 'job.yaml:16: unknown key "rulr"; did you mean "ruler"?'),
        (with_line("evaluate:\n  ruler: {}"), 'job.yaml:16: "evaluate.ruler" needs the key "lengths"'),
        (
            with_line("evaluate:\n  ruler:\n    lengths: [12]"),
            'job.yaml:17: "evaluate.ruler.lengths[0]" must be at least 64',
        ),
        (with_line("evaluate:\n  ruler: {lengths: [64, 64]}"), 'job.yaml:16: "64" is listed twice'),
        (with_line("evaluate:\n  ruler: {lengths: 64}"), 'job.yaml:16: "evaluate.ruler.lengths" must be a list'),
        (
            with_line("evaluate:\n  ruler: {lengths: [64], items: 0}"),
            'job.yaml:16: "evaluate.ruler.items" must be at least 1',
        ),
        (with_line("evaluate:\n  lm_eval: {tasks: [a, a]}"), 'job.yaml:16: "a" is listed twice'),
        (
            with_line("evaluate:\n  lm_eval: {tasks: [a], metadata: {tokenizer: other/model}}"),
            'job.yaml:16: mergeyard sets "tokenizer", the points\' own tokenizer; take it out',
        ),
        (with_line("evaluate:\n  lm_eval: {limit: 2}"), 'job.yaml:16: "evaluate.lm_eval" needs the key "tasks"'),
        (
            with_line("evaluate: {needle: {lengths: [64]}, race: {alpha: 0.5}}"),
            "job.yaml:15: alpha, the chance of a wrong",
        ),
        (
            with_line("evaluate: {needle: {lengths: [64]}, race: yess}"),
            'race must be `true`, `false` or settings such as `{keep: 2}`, not a string "yess"',
        ),
        (
            with_line("evaluate: {needle: {lengths: [64]}, race: 3}"),
            "race must be `true`, `false` or settings such as `{keep: 2}`, not a number 3",
        ),
        (
            with_line("evaluate:\n  needle: {lengths: [64], answer: ja}"),
            'job.yaml:16: "ja" is the same for every needle; put {value}',
        ),
        (with_line("gate: {baseline: cos}"), "job.yaml:15: a gate judges scores; add `evaluate:`"),
        (
            with_line("evaluate: {needle: {lengths: [64]}}\ngate: {baseline: coz}"),
            'job.yaml:16: the baseline "coz" is neither',
        ),
        (
            with_line("evaluate: {needle: {lengths: [64]}}\ngate: {baseline: cos, margin: -1}"),
            "job.yaml:16: a margin is a number of points between 0 and 100",
        ),
        (with_line("evaluate: {needle: {lengths: [64]}}\ngate: {margin: 1}"), '"gate" needs the key "baseline"'),
        (with_line("keep: some"), "job.yaml:15: keep must be `all`, `none` or `{best: 3}`"),
        (with_line("keep: {best: 0}"), '"keep.best" must be at least 1'),
        (with_line("keep: {best: 3}"), "job.yaml:15: the best points are known only after `evaluate:`"),
        (with_line("keep: none"), "job.yaml:15: nothing would be written and nothing evaluated"),
        (with_line("engine: vlm"), 'job.yaml:15: "engine" cannot be "vlm"; choose from transformers, vllm, openai'),
        (with_line("engine: openai"), "job.yaml:15: the engine openai needs `url:`"),
        (with_line("engine: {name: vllm, url: http://x}"), "job.yaml:15: the engine vllm has no `url:`"),
        (with_line("engine: {name: vllm, servers: {cos: {url: http://x}}}"), "the engine vllm has no `servers:`"),
        (
            with_line("engine:\n  name: openai\n  servers:\n    fmt: {url: http://x}\n    cos: {}"),
            'job.yaml:19: the server of "cos" needs `url:`, or give that of the engine',
        ),
        (
            with_line("engine: {name: openai, url: http://x, servers: {csο: {}}}"),
            'job.yaml:15: "csο" is neither a parent nor a point; did you mean "cos"?',
        ),
        (
            with_line("engine: {name: openai, url: http://x, servers: {cos: {url: http://me:key@x}}}"),
            "job.yaml:15: the server's address holds no credentials",
        ),
        (
            with_line("engine: {name: vllm, options: {max_num_seq: 64}}"),
            'job.yaml:15: the engine vllm takes no option "max_num_seq"; did you mean "max_num_seqs"?',
        ),
        (
            with_line("engine: {name: transformers, options: {max_num_seqs: 64}}"),
            'the engine transformers takes no option "max_num_seqs"; choose from batch, cache_bytes, chunk',
        ),
        (with_line("workers: {gpu: 1}"), 'job.yaml:15: unknown key "gpu"; did you mean "gpus"?'),
        (with_line("workers: {gpus: -1}"), '"workers.gpus" must be at least 0'),
        (with_line("workers: {gpus: 1.5}"), 'job.yaml:15: "workers.gpus" above 1 must be a whole number, not 1.5'),
        (with_line("workers: {gpus: 0.00004}"), '"workers.gpus" must be 0 or at least 0.0001, not 4e-05'),
        (with_line("workers: {memory: lots}"), 'job.yaml:15: "workers.memory" must be a size such as 1GB'),
        (with_line("shard_size: 0"), 'job.yaml:15: "shard_size" must be at least 1'),
        (with_line("seed: -1"), 'job.yaml:15: "seed" must be at least 0'),
        (with_line("seed: 1e30"), 'job.yaml:15: "seed" must be at most 18446744073709551615'),
        (with_line("numerics: bf16"), 'job.yaml:15: "numerics" cannot be "bf16"; choose from float32, mergekit'),
        (with_line("config_from: csο"), 'job.yaml:15: "csο" is not a parent; did you mean "cos"?'),
        (with_line("name: again"), 'job.yaml:15: the key "name" stands here twice (first on line 1)'),
        ("just text", 'job.yaml:1: the document must be a mapping, not a string "just text"'),
    ],
)
def test_bad_input_gets_the_thing_the_place_and_the_remedy(text: str, message: str) -> None:
    assert message in refusal(text)
    assert refusal(text).startswith(("job.yaml:", "recipe.yml:"))


@pytest.mark.parametrize(
    "url",
    ["h", "h:8000/v1", "ftp://h/v1", "http:///v1", "http://h:port/v1", "http://[::1/v1", "http://h:99999/v1",
     "http://h:0/v1", "http://a..b/v1", "http://h/a b"],
)  # fmt: skip
@pytest.mark.parametrize("engine", ["{name: openai, url: '%s'}", "{name: openai, servers: {cos: {url: '%s'}}}"])
def test_an_address_that_no_server_has_is_refused_with_the_job(url: str, engine: str) -> None:
    said = refusal(with_line(f"engine: {engine % url}"))
    assert said == f'job.yaml:15: "{url}" is not a server; give it as http://host:port/v1'


@pytest.mark.parametrize("url", ["http://h:8000/v1", "https://münchen.example/v1", "http://[::1]:8000/v1", "HTTP://H"])
def test_an_address_of_a_server_is_taken(url: str) -> None:
    assert load(with_line(f"engine: {{name: openai, url: '{url}'}}")).engine.url == url


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("concurrency: 0", '"engine.options.concurrency" must be at least 1'),
        ("concurrency: 1.5", '"engine.options.concurrency" must be a whole number'),
        ("attempts: 0", '"engine.options.attempts" must be at least 1'),
        ("max_length: 0", '"engine.options.max_length" must be at least 1'),
        ("timeout_seconds: 0", "`timeout_seconds` is a number of seconds above 0 and below 10⁹, not 0"),
        ("timeout_seconds: soon", '"engine.options.timeout_seconds" must be a number'),
        ("first_pause_seconds: -1", '"engine.options.first_pause_seconds" must be at least 0'),
    ],
)
def test_an_impossible_option_of_a_server_is_refused_with_the_job(option: str, complaint: str) -> None:
    said = refusal(with_line(f"engine: {{name: openai, url: http://x, options: {{{option}}}}}"))
    assert said.startswith("job.yaml:15: ") and complaint in said


def test_output_can_be_given_from_outside() -> None:
    text = replaced("output: s3://bucket/runs\n", "")
    assert load_job(text, "job.yaml", "elsewhere").output == "elsewhere"
    assert load_job(SEED, "job.yaml", "elsewhere").output == "elsewhere"


def test_jobs_travel_between_processes() -> None:
    job = load(SEED)
    copy = pickle.loads(pickle.dumps(job))
    assert copy == job
    assert copy.digest() == job.digest()
    assert copy.place_of("parents.fmt") == "job.yaml:4"
    assert copy.place_of("grid") == "job.yaml:11"


@pytest.mark.parametrize(
    "same",
    [
        "# a comment\n" + SEED,
        SEED.replace("0.0", "0").replace("1.0", "1e0"),
        SEED.replace("output: s3://bucket/runs", "output: elsewhere"),
        SEED + "workers: {gpus: 1}\nkeep: all\nseed: 0\n",
        SEED.replace("{from: 0.0, to: 1.0, step: 0.1}", "{from: 0, to: 1, num: 11}"),
    ],
)
def test_the_digest_stays_where_no_byte_and_no_score_changes(same: str) -> None:
    assert load(same).digest() == load(SEED).digest()


@pytest.mark.parametrize(
    "other",
    [
        SEED.replace("name: soup", "name: soup2"),
        SEED.replace("step: 0.1", "step: 0.2"),
        SEED.replace("@main", "@v2"),
        SEED.replace("  dtype: bfloat16", "  dtype: float16"),
        SEED + "seed: 1\n",
        SEED + "numerics: mergekit\n",
        SEED + "evaluate: {needle: {lengths: [64]}}\n",
    ],
)
def test_the_digest_changes_with_what_decides_bytes_and_scores(other: str) -> None:
    assert load(other).digest() != load(SEED).digest()


def test_the_time_to_bind_points_grows_as_their_number() -> None:
    def bind(count: int) -> None:
        text = SEED.replace("{from: 0.0, to: 1.0, step: 0.1}", f"{{from: 0, to: 1, num: {count + 1}}}")
        assert len(load(text).points) == count + 1

    assert growth(bind, 1000, 10_000, at_most=15) <= 15, "10 if linear, 100 if quadratic"


MERGE = """\
models:
  - model: someone/a@v1
    parameters: {weight: 0.7}
  - model: ./local/b
    parameters: {weight: 0.3}
merge_method: linear
base_model: someone/c
dtype: bfloat16
"""


def test_a_plain_mergekit_document_is_a_job_of_one_point() -> None:
    job = load_merge_document(MERGE, "merge.yml", "out")
    assert job.parents == {name: name for name in ("someone/a@v1", "./local/b", "someone/c")}
    assert [point.name for point in job.points] == ["merge"]
    assert (job.name, job.output, job.evaluate) == ("merge", "out", None)
    assert job.place_of("parents.someone/c") == "merge.yml:7"
    assert job.place_of("parents../local/b") == "merge.yml:4"


def test_a_plain_document_has_no_placeholders() -> None:
    with pytest.raises(BadInput, match=r'^merge\.yml:3: unknown axis "w"'):
        load_merge_document(MERGE.replace("weight: 0.7", 'weight: "${w}"'), "merge.yml", "out")
