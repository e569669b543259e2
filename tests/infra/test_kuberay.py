"""Every overlay renders and nobody objects to it; and every objection is raised where there is a reason.

There is no cluster here: what is checked is what the API server and KubeRay would refuse, not what they do.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.job import load_job
from orchestrator.cli import parser
from tests.infra.manifests import Document, cluster_spec, groups, job_spec, objections, pods

ROOT = Path(__file__).parents[2]
VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
OVERLAYS = ("cluster", "cpu", "gpu", "nightly", "nightly-on-ray", "queued", "spot")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nobody_objects_to_an_overlay(rendered: dict[str, list[Document]], overlay: str) -> None:
    assert objections(rendered[overlay], VERSION) == []


def test_every_overlay_is_looked_at(rendered: dict[str, list[Document]]) -> None:
    assert tuple(rendered) == OVERLAYS


def test_nothing_stands_in_the_folder_twice() -> None:
    files = [path for path in (ROOT / "infra").rglob("*") if path.is_file()]
    twice = [count for count in Counter(path.read_bytes() for path in files).values() if count > 1]
    assert len(files) > 30 and twice == []


def test_each_overlay_is_what_its_name_says(rendered: dict[str, list[Document]]) -> None:
    ours = ("RayCluster", "RayJob", "CronJob", "RayCronJob")
    kinds = {name: [entry["kind"] for entry in found if entry["kind"] in ours] for name, found in rendered.items()}
    assert kinds == {
        "cluster": ["RayCluster"],
        "cpu": ["RayJob"],
        "gpu": ["RayJob"],
        "nightly": ["CronJob"],
        "nightly-on-ray": ["RayCronJob"],
        "queued": ["RayJob"],
        "spot": ["RayJob"],
    }
    queued = the(rendered["queued"], "RayJob")
    assert queued["spec"]["suspend"] is True
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert worker(the(rendered["spot"], "RayJob"))["labels"] == {"ray.io/market-type": "spot"}
    assert "labels" not in worker(the(rendered["gpu"], "RayJob"))


def the(documents: list[Document], kind: str) -> Document:
    (found,) = (document for document in documents if document["kind"] == kind)
    return found


def worker(document: Document) -> Document:
    return (cluster_spec(document) or {})["workerGroupSpecs"][0]


def test_the_clusters_ray_is_the_one_that_the_image_installs(rendered: dict[str, list[Document]]) -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    found = {spec["rayVersion"] for entries in rendered.values() for entry in entries if (spec := cluster_spec(entry))}
    assert pinned and found == {pinned[1]}


# ---- the job in it


def typed(document: Document) -> list[str]:
    """The command of a job, of whichever kind."""
    if spec := job_spec(document):
        return spec["entrypoint"].split()
    return document["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["command"]


@pytest.mark.parametrize("overlay", ["cpu", "gpu", "spot", "queued", "nightly", "nightly-on-ray"])
def test_the_command_is_one_that_mergeyard_takes_and_its_job_is_mounted_and_loads(
    rendered: dict[str, list[Document]], overlay: str
) -> None:
    documents = rendered[overlay]
    (document,) = (entry for entry in documents if entry["kind"] in ("RayJob", "RayCronJob", "CronJob"))
    program, *words = typed(document)
    assert program == "mergeyard"
    path = Path(parser().parse_args(words).job)
    _, pod = next(pods(document))
    (mount,) = (
        mount for mount in pod["spec"]["containers"][0]["volumeMounts"] if mount["mountPath"] == str(path.parent)
    )
    (volume,) = (volume for volume in pod["spec"]["volumes"] if volume["name"] == mount["name"])
    files = {entry["metadata"]["name"]: entry["data"] for entry in documents if entry["kind"] == "ConfigMap"}
    job = load_job(files[volume["configMap"]["name"]][path.name], path.name)
    assert (job.gate is not None) == (words[0] == "nightly")
    name, group = list(pods(document))[-1]
    has = group["spec"]["containers"][0]["resources"]["limits"]
    assert job.workers.cpus <= float(has["cpu"]), name
    assert job.workers.memory_bytes <= int(has["memory"].removesuffix("Gi")) << 30, name


# ---- the token


def test_no_token_is_in_the_repository() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "infra"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "infra/kuberay/base/kustomization.yaml" in listed.stdout.split()
    assert "token.env" not in listed.stdout
    ignored = subprocess.run(["git", "check-ignore", "-q", "infra/kuberay/base/token.env"], cwd=ROOT)
    assert ignored.returncode == 0
    written = [
        path for path in (ROOT / "infra").rglob("*.yaml") for document in documents_of(path) if is_secret(document)
    ]
    assert written == []


def documents_of(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def is_secret(document: Any) -> bool:
    return isinstance(document, dict) and document.get("kind") == "Secret"


def test_without_a_token_nothing_is_rendered(tmp_path: Path, kustomize: Any) -> None:
    import shutil

    from tests.infra.conftest import KUBERAY, run_kustomize

    shutil.copytree(KUBERAY, tmp_path / "kuberay", ignore=shutil.ignore_patterns("token.env"))
    done = run_kustomize(tmp_path / "kuberay" / "overlays" / "cpu")
    assert done.returncode != 0
    assert "token.env" in done.stderr


# ---- planted mistakes


def job(documents: list[Document]) -> Document:
    return the(documents, "RayJob")["spec"]


def cluster(documents: list[Document]) -> Document:
    return job(documents)["rayClusterSpec"]


def head(documents: list[Document]) -> Document:
    return cluster(documents)["headGroupSpec"]


def workers(documents: list[Document]) -> Document:
    return dict(groups(cluster(documents)))["gpu-workers"]


def container(documents: list[Document]) -> Document:
    return workers(documents)["template"]["spec"]["containers"][0]


def put(find: Callable[[list[Document]], Document], **values: Any) -> Callable[[list[Document]], None]:
    """A mistake: `values` where `find` looks; None takes a key away."""

    def plant(documents: list[Document]) -> None:
        place = find(documents)
        for key, value in values.items():
            if value is None:
                del place[key]
            else:
                place[key] = value

    return plant


def without(kind: str) -> Callable[[list[Document]], None]:
    def plant(documents: list[Document]) -> None:
        documents[:] = [document for document in documents if document["kind"] != kind]

    return plant


def named(kind: str, name: str) -> Callable[[list[Document]], None]:
    return put(lambda documents: the(documents, kind)["metadata"], name=name)


def selector_with(**values: Any) -> Callable[[list[Document]], None]:
    return put(job, clusterSelector={"ray.io/cluster": "mine"}, **values)


def settings(documents: list[Document]) -> Document:
    return next(entry for entry in documents if entry["metadata"]["name"] == "mergeyard-environment")["data"]


MISTAKES = {
    # Kubernetes and the resource definitions
    "unknown key of a RayJob": (put(job, concurrencyPolicy="Forbid"), "'concurrencyPolicy' was unexpected"),
    "misspelt key of a cluster": (put(cluster, rayversion="2.60.0"), "'rayversion' was unexpected"),
    "text for a number": (put(job, backoffLimit="three"), "'three' is not of type 'integer'"),
    "unknown auth mode": (put(cluster, authOptions={"mode": "tokens"}), "'tokens' is not one of"),
    "misspelt key of a pod": (put(container, resource={}), "'resource' was unexpected"),
    "misspelt key of a policy": (
        put(lambda found: the(found, "NetworkPolicy")["spec"], podselector={}),
        "'podselector' was unexpected",
    ),
    # KubeRay's operator
    "unknown submission mode": (put(job, submissionMode="Bogus"), "submissionMode Bogus"),
    "a name too long": (named("RayJob", "m" * 48), "47 characters at most"),
    "a name that is none": (named("RayJob", "0night"), "not one of DNS"),
    "time to live without shutdown": (put(job, shutdownAfterJobFinishes=False), "ttlSecondsAfterFinished needs"),
    "negative time to live": (put(job, ttlSecondsAfterFinished=-1), "below zero"),
    "no deadline at all": (put(job, activeDeadlineSeconds=0), "not below zero"),
    "suspended without shutdown": (
        put(job, suspend=True, shutdownAfterJobFinishes=None, ttlSecondsAfterFinished=None),
        "suspend needs shutdownAfterJobFinishes",
    ),
    "retries on a selected cluster": (selector_with(), "backoffLimit makes new clusters"),
    "selected and suspended": (selector_with(suspend=True, backoffLimit=0), "cannot be suspended"),
    "selected with a sidecar": (selector_with(submissionMode="SidecarMode", backoffLimit=0), "not for SidecarMode"),
    "no cluster": (put(job, rayClusterSpec=None), "neither rayClusterSpec nor clusterSelector"),
    "interactive with retries": (put(job, submissionMode="InteractiveMode"), "InteractiveMode knows no"),
    "a submitter for none": (put(job, submitterConfig={"backoffLimit": 10}), "HTTPMode has no submitter"),
    "rules beside shutdown": (
        put(job, deletionStrategy={"deletionRules": [{"policy": "DeleteSelf", "condition": {"ttlSeconds": 1}}]}),
        "exclude each other",
    ),
    "Ray too old for tokens": (put(cluster, rayVersion="2.51.9"), "2.52.0 or newer"),
    "tokens without a version": (put(cluster, rayVersion=None), "2.52.0 or newer"),
    "resources said twice": (put(head, resources={"CPU": "1"}), "not both"),
    "labels at the wrong place": (put(lambda d: workers(d)["rayStartParams"], labels="a=b"), "not a rayStartParam"),
    "autoscaler and restarts": (
        lambda d: (
            put(cluster, enableInTreeAutoscaling=True)(d),
            put(lambda d: workers(d)["template"]["spec"], restartPolicy="Always")(d),
        ),
        "restartPolicy Never",
    ),
    "autoscaler from nothing": (
        lambda d: (put(cluster, enableInTreeAutoscaling=True)(d), put(workers, minReplicas=0)(d)),
        "starts without a worker",
    ),
    # who finds the dashboard
    "no token": (put(cluster, authOptions=None), "whoever reaches the dashboard"),
    "tokens off": (put(cluster, authOptions={"mode": "disabled"}), "whoever reaches the dashboard"),
    "a load balancer": (put(head, serviceType="LoadBalancer"), "from outside"),
    "an ingress": (put(head, enableIngress=True), "from outside"),
    "a service of another type": (put(head, headService={"spec": {"type": "NodePort"}}), "from outside"),
    "the host's network": (put(lambda d: workers(d)["template"]["spec"], hostNetwork=True), "host's network"),
    "no network policy": (without("NetworkPolicy"), "no NetworkPolicy"),
    "a token that is not there": (without("Secret"), "no Secret named mergeyard-token"),
    # whose node is taken away
    "tasks on the head": (put(lambda d: head(d)["rayStartParams"], **{"num-cpus": "2"}), "beside the driver"),
    "no drain": (put(container, lifecycle=None), "not drained"),
    "a drain longer than its time": (
        put(lambda d: workers(d)["template"]["spec"], terminationGracePeriodSeconds=60),
        "not drained",
    ),
    "a head on spot": (put(lambda d: head(d)["template"]["spec"], affinity=None), "head: may be put on a spot node"),
    "spot by name alone": (put(workers, labels={"ray.io/market-type": "spot"}), "disagree about spot"),
    "slow health checks": (put(settings, RAY_health_check_timeout_ms="10000"), "after 34 s"),
    "slow keepalive": (put(settings, RAY_grpc_client_keepalive_time_ms="300000"), "after 305 s"),
    "a setting missing": (put(settings, RAY_grpc_client_keepalive_timeout_ms=None), "after minutes"),
    "a budget about nobody": (
        put(
            lambda d: the(d, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"], **{"ray.io/node-type": "heads"}
        ),
        "is about no pod",
    ),
    "metrics at another port": (put(container, ports=[{"name": "metrics", "containerPort": 9090}]), "does not find"),
    # what a pod may do
    "root": (put(lambda d: head(d)["template"]["spec"]["securityContext"], runAsUser=0), "runs as root"),
    "no user": (put(lambda d: head(d)["template"]["spec"], securityContext=None), "runs as root"),
    "escalation": (put(container, securityContext={"capabilities": {"drop": ["ALL"]}}), "may become root"),
    "capabilities": (put(container, securityContext={"allowPrivilegeEscalation": False}), "keeps capabilities"),
    "limits above requests": (put(lambda d: container(d)["resources"]["limits"], memory="64Gi"), "evicted first"),
    "the newest image": (put(container, image="mergeyard:latest"), "is not of version"),
    "no tag": (put(container, image="mergeyard"), "is not of version"),
    "an older image": (put(container, image="mergeyard:0.0.1-gpu"), "is not of version"),
    "a CPU image for GPUs": (put(container, image=f"mergeyard:{VERSION}-cpu"), "do not belong together"),
    "an account that is not there": (without("ServiceAccount"), "no ServiceAccount named mergeyard-driver"),
    "a job that is not there": (without("ConfigMap"), "no ConfigMap named mergeyard-job"),
    "two namespaces": (
        put(lambda d: the(d, "NetworkPolicy")["metadata"], namespace="default"),
        "more than one namespace",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_objected_to(rendered: dict[str, list[Document]], mistake: str) -> None:
    plant, expected = MISTAKES[mistake]
    documents = deepcopy(rendered["gpu"])
    plant(documents)
    found = objections(documents, VERSION)
    assert any(expected in complaint for complaint in found), found


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("concurrencyPolicy", "Allow", "overtaken"),
        ("schedule", "0 25 * * *", "five fields"),
        ("schedule", "@nightly", "five fields"),
        ("schedule", "*/0 2 * * *", "five fields"),
        ("concurrencypolicy", "Forbid", "'concurrencypolicy' was unexpected"),
    ],
)
def test_a_planted_mistake_of_the_night_is_objected_to(
    rendered: dict[str, list[Document]], key: str, value: str, expected: str
) -> None:
    documents = deepcopy(rendered["nightly"])
    the(documents, "CronJob")["spec"][key] = value
    assert any(expected in complaint for complaint in objections(documents, VERSION))


def test_a_verdict_that_is_tried_again_is_objected_to(rendered: dict[str, list[Document]]) -> None:
    documents = deepcopy(rendered["nightly"])
    the(documents, "CronJob")["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"][
        "values"
    ] = [75]
    assert any("taken for a mishap" in complaint for complaint in objections(documents, VERSION))


def test_rayjobs_own_cron_has_no_concurrency_policy(rendered: dict[str, list[Document]]) -> None:
    documents = deepcopy(rendered["nightly-on-ray"])
    the(documents, "RayCronJob")["spec"]["concurrencyPolicy"] = "Forbid"
    assert any("'concurrencyPolicy' was unexpected" in complaint for complaint in objections(documents, VERSION))


def test_a_long_name_of_a_cluster_or_a_night_is_objected_to(rendered: dict[str, list[Document]]) -> None:
    for overlay, kind, most in (("cluster", "RayCluster", 53), ("nightly-on-ray", "RayCronJob", 36)):
        for length in (most, most + 1):
            documents = deepcopy(rendered[overlay])
            named(kind, "m" * length)(documents)
            assert bool(objections(documents, VERSION)) == (length > most), (kind, length)
