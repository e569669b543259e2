"""Scores of one answer, from 0 to 1: as RULER counts them, and as other benchmarks do.

RULER lower-cases both sides and looks for each reference inside the prediction. A task that wants all of several
values gives the share that was found; a question with aliases gives 1 if any of them was found.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

import regex

from jobs.errors import BadInput
from jobs.yaml_nodes import quoted

PATTERN_SECONDS = 10.0
"""Of one pattern in one answer: far more than any needs that does not try exponentially many ways."""

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


def verbatim(prediction: str, references: Sequence[str]) -> float:
    """1 if any of the references occurs in the prediction in the same upper and lower case, as NoLiMa counts it."""
    return float(any(reference in prediction for reference in references))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is one of the references, but for case, outer blanks and a full stop, else 0."""
    return float(_bare(prediction) in map(_bare, references))


def _bare(text: str) -> str:
    return postprocess(text).lower().removesuffix(".").strip()


def chosen_letter(prediction: str, references: Sequence[str]) -> float:
    """1 if the letter after `The correct answer is`, in brackets or not, is a reference, else 0.

    As `extract_answer` of LongBench v2: asterisks do not count, a letter in brackets comes first.
    """
    text = prediction.replace("*", "")
    found = (re.search(rf"The correct answer is {letter}", text) for letter in (r"\(([A-D])\)", "([A-D])"))
    return float(next((match[1] for match in found if match), "") in references)


def found_patterns(prediction: str, references: Sequence[str]) -> float:
    """1 if any of the references, regular expressions of Python, is found in the prediction, else 0.

    `BadInput` for one that takes longer than `PATTERN_SECONDS`.
    """
    for reference in references:
        try:
            if regex.search(reference, prediction, timeout=PATTERN_SECONDS):
                return 1.0
        except TimeoutError as error:
            raise BadInput(
                f"the pattern {quoted(reference)} takes more than {PATTERN_SECONDS:g} seconds in one answer;"
                " write it without a repetition inside a repetition, and start a new run"
            ) from error
    return 0.0


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """The best F1 of the words that prediction and reference have in common, as the script of SQuAD 2.0 counts it."""
    return max(_f1(squad_words(prediction), squad_words(reference)) for reference in references)


def _f1(said: Sequence[str], right: Sequence[str]) -> float:
    if not said or not right:
        return float(said == right)
    return _harmonic((Counter(said) & Counter(right)).total(), said, right)


def _harmonic(common: int, said: Sequence[str], right: Sequence[str]) -> float:
    return 2 * common / (len(said) + len(right)) if common else 0.0


def squad_words(text: str) -> list[str]:
    """The words by which SQuAD compares answers: in lower case, without punctuation and articles."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def rouge_words(text: str) -> list[str]:
    """The words that rouge-score reads: runs of the letters a to z and of digits, in lower case."""
    return re.findall("[a-z0-9]+", text.lower())


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """The best F-measure of the longest common subsequence of words, as `rougeL` of rouge-score without a stemmer."""
    said = rouge_words(prediction)
    right = [rouge_words(reference) for reference in references]
    return max(_harmonic(_common_subsequence(said, words), said, words) for words in right)


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """The length of the longest one: a bit for each word of `left`, a step for each of `right` (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(left):
        places[word] = places.get(word, 0) | 1 << place
    everywhere = row = (1 << len(left)) - 1
    for word in right:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & everywhere
    return len(left) - row.bit_count()


def sequence_after(prediction: str, references: Sequence[str], beginning: str) -> float:
    """The similarity of the texts after `beginning`, by difflib; 0 if the prediction does not begin with it.

    As the function on the card of OpenAI's MRCR, except that blanks before the answer do not count: a plain model and
    a thought leave some.
    """
    [reference] = references
    text = prediction.lstrip()
    if not text.startswith(beginning):
        return 0.0
    return SequenceMatcher(None, text.removeprefix(beginning), reference.removeprefix(beginning)).ratio()


def only_labels(prediction: str, references: Sequence[str], labels: str) -> float:
    """1 if the first sentence of the prediction has exactly those of the labels that the reference has, else 0.

    The labels are in lower case and parted by `|`; those in the question are not among them. A reference of several
    labels has commas. As `compare_answers` of BABILong.
    """
    [reference] = references
    text = prediction.lower()
    for end in (".", "<context>", "<example>"):
        text = text.partition(end)[0]
    target = reference.lower()
    wanted = {*target.split(",")} if "," in target and len(target) > 3 else {target}
    return float({label for label in labels.split("|") if label in text} == wanted)


def of_helmet(prediction: str, references: Sequence[str], settings: str) -> float:
    """1 if the answer is a reference or, unless `exact`, has one in it, by the words of SQuAD, else 0.

    `settings` is a JSON object: the `prefix` that begins an answer, whether it was `begun` in the prompt, and whether
    only the first `line` counts. As the metrics of HELMET, which also read the answer after its prefix.
    """
    told = json.loads(settings)
    prefix = str(told["prefix"])
    text = prediction.partition("\n")[0] if told["line"] else prediction
    text = prefix + text if told["begun"] else text
    found = re.search(rf"{re.escape(prefix)}(.*)", text, re.IGNORECASE) or re.search("^(.*)", text)
    after = re.sub(rf"^{re.escape(prefix)}", "", found[1].strip() if found else "", flags=re.IGNORECASE).strip()
    said = [squad_words(after)] if told["exact"] else [squad_words(text), squad_words(after)]
    for right in map(squad_words, references):
        if any(words == right if told["exact"] else " ".join(right) in " ".join(words) for words in said):
            return 1.0
    return 0.0


def json_field(prediction: str, references: Sequence[str], field: str) -> float:
    """1 if a field of the first JSON object in the prediction is one of the references, else 0.

    `field` may lead through objects, as `place.city`. Case and outer blanks do not count; equal numbers are equal.
    """
    found = value_at(_first_object(prediction), field)
    if found is None:
        return 0.0
    said = as_text(found).strip().lower()
    return float(any(_same(said, reference.strip().lower()) for reference in references))


def value_at(record: Any, path: str) -> Any:
    """The value under the key `path`, or under its parts one after another; None where there is none."""
    if isinstance(record, dict) and path in record:
        return record[path]
    for key in path.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def as_text(value: Any) -> str:
    """A text as it is, a value of JSON as JSON writes it, and a date of a Parquet file as `2026-11-29`."""
    if value is None or isinstance(value, bool | int | float | dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _first_object(text: str) -> Any:
    for match in re.finditer("{", text):
        try:
            return json.JSONDecoder().raw_decode(text, match.start())[0]
        except (ValueError, RecursionError):
            continue
    return None


def _same(left: str, right: str) -> bool:
    try:
        return left == right or math.isclose(float(left), float(right), rel_tol=1e-9)
    except ValueError:
        return False


def by_own_function(prediction: str, references: Sequence[str], code: str) -> float:
    """The score by a function of the user's: a line `module.function`, then the source of the module.

    The function takes the answer and the list of targets, and returns a number from 0 to 1 or a boolean. `BadInput`
    names it where it fails.
    """
    name, _, source = code.partition("\n")
    module, _, function = name.rpartition(".")
    try:
        found = _module(module, source)[function](prediction, list(references))
        value = math.nan if isinstance(found, str) else float(found)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadInput(f"{name}: the scorer fails ({said}); correct the function, and start a new run") from error
    if not 0 <= value <= 1:
        raise BadInput(f"{name}: the scorer gives {found!r:.40}; return a number from 0 to 1")
    return value


@lru_cache(16)
def _module(name: str, source: str) -> dict[str, Any]:
    """The names that a module defines."""
    names: dict[str, Any] = {"__name__": name, "__file__": f"{name.replace('.', '/')}.py"}
    exec(compile(source, names["__file__"], "exec"), names)
    return names


SCORERS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "all": string_match_all,
    "part": string_match_part,
    "verbatim": verbatim,
    "exact": exact_match,
    "regex": found_patterns,
    "choice": chosen_letter,
    "f1": token_f1,
    "rouge_l": rouge_l,
}
WITH_ARGUMENT: Mapping[str, Callable[[str, Sequence[str], str], float]] = {
    "after": sequence_after,
    "helmet": of_helmet,
    "json_field": json_field,
    "labels": only_labels,
    "python": by_own_function,
}


def score(scorer: str, prediction: str, references: Sequence[str]) -> float:
    """The score by a scorer's name: one of `SCORERS`, or one of `WITH_ARGUMENT` with a colon and its argument."""
    name, colon, argument = scorer.partition(":")
    return WITH_ARGUMENT[name](prediction, references, argument) if colon else SCORERS[name](prediction, references)
