"""What the files of `infra` say: policies of roles, steps of the image, metrics of the code."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from string import Template
from typing import Any

from tests.infra.conftest import ROOT

DOCKERFILE = ROOT / "infra" / "docker" / "Dockerfile"
TERRAFORM = ROOT / "infra" / "terraform" / "aws"
GIVEN = {
    "bucket": "bucket", "models": "models", "account": "000000000000", "region": "us-east-1",
    "oidc_provider": "oidc.example/id", "serviceaccount": "system:serviceaccount:mergeyard:mergeyard-worker",
}  # fmt: skip


def policy(name: str) -> dict[str, Any]:
    """A policy with everything filled in."""
    return json.loads(Template((TERRAFORM / "policies" / f"{name}.json").read_text("utf-8")).substitute(GIVEN))


def allows(document: dict[str, Any], action: str, resource: str) -> bool:
    """Whether a policy of a role allows this; conditions are taken to hold, and nothing else to deny."""
    return any(
        statement["Effect"] == "Allow"
        and any(fnmatchcase(action, pattern) for pattern in statement["Action"])
        and any(fnmatchcase(resource, pattern) for pattern in statement["Resource"])
        for statement in document["Statement"]
    )


def instructions(text: str) -> list[tuple[str, str]]:
    """Each instruction and what follows it, comments left out and lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def counted() -> dict[str, set[str]]:
    """Metric → its labels, as Ray exports what the code counts."""
    code = (ROOT / "orchestrator" / "cluster" / "ray_cluster.py").read_text("utf-8")
    found = re.findall(r'metrics\.\w+\(\s*"(mergeyard_\w+)",\s*"[^"]*"(?:,\s*\(([^)]*)\))?', code)
    return {f"ray_{name}": set(re.findall(r"\w+", labels)) for name, labels in found}
