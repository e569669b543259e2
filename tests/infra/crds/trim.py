"""Makes the schemas beside it out of KubeRay's resource definitions: `python trim.py FOLDER`.

FOLDER holds KubeRay's `ray.io_{rayclusters,rayjobs,raycronjobs}.yaml`. What is kept is the `spec` of version v1,
without descriptions, closed against unknown keys. A pod template is left open: it is Kubernetes' own, and validated
as such.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayCronJob": "raycronjobs"}
POD_TEMPLATES = ("template", "submitterPodTemplate")
DROPPED = ("description", "x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-map-type", "format")


def trimmed(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema as JSON Schema, smaller and stricter."""
    kept = {key: value for key, value in schema.items() if key not in DROPPED}
    if kept.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    kept.pop("x-kubernetes-preserve-unknown-fields", None)
    kept.pop("x-kubernetes-list-map-keys", None)
    if "properties" in kept:
        kept["properties"] = {
            name: {"type": "object"} if name in POD_TEMPLATES else trimmed(below)
            for name, below in kept["properties"].items()
        }
        kept["additionalProperties"] = False
        defaulted = {name for name, below in kept["properties"].items() if "default" in below}
        kept["required"] = [name for name in kept.get("required", []) if name not in defaulted]
    for key in ("items", "additionalProperties"):
        if isinstance(kept.get(key), dict):
            kept[key] = trimmed(kept[key])
    return kept


def main(folder: Path) -> None:
    """Writes one file a kind; what the kinds have in common is written once and referred to."""
    specs: dict[str, Any] = {}
    for kind, plural in KINDS.items():
        definition = yaml.safe_load((folder / f"ray.io_{plural}.yaml").read_text("utf-8"))
        version = next(version for version in definition["spec"]["versions"] if version["name"] == "v1")
        specs[kind] = trimmed(version["schema"]["openAPIV3Schema"]["properties"]["spec"])
    job, cron = specs["RayJob"]["properties"], specs["RayCronJob"]["properties"]
    job["rayClusterSpec"] = {"$ref": "RayCluster.json"}
    cron["jobTemplate"] = {"$ref": "RayJob.json"}
    for kind, spec in specs.items():
        Path(__file__).with_name(f"{kind}.json").write_text(
            json.dumps(spec, sort_keys=True, separators=(",", ":")) + "\n", "utf-8"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
