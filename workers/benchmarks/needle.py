"""One needle in a haystack, over length and depth: where in the context does a model stop seeing?

The grid is every depth times as many repeats as there are items. With m questions a haystack, one haystack carries m
needles at m of the depths, spread evenly, and is asked for each in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from jobs.errors import BadInput
from jobs.evaluate import NeedleSpec
from workers.benchmarks.generation import earlier, generation_of
from workers.benchmarks.items import Asked, Item, items_digest
from workers.benchmarks.planned import PlannedSet, Reader, check_of, file_of
from workers.benchmarks.ruler.niah import Niah, draw_needles, pose
from workers.benchmarks.texts.draws import Draw, words_digest
from workers.benchmarks.texts.filling import build_groups
from workers.benchmarks.texts.haystacks import Essay, Noise, bundled_essay
from workers.benchmarks.texts.tokenizer import Tokenizer

MAX_NEW_TOKENS = 32
FARTHEST = 0.25
"""How far from its depth a needle may lie; in a short context a sentence is a large part of it."""


def even_depths(count: int) -> tuple[float, ...]:
    """`count` depths from 0 to 1; a single one lies in the middle."""
    return (0.5,) if count == 1 else tuple(step / (count - 1) for step in range(count))


def needle_items(
    tokenizer: Tokenizer,
    length: int,
    *,
    depths: Sequence[float],
    indices: Iterable[int],
    seed: int,
    questions: int = 1,
    haystack: Literal["essay", "noise"] = "essay",
    essay: Essay | None = None,
    answer: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    frame: tuple[str, str] = ("", ""),
    begins: bool = True,
) -> list[Item]:
    """The items with these indices: item i asks at depth i mod len(depths), in repeat i div len(depths).

    A needle lies at the end of the sentence (in noise: the line) nearest to its depth; where it really is, is recorded.
    An answer that has the value in it scores; with `answer`, one that is it, the value in the place of `{value}`.
    A prompt that does not begin the answer (`begins`) has no answer prefix.
    `BadInput` if a depth is outside 0 … 1, if a needle comes to lie further from its depth than `FARTHEST`, or if the
    items do not fit in `length` tokens: then with the smallest length that does.
    """
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise BadInput(f"needle: depths {list(depths)} must be fractions from 0 to 1, at least one")
    task, asked = Niah(haystack), Asked("needle", "needle", length, seed, max_new_tokens, frame, begins=begins)
    groups = -(-len(depths) // questions)
    wanted = list(indices)

    def build(cell: tuple[int, int]) -> list[Item]:
        repeat, group = cell
        numbers = range(group, len(depths), groups)
        needles = draw_needles(task, len(numbers), Draw("needle", seed, haystack, questions, repeat, group))
        places = [depths[numbers[question]] for question in _question_of_key(needles.questions)]
        texts = needles.texts(task)
        text = Noise() if haystack == "noise" else essay or bundled_essay()
        items = pose(
            tokenizer,
            asked,
            task,
            needles,
            context=lambda units: text.hide_nearest(units, texts, places),
            forecast=lambda budget: text.forecast(tokenizer, budget),
            haystack=f"needle-{haystack}-{seed}-{repeat}-{group}x{questions}",
            indices=[repeat * len(depths) + number for number in numbers],
            scorer="all" if answer is None else "exact",
        )
        for item in items:
            check_depth(item, depths[item.index % len(depths)])
        return items if answer is None else [_wanting(answer, item) for item in items]

    cells = sorted({(index // len(depths), index % len(depths) % groups) for index in wanted})
    return build_groups(tokenizer, asked, cells, build, wanted)


def check_depth(item: Item, wanted: float) -> None:
    """Refuses a needle that lies far from where it was to lie: the text has too few places for one, or is too short."""
    [depth] = item.depths
    if abs(depth - wanted) > FARTHEST:
        raise BadInput(
            f"{item.benchmark}: at {item.length} tokens the needle for depth {wanted:.2f} comes to lie at {depth:.2f};"
            " give a text with shorter sentences, or ask at greater lengths"
        )


def _wanting(answer: str, item: Item) -> Item:
    return replace(item, answers=tuple(answer.replace("{value}", value) for value in item.answers))


def _question_of_key(questions: Sequence[Sequence[int]]) -> list[int]:
    """Which question asks for each key, where every question asks for one."""
    asked = {key: number for number, [key] in enumerate(questions)}
    return [asked[key] for key in sorted(asked)]


def needle_spec(
    *,
    depths: Sequence[float],
    questions: int = 1,
    haystack: Literal["essay", "noise"] = "essay",
    essay: Essay | None = None,
    answer: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    frame: tuple[str, str] = ("", ""),
    begins: bool = True,
) -> dict[str, Any]:
    """All that the items depend on besides tokenizer, length and seed: the `spec` of `items_digest`."""
    return {
        "benchmark": "needle",
        "depths": list(depths),
        "questions": questions,
        "haystack": (essay or bundled_essay()).digest if haystack == "essay" else haystack,
        "answer": answer,
        "words": words_digest(),
        "max_new_tokens": max_new_tokens,
        "frame": list(frame),
        **({} if begins else {"answer_prefix": False}),
    }


def plan_needle(spec: NeedleSpec, tokenizer: Tokenizer, seed: int, reader: Reader, least: int) -> list[PlannedSet]:
    depths = even_depths(spec.depths)
    count = spec.items * spec.depths
    made = max(count, least)
    tokenizer, generation = generation_of(spec, tokenizer, seed)
    asked: dict[str, Any] = {
        "depths": depths,
        "questions": spec.questions,
        "answer": spec.answer,
        "max_new_tokens": spec.max_new_tokens or MAX_NEW_TOKENS,
        "frame": generation.frame,
        "begins": spec.answer_prefix and not generation.end,
    }
    if spec.haystack == "noise":
        asked["haystack"] = "noise"
    elif spec.haystack:
        asked["essay"] = Essay(reader.prose(spec.haystack, spec.place), place=spec.place)

    def planned(length: int) -> PlannedSet:
        def items(length: int, wanted: range) -> list[Item]:
            return needle_items(tokenizer, length, indices=wanted, seed=seed, **asked)

        common: dict[str, Any] = {"tokenizer": tokenizer.digest, "length": length, "seed": seed}
        address = items_digest(needle_spec(**asked) | generation.digested, **common)
        before: dict[str, Any] = asked | {"frame": earlier(tokenizer, generation).frame, "begins": spec.answer_prefix}
        return PlannedSet(
            benchmark="needle",
            task="needle",
            length=length,
            count=count,
            made=made,
            digest=address,
            build=file_of(items, length),
            place=spec.place,
            share=spec.depths,
            questions=spec.questions,
            grows=True,
            check=check_of(items, length, spec.depths),
            superseded=(items_digest(needle_spec(**before), **common),) if generation.found else (),
            generation=generation,
            new_tokens=asked["max_new_tokens"],
        )

    return [planned(length) for length in spec.lengths]
