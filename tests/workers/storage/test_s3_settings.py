"""One configuration of S3 for both libraries: every request of a run obeys it, whichever of them sends it."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import obstore
import pytest
from botocore.loaders import JSONFileLoader

from jobs.errors import AccessDenied, BadInput
from tests.quirky_s3 import BUCKET, Asked, QuirkyS3, company_certificates
from workers.storage import open_store
from workers.storage.s3_settings import S3Settings

MIB = 1 << 20
URL = f"s3://{BUCKET}/runs/one"


def both_halves(url: str = URL) -> None:
    """A small object and one in parts, listed, read, and left to no sweep: every request that a run sends."""
    store = open_store(url)
    small = store.write("small", b"hello", mode="create")
    store.swap("small", b"again", etag=small.etag)
    with store.upload("large") as upload:
        upload.write(bytes(17 * MIB))
        upload.commit()
    assert sorted((info.key, info.size) for info in store.list()) == [("large", 17 * MIB), ("small", 5)]
    assert bytes(store.read("small")) == b"again"
    assert len(store.read("large")) == 17 * MIB
    store.sweep()
    store.delete("small")


def test_objects_of_both_halves_are_encrypted(quirky_s3: QuirkyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SERVER_SIDE_ENCRYPTION", "aws:kms")
    monkeypatch.setenv("AWS_SSE_KMS_KEY_ID", "the-key")
    monkeypatch.setenv("AWS_SSE_BUCKET_KEY_ENABLED", "true")
    both_halves()
    prefix = "x-amz-server-side-encryption"
    assert len(quirky_s3.writes()) == 3
    for asked in quirky_s3.writes():
        sent = {name.removeprefix(prefix): v for name, v in asked.headers.items() if name.startswith(prefix)}
        assert sent == {"": "aws:kms", "-aws-kms-key-id": "the-key", "-bucket-key-enabled": "true"}


@pytest.mark.parametrize("value", ["requester", "true"])
def test_the_requester_pays_for_every_request(quirky_s3: QuirkyS3, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("AWS_REQUEST_PAYER", value)
    both_halves()
    assert {asked.headers.get("x-amz-request-payer") for asked in quirky_s3.seen} == {"requester"}


def test_nobody_pays_unasked(quirky_s3: QuirkyS3) -> None:
    both_halves()
    assert {asked.headers.get("x-amz-request-payer") for asked in quirky_s3.seen} == {None}


def test_the_bucket_in_the_host_name_and_the_proxy_are_obeyed_by_both(
    quirky_s3: QuirkyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host does not exist, so that every request has to go through the proxy, which is the server itself."""
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage.invalid")
    monkeypatch.setenv("http_proxy", quirky_s3.endpoint)
    both_halves()
    assert {asked.headers["host"] for asked in quirky_s3.seen} == {f"{BUCKET}.storage.invalid"}
    assert {*quirky_s3.objects} == {"runs/one/large"}


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_what_no_proxy_names_is_asked_directly_by_both(
    quirky_s3: QuirkyS3, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "10")
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    both_halves()


def test_the_profile_counts_for_both(quirky_s3: QuirkyS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Endpoint, region, addressing, checksums and keys from ~/.aws/config alone."""
    (tmp_path / "config").write_text(
        "[profile lab]\nregion = eu-west-1\nrequest_checksum_calculation = when_required\n"
        "endpoint_url = http://storage.invalid\naws_access_key_id = lab-key\naws_secret_access_key = x\n"
        "s3 =\n  addressing_style = virtual\n"
    )
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("http_proxy", quirky_s3.endpoint)
    both_halves()
    assert {asked.headers["host"] for asked in quirky_s3.seen} == {f"{BUCKET}.storage.invalid"}
    scopes = {re.sub(r"/\d{8}/", "/DAY/", a.headers["authorization"].partition(",")[0]) for a in quirky_s3.seen}
    assert scopes == {"AWS4-HMAC-SHA256 Credential=lab-key/DAY/eu-west-1/s3/aws4_request"}
    assert not [name for asked in quirky_s3.seen for name in asked.headers if "checksum" in name]


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_companys_certificate_is_trusted_by_both(
    quirky_s3: QuirkyS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    served, trusted = company_certificates(tmp_path)
    server = QuirkyS3(served)
    server.start()
    for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setenv(variable, str(trusted))
    both_halves()
    assert len(server.objects) == 1
    server.stop()


NEUTRAL = {
    "AWS_ENDPOINT": "http://127.0.0.1:9",
    "AWS_PROXY_URL": "http://127.0.0.1:9",
    "AWS_ALLOW_INVALID_CERTIFICATES": "true",
    "AWS_BUCKET": "other",
    "AWS_BUCKET_NAME": "other",
    "AWS_CHECKSUM_ALGORITHM": "CRC64NVME",
    "AWS_CONDITIONAL_PUT": "disabled",
    "AWS_COPY_IF_NOT_EXISTS": "nonsense",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "/nonexistent",
    "AWS_DEFAULT_HEADERS": "x: y",
    "AWS_DISABLE_BULK_DELETE": "false",
    "AWS_DISABLE_TAGGING": "true",
    "AWS_IMDSV1_FALLBACK": "true",
    "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",
    "AWS_S3_EXPRESS": "true",
    "AWS_SSE_CUSTOMER_KEY_BASE64": "AAAA",
    "AWS_STS_ENDPOINT": "http://127.0.0.1:9",
    "AWS_TOKEN": "another",
    "AWS_UNSIGNED_PAYLOAD": "true",
}
"""Variables that obstore reads and boto3 does not: they change nothing."""

SHARED = {
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME"),
    *("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"),
    *("AWS_SKIP_SIGNATURE", "AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "AWS_REQUEST_PAYER"),
    *("AWS_SERVER_SIDE_ENCRYPTION", "AWS_SSE_KMS_KEY_ID", "AWS_SSE_BUCKET_KEY_ENABLED"),
}
"""Variables that obstore reads, and that count for both."""


def kinds(seen: list[Asked]) -> list[tuple[str, str, list[str], set[str]]]:
    return [(asked.method, asked.key, sorted(asked.query), set(asked.headers)) for asked in seen]


def test_variables_of_obstore_alone_change_no_request(quirky_s3: QuirkyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    both_halves()
    plain = kinds(quirky_s3.seen)
    quirky_s3.seen.clear()
    for name, value in NEUTRAL.items():
        monkeypatch.setenv(name, value)
    both_halves()
    assert kinds(quirky_s3.seen) == plain


def test_every_variable_that_obstore_reads_is_in_one_of_the_two_lists() -> None:
    """Its stub names them; a new version that reads a new one fails here."""
    stub = (Path(obstore.__file__).parent / "_store/_aws.pyi").read_text()
    named = {name for line in stub.splitlines() if line.strip(" *-").startswith(("`AWS_", "Environment variable**"))
             for name in re.findall(r"`(AWS_[A-Z0-9_]+)", line)}  # fmt: skip
    assert len(named) > 25
    assert named <= NEUTRAL.keys() | SHARED


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"AWS_SERVER_SIDE_ENCRYPTION": "sse-c"}, "use AES256, aws:kms, aws:kms:dsse"),
        ({"AWS_SSE_KMS_KEY_ID": "k"}, "needs AWS_SERVER_SIDE_ENCRYPTION=aws:kms"),
        ({"AWS_ENDPOINT_URL": "storage.example:8333"}, "write AWS_ENDPOINT_URL as http://HOST:PORT"),
        ({"AWS_CA_BUNDLE": "/nonexistent.pem"}, "/nonexistent.pem: no such file; set AWS_CA_BUNDLE"),
        ({"AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "maybe"}, "is neither true nor false"),
        (
            {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required", "AWS_CHECKSUM_ALGORITHM": "SHA256"},
            "contradicts AWS_CHECKSUM_ALGORITHM; unset one",
        ),
    ],
)
def test_settings_that_cannot_hold_for_both_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=re.escape(said)):
        open_store(URL)


def test_the_region_variable_of_the_remedy_wins(quirky_s3: QuirkyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    both_halves()
    assert all("/eu-west-1/s3/" in asked.headers["authorization"] for asked in quirky_s3.seen)


def test_an_unknown_profile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    with pytest.raises(AccessDenied, match="ProfileNotFound"):
        open_store(URL)


def test_keys_stay_in_obstore_for_less_than_boto3_renews_them_ahead(quirky_s3: QuirkyS3) -> None:
    """boto3 renews keys 10 minutes before they expire, so keys that it gives last at least so long."""
    objects = S3Settings.resolved(BUCKET).object_store({})
    keys = cast("Any", objects).credential_provider()
    assert keys["access_key_id"] == "test"
    assert keys["expires_at"] - datetime.now(UTC) < timedelta(minutes=10)


def test_the_descriptions_of_s3_are_read_once(quirky_s3: QuirkyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    S3Settings.resolved("one")
    read: list[str] = []
    monkeypatch.setattr(JSONFileLoader, "load_file", lambda self, path: read.append(path))
    assert S3Settings.resolved("another").endpoint == quirky_s3.endpoint
    assert read == []
