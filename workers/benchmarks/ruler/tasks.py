"""RULER's thirteen tasks (Hsieh et al. 2024, arXiv 2404.06654): its prompts and scorers, with keyed draws.

The same (seed, task, index) gives the same needles, questions and relative places at every length. Prompts are never
truncated: the tokens of each are counted exactly, and `tokens + max_new_tokens <= length` holds for every item.

README.md lists the differences from the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jobs.errors import BadInput
from workers.benchmarks.items import GENERATOR_VERSION, Asked, Item
from workers.benchmarks.ruler.cwe_fwe import cwe_item, fwe_item
from workers.benchmarks.ruler.documents import Library, library_for
from workers.benchmarks.ruler.niah import Niah, niah_items
from workers.benchmarks.ruler.qa import qa_item
from workers.benchmarks.ruler.vt import vt_item
from workers.benchmarks.texts.draws import words_digest
from workers.benchmarks.texts.filling import build_groups
from workers.benchmarks.texts.haystacks import Essay, bundled_essay
from workers.benchmarks.texts.tokenizer import Tokenizer

NIAH: Mapping[str, Niah] = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", value="uuids"),
    "niah_multikey_1": Niah("essay", keys=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", key="uuids", value="uuids"),
    "niah_multivalue": Niah("essay", values=4),
    "niah_multiquery": Niah("essay", keys=4, queries=4),
}
SINGLE: Mapping[str, Callable[[Tokenizer, Asked, int], Item]] = {"vt": vt_item, "cwe": cwe_item, "fwe": fwe_item}
QA = ("qa_1", "qa_2", "qa_generated")
MAX_NEW_TOKENS: Mapping[str, int] = {
    **dict.fromkeys(NIAH, 128),
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    **dict.fromkeys(QA, 32),
}
TASKS = tuple(task for task in MAX_NEW_TOKENS if task != "qa_generated")
"""The thirteen of the paper; `qa_generated` is ours and stands outside."""


def ruler_items(
    tokenizer: Tokenizer,
    task: str,
    length: int,
    *,
    indices: Iterable[int],
    seed: int,
    questions: int = 1,
    essay: Essay | None = None,
    documents: Mapping[str, Library] | None = None,
    max_new_tokens: int | None = None,
    frame: tuple[str, str] = ("", ""),
    turns: tuple[str, str] | None = None,
    begins: bool = True,
) -> list[Item]:
    """The items with these indices; an item depends on its own index alone, so that more can be had later.

    `questions` is how many niah items share one haystack: items 0 … m−1, m … 2m−1 and so on; other tasks have one.
    `essay` replaces the bundled text, `documents` gives `qa_1` and `qa_2` theirs, `max_new_tokens` replaces RULER's
    own. `frame` is `Tokenizer.chat_frame()` where the model is to be asked as in a chat, and `turns` go around the
    answer in the example of `cwe`; without them, as in the reference, the frame's end, a newline and the frame's
    beginning. A prompt that does not begin the answer (`begins`) has no answer prefix.
    `BadInput` names the smallest length at which all of these items fit, if they do not fit in this one.
    """
    if task not in MAX_NEW_TOKENS:
        raise BadInput(f"ruler: unknown task {task!r}; there are {', '.join(MAX_NEW_TOKENS)}")
    wanted = list(indices)
    most_new = MAX_NEW_TOKENS[task] if max_new_tokens is None else max_new_tokens
    turns = (frame[1], "\n" + frame[0]) if turns is None else turns
    asked = Asked("ruler", task, length, seed, most_new, frame, turns, begins)

    def build(group: int) -> list[Item]:
        if task in NIAH:
            text = essay or bundled_essay()
            return niah_items(tokenizer, asked, NIAH[task], group, questions=questions, essay=text)
        if task in QA:
            return [qa_item(tokenizer, asked, library_for(task, documents), group)]
        return [SINGLE[task](tokenizer, asked, group)]

    share = questions if task in NIAH else 1
    return build_groups(tokenizer, asked, sorted({index // share for index in wanted}), build, wanted)


def ruler_spec(
    task: str,
    *,
    questions: int = 1,
    essay: Essay | None = None,
    documents: Mapping[str, Library] | None = None,
    max_new_tokens: int | None = None,
    frame: tuple[str, str] = ("", ""),
    turns: tuple[str, str] | None = None,
    begins: bool = True,
) -> dict[str, Any]:
    """All that items depend on besides tokenizer, length and seed: the `spec` of `items_digest`."""
    library = library_for(task, documents) if task in QA else None
    return {
        "benchmark": "ruler",
        "task": task,
        "questions": questions if task in NIAH else 1,
        "essay": (essay or bundled_essay()).digest if task in NIAH and NIAH[task].haystack == "essay" else None,
        "documents": library.digest if library else None,
        "words": words_digest(),
        "max_new_tokens": MAX_NEW_TOKENS[task] if max_new_tokens is None else max_new_tokens,
        "frame": [*frame, *(_turns(frame, turns) if task == "cwe" and turns is not None else [])],
        **({} if begins else {"answer_prefix": False}),
    }


def _turns(frame: tuple[str, str], turns: tuple[str, str]) -> Sequence[str]:
    """The texts around the answer of an example, without the first where it is the end of the frame."""
    return turns[1:] if turns[0] == frame[1] else turns


def generator(task: str, length: int, *, questions: int, chat: bool) -> int:
    """The version of the code that makes a set: 3 where prompts are no longer those of version 2."""
    changed = {
        "vt": True,  # noise between any two assignments
        "cwe": chat,  # the worked example is a turn
        "fwe": length < 2048,  # one coded word less, which beyond is too rare to appear
        "niah_single_1": questions > 1,  # lines between any two needles
        "niah_multikey_2": questions > 1,
        "niah_multikey_3": questions > 1,
    }
    return 3 if changed.get(task, False) else GENERATOR_VERSION
