"""Every remedy in an error of the stores, followed: the same request then succeeds."""

from __future__ import annotations

import ast
import errno
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

import jobs.errors
from jobs.errors import (
    AccessDenied,
    BadInput,
    BucketMissing,
    MergeyardError,
    ObjectChanged,
    StorageError,
    StorageRefused,
    StorageUnavailable,
)
from tests.conftest import BUCKET as REAL_BUCKET
from tests.quirky_s3 import BUCKET, Asked, QuirkyS3, Refusal, company_certificates
from tests.seaweedfs import SeaweedFS
from workers.storage import open_store, translation
from workers.storage.probing import probe
from workers.storage.translation import CREDENTIALS

STORAGE = Path(translation.__file__).parent
URL = f"s3://{BUCKET}/runs"
Refuse = Callable[[Asked], Refusal | None]
Setenv = pytest.MonkeyPatch


def use(url: str = URL) -> None:
    """What a run does first: a HEAD, a small write, a read, a listing."""
    store = open_store(url)
    store.write("name", b"x")
    assert store.locate("name").size == 1
    assert bytes(store.read("name")) == b"x"
    assert "name" in [info.key for info in store.list()]


def unless(allowed: Callable[[Asked], bool], status: int, code: str, message: str, **header: str) -> Refuse:
    """Refuses every request that is not allowed; a header's name has `_` for `-`."""
    headers = {name.replace("_", "-"): value for name, value in header.items()}
    return lambda asked: None if allowed(asked) else (status, code, message, headers)


def has(name: str, part: str = "") -> Callable[[Asked], bool]:
    """Whether a request has this header, with this in it."""
    return lambda asked: part in asked.headers.get(name, "") if part else name in asked.headers


def refused(kind: type[MergeyardError], *said: str, url: str = URL) -> str:
    """The error of kind `kind` and exit code 2 in one line, at once, for a HEAD and for a write."""
    for request in (
        lambda: open_store(url).locate("name"),
        lambda: open_store(url).write("name", b"x"),
    ):
        began = time.monotonic()
        with pytest.raises(kind) as refusal:
            request()
        text = str(refusal.value)
        assert refusal.value.exit_code == 2
        assert [part for part in said if part not in text] == [], text
        assert "\n" not in text and "testsecret" not in text
        assert time.monotonic() - began < 5
    return text


# ---- S3: each reason has its own remedy, and the service's own words


def test_expired_credentials(quirky_s3: QuirkyS3, monkeypatch: Setenv) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "old")
    quirky_s3.refuse = unless(
        lambda asked: asked.headers["x-amz-security-token"] == "new",
        *(400, "ExpiredToken", "The provided token has expired."),
    )
    refused(AccessDenied, "the credentials have expired", "400 ExpiredToken: The provided token", "log in again")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "new")
    use()


def test_a_clock_that_is_wrong(quirky_s3: QuirkyS3) -> None:
    ahead = 3600.0

    def on_time(asked: Asked) -> bool:
        sent = datetime.strptime(asked.headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        return abs(time.time() + ahead - sent.timestamp()) < 900

    quirky_s3.refuse = unless(on_time, 403, "RequestTimeTooSkewed", "The difference is too large.")
    refused(AccessDenied, "this machine's clock is wrong", "The difference is too large.", "timedatectl set-ntp true")
    ahead = 0.0  # the two clocks agree
    use()


@pytest.mark.parametrize(
    ("status", "code", "message", "header"),
    [
        (301, "PermanentRedirect", "", {"x_amz_bucket_region": "eu-west-1"}),
        (400, "AuthorizationHeaderMalformed", "the region is wrong; expecting 'eu-west-1'", {}),
        (400, "AuthorizationHeaderMalformed", "", {"x_amz_bucket_region": "eu-west-1"}),
    ],
)
def test_a_bucket_in_another_region(
    quirky_s3: QuirkyS3, monkeypatch: Setenv, status: int, code: str, message: str, header: dict[str, str]
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")  # which would win over AWS_REGION in boto3 alone
    quirky_s3.refuse = unless(has("authorization", "/eu-west-1/"), status, code, message, **header)
    refused(StorageRefused, "the bucket is in another region", "set AWS_REGION=eu-west-1")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    use()


def test_a_service_that_does_not_name_its_region(quirky_s3: QuirkyS3, monkeypatch: Setenv) -> None:
    quirky_s3.refuse = unless(has("authorization", "/here/"), 301, "PermanentRedirect", "")
    refused(StorageRefused, "set AWS_REGION to it")
    monkeypatch.setenv("AWS_REGION", "here")
    use()


def test_a_service_that_wants_the_bucket_in_the_host_name(quirky_s3: QuirkyS3, monkeypatch: Setenv) -> None:
    quirky_s3.refuse = unless(
        lambda asked: asked.headers["host"].startswith(f"{BUCKET}."),
        *(403, "SecondLevelDomainForbidden", "Please use virtual hosted style to access."),
    )
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
    refused(StorageRefused, "a host name, not an IP address, in AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage.invalid")
    monkeypatch.setenv("http_proxy", quirky_s3.endpoint)  # which resolves the names
    refused(StorageRefused, "Please use virtual hosted", "set AWS_VIRTUAL_HOSTED_STYLE_REQUEST=true")
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
    use()


def test_a_bucket_without_a_host_name_of_its_own(quirky_s3: QuirkyS3, monkeypatch: Setenv) -> None:
    port = quirky_s3.endpoint.rpartition(":")[2]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://localhost:{port}")
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
    with suppress(OSError):
        socket.getaddrinfo(f"{BUCKET}.localhost", None)
        pytest.skip("this machine finds every host below localhost")
    refused(StorageRefused, "the bucket has no host name of its own", "set AWS_VIRTUAL_HOSTED_STYLE_REQUEST=false")
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "false")
    use()


def test_a_service_that_takes_no_checksums(quirky_s3: QuirkyS3, monkeypatch: Setenv) -> None:
    quirky_s3.refuse = unless(
        lambda asked: not any("checksum" in name for name in asked.headers),
        *(400, "InvalidArgument", "Unsupported header 'x-amz-checksum-sha256' received for this API call."),
    )
    with pytest.raises(StorageRefused, match="set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
        use()
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    use()


def test_a_service_that_takes_no_trailers(quirky_s3: QuirkyS3, monkeypatch: Setenv, tmp_path: Path) -> None:
    """Over TLS, boto3 sends the checksum of a part behind its content."""
    served, trusted = company_certificates(tmp_path)
    server = QuirkyS3(served)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(trusted))
    server.refuse = unless(
        lambda asked: not asked.headers.get("x-amz-content-sha256", "").startswith("STREAMING"),
        *(501, "NotImplemented", "AWS chunked encoding not supported."),
    )
    parts = "takes an upload in parts, and reads a range of it"
    (trouble,) = [finding for finding in probe(URL) if finding.trouble]
    assert trouble.promise == parts
    assert "AWS chunked encoding not supported." in (trouble.trouble or "")
    assert "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in (trouble.trouble or "")
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    assert [finding for finding in probe(URL) if finding.trouble] == []
    server.stop()


def test_a_bucket_whose_reader_pays(quirky_s3: QuirkyS3, monkeypatch: Setenv) -> None:
    quirky_s3.refuse = unless(has("x-amz-request-payer", "requester"), 403, "AccessDenied", "")
    refused(AccessDenied, "give these keys the permission", "AWS_REQUEST_PAYER=requester")
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    use()


def test_a_bucket_that_takes_only_encrypted_objects(quirky_s3: QuirkyS3, monkeypatch: Setenv) -> None:
    quirky_s3.refuse = unless(
        lambda asked: asked.method != "PUT" or has("x-amz-server-side-encryption", "aws:kms")(asked),
        *(403, "AccessDenied", "explicit deny in a resource-based policy"),
    )
    with pytest.raises(AccessDenied, match="or AWS_SERVER_SIDE_ENCRYPTION=aws:kms where the bucket wants encryption"):
        open_store(URL).write("name", b"x")
    monkeypatch.setenv("AWS_SERVER_SIDE_ENCRYPTION", "aws:kms")
    use()


def test_keys_of_another_service_and_another_profile(quirky_s3: QuirkyS3, monkeypatch: Setenv, tmp_path: Path) -> None:
    quirky_s3.refuse = unless(has("authorization", "Credential=right/"), 403, "InvalidAccessKeyId", "Not here.")
    said = refused(AccessDenied, "the service does not have this access key", "Not here.", CREDENTIALS["s3"])
    assert "AWS_ENDPOINT_URL" in said
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = right\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    use()


def test_a_session_token_that_does_not_belong_to_the_keys(quirky_s3: QuirkyS3, monkeypatch: Setenv) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of other keys")
    token = has("x-amz-security-token")
    quirky_s3.refuse = unless(lambda asked: not token(asked), 400, "InvalidToken", "Malformed.")
    refused(AccessDenied, "the session token is wrong", "Malformed.", "unset AWS_SESSION_TOKEN")
    monkeypatch.delenv("AWS_SESSION_TOKEN")
    use()


def test_no_credentials_and_a_public_bucket(quirky_s3: QuirkyS3, monkeypatch: Setenv) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    refused(AccessDenied, "no credentials found", "AWS_SKIP_SIGNATURE=true")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    use()
    assert not [asked for asked in quirky_s3.seen if "authorization" in asked.headers]


def test_a_wrong_secret(s3_url: str, s3_server: SeaweedFS, monkeypatch: Setenv) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused(AccessDenied, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY", url=s3_url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    use(s3_url)


def test_a_bucket_that_is_not_there(s3_environment: SeaweedFS) -> None:
    with pytest.raises(BucketMissing, match="create it or correct the URL"):
        open_store("s3://not-yet-there/run").read("name")
    s3_environment.client().create_bucket(Bucket="not-yet-there")
    use("s3://not-yet-there/run")
    use(f"s3://{REAL_BUCKET}/remedies")


def test_a_request_that_the_service_does_not_have(quirky_s3: QuirkyS3) -> None:
    quirky_s3.refuse = unless(lambda asked: asked.method != "PUT", 501, "NotImplemented", "No such thing here.")
    said = r"No such thing here\..*`mergeyard check s3://bucket/runs` tries"
    with pytest.raises(StorageRefused, match=said) as refusal:
        open_store(URL).write("name", b"x")
    assert refusal.value.exit_code == 2
    assert any(finding.trouble for finding in probe(URL))
    quirky_s3.refuse = lambda asked: None
    assert not any(finding.trouble for finding in probe(URL))


def test_a_service_without_conditional_writes(quirky_s3: QuirkyS3, tmp_path: Path) -> None:
    conditional = has("if-none-match")
    quirky_s3.refuse = unless(lambda asked: not conditional(asked), 501, "NotImplemented", "")
    with pytest.raises(StorageRefused, match="give an `output:` on another, which `mergeyard check` tries"):
        open_store(URL).write("name", b"x", mode="create")
    assert any(finding.trouble for finding in probe(URL))
    assert not any(finding.trouble for finding in probe(str(tmp_path)))
    open_store(tmp_path).write("name", b"x", mode="create")


# ---- TLS and the endpoint


def test_a_certificate_of_a_company(quirky_s3: QuirkyS3, monkeypatch: Setenv, tmp_path: Path) -> None:
    served, trusted = company_certificates(tmp_path)
    server = QuirkyS3(served)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    refused(StorageRefused, "the certificate of the service is not trusted", "set AWS_CA_BUNDLE to the PEM file")
    with pytest.raises(StorageRefused, match="set AWS_CA_BUNDLE"), open_store(URL).upload("large") as upload:
        upload.write(bytes(17 << 20))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(trusted))
    use()
    port = server.endpoint.rpartition(":")[2]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://localhost:{port}")
    refused(StorageRefused, "not trusted", "correct the certificate, or the host name of the endpoint")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{port}")
    use()
    server.stop()


def test_a_service_without_tls(quirky_s3: QuirkyS3, monkeypatch: Setenv) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", quirky_s3.endpoint.replace("http://", "https://"))
    refused(StorageRefused, "the service does not speak TLS; write http:// in AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_ENDPOINT_URL", quirky_s3.endpoint)
    use()


# ---- what passes


@pytest.mark.parametrize("how", ["seconds", "date"])
def test_the_service_says_when_to_come_again(quirky_s3: QuirkyS3, how: str) -> None:
    """Requests of obstore and of boto3 alike; without it, pauses would begin with 10 ms."""
    again = time.time() + 1
    value = "0.8" if how == "seconds" else time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(again + 1))
    quirky_s3.refuse = lambda asked: (503, "SlowDown", "", {"Retry-After": value}) if time.time() < again else None
    open_store(URL).write("name", b"x")
    assert len([asked for asked in quirky_s3.seen if asked.method == "PUT"]) <= 3
    again = time.time() + 1
    quirky_s3.seen.clear()
    if how == "seconds":
        open_store(URL).sweep()
        assert len(quirky_s3.seen) <= 3


def test_a_store_that_changes_is_pinned_anew(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    old = store.write("name", b"old")
    store.write("name", b"newer")
    with pytest.raises(ObjectChanged, match="run again to pin the new version"):
        store.read("name", etag=old.etag)
    assert bytes(store.read("name", etag=store.locate("name").etag)) == b"newer"


# ---- folders


@pytest.mark.parametrize(
    ("number", "kind", "remedy"),
    [
        (errno.EACCES, AccessDenied, "give this user access to it"),
        (errno.EROFS, AccessDenied, "choose another output folder"),
        (errno.ENOSPC, StorageError, "free some and run again"),
        (errno.ESTALE, StorageUnavailable, "run again"),
    ],
)
def test_a_refusal_of_the_system_passes_with_its_reason(
    tmp_path: Path, monkeypatch: Setenv, number: int, kind: type[MergeyardError], remedy: str
) -> None:
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> int:
            raise OSError(number, os.strerror(number))

        patch.setattr("workers.storage.local.os.open", refuse)
        with pytest.raises(kind, match=remedy):
            open_store(tmp_path).write("name", b"x")
    open_store(tmp_path).write("name", b"x")


@pytest.mark.parametrize(
    ("key", "remedy"),
    [("file/name", "choose another path"), ("folder", "choose another path"), ("n" * 300, "choose a shorter one")],
)
def test_a_path_that_cannot_be(tmp_path: Path, key: str, remedy: str) -> None:
    store = open_store(tmp_path)
    store.write("file", b"x")
    store.write("folder/name", b"x")
    with pytest.raises(BadInput, match=remedy):
        store.write(key, b"x")
    store.write("another", b"x")


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(BadInput, match="name the folder that holds it"):
        list(open_store(tmp_path / "file").list())
    assert [info.key for info in open_store(tmp_path).list()] == ["file"]


# ---- none was forgotten

FOLLOWED = (
    *CREDENTIALS.values(),
    "log in again",
    "timedatectl",
    "unset AWS_SESSION_TOKEN",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST=true",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST=false",
    "AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    "AWS_REQUEST_PAYER=requester",
    "AWS_SERVER_SIDE_ENCRYPTION=aws:kms",
    "set AWS_REGION",
    "tries each kind of request",
    "`mergeyard check` tries",
    "to the PEM file of the authority",
    "or the host name of the endpoint",
    "write http:// in ",
    "create it or correct the URL",
    "run again to pin the new version",
    "give this user access to it",
    "choose another output folder",
    "free some and run again",
    "choose another path",
    "choose a shorter one",
    "run again",
    "name the folder that holds it",
    "or AWS_ENDPOINT_URL to its own service",
)


def remedies(file: str) -> set[str]:
    """The texts behind the semicolon of every error in a file, and those of its variables that hold a remedy."""
    tree = ast.parse((STORAGE / file).read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and hasattr(jobs.errors, node.func.id):
            found |= {text.partition("; ")[2] for text in map(literal, node.args) if "; " in text}
        if isinstance(node, ast.Assign) and "remedy" in ast.unparse(node.targets[0]).lower():
            values = node.value.elts[-1:] if isinstance(node.value, ast.Tuple) else [node.value]
            found |= {literal(value) for value in values}
    return found


def literal(node: ast.expr) -> str:
    return "".join(str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant))


@pytest.mark.parametrize("file", ["s3.py", "cloud.py", "local.py", "translation.py"])
def test_every_remedy_of_these_files_is_followed_above(file: str) -> None:
    found = remedies(file) - {""}
    assert found
    assert [text for text in found if not any(part in text for part in FOLLOWED)] == []


def test_a_remedy_that_nobody_follows_is_found() -> None:
    assert not any(part in "reinstall the service" for part in FOLLOWED)
    assert re.search("reinstall", literal(ast.parse("f'{place}: broken; reinstall {it}'", mode="eval").body))
