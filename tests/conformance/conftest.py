"""Parents on disk and mergekit's answers, made once a session."""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conformance import cases, tally, vocabulary_cases
from tests.conformance.card_documents import CARDS
from tests.conformance.checkpoints import write_parents
from tests.conformance.deep_cases import ALIKE, DEEP, LAYERS
from tests.conformance.generated import GENERATED_METHODS, documents, in_bf16, write_odd_parents
from tests.conformance.oracle import MISSING, ORACLE_PYTHON, Answers, Oracle
from tests.conformance.sliced_cases import SLICED, SLICED_REFUSED

Ours = Callable[..., Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--documents", type=int, default=1, help="documents drawn at random for each method")
    parser.addoption("--documents-seed", type=int, default=1, help="another seed draws other documents")


def in_ordinary_runs(config: pytest.Config) -> bool:
    """Whether this is `make test`, which takes some of the cases, and not `make conformance`, which takes all."""
    return config.getoption("--documents", 1) <= 2


@pytest.fixture
def counting(request: pytest.FixtureRequest) -> bool:
    """Whether the table at the end is wanted."""
    return not in_ordinary_runs(request.config)


def drawn_documents(config: pytest.Config) -> dict[str, str]:
    """The documents that the options ask for, by name."""
    count, seed = config.getoption("--documents", 1), config.getoption("--documents-seed", 1)
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
def deep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """deep(architecture): the folder of its parents of three layers, written at its first use."""
    from tests.conformance.architectures import layers, write_family  # which imports transformers

    root = tmp_path_factory.mktemp("deep")

    def family(architecture: str) -> Path:
        folder = root / architecture.replace(" ", "-")
        if not folder.exists():
            with layers(LAYERS):
                write_family(folder, architecture)
        return folder

    return family


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    """mergekit and PEFT."""
    if not ORACLE_PYTHON.exists():
        pytest.skip(MISSING)
    process = Oracle(tmp_path_factory.mktemp("oracle") / "log")
    yield process
    process.close()


@pytest.fixture(scope="session")
def mergekit(
    oracle: Oracle,
    parents: Path,
    vocabularies: Path,
    deep: Callable[[str], Path],
    drawn: Mapping[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Answers:
    """mergekit's answers, by name: to every case and every drawn document, computed in float32; `bit exact NAME` in
    bfloat16; `refused NAME`; `vocabulary NAME`; `sliced NAME`; `card NAME`; `FORM of ARCHITECTURE`."""

    def in_float32(text: str) -> dict[str, Any]:
        return cases.in_float32(cases.parsed(text, parents))

    def of_family(make: Callable[[Path], dict[str, Any]], architecture: str) -> dict[str, Any]:
        return make(deep(architecture))

    narrow = cases.BIT_EXACT | {name: in_bf16(text) for name, text in drawn.items()}
    of_vocabularies = vocabulary_cases.ALIKE | {
        f"padded {name}": text for name, text in vocabulary_cases.PADDED.items()
    }
    documents: dict[str, Callable[[], dict[str, Any] | str]] = {
        **{name: partial(in_float32, text) for name, text in (cases.CASES | drawn).items()},
        **{f"bit exact {name}": partial(cases.parsed, text, parents) for name, text in narrow.items()},
        **{f"refused {name}": partial(cases.parsed, text, parents) for name, text in cases.REFUSED.items()},
        **{f"sliced {name}": partial(cases.parsed, text, parents) for name, text in (SLICED | SLICED_REFUSED).items()},
        **{
            f"vocabulary {name}": partial(vocabulary_cases.document, text, vocabularies)
            for name, text in of_vocabularies.items()
        },
        **{f"{form} of {each}": partial(of_family, make, each) for form, make in DEEP.items() for each in ALIKE},
        **{f"card {name}": partial(text.replace, "PARENTS", str(parents)) for name, text in CARDS.items()},
    }
    return Answers(oracle, documents, tmp_path_factory.mktemp("mergekit"))


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
