"""After the run: the student in the Model Registry, if the verdict allows it, and what serves it."""

import json
import re
from pathlib import Path

import pytest

from tests.conformance.test_manifests import check_type
from tests.support.registry_server import FakeRegistry
from tests.support.report_sample import parts
from xtoken_core.errors import InputError
from xtoken_core.report.run import Run
from xtoken_core.results.subject import BEST, TWIN_BEST
from xtoken_core.spec import DistillationSpec
from xtoken_core.workflow.registry import check_registry, promotion, register
from xtoken_core.workflow.serving import inference_service, vllm_line

pytest.importorskip("model_registry")
KSERVE = json.loads((Path(__file__).parents[1] / "support" / "schemas" / "kserve.json").read_text())


def made(folder, **output) -> tuple[DistillationSpec, Run]:
    """A run that never was, with an output section."""
    given = parts(folder)
    changed = given["spec"].model_dump(mode="json", exclude_defaults=True) | {"output": {"uri": "s3://bucket/run", **output}}
    spec = DistillationSpec.from_text(json.dumps(changed))
    return spec, Run.collect(**given | {"spec": spec})


def swapped(run: Run) -> Run:
    """The run with the student and its twin in each other's place."""
    names = {BEST: TWIN_BEST, TWIN_BEST: BEST}
    results = [result.model_copy(update={"subject": names.get(result.subject, result.subject)}) for result in run.results]
    return run.model_copy(update={"results": results})


def test_a_student_that_beats_its_twin_is_registered_with_figures_and_lineage(tmp_path):
    with FakeRegistry() as registry:
        spec, run = made(tmp_path, registry={"server": registry.url}, promote_if="better_than_ce")
        check_registry(spec)
        told = register(spec, run)
    assert re.match(r"Registered: against its twin trained on cross-entropy only -0\.\d+ \[", told)
    (model,), (version,), (artifact,) = registry.kept.values()
    assert model["name"] == spec.name and version["registeredModelId"] == model["id"]
    assert artifact["uri"] == "s3://bucket/run/student/best"
    about = version["customProperties"]
    assert about["bits_per_byte_student_after_best"]["double_value"] == pytest.approx(1.84, abs=0.1)
    assert about["teachers.gemma.model"]["string_value"] == "models/gemma-3-270m (c0ffee12deadbeef)"
    assert about["data.train"]["string_value"].startswith("texts/train")
    assert about["commit"]["string_value"] == "1a3e1f5" and about["teachers.gemma.mode"]["string_value"] == "p_kl"


def test_a_student_that_does_not_is_not(tmp_path):
    with FakeRegistry() as registry:
        spec, run = made(tmp_path, registry={"server": registry.url}, promote_if="better_than_ce")
        assert register(spec, swapped(run)).startswith("Not registered: against its twin")
        unmeasured = run.model_copy(update={"results": []})
        assert "were not both measured" in register(spec, unmeasured)
    assert not any(registry.kept.values())
    assert register(*made(tmp_path)) == "Not registered: output.registry is not set."


def test_an_earlier_run_can_be_the_one_to_beat(tmp_path):
    spec, run = made(tmp_path / "new", registry={"server": "http://none"}, promote_if={"better_than": str(tmp_path)})
    with pytest.raises(InputError, match="output.promote_if.better_than: .*no finished run lies there"):
        check_registry(spec.model_copy(update={"output": spec.output.model_copy(update={"registry": None})}))
    swapped(run).save(tmp_path / "run.json")
    assert promotion(spec, run)[0] and not promotion(spec, swapped(run))[0]


def test_a_registry_that_cannot_be_reached_is_one_line(tmp_path):
    spec, _ = made(tmp_path, registry={"server": "http://127.0.0.1:9"})
    with pytest.raises(InputError, match=r"^output.registry: http://127.0.0.1:9: ") as caught:
        check_registry(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("output", "sections", "line"),
    [
        ({"promote_if": "better_than_ce"}, {}, "output.promote_if: needs output.registry"),
        ({"promote_if": "better_than_ce"}, {"evaluation": {}}, "better_than_ce needs evaluation.ce_baseline"),
        ({"registry": {"server": "registry:8080"}}, {}, "output.registry.server"),
    ],
)
def test_a_promotion_that_nothing_decides_is_refused(tmp_path, output, sections, line):
    spec = parts(tmp_path)["spec"].model_dump(mode="json", exclude_defaults=True) | sections
    with pytest.raises(InputError, match=re.escape(line)):
        DistillationSpec.from_text(json.dumps(spec | {"output": {"uri": "x", **output}}))


@pytest.mark.parametrize("uri", ["s3://bucket/run", "/models/run"])
def test_what_serves_the_student_is_kserves_own_type(tmp_path, uri):
    resources = {"pvc": [{"name": "claim", "mount_path": "/models"}], "labels": {"team": "nlp"}}
    spec, _ = made(tmp_path)
    spec = DistillationSpec.from_text(json.dumps(json.loads(spec.to_json()) | {"output": {"uri": uri}, "resources": resources}))
    service = inference_service(spec, "student/best", 2**30)
    check_type(service, "V1beta1InferenceService", "service", KSERVE)
    where = service["spec"]["predictor"]["model"]["storageUri"]
    assert where == ("s3://bucket/run/student/best" if uri.startswith("s3") else "pvc://claim/run/student/best")
    assert vllm_line(spec, "student/best").startswith(f"vllm serve {uri}/student/best --served-model-name {spec.name}")
    service["spec"]["predictor"]["model"]["storageURL"] = "x"
    with pytest.raises(AssertionError, match="no field storageURL"):
        check_type(service, "V1beta1InferenceService", "service", KSERVE)


@pytest.mark.parametrize("name", ["7b-student", "x" * 100, "a" * 22 + "-" * 20 + "b"])
def test_the_name_of_the_service_is_a_part_of_a_host_name(tmp_path, name):
    spec, _ = made(tmp_path)
    named = spec.model_copy(update={"name": name, "output": spec.output.model_copy(update={"uri": "s3://bucket/run"})})
    service = inference_service(named, "student/best", 2**30)["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", service) and len(f"{service}-predictor-{'n' * 20}") <= 63


def test_kserve_is_not_rendered_for_what_it_cannot_reach(tmp_path):
    spec = parts(tmp_path)["spec"]
    assert inference_service(spec, "student/best", 2**30) is None
