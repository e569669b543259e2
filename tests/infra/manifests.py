"""What is wrong with a set of Kubernetes documents, in the order of who would object.

First the API server (Kubernetes' own schemas, strict; KubeRay's resource definitions), then KubeRay's operator (in the
spirit of its controllers/ray/utils/validation.go), then a user whose node was taken away or whose dashboard was found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

Document = dict[str, Any]

CRDS = Path(__file__).with_name("crds")
RAY_KINDS = ("RayCluster", "RayJob", "RayCronJob")
LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36, "CronJob": 52}
MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
CUT_NODE = {
    "RAY_health_check_initial_delay_ms",
    "RAY_health_check_period_ms",
    "RAY_health_check_timeout_ms",
    "RAY_health_check_failure_threshold",
    "RAY_grpc_client_keepalive_time_ms",
    "RAY_grpc_client_keepalive_timeout_ms",
}
CUT_NODE_SECONDS = 20
SPOT_KEYS = {
    "karpenter.sh/capacity-type",
    "eks.amazonaws.com/capacityType",
    "cloud.google.com/gke-spot",
    "kubernetes.azure.com/scalesetpriority",
}


def objections(documents: list[Document], version: str) -> list[str]:
    """`Kind/name: complaint`, one an objection; `version` is what the images are to be of."""
    refused = [f"{place(document)}: {complaint}" for document in documents for complaint in against_schema(document)]
    if refused:
        return refused
    found: list[str] = []
    for document in documents:
        rules = (against_name, against_job, against_clusters, against_pods, against_cron)
        found += [f"{place(document)}: {complaint}" for rule in rules for complaint in rule(document)]
        found += [f"{place(document)}: {complaint}" for complaint in against_images(document, version)]
    return found + list(against_the_whole(documents))


def place(document: Document) -> str:
    """`Kind/name`."""
    return f"{document['kind']}/{document['metadata']['name']}"


# ---- what is in a document


def job_spec(document: Document) -> Document | None:
    """The RayJob's spec, wherever it lies."""
    if document["kind"] == "RayJob":
        return document["spec"]
    return document["spec"].get("jobTemplate") if document["kind"] == "RayCronJob" else None


def cluster_spec(document: Document) -> Document | None:
    """The RayCluster's spec, wherever it lies."""
    if document["kind"] == "RayCluster":
        return document["spec"]
    return (job_spec(document) or {}).get("rayClusterSpec")


def groups(cluster: Document) -> Iterator[tuple[str, Document]]:
    """Head and worker groups by name."""
    yield "head", cluster["headGroupSpec"]
    yield from ((group["groupName"], group) for group in cluster.get("workerGroupSpecs", []))


def pods(document: Document) -> Iterator[tuple[str, Document]]:
    """Every pod template by the name of what makes its pods."""
    if cluster := cluster_spec(document):
        yield from ((name, group["template"]) for name, group in groups(cluster))
    if document["kind"] == "CronJob":
        yield "job", document["spec"]["jobTemplate"]["spec"]["template"]


def environment(pod: Document, documents: list[Document]) -> dict[str, str]:
    """The variables of the pod's first container, of config maps and by value."""
    container = pod["spec"]["containers"][0]
    maps = {entry["metadata"]["name"]: entry.get("data", {}) for entry in documents if entry["kind"] == "ConfigMap"}
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= maps.get(source.get("configMapRef", {}).get("name"), {})
    return found | {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}


# ---- the API server


def against_schema(document: Document) -> Iterator[str]:
    if document["kind"] in RAY_KINDS:
        yield from _against_definition(document)
    else:
        yield from _against_kubernetes(document)
    for name, template in pods(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
        yield from (f"{name}: {complaint}" for complaint in _against_kubernetes(pod))


def _against_kubernetes(document: Document) -> Iterator[str]:
    yield from _refused_by_kubernetes(json.dumps(document))


@cache
def _refused_by_kubernetes(document: str) -> tuple[str, ...]:
    """Remembered, for its schemas are read anew for every document."""
    newest = kubernetes_validate.latest_version()
    try:
        kubernetes_validate.validate(json.loads(document), newest, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (f"{'.'.join(map(str, error.path))}: {error.message}",)
    return ()


def _against_definition(document: Document) -> Iterator[str]:
    if document["apiVersion"] != "ray.io/v1":
        yield f"apiVersion {document['apiVersion']} is not ray.io/v1"
    schemas = {f"{kind}.json": json.loads((CRDS / f"{kind}.json").read_text("utf-8")) for kind in RAY_KINDS}
    registry: Any = Registry().with_resources(
        (name, Resource.from_contents(schema, DRAFT202012)) for name, schema in schemas.items()
    )
    validator = jsonschema.Draft202012Validator(schemas[f"{document['kind']}.json"], registry=registry)
    for error in validator.iter_errors(document["spec"]):
        yield f"spec.{'.'.join(map(str, error.absolute_path))}: {error.message}"


# ---- KubeRay's operator


def against_name(document: Document) -> Iterator[str]:
    name, kind = document["metadata"]["name"], document["kind"]
    if len(name) > LONGEST_NAME.get(kind, 63):
        yield f"a {kind}'s name has {LONGEST_NAME[kind]} characters at most"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield "the name is not one of DNS"


def against_job(document: Document) -> Iterator[str]:
    spec = job_spec(document)
    if spec is None:
        return
    mode, selector = spec.get("submissionMode", "K8sJobMode"), spec.get("clusterSelector")
    retries, shutdown = spec.get("backoffLimit", 0), spec.get("shutdownAfterJobFinishes", False)
    if mode not in MODES:
        yield f"submissionMode {mode} is none of {', '.join(MODES)}"
    if not selector and not spec.get("rayClusterSpec"):
        yield "neither rayClusterSpec nor clusterSelector"
    if selector and retries:
        yield "backoffLimit makes new clusters, clusterSelector takes one that is there"
    if selector and spec.get("suspend"):
        yield "clusterSelector cannot be suspended"
    if selector and mode == "SidecarMode":
        yield "clusterSelector is not for SidecarMode"
    if mode == "InteractiveMode" and retries:
        yield "InteractiveMode knows no backoffLimit"
    if mode in ("SidecarMode", "HTTPMode") and ("submitterConfig" in spec or "submitterPodTemplate" in spec):
        yield f"{mode} has no submitter"
    if spec.get("suspend") and not shutdown:
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttlSecondsAfterFinished is below zero"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shutdown:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if shutdown and spec.get("deletionStrategy", {}).get("deletionRules"):
        yield "shutdownAfterJobFinishes and deletionRules exclude each other"
    if spec.get("activeDeadlineSeconds", 1) <= 0 or retries < 0:
        yield "activeDeadlineSeconds and backoffLimit are not below zero"


def against_clusters(document: Document) -> Iterator[str]:
    cluster = cluster_spec(document)
    if cluster is None:
        return
    yield from _against_authentication(cluster)
    yield from _against_exposure(cluster)
    scaling = cluster.get("enableInTreeAutoscaling", False)
    for name, group in groups(cluster):
        start = group.get("rayStartParams", {})
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & start.keys():
            yield f"{name}: resources here or in rayStartParams, not both"
        if "labels" in start:
            yield f"{name}: labels are not a rayStartParam"
        if scaling and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{name}: the autoscaler wants restartPolicy Never"
        if scaling and name != "head" and group.get("minReplicas", 0) < 1:
            yield f"{name}: a run that starts without a worker refuses the job"
    if cluster["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
        yield "head: tasks would run beside the driver; num-cpus is not 0"


# ---- who finds the dashboard


def _against_authentication(cluster: Document) -> Iterator[str]:
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "whoever reaches the dashboard runs code: authOptions.mode is not token"
        return
    release = tuple(map(int, re.findall(r"\d+", cluster.get("rayVersion", "0"))))
    if release < (2, 52, 0):
        yield "tokens need rayVersion 2.52.0 or newer"


def _against_exposure(cluster: Document) -> Iterator[str]:
    head = cluster["headGroupSpec"]
    kinds = (head.get("serviceType", "ClusterIP"), head.get("headService", {}).get("spec", {}).get("type", "ClusterIP"))
    if kinds != ("ClusterIP", "ClusterIP") or head.get("enableIngress") or head.get("ingressOptions"):
        yield "the dashboard can be reached from outside"
    if any(pod["spec"].get("hostNetwork") for _, group in groups(cluster) for pod in [group["template"]]):
        yield "the host's network is everybody's"


# ---- whose node is taken away, and what a pod may do


def against_pods(document: Document) -> Iterator[str]:
    for name, pod in pods(document):
        spec = pod["spec"]
        if spec.get("securityContext", {}).get("runAsNonRoot") is not True or spec["securityContext"]["runAsUser"] == 0:
            yield f"{name}: runs as root"
        for container in spec["containers"]:
            context = container.get("securityContext", {})
            if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
                yield f"{name}: may become root"
            if context.get("capabilities", {}).get("drop") != ["ALL"]:
                yield f"{name}: keeps capabilities"
            limits, requests = (container.get("resources", {}).get(key) for key in ("limits", "requests"))
            if not limits or limits != requests:
                yield f"{name}: is evicted first, for its requests are not its limits"
        if spec.get("terminationGracePeriodSeconds") != 120:
            yield f"{name}: has not the 120 seconds that a cloud gives"
    if cluster := cluster_spec(document):
        yield from _against_groups(cluster)


def _against_groups(cluster: Document) -> Iterator[str]:
    for name, group in groups(cluster):
        spec = group["template"]["spec"]
        ports = {port["name"]: str(port["containerPort"]) for port in spec["containers"][0].get("ports", [])}
        told = group["template"]["metadata"].get("annotations", {}).get("prometheus.io/port")
        if told is None or told != ports.get("metrics"):
            yield f"{name}: Prometheus does not find its metrics"
        if name == "head":
            if {key for key, operator in _node_terms(spec) if operator == "NotIn"} != SPOT_KEYS:
                yield "head: may be put on a spot node"
            continue
        hook = spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        deadline = re.search(r"ray drain-node .*--deadline-remaining-seconds (\d+)", " ".join(hook))
        if not deadline or int(deadline[1]) >= spec.get("terminationGracePeriodSeconds", 30):
            yield f"{name}: is not drained before it ends"
        spot = group.get("labels", {}).get("ray.io/market-type") == "spot"
        if spot != ({key for key, operator in _node_terms(spec) if operator == "In"} == SPOT_KEYS):
            yield f"{name}: label and nodes disagree about spot"


def _node_terms(pod: Document) -> Iterator[tuple[str, str]]:
    affinity = pod.get("affinity", {}).get("nodeAffinity", {})
    for term in affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", []):
        for expression in term["matchExpressions"]:
            yield expression["key"], expression["operator"]


def against_images(document: Document, version: str) -> Iterator[str]:
    for name, pod in pods(document):
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            image = container["image"]
            if not re.fullmatch(rf"[\w./-]+:{re.escape(version)}-(cpu|gpu)", image):
                yield f"{name}: image {image} is not of version {version}"
            gpus = container.get("resources", {}).get("limits", {}).get("nvidia.com/gpu", "0")
            if (gpus != "0") != image.endswith("-gpu"):
                yield f"{name}: image {image} and {gpus} GPUs do not belong together"


def against_cron(document: Document) -> Iterator[str]:
    spec = document.get("spec", {})
    if document["kind"] in ("CronJob", "RayCronJob"):
        ranges = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
        fields = spec["schedule"].split()
        if len(fields) != len(ranges) or not all(map(_is_cron, fields, ranges)):
            yield f"schedule {spec['schedule']!r} is not five fields of cron"
    if document["kind"] == "CronJob":
        if spec.get("concurrencyPolicy") != "Forbid":
            yield "a slow night is overtaken by the next"
        rules = spec["jobTemplate"]["spec"].get("podFailurePolicy", {}).get("rules", [])
        final = [rule["onExitCodes"]["values"] for rule in rules if rule["action"] == "FailJob"]
        if final != [[1, 2, 3]]:
            yield "a verdict is taken for a mishap, or 75 for a verdict"


def _is_cron(field: str, bounds: tuple[int, int]) -> bool:
    numbers = [int(number) for number in re.findall(r"\d+", field.split("/")[0])]
    return bool(re.fullmatch(r"(\*|\d+(-\d+)?(,\d+(-\d+)?)*)(/[1-9]\d*)?", field)) and all(
        bounds[0] <= number <= bounds[1] for number in numbers
    )


# ---- all of them together


def against_the_whole(documents: list[Document]) -> Iterator[str]:
    named = {(document["kind"], document["metadata"]["name"]) for document in documents}
    labelled: list[dict[str, str]] = []
    for document in documents:
        for name, pod in pods(document):
            where = f"{place(document)}: {name}"
            labels: dict[str, str] = dict(pod.get("metadata", {}).get("labels", {}))
            if cluster_spec(document):
                labels["ray.io/node-type"] = "head" if name == "head" else "worker"  # KubeRay's
            labelled.append(labels)
            yield from (f"{where}: no {kind} named {it}" for kind, it in _references(pod) if (kind, it) not in named)
            if not any(_selects(entry, labels) for entry in documents if entry["kind"] == "NetworkPolicy"):
                yield f"{where}: no NetworkPolicy is about it"
            if cluster_spec(document):
                yield from (f"{where}: {complaint}" for complaint in _against_slow_loss(environment(pod, documents)))
        if cluster := cluster_spec(document):
            secret = cluster.get("authOptions", {}).get("secretName")
            if ("Secret", secret) not in named:
                yield f"{place(document)}: no Secret named {secret}"
    for budget in (document for document in documents if document["kind"] == "PodDisruptionBudget"):
        if not any(_selects(budget, labels) for labels in labelled):
            yield f"{place(budget)}: is about no pod"
    if len({document["metadata"].get("namespace") for document in documents}) > 1:
        yield "more than one namespace"


def _references(pod: Document) -> Iterator[tuple[str, str]]:
    spec = pod["spec"]
    yield "ServiceAccount", spec.get("serviceAccountName", "default")
    yield from (
        ("ConfigMap", volume["configMap"]["name"]) for volume in spec.get("volumes", []) if "configMap" in volume
    )
    for source in spec["containers"][0].get("envFrom", []):
        if "configMapRef" in source:
            yield "ConfigMap", source["configMapRef"]["name"]


def _selects(selector: Document, labels: dict[str, str]) -> bool:
    spec = selector["spec"]
    wanted: dict[str, str] = spec.get("selector", spec.get("podSelector", {})).get("matchLabels", {})
    return wanted.items() <= labels.items()


def _against_slow_loss(variables: dict[str, str]) -> Iterator[str]:
    """Dead after the health checks, noticed by the owner after the keepalive: both at once, whichever is later."""
    if missing := CUT_NODE - variables.keys():
        yield f"a cut node's work starts elsewhere after minutes: {', '.join(sorted(missing))} not set"
        return
    numbers = {name.removeprefix("RAY_"): int(variables[name]) for name in CUT_NODE}
    each = numbers["health_check_period_ms"] + numbers["health_check_timeout_ms"]
    dead = numbers["health_check_initial_delay_ms"] + numbers["health_check_failure_threshold"] * each
    noticed = numbers["grpc_client_keepalive_time_ms"] + numbers["grpc_client_keepalive_timeout_ms"]
    if max(dead, noticed) > CUT_NODE_SECONDS * 1000:
        yield f"a cut node's work starts elsewhere after {max(dead, noticed) / 1000:g} s"
