"""The configuration of an S3 bucket: resolved once, for boto3 and obstore alike.

Sources are boto3's own chain (environment, profile, role) and the variables in `VARIABLES`. obstore also reads the
environment by itself, under other names, so every setting that it would take from there is given to it.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import boto3.session
import botocore.session
from botocore import UNSIGNED
from botocore.client import Config
from botocore.exceptions import BotoCoreError
from botocore.handlers import disable_signing
from botocore.loaders import Loader, create_loader
from botocore.utils import get_environ_proxies
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import BaseError
from obstore.store import S3Store

from jobs.errors import BadInput
from workers.storage.retrying import CONNECT_SECONDS, stall_seconds
from workers.storage.translation import denied, from_boto

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config

CONNECTIONS = 32
KEYS_LAST = timedelta(minutes=6)  # in obstore; boto3 renews keys 10 minutes before they expire
ENCRYPTIONS = ("AES256", "aws:kms", "aws:kms:dsse")
VARIABLES = (
    "AWS_REGION",
    "AWS_SKIP_SIGNATURE",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
    "AWS_REQUEST_PAYER",
    "AWS_SERVER_SIDE_ENCRYPTION",
    "AWS_SSE_KMS_KEY_ID",
    "AWS_SSE_BUCKET_KEY_ENABLED",
)
"""Read here in addition to those of boto3's chain; their names are those that obstore, polars and delta-rs use."""


@dataclass(frozen=True)
class S3Settings:
    """Everything that both libraries have to agree on, for one bucket.

    `endpoint` is a URL without the bucket; `ca_bundle` a PEM file, or None for the libraries' own certificates;
    `encryption` holds boto3's parameters of a new object; `proxy` a URL, or None for a direct connection.
    """

    bucket: str
    endpoint: str
    region: str
    virtual_hosted: bool
    unsigned: bool
    ca_bundle: str | None
    proxy: str | None
    requester_pays: bool
    checksums: bool
    encryption: dict[str, Any]
    client: Any = field(repr=False)
    """The boto3 client."""
    _session: boto3.session.Session = field(repr=False)

    @classmethod
    def resolved(cls, bucket: str) -> S3Settings:
        """As the environment and the profile have it; nothing is asked of the service. `BadInput` if they conflict."""
        try:
            return cls._resolved(bucket)
        except BotoCoreError as error:
            raise from_boto(error, f"s3://{bucket}") from None
        except ValueError as error:  # botocore's for an endpoint that is no URL
            raise BadInput(f"s3://{bucket}: {error}; write AWS_ENDPOINT_URL as http://HOST:PORT or https://…") from None

    @classmethod
    def _resolved(cls, bucket: str) -> S3Settings:
        core = botocore.session.get_session()
        core.register_component("data_loader", _models(core.get_config_variable("data_path")))
        session = boto3.session.Session(botocore_session=core)
        region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
        unsigned = _flag("AWS_SKIP_SIGNATURE") or False
        payer = os.environ.get("AWS_REQUEST_PAYER", "").lower() == "requester" or _flag("AWS_REQUEST_PAYER") or False
        ca_bundle = _ca_bundle(core.get_config_variable("ca_bundle"))
        checksums = str(core.get_config_variable("request_checksum_calculation")).lower() != "when_required"
        options = _options(unsigned, digests=not checksums)
        client = session.client("s3", region_name=region, config=options, verify=ca_bundle)
        client.meta.events.register("before-call.s3", _stay_in_the_region)
        if payer:
            client.meta.events.register("before-call.s3", _offer_to_pay)
        endpoint = str(client.meta.endpoint_url)
        proxies = cast("dict[str, str]", get_environ_proxies(endpoint))
        return cls(
            bucket=bucket,
            endpoint=endpoint,
            region=region,
            virtual_hosted=_is_virtual_hosted(client, bucket),
            unsigned=unsigned,
            ca_bundle=ca_bundle,
            proxy=_with_scheme(proxies.get(urlsplit(endpoint).scheme)),
            requester_pays=payer,
            checksums=checksums,
            encryption=_encryption(),
            client=client,
            _session=session,
        )

    def object_store(self, client_options: ClientConfig) -> S3Store:
        """The obstore store; `AccessDenied` where there are no credentials."""
        if not self.unsigned and self._session.get_credentials() is None:
            raise denied(f"s3://{self.bucket}", "no credentials found")
        address = urlsplit(self.endpoint)
        options: ClientConfig = {**client_options, "allow_http": address.scheme == "http"}
        if self.proxy:
            options["proxy_url"] = self.proxy
        else:  # without a proxy of its own it takes one from the environment, by other rules than boto3
            options |= {"proxy_url": "http://unused.invalid", "proxy_excludes": address.hostname or ""}
        if self.ca_bundle:
            options["root_certificate"] = Path(self.ca_bundle).read_bytes()
        try:
            return S3Store(
                self.bucket,
                config=self._of_obstore(),
                client_options=options,
                retry_config={"max_retries": 0},
                credential_provider=None if self.unsigned else Boto3CredentialProvider(self._session, ttl=KEYS_LAST),
            )
        except (BaseError, ValueError) as error:
            raise BadInput(f"s3://{self.bucket}: {str(error).splitlines()[0]}; correct the AWS_ variable") from None

    def _of_obstore(self) -> S3Config:
        address = urlsplit(self.endpoint)
        host = f"{self.bucket}.{address.netloc}" if self.virtual_hosted else address.netloc
        config: S3Config = {
            "aws_endpoint_url_s3": f"{address.scheme}://{host}{address.path}".rstrip("/"),
            "region": self.region,
            "virtual_hosted_style_request": self.virtual_hosted,
            "skip_signature": self.unsigned,
            "request_payer": self.requester_pays,
            "disable_bulk_delete": True,
            "unsigned_payload": False,
            "s3_express": False,
            "conditional_put": "etag",
            "copy_if_not_exists": "multipart",
        }
        if self.encryption:
            config["server_side_encryption"] = self.encryption["ServerSideEncryption"]
        if "SSEKMSKeyId" in self.encryption:
            config["sse_kms_key_id"] = self.encryption["SSEKMSKeyId"]
        if "BucketKeyEnabled" in self.encryption:
            config["sse_bucket_key_enabled"] = self.encryption["BucketKeyEnabled"]
        if self.checksums:
            config["checksum_algorithm"] = "SHA256"  # the service refuses damaged bytes; boto3 does the same for parts
        elif "AWS_CHECKSUM_ALGORITHM" in os.environ:
            raise BadInput(
                "AWS_REQUEST_CHECKSUM_CALCULATION=when_required contradicts AWS_CHECKSUM_ALGORITHM; unset one of them"
            )
        return config

    def document(self) -> dict[str, str]:
        """The settings in words, without secrets."""
        credentials = None if self.unsigned else self._session.get_credentials()
        proxy = urlsplit(self.proxy or "")
        return {
            "endpoint": self.endpoint,
            "region": self.region,
            "addressing": "virtual-hosted: the bucket in the host name" if self.virtual_hosted else "path style",
            "credentials": "none: requests are not signed" if credentials is None else f"from {credentials.method}",
            "profile": self._session.profile_name,
            "certificates": self.ca_bundle or "the libraries' own",
            "proxy": f"{proxy.scheme}://{proxy.hostname}:{proxy.port}" if self.proxy else "none",
            "encryption": " ".join(str(value) for value in self.encryption.values()) or "as the bucket has it",
            "requester pays": "yes" if self.requester_pays else "no",
            "checksums": "sent" if self.checksums else "only where required",
        }


@cache
def _models(path: str | None) -> Loader:
    """botocore's descriptions of S3, which take longer to read than all else that a new bucket needs."""
    return create_loader(path)


def _options(unsigned: bool, digests: bool) -> Config:
    """`digests`: sign the content of every request, also over TLS."""
    virtual = _flag("AWS_VIRTUAL_HOSTED_STYLE_REQUEST")
    style = {} if virtual is None else {"addressing_style": "virtual" if virtual else "path"}
    return Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=stall_seconds(),
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=CONNECTIONS,
        s3={**style, **({"payload_signing_enabled": True} if digests else {})},
        **({"signature_version": UNSIGNED} if unsigned else {}),
    )


def _is_virtual_hosted(client: Any, bucket: str) -> bool:
    """How boto3 addresses this bucket: its rules on dots, IP addresses and endpoints are many."""
    client.meta.events.register_first("choose-signer.s3.GetObject", disable_signing)
    address = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "key"})
    client.meta.events.unregister("choose-signer.s3.GetObject", disable_signing)
    return (urlsplit(address).hostname or "").startswith(f"{bucket}.")


def _stay_in_the_region(params: dict[str, Any], **_: Any) -> None:
    """boto3 would follow a bucket into its region; obstore does not, and a redirection without a region never ends."""
    params["context"].setdefault("s3_redirect", {})["redirected"] = True


def _offer_to_pay(params: dict[str, Any], **_: Any) -> None:
    params["headers"]["x-amz-request-payer"] = "requester"


def _ca_bundle(named: str | None) -> str | None:
    """The PEM file that both trust: boto3's order, then the system's, which SSL_CERT_FILE replaces."""
    path = named or os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
    if path and not Path(path).is_file():
        raise BadInput(f"{path}: no such file; set AWS_CA_BUNDLE to a PEM file of certificates, or unset it")
    return path or ssl.get_default_verify_paths().cafile


def _encryption() -> dict[str, Any]:
    how, key = os.environ.get("AWS_SERVER_SIDE_ENCRYPTION"), os.environ.get("AWS_SSE_KMS_KEY_ID")
    if how and how not in ENCRYPTIONS:
        raise BadInput(f"AWS_SERVER_SIDE_ENCRYPTION={how} is not possible here; use {', '.join(ENCRYPTIONS)}")
    if key and not (how or "").startswith("aws:kms"):
        raise BadInput("AWS_SSE_KMS_KEY_ID needs AWS_SERVER_SIDE_ENCRYPTION=aws:kms; set it, or unset the key")
    asked = {
        "ServerSideEncryption": how,
        "SSEKMSKeyId": key,
        "BucketKeyEnabled": _flag("AWS_SSE_BUCKET_KEY_ENABLED") if how else None,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _with_scheme(proxy: str | None) -> str | None:
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _flag(variable: str) -> bool | None:
    """A variable that is on, off, or not set."""
    text = os.environ.get(variable, "").lower()
    if text in ("1", "true", "yes", "on", "y"):
        return True
    if text in ("0", "false", "no", "off", "n"):
        return False
    if not text:
        return None
    raise BadInput(f"{variable}={text} is neither true nor false; set it to one of these, or unset it")
