"""What a Markdown page tells its reader to type: the fenced blocks, and the commands in them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

RUNNERS = ("--", "run", "exec", "time")  # `uv run mergeyard …` and `kubectl exec pod -- mergeyard …` count as well


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: the language after the fence, the line of its first line, its text."""

    language: str
    line: int
    text: str


def fenced_blocks(page: str) -> Iterator[Block]:
    """Every block between ``` fences, in order; a fence inside a list is cut free of its indentation."""
    fence, language, first, lines = "", "", 0, list[str]()
    for number, line in enumerate(page.splitlines(), 1):
        bare = line.strip()
        if not fence and bare.startswith("```"):
            mark = bare[: len(bare) - len(bare.lstrip("`"))]
            fence, language, first, lines = mark, bare.removeprefix(mark).strip(), number + 1, []
            indentation = len(line) - len(line.lstrip())
        elif fence and bare == fence:
            yield Block(language, first, "\n".join(lines) + "\n")
            fence = ""
        elif fence:
            lines.append(line[min(indentation, len(line) - len(line.lstrip())) :])


def commands(block: Block, program: str) -> Iterator[tuple[int, list[str]]]:
    """Line and arguments of each `program …` that a shell block tells the reader to type.

    A `console` block's commands follow a `$ `; every line of a `bash`, `sh` or `shell` block is one.
    """
    for line, typed in _typed_lines(block):
        for words in _simple_commands(typed):
            for index, word in enumerate(words):
                if word.split("/")[-1] == program and (index == 0 or words[index - 1] in RUNNERS):
                    yield line, words[index + 1 :]
                    break


def _typed_lines(block: Block) -> Iterator[tuple[int, str]]:
    """The logical lines to type, continuation lines joined."""
    language = block.language.split()[0] if block.language else ""
    if language not in ("console", "bash", "sh", "shell"):
        return
    start, typed = 0, ""
    for number, line in enumerate(block.text.splitlines(), block.line):
        if not typed:
            if language == "console" and not line.startswith("$ "):
                continue
            start, line = number, line.removeprefix("$ ")
        typed += line.removesuffix("\\")
        if not line.endswith("\\"):
            yield start, typed
            typed = ""


def _simple_commands(typed: str) -> Iterator[list[str]]:
    """The words of each command of a pipeline or list, without assignments before it and redirections after it."""
    lexer = shlex.shlex(typed, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    redirected = False
    for token in [*lexer, ";"]:
        if set(token) <= set(";&|()"):
            yield words
            words, redirected = [], False
        elif set(token) <= set("<>&"):
            redirected = True
            words = words[:-1] if words and words[-1].isdigit() else words
        elif not redirected and (words or "=" not in token):
            words.append(token)
