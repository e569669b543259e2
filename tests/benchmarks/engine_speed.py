"""Times the transformers engine against lm-evaluation-harness' HFLM: same model, same prompts, same process.

    python -m tests.benchmarks.engine_speed [--items 64] [--questions 1] [--length 1024] [--dtype float32] [--rounds 3]
    python -m tests.benchmarks.engine_speed --prefill 32768
    python -m tests.benchmarks.engine_speed --decode 2048 [--without-generate-batch]

The first form answers plain RULER niah_single_1 with the parent `long`, blocks of the two in turn, HFLM at batch 8;
with `--questions 8` eight questions share a haystack (`long` learned one needle a haystack and finds none of eight:
the answers must be equal all the same). It reports items a second by the clock and by CPU time (the fairer on a busy
machine), whether the answers are equal, and the rate that the machine's matrix product alone would allow for the
arithmetic of answering each item by itself. The second form prefills one long prompt of a random Qwen2 (2 layers of
256, vocabulary 32,768, bf16) in a process of its own for each engine and reports the most memory each took.

The third form answers 32 prompts of a sixteenth to one and a half times as many tokens as `--decode` says, each with at
most that many new tokens, and reports new tokens a second of the transformers engine and of HFLM with 8 and 32 prompts
side by side, and of transformers' own continuous batching, `generate_batch`. The model is a random Qwen2 (4 layers of
256, float32) that does not repeat itself, and its answers end anywhere, at an end token or at the limit. Beside them
stands the rate of the model's matrix products alone for 32 rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PARENT = Path(__file__).parents[2] / "jobs" / "examples" / "parents" / "long"
BATCH = 8


def main() -> None:
    """Measure and print one line a figure, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill", type=int, metavar="TOKENS")
    parser.add_argument("--decode", type=int, metavar="TOKENS")
    parser.add_argument("--without-generate-batch", action="store_true", help="it takes longest on a CPU")
    parser.add_argument("--alone", choices=("ours", "hflm", "neither"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if asked.alone:
        print(json.dumps(prefill_alone(asked.alone, asked.prefill)))
    elif asked.prefill:
        for engine in ("neither", "ours", "hflm"):
            command = [sys.executable, "-m", "tests.benchmarks.engine_speed", "--prefill", str(asked.prefill)]
            found = subprocess.run([*command, "--alone", engine], check=True, capture_output=True, text=True)
            print(f"{engine:8} {found.stdout.strip().splitlines()[-1]}")
    elif asked.decode:
        decode(asked.decode, paged=not asked.without_generate_batch)
    else:
        for name, figure in compare(asked).items():
            print(f"{name:36} {figure}")


def compare(asked: argparse.Namespace) -> dict[str, Any]:
    """Figures of both engines on the same items."""
    import torch

    from workers.benchmarks.ruler.tasks import ruler_items
    from workers.benchmarks.texts.tokenizer import Tokenizer
    from workers.engines.engine import Prompt
    from workers.engines.transformers_engine import TransformersEngine
    from workers.half_products import LinearInFloat32

    dtype = getattr(torch, asked.dtype)
    items = ruler_items(
        Tokenizer.from_folder(PARENT), "niah_single_1", asked.length, indices=range(asked.items), seed=1,
        questions=asked.questions,
    )  # fmt: skip
    engine = TransformersEngine.from_folder(PARENT, dtype=dtype, device="cpu")
    prompts = [Prompt(item.prefix, item.prompt + item.answer_prefix, item.max_new_tokens) for item in items]
    peer, requests = hflm(engine, [prompt.whole for prompt in prompts], items[0].max_new_tokens)
    ours: Callable[[], list[str]] = lambda: [answer.text for answer in engine.generate(prompts)]  # noqa: E731
    theirs: Callable[[], list[str]] = lambda: peer.generate_until(requests, disable_tqdm=True)  # noqa: E731
    answers, peer_answers = ours(), theirs()  # also warms both up
    clocks = {name: [] for name in ("ours", "hflm")}
    for _ in range(asked.rounds):
        for name, answer in (("hflm", theirs), ("ours", ours)):
            wall, cpu = time.perf_counter(), time.process_time()
            answer()
            clocks[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    wall = {name: len(items) / statistics.median(one[0] for one in runs) for name, runs in clocks.items()}
    cpu = {name: len(items) / statistics.median(one[1] for one in runs) for name, runs in clocks.items()}
    in_float32 = any(isinstance(module, LinearInFloat32) for module in engine.model.modules())
    rate = gemm_rate(torch.float32 if in_float32 else dtype)
    tokens = statistics.mean(len(engine.encode(prompt.whole)) for prompt in prompts)
    limit = rate / item_flop(engine.config, tokens)
    correct = [all(value in text for value in item.answers) for item, text in zip(items, answers, strict=True)]
    return {
        "items, tokens each, threads": f"{len(items)}, {tokens:.0f}, {torch.get_num_threads()}",
        "items a second, clock: ours": f"{wall['ours']:.1f}",
        "items a second, clock: HFLM": f"{wall['hflm']:.1f}",
        "items a CPU second: ours": f"{cpu['ours']:.1f}",
        "items a CPU second: HFLM": f"{cpu['hflm']:.1f}",
        "ratio, clock and CPU": f"{wall['ours'] / wall['hflm']:.2f}, {cpu['ours'] / cpu['hflm']:.2f}",
        "answers equal": f"{sum(map(str.__eq__, answers, peer_answers))} of {len(items)}",
        "answers correct": f"{sum(correct)} of {len(items)}",
        "matrix product, GFLOP/s": f"{rate / 1e9:.0f}",
        "its limit, items a second": f"{limit:.0f}: ours {cpu['ours'] / limit:.0%}, HFLM {cpu['hflm'] / limit:.0%}",
    }


def hflm(engine: Any, texts: Sequence[str], max_new_tokens: int) -> tuple[Any, list[Any]]:
    """lm-eval's engine around a model of its own with the same weights, and its requests."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(PARENT, dtype=engine.model.dtype)
    tokenizer = AutoTokenizer.from_pretrained(PARENT)
    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, max_length=engine.max_length)  # type: ignore[arg-type]
    settings = {"until": [], "max_gen_toks": max_new_tokens, "do_sample": False, "temperature": 0.0}
    return peer, [Instance("generate_until", {}, (text, settings), index) for index, text in enumerate(texts)]


def decode(new_tokens: int, *, paged: bool) -> None:
    """Print a line for each way to decode: new tokens a CPU second and a second, and how many answers are ours."""
    import numpy as np
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig

    from workers.engines.engine import Prompt
    from workers.engines.transformers_engine import Limits, TransformersEngine

    longest = 3 * new_tokens
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 2, "vocab_size": 2048, "max_position_embeddings": longest}
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None, "initializer_range": 0.2}
    config = {"model_type": "qwen2", "tie_word_embeddings": True, "dtype": "float32", **shape, **ends}
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    random = np.random.default_rng(0)
    # if all tokens were equally likely, half of the answers would end before the limit
    ends_at = random.choice(2048, max(1, round(2048 * 0.7 / new_tokens)), replace=False).tolist()
    model.generation_config.update(eos_token_id=ends_at, pad_token_id=ends_at[0], max_new_tokens=new_tokens)
    tokenizer = AutoTokenizer.from_pretrained(PARENT)
    words = ["grass", "green", "sky", "blue", "sun", "yellow", "text", "special", "magic", "number"]
    sizes = random.integers(new_tokens // 16, 3 * new_tokens // 2, 32)
    texts = [" ".join(random.choice(words, size)) for size in sizes]
    texts = [tokenizer.decode(tokenizer(text)["input_ids"][:size]) for text, size in zip(texts, sizes, strict=True)]
    engine = TransformersEngine.from_state(
        config, tokenizer, model.state_dict().items(), device="cpu", end_tokens=ends_at
    )
    counted: list[int] = []

    def ours(batch: int) -> list[str]:
        engine.limits = Limits(batch=batch)
        answers = engine.generate([Prompt("", text, new_tokens) for text in texts])
        counted[:] = [answer.tokens_out for answer in answers]
        return [answer.text for answer in answers]

    def theirs(batch: int) -> list[str]:
        peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=longest)  # type: ignore[arg-type]
        settings = {"until": [], "max_gen_toks": new_tokens, "do_sample": False, "temperature": 0.0}
        requests = [Instance("generate_until", {}, (text, settings), index) for index, text in enumerate(texts)]
        return peer.generate_until(requests, disable_tqdm=True)

    def generate_batch(batch: int) -> list[str]:
        blocks = -(-batch * (longest + 256) // 256)
        settings = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=2048, max_requests_per_batch=batch)
        ids = [engine.encode(text) for text in texts]
        outputs = model.generate_batch(ids, continuous_batching_config=settings, warmup=False)
        found = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
        return [tokenizer.decode(found[tuple(prompt)], skip_special_tokens=True) for prompt in ids]

    ways = [("mergeyard", ours, 32), ("mergeyard", ours, 8), ("HFLM", theirs, 32), ("HFLM", theirs, 8)]
    answers = ours(32)  # also warms up
    prompts = [len(engine.encode(text)) for text in texts]
    print(
        f"32 prompts of {min(prompts)} to {max(prompts)} tokens; {sum(counted)} new ones, {min(counted)} to"
        f" {max(counted)} an answer, {counted.count(new_tokens)} answers at the limit",
        flush=True,
    )
    for name, way, batch in [*ways, *([("generate_batch", generate_batch, 32)] if paged else [])]:
        wall, cpu = time.perf_counter(), time.process_time()
        found = way(batch)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        equal = sum(theirs.startswith(ours) for theirs, ours in zip(found, answers, strict=True))
        print(
            f"{name:16} batch {batch:2}: {sum(counted) / cpu:6.0f} new tokens a CPU second, "
            f"{sum(counted) / wall:6.0f} a second, {equal} of 32 answers equal"
        )
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    inputs = [torch.randn(32, layer.in_features) for layer in layers]
    started = time.process_time()
    with torch.inference_mode():
        for _ in range(20):
            for layer, rows in zip(layers, inputs, strict=True):
                layer(rows)
    print(f"matrix products alone, 32 rows: {20 * 32 / (time.process_time() - started):.0f} a CPU second")


def gemm_rate(dtype: Any) -> float:
    """FLOP a CPU second of a 1,024-cubed product: best of 5."""
    import torch

    left, right = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    left @ right
    seconds: list[float] = []
    for _ in range(5):
        started = time.process_time()
        for _ in range(5):
            left @ right
        seconds.append((time.process_time() - started) / 5)
    return 2 * 1024**3 / min(seconds)


def item_flop(config: Any, tokens: float, new_tokens: int = 10) -> float:
    """Multiplications and additions to prefill one prompt causally and decode about as much as `long` says."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    size = hidden // config.num_attention_heads
    attention = 2 * hidden * (hidden + size * config.num_key_value_heads)
    weights = layers * (attention + 3 * hidden * config.intermediate_size)
    head = hidden * config.vocab_size * new_tokens
    return 2 * (weights * (tokens + new_tokens) + head) + 2 * layers * hidden * (tokens + new_tokens) ** 2


def prefill_alone(engine_name: str, tokens: int) -> dict[str, Any]:
    """CPU seconds and the peak of resident memory for one answer of one token to a prompt of `tokens`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from workers.engines.engine import Prompt
    from workers.engines.transformers_engine import TransformersEngine

    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 2, "vocab_size": 32768, "max_position_embeddings": 2 * tokens}
    config = {"model_type": "qwen2", "tie_word_embeddings": True, "dtype": "bfloat16", **shape}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    engine = TransformersEngine.from_state(config, PARENT, model.state_dict().items(), device="cpu")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, 1000, (tokens,), generator=generator)
    text = engine.tokenizer.decode(engine.encode(engine.tokenizer.decode(ids))[:tokens])  # as it is encoded again
    before, started = peak_gib(), time.process_time()
    if engine_name == "ours":
        engine.generate([Prompt("", text, 1)])
    if engine_name == "hflm":
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        peer = HFLM(pretrained=model, tokenizer=engine.tokenizer, batch_size=1, max_length=2 * tokens)  # type: ignore[arg-type]
        peer.generate_until([Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": 1}), 0)])
    seconds = time.process_time() - started
    return {
        "tokens": len(engine.encode(text)), "cpu_seconds": round(seconds, 1),
        "peak_gib": round(peak_gib(), 2), "above_loaded_gib": round(peak_gib() - before, 2),
    }  # fmt: skip


def peak_gib() -> float:
    """The most memory this process ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
