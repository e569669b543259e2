"""Answers while they grow, on tokens that are letters."""

from __future__ import annotations

import pytest

from workers.engines.decoding import Growing
from workers.engines.engine import Prompt, Thought

END = 0


def grown(prompt: Prompt, pieces: list[str]) -> Growing:
    """The answer after as many of the pieces, one a token, as it takes; `END` is written as ''."""

    def text(tokens: list[int], special: bool) -> str:
        return "".join(pieces[token - 1] for token in tokens)

    output = Growing(prompt, 1)
    for number, piece in enumerate(pieces, start=1):
        if output.ended:
            break
        output.take(number if piece else END, True, frozenset({END}), text)
    return output


def asked(budget: int = 99, new: int = 99, stops: tuple[str, ...] = ()) -> Prompt:
    return Prompt("", "?", new, stops, thinking=Thought("</think>", budget, opened=True))


@pytest.mark.parametrize(
    ("prompt", "pieces", "thought", "taken"),
    [
        (asked(), [*"a</think>b", ""], 9, 10),
        (asked(stops=(".",)), [*"a.b.</think>cd.e"], 12, 15),  # a stop in the thought ends nothing
        (asked(stops=("\n\n",)), ["a", "</thi", "nk>\n\n", "b"], 3, 3),  # half of a token is the answer's
        (asked(stops=(">",)), [*"</think>ab>c"], 8, 11),  # the end tag is no stop
        (asked(stops=("th",)), [*"</think>ab</th"], 8, 14),
        (asked(budget=5), [*"abcdefgh"], None, 5),
        (asked(budget=9), [*"a</think>b", ""], 9, 10),  # the budget counts the end tag
        (asked(budget=8), [*"a</think>b", ""], None, 8),
        (asked(new=2), [*"a</think>bcdef"], 9, 11),  # a new limit after it
        (asked(budget=99, new=1), ["abc", ""], None, 1),  # it ends without an answer
        (Prompt("", "?", 3), [*"a</think>b"], 0, 3),
        (Prompt("", "?", 9, ("nk",)), [*"a</think>b"], 0, 8),
    ],
)
def test_a_thought_and_its_answer_end_where_they_should(
    prompt: Prompt, pieces: list[str], thought: int | None, taken: int
) -> None:
    output = grown(prompt, pieces)
    assert (output.thought, len(output.tokens)) == (thought, taken)
    assert output.ended


def test_an_answer_is_full_by_its_own_limit_or_the_thoughts() -> None:
    assert grown(asked(budget=3), [*"abcd"]).full and grown(asked(new=1), [*"</think>bc"]).full
    assert not grown(asked(), [*"a</think>b", ""]).full


def test_a_long_stop_is_found_however_its_letters_fall_into_tokens() -> None:
    stop = "the end of it, é"
    for cut in range(1, len(stop)):
        pieces = ["x" * 40, "so " + stop[:cut], *stop[cut:], "more"]
        assert len(grown(Prompt("", "?", 99, (stop,)), pieces).tokens) == len(pieces) - 1
