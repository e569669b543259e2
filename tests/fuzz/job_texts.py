"""Damaged job files, and what must come of every one of them.

From the examples: pieces put in, stretches cut, lines doubled, moved and indented, keys and values of one example put
into another, numbers swapped for ones that hurt, lists and mappings nested or repeated. Whatever comes in, the answer
is a job or `BadInput` in one line that names the file.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from jobs.errors import BadInput
from jobs.job import Job, load_job, load_merge_document

EXAMPLES = Path(__file__).parents[2] / "jobs" / "examples"
PIECES = (
    *(
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "#",
        "&a ",
        "*a",
        "|",
        ">",
        "'",
        '"',
        "%TAG",
        "@",
        "`",
        "?",
        "\n",
        "\t",
        "${",
        "{w}",
    ),
    *("${w}", "${1/0}", "${w**64}", "${__import__('os')}", "!!python/object/apply:os.system [ls]", "!!str ", "<<: "),
    *("---\n", "...\n", "null", "~", ".nan", "-.inf", "on", "1e999", "-1", "0", "1e-300", "9" * 30, "9" * 5000),
    *("\x00", "\ud800", "\ufeff", "\u2028", "é", "\\", "\r\n", "  ", ": ", "- ", "../../etc/passwd", "simplex"),
    *("points", "[" * 40, "{a: " * 40, "- " * 40, "x" * 3000, "012", "0x10", "1_000", "1:30", "2001-01-01"),
)
NUMBERS = ("0", "-1", "1", "0.1", "1e308", "1e309", "1e-320", "99999999999999999999", "1/3", "1e5", "100001", "true",
           "''", "[]", "{}", "0.0000001", "2GB", "1e9TB", "[1, 2]")  # fmt: skip
NUMBER = re.compile(r"(?<![\w.])\d[\d.e-]*")


def corpus() -> list[str]:
    """The examples, and forms that they do not show."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(EXAMPLES.glob("*.yaml"))]
    texts.append(
        "name: a\nparents: {p: x, q: y}\nrecipe: {merge_method: slerp, base_model: p, models: [{model: p}, {model: q}],"
        " parameters: {t: [{filter: mlp, value: [0, '${t}', 1]}, {value: '${(t + u) * s}'}]},"
        " tokenizer: {source: p, tokens: {<x>: {source: {kind: model_token, model: q, token_id: 3}, force: true}},"
        " pad_to_multiple_of: 64}}\n"
        "grid: {simplex: {axes: [t, u], step: 0.25}, s: {from: 0, to: 1, num: 3}}\npoint: 'a{t}b{u}c{s}'\noutput: o\n"
        "gate: {baseline: p, margin: 1}\nevaluate: {perplexity: {lengths: [128]}, race: {keep: 2}}\nseed: 3\n"
    )
    return texts


def damaged(draw: random.Random, known: list[str]) -> str:
    """A text with one to four damages."""
    text = draw.choice(known)
    for _ in range(draw.choice((1, 1, 2, 2, 4))):
        text = _with_damage(draw, text, known)
    return text


def _with_damage(draw: random.Random, text: str, known: list[str]) -> str:
    at = draw.randrange(len(text) + 1)
    match draw.randrange(7):
        case 0:
            return text[:at] + draw.choice(PIECES) + text[at:]
        case 1:
            return text[:at] + text[at + draw.randrange(1, 15) :]
        case 2:
            numbers = list(NUMBER.finditer(text))
            if not numbers:
                return text
            number = draw.choice(numbers)
            return text[: number.start()] + draw.choice(NUMBERS) + text[number.end() :]
        case 3:
            end = min(len(text), at + draw.randrange(1, 60))
            return text[:end] + text[at:end] * draw.choice((1, 1, 30)) + text[end:]
        case _:
            return _with_moved_lines(draw, text, known)


def _with_moved_lines(draw: random.Random, text: str, known: list[str]) -> str:
    lines = text.splitlines(keepends=True) or ["\n"]
    one, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    match draw.randrange(4):
        case 0:
            lines.insert(other, lines[one])
        case 1:
            lines[one], lines[other] = lines[other], lines[one]
        case 2:
            lines[one] = draw.choice(("  ", "    ", "- ")) + lines[one]
        case _:
            lines.insert(one, draw.choice(draw.choice(known).splitlines(keepends=True)))
    return "".join(lines)


def check(text: str) -> bool:
    """Whether the text is a job; `AssertionError` when what came of it must not be."""
    accepted = False
    for load in (load_job, _load_merge):
        try:
            job = load(text, "fuzz.yaml")
        except BadInput as refusal:
            line = str(refusal)
            assert line.startswith("fuzz.yaml:")
            assert len(line.splitlines()) == 1
            assert len(line) < 2500
            continue
        assert isinstance(job, Job)
        assert len(job.digest()) == 64
        for point in job.points:
            assert "/" not in point.name
            assert not point.name.startswith(".")
        accepted = True
    return accepted


def _load_merge(text: str, name: str) -> Job:
    return load_merge_document(text, name, "out")
