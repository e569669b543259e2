"""The vLLM engine against a real vLLM on the CPU, in the environment `.venv-vllm` at the repository's root.

vLLM pins its own torch; without that environment these tests are skipped. The protocol between the two processes is
tested without vLLM.
"""

import inspect
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch.multiprocessing import reductions

from jobs.errors import BadInput, MergeyardError, WorkerLost
from workers.engines import vllm_engine, vllm_server
from workers.engines.engine import Prompt, Sampling, Thought
from workers.engines.tokenizer import load_tokenizer
from workers.engines.vllm_engine import VllmEngine

pytestmark = pytest.mark.timeout(1800)  # vLLM imports for a minute and more where others work as well
ENVIRONMENT = Path(__file__).parents[3] / ".venv-vllm" / "bin"
needs_vllm = pytest.mark.skipif(
    not (ENVIRONMENT / "python").exists(), reason="vLLM's environment .venv-vllm is not there; `make vllm` installs it"
)


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(6.0).reshape(2, 3), torch.tensor([1.5, -2], dtype=torch.bfloat16), torch.ones(()), torch.ones(0, 3)],
    ids=["matrix", "bfloat16", "scalar", "empty"],
)
def test_a_tensor_arrives_as_it_was_sent(tensor):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(vllm_server.NEXT)
        received = vllm_server._received(theirs, torch.device("cpu"))
        descriptor = vllm_engine._in_memory(tensor)
        message = {"name": "w", "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        vllm_server.send_message(ours, message, descriptor)
        name, copy = next(received)
        assert name == "w" and copy.dtype == tensor.dtype and torch.equal(copy, tensor)


class Handles:
    """Stands in for CUDA's handles of memory between processes: the numbers of the parts that torch sends."""

    def __init__(self):
        self.tensors = []

    def reduce(self, tensor):
        self.tensors.append(tensor)
        own = str(len(self.tensors) - 1).encode()
        storage = tensor.untyped_storage().nbytes(), 512
        place = tensor.size(), tensor.stride(), tensor.storage_offset()
        return None, (
            type(tensor),
            *place,
            None,
            tensor.dtype,
            0,
            own,
            *storage,
            False,
            b"c" + own,
            3,
            b"e" + own,
            True,
        )

    def rebuild(self, cls, size, stride, offset, storage, dtype, device, handle, whole, begin, grad, *rest):
        tensor = self.tensors[int(handle)]
        assert (size, stride, offset, dtype, whole, begin) == (
            tensor.size(),
            tensor.stride(),
            tensor.storage_offset(),
            tensor.dtype,
            tensor.untyped_storage().nbytes(),
            512,
        )
        assert (device, grad, rest) == (0, False, (b"c" + handle, 3, b"e" + handle, True))
        return tensor


@pytest.fixture
def handed_over(card, monkeypatch):
    """handed_over(weights, device): what two workers, of this device and of a CPU, receive of the weights."""
    handles = Handles()
    monkeypatch.setattr(reductions, "reduce_tensor", handles.reduce)
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", handles.rebuild)
    collected = []
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: collected.append(True))

    def handed_over(weights, device):
        card.count_from_here()
        pairs = [socket.socketpair() for _ in range(2)]
        for channel in (channel for pair in pairs for channel in pair):
            channel.settimeout(20)
        received = [dict[str, torch.Tensor]() for _ in pairs]

        def receive(theirs, into, device):
            with theirs:
                into.update(vllm_server._received(theirs, device))

        with ThreadPoolExecutor() as pool:
            ends = [
                pool.submit(receive, theirs, into, asked)
                for (_, theirs), into, asked in zip(pairs, received, (device, torch.device("cpu")), strict=True)
            ]
            vllm_engine._hand_over([ours for ours, _ in pairs], weights)
            [end.result() for end in ends]
        for ours, _ in pairs:
            ours.close()
        return *received, bool(collected)

    return handed_over


def test_weights_on_a_gpu_stay_there_for_a_worker_on_the_same_one(card, handed_over):
    """Not on a GPU: torch's own handles need one. The worker on a CPU gets copies of the same tensors."""
    flat = torch.arange(12.0).to("card")
    weights = [("a", flat[:6].view(2, 3)), ("b", flat[8:]), ("empty", flat[:0])]
    on_card, on_cpu, collected = handed_over(weights, torch.device("card", 0))
    assert on_card["a"].device.type == "card" and on_card["a"].data_ptr() == flat.data_ptr() and collected
    assert on_card["b"].data_ptr() == flat.data_ptr() + 32 and on_card["b"].tolist() == [8, 9, 10, 11]
    assert on_card["empty"].shape == (0,)
    assert on_cpu["a"].device.type == "cpu" and on_cpu["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert card.bytes["from the card"] == 4 + 4 * (6 + 4) + 16, "the probe, the copies for the CPU, and b above"


@pytest.mark.parametrize("fails", ["another GPU", "CUDA exports no memory", "CUDA opens no memory"])
def test_weights_that_a_worker_cannot_open_come_through_the_host(card, handed_over, monkeypatch, fails):
    def refuse(*_):
        raise RuntimeError("CUDA error: operation not supported")

    if fails == "another GPU":
        monkeypatch.setattr(vllm_server, "gpu_of", lambda device: "card-1")
    else:
        name = "reduce_tensor" if fails == "CUDA exports no memory" else "rebuild_cuda_tensor"
        monkeypatch.setattr(reductions, name, refuse)
    tensor = torch.arange(4.0).to("card")
    for received in handed_over([("a", tensor), ("b", tensor)], torch.device("card", 0))[:2]:
        assert [(each.device.type, each.tolist()) for each in received.values()] == [("cpu", [0, 1, 2, 3])] * 2


def test_torch_names_the_parts_of_a_handle_as_they_are_sent():
    """The engine unpacks them by their places, and the worker puts them back."""
    names = "tensor_cls tensor_size tensor_stride tensor_offset storage_cls dtype storage_device storage_handle"
    names += " storage_size_bytes storage_offset_bytes requires_grad ref_counter_handle ref_counter_offset"
    assert [*inspect.signature(reductions.rebuild_cuda_tensor).parameters] == [
        *names.split(),
        "event_handle",
        "event_sync_required",
    ]


def test_a_message_survives_its_size():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        vllm_server.send_message(ours, {"ids": list(range(5000))})
        assert vllm_server.receive_message(theirs)[0] == {"ids": list(range(5000))}
        ours.close()
        with pytest.raises(EOFError):
            vllm_server.receive_message(theirs)


def test_an_interpreter_that_is_not_there_is_refused(parents, monkeypatch):
    monkeypatch.delenv("MERGEYARD_VLLM_PYTHON", raising=False)
    with pytest.raises(BadInput, match="MERGEYARD_VLLM_PYTHON"):
        VllmEngine(parents / "long")


def test_an_environment_without_vllm_says_what_is_missing(parents):
    with pytest.raises(MergeyardError, match="vllm"):
        VllmEngine(parents / "long", python="/usr/bin/python3")


class StandIn(VllmEngine):
    """The engine without its server: `generate` says a text, cut by the settings as vLLM cuts it."""

    def __init__(self, folder, text):
        self.tokenizer, self._version, self._max_length = load_tokenizer(folder), "stand-in", 4096
        self.told, self.asked = self.encode(text, bare=True), []

    def _call(self, name, *, prompts, settings):
        self.asked += zip(prompts, settings, strict=True)
        return [self._reply_to(ids[len(self.encode("?")) :], setting) for ids, setting in self.asked[-len(prompts) :]]

    def _reply_to(self, said, setting):
        for length in range(1, setting["max_tokens"] + 1):
            tokens = self.told[len(said) :][:length]
            text = self.tokenizer.decode(tokens, skip_special_tokens=setting.get("skip_special_tokens", True))
            if any(stop in text for stop in setting.get("stop", ())):
                return {"tokens": tokens, "ended": False, "cut": False, "finite": True}
            if len(tokens) < length:
                return {"tokens": [*tokens, 0], "ended": True, "cut": False, "finite": True}
        return {"tokens": tokens, "ended": False, "cut": True, "finite": True}


THINKING = Thought("</think>", 60, opened=True)


def test_a_thought_has_its_own_limit_and_no_stop(parents):
    engine = StandIn(parents / "long", "Is it 111. No.</think> 222. So it is.")
    asked = Prompt("", "?", 20, (".",), thinking=THINKING, sampling=Sampling(0.6, 0.95, 20, seed=5))
    [answer] = engine.generate([asked])
    assert (answer.thought, answer.text, answer.status) == ("Is it 111. No.", " 222", "answered")
    assert answer.tokens_thought == len(engine.encode("Is it 111. No.</think>", bare=True)) < answer.tokens_out
    (_, thought), (ids, after) = engine.asked
    sampling = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert thought == {**sampling, "max_tokens": 60, "stop": ["</think>"], "skip_special_tokens": False, "seed": 5}
    assert after.pop("seed") != 5 and after == {**sampling, "max_tokens": 20, "stop": ["."]}
    assert ids == engine.encode("?") + engine.told[: answer.tokens_thought]


@pytest.mark.parametrize(
    ("text", "budget", "new", "status", "said"),
    [
        ("111. 222.", 60, 20, "unended", ""),
        ("111. " * 60 + "</think>222", 60, 20, "unended", ""),
        ("111</think>", 60, 20, "empty", ""),
        ("111</think>2222222222", 60, 2, "cut", None),
        ("111</think>222", 60, 20, "answered", "222"),
    ],
)
def test_a_thought_ends_as_in_the_other_engines(parents, text, budget, new, status, said):
    engine = StandIn(parents / "long", text)
    [answer, plain] = engine.generate(
        [Prompt("", "?", new, thinking=replace(THINKING, budget=budget)), Prompt("", "?", 9)]
    )
    assert answer.status == status and (said is None or answer.text == said)
    assert (status == "unended") == (answer.tokens_thought == answer.tokens_out) or status == "empty"
    assert plain.thought == "" and plain.tokens_thought == 0 and text.startswith(plain.text)


def test_greedy_and_a_top_k_of_all_are_asked_for_in_vllms_words(parents):
    engine = StandIn(parents / "long", "222")
    engine.generate([Prompt("", "?", 3), Prompt("", "?", 3, sampling=Sampling(1.0, 1.0, 0, seed=1))])
    (_, greedy), (_, sampled) = engine.asked
    assert greedy == {"temperature": 0.0, "max_tokens": 3}
    assert sampled == {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "seed": 1, "max_tokens": 3}


@pytest.fixture(scope="module")
def vllm(parents):
    options = {"enforce_eager": True, "seed": 0}
    engine = VllmEngine(
        parents / "long", python=ENVIRONMENT / "python", version="long", max_length=2048, cache_gib=1, options=options
    )
    yield engine
    engine.close()


@needs_vllm
@pytest.mark.heavy
def test_answers_find_the_needle_and_equal_the_transformers_engine(vllm, engine, needle_prompt):
    prompts = [needle_prompt("quiet-river", 4815162 + lines, lines) for lines in (4, 11, 25)]
    answers = vllm.generate(prompts)
    assert [answer.text for answer in answers] == [answer.text for answer in engine.generate(prompts)]
    assert [answer.text for answer in answers] == [" 4815166.", " 4815173.", " 4815187."]
    assert [answer.tokens_out for answer in answers] == [answer.tokens_out for answer in engine.generate(prompts)]
    assert all(answer.finite for answer in answers)


@needs_vllm
@pytest.mark.heavy
def test_an_answer_ends_before_its_stop(vllm, needle_prompt):
    prompt = needle_prompt("quiet-river", 4815162, 4)
    free, stopped = vllm.generate([prompt, replace(prompt, stops=("?", "516"))])
    assert (free.text, stopped.text) == (" 4815162.", " 481")


@needs_vllm
@pytest.mark.heavy
def test_a_text_of_the_answer_ends_a_thought_as_in_the_transformers_engine(vllm, engine, needle_prompt):
    """ " 4815162.", of which all up to "15" is the thought."""
    thinking = Thought("15", 12, opened=True)
    prompt = replace(needle_prompt("quiet-river", 4815162, 4), thinking=thinking, stops=("8", "."))
    asked = [prompt, replace(prompt, max_new_tokens=1), replace(prompt, thinking=replace(thinking, budget=2))]
    found = [(a.text, a.thought, a.status, a.tokens_out, a.tokens_thought) for a in vllm.generate(asked)]
    assert found == [(a.text, a.thought, a.status, a.tokens_out, a.tokens_thought) for a in engine.generate(asked)]
    assert found[0][:3] == ("162", "48", "answered") and found[2][:3] == ("", found[2][1], "unended")


@needs_vllm
@pytest.mark.heavy
def test_a_seed_samples_the_same_again_and_the_likeliest_alone_is_greedy(vllm, needle_prompt):
    prompt = needle_prompt("quiet-river", 4815162, 4)
    samples = [Prompt("", "Once", 12, sampling=Sampling(2.0, 0.99, 0, seed)) for seed in range(4)]
    texts = [answer.text for answer in vllm.generate(samples)]
    assert len(set(texts)) > 1 and [vllm.generate([sample])[0].text for sample in samples] == texts
    assert vllm.generate([replace(prompt, sampling=Sampling(2.0, 1.0, 1, 0))])[0].text == " 4815162."


@needs_vllm
@pytest.mark.heavy
def test_scores_are_near_those_of_the_transformers_engine(vllm, engine, needle_prompt, loglikelihood):
    prompt = needle_prompt("quiet-river", 4815162, 6)
    ids = engine.encode(prompt.whole)
    difference = np.abs(vllm.score([ids])[0] - engine.score([ids])[0])
    assert difference.mean() < 0.05  # bf16 against float32
    assert loglikelihood(vllm, prompt.whole, " 4815162.")[1] is True
    assert loglikelihood(vllm, prompt.whole, " 4815163.")[1] is False


@needs_vllm
@pytest.mark.heavy
def test_a_swap_answers_with_the_new_weights_where_the_prefix_cache_alone_would_not(vllm, weights, needle_prompt):
    prompt = needle_prompt("quiet-river", 4815162, 12)
    vllm.swap(weights("long").items(), "long")
    assert vllm.generate([prompt])[0].text == " 4815162."
    vllm._stream(weights("fmt").items(), "fmt")
    mixture = vllm.generate([prompt])[0].text
    assert mixture != ' {"value": 4815162}', "the trap is gone: vLLM forgets its prefixes by itself"
    vllm.swap(weights("fmt").items(), "fmt")
    assert vllm.generate([prompt])[0].text == ' {"value": 4815162}'
    assert vllm.version == "fmt"


@needs_vllm
@pytest.mark.heavy
def test_a_swap_replaces_a_head_that_is_tied_to_the_embeddings(vllm, engine, weights, needle_prompt):
    ids = engine.encode(needle_prompt("quiet-river", 4815162, 6).whole)
    turned = weights("long")
    turned["model.embed_tokens.weight"] = turned["model.embed_tokens.weight"].flip(0)
    vllm.swap(turned.items(), "turned")
    engine.swap(turned.items(), "turned")
    difference = np.abs(vllm.score([ids])[0] - engine.score([ids])[0])
    assert difference.mean() < 0.1  # bf16 against float32; the head of before is off by 10


@needs_vllm
@pytest.mark.heavy
def test_a_swap_that_does_not_fit_is_refused_and_leaves_no_mixture(vllm, weights, needle_prompt):
    for spoil, complaint in (
        (lambda w: w.pop("model.norm.weight"), "1 weights never came, the first is model.norm.weight"),
        (lambda w: w.update({"other": torch.ones(1)}), "other: the model has no such weight"),
        (lambda w: w.update({"model.norm.weight": torch.ones(7)}), r"shape \[7\]"),
    ):
        spoilt = weights("fmt")
        spoil(spoilt)
        with pytest.raises(BadInput, match=complaint):
            vllm.swap(spoilt.items(), "spoilt")
        with pytest.raises(MergeyardError, match="mixture"):
            vllm.generate([needle_prompt("quiet-river", 4815162, 2)])
    vllm.swap(weights("fmt").items(), "fmt")
    assert vllm.generate([needle_prompt("quiet-river", 4815162, 12)])[0].text == ' {"value": 4815162}'


@needs_vllm
@pytest.mark.heavy
def test_a_model_of_nans_answers_that_it_is_not_finite(vllm, weights, needle_prompt):
    broken = weights("fmt")
    broken["model.norm.weight"] = torch.full_like(broken["model.norm.weight"], torch.nan)
    vllm.swap(broken.items(), "broken")
    assert vllm.generate([needle_prompt("quiet-river", 4815162, 2)])[0].finite is False
    vllm.swap(weights("long").items(), "long")


@needs_vllm
@pytest.mark.heavy
def test_a_prompt_that_does_not_fit_is_refused_with_its_numbers(vllm):
    with pytest.raises(BadInput, match="2048"):
        vllm.generate([Prompt("", "The grass is green. " * 600, 12)])


def living_members(group):
    """Processes of a group that still run; a zombie does not."""
    found = []
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group:
                found.append(process.pid)
    return found


@needs_vllm
@pytest.mark.heavy
def test_a_killed_vllm_is_a_lost_worker(parents):
    engine = VllmEngine(parents / "long", python=ENVIRONMENT / "python", max_length=512, cache_gib=1)
    engine._process.kill()
    with pytest.raises(WorkerLost, match="open the engine again"):
        engine.generate([Prompt("", "The grass is green.", 2)])
    engine.close()
    deadline = time.monotonic() + 20  # the kernel takes a moment to bury what was killed
    while living_members(engine._process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert living_members(engine._process.pid) == []
