"""RULER's variable tracking: a chain of assignments among noise, asked after one worked example."""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import pairwise

from workers.benchmarks.items import Asked, Item
from workers.benchmarks.ruler.niah import depths_of
from workers.benchmarks.texts.draws import Draw
from workers.benchmarks.texts.filling import fill, most_units
from workers.benchmarks.texts.haystacks import Noise
from workers.benchmarks.texts.tokenizer import Tokenizer

QUESTION = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
ANSWER_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assigned the value {value}, they are: "
)
HOPS = 4
EXAMPLE_TOKENS = 500


def draw_chain(letters: int, draw: Draw) -> tuple[list[str], str]:
    """Five different variable names of so many capital letters, and the five-digit value they share."""
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        if (name := draw.letters(string.ascii_uppercase, letters)) != "VAR":
            names[name] = None
    return list(names), str(10_000 + draw.below(89_999))


def assignments(names: Sequence[str], value: str) -> list[str]:
    """The lines of a chain; all but the first end in a blank, as RULER writes them."""
    steps = [f"VAR {later} = VAR {earlier} " for earlier, later in pairwise(names)]
    return [f"VAR {names[0]} = {value}", *steps]


def at_places(chain: Sequence[str], places: Sequence[float]) -> list[str]:
    """The line of the chain for each place: its order is that of the places."""
    ranks = {place: rank for rank, place in enumerate(sorted(places))}
    return [chain[ranks[place]] for place in places]


def ask(context: str, value: str) -> tuple[str, str]:
    """The question about a context, and the beginning of its answer."""
    return QUESTION.format(context=context, value=value), ANSWER_PREFIX.format(count=HOPS + 1, value=value)


def draw_example(tokenizer: Tokenizer, length: int, draw: Draw) -> str:
    """A worked example of at most 500 tokens before its answer; without any noise for lengths below 1,000."""
    names, value = draw_chain(3, draw)
    places = [draw.fraction() for _ in names]
    lines = at_places(assignments(names, value), places)
    noise = Noise()

    def example(units: int) -> str:
        return "".join(ask(noise.hide(units, lines, places), value))

    units = 0
    if length >= 2 * EXAMPLE_TOKENS:
        forecast = noise.forecast(tokenizer, EXAMPLE_TOKENS) + tokenizer.count(example(0))
        units, _ = most_units(lambda units: tokenizer.count(example(units)), forecast, EXAMPLE_TOKENS)
    return example(max(0, units)) + " " + " ".join(names) + "\n"


def vt_item(tokenizer: Tokenizer, asked: Asked, index: int) -> Item:
    """One item with noise between any two assignments; `TooShort` if it cannot fit in the length."""
    identity = ("vt", asked.task, asked.seed, index)
    draw = Draw(*identity, "chain")
    names, value = draw_chain(5, draw)
    places = [draw.fraction() for _ in names]
    chain = assignments(names, value)
    noise = Noise()
    head = asked.frame[0] + draw_example(tokenizer, asked.length, Draw(*identity, "example")) + "\n"

    def context(units: int) -> str:
        return noise.hide(len(chain) + units, at_places(chain, places), places)

    def text(units: int) -> str:
        question, prefix = ask(context(units), value)
        return head + question + asked.frame[1] + asked.beginning(prefix)

    units, tokens = fill(tokenizer, asked, text, lambda budget: noise.forecast(tokenizer, budget))
    question, prefix = ask(context(units), value)
    depths = depths_of(context(units), chain)
    prompt, begun = head + question + asked.frame[1], asked.beginning(prefix)
    return asked.item(index, prompt, begun, answers=names, tokens=tokens, depths=depths)
