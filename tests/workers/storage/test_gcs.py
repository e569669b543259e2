"""GCS: the faults that the store survives, and a whole grid, on fake-gcs-server behind a proxy that fails."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs import stopping
from jobs.errors import ObjectChanged, ObjectExists, StorageRefused, StorageUnavailable
from orchestrator.cli import main
from tests.fault_proxy import FaultProxy
from tests.gcs_server import SMALLEST_PART, GcsServer
from tests.orchestrator.scripts import scripted, turned_down
from workers.storage import Store, open_store
from workers.storage.probing import probe

MIB = 1 << 20
CONTENT = random.Random(3).randbytes(3 * MIB)
PARENTS = Path(__file__).parents[3] / "jobs/examples/parents"


@pytest.fixture
def proxy(gcs_server: GcsServer, gs_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    proxy = FaultProxy(gcs_server)
    proxy.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.endpoint)
    monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "20")
    monkeypatch.setattr("workers.storage.cloud.STREAMED_PART_BYTES", SMALLEST_PART)
    yield proxy
    proxy.stop()


@pytest.fixture
def store(proxy: FaultProxy, gs_url: str) -> Store:
    return open_store(gs_url)


@pytest.mark.parametrize("fault", ["busy", "reset", "truncate", "other_etag", "lost_answer"])
def test_a_read_survives(store: Store, proxy: FaultProxy, fault: str) -> None:
    etag = store.write("parent", CONTENT).etag
    proxy.fail("GET", fault)
    assert bytes(store.read("parent", start=MIB, length=MIB, etag=etag)) == CONTENT[MIB : 2 * MIB]
    assert proxy.broken == 1


def test_a_request_is_not_tried_again_once_the_program_is_stopped(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "stopped", True)
    proxy.fail("GET", "busy", times=100)
    with pytest.raises(StorageUnavailable):
        store.read("parent")
    assert proxy.broken == 1


@pytest.mark.parametrize("fault", ["busy", "reset", "lost_answer"])
def test_a_create_that_fails_on_its_way_still_wins(store: Store, proxy: FaultProxy, fault: str) -> None:
    proxy.fail("PUT", fault)
    written = store.write("receipt", b"mine", mode="create")
    assert (store.locate("receipt"), bytes(store.read("receipt"))) == (written, b"mine")
    with pytest.raises(ObjectExists):
        store.write("receipt", b"theirs", mode="create")
    assert proxy.broken == 1


@pytest.mark.parametrize("method", ["HEAD", "PUT"])
@pytest.mark.parametrize("fault", ["busy", "reset", "lost_answer"])
def test_a_swap_that_fails_on_its_way_still_wins(store: Store, proxy: FaultProxy, method: str, fault: str) -> None:
    first = store.write("pointer", b"epoch 1 nonce a")
    proxy.fail(method, fault)
    second = store.swap("pointer", b"epoch 2 nonce b", etag=first.etag)
    assert (store.locate("pointer"), bytes(store.read("pointer"))) == (second, b"epoch 2 nonce b")
    with pytest.raises(ObjectChanged):
        store.swap("pointer", b"epoch 2 nonce c", etag=first.etag)
    assert proxy.broken == 1


def test_a_writer_between_the_question_and_the_swap_wins(store: Store, proxy: FaultProxy, gs_url: str) -> None:
    """The ETag is still the old one when the store asks for the generation: only the server can refuse the write."""
    first = store.write("pointer", b"epoch 1 nonce a")
    proxy.fail("PUT", "hold")
    with ThreadPoolExecutor(1) as pool:
        swap = pool.submit(store.swap, "pointer", b"epoch 2 nonce b", etag=first.etag)
        while proxy.broken == 0:
            time.sleep(0.01)
        theirs = store.write("pointer", b"epoch 2 nonce c")
        proxy.heal()
        with pytest.raises(ObjectChanged):
            swap.result()
    assert bytes(store.read("pointer", etag=theirs.etag)) == b"epoch 2 nonce c"


@pytest.mark.parametrize(
    ("method", "fault", "key"),
    [
        ("POST", "busy", "uploads"),
        ("PUT", "busy", "partNumber=1&"),
        ("PUT", "lost_answer", "partNumber=2&"),
        ("POST", "busy", "uploadId"),
        ("POST", "lost_answer", "uploadId"),
    ],
)
def test_an_upload_survives(
    store: Store, proxy: FaultProxy, gcs_server: GcsServer, method: str, fault: str, key: str
) -> None:
    proxy.fail(method, fault, key=key)
    with store.upload("shard") as upload:
        upload.write(CONTENT * 2)
        committed = upload.commit()
    assert proxy.broken == 1
    assert bytes(store.read("shard", etag=committed.etag)) == CONTENT * 2
    assert gcs_server.uploads == {}


def test_an_upload_that_the_service_has_dropped_is_begun_anew(store: Store, proxy: FaultProxy) -> None:
    """By a lifecycle rule, for example. An object of equal length from another writer is not taken for this one."""
    store.write("shard", CONTENT * 2)
    proxy.fail("POST", "no_such_upload", key="uploadId")
    with pytest.raises(StorageUnavailable, match="run again"), store.upload("shard") as upload:
        upload.write(bytes(len(CONTENT) * 2))
        upload.commit()
    assert bytes(store.read("shard")) == CONTENT * 2


def test_an_aborted_upload_leaves_no_part(store: Store, proxy: FaultProxy, gcs_server: GcsServer) -> None:
    with pytest.raises(KeyError), store.upload("shard") as upload:
        upload.write(CONTENT * 4)
        raise KeyError("the caller failed")
    assert "DELETE" in [method for method, path in proxy.requests if "uploadId" in path]
    assert gcs_server.uploads == {}


def test_a_listing_goes_on_behind_its_last_page(
    store: Store, proxy: FaultProxy, gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs_server, "page", 3)
    written = [store.write(f"points/{number}", b"%d" % number) for number in range(8)]
    proxy.fail("GET", "truncate", key="continuation-token")
    assert list(store.list("points/")) == written
    assert bytes(store.read("points/7", etag=written[7].etag)) == b"7"
    assert proxy.broken == 1


def test_whether_a_bucket_can_be_written_is_asked_by_a_write(store: Store, proxy: FaultProxy) -> None:
    store.check_writable()
    assert [method for method, _ in proxy.requests] == ["PUT"]


def test_a_bucket_keeps_every_promise(gs_url: str) -> None:
    assert [finding for finding in probe(gs_url) if finding.trouble] == []
    assert list(open_store(gs_url).list()) == []


def test_no_real_token_goes_to_an_emulator(gcs_server: GcsServer, gs_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gcs_server.tokens.clear()
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "real")
    open_store(gs_url).write("name", b"x")
    assert bytes(open_store(gs_url).read("name")) == b"x"
    assert gcs_server.tokens == {"Bearer emulator"}


def test_the_remedy_of_an_emulator_without_tls(
    gcs_server: GcsServer, gs_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "1")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.endpoint.replace("http://", "https://"))
    with pytest.raises(StorageRefused, match="does not speak TLS; write http:// in STORAGE_EMULATOR_HOST"):
        open_store(gs_url).write("name", b"x")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.endpoint.removeprefix("http://"))
    open_store(gs_url).write("name", b"x")


def test_a_grid_is_merged_evaluated_resumed_and_verified(
    gs_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text(
        f"name: t\nparents: {{long: {PARENTS}/long, fmt: {PARENTS}/fmt}}\n"
        "recipe: {merge_method: linear, dtype: bfloat16, models: [{model: long, parameters: {weight: '${w}'}},"
        " {model: fmt, parameters: {weight: '${1 - w}'}}]}\n"
        f"grid: {{w: [0.25, 0.5, 0.75]}}\noutput: {gs_url}\n"
        "evaluate: {ruler: {tasks: [niah_single_1], lengths: [256], items: 4}}\n"
    )
    command = ["run", str(tmp_path / "job.yaml"), "--in-process"]
    with scripted(turned_down):
        assert main(command) == 0
        printed = capsys.readouterr()
        assert "(3 shards merged, " in printed.out and "evaluating 5 models" in printed.out + printed.err
        store = open_store(f"{gs_url}/t")
        store.delete("points/w0.5/manifest.json")
        (shard,) = [info.key for info in store.list("points/w0.75/") if info.key.endswith(".safetensors")]
        store.delete(shard)
        assert main(command) == 0
        printed = capsys.readouterr()
        assert "(1 shard merged, 2 found done" in printed.out and "evaluating" not in printed.out + printed.err
    assert main(["verify", f"{gs_url}/t"]) == 0
