"""Azure Blob storage: the faults that the store survives, and a whole grid, on Azurite behind a proxy that fails."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.errors import AccessDenied, BucketMissing, ObjectChanged, ObjectExists, StorageRefused
from orchestrator.cli import main
from tests.azurite import ACCOUNT, KEY, Azurite
from tests.fault_proxy import FaultProxy
from workers.storage import Store, open_store
from workers.storage.probing import probe

MIB = 1 << 20
CONTENT = random.Random(3).randbytes(3 * MIB)
PARENTS = Path(__file__).parents[3] / "jobs/examples/parents"


@pytest.fixture
def proxy(azurite: Azurite, az_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    proxy = FaultProxy(azurite)
    proxy.start()
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"{proxy.endpoint}/{ACCOUNT}")
    monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "20")
    yield proxy
    proxy.stop()


@pytest.fixture
def store(proxy: FaultProxy, az_url: str) -> Store:
    return open_store(az_url)


@pytest.mark.parametrize("fault", ["busy", "reset", "truncate", "other_etag", "lost_answer"])
def test_a_read_survives(store: Store, proxy: FaultProxy, fault: str) -> None:
    etag = store.write("parent", CONTENT).etag
    proxy.fail("GET", fault)
    assert bytes(store.read("parent", start=MIB, length=MIB, etag=etag)) == CONTENT[MIB : 2 * MIB]
    assert proxy.broken == 1


@pytest.mark.parametrize("fault", ["busy", "reset", "lost_answer"])
def test_a_create_that_fails_on_its_way_still_wins(store: Store, proxy: FaultProxy, fault: str) -> None:
    proxy.fail("PUT", fault)
    written = store.write("receipt", b"mine", mode="create")
    assert (store.locate("receipt"), bytes(store.read("receipt"))) == (written, b"mine")
    with pytest.raises(ObjectExists):
        store.write("receipt", b"theirs", mode="create")


@pytest.mark.parametrize("fault", ["busy", "reset", "lost_answer"])
def test_a_swap_that_fails_on_its_way_still_wins(store: Store, proxy: FaultProxy, fault: str) -> None:
    first = store.write("pointer", b"epoch 1 nonce a")
    proxy.fail("PUT", fault)
    second = store.swap("pointer", b"epoch 2 nonce b", etag=first.etag)
    assert (store.locate("pointer"), bytes(store.read("pointer"))) == (second, b"epoch 2 nonce b")
    with pytest.raises(ObjectChanged):
        store.swap("pointer", b"epoch 2 nonce c", etag=first.etag)


@pytest.mark.parametrize(("fault", "key"), [("busy", "comp=block&"), ("reset", "comp=block&"), ("busy", "blocklist")])
def test_an_upload_survives(store: Store, proxy: FaultProxy, fault: str, key: str) -> None:
    proxy.fail("PUT", fault, key=key)
    with store.upload("shard") as upload:
        upload.write(CONTENT * 12)
        committed = upload.commit()
    assert proxy.broken == 1
    assert bytes(store.read("shard", etag=committed.etag)) == CONTENT * 12


def test_the_tag_of_a_listing_is_that_of_the_object(store: Store) -> None:
    written = store.write("name", b"x")
    (listed,) = store.list()
    assert listed == written == store.locate("name")
    assert bytes(store.read("name", etag=listed.etag)) == b"x"


def test_a_container_keeps_every_promise(az_url: str) -> None:
    assert [finding for finding in probe(az_url) if finding.trouble] == []
    assert list(open_store(az_url).list()) == []


def test_the_remedies_of_a_missing_container_and_of_a_wrong_key(az_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BucketMissing, match="create it or correct the URL"):
        open_store("az://not-there/run").read("name")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "AAAA")
    with pytest.raises(AccessDenied, match=r"AuthorizationFailure: .*; set AZURE_STORAGE_ACCOUNT_NAME"):
        open_store(az_url).write("name", b"x")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    open_store(az_url).write("name", b"x")


def test_the_remedy_of_an_endpoint_without_tls(azurite: Azurite, az_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "1")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azurite.endpoint.replace("http://", "https://"))
    with pytest.raises(StorageRefused, match="does not speak TLS; write http:// in AZURE_STORAGE_ENDPOINT"):
        open_store(az_url).write("name", b"x")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azurite.endpoint)
    open_store(az_url).write("name", b"x")


def test_a_grid_is_merged_resumed_and_verified(az_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text(
        f"name: t\nparents: {{long: {PARENTS}/long, fmt: {PARENTS}/fmt}}\n"
        "recipe: {merge_method: linear, dtype: bfloat16, models: [{model: long, parameters: {weight: '${w}'}},"
        " {model: fmt, parameters: {weight: '${1 - w}'}}]}\n"
        f"grid: {{w: [0.25, 0.5, 0.75]}}\noutput: {az_url}\n"
    )
    assert main(["run", str(tmp_path / "job.yaml"), "--in-process"]) == 0
    assert "(3 shards merged, " in capsys.readouterr().out
    store = open_store(f"{az_url}/t")
    store.delete("points/w0.5/manifest.json")
    (shard,) = [info.key for info in store.list("points/w0.75/") if info.key.endswith(".safetensors")]
    store.delete(shard)
    assert main(["run", str(tmp_path / "job.yaml"), "--in-process"]) == 0
    assert "(1 shard merged, 2 found done" in capsys.readouterr().out
    assert main(["verify", f"{az_url}/t"]) == 0
