"""Documents of mergekit-moe: what they mean, and what is refused."""

from __future__ import annotations

import pytest

from jobs.errors import BadInput
from jobs.mixtures import Mixture, load_mixture

TEXT = """
base_model: org/base
gate_mode: cheap_embed
experts:
- source_model: org/one
  positive_prompts: [code]
- source_model: {model: {path: org/two, revision: main}}
  positive_prompts: [tale]
  noise_scale: 0.5
"""


def load(text: str, *, all_same: bool = False) -> Mixture:
    return load_mixture(text, "moe.yml", all_same=all_same)


def test_a_document_and_its_defaults() -> None:
    mixture = load(TEXT)
    assert (mixture.gate_mode, mixture.dtype, mixture.experts_per_token, mixture.shared) == (
        "cheap_embed",
        None,
        2,
        None,
    )
    assert mixture.models() == ("org/base", "org/one", "org/two@main")
    assert (mixture.experts[0].positive_prompts, mixture.experts[1].noise_scale) == (("code",), 0.5)
    assert load(TEXT.replace("gate_mode: cheap_embed", "")).gate_mode == "hidden"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("experts:", "expert:", 'unknown key "expert"; did you mean "experts"?'),
        ("cheap_embed", "cheap", "cannot be"),
        ("gate_mode: cheap_embed", "experts_per_token: 3", "2 experts and `experts_per_token: 3`"),
        ("gate_mode: cheap_embed", "experts_per_token: 0", "0"),
        ("[tale]", "[code]", "all experts have equal prompts"),
        ("  positive_prompts: [tale]\n", "", "or write `gate_mode: random`"),
        ("{model: {path: org/two, revision: main}}", "org/one", "all experts are one model"),
    ],
)
def test_what_cannot_work_is_refused_with_its_line(old: str, new: str, words: str) -> None:
    with pytest.raises(BadInput) as refusal:
        load(TEXT.replace(old, new))
    assert words in str(refusal.value) and str(refusal.value).startswith("moe.yml:")


def test_forms_that_mergekit_moe_takes_are_taken() -> None:
    mixture = load(TEXT.replace("[code]", "[code]\n  weight: 1") + "tokenizer_source: union\n")
    assert mixture == load(TEXT)
    assert mixture.ignored == (
        'moe.yml:11: "tokenizer_source" is not a key here and has no effect',
        'moe.yml:7: "weight" is not a key here and has no effect',
    )
    assert load(f"{TEXT}dtype: torch.float16\n") == load(f"{TEXT}dtype: float16\n")
    blank = TEXT.replace("[tale]", '[""]')
    assert load(blank.replace("cheap_embed", "random")).experts[1].positive_prompts == ()
    with pytest.raises(BadInput, match="is empty"):
        load(blank)


def test_the_remedies_work() -> None:
    load(TEXT.replace("{model: {path: org/two, revision: main}}", "org/one"), all_same=True)
    load(TEXT.replace("  positive_prompts: [tale]\n", "").replace("cheap_embed", "random"))
