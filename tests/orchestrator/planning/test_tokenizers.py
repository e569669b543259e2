"""Vocabularies of parents that differ: rows by arithmetic, padding that stays, files that load, remedies that work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from jobs.errors import BadInput
from jobs.job import load_merge_document
from orchestrator.cli import main
from orchestrator.planning.plan import Plan, make_plan
from tests.tokenizer_models import EMBEDDINGS, HEAD, tokenizer, write_model

PLAIN, CHAT = tokenizer(("a b", "c d")), tokenizer(("a b", "c d"), ["<x>"])
OTHER = tokenizer(("c d", "e f"), ["<x>"])


def document(root: Path, models: Sequence[str], **more: Any) -> str:
    """A linear merge of these models with equal weights."""
    listed = [{"model": str(root / name), "parameters": {"weight": 1}} for name in models]
    return yaml.safe_dump({"merge_method": "linear", "models": listed, **more}, sort_keys=False, width=500)


def planned(root: Path, models: Sequence[str], **more: Any) -> Plan:
    text = document(root, models, **more)
    return make_plan(load_merge_document(text, "m.yml", str(root / "out")), relative_to=root, flat=True)


def merged(root: Path, models: Sequence[str], **more: Any) -> Mapping[str, torch.Tensor]:
    """The tensors of the merge in `root/out`, whose config says how many rows there are."""
    (root / "m.yml").write_text(document(root, models, **more))
    assert main(["merge", str(root / "m.yml"), str(root / "out"), "--quiet"]) == 0
    tensors = load_file(root / "out" / "model.safetensors")
    assert json.loads((root / "out" / "config.json").read_text())["vocab_size"] == len(tensors[EMBEDDINGS])
    return tensors


def stored(root: Path, name: str, tensor: str = EMBEDDINGS) -> torch.Tensor:
    return load_file(root / name / "model.safetensors")[tensor]


def refused(root: Path, models: Sequence[str], **more: Any) -> str:
    with pytest.raises(BadInput) as caught:
        planned(root, models, **more)
    (line,) = str(caught.value).splitlines()
    return line


def encoded(folder: Path, text: str) -> list[str]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).tokens


@pytest.mark.parametrize("tied", [True, False])
def test_parents_that_differ_in_padding_get_the_rows_of_the_largest(tmp_path: Path, tied: bool):
    write_model(tmp_path / "one", PLAIN, tied=tied)
    write_model(tmp_path / "two", PLAIN, tied=tied, rows=16)
    tensors = merged(tmp_path, ["one", "two"])
    for name in (EMBEDDINGS,) if tied else (EMBEDDINGS, HEAD):
        one, two = stored(tmp_path, "one", name), stored(tmp_path, "two", name)
        assert torch.equal(tensors[name], torch.cat([(one + two[:12]) / 2, two[12:]]))
    (remark,) = planned(tmp_path, ["one", "two"]).remarks
    assert remark.startswith(f"the embeddings of {tmp_path}/one have fewer rows than the 16 of {tmp_path}/two")


@pytest.mark.parametrize("source", ["base", "union", "one"])
def test_a_vocabulary_keeps_the_rows_of_its_padding(tmp_path: Path, source: str):
    write_model(tmp_path / "one", PLAIN, rows=16)
    write_model(tmp_path / "two", CHAT)
    source = str(tmp_path / source) if source == "one" else source
    tensors = merged(tmp_path, ["one", "two"], tokenizer_source=source)
    one, two = stored(tmp_path, "one"), stored(tmp_path, "two")
    assert torch.equal(tensors[EMBEDDINGS][:12], (one[:12] + two[:12]) / 2)
    assert torch.equal(tensors[EMBEDDINGS][12], two[12] if source == "union" else one[12])
    assert torch.equal(tensors[EMBEDDINGS][13:], one[13:])


def test_equal_vocabularies_change_nothing(tmp_path: Path):
    for name in ("one", "two"):
        write_model(tmp_path / name, CHAT)
    plain = planned(tmp_path, ["one", "two"]).points[0]
    for settings in (
        {"tokenizer_source": "union"},
        {"tokenizer": {"source": str(tmp_path / "two")}},
        {"tokenizer": {}},
    ):
        assert planned(tmp_path, ["one", "two"], **settings).points[0].digest == plain.digest


def test_rows_are_the_donor_s_the_base_s_or_the_mean(tmp_path: Path):
    for name, of in (("base", PLAIN), ("two", CHAT), ("three", OTHER)):
        write_model(tmp_path / name, of, dtype=torch.bfloat16 if name == "two" else torch.float32)
    sources = {"tokens": {"<x>": {"source": str(tmp_path / "three")}, "<new>": {"source": {"kind": "zero"}}}}
    models, base = ["two", "three"], str(tmp_path / "base")
    tensors = merged(tmp_path, models, base_model=base, merge_method="task_arithmetic", tokenizer=sources)
    one, two, three = (stored(tmp_path, name).float() for name in ("base", "two", "three"))
    table = tensors[EMBEDDINGS]
    ids = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab()
    assert [ids[token] for token in ("ab", "cd", "ef", "<x>", "<new>")] == [10, 11, 12, 13, 14]
    # "ab": three lacks it and gets the base's; "ef": all get three's; "<x>": the base gets three's, as asked
    assert torch.allclose(table[10], one[10] + (two[10] - one[10]) + 0)
    assert torch.allclose(table[11], one[11] + (two[11] - one[11]) + (three[10] - one[11]))
    assert torch.allclose(table[12], three[11])
    assert torch.allclose(table[13], three[12] + (two[12] - three[12]) + 0)
    assert not table[14].any() and len(table) == 15
    without_base = merged_mean(tmp_path)
    assert torch.allclose(without_base, ((two[12] + three[12]) / 2 + two[12] + three[12]) / 3)


def merged_mean(root: Path) -> torch.Tensor:
    """The row of `<x>`, which two of three models have, in a merge without a base."""
    (root / "out").rename(root / "earlier")
    return merged(root, ["base", "two", "three"], tokenizer_source="union")[EMBEDDINGS][13]


def test_a_union_cuts_texts_as_the_base_and_finds_the_special_tokens_of_all(tmp_path: Path):
    write_model(tmp_path / "base", PLAIN, template="base {{ messages }}")
    write_model(tmp_path / "other", OTHER)
    merged(tmp_path, ["base", "other"], base_model=str(tmp_path / "base"), tokenizer_source="union")
    out = tmp_path / "out"
    assert encoded(out, "abefcd ef<x>") == ["ab", "e", "f", "cd", "e", "f", "<x>"]
    assert Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab() == {**ids_of(PLAIN), "ef": 12, "<x>": 13}
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.5
    assert (out / "chat_template.jinja").read_text() == "base {{ messages }}"
    remarks = planned(tmp_path, ["base", "other"], tokenizer_source="union").remarks
    assert remarks == (
        f"1 subword of other vocabularies added, and texts are cut as {tmp_path}/base cuts them, without these",
    )


def ids_of(of: Mapping[str, Any]) -> dict[str, int]:
    return {**of["model"]["vocab"], **{entry["content"]: entry["id"] for entry in of["added_tokens"]}}


def test_ends_of_answers_are_those_of_the_vocabulary(tmp_path: Path):
    """mergekit keeps the ids that the base's config states, under which the new vocabulary has other tokens."""
    write_model(tmp_path / "base", PLAIN)
    numbered = {**PLAIN["model"]["vocab"], "</s>": 2, "a": 1}
    added = [{**entry, "id": numbered[entry["content"]]} for entry in PLAIN["added_tokens"]]
    other = {**PLAIN, "model": {**PLAIN["model"], "vocab": numbered}, "added_tokens": added}
    write_model(tmp_path / "other", other)
    for name in ("config.json", "generation_config.json"):
        stated = json.loads((tmp_path / "other" / name).read_text())
        (tmp_path / "other" / name).write_text(json.dumps({**stated, "eos_token_id": 2}))
    for source, end in (("base", 1), ("union", 1), (str(tmp_path / "other"), 2)):
        tensors = merged(tmp_path, ["base", "other"], tokenizer_source=source)
        for name in ("config.json", "generation_config.json"):
            assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == end
        one, two = stored(tmp_path, "base"), stored(tmp_path, "other")
        assert torch.equal(tensors[EMBEDDINGS][end], (one[1] + two[2]) / 2)
        (tmp_path / "out").rename(tmp_path / f"ends in {source.rpartition('/')[2]}")


def test_words_of_a_union_are_found_as_words(tmp_path: Path):
    write_model(tmp_path / "base", tokenizer(("a b",), kind="WordLevel"))
    write_model(tmp_path / "other", tokenizer(("c d",), kind="WordLevel"))
    assert not planned(tmp_path, ["base", "other"], tokenizer_source="union").remarks
    merged(tmp_path, ["base", "other"], tokenizer_source="union")
    assert encoded(tmp_path / "out", "cd ab") == ["cd", "ab"]


@pytest.mark.parametrize("remedy", ["union", "base", "PARENT"])
def test_the_remedies_for_vocabularies_that_differ_work(tmp_path: Path, remedy: str):
    write_model(tmp_path / "one", PLAIN)
    write_model(tmp_path / "two", OTHER)
    line = refused(tmp_path, ["one", "two"])
    assert "differ (token 'ab' is 10 and missing); choose one with `tokenizer_source: PARENT`, or take" in line
    source = str(tmp_path / "two") if remedy == "PARENT" else remedy
    assert len(merged(tmp_path, ["one", "two"], tokenizer_source=source)[EMBEDDINGS]) == (
        14 if remedy == "union" else 12 + (remedy == "PARENT")
    )


def test_a_token_without_a_row_where_one_is_asked_is_refused(tmp_path: Path):
    write_model(tmp_path / "one", PLAIN)
    write_model(tmp_path / "two", CHAT)
    one = str(tmp_path / "one")
    for source, named in (
        (one, '"<y>"'),
        ({"kind": "model_token", "model": one, "token": "<z>"}, '"<z>"'),
        ({"kind": "model_token", "model": one, "token_id": 12}, '"number 12"'),
    ):
        line = refused(tmp_path, ["one", "two"], tokenizer={"tokens": {"<y>": {"source": source}}})
        assert f'{one} has no row for the token {named}, which "<y>" would get; name another model or token' in line


def test_a_vocabulary_that_cannot_be_read_is_copied_and_never_united(tmp_path: Path):
    for name in ("one", "two"):
        write_model(tmp_path / name, None, rows=12)
        (tmp_path / name / "spiece.model").write_bytes(name.encode())
    line = refused(tmp_path, ["one", "two"], tokenizer_source="union")
    assert "cannot be read; name the model whose tokenizer is copied with `tokenizer_source: MODEL`" in line
    plan = planned(tmp_path, ["one", "two"], tokenizer_source=str(tmp_path / "two"))
    assert plan.remarks == (f"the vocabulary of {tmp_path}/one cannot be read; all rows stay as they are",)
    (tmp_path / "two" / "spiece.model").write_bytes(b"one")
    planned(tmp_path, ["one", "two"], tokenizer_source="union")


def test_a_union_without_any_tokenizer_is_refused(tmp_path: Path):
    write_model(tmp_path / "one", None, rows=12)
    write_model(tmp_path / "two", None, rows=13)
    line = refused(tmp_path, ["one", "two"], tokenizer_source="union")
    assert line == f"m.yml:9: {tmp_path}/one has no tokenizer; no parent has one, take tokenizer_source out"


def test_embeddings_of_an_unknown_name_are_not_united(tmp_path: Path):
    for name, of in (("one", PLAIN), ("two", CHAT)):
        write_model(tmp_path / name, of, rows=13)
        tensors = load_file(tmp_path / name / "model.safetensors")
        renamed = {f"{key}.table" if key in (EMBEDDINGS, HEAD) else key: tensor for key, tensor in tensors.items()}
        save_file(renamed, tmp_path / name / "model.safetensors")
    assert "has the name of embeddings" in refused(tmp_path, ["one", "two"], tokenizer_source="union")


def test_a_damaged_id_or_a_huge_multiple_is_refused(tmp_path: Path):
    write_model(tmp_path / "one", {**PLAIN, "added_tokens": [{"id": 10**12, "content": "<s>"}]}, rows=12)
    write_model(tmp_path / "two", CHAT)
    models = ["one", "two"]
    assert "rows by the id of a token, more than 10000000" in refused(tmp_path, models, tokenizer_source="union")
    source = str(tmp_path / "two")
    line = refused(tmp_path, models, tokenizer={"source": source, "pad_to_multiple_of": 10**9})
    assert "would have 1000000000 rows by pad_to_multiple_of" in line


def test_a_table_of_other_tokens_stays(tmp_path: Path):
    """Qwen's models of speech have embeddings of sounds beside those of the text."""
    for name, of in (("one", PLAIN), ("two", CHAT)):
        write_model(tmp_path / name, of)
        tensors = load_file(tmp_path / name / "model.safetensors")
        sounds = {"a.talker.embed_tokens.weight": torch.ones(5, 8), "a.talker.lm_head.weight": torch.ones(5, 8)}
        save_file({**tensors, **sounds}, tmp_path / name / "model.safetensors")
    tensors = merged(tmp_path, ["one", "two"], tokenizer_source="union")
    assert len(tensors[EMBEDDINGS]) == 13 and len(tensors["a.talker.embed_tokens.weight"]) == 5
