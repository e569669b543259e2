"""The engine for GPUs by the dozen: vLLM in a process and an environment of its own, weights swapped while it runs.

vLLM keeps its prefix cache over a change of weights, by decision: asked the same prompt again it would answer with the
keys and values of the merge before. `swap` therefore always ends by resetting it.

The other half is `vllm_server`. Tensors are handed over one at a time, on a GPU within its memory, else through
anonymous memory of the host; the next is merged while vLLM loads the last.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch.multiprocessing import reductions

from jobs.errors import BadInput, MergeyardError, WorkerLost
from workers.engines import vllm_server
from workers.engines.decoding import answer_of
from workers.engines.engine import Answer, Progress, Prompt, check_room, check_window, longest_scored
from workers.engines.tokenizer import encode_prompt, load_tokenizer
from workers.engines.vllm_server import NEXT, OPENED, gpu_of, receive_bytes, receive_message, send_message

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

PYTHON_VARIABLE = "MERGEYARD_VLLM_PYTHON"
START_SECONDS = 600.0
PROMPTS_A_CALL = 256
SCORED_A_CALL = 1 << 17
"""Tokens of the windows that are scored at once: vLLM makes Python objects of each token's log-likelihood."""


class VllmEngine:
    """A resident vLLM; implements `Engine`.

    `folder` holds the checkpoint whose shapes and names every later swap must match. `python` is the interpreter of an
    environment with vLLM, else $MERGEYARD_VLLM_PYTHON. `cache_gib` is room for keys and values on a CPU; on a GPU say
    `gpu_memory_utilization` in `options`, which go to `vllm.LLM` as they are. A `fixed` model is never
    swapped: its weights may be quantised, or in a GGUF file.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        python: str | Path | None = None,
        version: str = "",
        max_length: int | None = None,
        dtype: str = "bfloat16",
        cache_gib: int = 4,
        options: Mapping[str, Any] | None = None,
        fixed: bool = False,
    ) -> None:
        interpreter = python or os.environ.get(PYTHON_VARIABLE)
        if not interpreter or not Path(interpreter).is_file():
            raise BadInput(f"no interpreter with vLLM at {interpreter}; set {PYTHON_VARIABLE} to one")
        self.tokenizer = load_tokenizer(folder)
        self._expected = {} if fixed else _shapes(Path(folder))
        self._version: str | None = version or str(folder)
        settings: dict[str, Any] = {
            **_model(Path(folder)),
            "dtype": dtype,
            "max_model_len": max_length,
            **(options or {}),
        }
        self._ranks = int(settings.get("tensor_parallel_size", 1)) * int(settings.get("pipeline_parallel_size", 1))
        self._room = tempfile.TemporaryDirectory(prefix="mergeyard-vllm-")
        self._log = Path(self._room.name, "log")
        self._process, self._channel = self._start(str(interpreter), cache_gib)
        try:
            self._max_length = int(self._call("open", options=settings)["max_length"])
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> str:
        """The name of the resident weights; refused between a swap that failed and one that succeeds."""
        if self._version is None:
            raise MergeyardError("the engine holds a mixture of two models: its last swap failed; swap again")
        return self._version

    @property
    def max_length(self) -> int:
        """The length that vLLM was opened with, or the model's own."""
        return self._max_length

    @property
    def max_scored(self) -> int:
        """One less than `max_length`."""
        return longest_scored("vllm", self.max_length)

    def encode(self, text: str, *, bare: bool = False) -> list[int]:
        """Token ids of `text` as a prompt; vLLM is given ids and never tokenizes."""
        return encode_prompt(self.tokenizer, text, bare=bare)

    def generate(self, prompts: Sequence[Prompt], *, progress: Progress | None = None) -> list[Answer]:
        """One answer a prompt; vLLM itself finds shared prefixes. `seconds` is those of up to 256 prompts over them.

        An answer sampled with a seed is the same again from the same vLLM only, not from another engine.
        """
        _ = self.version
        ids = [self.encode(prompt.whole, bare=prompt.bare) for prompt in prompts]
        for prompt, tokens in zip(prompts, ids, strict=True):
            check_room(len(tokens), prompt.longest, self.max_length)
        answers: list[Answer] = []
        for first in range(0, len(prompts), PROMPTS_A_CALL):
            part = slice(first, first + PROMPTS_A_CALL)
            started = time.perf_counter()
            outputs = self._said(prompts[part], ids[part])
            seconds = (time.perf_counter() - started) / len(outputs)
            answers += [
                self._answer(prompt, tokens, output, seconds)
                for prompt, tokens, output in zip(prompts[part], ids[part], outputs, strict=True)
            ]
            if progress:
                progress(len(outputs))
        return answers

    def score(self, windows: Sequence[Sequence[int]], *, progress: Progress | None = None) -> list[NDArray[np.float32]]:
        """Log-likelihood of every token but the first of each window."""
        return [np.asarray(scored["scores"], dtype=np.float32) for scored in self._scored(windows, progress)]

    def loglikelihoods(self, texts: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether each of its tokens was the likeliest."""
        return [
            (float(sum(scored["scores"][context - 1 :])), all(scored["greedy"][context - 1 :]))
            for scored, (_, context) in zip(self._scored([ids for ids, _ in texts]), texts, strict=True)
        ]

    @property
    def places(self) -> Mapping[str, Tensor]:
        """None: the weights are in another process."""
        return {}

    def swap(self, weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Stream the weights into vLLM by name, then reset its prefix cache.

        `BadInput` for a name the checkpoint in `folder` has not, one that never came and a shape that differs; after
        it the engine answers nothing until a swap succeeds.
        """
        self._version = None
        self._stream(weights, version)
        if not self._call("reset_prefix_cache"):
            raise MergeyardError(f"{version}: vLLM did not reset its prefix cache; its answers would be of two models")
        self._version = version

    def close(self) -> None:
        """Hangs up, which ends the server; after a while the rest of it and its children are killed."""
        self._channel.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._room.cleanup()

    def _said(self, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """The server's output for each prompt; `thought` counts the tokens of its thought, None if that never ended.

        A thought is a request of its own, so that it has its own limit and no stop ends it; the answer is asked for
        with the thought as part of the prompt, whose keys and values vLLM still has.
        """
        outputs = self._call("generate", prompts=ids, settings=[_settings(prompt) for prompt in prompts])
        thought = [at for at, prompt in enumerate(prompts) if prompt.thinking is not None]
        for at, output in enumerate(outputs):
            output["thought"] = None if at in thought else 0
        ended = [at for at in thought if not outputs[at]["ended"] and not outputs[at]["cut"]]
        asked = [[*ids[at], *outputs[at]["tokens"]] for at in ended]
        settings = [_settings(replace(prompts[at], thinking=None), after_thought=True) for at in ended]
        answers = self._call("generate", prompts=asked, settings=settings) if ended else []
        for at, answer in zip(ended, answers, strict=True):
            thoughts = outputs[at]
            outputs[at] = answer | {
                "tokens": thoughts["tokens"] + answer["tokens"],
                "finite": thoughts["finite"] and answer["finite"],
                "thought": len(thoughts["tokens"]),
            }
        return outputs

    def _answer(self, prompt: Prompt, ids: Sequence[int], output: Mapping[str, Any], seconds: float) -> Answer:
        tokens = output["tokens"][: -1 if output["ended"] else None]
        how = {"cut": bool(output["cut"]), "finite": bool(output["finite"])}
        return answer_of(prompt, len(ids), tokens, output["thought"], self._text, seconds=seconds, **how)

    def _text(self, tokens: list[int], special: bool) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=not special))

    def _scored(self, windows: Sequence[Sequence[int]], progress: Progress | None = None) -> Iterator[dict[str, Any]]:
        """The server's answer for each window, up to `SCORED_A_CALL` of them per call."""
        _ = self.version
        for window in windows:
            check_window(len(window), self.max_scored)
        asked: list[list[int]] = []
        for at, window in enumerate(windows):
            asked.append(list(window))
            last = at + 1 == len(windows)
            if last or sum(map(len, asked)) + len(windows[at + 1]) > SCORED_A_CALL:
                yield from self._call("score", windows=asked)
                if progress:
                    progress(len(asked))
                asked = []

    def _stream(self, weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Hand every tensor to each of vLLM's workers in turn; the prefix cache is left as it is."""
        with tempfile.TemporaryDirectory(dir=self._room.name) as room, socket.socket(socket.AF_UNIX) as door:
            address = f"{room}/s"
            door.bind(address)
            door.listen(self._ranks)
            send_message(self._channel, {"call": "receive_weights", "with": {"address": address}})
            workers: list[socket.socket] = []
            try:
                workers.extend(self._accept(door) for _ in range(self._ranks))
                _hand_over(workers, self._checked(weights, version))
            except (EOFError, OSError):
                self._reply()  # a worker hung up, and the server says why
                raise WorkerLost(f"{version}: vLLM hung up while its weights were swapped; open it again") from None
            except BaseException:
                for worker in workers:
                    worker.close()
                receive_message(self._channel)  # the error that our hanging up made
                raise
            finally:
                for worker in workers:
                    worker.close()
            self._reply()

    def _accept(self, door: socket.socket) -> socket.socket:
        """The next worker's connection; a message of the server instead means that it will not come."""
        ready, _, _ = select.select([door, self._channel], [], [], START_SECONDS)
        if door not in ready:
            raise EOFError("no worker came for the weights")
        return door.accept()[0]

    def _checked(self, weights: Iterable[tuple[str, Tensor]], version: str) -> Iterator[tuple[str, Tensor]]:
        """The weights as they come, once each is known to fit; vLLM's loader does not notice a missing tensor."""
        missing = set(self._expected)
        for name, tensor in weights:
            if name not in self._expected:
                raise BadInput(f"{name}: the model has no such weight; merge the tensors of its checkpoint only")
            if list(tensor.shape) != self._expected[name]:
                raise BadInput(f"{name}: shape {list(tensor.shape)} does not fit the model's {self._expected[name]}")
            missing.discard(name)
            yield name, tensor
        if missing:
            raise BadInput(f"{version}: {len(missing)} weights never came, the first is {min(missing)}; merge all")

    def _start(self, python: str, cache_gib: int) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """The server's process and the connection it opened; its folder on the path holds nothing but the server."""
        path = Path(self._room.name, "path")
        path.mkdir()
        shutil.copy(vllm_server.__file__, path / "vllm_server.py")
        environment = os.environ | {
            "PYTHONPATH": str(path),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(cache_gib),
        }
        with socket.socket(socket.AF_UNIX) as door, self._log.open("wb") as log:
            address = f"{self._room.name}/s"
            door.bind(address)
            door.listen(1)
            door.settimeout(1)
            process = subprocess.Popen(
                [python, "-m", "vllm_server", address],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            while process.poll() is None:
                try:
                    channel = door.accept()[0]
                except TimeoutError:
                    continue
                channel.settimeout(None)
                return process, channel
        raise WorkerLost(f"{python} could not run vLLM's server: {self._last_words()}")

    def _call(self, name: str, **arguments: Any) -> Any:
        try:
            send_message(self._channel, {"call": name, "with": arguments})
        except OSError as error:
            raise WorkerLost(f"vLLM is gone: {self._last_words()}; open the engine again") from error
        return self._reply()

    def _reply(self) -> Any:
        try:
            message, _ = receive_message(self._channel)
        except (EOFError, OSError) as error:
            raise WorkerLost(f"vLLM died: {self._last_words()}; open the engine again") from error
        if "error" in message:
            raise MergeyardError(f"vLLM failed: {message['error']}")
        return message["ok"]

    def _last_words(self) -> str:
        """The last line that vLLM wrote."""
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return lines[-1][:300] if lines else "it wrote nothing"


def _settings(prompt: Prompt, *, after_thought: bool = False) -> dict[str, Any]:
    """vLLM's SamplingParams for a prompt: for its thought if it has one, else for its answer."""
    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": prompt.max_new_tokens}
    if prompt.stops:
        settings["stop"] = list(prompt.stops)
    if prompt.thinking is not None:
        settings |= {"max_tokens": prompt.thinking.budget, "stop": [prompt.thinking.end], "skip_special_tokens": False}
    if (sampling := prompt.sampling) is not None:
        # another seed after a thought: vLLM would draw the thought's numbers again
        settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or -1}
        settings["seed"] = sampling.seed ^ (after_thought << 62)
    return settings


def _hand_over(workers: Sequence[socket.socket], weights: Iterable[tuple[str, Tensor]]) -> None:
    """Each tensor to every worker that asks for the next; while they load it, the one after is merged."""
    opens: dict[socket.socket, bool] = {}
    for name, tensor in weights:
        message = {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        descriptor: int | None = None
        for worker in workers:
            receive_bytes(worker, len(NEXT))
            if tensor.device.type != "cpu" and tensor.numel():
                if worker not in opens:
                    opens[worker] = _opens(worker, tensor.device)
                if opens[worker]:
                    send_message(worker, message | {"shared": _shared(tensor)})
                    continue
            if descriptor is None:
                descriptor = _in_memory(tensor)
            send_message(worker, message, descriptor)
        if descriptor is not None:
            os.close(descriptor)
    for worker in workers:
        receive_bytes(worker, len(NEXT))
        send_message(worker, {"end": True})
    if any(opens.values()):
        torch.cuda.ipc_collect()


def _opens(worker: socket.socket, device: torch.device) -> bool:
    """Whether a worker can open memory of a GPU: tried with one number, as what is never opened is never freed."""
    try:
        probe = _shared(torch.ones(1, device=device))
    except RuntimeError:
        return False
    send_message(worker, {"probe": probe})
    opened = receive_bytes(worker, len(OPENED)) == OPENED
    receive_bytes(worker, len(NEXT))
    return opened


def _shared(tensor: Tensor) -> dict[str, Any]:
    """How another process opens a tensor's memory on a GPU, which stays until that process has dropped it."""
    parts: Any = reductions.reduce_tensor(tensor.detach().contiguous())[1]
    _, size, stride, offset, _, _, _, handle, storage_bytes, storage_offset, _, *count, event, waits = parts
    return {
        "gpu": gpu_of(tensor.device),
        "size": list(size),
        "stride": list(stride),
        "offset": offset,
        "handle": handle.hex(),
        "storage_bytes": storage_bytes,
        "storage_offset": storage_offset,
        "counter": count[0].hex(),
        "counter_offset": count[1],
        "event": event.hex(),
        "waits": waits,
    }


def _in_memory(tensor: Tensor) -> int:
    """A descriptor of anonymous memory that holds the tensor's bytes; the kernel frees it with its last reader."""
    bytes_: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    content = memoryview(bytes_)
    descriptor = os.memfd_create("weight")
    written = 0
    while written < len(content):
        written += os.write(descriptor, content[written:])
    return descriptor


def _model(folder: Path) -> dict[str, str]:
    """vLLM's names for the model in a folder; a GGUF file is named itself, with the folder of its tokenizer."""
    gguf = next(folder.glob("*.gguf"), None)
    if gguf is None:
        return {"model": str(folder)}
    config = {"hf_config_path": str(folder)} if (folder / "config.json").is_file() else {}
    return {"model": str(gguf), "tokenizer": str(folder), **config}


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Shape of every tensor of a checkpoint, from its headers."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes.update({name: list(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    if not shapes:
        raise BadInput(f"{folder}: no safetensors file; give a folder that holds a checkpoint")
    return shapes
