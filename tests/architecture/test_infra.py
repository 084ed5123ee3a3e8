"""What installs and deploys the product fits it: pins, Makefile, image, compose, deployments."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

from pipeline_lib.config import differences, load, read_yaml
from pipeline_lib.stages.run_config import RunConfig
from pipeline_lib.validation import validate

ROOT = Path(__file__).resolve().parents[2]


def pins() -> dict[str, str]:
    """Return the pinned version of every package."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_requirement_is_pinned_to_a_version_it_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(word for extra in project["optional-dependencies"].values() for word in extra),
    ]
    pinned = pins()
    for requirement in map(Requirement, wanted):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} does not allow the pin {version}"


def test_pins_are_of_any_machine() -> None:
    # A local version (`2.13.0+cpu`) is found in one index alone.
    assert [name for name, version in pins().items() if not re.fullmatch(r"[0-9][0-9a-z.]*", version)] == []


def test_every_target_of_the_makefile_is_explained() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    explained = re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE)
    assert sorted(phony.split()) == sorted(explained)
    assert len(explained) <= 10


def test_the_image_copies_what_is_there() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    for name in copied:
        assert (ROOT / name).exists()
        assert re.search(rf"^!{re.escape(name)}/?$", allowed, re.MULTILINE), f"{name} is left out of the build context"
    assert "\nUSER prefline\n" in text


def deployments() -> list[Any]:
    return list(read_yaml(ROOT / "prefect.yaml")["deployments"])


@pytest.mark.parametrize("deployment", deployments(), ids=lambda deployment: deployment["name"])
def test_deployments_fit_the_flow(deployment: dict[str, Any]) -> None:
    file, _, function = deployment["entrypoint"].partition(":")
    assert re.search(rf"^def {function}\(config: RunConfig", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    validate(RunConfig, deployment["parameters"]["config"], where=deployment["name"])
    assert all(schedule["active"] is False for schedule in deployment.get("schedules", []))


def test_the_smoke_deployment_is_the_smoke_preset() -> None:
    (smoke,) = [entry for entry in deployments() if entry["name"] == "smoke"]
    deployed = validate(RunConfig, smoke["parameters"]["config"], where="prefect.yaml")
    assert differences(deployed, load(ROOT / "configs" / "smoke.yaml", RunConfig).value) == {}


def test_compose_has_no_secret_and_opens_loopback_alone() -> None:
    compose = YAML(typ="safe", pure=True).load((ROOT / "infra" / "compose.yaml").read_text(encoding="utf-8"))
    given = set(
        re.findall(r"^([A-Z0-9_]+)=", (ROOT / "infra" / "compose.env.example").read_text("utf-8"), re.MULTILINE)
    )
    asked = set(re.findall(r"\$\{([A-Z0-9_]+)", (ROOT / "infra" / "compose.yaml").read_text(encoding="utf-8")))
    assert given == asked
    for name, service in compose["services"].items():
        for key, value in service["environment"].items():
            secret = re.search(r"PASSWORD|SECRET|KEY|AUTH", key)
            assert not secret or str(value).startswith("${"), f"{name}: {key} is written down"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_the_kubernetes_template_uses_its_variables() -> None:
    text = (ROOT / "infra" / "k8s" / "work-pool-job-template.json").read_text(encoding="utf-8")
    template = json.loads(text)
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["terminationGracePeriodSeconds"] >= 60
