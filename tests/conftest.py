"""Fixtures for every suite: a real S3 server, a fresh place on it, a proxy that misbehaves, a stand-in for the hub."""

from __future__ import annotations

import gc
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from socketserver import BaseServer, StreamRequestHandler
from typing import Any

import pytest

from tests.azurite import ACCOUNT, KEY, Azurite, azurite_binary
from tests.fault_proxy import FaultProxy
from tests.gcs_server import GcsServer, gcs_binary
from tests.hub_server import HubServer
from tests.quirky_s3 import QuirkyS3
from tests.seaweedfs import SeaweedFS
from tests.selection import (  # noqa: F401  pytest looks for its hooks here
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_protocol,
    pytest_xdist_make_scheduler,
)

BUCKET = "tests"


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Compiles the loops of merges, which takes 14 s of CPU time once, before a quick test is timed."""
    if session.config.getoption("markexpr") == "quick":
        from tests.workers.methods.kernels.room import of_room

        for kernel in of_room():
            kernel.object_code()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Spares Python from looking again and again for garbage among the libraries and the tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting() -> Iterator[None]:
    """Stores do not wait until a disk has their files, 5 ms each, as no test here survives a loss of power. A server
    of Python's library ends within 20 ms, not 500, of its `shutdown()`, and sends its answer's head and body at once,
    not 40 ms apart. A request to a store is first repeated after 10 ms, not 100."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(BaseServer.serve_forever, "__defaults__", (0.02,))
        patch.setattr(StreamRequestHandler, "disable_nagle_algorithm", True)
        patch.setattr("workers.storage.retrying.FIRST_PAUSE_SECONDS", 0.01)
        yield


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A running SeaweedFS with `.endpoint`, `.access_key`, `.secret_key`, `.client()`, `.kill()`, `.restart()`.

    A test that kills it must restart it: the whole session shares one server.
    """
    server = SeaweedFS(tmp_path_factory.mktemp("seaweedfs"))
    server.start()
    server.client().create_bucket(Bucket=BUCKET)
    yield server
    server.kill()


@pytest.fixture
def s3_environment(s3_server: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> SeaweedFS:
    """The server, with the environment pointing every S3 client of this process and its children to it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    return s3_server


@pytest.fixture
def s3_url(s3_environment: SeaweedFS) -> str:
    """A fresh, empty `s3://bucket/prefix` on the server."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def fault_proxy(s3_environment: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the S3 server, with the environment pointing to it; `.fail(method, what, times=, key=)`."""
    proxy = FaultProxy(s3_environment)
    proxy.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.stop()


@pytest.fixture(scope="session")
def azurite() -> Iterator[Azurite]:
    """A running Azure Blob server with the container `BUCKET`."""
    binary = azurite_binary()
    if binary is None:
        pytest.skip("no azurite-blob; `make azurite` installs it")
    server = Azurite(binary)
    server.start()
    server.create_container(BUCKET)
    yield server
    server.stop()


@pytest.fixture
def az_url(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh, empty `az://container/prefix`, with the environment pointing to its server."""
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azurite.endpoint)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    return f"az://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[GcsServer]:
    """A running GCS server with the bucket `BUCKET`."""
    binary = gcs_binary()
    if binary is None:
        pytest.skip("fake-gcs-server has no program for this machine")
    server = GcsServer(binary)
    server.start()
    server.create_bucket(BUCKET)
    yield server
    server.stop()


@pytest.fixture
def gs_url(gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh, empty `gs://bucket/prefix`, with the environment pointing to its server."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.endpoint)
    return f"gs://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def quirky_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[QuirkyS3]:
    """An S3 in memory that refuses and ignores on order, with an environment that has nothing but it and two keys."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    server = QuirkyS3()
    server.start()
    for name, value in {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "testsecret",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "AWS_CONFIG_FILE": "/nonexistent",
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.stop()


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """An empty stand-in for the hub, with HF_ENDPOINT pointing to it and no user logged in; `.publish(name, files)`."""
    server = HubServer()
    server.start()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.stop()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The GPU that is not there, as the device `card`: its counters, and torch's module of it."""
    import torch

    from tests.stand_in_gpu import CARD, pinning_empty

    monkeypatch.setattr(torch, "empty", pinning_empty)
    CARD.begin()
    return CARD


@pytest.fixture(scope="session")
def harness_index() -> Iterator[None]:
    """lm-evaluation-harness reads its 14,000 files of tasks once a session, not at every call, which takes 7 s."""
    from lm_eval.tasks._index import TaskIndex

    build, known = TaskIndex.build, dict[tuple[Path, ...], dict[str, Any]]()

    def built(paths: list[Path]) -> dict[str, Any]:
        key = tuple(paths)
        if key not in known:
            known[key] = build(paths)
        return dict(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(built))
        yield
