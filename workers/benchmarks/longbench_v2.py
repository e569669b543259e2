"""LongBench v2 (Bai et al. 2024, arXiv 2412.15204): 503 questions with four choices about texts as long as they are.

Prompts, the letter that is read from an answer, and the cut in the middle of a text are those of its `pred.py`
(THUDM/LongBench 2e00731).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from jobs.errors import BadInput
from jobs.evaluate import LongbenchV2Spec
from jobs.evaluation_tasks import Generation
from workers.benchmarks.generation import generation_of
from workers.benchmarks.planned import PlannedSet, Reader
from workers.benchmarks.questions import Question, cells, plan_questions, rows_of
from workers.benchmarks.texts.tokenizer import Tokenizer

MAX_NEW_TOKENS = 128
FILE = "data.json"
LETTERS = ("A", "B", "C", "D")
FIELDS = ("context", "question", "choice_A", "choice_B", "choice_C", "choice_D")
HEAD = "Please read the following text and answer the question below.\n\n<text>\n{context}"
QUESTION = (
    "\n</text>\n\nWhat is the correct answer to this question: {question}\n"
    "Choices:\n(A) {choice_A}\n(B) {choice_B}\n(C) {choice_C}\n(D) {choice_D}\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".'
)


def plan_longbench_v2(
    spec: LongbenchV2Spec, tokenizer: Tokenizer, seed: int, reader: Reader, least: int
) -> list[PlannedSet]:
    tokenizer, generation = generation_of(spec, tokenizer, seed)
    file = spec.data if spec.data.endswith((".json", ".jsonl", ".parquet")) else f"{spec.data.rstrip('/')}/{FILE}"
    by_task: dict[str, list[Question]] = {}
    for place, row in rows_of(reader.read(file, spec.place), file):
        task = "longbench_v2" if spec.tasks == "all" else str(cells(row, (spec.tasks,), place)[0])
        asked = by_task.setdefault(task, [])
        asked.append(_question(spec, tokenizer, generation, len(asked), row, place))
    if not by_task:
        raise BadInput(f"{spec.place}: {file} has no questions; give the published file")
    return [
        planned
        for task, questions in sorted(by_task.items())
        for planned in plan_questions(
            "longbench_v2",
            task,
            questions,
            lengths=spec.lengths,
            limit=spec.limit,
            tokenizer=tokenizer,
            generation=generation,
            place=spec.place,
        )
    ]


def _question(
    spec: LongbenchV2Spec,
    tokenizer: Tokenizer,
    generation: Generation,
    number: int,
    row: Mapping[str, Any],
    place: str,
) -> Question:
    texts = {name: str(text).strip() for name, text in zip(FIELDS, cells(row, FIELDS, place), strict=True)}
    [answer] = cells(row, ("answer",), place)
    if answer not in LETTERS:
        raise BadInput(f"{place}: the answer is {answer!r:.40}, not A, B, C or D; give the published file")
    before, after = generation.frame
    new_tokens = spec.max_new_tokens or MAX_NEW_TOKENS
    prefix, prompt = HEAD.format(context=texts["context"]), QUESTION.format_map(texts)
    if spec.truncate == "middle":
        prefix, prompt = "", cut_middle(tokenizer, prefix + prompt, max(spec.lengths) - new_tokens, generation.frame)
    return Question(
        number=number,
        prefix=before + prefix if prefix else "",
        prompt=(prompt if prefix else before + prompt) + after,
        answers=(answer,),
        scorer="choice",
        depths=(),
        haystack=hashlib.sha256(texts["context"].encode()).hexdigest()[:16],
        answer_tokens=new_tokens,
        most_new_tokens=new_tokens,
    )


def cut_middle(tokenizer: Tokenizer, prompt: str, most: int, frame: tuple[str, str]) -> str:
    """The prompt, without tokens from its middle if it has more than `most` within `frame`."""
    before, after = frame
    tokens = tokenizer.count_whole(before + prompt + after)
    if tokens <= most:
        return prompt
    ids = tokenizer.encode(prompt)
    keep = most - tokenizer.count_whole(before + after)
    while keep > 0:
        kept = tokenizer.decode([*ids[: keep // 2], *ids[len(ids) - (keep + 1) // 2 :]])
        tokens = tokenizer.count_whole(before + kept + after)
        if tokens <= most:
            return kept
        keep -= tokens - most  # the seam, or the ends, took more tokens than they have apart
    return prompt
