"""`mergeyard measure`: a file of statistics that a merge takes, the same again, and inputs that are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tests.orchestrator.models import HEAD, HIDDEN, weights, write_model
from workers.checkpoints.activations import open_activations
from workers.checkpoints.fishers import open_fisher
from workers.checkpoints.grams import open_grams
from workers.storage import open_store

Mergeyard = Callable[..., Any]

MEANS = ("--what", "means", "--device", "cpu")

WORDS = {
    "model": {"type": "WordLevel", "vocab": {f"w{number}": number for number in range(48)}, "unk_token": "w0"},
    "pre_tokenizer": {"type": "Whitespace"},
    "added_tokens": [],
}


@pytest.fixture
def base(parents: Path) -> Path:
    """The base, with a tokenizer of 48 words."""
    return write_model(parents / "base", weights("base"), tokenizer=WORDS)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    lines = [{"text": " ".join(f"w{(7 * number + step) % 48}" for step in range(9))} for number in range(12)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "texts.jsonl"


def test_a_merge_takes_the_statistics_that_were_written(mergeyard: Mergeyard, base: Path, texts: Path, tmp_path: Path):
    file = tmp_path / "stats" / "base.safetensors"
    ended = mergeyard("measure", base, file, "--text", texts, "--count", 10, "--tokens", 6, *MEANS, "--json")
    assert ended.code == 0, ended.err
    assert (ended.facts["texts"], ended.facts["tokens"]) == (10, 60)
    assert (ended.facts["without"], ended.facts["unreached"]) == ([], [])
    with safe_open(file, "np") as found:
        assert {"texts_read": "10", "tokens": "60", "model": str(base)}.items() <= found.metadata().items()
        inputs = found.get_tensor("model.layers.0.input_layernorm.weight")
    ids = [number for line in range(10) for number in ((7 * line + step) % 48 for step in range(6))]
    embeddings = weights("base")["model.embed_tokens.weight"].float().numpy()
    assert inputs == pytest.approx(np.abs(embeddings[ids]).mean(0), rel=1e-5)
    document = tmp_path / "aim.yml"
    document.write_text(
        f"merge_method: task_arithmetic\nbase_model: {base}\ndtype: float32\n"
        f"models: [{{model: {base.parent / 'cos'}, parameters: {{weight: 1}}}}]\n"
        f"aim: {{statistics: {file}, omega: 0}}\ntokenizer_source: base\n"
    )
    ended = mergeyard("merge", document, tmp_path / "out", "-q")
    assert ended.code == 0, ended.err
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.input_layernorm.weight"].numpy()
    before, model = (weights(who)["model.layers.0.input_layernorm.weight"].double().numpy() for who in ("base", "cos"))
    assert merged == pytest.approx(before + (model - before) * (1 - inputs / inputs.max()), rel=1e-6, abs=1e-7)


def test_the_bundled_text_is_read_and_gives_the_same_bytes_again(mergeyard: Mergeyard, base: Path, tmp_path: Path):
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    for file in files:
        ended = mergeyard("measure", base, file, "--count", 3, "--tokens", 32, *MEANS)
        assert ended.code == 0, ended.err
        assert "read 96 tokens in 3 texts" in ended.out
    assert files[0].read_bytes() == files[1].read_bytes()
    with safe_open(files[0], "np") as found:
        assert found.get_tensor(HEAD).shape == (1, HIDDEN)


def test_a_merge_takes_the_gram_matrices_that_were_written(
    mergeyard: Mergeyard, base: Path, texts: Path, tmp_path: Path
):
    file = tmp_path / "base-grams.safetensors"
    ended = mergeyard("measure", base, file, "--text", texts, "--device", "cpu", "--block", 20, "--json")
    assert ended.code == 0, ended.err
    assert (ended.facts["texts"], ended.facts["tensors"], ended.facts["without"]) == (12, 8, [])
    assert ended.facts["digest"] == open_grams(str(file)).digest
    assert ended.facts["bytes"] == file.stat().st_size
    again = tmp_path / "again.safetensors"
    assert mergeyard("measure", base, again, "--text", texts, "--device", "cpu", "--block", 20, "-q").code == 0
    assert file.read_bytes() == again.read_bytes()
    cos = write_model(base.parent / "cos", weights("cos"), tokenizer=WORDS)
    document = tmp_path / "regmean.yml"
    document.write_text(
        f"merge_method: regmean\nmodels: [{{model: {base}}}, {{model: {cos}}}]\n"
        f"grams: {{{base}: {file}, {cos}: {again}}}\ndtype: float32\n"
    )
    ended = mergeyard("merge", document, tmp_path / "out", "-q")
    assert ended.code == 0, ended.err
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in merged.items():  # equal matrices give the mean
        mean = (weights("base")[name].double() + weights("cos")[name].double()) / 2
        assert tensor.double().numpy() == pytest.approx(mean.numpy(), rel=1e-5, abs=1e-6), name


def test_deltas_give_the_merge_of_the_least_interference(mergeyard: Mergeyard, base: Path, tmp_path: Path):
    models = [write_model(base.parent / name, weights(name), tokenizer=WORDS) for name in ("cos", "fmt")]
    files = [tmp_path / f"{model.name}.safetensors" for model in models]
    for model, file in zip(models, files, strict=True):
        ended = mergeyard("measure", model, file, "--what", "deltas", "--base", base, "--json")
        assert ended.code == 0, ended.err
        assert (ended.facts["kind"], ended.facts["tensors"], ended.facts["without"]) == ("deltas", 14, [])
        assert ended.facts["digest"] == open_grams(str(file)).digest
        assert ended.facts["bytes"] == file.stat().st_size
    document = tmp_path / "regmean.yml"
    listed = ", ".join(f"{model}: {file}" for model, file in zip(models, files, strict=True))
    document.write_text(
        f"merge_method: regmean\nparameters: {{alpha: 1}}\nmodels: [{{model: {models[0]}}}, {{model: {models[1]}}}]\n"
        f"grams: {{{listed}}}\ndtype: float32\n"
    )
    ended = mergeyard("merge", document, tmp_path / "out", "-q")
    assert ended.code == 0, ended.err
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in sorted(open_grams(str(files[0])).tensors):
        start = weights("base")[name].double().numpy()
        deltas = [weights(who)[name].double().numpy() - start for who in ("cos", "fmt")]
        factors = np.hstack([delta.T / np.linalg.norm(delta) for delta in deltas])
        wanted = np.hstack([delta @ delta.T / np.linalg.norm(delta) for delta in deltas])
        least = np.linalg.lstsq(factors.T, wanted.T, rcond=None)[0].T  # Σ ‖(τ − τᵢ)τᵢᵀ‖² / ‖τᵢ‖²
        found = merged[name].double().numpy() - start
        interference, minimum, mean = (
            np.linalg.norm(each @ factors - wanted) for each in (found, least, sum(deltas) / 2)
        )
        assert interference <= minimum + 2e-3 * mean, name  # of matrices and weights in float32
        assert minimum < 0.9 * mean


def test_a_merge_takes_the_fisher_information_that_was_written(
    mergeyard: Mergeyard, base: Path, texts: Path, tmp_path: Path
):
    models = [base, write_model(base.parent / "cos", weights("cos"), tokenizer=WORDS)]
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for model, file in zip([*models, base], files, strict=True):
        ended = mergeyard(
            "measure", model, file, "--what", "fisher", "--text", texts, "--count", 4, "--device", "cpu", "--json"
        )
        assert ended.code == 0, ended.err
        assert (ended.facts["kind"], ended.facts["texts"], ended.facts["without"]) == ("fisher", 4, [])
        assert ended.facts["digest"] == open_fisher(str(file)).digest
        assert ended.facts["bytes"] == file.stat().st_size
    assert files[0].read_bytes() == files[2].read_bytes()
    document = tmp_path / "fisher.yml"
    document.write_text(
        f"merge_method: fisher\nmodels: [{{model: {models[0]}}}, {{model: {models[1]}}}]\n"
        f"fisher: {{{models[0]}: {files[0]}, {models[1]}: {files[1]}}}\ndtype: float32\n"
    )
    ended = mergeyard("merge", document, tmp_path / "out", "-q")
    assert ended.code == 0, ended.err
    merged = load_file(tmp_path / "out" / "model.safetensors")
    fishers = [load_file(file) for file in files[:2]]
    for name, tensor in merged.items():
        f, g = (each[name].double().numpy() for each in fishers)
        x, y = (weights(who)[name].double().numpy() for who in ("base", "cos"))
        least = 1e-6 * (f.mean() + g.mean()) / 2
        f, g = np.maximum(f, least), np.maximum(g, least)
        assert tensor.double().numpy() == pytest.approx((f * x + g * y) / (f + g), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("{base}", "{here}/out", "--text", "{here}/texts.jsonl"),
            "a file of statistics ends in .safetensors; give its whole",
        ),
        (
            ("{base}", "{here}/there.safetensors", "--text", "{here}/texts.jsonl"),
            "there is such a file already; give another",
        ),
        (("{base}", "{here}/out.safetensors", "--text", "{here}/no.jsonl"), "no.jsonl cannot be read"),
        (
            ("{base}", "{here}/out.safetensors", "--text", "{here}/empty.txt"),
            "empty.txt: it has no text; give prose as",
        ),
        (("{here}", "{here}/out.safetensors", "--text", "{here}/texts.jsonl"), "parent model ("),
        (("{base}", "{here}/out.safetensors", "--what", "deltas"), "--what deltas and --base BASE go together"),
        (
            ("{base}", "{here}/out.safetensors", "--what", "deltas", "--base", "{base}"),
            "the very checkpoint that is measured; give the one that it was trained from",
        ),
        (
            ("{base}", "{here}/out.safetensors", "--count", "0"),
            "--count: give a whole number from 1 on",
        ),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(
    mergeyard: Mergeyard, base: Path, texts: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
):
    (tmp_path / "there.safetensors").write_bytes(b"")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "out").mkdir()
    ended = mergeyard("measure", *(part.format(base=base, here=tmp_path) for part in arguments), "--device", "cpu")
    assert ended.code == 2
    assert message in ended.err
    assert len(ended.err.splitlines()) == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_a_text_is_cut_to_the_context_of_the_model(mergeyard: Mergeyard, base: Path, texts: Path, tmp_path: Path):
    write_model(base, weights("base"), config={"max_position_embeddings": 4}, tokenizer=WORDS)
    ended = mergeyard("measure", base, tmp_path / "out.safetensors", "--text", texts, *MEANS, "--json")
    assert ended.facts["tokens"] == 12 * 4


def test_tokens_without_embeddings_are_refused(mergeyard: Mergeyard, base: Path, texts: Path, tmp_path: Path):
    words = {**WORDS, "model": {**WORDS["model"], "vocab": {f"w{number}": number + 8 for number in range(48)}}}
    write_model(base, weights("base"), tokenizer=words)
    ended = mergeyard("measure", base, tmp_path / "out.safetensors", "--text", texts, *MEANS)
    assert ended.code == 2
    assert "the texts have token 55, and the model 48 rows of embeddings; give a checkpoint with its own" in ended.err


def test_fisher_information_beyond_the_memory_is_refused_before_the_model_is_loaded(
    mergeyard: Mergeyard, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    needed = 8 * sum(tensor.numel() for tensor in weights("base").values())
    file = tmp_path / "out.safetensors"
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": needed - 1}.__getitem__)
    ended = mergeyard("measure", base, file, "--what", "fisher", "--device", "cpu")
    assert (ended.code, ended.err) == (
        2,
        f"mergeyard: {base}: its weights and their Fisher information take {needed / 1e9:.1f} GB in float32, and this"
        f" machine has {needed / 1e9:.1f} GB; measure it on one with more memory\n",
    )
    assert not file.exists()


def test_model_texts_and_file_may_lie_in_a_bucket(
    mergeyard: Mergeyard, base: Path, texts: Path, tmp_path: Path, s3_url: str
):
    local = tmp_path / "here.safetensors"
    assert mergeyard("measure", base, local, "--text", texts, *MEANS, "-q").code == 0
    for file in (*base.iterdir(), texts):
        open_store(s3_url).write(file.name, file.read_bytes())
    there = f"{s3_url}/stats/there.safetensors"
    ended = mergeyard("measure", s3_url, there, "--text", f"{s3_url}/{texts.name}", *MEANS, "--json")
    assert ended.code == 0, ended.err
    assert ended.facts["digest"] == open_activations(str(local)).digest == open_activations(there).digest
