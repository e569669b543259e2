"""Parents on disk and mergekit's answers, made once a session."""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path

import pytest
import yaml

from tests.conformance import cases, tally, vocabulary_cases
from tests.conformance.card_documents import CARDS
from tests.conformance.checkpoints import write_parents
from tests.conformance.deep_cases import ALIKE, DEEP
from tests.conformance.generated import GENERATED_METHODS, documents, in_bf16, write_odd_parents
from tests.conformance.oracle import MISSING, ORACLE_PYTHON, Answer, Merge, run_mergekit
from tests.conformance.sliced_cases import SLICED, SLICED_REFUSED

Ours = Callable[..., Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--documents", type=int, default=2, help="documents drawn at random for each method")
    parser.addoption("--documents-seed", type=int, default=1, help="another seed draws other documents")


def drawn_documents(config: pytest.Config) -> dict[str, str]:
    """The documents that the options ask for, by name."""
    count, seed = config.getoption("--documents", 2), config.getoption("--documents-seed", 1)
    return {f"{m}-{i}": text for m in GENERATED_METHODS for i, text in enumerate(documents(m, count, seed))}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in tally.table():
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def parents() -> Iterator[Path]:
    """The folder that PARENTS stands for in a case; always the same path in a checkout, as random masks are keyed by
    it."""
    worker, checkout = os.environ.get("PYTEST_XDIST_WORKER", "alone"), zlib.crc32(__file__.encode())
    root = Path(tempfile.gettempdir()) / f"mergeyard-conformance-{checkout:08x}-{worker}"
    shutil.rmtree(root, ignore_errors=True)
    write_parents(root)
    write_odd_parents(root)
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that PARENTS stands for in `vocabulary_cases`."""
    root = tmp_path_factory.mktemp("vocabularies")
    vocabulary_cases.write_vocabularies(root)
    return root


@pytest.fixture(scope="session")
def drawn(request: pytest.FixtureRequest) -> Mapping[str, str]:
    """The documents drawn at random, by name."""
    return drawn_documents(request.config)


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of parents of three layers for each architecture that mergekit merges under the same names."""
    from tests.conformance.architectures import layers, write_family  # which imports transformers

    root = tmp_path_factory.mktemp("deep")
    with layers(3):
        for architecture in ALIKE:
            write_family(root / architecture, architecture)
    return root


@pytest.fixture(scope="session")
def mergekit(
    parents: Path, vocabularies: Path, deep: Path, drawn: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Answer]:
    """mergekit's answers, by name: to every case and every drawn document, computed in float32; `bit exact NAME` in
    bfloat16; `refused NAME`; `vocabulary NAME`; `sliced NAME`; `card NAME`; `FORM of ARCHITECTURE`; `sharded output` in
    files of at most 30 kB."""
    if not ORACLE_PYTHON.exists():
        pytest.skip(MISSING)
    merges = [
        Merge(name, cases.in_float32(cases.parsed(text, parents))) for name, text in (cases.CASES | drawn).items()
    ]
    narrow = cases.BIT_EXACT | {name: in_bf16(text) for name, text in drawn.items()}
    merges += [Merge(f"bit exact {name}", cases.parsed(text, parents)) for name, text in narrow.items()]
    merges += [Merge(f"refused {name}", cases.parsed(text, parents)) for name, text in cases.REFUSED.items()]
    sliced = SLICED | SLICED_REFUSED
    merges += [Merge(f"sliced {name}", cases.parsed(text, parents)) for name, text in sliced.items()]
    of_vocabularies = vocabulary_cases.ALIKE | {
        f"padded {name}": text for name, text in vocabulary_cases.PADDED.items()
    }
    merges += [
        Merge(f"vocabulary {name}", vocabulary_cases.document(text, vocabularies))
        for name, text in of_vocabularies.items()
    ]
    merges += [Merge(f"{form} of {each}", make(deep / each)) for form, make in DEEP.items() for each in ALIKE]
    merges += [Merge(f"card {name}", text.replace("PARENTS", str(parents))) for name, text in CARDS.items()]
    sharded = cases.parsed(cases.CASES["linear-bf16"], parents)
    merges.append(Merge("sharded output", sharded, shard_bytes=30_000))
    return run_mergekit(merges, tmp_path_factory.mktemp("mergekit"))


def merge_ours(config_text: str, out: Path, numerics: str = "float32", *options: str) -> int:
    """The exit code of `mergeyard merge`."""
    from orchestrator.cli import main

    config = out.parent / f"{out.name}.yml"
    config.write_text(config_text)
    choice = [] if numerics == "float32" else ["--numerics", numerics]
    return main(["merge", str(config), str(out), "--quiet", *choice, *options])


@pytest.fixture(scope="session")
def ours(parents: Path, tmp_path_factory: pytest.TempPathFactory) -> Ours:
    """ours(text, numerics): the folder mergeyard wrote for a case's document, merged once a session."""
    root = tmp_path_factory.mktemp("ours")
    folders: dict[tuple[str, str], Path] = {}
    numbers = count()

    def merge(text: str, numerics: str = "float32") -> Path:
        if (text, numerics) not in folders:
            out = root / f"merge-{next(numbers):03d}"
            document = cases.parsed(text, parents)
            options = ["--config-from", document["base_model"]] if cases.parents_disagree(text) else []
            assert merge_ours(yaml.safe_dump(document, sort_keys=False), out, numerics, *options) == 0
            folders[text, numerics] = out
        return folders[text, numerics]

    return merge
