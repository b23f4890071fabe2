"""The manifests: kustomize renders them, strictly checked against the published types; the linter passes the Dockerfile."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from kubernetes import client

from pipelines.compiling import SPECS, compile_spec, documents
from tests.support.schemas import check_resource
from xtoken_core.spec import DistillationSpec
from xtoken_core.workflow.trainjob_manifest import RUNTIME

MANIFESTS = Path(__file__).parents[2] / "manifests"
OVERLAYS = sorted(path.parent for path in MANIFESTS.glob("overlays/*/kustomization.yaml"))


def rendered(overlay: Path) -> list[dict]:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not here (Debian: kubernetes-client)")
    done = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def check_core(resource: dict) -> None:
    """Strictly against the types of the Kubernetes client, which are generated from the cluster's own API."""
    group, _, version = resource["apiVersion"].rpartition("/")
    assert group in ("", "rbac.authorization.k8s.io", "networking.k8s.io") and version == "v1"
    check_type(resource, f"V1{resource['kind']}", resource["kind"])


def check_type(value, kind: str, where: str, published: dict | None = None) -> None:
    """`published`: types by name, each its fields' types, that the client does not have."""
    if found := re.fullmatch(r"list\[(.*)\]", kind):
        assert isinstance(value, list), f"{where}: a list"
        for index, item in enumerate(value):
            check_type(item, found[1], f"{where}[{index}]", published)
    elif found := re.fullmatch(r"dict\((?:.*), (.*)\)", kind):
        for key, item in value.items():
            check_type(item, found[1], f"{where}.{key}", published)
    elif kind in (published or {}) or hasattr(client, kind):
        fields = (published or {}).get(kind) or own_fields(getattr(client, kind))
        for key, item in value.items():
            assert key in fields, f"{where}: no field {key}"
            check_type(item, fields[key], f"{where}.{key}", published)
    else:
        python = {"str": str, "int": int, "bool": bool, "object": (str, int, dict)}[kind]
        assert isinstance(value, python), f"{where}: {value!r} is no {kind}"


def own_fields(model) -> dict[str, str]:
    """The types of a type of the client, by field as JSON names it."""
    return {json: model.openapi_types[python] for python, json in model.attribute_map.items()}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_overlays_render_and_are_valid(overlay):
    resources = rendered(overlay)
    assert {"PersistentVolumeClaim", "NetworkPolicy"} <= {resource["kind"] for resource in resources}
    for resource in resources:
        if resource["apiVersion"].startswith("trainer.kubeflow.org"):
            check_resource(resource, "clustertrainingruntimes")
        else:
            check_core(resource)


def test_the_check_is_strict():
    claim = yaml.safe_load((MANIFESTS / "base" / "models-claim.yaml").read_text())
    claim["spec"]["accessMode"] = ["ReadWriteOnce"]
    with pytest.raises(AssertionError, match="no field accessMode"):
        check_core(claim)


def test_several_hosts_get_the_runtime_that_the_launcher_names():
    resources = {
        (resource["kind"], resource["metadata"]["name"]): resource for resource in rendered(MANIFESTS / "overlays" / "multi-node")
    }
    runtime = resources["ClusterTrainingRuntime", RUNTIME]
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]]["medium"] == "Memory"
    assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"] and {"/tmp", "/home/xtoken"} <= set(mounts)
    assert restricted(pod) == []
    assert ("ServiceAccount", pod["serviceAccountName"]) in resources
    assert resources["PersistentVolumeClaim", "xtoken-models"]["spec"]["accessModes"] == ["ReadWriteMany"]


def test_a_failed_training_is_tried_again_in_one_place():
    """By its launcher: not by the Job, whose pods would go with their logs, nor by Trainer after a JobSet's end of life."""
    jobs = yaml.safe_load((MANIFESTS / "trainer" / "runtime.yaml").read_text())["spec"]["template"]["spec"]
    job = jobs["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    assert "ttlSecondsAfterFinished" not in {*jobs, *job} and "failurePolicy" not in jobs


def restricted(pod: dict) -> list[str]:
    """What of a pod breaks the Pod Security Standard "restricted" (Kubernetes documentation, Pod Security Standards)."""
    kinds = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    broken = [volume["name"] for volume in pod.get("volumes", []) if not set(volume) - {"name"} <= kinds]
    broken += [field for field in ("hostNetwork", "hostPID", "hostIPC") if pod.get(field)]
    for container in pod["containers"]:
        own = pod.get("securityContext", {}) | container.get("securityContext", {})
        wrong = {
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is not False,
            "privileged": own.get("privileged", False),
            "runAsNonRoot": own.get("runAsNonRoot") is not True,
            "runAsUser": own.get("runAsUser") == 0,
            "capabilities": "ALL" not in own.get("capabilities", {}).get("drop", []),
            "seccompProfile": own.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"),
            "hostPort": any("hostPort" in port for port in container.get("ports", [])),
        }
        broken += [field for field, is_wrong in wrong.items() if is_wrong]
    return broken


def test_the_rules_of_restricted_pods_bite():
    loose = {"containers": [{"name": "x"}], "volumes": [{"name": "host", "hostPath": {"path": "/"}}]}
    assert restricted(loose) == ["host", "allowPrivilegeEscalation", "runAsNonRoot", "capabilities", "seccompProfile"]


def test_policies_cover_the_pods_of_steps_and_of_training():
    """By the labels that the compiled pipeline and the runtime give them; every policy is about one of the two."""
    spec = DistillationSpec.from_yaml(SPECS / "llama-1b-from-qwen.yaml")
    configs = documents(compile_spec(spec))[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    steps = {config["podMetadata"]["labels"]["app.kubernetes.io/name"] for config in configs}
    resources = rendered(MANIFESTS / "overlays" / "multi-node")
    runtime = next(r for r in resources if r["kind"] == "ClusterTrainingRuntime")
    template = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    pods = steps | {template["metadata"]["labels"]["app.kubernetes.io/name"]}
    covered = {"Ingress": set(), "Egress": set()}
    for policy in (r["spec"] for r in resources if r["kind"] == "NetworkPolicy"):
        selector = policy["podSelector"]
        chosen = set(selector.get("matchLabels", {}).values()) or set(selector["matchExpressions"][0]["values"])
        for kind in policy["policyTypes"]:
            covered[kind] |= chosen
    assert covered == {"Ingress": pods, "Egress": pods}


def test_a_profile_has_its_own_namespace_everywhere_and_makes_nothing_of_the_cluster():
    resources = rendered(MANIFESTS / "overlays" / "profile")
    assert {resource["metadata"]["namespace"] for resource in resources} == {"profile-name"}
    assert not any(resource["kind"].startswith("Cluster") for resource in resources)
    bound = {s["namespace"] for r in resources if r["kind"] == "RoleBinding" for s in r["subjects"]}
    assert bound == {"profile-name"}


def test_a_runtime_that_breaks_a_rule_of_the_crd_is_caught():
    runtime = yaml.safe_load((MANIFESTS / "trainer" / "runtime.yaml").read_text())
    check_resource(runtime, "clustertrainingruntimes")
    runtime["spec"]["mlPolicy"]["mpi"] = {}
    with pytest.raises(jsonschema.ValidationError, match=r"\.spec\.mlPolicy: Only one of the policy can be configured"):
        check_resource(runtime, "clustertrainingruntimes")


def rights() -> set[tuple[str, str]]:
    documents = yaml.safe_load_all((MANIFESTS / "trainer" / "accounts" / "launcher.yaml").read_text())
    role = next(document for document in documents if document["kind"] == "Role")
    return {(verb, resource) for rule in role["rules"] for verb in rule["verbs"] for resource in rule["resources"]}


def test_shipped_specs_keep_what_they_fetch_on_the_claim_of_the_overlays():
    claim = yaml.safe_load((MANIFESTS / "base" / "models-claim.yaml").read_text())["metadata"]["name"]
    specs = {path.stem: DistillationSpec.from_yaml(path) for path in SPECS.glob("*.yaml")}
    on_a_hub = {name: spec.resources for name, spec in specs.items() if not spec.student.model.startswith("models/")}
    assert len(on_a_hub) > 4
    for name, resources in on_a_hub.items():
        mounted = {mount.mount_path for mount in resources.pvc if mount.name == claim}
        caches = {resources.env.get(cache, "") for cache in ("HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        assert all(any(cache.startswith(f"{path}/") for path in mounted) for cache in caches), name


def test_secret_templates_hold_no_secret():
    templates = sorted((MANIFESTS / "secrets").glob("*.yaml"))
    assert [path.stem for path in templates] == ["hub-token", "s3-credentials"]
    for path in templates:
        secret = yaml.safe_load(path.read_text())
        check_core(secret)
        assert set(secret["stringData"].values()) <= {"REPLACE", "https://s3.example.org"}


def test_the_dockerfile_passes_the_linter_and_is_no_root():
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, MANIFESTS / "Dockerfile"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert re.findall(r"^USER (.*)$", (MANIFESTS / "Dockerfile").read_text(), re.M)[-1] == "1000"
