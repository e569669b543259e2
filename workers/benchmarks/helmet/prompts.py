"""The prompts and the metrics of HELMET (Yen et al. 2024, arXiv 2410.02694), as in its `data.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Form:
    """The user's text, the beginning of the answer after it, and the metric.

    With `line`, only the first line of an answer is scored, as the reference stops there.
    """

    user: str
    begins: str
    metric: Literal["sub", "exact"]
    new_tokens: int
    line: bool


JSON_KV = Form(
    "{context}\n\nExtract the value corresponding to the specified key in the JSON object below.\n\n"
    "{demos}Key: {question}",
    "Corresponding value:",
    "sub",
    100,
    line=False,
)
RAG = Form(
    "Use the given documents to write a concise and short answer to the question. Write your answer in the following"
    " format:\nAnswer: [answer]\n\n{demos}{context}\n\nQuestion: {question}",
    "Answer:",
    "sub",
    20,
    line=True,
)
ICL = Form(
    "Use the provided mapping from the text to label to assign a label to the text. Only output"
    ' "label: {{label}}" and nothing else. \n\n{context}\n\n{question}',
    "label:",
    "exact",
    20,
    line=True,
)
RAG_TASKS = ("nq", "triviaqa", "hotpotqa", "popqa")
ICL_TASKS = ("trec_coarse", "trec_fine", "banking77", "clinic150", "nlu")
MADE = "_generated"
MADE_TASKS = ("json_kv", "rag", "icl")
FORMS: Mapping[str, Form] = {
    "json_kv": JSON_KV,
    "rag": RAG,
    "icl": ICL,
    **dict.fromkeys(RAG_TASKS, RAG),
    **dict.fromkeys(ICL_TASKS, ICL),
}
SHOTS = 2
"""Worked examples in front of a question of the first two kinds."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One question; `name` is shared by those that ask the same, `gold` are the texts in the context that decide it."""

    name: str
    context: str
    question: str
    answers: tuple[str, ...]
    demos: str = ""
    gold: tuple[str, ...] = ()


def prompt_of(form: Form, sample: Sample, *, begun: bool) -> str:
    """The user's text, and the beginning of the answer where the model completes a plain text (`begun`)."""
    text = form.user.format(context=sample.context, question=sample.question, demos=sample.demos)
    return f"{text}\n{form.begins}" if begun else text


def scorer_of(form: Form, *, begun: bool, thinks: bool) -> str:
    """The scorer of an answer; after a thought the reference reads all lines."""
    told = {"prefix": form.begins, "begun": begun, "line": form.line and not thinks, "exact": form.metric == "exact"}
    return f"helmet:{json.dumps(told)}"


def document(title: str, text: str) -> str:
    return f"Document (Title: {title}): {text}"


def worked_documents(documents: str, question: str, answer: str) -> str:
    """A worked example with documents, and the empty line after it."""
    return f"{documents}\n\nQuestion: {question}\nAnswer: {answer}\n\n"


def worked_pair(key: str, value: str) -> str:
    """A worked example of a key, and the empty line after it."""
    return f"Key: {key}\nCorresponding value: {value}\n\n"


def labelled(text: str, label: int) -> str:
    return f"{text}\nlabel: {label}"
