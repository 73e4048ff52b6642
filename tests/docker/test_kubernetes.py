"""The kustomize base: every object fits its schema, and what keeps it safe is there."""

import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml
from promql_parser import parse

from app.settings import Settings
from tests.conftest import REPOSITORY

BASE = REPOSITORY / "docker" / "k8s"
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((BASE / "kustomization.yaml").read_text())
OBJECTS: list[dict[str, Any]] = [
    found for name in KUSTOMIZATION["resources"] for found in yaml.safe_load_all((BASE / name).read_text())
]
WORKLOADS = [found for found in OBJECTS if found["kind"] in {"Deployment", "Job"}]
SCALED = [found for found in OBJECTS if found["kind"] == "ScaledObject"]
GRACE_S = float(next(found for found in OBJECTS if found["kind"] == "ConfigMap")["data"]["DEFEAT_CANCEL_GRACE_S"])


def named(found: dict[str, Any]) -> str:
    return f"{found['kind']}-{found['metadata']['name']}"


def test_every_file_is_a_resource() -> None:
    assert {path.name for path in BASE.iterdir()} == {*KUSTOMIZATION["resources"], "kustomization.yaml"}


@pytest.mark.parametrize("found", [found for found in OBJECTS if found not in SCALED], ids=named)
def test_an_object_fits_its_schema(found: dict[str, Any]) -> None:
    kubernetes_validate.validate(found, "1.30", strict=True)


@pytest.mark.parametrize("found", WORKLOADS, ids=named)
def test_a_pod_is_fit_for_a_restricted_namespace(found: dict[str, Any]) -> None:
    pod = found["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not [volume for volume in pod["volumes"] if "emptyDir" not in volume], "what lasts is in the object store"
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]
        if found["kind"] == "Deployment":
            assert {"livenessProbe", "startupProbe"} <= container.keys()
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_workers_get_the_time_that_a_hand_back_takes() -> None:
    workers = [found for found in WORKLOADS if found["metadata"]["name"].startswith("worker-")]
    assert len(workers) == 2
    for found in workers:
        assert found["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == GRACE_S + 15


def test_workers_are_scaled_on_what_is_served() -> None:
    deployments = {found["metadata"]["name"] for found in WORKLOADS if found["kind"] == "Deployment"}
    for found in SCALED:
        assert found["spec"]["scaleTargetRef"]["name"] in deployments
        for trigger in found["spec"]["triggers"]:
            query = trigger["metadata"]["query"]
            assert parse(query)
            assert "defeat_rows{" in query or "defeat_queue_depth{" in query
            assert float(trigger["metadata"]["threshold"]) > 0


def test_settings_are_settings() -> None:
    data = next(found for found in OBJECTS if found["kind"] == "ConfigMap")["data"]
    known = {f"DEFEAT_{name.upper()}" for name in Settings.model_fields}
    assert {name for name in data if name.startswith("DEFEAT_")} <= known


def test_kustomize_builds_it() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl")
    done = subprocess.run([kubectl, "kustomize", str(BASE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len(OBJECTS)
    assert all(found["metadata"]["namespace"] == "defeat" for found in built if found["kind"] != "Namespace")
