"""The transformers engine against transformers' own `generate` and full logits, on models that were really trained."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from jobs.errors import BadInput, MergeyardError
from workers.engines import attention
from workers.engines.engine import Prompt, Sampling, Thought, before_stops
from workers.engines.transformers_engine import Limits, TransformersEngine

ROOT = Path(__file__).parents[3]
KEYS = {"quiet-river": 4815162, "brave-garden": 1234567, "golden-engine": 7654321}


def peer_answer(engine, model, prompt):
    ids = torch.tensor([engine.encode(prompt.whole)])
    output = model.generate(ids, max_new_tokens=prompt.max_new_tokens, do_sample=False)
    return engine.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def mixed_prompts(needle_prompt, shared_prompts):
    alone = [needle_prompt(key, value, lines, seed=lines) for lines in (4, 11, 12) for key, value in KEYS.items()]
    return [*alone, *shared_prompts(KEYS, 9), needle_prompt("ancient-mirror", 7777777, 30, max_new_tokens=3)]


def test_answers_are_those_of_transformers_generate(engine, parents, needle_prompt, shared_prompts):
    prompts = mixed_prompts(needle_prompt, shared_prompts)
    model = AutoModelForCausalLM.from_pretrained(parents / "long", dtype=torch.float32)
    assert [answer.text for answer in engine.generate(prompts)] == [peer_answer(engine, model, p) for p in prompts]


def test_a_needle_is_found_and_counted(engine, needle_prompt):
    prompt = needle_prompt("quiet-river", 4815162, 20)
    (answer,) = engine.generate([prompt])
    assert answer.text == " 4815162."
    assert answer.tokens_in == len(engine.tokenizer(prompt.whole)["input_ids"])
    assert 0 < answer.tokens_out < 12 and answer.seconds > 0 and answer.finite


@pytest.mark.parametrize("limits", [Limits(batch=1), Limits(batch=3, chunk=50), Limits(cache_bytes=1)])
def test_answers_do_not_depend_on_what_is_done_at_once(engine, needle_prompt, shared_prompts, limits):
    prompts = mixed_prompts(needle_prompt, shared_prompts)
    texts = [answer.text for answer in engine.generate(prompts)]
    engine.limits = limits
    assert [answer.text for answer in engine.generate(prompts)] == texts
    assert [answer.text for answer in reversed(engine.generate(prompts[::-1]))] == texts


def count_tokens(engine):
    seen = []
    engine.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return seen


def test_questions_about_one_haystack_pay_for_it_once(engine, shared_prompts):
    prompts = shared_prompts(KEYS, 20, max_new_tokens=1)
    lengths = [len(engine.encode(prompt.whole)) for prompt in prompts]
    trunk = len(engine.encode(prompts[0].prefix))
    seen = count_tokens(engine)
    engine.generate(prompts)
    assert trunk > 400
    assert sum(seen) <= trunk + sum(length - trunk for length in lengths) + 3 * len(prompts)


def test_haystacks_that_begin_alike_share_what_they_share(engine, needle_prompt):
    text = needle_prompt("quiet-river", 4815162, 20).text
    prompts = [Prompt("", text + ending, 1) for ending in (" one", " two")]
    seen = count_tokens(engine)
    engine.generate(prompts)
    assert sum(seen) < len(engine.encode(text)) + 10


def test_the_place_of_a_row_that_has_ended_is_taken_at_once(engine, needle_prompt):
    """9 + 8 steps in one place while 17 pass in the other: 17 steps, not 9 + 17 or the like."""
    engine._end_tokens = frozenset()
    engine.limits = Limits(batch=2)
    prompts = [needle_prompt("quiet-river", at, 4, max_new_tokens=new) for at, new in ((111, 9), (222, 17), (333, 8))]
    seen = count_tokens(engine)
    answers = engine.generate(prompts)
    assert [answer.tokens_out for answer in answers] == [9, 17, 8]
    steps = [tokens for tokens in seen if tokens <= 2]
    assert steps == [2] * 17


def test_rows_that_wait_for_none_close_up(engine, needle_prompt):
    engine._end_tokens = frozenset()
    new_tokens = (3, 9, 1, 5)
    prompts = [needle_prompt("quiet-river", at, 4, max_new_tokens=new) for at, new in enumerate(new_tokens)]
    alone = [engine.generate([prompt])[0].text for prompt in prompts]
    seen = count_tokens(engine)
    assert [answer.text for answer in engine.generate(prompts)] == alone
    assert [tokens for tokens in seen if tokens <= 4] == [4, 3, 3, 2, 2, 1, 1, 1, 1]


def test_samples_share_one_prefill_and_depend_on_their_seed_alone(engine, needle_prompt):
    prompt = needle_prompt("quiet-river", 4815162, 30, max_new_tokens=12)
    samples = [replace(prompt, sampling=Sampling(5.0, 0.99, 0, seed)) for seed in range(6)]
    greedy = needle_prompt("brave-garden", 1234567, 4)
    seen = count_tokens(engine)
    texts = [answer.text for answer in engine.generate(samples)]
    assert sum(seen) < len(engine.encode(prompt.whole)) + 6 * 12
    assert len(set(texts)) == 6
    engine.limits = Limits(batch=2)
    mixed = engine.generate([greedy, *reversed(samples), prompt])
    assert [answer.text for answer in mixed] == [" 1234567.", *reversed(texts), " 4815162."]
    cold = replace(prompt, sampling=Sampling(0.01, 1.0, 0, 1))
    assert engine.generate([cold])[0].text == " 4815162."


class Scripted(TransformersEngine):
    """An engine that says a text of the test for each prompt, in place of the model's tokens."""

    script: dict[str, str]

    def _choose(self, logits, outputs):
        tokens, _ = super()._choose(logits, outputs)
        for at, output in enumerate(outputs):
            told = self.encode(self.script[output.prompt.text], bare=True)
            done = len(output.tokens)
            tokens[at] = told[done] if done < len(told) else min(self._end_tokens)
        return tokens, [True] * len(tokens)


THOUGHT = "Is it 111? The grass says so. No, 222. Or 333?"
ANSWER = " It is 444. So it is."


@pytest.fixture
def scripted(engine):
    script = {
        "plain": f"{THOUGHT}</think>{ANSWER}",
        "tagged": f"<think>{THOUGHT}</think>{ANSWER}",
        "endless": THOUGHT * 9,
        "silent": f"{THOUGHT}</think>",
        "short": THOUGHT,
    }
    thinker = Scripted(engine.model, engine.tokenizer, "scripted", Limits(batch=2))
    thinker.script = script
    return thinker


def test_only_the_text_after_a_thought_is_the_answer(scripted):
    thinking = Thought("</think>", 120, opened=True)
    asked = [Prompt("", name, 30, stops=(".",), thinking=thinking) for name in scripted.script]
    plain, tagged, endless, silent, short = scripted.generate(asked)
    for answer in (plain, tagged):
        assert (answer.text, answer.thought, answer.status) == (" It is 444", THOUGHT, "answered")
        assert answer.tokens_thought < answer.tokens_out < answer.tokens_thought + 30
    assert (endless.text, endless.status, endless.tokens_out, endless.tokens_thought) == ("", "unended", 120, 120)
    assert endless.thought in THOUGHT * 9
    assert (silent.text, silent.thought, silent.status) == ("", THOUGHT, "empty")
    assert silent.tokens_out == silent.tokens_thought
    assert (short.text, short.thought, short.status) == ("", THOUGHT, "unended")
    assert short.tokens_out == short.tokens_thought == len(scripted.encode(THOUGHT))


def test_an_answer_after_a_thought_has_its_own_limit(scripted):
    thinking = Thought("</think>", 120, opened=True)
    [cut, whole] = scripted.generate([Prompt("", "plain", new, thinking=thinking) for new in (4, 60)])
    assert (cut.status, cut.tokens_out - cut.tokens_thought) == ("cut", 4) and ANSWER.startswith(cut.text)
    assert (whole.status, whole.text) == ("answered", ANSWER)
    [without] = scripted.generate([Prompt("", "plain", 120)])
    assert (without.text, without.thought) == (f"{THOUGHT}</think>{ANSWER}", "")


def test_an_end_tag_that_is_a_special_token_ends_a_thought(scripted):
    scripted.tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    assert "</think>" not in scripted.tokenizer.decode(scripted.encode("a</think>b"), skip_special_tokens=True)
    [answer] = scripted.generate([Prompt("", "plain", 30, thinking=Thought("</think>", 120, opened=True))])
    assert (answer.text, answer.thought, answer.status) == (ANSWER, THOUGHT, "answered")


def test_a_prompt_must_have_room_for_its_thought(engine, needle_prompt):
    prompt = needle_prompt("quiet-river", 4815162, 20)
    with pytest.raises(BadInput, match="4096"):
        engine.generate([replace(prompt, thinking=Thought("</think>", 4000, opened=True))])


def test_a_prefix_that_ends_inside_a_token_changes_no_token(engine, needle_prompt):
    whole = needle_prompt("quiet-river", 4815162, 6).text
    cut = whole.rindex("provided") + 3
    assert engine.encode(whole[:cut]) + engine.encode(whole[cut:]) != engine.encode(whole)
    split, unsplit = (
        engine.generate([Prompt(whole[:cut], whole[cut:], 12)] * 2),
        engine.generate([Prompt("", whole, 12)]),
    )
    assert {(answer.text, answer.tokens_in) for answer in split} == {(unsplit[0].text, unsplit[0].tokens_in)}


def test_an_answer_ends_before_its_first_stop_and_the_others_go_on(engine, needle_prompt):
    prompt = needle_prompt("quiet-river", 4815162, 4)
    free = engine.generate([prompt])[0]
    middle = free.text[2:4]  # " 4815162." has it once
    assert free.text.count(middle) == 1
    stopped = replace(prompt, stops=("no such text", middle))
    answers = engine.generate([stopped, prompt])
    assert [answer.text for answer in answers] == [free.text[:2], free.text]
    assert answers[0].tokens_out < answers[1].tokens_out, "nothing is generated after it"


@pytest.mark.parametrize(
    ("text", "stops", "before"),
    [("a.b\nc", ("\n", "."), "a"), ("a.b", ("?",), "a.b"), ("a.b", (), "a.b"), (".", (".",), "")],
)
def test_the_first_stop_in_the_text_counts(text, stops, before):
    assert before_stops(text, stops) == before


def test_a_tokenizer_that_closes_texts_changes_no_answer(engine, needle_prompt):
    prompts = [needle_prompt("quiet-river", 4815162, lines) for lines in (2, 4)]
    expected = engine.generate(prompts)
    end = ("<|endoftext|>", engine.tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    processor = TemplateProcessing(single="$A <|endoftext|>", special_tokens=[end])
    engine.tokenizer.backend_tokenizer.post_processor = processor
    assert engine.tokenizer("a")["input_ids"][-1] == end[1]
    closed = engine.generate(prompts)
    assert [answer.text for answer in closed] == [answer.text for answer in expected] == [" 4815162."] * 2


def test_an_answer_says_whether_it_reached_its_limit(engine, needle_prompt):
    prompt = needle_prompt("quiet-river", 4815162, 2)
    cut = replace(prompt, max_new_tokens=2)
    [ended, short] = engine.generate([prompt, cut])
    assert (ended.status, short.status, short.tokens_out) == ("answered", "cut", 2)
    [stopped, nothing] = engine.generate([replace(cut, stops=(short.text[1:],)), replace(cut, stops=(short.text,))])
    assert (stopped.status, stopped.text) == ("answered" if short.text[:1].strip() else "empty", short.text[:1])
    assert (nothing.status, nothing.text) == ("empty", "")


def test_a_prompt_that_does_not_fit_is_refused_with_its_numbers(engine, needle_prompt):
    prompt = needle_prompt("quiet-river", 4815162, 200)
    tokens = len(engine.encode(prompt.whole))
    with pytest.raises(BadInput, match=rf"{tokens} tokens and 12 .* 4096; .* {4096 - 12}"):
        engine.generate([prompt])


def test_progress_counts_every_prompt_once(engine, needle_prompt):
    engine.limits = Limits(batch=2)
    counts = []
    engine.generate([needle_prompt("quiet-river", 4815162, 2, max_new_tokens=1)] * 5, progress=counts.append)
    assert sum(counts) == 5 and len(counts) == 3


def test_swap_makes_it_the_other_parent(engine, weights, needle_prompt, loglikelihood):
    prompt = needle_prompt("quiet-river", 4815162, 8)
    assert engine.generate([prompt])[0].text == " 4815162."
    before = loglikelihood(engine, prompt.whole, " 4815162.")
    engine.swap(weights("fmt").items(), "fmt")
    assert engine.version == "fmt"
    assert engine.generate([prompt])[0].text == ' {"value": 4815162}'
    assert loglikelihood(engine, prompt.whole, " 4815162.") != before
    engine.swap(weights("long").items(), "long again")
    assert loglikelihood(engine, prompt.whole, " 4815162.") == before


def test_from_state_needs_no_folder(parents, weights, needle_prompt):
    config = json.loads((parents / "fmt" / "config.json").read_text())
    engine = TransformersEngine.from_state(config, parents / "fmt", weights("fmt").items(), version="f", device="cpu")
    assert engine.version == "f" and engine.model.dtype == torch.bfloat16
    assert engine.generate([needle_prompt("quiet-river", 4815162, 8)])[0].text == ' {"value": 4815162}'


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda w: w.pop("model.norm.weight"), "1 weights never came, the first is model.norm.weight"),
        (lambda w: w.update({"model.nrom.weight": w.pop("model.norm.weight")}), "did you mean model.norm.weight"),
        (lambda w: w.update({"model.norm.weight": torch.ones(7)}), r"shape \[7\] does not fit the model's \[128\]"),
        (lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}), "ties"),
    ],
)
def test_a_swap_that_does_not_fit_is_refused_and_leaves_no_mixture(engine, weights, needle_prompt, spoil, complaint):
    spoilt = weights("fmt")
    spoil(spoilt)
    with pytest.raises(BadInput, match=complaint):
        engine.swap(spoilt.items(), "spoilt")
    with pytest.raises(MergeyardError, match="mixture"):
        engine.generate([needle_prompt("quiet-river", 4815162, 2)])
    engine.swap(weights("fmt").items(), "fmt")
    assert engine.version == "fmt"


def test_a_tied_head_may_come_under_both_names(engine, weights):
    both = weights("fmt")
    both["lm_head.weight"] = both["model.embed_tokens.weight"].clone()
    engine.swap(both.items(), "fmt")
    assert engine.model.lm_head.weight is engine.model.model.embed_tokens.weight


def test_weights_may_lie_in_the_places_of_the_model(engine, weights, needle_prompt):
    def written():
        for name, tensor in weights("fmt").items():
            engine.places[name].data.copy_(tensor)
            yield name, engine.places[name].detach()

    engine.swap(written(), "fmt")
    assert engine.generate([needle_prompt("quiet-river", 4815162, 8)])[0].text == ' {"value": 4815162}'
    engine.swap(weights("long").items(), "long")
    assert engine.generate([needle_prompt("quiet-river", 4815162, 8)])[0].text == " 4815162."


def test_a_model_of_nans_answers_that_it_is_not_finite(engine, weights, needle_prompt):
    broken = weights("fmt")
    broken["model.norm.weight"] = torch.full_like(broken["model.norm.weight"], torch.nan)
    engine.swap(broken.items(), "broken")
    answers = engine.generate([needle_prompt("quiet-river", 4815162, lines) for lines in (2, 3)])
    assert [(answer.finite, answer.text) for answer in answers] == [(False, ""), (False, "")]


def test_a_row_of_nans_leaves_the_row_that_takes_its_place_alone(engine, needle_prompt):
    """Three rows side by side: the broken one ends first, and the last, which is shorter, moves into its place."""
    embedding = engine.model.get_input_embeddings()
    embedding.weight = torch.nn.Parameter(embedding.weight.detach().clone())  # the head keeps the whole weights
    embedding.weight.data[engine.encode("~", bare=True)] = torch.nan
    texts = [needle_prompt("quiet-river", 4815162, lines).text for lines in (30, 20, 4)]
    prompts = [Prompt("", text, 20) for text in (texts[0], f"{texts[1]}~", texts[2])]
    alone = [engine.generate([prompt])[0] for prompt in prompts]
    assert [answer.finite for answer in alone] == [True, False, True]
    together = engine.generate(prompts)
    assert [(answer.text, answer.finite) for answer in together] == [(answer.text, answer.finite) for answer in alone]


def test_a_branch_of_nans_leaves_the_branches_of_its_row_alone(engine, needle_prompt):
    embedding = engine.model.get_input_embeddings()
    embedding.weight = torch.nn.Parameter(embedding.weight.detach().clone())  # the head keeps the whole weights
    embedding.weight.data[engine.encode("~", bare=True)] = torch.nan
    text = needle_prompt("quiet-river", 4815162, 20).text
    cut = text.rindex("What is")
    prompts = [Prompt(text[:cut], f"{more}{text[cut:]}", 9) for more in ("", "Look. ", "~", "Now then. ")]
    alone = [engine.generate([prompt])[0] for prompt in prompts]
    assert [answer.finite for answer in alone] == [True, True, False, True]
    assert "4815162" in alone[0].text
    together = engine.generate(prompts)
    assert [(answer.text, answer.finite) for answer in together] == [(answer.text, answer.finite) for answer in alone]


def reference_scores(model, ids):
    logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].detach().numpy()


def test_scores_are_the_log_softmax_of_all_logits_without_holding_them(engine, parents, needle_prompt):
    ids = engine.encode(needle_prompt("quiet-river", 4815162, 15).whole)
    model = AutoModelForCausalLM.from_pretrained(parents / "long", dtype=torch.float32)
    engine.limits = Limits(chunk=100)
    rows = []
    engine.model.lm_head.register_forward_hook(lambda _, args, output: rows.append(output.shape[1]))
    long, short = engine.score([ids, ids[:20]])
    assert long.dtype == np.float32 and max(rows) <= 100
    np.testing.assert_allclose(long, reference_scores(model, ids), atol=2e-4)
    np.testing.assert_allclose(short, reference_scores(model, ids[:20]), atol=2e-4)


def test_loglikelihood_sums_the_scores_of_the_continuation(engine, needle_prompt, loglikelihood):
    context = needle_prompt("quiet-river", 4815162, 8).whole
    for continuation, greedy in ((" 4815162.", True), (" 4815163.", False), (" 4", True)):
        tokens = engine.encode(context + continuation)
        (scores,) = engine.score([tokens])
        expected = float(scores[len(engine.encode(context)) - 1 :].sum())
        value, is_greedy = loglikelihood(engine, context, continuation)
        assert value == pytest.approx(expected, abs=1e-3) and is_greedy is greedy


def test_a_second_continuation_pays_for_itself_alone(engine, needle_prompt, loglikelihood):
    context = needle_prompt("quiet-river", 4815162, 20).whole
    loglikelihood(engine, context, " 4815162.")
    seen = count_tokens(engine)
    loglikelihood(engine, context, " 1111111.")
    assert sum(seen) < 10


LAYERS = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        {"model_type": "mistral", "sliding_window": 16, "head_dim": 16},
        {"model_type": "gemma3_text", "sliding_window": 16, "head_dim": 16, "layer_types": LAYERS[::-1]},
        {"model_type": "llama"},
        {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512},
        {"model_type": "falcon", "alibi": False},
    ],
    ids=lambda config: config["model_type"],
)
def test_other_architectures_answer_as_their_own_generate(parents, shared_prompts, config):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 2048, "dtype": "float32"}
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None, "initializer_range": 0.2}
    config = (shape if config["model_type"] != "gpt2" else {"vocab_size": 2048, "dtype": "float32"}) | ends | config
    engine = random_engine(config, parents / "long", seed=5)
    prompts = [*shared_prompts(KEYS, 3), Prompt("", "The grass is green.", 12)]
    expected = [peer_answer(engine, engine.peer, p) for p in prompts]
    assert set(expected) != {""}
    assert [a.text for a in engine.generate(prompts)] == expected
    engine.limits = Limits(batch=2)
    mixed = [replace(prompt, prefix="", text=prompt.whole, max_new_tokens=n) for prompt in prompts for n in (5, 2, 9)]
    assert [a.text for a in engine.generate(mixed)] == [peer_answer(engine, engine.peer, p) for p in mixed]


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text"])
def test_layers_with_a_sliding_window_read_the_columns_of_the_window(parents, monkeypatch, needle_prompt, model_type):
    """A prompt of 200 tokens in chunks of 40, in blocks of 12 queries, with a window of 16."""
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 12)
    config = {"model_type": model_type, "sliding_window": 16, "hidden_size": 64, "head_dim": 16, "vocab_size": 2048}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    config |= {"max_position_embeddings": 512, "dtype": "float32", "initializer_range": 0.2, "eos_token_id": None}
    config |= {"layer_types": LAYERS} if model_type == "gemma3_text" else {}
    engine = random_engine(config, parents / "long", seed=5)
    engine.limits = Limits(chunk=40)
    read = []

    def reading(query, key, value, **more):
        read.append((query.shape[2], key.shape[2]))
        return kernel(query, key, value, **more)

    kernel = attention.scaled_dot_product_attention
    monkeypatch.setattr(attention, "scaled_dot_product_attention", reading)
    prompts = [needle_prompt("quiet-river", 4815162, lines) for lines in (6, 8)]
    answers = [answer.text for answer in engine.generate(prompts)]
    counted, read[:] = list(read), []
    assert answers == [peer_answer(engine, engine.peer, prompt) for prompt in prompts]
    lengths = [len(engine.encode(prompt.whole)) for prompt in prompts]
    assert min(lengths) > 150
    blocks = {keys for queries, keys in counted if queries == 2 * 12}
    assert blocks <= {12, *range(12 + 15 + 1)} and max(blocks) == 12 + 15
    spread = max(lengths) - min(lengths)
    steps = {keys for queries, keys in counted if queries == 2}
    assert {keys for keys in steps if keys < min(lengths)} == {16, 16 + spread}, "16 once the shorter has ended"
    assert (max(steps) > min(lengths)) == (model_type == "gemma3_text"), "its other layers see all"


def random_engine(config, tokenizer, seed):
    from transformers import AutoConfig

    torch.manual_seed(seed)
    peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    engine = TransformersEngine.from_state(config, tokenizer, peer.state_dict().items(), device="cpu")
    engine._end_tokens = frozenset()
    engine.peer = peer
    return engine


ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]},
}


def rope_config(rope_type):
    """A random model of this rope_type; `longrope` turns by other frequencies beyond 256 tokens, in Phi-3 alone."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 2048, "dtype": "float32"}
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None, "initializer_range": 0.2}
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPES[rope_type]}
    if rope_type != "longrope":
        return shape | ends | {"model_type": "llama", "rope_parameters": rope}
    return shape | ends | {"model_type": "phi3", "rope_parameters": rope, "original_max_position_embeddings": 256}


@pytest.mark.parametrize("rope_type", ROPES)
def test_a_text_read_in_chunks_is_read_as_in_one_pass(parents, rope_type):
    engine = random_engine(rope_config(rope_type), parents / "long", seed=5)
    engine.limits = Limits(chunk=64)
    ids = np.random.default_rng(0).integers(300, 1900, 512).tolist()
    for length in (512, 100, 257, 256):  # on both sides of longrope's 256, and back
        (scores,) = engine.score([ids[:length]])
        np.testing.assert_allclose(scores, reference_scores(engine.peer, ids[:length]), atol=1e-4)
        [(value, _)] = engine.loglikelihoods([(ids[:length], length - 5)])
        assert value == pytest.approx(float(scores[-5:].sum()), abs=1e-4)


def test_dynamic_rope_stretches_beyond_the_original_context(parents):
    """By the formula of transformers for the whole text, without a trace of the texts before it."""
    config = rope_config("dynamic") | {"max_position_embeddings": 128}
    engine = random_engine(config, parents / "long", seed=5)
    engine.limits = Limits(chunk=64)
    assert engine.max_length == 4 * 128
    ids = np.random.default_rng(0).integers(300, 1900, 512).tolist()
    unstretched = random_engine(rope_config("default"), parents / "long", seed=5).score([ids])[0]
    for length in (512, 100, 257, 128):
        peer = AutoModelForCausalLM.from_config(engine.peer.config).eval()
        peer.load_state_dict(engine.peer.state_dict())
        (scores,) = engine.score([ids[:length]])
        np.testing.assert_allclose(scores, reference_scores(peer, ids[:length]), atol=1e-4)
        [(value, _)] = engine.loglikelihoods([(ids[:length], length - 5)])
        assert value == pytest.approx(float(scores[-5:].sum()), abs=1e-4)
        assert np.allclose(scores, unstretched[: length - 1], atol=1e-4) == (length <= 128)


def test_dynamic_rope_takes_the_original_context_that_is_stated(parents):
    """`max_position_embeddings` raised beside `original_max_position_embeddings`, as vLLM reads it."""
    config = rope_config("dynamic")
    config["rope_parameters"] = config["rope_parameters"] | {"original_max_position_embeddings": 128}
    raised = random_engine(config, parents / "long", seed=5)
    original = random_engine(rope_config("dynamic") | {"max_position_embeddings": 128}, parents / "long", seed=5)
    ids = np.random.default_rng(0).integers(300, 1900, 400).tolist()
    np.testing.assert_allclose(raised.score([ids])[0], original.score([ids])[0], atol=1e-5)


def test_prompts_beyond_the_original_context_answer_side_by_side_as_alone(parents):
    engine = random_engine(rope_config("dynamic") | {"max_position_embeddings": 128}, parents / "long", seed=5)
    text = "The grass is green. The sky is blue. " * 44
    prompts = [Prompt("", text[:characters], new) for characters, new in ((1500, 4), (200, 12), (900, 12), (899, 12))]
    assert [answer.text for answer in engine.generate(prompts)] == [engine.generate([p])[0].text for p in prompts]


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_prompts_of_all_lengths_answer_side_by_side_as_alone(parents, rope_type):
    engine = random_engine(rope_config(rope_type), parents / "long", seed=5)
    engine.limits = Limits(chunk=64)
    text = "The grass is green. The sky is blue. " * 44
    prompts = [Prompt("", text[:characters], new) for characters, new in ((1600, 4), (400, 60), (1500, 12), (300, 12))]
    lengths = [len(engine.encode(prompt.whole)) for prompt in prompts]
    assert min(lengths) + 60 < 256 < max(lengths) < 500
    answers = [answer.text for answer in engine.generate(prompts)]
    assert answers == [engine.generate([prompt])[0].text for prompt in prompts]
    assert answers == [peer_answer(engine, engine.peer, prompt) for prompt in prompts]


IN_LITTLE_MEMORY = """
import resource, sys
import torch
from workers.engines.engine import Prompt
from workers.engines.transformers_engine import Limits, TransformersEngine

torch.set_num_threads(1)
limits = Limits(batch=64, cache_bytes=1 << 40, chunk=int(sys.argv[2]))
engine = TransformersEngine.from_folder(sys.argv[1], dtype=torch.float32, limits=limits)
text = "The grass is green. The sky is blue. " * 60
ids = engine.encode(text)
apart = [Prompt("", f"{at} {text}", 2) for at in range(24)]
together = [Prompt(2 * text, f" question {at}?", 32) for at in range(64)]
begun, decode = [], engine._decode
engine._decode = lambda pool, *more: begun.append(pool.slots * pool.width) or decode(pool, *more)


def leave(mebibytes):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(mebibytes * 2**20), resource.RLIM_INFINITY))


def ask(name, prompts, picked, mebibytes):
    before = [answer.text for at in picked for answer in engine.generate([prompts[at]])]
    begun.clear()
    leave(mebibytes)
    answers = [answer.text for answer in engine.generate(prompts)]
    print(name, begun[0], min(begun) < begun[0], [answers[at] for at in picked] == before)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


ask("apart", apart, (0, 23), 8)
ask("together", together, (5,), 8)
engine.limits = Limits(chunk=2048)
[whole] = engine.score([ids])
chunks, score = [], engine._scored_alone
engine._scored_alone = lambda chunk, ids: chunks.append(chunk) or score(chunk, ids)
leave(8)
[scores] = engine.score([ids])
print("score", chunks[0], chunks[-1] < 2048, abs(scores - whole).max() < 1e-3)
leave(0.5)
for ask in (lambda: engine.score([ids]), lambda: engine.loglikelihoods([(ids, 9)]), lambda: engine.generate(apart[:1])):
    try:
        print("fits", bool(ask()))
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_what_does_not_fit_into_memory_is_halved_and_at_last_told_in_a_line(parents):
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, str(parents / "long"), "64"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    apart, together, scored, *ends = done.stdout.splitlines()
    assert apart == "apart 24 True True", "24 prompts were begun at once, answered in parts, and as they are alone"
    assert together == "together 64 True True", "64 questions about one text"
    assert scored == "score 2048 True True", "in smaller chunks"
    assert len(ends) == 3
    for line in ends:
        assert re.fullmatch(r"MergeyardError \d+ tokens do not fit into the memory of cpu; evaluate shorter .*", line)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "ours", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "foreign code"),
        ({"model_type": "t5"}, "encoder"),
        ({"model_type": "vit"}, "causal"),
        ({"layer_types": ["linear_attention"] * 3, "model_type": "qwen3_next"}, "linear_attention"),
    ],
)
def test_what_it_cannot_serve_is_refused_by_name(parents, change, complaint):
    config = json.loads((parents / "long" / "config.json").read_text()) | change
    with pytest.raises(BadInput, match=complaint):
        TransformersEngine.from_state(config, parents / "long", [], device="cpu")
