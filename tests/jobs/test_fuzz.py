"""Whatever text is given, the answer is a job or one line that names the file; never another exception."""

from __future__ import annotations

import pickle
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import BadInput
from jobs.job import Job, load_job, load_merge_document

EXAMPLES = sorted((Path(__file__).parents[2] / "jobs" / "examples").glob("*.yaml"))
TEXTS = [path.read_text(encoding="utf-8") for path in EXAMPLES]
PIECES = (
    *"{}[]:,-#&*!|>'\"%@`?\n\t $",
    *(
        "${",
        "${w}",
        "${1/0}",
        "${w**64}",
        "{w}",
        "<<: ",
        "---\n",
        "...\n",
        "&a ",
        "*a",
        "!!str ",
        "null",
        "~",
        ".nan",
        "on",
    ),
    *(
        "1e999",
        "-1",
        "0",
        "1e-300",
        "99999999999999999999",
        "\x00",
        "\ud800",
        "\ufeff",
        "é",
        "\\",
        "\r\n",
        "  ",
        ": ",
        "- ",
    ),
    *("simplex", "points", "name", "grid:\n", "slices:\n", "from", "step: 0", "[[[[[[[[[[", "{{{{{{{{{{"),
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A valid job with up to four edits: a piece put in, a stretch cut out, a line doubled or moved."""
    text = draw(st.sampled_from(TEXTS))
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, len(text)))
        edit = draw(st.sampled_from(["insert", "cut", "double", "swap"]))
        if edit == "insert":
            text = text[:position] + draw(st.sampled_from(PIECES)) + text[position:]
        elif edit == "cut":
            text = text[:position] + text[position + draw(st.integers(1, 12)) :]
        else:
            lines = text.splitlines(keepends=True) or [""]
            first, second = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
            if edit == "double":
                lines.insert(second, lines[first])
            else:
                lines[first], lines[second] = lines[second], lines[first]
            text = "".join(lines)
    return text


def check(text: str) -> None:
    for load in (lambda: load_job(text, "fuzz.yaml"), lambda: load_merge_document(text, "fuzz.yaml", "out")):
        try:
            job = load()
        except BadInput as error:
            assert str(error).startswith("fuzz.yaml:")
            assert "\n" not in str(error)
            continue
        assert isinstance(job, Job)
        assert len(job.digest()) == 64
        assert [point.recipe.document() for point in pickle.loads(pickle.dumps(job)).points]


@settings(max_examples=400, deadline=20_000, derandomize=True)
@given(mutated())
def test_a_damaged_job_is_a_job_or_bad_input(text: str) -> None:
    check(text)


@settings(max_examples=200, deadline=20_000, derandomize=True)
@given(st.text(max_size=200) | st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_any_text_is_a_job_or_bad_input(text: str) -> None:
    check(text)
