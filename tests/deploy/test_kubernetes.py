"""The manifests: each fits its schema, and what they say of each other and of the server is so."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from twinjet import config
from twinjet.epp import settings as epp_settings
from twinjet.server.main import LIVENESS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
HERE = Path(__file__).parent / "kubernetes"
NODE_FOLDER = ROOT / ".cache" / "kubernetes"
NODE_PACKAGES = ["kubernetes-models@5.1.0", "@kubernetes-models/gateway-api@2.0.0", "typescript@5.9.3"]

Object = dict[str, Any]


def objects() -> list[Object]:
    """All objects of the kustomization's resources."""
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    return [o for file in kustomization["resources"] for o in yaml.safe_load_all((FOLDER / file).read_text())]


def one(kind: str, name: str) -> Object:
    (found,) = (o for o in objects() if o["kind"] == kind and o["metadata"]["name"] == name)
    return found


@pytest.fixture(scope="session")
def node_folder() -> Path:
    """Where Node finds the schemas."""
    if shutil.which("npm") is None:
        pytest.skip("npm is missing")
    if not (NODE_FOLDER / "node_modules" / "typescript").exists():
        NODE_FOLDER.mkdir(parents=True, exist_ok=True)
        install = ["npm", "install", "--prefix", str(NODE_FOLDER), "--no-fund", "--no-audit", *NODE_PACKAGES]
        subprocess.run(install, check=True, capture_output=True, timeout=240)
    return NODE_FOLDER


def complaints(folder: Path, manifests: list[Object]) -> list[str]:
    done = subprocess.run(
        ["node", str(HERE / "validate.mjs"), str(folder)],
        input=json.dumps(manifests), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_every_manifest_fits_its_schema(node_folder: Path) -> None:
    known = [o for o in objects() if o["kind"] != "InferencePool"]
    assert len(known) >= 12
    assert complaints(node_folder, known) == []


def test_the_check_finds_wrong_values_and_unknown_fields(node_folder: Path) -> None:
    deployment, route, scaler = (
        copy.deepcopy(one(*what))
        for what in (
            ("Deployment", "twinjet"),
            ("GRPCRoute", "twinjet"),
            ("HorizontalPodAutoscaler", "twinjet"),
        )
    )
    deployment["spec"]["replicas"] = "two"
    route["spec"]["rules"][0]["matches"][0]["method"]["servce"] = "x"
    scaler["spec"]["metrics"][0]["pods"]["target"]["averagValue"] = "1"
    found = complaints(node_folder, [deployment, route, scaler])
    assert any("replicas must be integer" in line for line in found)
    assert any("servce" in line for line in found) and any("averagValue" in line for line in found)


def test_the_pool_fits_the_documented_fields() -> None:
    schema = json.loads((HERE / "inferencepool.schema.json").read_text())
    pool = one("InferencePool", "twinjet")
    jsonschema.validate(pool, schema)
    assert pool["spec"]["appProtocol"] == "kubernetes.io/h2c"
    for wrong in ({"extensionRef": {"name": "x"}}, {"targetPorts": [{"number": 0}]}, {"appProtocol": "grpc"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(pool | {"spec": pool["spec"] | wrong}, schema)


def test_the_kustomization_names_every_file_and_image() -> None:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    generated = [file for g in kustomization["configMapGenerator"] for file in g["files"]]
    named = {*kustomization["resources"], *generated, "kustomization.yaml"}
    assert named == {file.name for file in FOLDER.iterdir()}
    images = {c["image"] for o in objects() if o["kind"] == "Deployment" for c in _pod(o)["containers"]}
    assert images == {image["name"] for image in kustomization["images"]}
    maps = {g["name"] for g in kustomization["configMapGenerator"]}
    mounted = {v["configMap"]["name"] for o in objects() if o["kind"] == "Deployment"
               for v in _pod(o)["volumes"] if "configMap" in v}  # fmt: skip
    assert mounted == maps


def test_probes_ask_for_names_and_ports_that_the_server_has() -> None:
    settings = config.load(FOLDER / "twinjet.toml")
    (container,) = _pod(one("Deployment", "twinjet"))["containers"]
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert ports == {"grpc": settings.server.port, "metrics": settings.server.metrics_port}
    assert settings.server.host == "0.0.0.0"
    assert {container[probe]["grpc"]["port"] for probe in _PROBES} == {settings.server.port}
    assert container["readinessProbe"]["grpc"]["service"] in settings.routes
    assert container["livenessProbe"]["grpc"]["service"] == LIVENESS
    assert container["startupProbe"]["grpc"]["service"] == LIVENESS

    picker = epp_settings.load(FOLDER / "epp.toml", {})
    (container,) = _pod(one("Deployment", "twinjet-epp"))["containers"]
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert ports == {"ext-proc": picker.server.port, "metrics": picker.server.metrics_port}
    assert {container[p]["grpc"]["port"] for p in ("readinessProbe", "livenessProbe")} == {picker.server.port}


def test_a_replica_has_time_to_drain() -> None:
    pod = _pod(one("Deployment", "twinjet"))
    pause = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = config.load(FOLDER / "twinjet.toml").server.grace_s
    assert pod["terminationGracePeriodSeconds"] >= pause + grace + 20


def test_everything_points_at_what_there_is() -> None:
    labels = one("Deployment", "twinjet")["spec"]["template"]["metadata"]["labels"].items()
    pool, service, budget, policy = (
        one(*what)["spec"]
        for what in (
            ("InferencePool", "twinjet"), ("Service", "twinjet"), ("PodDisruptionBudget", "twinjet"),
            ("NetworkPolicy", "twinjet"),
        )
    )  # fmt: skip
    for selector in (pool["selector"]["matchLabels"], service["selector"], budget["selector"]["matchLabels"],
                     policy["podSelector"]["matchLabels"]):  # fmt: skip
        assert selector.items() <= labels
    assert service["clusterIP"] == "None"
    settings = config.load(FOLDER / "twinjet.toml").server
    assert (
        [p["number"] for p in pool["targetPorts"]] == [p["port"] for p in service["ports"]] == [settings.port]
    )
    (picker,) = one("Service", "twinjet-epp")["spec"]["ports"]
    assert pool["endpointPickerRef"]["name"] == "twinjet-epp"
    assert pool["endpointPickerRef"]["port"]["number"] == picker["port"]
    replicas = epp_settings.load(FOLDER / "epp.toml", {}).replicas.kubernetes
    assert replicas.service == "twinjet" and replicas.port in {p["name"] for p in service["ports"]}
    (rule,) = one("Role", "twinjet-epp")["rules"]
    assert (rule["resources"], set(rule["verbs"])) == (["endpointslices"], {"list", "watch"})
    scaler = one("HorizontalPodAutoscaler", "twinjet")["spec"]
    assert scaler["scaleTargetRef"]["name"] == "twinjet"
    (backend,) = one("GRPCRoute", "twinjet")["spec"]["rules"][0]["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", "twinjet")


def test_the_route_lets_no_operators_service_through() -> None:
    methods = [m["method"]["service"] for m in one("GRPCRoute", "twinjet")["spec"]["rules"][0]["matches"]]
    assert "twinjet.v1.InferenceService" in methods
    assert not any("Admin" in m or "channelz" in m or "orca" in m for m in methods)


def test_metrics_that_are_asked_for_exist() -> None:
    source = (ROOT / "python" / "twinjet" / "server" / "metrics.py").read_text()
    asked = {
        m["pods"]["metric"]["name"] for m in one("HorizontalPodAutoscaler", "twinjet")["spec"]["metrics"]
    }
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    asked |= set(re.findall(r"Spec: (twinjet_\w+)", page))
    assert len(asked) >= 4
    for name in asked:
        assert f'GaugeMetricFamily("{name}"' in re.sub(r"\(\s+", "(", source), name


@pytest.mark.parametrize("name", ["twinjet", "twinjet-epp"])
def test_pods_run_with_no_more_rights_than_they_need(name: str) -> None:
    pod = _pod(one("Deployment", name))
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert {"memory"} <= container["resources"]["limits"].keys()
    assert all("value" not in variable for variable in container.get("env", ())), "secrets come from secrets"


_PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


def _pod(deployment: Object) -> Object:
    pod: Object = deployment["spec"]["template"]["spec"]
    return pod
