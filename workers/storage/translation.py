"""Errors of obstore and botocore translated into those of `jobs.errors`: once, at this border, without any secret.

The libraries' own texts quote request URLs and bodies, which may hold signatures and key ids. Only the status, the
service's error code and its own sentence go on, redacted. Every remedy here is followed by a test.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from obstore import exceptions as obstore_errors

from jobs.errors import (
    AccessDenied,
    BadInput,
    BucketMissing,
    MergeyardError,
    ObjectChanged,
    ObjectExists,
    ObjectMissing,
    StorageError,
    StorageRefused,
    StorageUnavailable,
)
from workers.services import passes, wait_seconds

CREDENTIALS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_SKIP_SIGNATURE=true)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or log in with a workload identity",
}
ENDPOINTS = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST", "az": "AZURE_STORAGE_ENDPOINT"}
LOG_IN_AGAIN = (
    "log in again, such as with `aws sso login`, or set new AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and"
    " AWS_SESSION_TOKEN"
)
TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "ThrottlingException",
                   "OperationAborted", "ConditionalRequestConflict", "Throttling", "RequestLimitExceeded",
                   "BadDigest", "XAmzContentSHA256Mismatch"}  # fmt: skip
WRONG_REGION_CODES = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
CLOCK_CODES = {"RequestTimeTooSkewed", "RequestInTheFuture"}
CHECKSUMS = re.compile(r"chunked|checksum|trailer|STREAMING-", re.I)
HOST_NAMES = re.compile(r"virtual[- ]?host|SecondLevelDomainForbidden|PathStyleDomainForbidden", re.I)
CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)|CERTIFICATE_VERIFY_FAILED\] certificate verify failed: ([^(]+)")
UNKNOWN_AUTHORITY = re.compile(r"UnknownIssuer|issuer certificate|self.signed", re.I)
SECRETS = re.compile(r"((?:sig|signature|credential|token|x-amz-[a-z-]+|accesskeyid|key)=)[^&\s\"']+|AKIA\w+", re.I)


@dataclass(frozen=True)
class Answer:
    """A refusal: its HTTP status (0 without an answer), the service's code and sentence, and its headers' values."""

    status: int
    code: str
    sentence: str
    header: Callable[[str], str]

    def __str__(self) -> str:
        said = f"{self.status or ''} {self.code}".strip()
        return f"{said}: {self.sentence}" if said and self.sentence else said or self.sentence


def from_obstore(error: Exception, place: str, header: Callable[[str], str] = lambda name: "") -> MergeyardError:
    """Our error for an obstore error at `place` (`scheme://bucket/key`).

    obstore gives no headers: `header` is asked for the value of one where it counts.
    """
    text, _, details = str(error).partition("\n\nDebug source")
    code = _first(r"<Code>(\w+)</Code>", text)
    sentence = _first(r"<Message>(.*?)</Message>", text) or _first(r'"message":\s*"(.*?)"', text)
    status = int(_first(r"status code: (\d{3})", text) or 0)
    wrong_region = "incorrectly configured region" in text
    match error:
        case FileNotFoundError():
            return missing(place, code)
        case obstore_errors.AlreadyExistsError() if code not in TRANSIENT_CODES:
            return ObjectExists(f"{place} is already there")
        case obstore_errors.PreconditionError() | obstore_errors.NotModifiedError() if code not in TRANSIENT_CODES:
            return ObjectChanged(f"{place} changed while it was in use; run again to pin the new version")
        case ValueError() | obstore_errors.InvalidPathError():
            return BadInput(f"{place}: {_brief(text)}")
        case obstore_errors.BaseError() if status or wrong_region:
            return _from_answer(
                place, Answer(status, "PermanentRedirect" if wrong_region else code, _redacted(sentence), header)
            )
        case obstore_errors.BaseError():
            return _without_answer(place, details, _first(r'(?:message|error): "(.*?)"', details) or _brief(text))
        case _:
            return StorageError(f"{place}: {type(error).__name__}: {_brief(text)}")


def from_boto(error: Exception, place: str) -> MergeyardError:
    """Our error for a botocore error at `place`."""
    from botocore import exceptions as boto_errors

    match error:
        case boto_errors.ClientError():
            response = cast("dict[str, Any]", error.response)
            told, about = response.get("Error", {}), response.get("ResponseMetadata", {})
            headers = cast("dict[str, str]", about.get("HTTPHeaders", {}))
            status, code = int(about.get("HTTPStatusCode", 0)), str(told.get("Code", ""))
            sentence = _redacted(str(told.get("Message", "")))
            return _from_answer(place, Answer(status, code, sentence, lambda name: headers.get(name, "")))
        case boto_errors.TokenRetrievalError() | boto_errors.SSOError():
            return AccessDenied(f"{place}: the login has ended ({_brief(str(error))}); {LOG_IN_AGAIN}")
        case (
            boto_errors.NoCredentialsError()
            | boto_errors.PartialCredentialsError()
            | boto_errors.CredentialRetrievalError()
            | boto_errors.ProfileNotFound()
        ):
            return denied(place, f"{type(error).__name__}: {_brief(str(error))}")
        case boto_errors.ParamValidationError():
            return BadInput(f"{place}: {_brief(str(error))}")
        case boto_errors.HTTPClientError() | boto_errors.BotoCoreError():
            return _without_answer(place, str(error), type(error).__name__)
        case _:
            return StorageError(f"{place}: {type(error).__name__}: {_brief(str(error))}")


def denied(place: str, reason: str) -> AccessDenied:
    """Credentials that are missing or not enough, and how to give others."""
    scheme = place.partition("://")[0]
    return AccessDenied(f"{place}: access denied ({reason}); {CREDENTIALS[scheme]}")


def missing(place: str, code: str = "") -> ObjectMissing:
    """An object that is not there, or the bucket where the service says so."""
    scheme, _, rest = place.partition("://")
    if code in ("NoSuchBucket", "ContainerNotFound"):
        return BucketMissing(
            f"{scheme}://{rest.partition('/')[0]}: there is no such bucket; create it or correct the URL"
        )
    return ObjectMissing(f"{place} does not exist")


def _from_answer(place: str, answer: Answer) -> MergeyardError:
    status, code = answer.status, answer.code
    if code in ("NoSuchBucket", "ContainerNotFound") or status == 404:
        return missing(place, code)
    if code in WRONG_REGION_CODES or status in (301, 307):
        return _in_another_region(place, answer)
    if code in TRANSIENT_CODES or status in (0, 200) or passes(status):
        unavailable = StorageUnavailable(f"{place}: {answer}")
        unavailable.pause = wait_seconds(answer.header("retry-after")) if status in (429, 503) else 0.0
        return unavailable
    if status == 412:
        return ObjectChanged(f"{place} changed while it was in use; run again to pin the new version")
    return _refused(place, answer)


def _in_another_region(place: str, answer: Answer) -> StorageRefused:
    named = _first(r"expecting '([\w-]+)'", answer.sentence) or answer.header("x-amz-bucket-region")
    remedy = f"set AWS_REGION={named}" if named else "set AWS_REGION to it"
    return StorageRefused(f"{place}: the bucket is in another region ({answer}); {remedy}")


def _refused(place: str, answer: Answer) -> StorageRefused:
    """A refusal that no other try changes: the reason, the service's own words, and the remedy for this reason."""
    scheme, code = place.partition("://")[0], answer.code
    refusal: type[StorageRefused] = AccessDenied
    thing, remedy = "access denied", CREDENTIALS[scheme]
    if code in EXPIRED_CODES:
        thing, remedy = "the credentials have expired", LOG_IN_AGAIN
    elif code in CLOCK_CODES:
        thing, remedy = "this machine's clock is wrong", "set it, such as with `timedatectl set-ntp true`"
    elif code == "InvalidToken":
        thing, remedy = "the session token is wrong", "unset AWS_SESSION_TOKEN, or set the one of these keys"
    elif code == "InvalidAccessKeyId" and scheme == "s3":
        thing, remedy = "the service does not have this access key", f"{remedy}, or AWS_ENDPOINT_URL to its own service"
    elif HOST_NAMES.search(f"{code} {answer.sentence}"):
        thing, refusal = "the service wants the bucket in the host name", StorageRefused
        remedy = "set AWS_VIRTUAL_HOSTED_STYLE_REQUEST=true, and a host name, not an IP address, in AWS_ENDPOINT_URL"
    elif scheme == "s3" and answer.status in (400, 501) and CHECKSUMS.search(f"{code} {answer.sentence}"):
        thing, refusal = "the service does not take checksums of this form", StorageRefused
        remedy = "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
    elif answer.status in (401, 403) and scheme == "s3" and code in ("AccessDenied", ""):
        remedy = (
            f"give these keys the permission, or {remedy}, or AWS_REQUEST_PAYER=requester where the reader pays,"
            " or AWS_SERVER_SIDE_ENCRYPTION=aws:kms where the bucket wants encryption"
        )
    elif answer.status not in (401, 403):
        thing, refusal = "the service refuses this request", StorageRefused
        folder = place.rpartition("/")[0] if place.count("/") > 2 else place
        remedy = f"`mergeyard check {folder}` tries each kind of request"
    return refusal(f"{place}: {thing} ({answer}); {remedy}")


def _without_answer(place: str, details: str, reason: str) -> StorageError:
    """No answer came: a certificate that is not trusted stays so; everything else may pass."""
    variable = "AWS_CA_BUNDLE" if place.startswith("s3://") else "SSL_CERT_FILE"
    if found := CERTIFICATE.search(details):
        why = (found[1] or found[2]).strip()
        remedy = f"set {variable} to the PEM file of the authority that signed it"
        if not UNKNOWN_AUTHORITY.search(why):
            remedy = "correct the certificate, or the host name of the endpoint"
        return StorageRefused(f"{place}: the certificate of the service is not trusted ({why}); {remedy}")
    if re.search(r"InvalidContentType|WRONG_VERSION_NUMBER", details):
        variable = ENDPOINTS[place.partition("://")[0]]
        return StorageRefused(f"{place}: the service does not speak TLS; write http:// in {variable}")
    return StorageUnavailable(f"{place}: {reason}")


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.DOTALL)
    return found.group(1) if found else ""


def _redacted(sentence: str) -> str:
    """The first line of the service's own words, without secrets and invisible characters."""
    line = "".join(filter(str.isprintable, html.unescape(sentence).strip().partition("\n")[0]))
    return SECRETS.sub(lambda found: (found.group(1) or "") + "…", line)[:300]


def _brief(text: str) -> str:
    """The last clause of the first line, without secrets."""
    line = text.splitlines()[0] if text else "no reason given"
    return _redacted(line.rpartition(" - ")[2])[:160]
