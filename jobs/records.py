"""What mergeyard writes for itself to read again: JSON with its own digest, so that no damage to it is believed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jobs.errors import CorruptData

SEAL = "sha256"
"""The key of the digest, which is over the rest of the document."""


def sealed(document: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """The document as JSON, with its digest; dataclasses in it become objects."""
    text = _compact(document)
    seal = hashlib.sha256(text.encode()).hexdigest()
    if indent is None:
        return f'{text[:-1]}{"," if document else ""}"{SEAL}":"{seal}"}}'.encode()
    whole = {**document, SEAL: seal}
    return json.dumps(whole, indent=indent, sort_keys=True, default=dataclasses.asdict, allow_nan=False).encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """What `sealed` was given; `CorruptData` for anything else."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptData(f"damaged, not JSON ({error}); remove it and run again") from None
    if not isinstance(document, dict) or SEAL not in document:
        raise CorruptData("damaged, or of another version of mergeyard; remove it and run again")
    if document.pop(SEAL) != hashlib.sha256(_compact(document).encode()).hexdigest():
        raise CorruptData("damaged, its digest is of something else; remove it and run again")
    return document


def _compact(document: Mapping[str, Any]) -> str:
    return json.dumps(document, separators=(",", ":"), sort_keys=True, default=dataclasses.asdict, allow_nan=False)
