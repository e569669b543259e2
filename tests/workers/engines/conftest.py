"""The tiny trained parents and prompts that they can answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from workers.engines.engine import Engine, Prompt
from workers.engines.openai_engine import OpenAIEngine
from workers.engines.transformers_engine import TransformersEngine

PARENTS = Path(__file__).parents[3] / "jobs" / "examples" / "parents"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
INTRODUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n"
)


def haystack(needles: dict[str, int], lines: int, seed: int = 0) -> str:
    """RULER's niah_single_1 context: noise lines, and one line a needle at random depths."""
    text = [NOISE] * lines
    generator = random.Random(seed)
    for key, value in needles.items():
        needle = f"One of the special magic numbers for {key} is: {value}."
        text.insert(generator.randrange(len(text) + 1), needle)
    return INTRODUCTION + "\n".join(text)


def question(key: str) -> str:
    """RULER's question and answer prefix."""
    subject = f"special magic number for {key} mentioned in the provided text"
    return f"\nWhat is the {subject}? The {subject} is"


def prompt(key: str, value: int, lines: int, seed: int = 0, max_new_tokens: int = 12) -> Prompt:
    """One needle, one question."""
    return Prompt("", haystack({key: value}, lines, seed) + question(key), max_new_tokens)


@pytest.fixture(scope="session")
def parents() -> Path:
    """Folder with the parents `base`, `long` and `fmt`."""
    return PARENTS


@pytest.fixture
def weights(parents: Path):
    """The weights of a parent by name, as they lie in its file."""
    return lambda name: load_file(parents / name / "model.safetensors")


@pytest.fixture(scope="session")
def needle_prompt():
    """`prompt`, for tests."""
    return prompt


@pytest.fixture(scope="session")
def shared_prompts():
    """Several questions about one haystack, with the haystack as the shared prefix."""

    def build(keys: dict[str, int], lines: int, seed: int = 0, max_new_tokens: int = 12) -> list[Prompt]:
        context = haystack(keys, lines, seed)
        return [Prompt(context, question(key), max_new_tokens) for key in keys]

    return build


@pytest.fixture(scope="session")
def loglikelihood():
    """loglikelihood(engine, context, continuation): what the engine says of one continuation."""

    def ask(engine: Engine, context: str, continuation: str) -> tuple[float, bool]:
        [found] = engine.loglikelihoods([(engine.encode(context + continuation), len(engine.encode(context)))])
        return found

    return ask


@pytest.fixture
def opened(server, parents: Path):
    """opened(**options): an engine that asks the server of the test."""
    engines: list[OpenAIEngine] = []

    def opened(**options: Any) -> OpenAIEngine:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        engines.append(OpenAIEngine(url, "long", parents / "long", **{"first_pause_seconds": 0.01, **options}))
        return engines[-1]

    yield opened
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(parents: Path) -> Iterator[TransformersEngine]:
    """`long` in float32, so that no near tie hides behind rounding."""
    engine = TransformersEngine.from_folder(parents / "long", version="long", dtype=torch.float32, device="cpu")
    yield engine
    engine.close()
