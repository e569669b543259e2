"""A server of a model that answers both of OpenAI's APIs, and that fails on request.

A chat's text is that of its messages, one after the other. `transformers serve` cannot echo logprobs, nor fail.
"""

from __future__ import annotations

import json
import socket
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from workers.engines.engine import Prompt


@contextmanager
def serving(engine):
    """A server of the engine's model; `failures` are its next replies, `asked` the bodies and keys of the requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.engine, server.failures, server.asked, server.echoes = engine, [], [], True
    server.lock, server.released = threading.Lock(), threading.Event()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(200, {"data": [{"id": "long", "max_model_len": self.server.engine.max_length}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((body, self.headers.get("Authorization")))
        failure = self.server.failures.pop(0) if self.server.failures else None
        if failure == "reset":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif failure == "hang":
            self.server.released.wait(30)
        elif failure == "trickle":
            self.trickle()
        elif isinstance(failure, bytes):
            self.reply(200, failure)
        elif isinstance(failure, tuple):
            self.reply(*failure)
        elif failure:
            self.reply(failure, {"error": {"message": "told to fail"}})
        else:
            with self.server.lock:
                answer = self.complete(body)
            self.reply(200, answer)

    def complete(self, body):
        engine = self.server.engine
        if body.get("echo") and self.server.echoes:
            logits = engine.model(torch.tensor([body["prompt"]])).logits[0].log_softmax(-1)
            chosen = [float(logits[i, token]) for i, token in enumerate(body["prompt"][1:])]
            tops = [{"top": float(row.max())} for row in logits[:-1]]
            logprobs = {"token_logprobs": [None, *chosen, 0.0], "top_logprobs": [None, *tops, {}]}
            return {"choices": [{"text": "", "logprobs": logprobs}]}
        if body.get("echo"):
            return {"choices": [{"text": "", "logprobs": None}]}
        chat = self.path.endswith("/chat/completions")
        prompt = "".join(message["content"] for message in body["messages"]) if chat else body["prompt"]
        (answer,) = engine.generate([Prompt("", prompt, body.get("max_completion_tokens") or body["max_tokens"])])
        usage = {"prompt_tokens": answer.tokens_in, "completion_tokens": answer.tokens_out}
        ended = "length" if answer.status == "cut" else "stop"
        text = {"message": {"role": "assistant", "content": answer.text}} if chat else {"text": answer.text}
        return {"choices": [{**text, "finish_reason": ended}], "usage": usage}

    def trickle(self):
        """A byte now and then, without end."""
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while not self.server.released.wait(0.1):
                self.wfile.write(b" ")

    def reply(self, status, content, retry_after=None, location=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        if location is not None:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass
