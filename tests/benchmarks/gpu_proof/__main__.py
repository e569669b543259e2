"""What a GPU does with mergeyard: seven sections of less than ten minutes each, a line for every figure.

    python -m tests.benchmarks.gpu_proof [SECTION …] [--room FOLDER] [--out FILE] [--device cuda:0] [--tiny]

It needs torch, transformers, numpy, numba and ml_dtypes, and Triton for the loops of a GPU, but no Ray, obstore, boto3,
pyarrow or blake3. Every line is `section | what | found | goal`, and goes to `--out` as JSON as well: `--show FILE`
prints such files as a table and, where matplotlib is installed, draws them. `--tiny --device cpu` tries the proof.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if find_spec("blake3") is None:  # digests are then slower, and equal on all devices all the same
    stand_in: Any = ModuleType("blake3")
    stand_in.blake3 = hashlib.sha256
    sys.modules["blake3"] = stand_in

from jobs.job import load_job
from orchestrator.cluster.in_process import InProcessPool
from orchestrator.merging.driver import drive
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.watching import Watcher
from tests.benchmarks.make_checkpoints import EXAMPLE, SIZES
from workers.engines.engine import Prompt
from workers.engines.transformers_engine import Limits, TransformersEngine
from workers.engines.vllm_engine import PYTHON_VARIABLE, VllmEngine, _hand_over
from workers.merging.resident import ResidentParents

PAIR = "models: [{model: cos, parameters: {weight: WEIGHT}}, {model: fmt, parameters: {weight: 0.4}}]"
RECIPES = {
    "linear": PAIR,
    "slerp": "base_model: cos, parameters: {t: WEIGHT}, models: [{model: cos}, {model: fmt}]",
    "task_arithmetic": f"base_model: base, parameters: {{normalize: true, lambda: 0.8}}, {PAIR}",
    "ties": f"base_model: base, parameters: {{density: 0.4}}, {PAIR}",
    "dare_linear": f"base_model: base, parameters: {{density: 0.4}}, {PAIR}",
    "dare_ties": f"base_model: base, parameters: {{density: 0.4}}, {PAIR}",
    "della": f"base_model: base, parameters: {{density: 0.4}}, {PAIR}",
    "sce": "base_model: base, parameters: {select_topk: 0.5}, models: [{model: cos}, {model: fmt}]",
    "model_stock": "base_model: base, models: [{model: cos}, {model: fmt}]",
    "passthrough": "models: [{model: fmt, parameters: {scale: WEIGHT}}]",
}


RECEIVER = """
import socket, sys, torch
from workers.engines.vllm_server import _received
address, device, rounds = sys.argv[1], torch.device(sys.argv[2]), int(sys.argv[3])
held = {}
for _ in range(rounds):
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(address)
        for name, tensor in _received(channel, device):
            came_on = tensor.device.type
            held.setdefault(name, torch.empty_like(tensor, device=device)).copy_(tensor)
        del tensor
        bits = sum(int(each.view(torch.int16).long().sum()) for each in held.values())
        print(came_on, bits, flush=True)
"""
"""A process that copies every tensor it is handed, as vLLM's worker does, and says where they came and their bits."""


class Proof:
    """The options of a run, and what it has found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device: str = options.device
        self.tiny: bool = options.tiny
        self.room = Path(options.room)
        self.items: int = options.items
        self.threads = min(16, os.cpu_count() or 1)
        self.size = "tiny" if self.tiny else "1.5b"
        self.lengths = (64, 256) if self.tiny else (4096, 32768, 131072)
        self.section = ""
        self._out = Path(options.out).open("a") if options.out else None  # noqa: SIM115 - open as long as the proof

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def say(self, what: str, found: str, goal: str = "", value: float | None = None) -> None:
        """A line; `value` is the figure in it that a plot shows."""
        print(f"{self.section:8}| {what:58}| {found:38}| {goal}", flush=True)
        if self._out:
            line = {"section": self.section, "what": what, "found": found, "goal": goal, "value": value}
            print(json.dumps(line), file=self._out, flush=True)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeat: int = 5) -> float:
        """The median, after one more."""
        found: list[float] = []
        for _ in range(repeat + 1):
            self.wait()
            begun = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - begun)
        return statistics.median(found[1:])

    def parents(self) -> Path:
        """The folder of base, cos and fmt."""
        folder = self.room / self.size
        if not (folder / "fmt").exists():
            run = [sys.executable, "-m", "tests.benchmarks.make_checkpoints", str(folder), "--size", self.size]
            subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
        return folder

    def plan(self, folder: Path, method: str, weights: Sequence[float] = (0.7,), numerics: str = "float32") -> Plan:
        recipe = RECIPES[method].replace("WEIGHT", "'${w}'")
        names = [name for name in ("base", "cos", "fmt") if f"model: {name}" in recipe]
        shutil.rmtree(self.room / "runs", ignore_errors=True)
        lines = [
            f"name: {method}",
            f"parents: {json.dumps({name: str(folder / name) for name in names})}",
            f"recipe: {{merge_method: {method}, {recipe}, dtype: bfloat16}}",
            *([f"grid: {{w: {json.dumps(list(weights))}}}", "point: 'w{w}'"] if "WEIGHT" in RECIPES[method] else []),
            f"output: {self.room / 'runs'}",
            f"numerics: {numerics}",
            f"workers: {{cpus: {self.threads}, memory: 16GB}}",
        ]
        return make_plan(load_job("\n".join(lines) + "\n", "job.yaml"))

    def resident(self, plan: Plan, device: str) -> ResidentParents:
        return ResidentParents(
            [tensor for shard in plan.points[0].layout.shards for tensor in shard.tensors],
            {name: checkpoint.parent for name, checkpoint in plan.parents.items()},
            seed=plan.job.seed,
            numerics=plan.job.numerics,
            device=device,
            threads=self.threads,
        )


def machine(proof: Proof) -> None:
    """The rates that the goals of other sections are made of."""
    proof.say("torch, CUDA, Triton", f"{torch.__version__} {torch.version.cuda} {find_spec('triton') is not None}")
    size = 1 << 20 if proof.tiny else 1 << 30
    there = torch.zeros(size, dtype=torch.uint8, device=proof.device)
    other = torch.empty_like(there)
    rate = 2 * size / proof.seconds(lambda: other.copy_(there)) / 1e12
    proof.say("copy on the device, read and written", f"{rate:.2f} TB/s", "3.0 H100, 4.3 H200", rate)
    if proof.on_gpu:
        proof.say("card", torch.cuda.get_device_name(proof.device))
        for name, pinned in (("pinned", True), ("pageable", False)):
            host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
            to = size / proof.seconds(lambda host=host: there.copy_(host, non_blocking=True)) / 1e9
            back = size / proof.seconds(lambda host=host: host.copy_(there)) / 1e9
            proof.say(f"{name} memory to the card, and from it", f"{to:.1f}, {back:.1f} GB/s", "50, 50", to)
    side = 256 if proof.tiny else 8192
    a, b = (torch.randn(side, side, device=proof.device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * side**3 / proof.seconds(lambda: a @ b) / 1e12
    proof.say("product in bf16", f"{rate:.1f} TFLOP/s", "790", rate)


def correct(proof: Proof) -> None:
    """Every method on the device against the CPU, written and unwritten: with zeros of both signs, and odd sizes.

    Raises `RuntimeError` if a bit differs where none may.
    """
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(dir=proof.room) as room:
        folder, elements = Path(room), (1 << 12 if proof.tiny else 1 << 24) + 77
        generator = torch.Generator().manual_seed(0)
        ground = torch.randn(elements, generator=generator).mul_(0.02)
        ground[::97], ground[::101] = 0.0, -0.0
        for who in ("base", "cos", "fmt"):
            shutil.copytree(EXAMPLE, folder / who)
            step = torch.randn(elements, generator=generator).mul_(0.0 if who == "base" else 1e-3)
            values = ground + step * (torch.arange(elements) % 53 != 0)
            save_file({"wide": values.bfloat16()}, folder / who / "model.safetensors", metadata={"format": "pt"})
        for numerics in ("float32",) if proof.tiny else ("float32", "mergekit"):
            for method in RECIPES:
                plan = proof.plan(folder, method, numerics=numerics)
                settings = plan.points[0].settings
                on_cpu = dict(proof.resident(plan, "cpu").merged(settings))["wide"]
                found = dict(proof.resident(plan, proof.device).merged(settings))["wide"].cpu()
                result = drive(plan, InProcessPool(device=proof.device), Watcher(visible=False))
                [file] = Path(result.url, "points").rglob("model.safetensors")
                written = load_file(file)["wide"]
                ulps, off = _apart(on_cpu, found), int((on_cpu.view(torch.int16) != written.view(torch.int16)).sum())
                goal = "0, 0; 0" if numerics == "float32" else "≤ 1 ulp"
                proof.say(
                    f"{method}, {numerics}: differ, most ulps; written", f"{ulps[0]}, {ulps[1]}; {off}", goal, ulps[0]
                )
                wrong += (
                    [f"{method}, {numerics}"] if ulps[1] > 1 or (numerics == "float32" and (ulps[0] or off)) else []
                )
    if wrong:
        raise RuntimeError(f"other bits than on a CPU: {'; '.join(wrong)}")


def _apart(a: Tensor, b: Tensor) -> tuple[int, int]:
    """How many bf16 numbers differ in their bits, and the most steps between two."""
    x, y = (each.reshape(-1).view(torch.int16).int() for each in (a, b))
    places = [torch.where(each < 0, -(each & 0x7FFF), each) for each in (x, y)]
    return int((x != y).sum()), int((places[0] - places[1]).abs().max())


def swap(proof: Proof) -> None:
    """Seconds from one point to the next in a resident model."""
    for method, goal in (("linear", 5), ("ties", 7), ("dare_ties", 7)):
        _swap(proof, method, goal)
        gc.collect()


def _swap(proof: Proof, method: str, goal: int) -> None:
    folder = proof.parents()
    plan = proof.plan(folder, method, [round(0.3 + 0.05 * step, 2) for step in range(6)])
    begun = time.perf_counter()
    parents = proof.resident(plan, proof.device)
    proof.wait()
    proof.say(f"{method}: parents read", f"{time.perf_counter() - begun:.1f} s")
    config = json.loads((folder / "base" / "config.json").read_text())
    weights = parents.merged(plan.points[0].settings)
    engine = TransformersEngine.from_state(config, EXAMPLE, weights, device=proof.device, version="0")

    def become(at: int, digests: dict[str, str] | None) -> float:
        proof.wait()
        begun = time.perf_counter()
        engine.swap(parents.merged(plan.points[at].settings, digests, engine.places), str(at))
        proof.wait()
        return time.perf_counter() - begun

    hashed = statistics.median(become(at, {}) for at in (1, 2))
    plain = statistics.median(become(at, None) for at in (3, 4, 5))
    proof.say(f"{method}: the next point, hashed", f"{hashed * 1e3:.1f} ms")
    proof.say(f"{method}: the next point, not hashed", f"{plain * 1e3:.1f} ms", f"{goal} ms", plain * 1e3)
    if proof.on_gpu:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            become(1, None)
        events: list[Any] = [each for each in profile.events() or () if str(each.device_type).endswith("CUDA")]
        busy, peak = sum(each.device_time for each in events) / 1e3, torch.cuda.max_memory_allocated() - held
        proof.say(f"{method}: launches; busy; peak beside", f"{len(events)}; {busy:.1f} ms; {peak / 1e9:.1f} GB", "few")
    engine.close()
    if method == "linear":
        _to_another_process(proof, parents, plan)


def _to_another_process(proof: Proof, parents: ResidentParents, plan: Plan) -> None:
    """Seconds until another process has a point, as vLLM gets it; raises `RuntimeError` if its bits are others."""
    rounds = 3
    with tempfile.TemporaryDirectory() as room, socket.socket(socket.AF_UNIX) as door:
        address = f"{room}/s"
        door.bind(address)
        door.listen(1)
        door.settimeout(120)  # where the other process could not start
        run = [sys.executable, "-c", RECEIVER, address, proof.device, str(rounds)]
        with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as receiver:
            for at in range(rounds):
                channel = door.accept()[0]
                begun = time.perf_counter()
                with channel:
                    _hand_over([channel], parents.merged(plan.points[at].settings))
                assert receiver.stdout is not None
                came_on, bits = receiver.stdout.readline().split()
                took = time.perf_counter() - begun
            merged = dict(parents.merged(plan.points[rounds - 1].settings))
            same = int(bits) == sum(int(each.view(torch.int16).long().sum()) for each in merged.values())
    proof.say("a point in another process, by the memory of", came_on, "cuda" if proof.on_gpu else "cpu")
    proof.say("a point in another process, merged and copied", f"{took * 1e3:.0f} ms", "100 ms", took * 1e3)
    proof.say("a point in another process: the same bits", str(same), "True")
    if not same:
        raise RuntimeError("another process has other bits than the point")


def merge(proof: Proof) -> None:
    """Written merges in `--room`, on the device and on the CPU."""
    folder = proof.parents()
    for method, weights in (("linear", [0.7]), ("ties", [0.7]), ("linear", [0.1, 0.3, 0.5, 0.7])):
        for device in dict.fromkeys((proof.device, "cpu")):
            plan = proof.plan(folder, method, weights)
            begun = time.perf_counter()
            result = drive(plan, InProcessPool(device=device), Watcher(visible=False))
            took = time.perf_counter() - begun
            moved = sum(file.stat().st_size for name in plan.parents for file in (folder / name).glob("*.safetensors"))
            moved += sum(file.stat().st_size for file in Path(result.url).rglob("*.safetensors"))
            found = f"{took:.1f} s; {moved / took / 1e9:.2f} GB/s in and out"
            proof.say(f"{method}, {len(weights)} written, {device}", found, "80 % of the bus, or the CPU's time", took)


def opened(proof: Proof) -> tuple[TransformersEngine, int]:
    """An engine with the base in it, and how many weights a token is multiplied with."""
    folder = proof.parents()
    config = json.loads((folder / "base" / "config.json").read_text())
    config |= {"max_position_embeddings": 140_000, "use_sliding_window": False}
    weights = {
        name: tensor
        for file in sorted((folder / "base").glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    engine = TransformersEngine.from_state(config, EXAMPLE, weights.items(), device=proof.device, version="0")
    engine._end_tokens = frozenset()
    engine.encode = lambda text, *, bare=False: [int(each) for each in text.split()]
    return engine, sum(tensor.numel() for name, tensor in weights.items() if "embed" not in name and tensor.dim() > 1)


def asked(tokens: int, start: int, new: int) -> Prompt:
    """A prompt of so many token ids, which no other start shares."""
    return Prompt("", " ".join(str(3 + (start * 7 + at * at) % 500) for at in range(tokens)), new)


def speed(proof: Proof) -> None:
    """Prefill and decoding, with the base of 1.5B; transformers' own `generate` beside them."""
    engine, weights = opened(proof)
    size = SIZES[proof.size]
    for tokens in proof.lengths:
        for chunk in (2048, 8192):
            engine.limits = Limits(chunk=chunk)
            took = proof.seconds(
                lambda tokens=tokens: engine.generate([asked(tokens, time.perf_counter_ns() % 999, 1)]), 1
            )
            flop = 2 * weights * tokens + 2 * size.layers * size.hidden * tokens**2
            found = f"{tokens / took:,.0f} tokens/s; {flop / took / 1e12:.0f} TFLOP/s"
            proof.say(f"prefill of {tokens}, chunk {chunk}", found, "half of the product's rate", tokens / took)
    engine.limits = Limits()
    for tokens in proof.lengths:
        rows, new = max(1, min(32, proof.lengths[-1] // tokens)), 4 if proof.tiny else 32
        ones, longs = ([asked(tokens, at, each) for at in range(rows)] for each in (1, 1 + new))
        once, more = (proof.seconds(partial(engine.generate, prompts), 1) for prompts in (ones, longs))
        step = (more - once) / new
        floor = (2 * weights + 2 * size.vocabulary * size.hidden + rows * tokens * engine._bytes_a_cell()) / 3.0e12
        found = f"{step * 1e3:.1f} ms; {rows / step:,.0f} tokens/s"
        proof.say(
            f"decoding {rows} rows of {tokens}: a step",
            found,
            f"{2e3 * floor:.1f} ms (2 × the bytes at 3 TB/s)",
            step * 1e3,
        )
    engine.model.set_attn_implementation("sdpa")
    for tokens in proof.lengths:
        ids = torch.tensor([engine.encode(asked(tokens, 5, 1).whole)], device=proof.device)
        with torch.inference_mode():
            took = proof.seconds(lambda ids=ids: engine.model.generate(ids, max_new_tokens=1, do_sample=False), 1)
        proof.say(f"prefill of {tokens}, transformers' generate", f"{tokens / took:,.0f} tokens/s", "", tokens / took)
    engine.close()
    if os.environ.get(PYTHON_VARIABLE):
        del engine
        gc.collect()
        _speed_of_vllm(proof)


def _speed_of_vllm(proof: Proof) -> None:
    """Prefill and swaps of vLLM, where $MERGEYARD_VLLM_PYTHON names an environment with it."""
    plan = proof.plan(proof.parents(), "linear", [0.3, 0.5, 0.7])
    parents = proof.resident(plan, proof.device)
    options: dict[str, Any] = {"enable_prefix_caching": False, "hf_overrides": {"max_position_embeddings": 140_000}}
    options |= {"gpu_memory_utilization": 0.7} if proof.on_gpu else {"enforce_eager": True}
    engine = VllmEngine(proof.parents() / "base", max_length=proof.lengths[-1] + 64, options=options)
    engine.encode = lambda text, *, bare=False: [int(each) for each in text.split()]
    for tokens in proof.lengths:
        took = proof.seconds(lambda tokens=tokens: engine.generate([asked(tokens, time.perf_counter_ns() % 999, 1)]), 1)
        proof.say(f"prefill of {tokens}, vLLM", f"{tokens / took:,.0f} tokens/s", "ours: 0.9 of it", tokens / took)
    took = proof.seconds(lambda: engine.swap(parents.merged(plan.points[0].settings), "0"), 2)
    proof.say("the next point in vLLM", f"{took * 1e3:.0f} ms", "", took * 1e3)
    engine.close()


def grid(proof: Proof) -> None:
    """Unwritten points, each asked some items: how much of the time is prefill and decoding.

    All of 64 × 50 items of 32,768 are 105 M tokens: 14 minutes at the limit of an H100, 129,000 tokens a second, and 30
    at the 58,000 that are expected. Fewer items make the share of the swaps larger, not smaller.
    """
    points, items, tokens = (3, 2, 64) if proof.tiny else (64, proof.items, 32768)
    folder = proof.parents()
    plan = proof.plan(folder, "linear", [round((1 + at) / (points + 1), 4) for at in range(points)])
    parents = proof.resident(plan, proof.device)
    engine, _ = opened(proof)
    prompts = [asked(tokens, at, 8) for at in range(items)]
    swapping = answering = 0.0
    for at, point in enumerate(plan.points):
        begun = time.perf_counter()
        engine.swap(parents.merged(point.settings, None, engine.places), str(at))
        proof.wait()
        swapped = time.perf_counter()
        engine.generate(prompts)
        swapping, answering = swapping + swapped - begun, answering + time.perf_counter() - swapped
    share = answering / (swapping + answering)
    found = f"{share:.1%} of {swapping + answering:.1f} s"
    proof.say(
        f"{points} points × {items} items of {tokens}: prefill, decoding", found, "≥ 90 % (64 × 50 at 32k)", share
    )
    whole = (swapping + answering * 50 / items) * 64 / points / 60
    proof.say(f"64 points × 50 items of {tokens}, at this rate", f"{whole:.1f} min", "", whole)
    engine.close()


def memory(proof: Proof) -> None:
    """A card that is nearly full: batches become smaller and the answers stay. Two workers of half a card."""
    engine, _ = opened(proof)
    prompts = [asked(300, at, 8) for at in range(8 if proof.tiny else 64)]
    alone = [engine.generate([prompts[at]])[0].text for at in (0, -1)]
    engine.limits = Limits(cache_bytes=1 << 40, batch=64)
    if proof.on_gpu:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(proof.device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (200 << 20)) / total, proof.device)
    answers = [answer.text for answer in engine.generate(prompts)]
    proof.say(f"{len(prompts)} prompts, 200 MiB free: as alone", str([answers[0], answers[-1]] == alone), "True")
    engine.close()
    if not proof.on_gpu:
        return
    code = (
        "from workers.gpu_memory import part_of, take_part; import torch\n"
        f"take_part({proof.device!r}, 0.5); held = torch.ones(1 << 20, device={proof.device!r})\n"
        f"print(part_of({proof.device!r}) / 1e9); input()"
    )
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    parts = [float(each.stdout.readline()) for each in both if each.stdout]
    proof.say("two workers of half a card: the part of each", f"{parts[0]:.1f}, {parts[1]:.1f} GB", "equal")
    for each in both:
        each.communicate("\n")


SECTIONS: dict[str, Callable[[Proof], None]] = {
    each.__name__: each for each in (machine, correct, swap, merge, speed, grid, memory)
}


def show(files: Sequence[str]) -> None:
    """The lines of some files as a table in Markdown and, with matplotlib, the figures of each section as bars."""
    lines: list[dict[str, Any]] = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    print("| section | what | found | goal |\n|---|---|---|---|")
    for line in lines:
        print(
            "| " + " | ".join(str(line[key]).replace("|", "/") for key in ("section", "what", "found", "goal")) + " |"
        )
    drawn = [section for section in SECTIONS if any(line["section"] == section and line["value"] for line in lines)]
    if not drawn or find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3 * len(drawn)), layout="constrained")
    for axes, section in zip(figure.subplots(len(drawn), squeeze=False)[:, 0], drawn, strict=True):
        bars = [(line["what"], line["value"]) for line in lines if line["section"] == section and line["value"]]
        axes.barh([what for what, _ in bars][::-1], [value for _, value in bars][::-1])
        axes.set_title(section)
    figure.savefig(Path(files[0]).with_suffix(".svg"))


def main() -> int:
    """Runs the sections; 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="gpu_proof", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all if none is named")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--room", default="/dev/shm/gpu-proof", help="folder for the parents: 9.3 GB")
    parser.add_argument("--out", help="file that the lines are added to, as JSON")
    parser.add_argument(
        "--items", type=int, default=4, help="items a point in the section grid (4; 50 take half an hour)"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short prompts")
    parser.add_argument("--show", nargs="+", metavar="FILE", help="print and draw what was found, and run nothing")
    options = parser.parse_args()
    if options.show:
        show(options.show)
        return 0
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]}; choose from {', '.join(SECTIONS)}")
    proof, failed = Proof(options), False
    proof.room.mkdir(parents=True, exist_ok=True)
    for name in options.sections or SECTIONS:
        proof.section, begun = name, time.perf_counter()
        try:
            SECTIONS[name](proof)
        except Exception as error:  # the other sections are worth having
            traceback.print_exc()
            proof.say("FAILED", f"{type(error).__name__}: {str(error)[:80]}")
            failed = True
        took = time.perf_counter() - begun
        proof.say("took", f"{took:.0f} s", "600 s at most")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
