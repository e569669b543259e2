"""The transformers engine on a GPU that is not there: the answers of a CPU, and batches that the card decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jobs.evaluation_tasks import EvaluationTask, ItemSet, ModelSpec
from jobs.merge_tasks import ParentTensor, TensorMerge
from workers.engines.opening import open_engine
from workers.engines.transformers_engine import Limits, TransformersEngine
from workers.gpu_memory import OUTSIDE_BYTES, part_of, take_part

TASK = EvaluationTask("0", "p", "digest", (), ItemSet("needle", "needle", 512, 1, "", (), 512), 0, 1, 0, "scores/p")
KEYS = {"quiet-river": 4815162, "brave-garden": 1234567}


def opened(parents: Path, weights: Any, device: str, **more: Any) -> TransformersEngine:
    config = json.loads((parents / "long" / "config.json").read_text())
    tensors = [(name, tensor.float()) for name, tensor in weights("long").items()]
    return TransformersEngine.from_state(
        config, parents / "long", tensors, device=device, dtype=torch.float32, limits=Limits(chunk=100, **more)
    )


def test_answers_and_likelihoods_are_those_of_a_cpu(
    parents: Path, weights: Any, card: Any, needle_prompt: Any, shared_prompts: Any
) -> None:
    """Nothing of the host meets anything of the card, and nothing is read before it is computed."""
    on_cpu, on_card = opened(parents, weights, "cpu"), opened(parents, weights, "card")
    assert {place.device.type for place in on_card.places.values()} == {"card"}
    prompts = [
        *(needle_prompt(key, value, 4 + value % 9, max_new_tokens=5) for key, value in KEYS.items()),
        *shared_prompts(KEYS, 6, max_new_tokens=4),
    ]
    assert [answer.text for answer in on_card.generate(prompts)] == [answer.text for answer in on_cpu.generate(prompts)]
    ids = on_cpu.encode(prompts[0].whole)
    [expected], [found] = (engine.score([ids[:250]]) for engine in (on_cpu, on_card))
    assert abs(expected - found).max() < 1e-4
    texts = [(ids[:150], 120), (ids[:170], 120)]
    for (expected, greedy), (found, also) in zip(
        on_cpu.loglikelihoods(texts), on_card.loglikelihoods(texts), strict=True
    ):
        assert found == pytest.approx(expected, abs=1e-3) and greedy == also


def test_sliding_windows_answer_as_on_a_cpu(parents: Path, card: Any, needle_prompt: Any) -> None:
    config: dict[str, Any] = {"model_type": "gemma3_text", "sliding_window": 16, "hidden_size": 32, "head_dim": 8}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    config |= {"layer_types": ["sliding_attention"] * 2, "vocab_size": 2048, "dtype": "float32"}
    config |= {"max_position_embeddings": 512, "initializer_range": 0.2}
    torch.manual_seed(5)
    state = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).state_dict()
    prompts = [needle_prompt("quiet-river", 4815162, lines, max_new_tokens=4) for lines in (3, 4)]

    def answers(device: str) -> list[str]:
        limits = Limits(chunk=50)
        engine = TransformersEngine.from_state(
            config, parents / "long", state.items(), device=device, dtype=torch.float32, limits=limits
        )
        return [answer.text for answer in engine.generate(prompts)]

    assert answers("card") == answers("cpu")


def test_a_step_waits_for_the_card_a_fixed_number_of_times(
    parents: Path, weights: Any, card: Any, needle_prompt: Any
) -> None:
    """For the token and for whether it is finite; a prefill waits for nothing."""
    engine = opened(parents, weights, "card")
    waits: list[int] = []
    for new in (2, 6):
        card.count_from_here()
        engine.generate([needle_prompt("quiet-river", 4815162, 4, max_new_tokens=new)])
        waits.append(sum(card.waits[name] for name in card.waits if name != "copy to the card"))
    assert waits[1] - waits[0] <= 4 * 2


def test_batches_follow_from_the_card_and_not_from_what_is_free(parents: Path, weights: Any, card: Any) -> None:
    card.total = OUTSIDE_BYTES + (64 << 20)
    engine = opened(parents, weights, "card")
    own = sum(place.nbytes for place in engine.model.parameters())
    assert engine._cache_bytes() == (part_of("card") - own) // 2 == ((64 << 20) - own) // 2
    held = torch.zeros(1 << 20, device="card")
    assert opened(parents, weights, "card")._cache_bytes() == engine._cache_bytes()
    del held
    take_part("card", 0.99)
    assert opened(parents, weights, "card")._cache_bytes() < engine._cache_bytes()


def test_what_does_not_fit_on_a_card_is_halved(
    parents: Path, weights: Any, card: Any, needle_prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine was promised more than there is: it frees its caches, then decodes fewer prompts at once."""
    prompts = [needle_prompt("quiet-river", 4815162 + at, 4, max_new_tokens=3) for at in range(8)]
    expected = [answer.text for answer in opened(parents, weights, "cpu").generate(prompts)]
    card.lags = False
    engine = opened(parents, weights, "card", cache_bytes=1 << 40)
    card.total = card.live + (3 << 20)
    card.count_from_here()
    assert [answer.text for answer in engine.generate(prompts)] == expected
    assert card.launches["empty_cache"] > 0


GIB = 1 << 30


def model(parents: Path, engine: str, **options: Any) -> ModelSpec:
    """A model of one tensor: a point of 4 GiB, of two parents as large."""
    sources = {name: ParentTensor(0, "BF16", 0, 4 * GIB) for name in ("a", "b")}
    tensor = TensorMerge("wide", "BF16", (2 * GIB,), sources, 0, "F32")
    config = json.loads((parents / "long" / "config.json").read_text())
    return ModelSpec("run", (tensor,), {}, 0, "float32", config, ("", {}), engine, None, options, 512, 1)


@pytest.mark.parametrize(
    ("options", "found"), [({}, 0.32), ({"gpu_memory_utilization": 0.2}, 0.2)], ids=["reckoned", "as the job says"]
)
def test_vllm_is_given_what_parents_and_point_leave(
    parents: Path, card: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, found: float
) -> None:
    """Half of a card of 80 GiB, less 12 GiB of parents and point, and a GiB for each of the two processes: 26 of 80."""
    asked: dict[str, Any] = {}

    class Vllm:
        def __init__(self, folder: Path, **more: Any) -> None:
            asked.update(more["options"])

        def swap(self, weights: Any, version: str) -> None: ...

    monkeypatch.setattr("workers.engines.vllm_engine.VllmEngine", Vllm)
    take_part("card", 0.5)
    spec = model(parents, "vllm", **options)
    assert spec.bytes == 12 * GIB
    open_engine(spec, tmp_path, iter(()), TASK, "card")
    assert asked["gpu_memory_utilization"] == found


def test_keys_and_values_have_half_of_what_parents_and_point_leave(
    parents: Path, card: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[Limits] = []
    monkeypatch.setattr(TransformersEngine, "from_state", lambda *_, **more: limits.append(more["limits"]))
    open_engine(model(parents, "transformers"), parents / "long", iter(()), TASK, "card")
    open_engine(model(parents, "transformers", cache_bytes=5), parents / "long", iter(()), TASK, "card")
    assert [each.cache_bytes for each in limits] == [(79 - 12) * GIB // 2, 5]
