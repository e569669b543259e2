"""The protocol of a resident model: transformers, vLLM, or a server behind HTTP.

An engine is opened once on a worker and outlives many points of a grid: `swap` replaces its weights in place and names
them with a version, so every answer can be traced to the merge that gave it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from jobs.errors import BadInput
from jobs.evaluation_tasks import Status
from jobs.specs import Scalar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Progress = Callable[[int], None]
"""Called with the number of prompts (or windows) answered since the last call."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Thought:
    """The text `end` ends a thought, which takes at most `budget` tokens, `end` among them.

    `opened` where the prompt's own text begins the thought, as a template that ends in `<think>` does.
    """

    end: str
    budget: int
    opened: bool


@dataclass(frozen=True, slots=True)
class Sampling:
    """Random decoding at a `temperature` above 0, from the likeliest tokens only.

    Those are the `top_k` likeliest (0: all), and of them the fewest with a probability of `top_p` together. `seed`
    depends on the item and the number of its sample, never on the model.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """The model reads `prefix + text`; neighbours with an equal, non-empty `prefix` share one prefill of it.

    The answer ends before the first of `stops` that it would have in it; a thought does not. A `bare` prompt has its
    special tokens written out in its text, as out of a chat template (`workers.special_tokens`). `messages` are the
    same prompt for a server that applies the template itself, with the arguments `template`; none where the text came
    out of no template. A last message of the assistant is the beginning of the answer. Without `sampling` the answer
    is greedy.
    """

    prefix: str
    text: str
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    bare: bool = False
    messages: tuple[Message, ...] = ()
    template: tuple[tuple[str, Scalar], ...] = ()
    thinking: Thought | None = None
    sampling: Sampling | None = None

    @property
    def longest(self) -> int:
        """The most tokens to generate, thought and answer together."""
        return self.max_new_tokens + (0 if self.thinking is None else self.thinking.budget)

    @property
    def whole(self) -> str:
        """The text as the model reads it; always encoded in one piece, whatever is shared."""
        return self.prefix + self.text


@dataclass(frozen=True, slots=True)
class Answer:
    """A continuation: its text without the end token, token counts, and this prompt's share of the seconds.

    `text` begins after the thought, which is `thought`; `tokens_out` counts the tokens of both, and `tokens_thought`
    those of the thought, its end among them. `finite` is False when a logit was NaN or infinite: the merge is broken,
    and the text means nothing. `status` says how the answer ended, `remark` why, as one line for the user; it may be
    empty.
    """

    text: str
    tokens_in: int
    tokens_out: int
    seconds: float
    finite: bool
    status: Status = "answered"
    remark: str = ""
    thought: str = ""
    tokens_thought: int = 0


def split_thought(text: str, thought: Thought | None) -> tuple[str, str, bool]:
    """(thought, answer, whether the thought has ended) of a generated text; all of it is answer without a `thought`.

    The first end tag ends the thought, as in the reasoning parsers of servers; the thought has no tags in it.
    """
    if thought is None:
        return "", text, True
    before, end, answer = text.partition(thought.end)
    opening = thought.end.replace("/", "", 1)
    return before.strip().removeprefix(opening).strip(), answer, bool(end)


def status_of(text: str, *, cut: bool) -> Status:
    """The status of a generated answer; `cut` where it reached its limit of new tokens before an end or a stop."""
    return "cut" if cut else "answered" if text.strip() else "empty"


def before_stops(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stops that it has in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


class Engine(Protocol):
    """A model that answers. Methods raise the errors of `jobs.errors` only for faults that the caller can mend."""

    @property
    def version(self) -> str:
        """The name given to the resident weights when they were loaded or last swapped."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens the model can hold, prompt and answer together."""
        ...

    @property
    def max_scored(self) -> int:
        """Tokens of the longest window that can be scored; `longest_scored` of `max_length`."""
        ...

    def encode(self, text: str, *, bare: bool = False) -> list[int]:
        """Token ids of `text` as a prompt, by the rule of `workers.special_tokens`."""
        ...

    def generate(self, prompts: Sequence[Prompt], *, progress: Progress | None = None) -> list[Answer]:
        """One greedy answer for each prompt, in order; a prompt that does not fit is refused, never truncated."""
        ...

    def score(self, windows: Sequence[Sequence[int]], *, progress: Progress | None = None) -> list[NDArray[np.float32]]:
        """Log-likelihood of every token but the first of each window, given the tokens before it: n - 1 values."""
        ...

    def loglikelihoods(self, texts: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        """For each text, token ids and how many of them (at least one) are context: how likely are the others?

        Their log-likelihood, and whether greedy decoding would say them; neighbours that begin alike are cheap.
        """
        ...

    @property
    def places(self) -> Mapping[str, Tensor]:
        """The memory of the resident weights by name, if it is at hand: `swap` takes weights that lie there already.

        Writing there spoils the model until `swap` has succeeded: do it while `swap` asks for the weights.
        """
        ...

    def swap(self, weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Replace every weight in place by name and drop all that was cached from the weights before."""
        ...

    def close(self) -> None:
        """Give back memory, processes and connections; harmless when called twice."""
        ...


def check_room(tokens_in: int, max_new_tokens: int, max_length: int) -> None:
    """Refuse a prompt that would have to be truncated."""
    if tokens_in == 0:
        raise BadInput("a prompt has no tokens; give it a text")
    if max_new_tokens < 1:
        raise BadInput(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    if tokens_in > max_length - max_new_tokens:
        raise BadInput(
            f"a prompt of {tokens_in} tokens and {max_new_tokens} to generate exceed the model's {max_length}; "
            f"shorten the prompt to {max_length - max_new_tokens} tokens, it is never truncated"
        )


def check_window(tokens: int, max_scored: int) -> None:
    """Refuse a window that cannot be scored."""
    if not 2 <= tokens <= max_scored:
        raise BadInput(f"a window of {tokens} tokens cannot be scored; 2 to {max_scored} can")


def longest_scored(engine: str, max_length: int) -> int:
    """Tokens of the longest window that an engine scores: vLLM and servers always generate one more, and need room."""
    return max_length if engine == "transformers" else max_length - 1
