"""Reading from the hub: pinned to a commit, by ranges, with the token kept to the hub itself."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import snapshot_download

from jobs.errors import (
    AccessDenied,
    BadInput,
    CorruptData,
    ObjectChanged,
    ObjectMissing,
    StorageError,
    StorageRefused,
    StorageUnavailable,
)
from tests.certificates import encrypt
from tests.hub_server import COMMIT, HubServer, etag_of
from workers.storage import ObjectInfo, open_store

WEIGHTS = random.Random(5).randbytes(20 << 20)
FILES = {
    "config.json": b'{"model_type": "qwen2"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}" * 2000,
    "extra/notes.md": b"notes",
    "empty.txt": b"",
}
OTHER_COMMIT = "beef" * 10


@pytest.fixture(autouse=True)
def published(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "3")
    hub_server.publish("someone/cos", FILES)
    return hub_server


def test_a_range_costs_its_own_bytes_and_no_more(hub_server: HubServer) -> None:
    store = open_store("hf://someone/cos@main")
    etag = store.locate("model.safetensors").etag
    assert bytes(store.read("model.safetensors", start=1000, length=5000, etag=etag)) == WEIGHTS[1000:6000]
    content_requests = [request for request in hub_server.requests if request[0] == "cdn"]
    assert len(content_requests) == 1
    assert hub_server.served < 5000 + 200  # the 5,000 bytes and the answer that names the commit


def test_a_long_read_is_whole_and_asks_the_hub_once(hub_server: HubServer) -> None:
    store = open_store("hf://someone/cos")
    buffer = bytearray(len(WEIGHTS) - 3)
    store.read_into("model.safetensors", memoryview(buffer), start=3)
    assert buffer == WEIGHTS[3:]
    assert bytes(store.read("model.safetensors")) == WEIGHTS
    assert sum("/resolve/" in path for _, _, path in hub_server.requests) == 1


def test_small_and_empty_files_come_from_the_hub_itself() -> None:
    store = open_store("hf://someone/cos")
    assert bytes(store.read("config.json")) == FILES["config.json"]
    assert bytes(store.read("config.json", start=2, length=10)) == FILES["config.json"][2:12]
    assert bytes(store.read("empty.txt")) == b""


def test_list_gives_every_file_with_the_size_and_etag_of_locate() -> None:
    store = open_store("hf://someone/cos")
    expected = {ObjectInfo(name, len(content), etag_of(content)) for name, content in FILES.items()}
    assert set(store.list()) == expected
    assert {store.locate(name) for name in FILES} == expected
    assert [info.key for info in store.list("model")] == ["model.safetensors"]
    assert [info.key for info in store.list("extra/")] == ["extra/notes.md"]
    assert list(store.list("nowhere/")) == []


def test_a_folder_of_a_repository_is_a_store() -> None:
    store = open_store("hf://someone/cos@main/extra")
    assert [info.key for info in store.list()] == ["notes.md"]
    assert bytes(store.read("notes.md")) == b"notes"
    assert store.pinned_url == f"hf://someone/cos@{COMMIT}/extra"


def test_a_dataset_is_a_repository_of_its_own(hub_server: HubServer) -> None:
    hub_server.publish(
        "datasets/someone/cos", {"dev.json": b"{}", "more/big.bin": WEIGHTS[:20_000]}, commit=OTHER_COMMIT
    )
    store = open_store("hf://datasets/someone/cos@main")
    assert store.pinned_url == f"hf://datasets/someone/cos@{OTHER_COMMIT}"
    assert sorted(info.key for info in store.list()) == ["dev.json", "more/big.bin"]
    assert bytes(store.read("dev.json")) == b"{}"
    assert bytes(open_store("hf://datasets/someone/cos/more").read("big.bin", start=9, length=99)) == WEIGHTS[9:108]
    assert bytes(open_store("hf://someone/cos").read("config.json")) == FILES["config.json"], "the model of that name"
    with pytest.raises(ObjectMissing, match="hf://datasets/someone/absent: there is no such repository"):
        open_store("hf://datasets/someone/absent").locate("dev.json")


def test_the_commit_is_pinned_on_first_use(hub_server: HubServer) -> None:
    store = open_store("hf://someone/cos@main")
    assert store.pinned_url == f"hf://someone/cos@{COMMIT}"
    hub_server.publish("someone/cos", {"config.json": b"changed"}, commit=OTHER_COMMIT)
    assert bytes(store.read("config.json")) == FILES["config.json"]
    assert bytes(open_store(store.pinned_url).read("config.json")) == FILES["config.json"]
    assert bytes(open_store("hf://someone/cos@main").read("config.json")) == b"changed"


def test_a_pull_request_is_a_revision(hub_server: HubServer) -> None:
    hub_server.publish("someone/cos", {"config.json": b"pr"}, branch="refs/pr/3", commit=OTHER_COMMIT)
    for url in ("hf://someone/cos@refs/pr/3", "hf://someone/cos@refs%2Fpr%2F3"):
        assert bytes(open_store(url).read("config.json")) == b"pr"


def test_another_version_than_the_pinned_one_is_refused() -> None:
    with pytest.raises(ObjectChanged, match=r"model\.safetensors is not the version"):
        open_store("hf://someone/cos").read("model.safetensors", etag="0" * 64)


def test_a_range_past_the_end_is_refused() -> None:
    with pytest.raises(CorruptData, match="23 bytes"):
        open_store("hf://someone/cos").read("config.json", start=20, length=4)


def test_the_token_goes_to_the_hub_and_never_to_the_cdn(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_server.publish("someone/private", FILES).token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert bytes(open_store("hf://someone/private").read("model.safetensors", length=100)) == WEIGHTS[:100]
    assert bytes(open_store("hf://someone/private").read("config.json")) == FILES["config.json"]
    assert hub_server.leaked_tokens == []


@pytest.mark.parametrize("fault", ["busy", "truncate", "ignore_range"])
def test_a_cdn_that_fails_is_asked_again(hub_server: HubServer, fault: str) -> None:
    hub_server.cdn_faults = [fault, fault]
    assert bytes(open_store("hf://someone/cos").read("model.safetensors", start=7, length=3000)) == WEIGHTS[7:3007]
    assert hub_server.cdn_faults == []


def test_an_expired_address_is_asked_for_again(hub_server: HubServer) -> None:
    store = open_store("hf://someone/cos")
    store.read("model.safetensors", length=10)
    hub_server.signature += 1
    assert bytes(store.read("model.safetensors", start=5, length=10)) == WEIGHTS[5:15]


def test_a_gated_repository_names_its_terms(hub_server: HubServer) -> None:
    gated = hub_server.publish("someone/gated", FILES)
    gated.gated, gated.token = True, "hf_secret"
    with pytest.raises(
        AccessDenied, match=r"accept the terms at http://127.0.0.1:\d+/someone/gated and log in with `hf auth login`"
    ):
        open_store("hf://someone/gated").locate("config.json")


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ObjectMissing, match="hf://someone/absent: there is no such repository"):
        list(open_store("hf://someone/absent").list())
    with pytest.raises(ObjectMissing, match="there is no revision 'v9'"):
        open_store("hf://someone/cos@v9").locate("config.json")
    with pytest.raises(ObjectMissing, match=r"hf://someone/cos/absent\.json does not exist"):
        open_store("hf://someone/cos").read("absent.json")


def test_a_hub_that_is_down_ends_in_one_line(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "0.5")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    told = r"hf://someone/cos: the hub at http://127.0.0.1:9 cannot be reached \(tried"
    with pytest.raises(StorageUnavailable, match=told):
        open_store("hf://someone/cos").locate("config.json")


BUSY = [
    ("/revision/", 429, {"Retry-After": "1"}),
    ("/tree/", 503, {"Retry-After": "1"}),
    ("/resolve/", 429, {"RateLimit": '"api";r=0;t=1', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}),
]


@pytest.mark.parametrize(("path", "status", "headers"), BUSY)
def test_a_busy_hub_is_given_the_pause_that_it_asks_for(
    hub_server: HubServer, path: str, status: int, headers: dict[str, str]
) -> None:
    hub_server.read_faults = [(path, lambda hub: hub.answer(status, headers))]  # a second time it would answer
    began = time.monotonic()
    store = open_store("hf://someone/cos")
    assert len(list(store.list())) == len(FILES) and bytes(store.read("config.json")) == FILES["config.json"]
    assert time.monotonic() - began >= 1


@pytest.mark.parametrize("path", ["/revision/", "/tree/", "/resolve/"])
def test_a_pause_beyond_patience_ends_the_command_and_is_named(hub_server: HubServer, path: str) -> None:
    hub_server.read_faults = [(path, lambda hub: hub.answer(429, {"Retry-After": "300"}, b'{"error": "slow down"}'))]
    with pytest.raises(StorageUnavailable, match=r"answers 429.* \(tried 1 times .*\); run again in 300 s, as it asks"):
        store = open_store("hf://someone/cos")
        list(store.list())
        store.read("config.json")


STRANGE: dict[str, bytes] = {
    "cut": b'{"sha": "c0', "deep": b"[" * 200_000, "surrogate": b'{"sha": "\\ud800"}', "number": b"7", "null": b"null",
    "another sha": b'{"sha": "../.."}', "no size": b'[{"type": "file", "path": "x"}]', "latin": b'{"\xff": 1}',
    "below zero": b'[{"type": "file", "path": "x", "size": -1, "oid": "0"}]', "no path": b'[{"type": "file"}]',
}  # fmt: skip


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("path", ["/revision/", "/tree/"])
def test_an_answer_that_is_not_the_hubs_is_asked_for_again(
    hub_server: HubServer, monkeypatch: pytest.MonkeyPatch, path: str, kind: str
) -> None:
    def answer(hub: Any) -> None:
        hub.answer(200, {}, STRANGE[kind])

    hub_server.read_faults = [(path, answer)] * 2
    assert len(list(open_store("hf://someone/cos").list())) == len(FILES)
    monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "0.1")
    hub_server.read_faults = [(path, answer)] * 99
    with pytest.raises(StorageUnavailable, match="run again later"):
        list(open_store("hf://someone/cos").list())


def test_an_answer_without_end_is_given_up(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "1")

    def trickle(hub: Any) -> None:
        hub.send_response(200)
        hub.end_headers()
        with suppress(OSError):
            while hub.hub.read_faults:
                hub.wfile.write(b" ")
                time.sleep(0.05)

    def flood(hub: Any) -> None:
        hub.send_response(200)
        hub.end_headers()
        with suppress(OSError):
            while True:
                hub.wfile.write(b" " * (1 << 20))

    for answer in (trickle, flood):
        hub_server.read_faults = [("/revision/", answer)] * 99
        began = time.monotonic()
        with pytest.raises(StorageUnavailable, match="the answer is too long"):
            open_store("hf://someone/cos").locate("config.json")
        assert time.monotonic() - began < 8
        hub_server.read_faults.clear()


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, AccessDenied, r'access denied \(401: "your plan .*"\); log in with `hf auth login` or set HF_TOKEN'),
        (403, AccessDenied, r'access denied \(403: "your plan .*"\); log in with `hf auth login` or set HF_TOKEN'),
        (501, StorageRefused, r'the hub refused with 501: "your plan \\u001b\[2J ends here"'),
        (451, StorageRefused, r'the hub refused with 451: "your plan'),
    ],
)
def test_a_refusal_is_passed_on_in_the_hubs_words_and_not_repeated(
    hub_server: HubServer, status: int, error: type[StorageError], words: str
) -> None:
    body = b'{"error": "your plan \\u001b[2J\\nends here"}'
    hub_server.read_faults = [("/revision/", lambda hub: hub.answer(status, {}, body))] * 9
    with pytest.raises(error, match=words) as caught:
        open_store("hf://someone/cos").locate("config.json")
    assert len(hub_server.requests) == 1 and str(caught.value).isprintable()


@pytest.mark.parametrize("body", [b"[1]", b"7", b'{"error": \xff}', b"[" * 200_000, b"<title>gateway</title>"])
def test_a_status_counts_whatever_the_body_is(hub_server: HubServer, body: bytes) -> None:
    hub_server.read_faults = [("/revision/", lambda hub: hub.answer(500, {}, body))]
    assert bytes(open_store("hf://someone/cos").read("config.json")) == FILES["config.json"]
    hub_server.read_faults = [("/revision/", lambda hub: hub.answer(501, {}, body))]
    with pytest.raises(StorageRefused, match="the hub refused with 501"):
        open_store("hf://someone/cos").locate("config.json")


def test_a_cdn_that_refuses_a_new_address_too_is_not_asked_for_a_minute(hub_server: HubServer) -> None:
    hub_server.cdn_faults = ["refuse"] * 9
    with pytest.raises(AccessDenied, match=r'403 from 127.0.0.1: "not from this network"; download the repository'):
        open_store("hf://someone/cos").read("model.safetensors", length=100)
    assert len(hub_server.cdn_faults) == 7


def test_a_cdn_that_sends_more_than_was_asked_for_is_asked_again(hub_server: HubServer) -> None:
    hub_server.cdn_faults = ["endless"]
    assert bytes(open_store("hf://someone/cos").read("model.safetensors", start=5, length=10)) == WEIGHTS[5:15]


def test_an_untrusted_certificate_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    encrypt(server, tmp_path)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"https://127.0.0.1:{server.server_port}")
    began = time.monotonic()
    with pytest.raises(StorageRefused, match=r"not trusted \(self.signed certificate\); .* SSL_CERT_FILE"):
        open_store("hf://someone/cos").locate("config.json")
    assert time.monotonic() - began < 2
    server.shutdown()
    server.server_close()


def test_nothing_is_written_to_the_hub() -> None:
    store = open_store("hf://someone/cos")
    for write in (
        lambda: store.write("a", b""),
        lambda: store.swap("a", b"", etag="x"),
        lambda: store.upload("a"),
        lambda: store.delete("a"),
        store.sweep,
    ):
        with pytest.raises(BadInput, match="can only be read"):
            write()


@pytest.mark.parametrize("url", ["hf://", "hf:///name", "hf://name", "hf://a/b@", "hf://a/b@main/../c", "hf://a b/c"])
def test_a_malformed_hub_url_is_refused(url: str) -> None:
    with pytest.raises(BadInput):
        open_store(url)


@pytest.mark.parametrize("url", ["hf://someone/cos@feature/x/extra", "hf://someone/cos@feature%2Fx/extra"])
def test_a_branch_may_have_slashes(hub_server: HubServer, url: str) -> None:
    hub_server.publish("someone/cos", FILES, branch="feature/x", commit=OTHER_COMMIT)
    store = open_store(url)
    assert [info.key for info in store.list()] == ["notes.md"]
    assert bytes(store.read("notes.md")) == b"notes"
    assert store.pinned_url == f"hf://someone/cos@{OTHER_COMMIT}/extra"
    with pytest.raises(ObjectMissing, match="there is no revision 'no'"):
        list(open_store("hf://someone/cos@no/such/branch").list())


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("https://huggingface.co/org/name", "hf://org/name"),
        ("https://hf.co/org/name/?library=transformers#usage", "hf://org/name"),
        ("https://huggingface.co/org/name/tree/main", "hf://org/name@main"),
        ("https://huggingface.co/org/name/tree/v1/folder", "hf://org/name@v1/folder"),
        ("https://huggingface.co/org/name/tree/feature%2Fx", "hf://org/name@feature/x"),
        ("https://huggingface.co/org/name/blob/main/model.safetensors", "hf://org/name@main"),
        ("https://huggingface.co/org/name/discussions/3", "hf://org/name"),
        (f"https://huggingface.co/org/name/commit/{COMMIT}", f"hf://org/name@{COMMIT}"),
        ("https://huggingface.co/datasets/org/name/tree/main", "hf://datasets/org/name@main"),
        ("hf://models/org/name", "hf://models/org/name"),
    ],
)
def test_a_page_of_the_hub_is_its_repository(address: str, url: str) -> None:
    assert open_store(address).url == url


def test_other_pages_are_refused() -> None:
    for page in ("https://huggingface.co/spaces/org/name", "https://huggingface.co/models", "https://example.com/a/b"):
        with pytest.raises(BadInput, match="unknown kind of storage https://"):
            open_store(page)
    with pytest.raises(BadInput, match="other kinds of repositories"):
        open_store("hf://spaces/org/name")


@pytest.fixture
def cached(hub_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of huggingface_hub with all of hf://someone/cos, downloaded from the stand-in."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_server.publish("someone/cos", {**FILES, "model.safetensors": WEIGHTS[:50_000]})
    snapshot_download("someone/cos", endpoint=hub_server.endpoint, cache_dir=tmp_path / "hub")
    return tmp_path / "hub"


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("how", ["variable", "no network"])
@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_whole_snapshot_in_the_cache_is_read_offline(
    how: str, revision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = open_store(f"hf://someone/cos{revision}")
    expected = {info.key: info for info in online.list()}
    if how == "variable":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "0.3")
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    offline = open_store(f"hf://someone/cos{revision}")
    assert bytes(offline.read("model.safetensors", start=7, length=9)) == WEIGHTS[7:16]
    assert {info.key: info for info in offline.list()} == expected
    assert offline.pinned_url == online.pinned_url
    with pytest.raises(ObjectMissing, match=r"absent\.json does not exist"):
        offline.locate("absent.json")
    assert [info.key for info in open_store(f"hf://someone/cos{revision or '@main'}/extra").list()] == ["notes.md"]


def test_a_snapshot_that_is_not_whole_is_refused_offline(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    next(cached.glob("*/snapshots/*/tokenizer.json")).unlink()
    for url in ("hf://someone/cos", "hf://someone/other"):
        with pytest.raises(BadInput, match="does not have all of this revision; unset it, or run `hf download someone"):
            open_store(url).locate("config.json")
