"""The half of the vLLM engine that runs in vLLM's own environment: `python -m vllm_server SOCKET`.

vLLM pins its own torch, so it cannot share ours. This module, alone on the path, imports the standard library, torch
and vllm, connects to the engine's Unix socket and answers calls: a message is eight bytes of length (big endian) and as
much JSON, an answer is `{"ok": …}` or `{"error": …}`. Weights come to each of vLLM's workers over a second socket,
tensor by tensor: a message names the tensor, and the worker asks for the next.

The bytes of a tensor on the worker's own GPU stay there: the message has CUDA's handle of the memory, and vLLM's loader
copies from it. Other bytes lie in an anonymous memory file that is sent beside the message. Before the first handle the
engine sends that of a single number, and the worker says whether it can open it: a worker of another GPU, or a
container that shares no memory, cannot. The handles have not run on a GPU yet.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any

HEADER_BYTES = 8
NEXT, OPENED, REFUSED = b"n", b"o", b"r"


def send_message(channel: socket.socket, message: dict[str, Any], descriptor: int | None = None) -> None:
    """One message, with the file descriptor that its tensor lies behind."""
    body = json.dumps(message).encode()
    header = len(body).to_bytes(HEADER_BYTES, "big")
    if descriptor is None:
        channel.sendall(header)
    else:
        socket.send_fds(channel, [header], [descriptor])
    channel.sendall(body)


def receive_message(channel: socket.socket) -> tuple[dict[str, Any], int | None]:
    """The next message and its file descriptor, which the caller closes; `EOFError` if the other side has gone."""
    first, descriptors, _, _ = socket.recv_fds(channel, HEADER_BYTES, 1)
    header = first + (receive_bytes(channel, HEADER_BYTES - len(first)) if first else b"")
    if not header:
        raise EOFError("the other process closed the connection")
    body = receive_bytes(channel, int.from_bytes(header, "big"))
    return json.loads(body), descriptors[0] if descriptors else None


def receive_bytes(channel: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes."""
    parts: list[bytes] = []
    while count:
        part = channel.recv(min(count, 1 << 20))
        if not part:
            raise EOFError("the other process closed the connection")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


class WeightReceiver:
    """Mixed into vLLM's worker (`worker_extension_cls`); its method is called in every worker process."""

    model_runner: Any
    device: Any

    def receive_weights(self, address: str) -> None:
        """Replaces the weights by those from the socket, through vLLM's own loader (it fuses q, k and v)."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.connect(address)
            self.model_runner.reload_weights(weights_iterator=_received(channel, self.device))
        self._repack_tied_head()

    def _repack_tied_head(self) -> None:
        """A head tied to the embeddings has their new weights, but on a CPU computes with a packed copy of the old.

        vLLM 0.32 repacks every layer it was sent weights for, and those of such a head come under another name.
        """
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        weight = getattr(head, "weight", None)
        if head is not None and weight is not None and weight.device.type == "cpu":
            head.quant_method.process_weights_after_loading(head)


def _received(channel: socket.socket, device: Any) -> Iterator[tuple[str, Any]]:
    import torch

    while True:
        channel.sendall(NEXT)
        message, descriptor = receive_message(channel)
        if message.get("end"):
            return
        if "probe" in message:
            channel.sendall(_probed(message["probe"], device))
            continue
        shape, dtype = message["shape"], getattr(torch, message["dtype"])
        if "shared" in message:
            yield message["name"], _opened(message["shared"], dtype, device)
            continue
        if descriptor is None:
            raise RuntimeError(message.get("abort", "a tensor came without its bytes"))
        if math.prod(shape) == 0:
            os.close(descriptor)
            yield message["name"], torch.empty(shape, dtype=dtype)
        else:
            memory = mmap.mmap(descriptor, 0)
            os.close(descriptor)
            yield message["name"], torch.frombuffer(memory, dtype=dtype).reshape(shape)


def _probed(shared: dict[str, Any], device: Any) -> bytes:
    """Whether this worker can open memory of the engine's GPU."""
    import torch

    try:
        return OPENED if _opened(shared, torch.float32, device).tolist() == [1.0] else REFUSED
    except RuntimeError:
        traceback.print_exc()
        return REFUSED


def gpu_of(device: Any) -> str:
    """The name of a GPU that is the same in every process."""
    import torch

    return str(torch.get_device_module(device).get_device_properties(device).uuid)


def _opened(shared: dict[str, Any], dtype: Any, device: Any) -> Any:
    """A tensor in the memory of another process on the same GPU; torch counts who still uses it."""
    import torch
    from torch.multiprocessing import reductions

    if device.type == "cpu" or gpu_of(device) != shared["gpu"]:
        raise RuntimeError(f"the weights are on GPU {shared['gpu']}, which is not this worker's {device}")
    return reductions.rebuild_cuda_tensor(
        torch.Tensor,
        torch.Size(shared["size"]),
        tuple(shared["stride"]),
        shared["offset"],
        torch.storage.TypedStorage,
        dtype,
        device.index,
        bytes.fromhex(shared["handle"]),
        shared["storage_bytes"],
        shared["storage_offset"],
        False,
        bytes.fromhex(shared["counter"]),
        shared["counter_offset"],
        bytes.fromhex(shared["event"]),
        shared["waits"],
    )


class Server:
    """One vLLM and the calls it answers, each a method."""

    def __init__(self) -> None:
        self.model: Any = None

    def open(self, options: dict[str, Any]) -> dict[str, Any]:
        """Start vLLM; the context length it settled on."""
        from vllm import LLM  # pyright: ignore[reportMissingImports]  # lives in vLLM's own environment

        self.model = LLM(worker_extension_cls="vllm_server.WeightReceiver", **options)
        return {"max_length": self.model.llm_engine.model_config.max_model_len}

    def generate(self, prompts: list[list[int]], settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Token ids, how they ended, and whether every log-likelihood was a number.

        `settings` are arguments of `SamplingParams`, one set a prompt. `ended`: the last is an end token; `cut`: there
        are as many as `max_tokens` allows; neither: a stop ended them.
        """
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]  # as above

        chosen = [SamplingParams(logprobs=0, **setting) for setting in settings]
        outputs = self.model.generate([{"prompt_token_ids": ids} for ids in prompts], chosen, use_tqdm=False)
        return [
            {
                "tokens": list(output.outputs[0].token_ids),
                "ended": output.outputs[0].finish_reason == "stop"
                and not isinstance(output.outputs[0].stop_reason, str),
                "cut": output.outputs[0].finish_reason == "length",
                "finite": all(math.isfinite(v.logprob) for step in output.outputs[0].logprobs for v in step.values()),
            }
            for output in outputs
        ]

    def score(self, windows: list[list[int]]) -> list[dict[str, Any]]:
        """Log-likelihood of every token but the first, and whether it was the likeliest."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]  # as above

        settings = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        outputs = self.model.generate([{"prompt_token_ids": ids} for ids in windows], settings, use_tqdm=False)
        scored: list[dict[str, Any]] = []
        for ids, output in zip(windows, outputs, strict=True):
            steps = [step[token] for token, step in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            scored.append({"scores": [s.logprob for s in steps], "greedy": [s.rank == 1 for s in steps]})
        return scored

    def receive_weights(self, address: str) -> None:
        """Every worker fetches the new weights from the socket at `address`."""
        self.model.collective_rpc("receive_weights", args=(address,))

    def reset_prefix_cache(self) -> bool:
        """Forget keys and values of the weights before; vLLM leaves this to its user."""
        return self.model.reset_prefix_cache()


def serve(address: str) -> None:
    """Answer calls until the engine hangs up."""
    server = Server()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.connect(address)
        while True:
            try:
                message, _ = receive_message(channel)
            except EOFError:
                return
            try:
                send_message(channel, {"ok": getattr(server, message["call"])(**message["with"])})
            except Exception as error:
                traceback.print_exc()
                send_message(channel, {"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    serve(sys.argv[1])
