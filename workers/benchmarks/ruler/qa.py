"""RULER's question answering: the documents that hold the answer among others that do not.

SQuAD and HotpotQA are read from the files their authors publish; nothing is fetched. Where neither is at hand, a
small invented world of people and towns takes their place, under a name of its own: `qa_generated`.
"""

from __future__ import annotations

from workers.benchmarks.items import Asked, Item
from workers.benchmarks.ruler.documents import Library
from workers.benchmarks.ruler.invented import invented
from workers.benchmarks.ruler.niah import depths_of
from workers.benchmarks.texts.draws import Draw
from workers.benchmarks.texts.filling import fill, running_total
from workers.benchmarks.texts.tokenizer import Tokenizer

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
BEFORE = INSTRUCTION + "\n\nThe following are given documents.\n\n"
AFTER = "\n\n" + INSTRUCTION + "\n\nQuestion: {query}"
ANSWER_PREFIX = " Answer:"


def qa_item(tokenizer: Tokenizer, asked: Asked, library: Library | None, index: int) -> Item:
    """One item about the library, or about a world invented for it; `TooShort` if it cannot fit in the length.

    Questions on the same gold documents are not independent: they count as one haystack.
    """
    identity = ("qa", asked.task, asked.seed, index)
    posed = library.posed if library else invented
    question, documents = posed(index, Draw(*identity, "documents"))
    gold, begun = len(question.gold), asked.beginning(ANSWER_PREFIX)
    ending = AFTER.format(query=question.query) + asked.frame[1]
    ranks: list[float] = []
    draw = Draw(*identity, "order")

    def shown(units: int) -> list[str]:
        """The gold documents and `units` others, each at the rank it has at every length."""
        chosen = documents(0, gold + units)
        ranks.extend(draw.fraction() for _ in range(len(chosen) - len(ranks)))
        return [chosen[at] for at in sorted(range(len(chosen)), key=ranks.__getitem__)]

    def context(units: int) -> str:
        return "\n\n".join(f"Document {at}:\n{document}" for at, document in enumerate(shown(units), start=1))

    def text(units: int) -> str:
        return asked.frame[0] + BEFORE + context(units) + ending

    def numbered(first: int, last: int) -> list[str]:
        others = documents(gold + first, gold + last)
        return [f"Document {gold + first + at}:\n{document}\n\n" for at, document in enumerate(others, start=1)]

    units, tokens = fill(
        tokenizer,
        asked,
        lambda units: text(units) + begun,
        lambda budget: running_total(tokenizer, numbered, budget),
    )
    return asked.item(
        index,
        text(units),
        begun,
        answers=question.answers,
        tokens=tokens,
        depths=depths_of(context(units), documents(0, gold)),
        scorer="part",
        haystack=asked.named("about", *question.gold) if library else None,
    )
