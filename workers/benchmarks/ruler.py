"""RULER's thirteen tasks (Hsieh et al. 2024, arXiv 2404.06654): its prompts and scorers, with keyed draws.

The same (seed, task, index) gives the same needles, questions and relative places at every length. Prompts are never
truncated: each is counted by one encoding of the whole, and `tokens + max_new_tokens <= length` holds for every item.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jobs.errors import BadInput
from workers.benchmarks.budget import TooShort
from workers.benchmarks.haystacks import Essay, bundled_essay
from workers.benchmarks.items import Item
from workers.benchmarks.niah import Niah, niah_items
from workers.benchmarks.tokens import Tokenizer

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
MAX_NEW_TOKENS: Mapping[str, int] = dict.fromkeys(NIAH, 128)


def ruler_items(
    tokenizer: Tokenizer,
    task: str,
    length: int,
    *,
    indices: Iterable[int],
    seed: int,
    questions: int = 1,
    essay: Essay | None = None,
    max_new_tokens: int | None = None,
    frame: tuple[str, str] = ("", ""),
) -> list[Item]:
    """The items with these indices; an item depends on its own index alone, so that more can be had later.

    `questions` is how many niah items share one haystack: items 0 … m−1, m … 2m−1 and so on. `max_new_tokens`
    replaces RULER's own. `frame` is `Tokenizer.chat_frame()` where the model is to be asked as in a chat.
    `BadInput` names the smallest length at which all of them fit, if they do not fit in this one.
    """
    if task not in NIAH:
        raise BadInput(f"ruler: unknown task {task!r}; there are {', '.join(NIAH)}")
    wanted = list(indices)
    generated = MAX_NEW_TOKENS[task] if max_new_tokens is None else max_new_tokens
    found: dict[int, Item] = {}
    too_short: list[int] = []
    for haystack_index in sorted({index // questions for index in wanted}):
        try:
            items = niah_items(
                tokenizer,
                NIAH[task],
                benchmark="ruler",
                name=task,
                length=length,
                haystack_index=haystack_index,
                questions=questions,
                seed=seed,
                essay=essay or bundled_essay(),
                max_new_tokens=generated,
                frame=frame,
            )
        except TooShort as error:
            too_short.append(int(error.args[2]))
        else:
            found.update((item.index, item) for item in items)
    if too_short:
        raise TooShort(task, length, max(too_short))
    return [found[index] for index in wanted]
