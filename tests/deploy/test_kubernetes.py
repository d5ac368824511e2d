"""The Kubernetes manifests are valid, grant few rights, and roll out without losing a request."""

from typing import Any

import kubernetes_validate
import pytest

import config
from embedding_service import __version__
from embedding_service.settings import config as settings
from tests.deploy.load import Load
from tests.deploy.rollout import Pod, find, render
from tests.service import wait_until

overlays = pytest.mark.parametrize("overlay", ["cpu", "gpu"])


@overlays
def test_every_resource_is_valid(overlay: str) -> None:
    resources = render(overlay)
    assert {resource["kind"] for resource in resources} == {
        "ConfigMap",
        "Deployment",
        "HorizontalPodAutoscaler",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Service",
    }
    for resource in resources:
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def test_validation_would_notice_a_misspelt_field() -> None:
    resource = find(render("cpu"), "Deployment")
    resource["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


@overlays
def test_everything_selects_the_pods_and_nothing_else(overlay: str) -> None:
    resources = render(overlay)
    labels = find(resources, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert labels
    assert find(resources, "Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert find(resources, "Service")["spec"]["selector"] == labels
    assert find(resources, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert find(resources, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels


@overlays
def test_the_configmap_has_only_known_settings(overlay: str) -> None:
    data = find(render(overlay), "ConfigMap")["data"]
    known = set(settings.NAMES)
    assert set(data) <= known
    config.load(data)
    assert data["DEVICE"] == {"cpu": "cpu", "gpu": "cuda"}[overlay]


@overlays
def test_pods_have_no_rights(overlay: str) -> None:
    spec, container = pod(render(overlay))
    assert container["image"] == f"embedding-service:{__version__}"
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/tmp", "/dev/shm", "/models"}


def test_a_pod_of_the_gpu_overlay_has_a_gpu_and_no_fallback() -> None:
    resources = render("gpu")
    _, container = pod(resources)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert find(resources, "ConfigMap")["data"]["CPU_FALLBACK"] == "false"


@overlays
def test_the_grace_period_covers_the_hook_and_the_requests_in_flight(overlay: str) -> None:
    resources = render(overlay)
    spec, container = pod(resources)
    settings = config.load(find(resources, "ConfigMap")["data"])
    hook = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] >= hook + settings.graceful_timeout_seconds + 5


@overlays
def test_a_rollout_never_takes_away_a_ready_pod(overlay: str) -> None:
    strategy = find(render(overlay), "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxUnavailable": 0, "maxSurge": 1}


@pytest.mark.deploy
def test_a_rollout_loses_nothing(start_instance, start_nginx) -> None:
    resources = render("cpu")
    template = find(resources, "Deployment")["spec"]["template"]
    settings = find(resources, "ConfigMap")["data"]

    def start_pod() -> Pod:
        started = Pod(template, start_instance(**settings))
        started.wait_ready()
        return started

    pods = [start_pod(), start_pod()]
    # The proxy of a Service never retries, so nginx must not do so here either.
    once = {"proxy_next_upstream error non_idempotent http_503;": "proxy_next_upstream off;"}
    front = start_nginx([pod.instance.port for pod in pods], **once)
    load = Load(front.url, front.certificate)
    try:
        for old in list(pods):
            pods.append(start_pod())
            front.send_to([pod.instance.port for pod in pods])
            pods.remove(old)
            old.terminate(lambda: front.send_to([pod.instance.port for pod in pods]))
        wait_until(lambda: load.answered >= 700 or load.failures, "700 answers", 600)
    finally:
        load.end()
    print(f"{load.answered} answers, slowest {load.slowest_seconds:.2f} s")
    assert load.failures == []
    assert load.answered >= 700


def pod(resources: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    spec = find(resources, "Deployment")["spec"]["template"]["spec"]
    [container] = spec["containers"]
    return spec, container
