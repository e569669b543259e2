"""Names and addresses from a job or a parent lead nowhere but where they should."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs.errors import AccessDenied, BadInput, MergeyardError
from jobs.job import load_job
from orchestrator.planning.plan import make_plan
from workers.engines.openai_engine import OpenAIEngine
from workers.storage import Store, open_store

PARENTS = Path(__file__).parents[2] / "jobs" / "examples" / "parents"
JOB = """
name: {name}
parents: {{{parent}: '{parents}/long', fmt: '{parents}/fmt'}}
recipe:
  merge_method: linear
  models: [{{model: {parent}, parameters: {{weight: "${{w}}"}}}}, {{model: fmt, parameters: {{weight: 1}}}}]
grid: {{points: [{{w: 1, name: '{point}'}}]}}
output: {output}
"""
ODD = (
    "../up",
    "..",
    ".",
    ".hidden",
    "a/b",
    "/absolute",
    "a\\b",
    "a b",
    "-option",
    "$HOME",
    "a;b",
    "a|b",
    "é",
    "x" * 300,
)


def job_text(name: str = "run", parent: str = "long", point: str = "p", output: object = "out") -> str:
    return JOB.format(name=name, parent=parent, point=point, output=output, parents=PARENTS)


def test_plain_names_are_taken() -> None:
    assert load_job(job_text(), "job.yaml").points[0].name == "p"


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("what", ["name", "parent", "point"])
def test_a_name_that_could_lead_elsewhere_is_refused_on_its_line(what: str, odd: str) -> None:
    with pytest.raises(BadInput, match=r"^job.yaml:\d+: "):
        load_job(job_text(**{what: odd}), "job.yaml")


@pytest.mark.parametrize("axis", ["../up", "a/b", ".."])
def test_a_word_of_an_axis_cannot_lead_elsewhere_either(axis: str) -> None:
    text = job_text().replace(
        "{points: [{w: 1, name: 'p'}]}", f"{{m: [linear, '{axis}'], w: [1]}}\npoint: '{{m}}{{w}}'"
    )
    with pytest.raises(BadInput, match=r"^job.yaml:\d+: "):
        load_job(text.replace("merge_method: linear", 'merge_method: "${m}"'), "job.yaml")


@pytest.mark.parametrize(
    "key", ["../out", "a/../../b", "/etc/passwd", "a//b", "a/./b", "a\\..\\b", "a\nb", "", "x" * 2000]
)
@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_no_key_leads_out_of_a_store(kind: str, key: str, tmp_path: Path) -> None:
    store: Store = open_store(tmp_path / "inside" if kind == "folder" else f"memory://{tmp_path}")
    for use in (store.read, store.locate, store.delete, store.upload, lambda key: store.write(key, b"x")):
        with pytest.raises(BadInput):
            use(key)
    assert list(tmp_path.rglob("*")) == []


def test_a_link_in_a_parents_folder_is_not_followed_out_of_it_by_its_index(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    (parent / "config.json").write_text("{}")
    for name in ("../secret.safetensors", "sub/../../secret.safetensors", "%2e%2e/secret.safetensors", "secret.bin"):
        (parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        text = job_text(output=tmp_path / "runs").replace(f"{PARENTS}/long", str(parent))
        with pytest.raises(BadInput, match="which is not a safetensors file beside it"):
            make_plan(load_job(text, "job.yaml"))


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/latest", "https://host/model", "ftp://host/x", "git+ssh://host/x"]
)
def test_a_parent_is_never_fetched_from_an_address(url: str) -> None:
    with pytest.raises(BadInput, match="unknown kind of storage"):
        make_plan(load_job(job_text().replace(f"{PARENTS}/long", url), "job.yaml"))


class Redirecting(BaseHTTPRequestHandler):
    """Sends everyone to `elsewhere`, and remembers who came with which key."""

    elsewhere, status = "", 307
    came: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.came.append((self.path, self.headers.get("Authorization")))
        self.send_response(self.status)
        self.send_header("Location", self.elsewhere)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def servers() -> Iterator[list[ThreadingHTTPServer]]:
    """Two servers; the first sends everyone to the second."""
    made: list[ThreadingHTTPServer] = []
    for _ in range(2):
        handler = type("Handler", (Redirecting,), {"came": []})
        made.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=made[-1].serve_forever, daemon=True).start()
    made[0].RequestHandlerClass.elsewhere = f"http://127.0.0.1:{made[1].server_port}/v1/models"  # pyright: ignore
    yield made
    for server in made:
        server.shutdown()
        server.server_close()


def test_a_server_cannot_send_us_and_our_key_elsewhere(
    servers: list[ThreadingHTTPServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{servers[0].server_port}/v1"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(MergeyardError, match="status 307"):
        OpenAIEngine(url, "m", PARENTS / "long")
    first, second = (server.RequestHandlerClass.came for server in servers)  # pyright: ignore
    assert first == [("/v1/models", "Bearer sk-planted")]
    assert second == []


@pytest.mark.parametrize("own", [None, "", "https://127.0.0.1:{port}/v1", "http://127.0.0.1:{port}/v2", "other port"])
def test_the_key_goes_to_the_server_that_the_environment_names_and_to_no_other(
    own: str | None, servers: list[ThreadingHTTPServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = servers
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    if own == "other port":
        own = f"http://127.0.0.1:{second.server_port}/v1"
    if own is not None:
        monkeypatch.setenv("OPENAI_BASE_URL", own.format(port=first.server_port))
    with pytest.raises(MergeyardError, match="status 307"):
        OpenAIEngine(f"http://127.0.0.1:{first.server_port}/v1", "m", PARENTS / "long")
    assert first.RequestHandlerClass.came == [("/v1/models", None)]  # pyright: ignore


def test_a_server_that_wants_a_key_is_refused_with_what_to_set(
    servers: list[ThreadingHTTPServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{servers[0].server_port}/v1"
    monkeypatch.setattr(servers[0].RequestHandlerClass, "status", 401)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(AccessDenied, match=f"; set OPENAI_BASE_URL={url} and OPENAI_API_KEY: the key goes there alone"):
        OpenAIEngine(url, "m", PARENTS / "long")
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(AccessDenied, match="is the key in OPENAI_API_KEY right"):
        OpenAIEngine(url, "m", PARENTS / "long")


METADATA = (
    "http://169.254.169.254/latest", "http://169.254.170.2/v2", "http://[fe80::a9fe]/v1",
    "http://[::ffff:169.254.169.254]/v1", "http://[fd00:ec2::254]/v1", "http://0xa9fea9fe/v1", "http://2852039166/v1",
)  # fmt: skip
"""The metadata services of clouds, as addresses are written in URLs; the last two are 169.254.169.254 as one number."""


@pytest.mark.parametrize("url", METADATA)
def test_no_server_is_asked_at_a_link_local_address(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("socket.socket.connect", lambda _, address: asked.append(address))
    with pytest.raises(BadInput, match="where a cloud keeps its machines' credentials; name a server of models"):
        OpenAIEngine(url, "m", PARENTS / "long")
    assert asked == []


@pytest.mark.parametrize("moment", ["when it is looked up", "when it is connected to"])
def test_a_name_that_means_a_link_local_address_is_not_asked(
    moment: str, servers: list[ThreadingHTTPServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names are told by stand-ins: no name server here tells such, and one may tell another each time."""
    port = servers[0].server_port
    if moment == "when it is looked up":
        told = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", port))]
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: told)
    else:
        monkeypatch.setattr("socket.socket.getpeername", lambda _: ("169.254.169.254", port))
    with pytest.raises(BadInput, match=r"leads to 169\.254\.169\.254"):
        OpenAIEngine(f"http://localhost:{port}/v1", "m", PARENTS / "long")
    assert servers[0].RequestHandlerClass.came == []  # pyright: ignore
