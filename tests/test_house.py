"""The habits of the house: quiet imports, a quick `--help`, documents that work as written, errors that travel."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import jobs.errors
from jobs.errors import BadInput, MergeyardError
from jobs.job import load_job
from orchestrator.commands.devices import has_driver
from orchestrator.judging.gate import EXIT_CODES
from tests.markdown import Block, commands, fenced_blocks
from workers.methods import METHODS

ROOT = Path(__file__).parents[1]
IMPORT_EFFECTS = ROOT / "tests" / "import_effects.py"
PARENTS = ROOT / "jobs" / "examples" / "parents"
COMMAND = Path(sys.executable).with_name("mergeyard")
HEAVY = {"torch", "ray", "transformers", "pyarrow", "scipy", "boto3", "obstore", "huggingface_hub", "vllm"}


# ---- imports


def import_effects(root: Path, *packages: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, IMPORT_EFFECTS, root, *packages], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_any_module_does_nothing_but_define_names():
    assert import_effects(ROOT, "jobs", "workers", "orchestrator") == []


@pytest.mark.parametrize(
    ("source", "effect"),
    [
        ("open('left-behind', 'w')", "open left-behind"),
        ("import pathlib\npathlib.Path('cache').mkdir()", "os.mkdir cache"),
        ("import threading\nthreading.Thread(target=print, daemon=True).start()", "started a thread"),
        ("import os\nos.environ['TOKENIZERS_PARALLELISM'] = 'false'", "os.putenv b'TOKENIZERS_PARALLELISM'"),
        ("import subprocess\nsubprocess.run(['true'])", "subprocess.Popen true"),
        ("import socket\nsocket.socket().bind(('127.0.0.1', 0))", "socket.bind"),
        ("import sys\nsys.path.append('elsewhere')", "changed sys.path or the root logger"),
        ("import logging\nlogging.basicConfig()", "changed sys.path or the root logger"),
        ("print('hello')", "printed 'hello\\n'"),
    ],
)
def test_a_planted_side_effect_is_noticed_and_blamed_on_its_module(tmp_path: Path, source: str, effect: str):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("")
    (tmp_path / "jobs" / "noisy.py").write_text(source)
    effects = import_effects(tmp_path, "jobs")
    assert any(line.startswith(f"jobs.noisy: {effect}") for line in effects), effects


def test_help_loads_no_heavy_library():
    script = "import orchestrator.cli, sys; orchestrator.cli.parser().format_help(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert HEAVY & set(loaded.stdout.split()) == set()


OLDER = ROOT / "tests" / "end_to_end" / "older_run"
LIGHT = {
    # without the run that `make demo` leaves, whose scores a plan reads by other libraries
    "plan": ["plan", ROOT / "jobs" / "examples" / "demo.yaml", "--output", ROOT / "runs" / "none"],
    "status": ["status", OLDER],
    "check": ["check", OLDER],
    "verify": ["verify", OLDER / "evaluated"],
    "diff": ["diff", PARENTS / "fmt", PARENTS / "fmt"],
}
"""Commands that read headers, records or little tensors."""


def loaded_by(*commands: Sequence[str | Path]) -> set[str]:
    """The heavy libraries that these commands load in a process of their own; they must end well."""
    script = (
        "import contextlib, io, json, orchestrator.cli, sys\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    codes = [*map(orchestrator.cli.main, json.loads(sys.argv[1]))]\n"
        "print(any(codes), *sys.modules)"
    )
    run = [sys.executable, "-c", script, json.dumps(commands, default=str)]
    failed, *modules = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert failed == "False"
    return (HEAVY | {"numba", "matplotlib", "jinja2", "pandas", "rich"}) & set(modules)


@pytest.mark.parametrize("command", LIGHT)
def test_a_command_loads_no_library_that_it_does_not_use(command: str):
    assert loaded_by(LIGHT[command]) == ({"scipy"} if command == "plan" else set()), "plan says the power of tests"


def test_a_merge_on_cpus_loads_no_torch(tmp_path: Path):
    recipes: dict[str, dict[str, dict[str, float]]] = {
        "passthrough": {"fmt": {}},
        "linear": {"fmt": {"weight": 0.7}, "long": {"weight": 0.3}},
        "ties": {"fmt": {"weight": 1, "density": 0.5}, "long": {"weight": 1, "density": 0.5}},
        "dare_ties": {"fmt": {"weight": 1, "density": 0.5}, "long": {"weight": 1, "density": 0.5}},
        "della": {"fmt": {"weight": 1, "density": 0.5}, "long": {"weight": 1, "density": 0.5}},
        "ramplus_tl": {"fmt": {}, "long": {}},
    }
    merges: list[list[str | Path]] = []
    for method, models in recipes.items():
        listed = [{"model": str(PARENTS / name), "parameters": parameters} for name, parameters in models.items()]
        base = {"base_model": str(PARENTS / "base")} if METHODS[method].base == "required" else {}
        document = {"merge_method": method, **base, "models": listed, "dtype": "bfloat16"}
        (tmp_path / f"{method}.yaml").write_text(json.dumps(document))
        merges.append(["merge", tmp_path / f"{method}.yaml", tmp_path / method, "--quiet"])
    first = loaded_by(*merges)
    assert "torch" not in first  # numba may be there, which compiles the loops once, and what it imports
    auto = loaded_by(*(["merge", file, f"{out}-auto", "--quiet", "--device", "auto"] for _, file, out, _ in merges))
    assert auto == ({"torch"} if has_driver() else set())


WITHOUT = ("ray", "obstore", "boto3", "botocore", "pyarrow")
"""Libraries of clusters, buckets and files of scores, which a bare machine with a GPU lacks."""

BARE = """
import json, sys
from pathlib import Path

sys.modules.update(dict.fromkeys(sys.argv[1].split(","), None))  # to import one of these now fails

import orchestrator.cli
from jobs.job import load_job
from orchestrator.planning.plan import make_plan
from workers.benchmarks.needle import needle_items
from workers.benchmarks.scorers import SCORERS
from workers.benchmarks.texts.tokenizer import Tokenizer
from workers.engines.engine import Prompt
from workers.engines.transformers_engine import TransformersEngine
from workers.merging.resident import ResidentParents

parents, room = Path(sys.argv[2]), Path(sys.argv[3])
recipe = {"merge_method": "linear", "dtype": "float32", "models": [
    {"model": str(parents / name), "parameters": {"weight": weight}} for name, weight in (("long", 0.9), ("fmt", 0.1))]}
(room / "merge.yaml").write_text(json.dumps(recipe))
assert orchestrator.cli.main(["merge", str(room / "merge.yaml"), str(room / "merged"), "--quiet"]) == 0

for model in recipe["models"]:
    model["model"] = Path(model["model"]).name
plan = make_plan(load_job(json.dumps({"name": "bare", "parents": {n: str(parents / n) for n in ("long", "fmt")},
    "recipe": recipe, "output": str(room / "runs")}), "job.yaml"))
[point] = plan.points
held = ResidentParents([tensor for shard in point.layout.shards for tensor in shard.tensors],
    {name: checkpoint.parent for name, checkpoint in plan.parents.items()}, seed=plan.job.seed, numerics="float32")
config = json.loads((parents / "long" / "config.json").read_text()) | {"dtype": "float32"}
unwritten = TransformersEngine.from_state(config, parents / "long", held.merged(point.settings), device="cpu")
written = TransformersEngine.from_folder(room / "merged", device="cpu")

tokenizer = Tokenizer((parents / "long" / "tokenizer.json").read_bytes())
items = needle_items(tokenizer, 512, depths=(0.0, 0.5, 1.0), indices=range(3), seed=0, haystack="noise")
prompts = [Prompt(item.prefix, item.prompt + item.answer_prefix, item.max_new_tokens) for item in items]
for engine in (unwritten, written):
    answers = [answer.text for answer in engine.generate(prompts)]
    print(json.dumps([SCORERS[item.scorer](text, item.answers) for item, text in zip(items, answers)]))
"""


def test_merging_and_an_engine_run_without_a_cluster_or_a_bucket(tmp_path: Path):
    """The parent `long` finds the needle in nearly every item of 512 tokens, and nine tenths of it still do."""
    run = [sys.executable, "-c", BARE, ",".join(WITHOUT), PARENTS, tmp_path]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    unwritten, written = map(json.loads, done.stdout.splitlines())
    assert unwritten == written == [1.0, 1.0, 1.0]


def cpu_seconds(*command: str | Path) -> float:
    """The CPU time of one process, which other work on the machine hardly changes."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime


@pytest.mark.serial
def test_help_takes_little_more_than_the_start_of_numpy():
    said = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stderr) == (0, "") and said.stdout.startswith("usage: mergeyard")
    start = min(cpu_seconds(sys.executable, "-c", "import numpy, yaml") for _ in range(3))
    assert min(cpu_seconds(COMMAND, "--help") for _ in range(3)) < 1.5 * start


@pytest.mark.serial
@pytest.mark.parametrize("command", ["merge", "plan", "status"])
def test_a_little_command_takes_little_more_than_the_start_of_python(tmp_path: Path, command: str):
    models = [{"model": str(PARENTS / name), "parameters": {"weight": 0.5}} for name in ("fmt", "long")]
    (tmp_path / "config.yaml").write_text(json.dumps({"merge_method": "linear", "models": models}))
    merges = [["merge", tmp_path / "config.yaml", tmp_path / f"merge{number}", "--quiet"] for number in range(3)]
    first, *others = merges if command == "merge" else [LIGHT[command]] * 3
    cpu_seconds(COMMAND, *first)  # compiles the loops
    starts, commands = list[float](), list[float]()
    for other in others:  # in turn: a shared machine may be twice as fast a moment later
        starts.append(cpu_seconds(sys.executable, "-c", "import numpy, yaml"))
        commands.append(cpu_seconds(COMMAND, *other))
    assert min(commands) < 16 * min(starts), "to import torch takes twenty times as long"


# ---- what the files say

FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.~)}>$-])/(?:work|root|home|tmp|Users|opt/wheels|opt/pypi)\b"),
    "a package registry's host": re.compile(
        r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs|nodejs\.org|conda\.anaconda|crates\.io"
    ),
    "a document outside the repository": re.compile(r"\bshared/facts|\b(?:DESIGN|STYLE)\.md\b"),
}
ALLOWED = {  # file → what it may say, and why
    "tests/test_house.py": (r".*", "names what is forbidden, and plants it"),
}


def repository_files() -> list[Path]:
    """What git tracks."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def unwelcome(text: str) -> Iterator[tuple[int, str]]:
    """Line number and complaint, for everything in `text` that ties the repository to one machine or registry."""
    for number, line in enumerate(text.splitlines(), 1):
        for kind, pattern in FORBIDDEN.items():
            if match := pattern.search(line):
                yield number, f"{match[0]} is {kind}"


def test_no_file_names_a_machine_path_or_a_package_registry():
    complaints: list[str] = []
    for path in repository_files():
        content, name = path.read_bytes(), path.relative_to(ROOT).as_posix()
        if b"\0" in content:
            continue
        allowed, _why = ALLOWED.get(name, (r"$^", ""))
        complaints += [
            f"{name}:{line}: {complaint}"
            for line, complaint in unwelcome(content.decode())
            if not re.match(allowed, complaint)
        ]
    assert complaints == []


@pytest.mark.parametrize(
    ("line", "is_unwelcome"),
    [
        ("cd /work/main", True),
        ("PATH=/home/me/bin:$PATH", True),
        ('open("/tmp/merged")', True),
        ("see `/root/.cache`", True),
        ("--index-url https://pypi.org/simple", True),
        ("https://files.pythonhosted.org/packages/x.whl", True),
        ("--extra-index-url https://download.pytorch.org/whl/cpu", True),
        ("as DESIGN.md says", True),
        ("s3://bucket/work/runs", False),
        ("the way home/away", False),
        ("from workers/storage to /workers", False),
        ("${HOME}/tmp", False),
    ],
)
def test_machine_paths_and_registries_are_told_from_innocent_text(line: str, is_unwelcome: bool):
    assert bool(list(unwelcome(line))) == is_unwelcome


# ---- what the pages tell the reader to type


def documented_blocks() -> list[tuple[str, Block]]:
    """Every fenced block of every Markdown page, with the page's name."""
    pages = [path for path in repository_files() if path.suffix == ".md"]
    return [
        (page.relative_to(ROOT).as_posix(), block) for page in pages for block in fenced_blocks(page.read_text("utf-8"))
    ]


def is_job(block: Block) -> bool:
    """A YAML block with `parents:` and `recipe:` at its left edge is a whole job, and has to load."""
    return block.language.startswith("yaml") and all(
        re.search(rf"^{key}:", block.text, re.MULTILINE) for key in ("parents", "recipe")
    )


def complaint_about(words: list[str]) -> str:
    """What the command line's own parser says against `mergeyard WORDS…`; empty if it takes them."""
    parser: argparse.ArgumentParser = importlib.import_module("orchestrator.cli").parser()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):  # of --help and --version
        try:
            parser.parse_args(words)
        except BadInput as error:
            return str(error)
    return ""


def refusal(page: str, block: Block) -> str:
    """What `mergeyard` says against the job in the block; empty if it loads."""
    try:
        load_job(block.text, f"{page} from line {block.line}")
    except BadInput as error:
        return str(error)
    return ""


def test_every_documented_job_loads():
    refusals = [refusal(page, block) for page, block in documented_blocks() if is_job(block)]
    assert [text for text in refusals if text] == []


def test_a_job_with_a_misspelt_key_is_told_from_one_that_loads():
    text = (
        "name: soup\nparents: {a: models/a, b: models/b}\noutput: runs\n"
        "recipe:\n  merge_method: linear\n  parameters: {weight: 1}\n  models: [{model: a}, {model: b}]\n"
    )
    assert is_job(Block("yaml", 7, text))
    assert refusal("README.md", Block("yaml", 7, text)) == ""
    assert "outptu" in refusal("README.md", Block("yaml", 7, text.replace("output", "outptu")))
    assert not is_job(Block("yaml", 7, "recipe:\n  parents: [a]\n"))


def test_every_documented_command_is_one_that_mergeyard_takes():
    complaints = [
        f"{page}:{line}: mergeyard {' '.join(words)}: {complaint}"
        for page, block in documented_blocks()
        for line, words in commands(block, "mergeyard")
        if (complaint := complaint_about(words))
    ]
    assert complaints == []


def test_a_command_that_mergeyard_does_not_take_is_complained_about():
    assert "no-such-verb" in complaint_about(["no-such-verb"])


def test_every_documented_make_word_exists():
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    unknown = [
        f"{page}:{line}: make {word}"
        for page, block in documented_blocks()
        for line, words in commands(block, "make")
        for word in words
        if "=" not in word and word not in known
    ]
    assert unknown == []


def test_every_file_named_in_a_documented_command_exists():
    missing = [
        f"{page}:{line}: {word}"
        for page, block in documented_blocks()
        for line, words in commands(block, "mergeyard")
        for word in words
        if re.match(r"(jobs|infra)/", word) and not (ROOT / word).exists()
    ]
    assert missing == []


def test_commands_are_found_as_a_reader_would_type_them():
    page = (
        "1. Try:\n\n   ```console\n"
        "   $ AWS_PROFILE=me mergeyard plan 'my job.yaml' --json | jq . > plan.json\n   3 points.\n"
        "   $ cd x && uv run mergeyard run \\\n       job.yaml 2> log\n   ```\n\n"
        "```bash\ndocker build -t mergeyard . # mergeyard nothing\n.venv/bin/mergeyard verify s3://b/p\n```\n"
        "```yaml\n- mergeyard not-a-command\n```\n"
    )
    found = [(line, words) for block in fenced_blocks(page) for line, words in commands(block, "mergeyard")]
    assert found == [
        (4, ["plan", "my job.yaml", "--json"]),
        (6, ["run", "job.yaml"]),
        (12, ["verify", "s3://b/p"]),
    ]


# ---- errors


def error_classes() -> list[type[MergeyardError]]:
    return [
        thing for thing in vars(jobs.errors).values() if isinstance(thing, type) and issubclass(thing, MergeyardError)
    ]


def drawn_tree(drawing: str) -> dict[str, tuple[str | None, int]]:
    """Class → (its parent, its exit code), read off the box-drawing lines."""
    tree: dict[str, tuple[str | None, int]] = {}
    above: list[str] = []
    for branch, name, code in re.findall(r"^    ((?:[│ ]   )*(?:[├└]── )?)([A-Z]\w+) +(\d+)\b", drawing, re.MULTILINE):
        depth = len(branch) // 4
        tree[name] = (above[depth - 1] if depth else None, int(code))
        above[depth:] = [name]
    return tree


def test_the_drawn_error_tree_is_the_real_one():
    real = {
        kind.__name__: (None if kind is MergeyardError else kind.__base__.__name__, kind.exit_code)  # pyright: ignore
        for kind in error_classes()
    }
    assert drawn_tree(jobs.errors.__doc__ or "") == real


def test_exit_codes_are_the_documented_five():
    assert {kind.exit_code for kind in error_classes()} | {*EXIT_CODES.values()} == {0, 1, 2, 3, 75}


@pytest.mark.parametrize("kind", error_classes())
def test_exit_code_2_is_not_given_once_something_is_written(kind: type[MergeyardError]):
    with pytest.raises(MergeyardError) as refused, jobs.errors.writing():
        raise kind("s3://bucket/x:", 404)
    expected = jobs.errors.FailedMidway if kind.exit_code == 2 else kind
    assert (type(refused.value), str(refused.value)) == (expected, "s3://bucket/x: 404")
    assert refused.value.exit_code == (1 if kind.exit_code == 2 else kind.exit_code)


@pytest.mark.parametrize("kind", error_classes())
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("arguments", [(), ("job.yaml:14: unknown method",), ("s3://bucket/key:", 404)])
def test_an_error_survives_pickle_with_its_message_and_exit_code(
    kind: type[MergeyardError], protocol: int, arguments: tuple[object, ...]
):
    arrived = pickle.loads(pickle.dumps(kind(*arguments), protocol))
    assert type(arrived) is kind
    assert str(arrived) == " ".join(map(str, arguments))
    assert (arrived.args, arrived.exit_code, arrived.retry) == (arguments, kind.exit_code, kind.retry)
