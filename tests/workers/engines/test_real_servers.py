"""The engine that asks a server, of servers that people use: vLLM, and `transformers serve`.

`make vllm` installs the first; the second needs `pip install transformers[serving]` in the environment.
"""

import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from workers.engines.engine import Message, Prompt, Sampling, Thought
from workers.engines.openai_engine import OpenAIEngine

VLLM = Path(__file__).parents[3] / ".venv-vllm" / "bin"
START_SECONDS = 900

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1800)]

needs_vllm = pytest.mark.skipif(not (VLLM / "python").exists(), reason="vLLM is not installed: run `make vllm`")
needs_serving = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("openai", "fastapi", "uvicorn")),
    reason="`transformers serve` is not installed: run `pip install transformers[serving]`",
)


@contextmanager
def started(command, log, **environment):
    """The address of a server that the command starts on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(log.parent)}
    with log.open("wb") as file:
        command = [*map(str, command), "--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            except OSError:
                time.sleep(1)
        yield f"{url}/v1"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture
def chats(needle_prompt):
    """Two questions in the chat template of the example parents, with and without RULER's answer prefix."""

    def build(*, begun):
        for lines in (4, 9):
            question, _, prefix = needle_prompt("quiet-river", 4815162 + lines, lines).text.rpartition("? ")
            text = f"<|im_start|>user\n{question}? <|im_end|>\n<|im_start|>assistant\n"
            messages = (Message("user", f"{question}? "), Message("assistant", prefix))
            yield Prompt("", text + prefix * begun, 12, bare=True, messages=messages[: 1 + begun])

    return lambda *, begun: list(build(begun=begun))


def texts(answers):
    return [answer.text.strip() for answer in answers]


@needs_vllm
def test_vllm_answers_in_both_apis_as_the_transformers_engine(
    parents, engine, needle_prompt, chats, tmp_path, loglikelihood
):
    command = [VLLM / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", parents / "long"]
    command += ["--served-model-name", "long", "--max-model-len", "1024", "--enforce-eager", "--dtype", "bfloat16"]
    environment = {"PATH": f"{VLLM}:/usr/bin:/bin", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with started(command, tmp_path / "log", **environment) as url:
        served = OpenAIEngine(url, "long", parents / "long")
        prompts = [needle_prompt("quiet-river", 4815162 + lines, lines) for lines in (4, 11)]
        assert texts(served.generate(prompts)) == ["4815166.", "4815173."] and served.max_length == 1024
        ids = engine.encode(prompts[0].whole)
        assert np.abs(served.score([ids])[0] - engine.score([ids])[0]).mean() < 0.05
        assert loglikelihood(served, prompts[0].whole, " 4815166.")[1] is True
        served.close()
        chat = OpenAIEngine(url, "long", parents / "long", api="chat")
        for begun in (False, True):
            asked = chats(begun=begun)
            answers = chat.generate(asked)
            assert texts(answers) == texts(engine.generate(asked)) and not answers[0].remark
            assert [answer.tokens_in for answer in answers] == [len(chat.encode(one.whole, bare=True)) for one in asked]
        sampled = [replace(one, sampling=Sampling(1.5, 0.95, 50, 7)) for one in chats(begun=False)]
        assert texts(chat.generate(sampled)) == texts(chat.generate(sampled))
        thinking = [replace(one, thinking=Thought("</think>", 8, False)) for one in chats(begun=False)]
        assert {answer.status for answer in chat.generate(thinking)} == {"unended"}, "the tiny model closes no thought"
        chat.close()


@needs_serving
def test_transformers_serve_answers_in_both_apis_as_the_transformers_engine(
    parents, engine, needle_prompt, chats, tmp_path
):
    command = [Path(sys.executable).parent / "transformers", "serve", parents / "long", "--device", "cpu"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path))}
    with started([*command, "--dtype", "float32"], tmp_path / "log", **environment) as url:
        name = str(parents / "long")
        served = OpenAIEngine(url, name, parents / "long", max_length=1024, concurrency=2)
        prompts = [needle_prompt("quiet-river", 4815162 + lines, lines) for lines in (4, 11)]
        assert texts(served.generate(prompts)) == ["4815166.", "4815173."]
        served.close()
        chat = OpenAIEngine(url, name, parents / "long", max_length=1024, concurrency=2, api="chat")
        asked = chats(begun=False)
        assert texts(chat.generate(asked)) == texts(engine.generate(asked))
        begun = chat.generate(chats(begun=True))
        assert texts(begun) == texts(engine.generate(asked)), "the server takes no beginning of an answer"
        assert "takes no continue_final_message: its answers begin without" in begun[0].remark
        chat.close()
