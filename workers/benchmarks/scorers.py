"""Scores of one answer, from 0 to 1, as RULER counts them.

RULER lower-cases both sides and looks for each reference inside the prediction. A task that wants all of several
values gives the share that was found; a question with aliases gives 1 if any of them was found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def postprocess(prediction: str) -> str:
    """The prediction as RULER scores it: stripped, control characters turned into newlines, stripped again."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """The share of the references that occur in the prediction, upper and lower case being the same."""
    text = postprocess(prediction).lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 if any of the references (aliases of one answer) occurs in the prediction, else 0."""
    text = postprocess(prediction).lower()
    return float(any(reference.lower() in text for reference in references))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is one of the references, but for case, outer blanks and a full stop, else 0."""
    text = postprocess(prediction).lower().removesuffix(".").strip()
    return float(any(reference.lower() == text for reference in references))


SCORERS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "all": string_match_all,
    "part": string_match_part,
    "exact": exact_match,
}
