"""Steps on a read-only root file system: the policy that asks for one, and a whole run that has nothing else to write to."""

import json
import re
import sys
from pathlib import Path

import celpy
import pytest
import yaml

from pipelines.cluster import WRITABLE
from pipelines.compiling import SPECS, compile_spec, documents
from tests.conformance.test_manifests import MANIFESTS, check_type, restricted
from tests.support import read_only
from tests.support.tiny import tiny_run
from xtoken_core.spec import DistillationSpec

SCHEMA = json.loads((Path(__file__).parents[1] / "support" / "schemas" / "mutatingadmissionpolicies.json").read_text())


@pytest.fixture
def policies() -> list[dict]:
    return list(yaml.safe_load_all((MANIFESTS / "read-only-root.yaml").read_text()))


def test_the_policy_is_of_kubernetes_own_type_and_bound(policies):
    policy, binding = policies
    for resource in policies:
        assert resource["apiVersion"] == "admissionregistration.k8s.io/v1"
        check_type(resource, f"V1{resource['kind']}", resource["kind"], SCHEMA)
    assert binding["spec"]["policyName"] == policy["metadata"]["name"]


def test_it_is_about_the_pods_of_steps(policies):
    selected = policies[0]["spec"]["matchConstraints"]["objectSelector"]["matchLabels"]
    spec = DistillationSpec.from_yaml(SPECS / "llama-1b-from-qwen.yaml")
    configs = documents(compile_spec(spec))[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    assert len(configs) > 5
    assert all(config["podMetadata"]["labels"].items() >= selected.items() for config in configs)


def test_it_makes_the_root_of_a_step_read_only_and_changes_nothing_else(policies):
    """The pod as KFP's compiler and Argo make it; the patch is merged by the containers' names, as the API server does."""
    context = {"allowPrivilegeEscalation": False, "runAsNonRoot": True, "runAsUser": 1000, "capabilities": {"drop": ["ALL"]}}
    main = {"name": "main", "image": "xtoken", "securityContext": context | {"seccompProfile": {"type": "RuntimeDefault"}}}
    pod = {"spec": {"containers": [{"name": "wait", "image": "argoexec"}, main]}}
    patch = evaluated(policies[0]["spec"]["mutations"][0]["applyConfiguration"]["expression"], pod)
    check_names(patch, ["Object"])
    changes = {container["name"]: container for container in patch["spec"]["containers"]}
    assert set(changes) == {"main"} and set(changes["main"]) - {""} == {"name", "securityContext"}
    main["securityContext"] |= {field: value for field, value in changes["main"]["securityContext"].items() if field}
    assert main["securityContext"]["readOnlyRootFilesystem"] is True and main["securityContext"]["runAsUser"] == 1000
    assert restricted({"containers": [main]}) == []
    check_type(main, "V1Container", "main")


def evaluated(expression: str, pod: dict) -> dict:
    """What an apply configuration comes to. CEL's Python has no types of Kubernetes: an object is a map, its type's name under ""."""
    plain = re.sub(r"(Object[\w.]*)\{", r'{"": "\1", ', re.sub(r"(\w+):", r'"\1":', expression))
    environment = celpy.Environment()
    found = environment.program(environment.compile(plain)).evaluate({"object": celpy.json_to_cel(pod)})
    return json.loads(json.dumps(found, cls=celpy.CELJSONEncoder))


def check_names(value, path: list[str]) -> None:
    """The API server's rule: an object's type is named by its path of fields from the root, and lists add nothing to it."""
    if isinstance(value, dict):
        assert value[""] == ".".join(path)
        for field, part in value.items():
            check_names(part, [*path, field])
    for item in value if isinstance(value, list) else []:
        check_names(item, path)


@pytest.mark.slow
@pytest.mark.skipif(not read_only.available(), reason="needs the right to make a mount namespace")
def test_a_whole_run_writes_nowhere_else(tmp_path):
    """What a pipeline of tiny models writes, by KFP's executor in every step: to the named places and the claim only."""
    spec = tiny_run(tmp_path, teachers=1)
    text = json.dumps(spec).replace(str(tmp_path), read_only.CLAIM)
    (tmp_path / "spec.yaml").write_text(text)
    roots = [tmp_path / f"root-{number}" for number in range(2)]
    for root in roots:
        root.mkdir()
    refused = read_only.within(
        roots[0], tmp_path, WRITABLE, "sh", "-c", "touch /x /opt/x /home/x; touch /tmp/x /claim/x && echo rest"
    )
    assert refused.stdout == "rest\n" and refused.stderr.count("Read-only file system") == 3
    program = (sys.executable, "-m", "pipelines", "run", "/claim/spec.yaml", "--runs", "/minio/runs")
    done = read_only.within(roots[1], tmp_path, WRITABLE, "env", f"PYTHONPATH={Path.cwd()}", *program)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "out" / "student" / "last" / "config.json").exists() and (tmp_path / "out" / "report.html").exists()
