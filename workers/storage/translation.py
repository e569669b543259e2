"""Errors of obstore and botocore translated into those of `jobs.errors`: once, at this border, without any secret.

The libraries' own texts quote request URLs and bodies, which may hold signatures and key ids. Only the status, the
service's error code and a redacted first line go on.
"""

from __future__ import annotations

import re
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
    StorageUnavailable,
)

CREDENTIALS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_SKIP_SIGNATURE=true)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or log in with a workload identity",
}
TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "ThrottlingException",
                   "OperationAborted", "ConditionalRequestConflict", "Throttling", "RequestLimitExceeded",
                   "BadDigest", "XAmzContentSHA256Mismatch"}  # fmt: skip
WRONG_REGION_CODES = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
SECRETS = re.compile(r"((?:sig|signature|credential|token|x-amz-[a-z-]+|accesskeyid|key)=)[^&\s\"']+|AKIA\w+", re.I)


def from_obstore(error: Exception, place: str) -> MergeyardError:
    """Our error for an obstore error at `place` (`scheme://bucket/key`)."""
    text = str(error).partition("\n\nDebug source")[0]
    code = _first(r"<Code>(\w+)</Code>", text)
    match error:
        case FileNotFoundError():
            return missing(place, code)
        case obstore_errors.PermissionDeniedError() | obstore_errors.UnauthenticatedError():
            return denied(place, code)
        case obstore_errors.AlreadyExistsError() if code not in TRANSIENT_CODES:
            return ObjectExists(f"{place} is already there")
        case obstore_errors.PreconditionError() | obstore_errors.NotModifiedError() if code not in TRANSIENT_CODES:
            return ObjectChanged(f"{place} changed while it was in use; run again to pin the new version")
        case ValueError() | obstore_errors.InvalidPathError():
            return BadInput(f"{place}: {_brief(text)}")
        case obstore_errors.BaseError():
            status = _first(r"status code: (\d{3})", text)
            wrong_region = "incorrectly configured region" in text
            return _from_status(place, int(status or 0), "PermanentRedirect" if wrong_region else code, _brief(text))
        case _:
            return StorageError(f"{place}: {type(error).__name__}: {_brief(text)}")


def from_boto(error: Exception, place: str) -> MergeyardError:
    """Our error for a botocore error at `place`."""
    from botocore import exceptions as boto_errors

    match error:
        case boto_errors.ClientError():
            response = cast("dict[str, Any]", error.response)
            code = str(response.get("Error", {}).get("Code", ""))
            status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            return _from_status(place, status, code, code)
        case (
            boto_errors.NoCredentialsError()
            | boto_errors.PartialCredentialsError()
            | boto_errors.CredentialRetrievalError()
            | boto_errors.ProfileNotFound()
            | boto_errors.TokenRetrievalError()
            | boto_errors.SSOError()
        ):
            return denied(place, type(error).__name__)
        case boto_errors.ParamValidationError():
            return BadInput(f"{place}: {_brief(str(error))}")
        case boto_errors.HTTPClientError() | boto_errors.BotoCoreError():
            return StorageUnavailable(f"{place}: {type(error).__name__}")
        case _:
            return StorageError(f"{place}: {type(error).__name__}: {_brief(str(error))}")


def denied(place: str, code: str = "") -> AccessDenied:
    """Credentials that are missing or not enough, and how to give others."""
    scheme = place.partition("://")[0]
    reason = f" ({code})" if code else ""
    return AccessDenied(f"{place}: access denied{reason}; {CREDENTIALS.get(scheme, 'check the credentials')}")


def missing(place: str, code: str = "") -> ObjectMissing:
    """An object that is not there, or the bucket where the service says so."""
    scheme, _, rest = place.partition("://")
    if code in ("NoSuchBucket", "ContainerNotFound"):
        return BucketMissing(
            f"{scheme}://{rest.partition('/')[0]}: there is no such bucket; create it or correct the URL"
        )
    return ObjectMissing(f"{place} does not exist")


def _from_status(place: str, status: int, code: str, brief: str) -> MergeyardError:
    if code in ("NoSuchBucket", "ContainerNotFound") or status == 404:
        return missing(place, code)
    if code in WRONG_REGION_CODES or status in (301, 307):
        return BadInput(f"{place}: the bucket is in another region; set AWS_REGION to it")
    if code in TRANSIENT_CODES or status in (0, 200, 408, 425, 429) or status >= 500:
        return StorageUnavailable(f"{place}: {f'{status} {code}'.strip() if status else brief}")
    if status in (401, 403):
        return denied(place, code)
    if status == 412:
        return ObjectChanged(f"{place} changed while it was in use; run again to pin the new version")
    return StorageError(f"{place}: the service refused with {status} {code}".rstrip())


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1) if found else ""


def _brief(text: str) -> str:
    """The last clause of the first line, without secrets."""
    line = text.splitlines()[0] if text else "no reason given"
    return SECRETS.sub(lambda found: (found.group(1) or "") + "…", line.rpartition(" - ")[2])[:160]
