"""`ray up`, SkyPilot and Slurm: their own schemas and shellcheck, and what the house asks of all of them.

No cloud and no Slurm is here. What they run on each node, `together.sh`, is run for real in test_together.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from referencing import Registry, Resource

from orchestrator.cli import parser
from orchestrator.cluster.ray_cluster import NOTICE_A_CUT
from tests.infra.conftest import ROOT
from tests.infra.manifests import CUT_NODE

INFRA = ROOT / "infra"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
SCRIPTS = ("ray/environment.sh", "ray/together.sh", "slurm/mergeyard.sbatch")
CLOUDS = ("aws", "gcp")
SKYPILOT = Path(__file__).with_name("skypilot")


def load(path: str) -> Any:
    return yaml.safe_load((INFRA / path).read_text("utf-8"))


# ---- ray up


def complaints_about_cluster(config: dict[str, Any]) -> list[str]:
    """What Ray's own schema, or else the house, has against a cluster of `ray up`."""
    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text("utf-8"))
    refused = [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(config)]
    if refused:
        return refused
    found: list[str] = []
    commands = {kind: config[f"{kind}_start_ray_commands"] for kind in ("head", "worker")}
    if "--dashboard-host=127.0.0.1" not in " ".join(commands["head"]):
        found.append("the dashboard is everybody's")
    if "--num-cpus=0" not in " ".join(commands["head"]):
        found.append("tasks would run beside the driver")
    if "~/.ray/auth_token" not in config["file_mounts"]:
        found.append("there is no token")
    for command in (command for kind in commands.values() for command in kind):
        if not command.startswith(". ~/mergeyard/infra/ray/environment.sh &&"):
            found.append(f"{command} knows no environment")
    for name, kind in config["available_node_types"].items():
        spot = "spot" in json.dumps(kind["node_config"]).lower() or "preemptible" in json.dumps(kind["node_config"])
        if spot != (name != config["head_node_type"]) or spot != (kind.get("labels") == {"ray.io/market-type": "spot"}):
            found.append(f"{name}: on the wrong market")
    return found


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_takes_a_cluster_as_it_is_written(cloud: str) -> None:
    config = load(f"ray/{cloud}.yaml")
    assert complaints_about_cluster(config) == []
    prepared = prepare_config(deepcopy(config))
    validate_config(prepared)
    assert prepared["available_node_types"]["workers"]["min_workers"] == 4


@pytest.mark.parametrize(
    ("there", "instead", "complaint"),
    [
        ("cluster_name:", "clustername:", "'clustername' was unexpected"),
        ("max_workers: 8\nidle", "max_workers: many\nidle", "'many' is not of type 'integer'"),
        ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "everybody's"),
        ("--num-cpus=0 ", "", "beside the driver"),
        ("  ~/.ray/auth_token: ~/.ray/auth_token\n", "", "no token"),
        ("  - . ~/mergeyard/infra/ray/environment.sh && ray stop", "  - ray stop", "knows no environment"),
        ("labels: {ray.io/market-type: spot}", "labels: {}", "wrong market"),
        ("head_node_type: head", "head_node_type: workers", "wrong market"),
    ],
)
@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_planted_mistake_of_a_cluster_is_found(cloud: str, there: str, instead: str, complaint: str) -> None:
    text = (INFRA / "ray" / f"{cloud}.yaml").read_text("utf-8")
    assert there in text
    found = complaints_about_cluster(yaml.safe_load(text.replace(there, instead)))
    assert any(complaint in line for line in found), found


# ---- SkyPilot


def complaints_about_task(task: dict[str, Any]) -> list[str]:
    """What SkyPilot's schema has against a task."""
    schemas = {f"{name}.json": json.loads((SKYPILOT / f"{name}.json").read_text()) for name in ("task", "resources")}
    registry: Any = Registry().with_resources(
        (name, Resource.from_contents(schema)) for name, schema in schemas.items()
    )
    validator = jsonschema.Draft7Validator(schemas["task.json"], registry=registry)
    return [error.message for error in validator.iter_errors(task)]


def test_skypilot_takes_the_task_as_it_is_written() -> None:
    assert complaints_about_task(load("skypilot/task.yaml")) == []


@pytest.mark.parametrize(
    ("there", "instead", "complaint"),
    [
        ("num_nodes:", "nodes:", "'nodes' was unexpected"),
        ("use_spot: true", "use_spot: sometimes", "'sometimes' is not of type 'boolean'"),
        ("use_spot:", "spot:", "'spot' was unexpected"),
        ("[75]", "[275]", "is not valid under any"),
    ],
)
def test_a_planted_mistake_of_a_task_is_found(there: str, instead: str, complaint: str) -> None:
    text = (INFRA / "skypilot" / "task.yaml").read_text("utf-8")
    assert there in text
    found = complaints_about_task(yaml.safe_load(text.replace(there, instead)))
    assert any(complaint in line for line in found), found


def test_the_task_is_tried_again_at_75_alone_and_has_no_token_in_it() -> None:
    task = load("skypilot/task.yaml")
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert task["secrets"] == {"RAY_AUTH_TOKEN": None}
    assert (ROOT / task["envs"]["JOB"]).exists()


def test_every_machine_of_the_task_is_told_its_rank_and_the_first_ones_address(tmp_path: Path) -> None:
    script = tmp_path / "infra" / "ray" / "together.sh"
    script.parent.mkdir(parents=True)
    script.write_text('#!/bin/sh\necho "$@"\n')
    script.chmod(0o755)
    given = {
        "PATH": os.environ["PATH"],
        "JOB": "job.yaml",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    command = ["bash", "-c", load("skypilot/task.yaml")["run"]]
    done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, timeout=10)
    assert done.stdout == "1 2 10.0.0.1:6379 mergeyard run job.yaml --address auto\n"


def test_the_job_of_the_task_leaves_nothing_on_the_machine() -> None:
    job = yaml.safe_load((ROOT / load("skypilot/task.yaml")["envs"]["JOB"]).read_text("utf-8"))
    assert job["output"].startswith("s3://")


# ---- shells


def shells() -> dict[str, str]:
    """Every shell text by where it is from."""
    task = load("skypilot/task.yaml")
    texts = {f"skypilot/task.yaml {key}": task[key] for key in ("setup", "run")}
    for cloud in CLOUDS:
        config = load(f"ray/{cloud}.yaml")
        for key in (key for key in config if key.endswith("_commands")):
            texts[f"ray/{cloud}.yaml {key}"] = "\n".join(config[key])
    return texts


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_nothing_against_a_script(script: str) -> None:
    done = subprocess.run([SHELLCHECK, "-x", INFRA / script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    subprocess.run(["bash", "-n", INFRA / script], check=True, timeout=10)


@pytest.mark.parametrize("place", shells())
def test_shellcheck_has_nothing_against_the_shell_in_yaml(place: str) -> None:
    excluded = "SC1090,SC2086"  # files of another machine; RAY_HEAD_IP is one word
    command = [SHELLCHECK, "--shell=bash", f"--exclude={excluded}", "-"]
    done = subprocess.run(command, input=shells()[place], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_mergeyard_in_a_script_is_a_command_that_it_takes() -> None:
    texts = [(INFRA / script).read_text("utf-8") for script in SCRIPTS] + list(shells().values())
    found = [
        match[1].split()
        for text in texts
        for match in re.finditer(r"\bmergeyard ((?:run|submit) .*?)(?: \|\|| &|$)", text, re.M)
    ]
    assert len(found) == 2
    for words in found:
        options = parser().parse_args([word.strip('"') for word in words])
        assert options.address == "auto"


def test_scripts_that_are_called_by_path_can_be() -> None:
    assert os.access(INFRA / "ray" / "together.sh", os.X_OK)


def test_the_settings_are_the_same_on_kubernetes_elsewhere_and_on_one_machine() -> None:
    exported = re.findall(r"^export (RAY_\w+)=(\S+)$", (INFRA / "ray" / "environment.sh").read_text("utf-8"), re.M)
    elsewhere = {name: value for name, value in exported if name in CUT_NODE}
    text = (INFRA / "kuberay" / "base" / "environment.env").read_text("utf-8")
    kubernetes = dict(re.findall(r"^(\w+)=(.*)$", text, re.M))
    assert elsewhere == {name: kubernetes[name] for name in CUT_NODE} == NOTICE_A_CUT
    assert ("RAY_AUTH_MODE", "token") in exported


def test_slurm_tries_again_at_75_and_shows_the_token_to_nobody() -> None:
    text = (INFRA / "slurm" / "mergeyard.sbatch").read_text("utf-8")
    assert "code == 75" in text and "scontrol requeue" in text
    assert "\n#SBATCH --signal=B:TERM@90\n" in text, "before the time is up, and while what is told has time to end"
    commands = [line for line in text.splitlines() if "srun" in line or "together" in line]
    assert not any("RAY_AUTH_TOKEN" in line for line in commands)
