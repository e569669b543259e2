"""Which code is this, really: a digest that driver and worker compare before any work is done."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

PACKAGES = ("jobs", "workers", "orchestrator")


@cache
def fingerprint() -> str:
    """sha256 over the sources of the packages, as they lie beside this one."""
    root = Path(__file__).resolve().parent.parent
    code = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            code.update(path.relative_to(root).as_posix().encode() + b"\0")
            code.update(path.read_bytes())
    return code.hexdigest()


def package_folders() -> list[str]:
    """Where the packages lie, to ship them."""
    root = Path(__file__).resolve().parent.parent
    return [str(root / package) for package in PACKAGES]
