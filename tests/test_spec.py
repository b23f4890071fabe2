"""The spec: one case per thing it refuses, and what it reads and writes."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from xtoken_core.errors import InputError
from xtoken_core.spec import DistillationSpec
from xtoken_core.spec.fields import spec_fields

BASE = {
    "name": "run",
    "student": {"model": "student"},
    "teachers": [{"id": "big", "model": "big"}, {"id": "other", "model": "other", "projection": {}}],
    "data": {"train": ["train.txt"]},
    "output": {"uri": "out"},
}
SAME = [{"id": "big", "model": "big"}, {"id": "larger", "model": "larger"}]


def load(*overrides: str, **sections) -> DistillationSpec:
    return DistillationSpec.from_text(json.dumps(copy.deepcopy(BASE) | sections), overrides)


REJECTED = {
    "weight_metric without sum": (
        ["loss.aggregation=select_teacher", "loss.weight_metric=ce"],
        "loss.weight_metric: only with aggregation",
    ),
    "normalize_by_vocab without sum": (
        ["loss.aggregation=select_teacher", "loss.normalize_by_vocab=true"],
        "loss.normalize_by_vocab: only with aggregation: sum",
    ),
    "a teacher's mode without sum": (["loss.aggregation=select_teacher", "teachers.other.mode=gold"], "teachers.1 (other): mode"),
    "a mode without a projection": (["teachers.big.mode=gold"], "teachers.0.mode: only means something"),
    "averaged_logits across tokenizers": (
        ["loss.aggregation=averaged_logits"],
        "teachers.1 (other): projection: averaged_logits needs",
    ),
    "exact_match_only outside p_kl": (
        ["loss.mode=gold", "loss.exact_match_only=true"],
        "loss.exact_match_only: only with mode: p_kl",
    ),
    "exact_match_only under auto": (["loss.exact_match_only=true"], "loss.exact_match_only: only with mode: p_kl"),
    "exact_match_only and a teacher in another mode": (
        ["loss.mode=p_kl", "loss.exact_match_only=true", "teachers.other.mode=h_kl"],
        "teachers.1 (other): mode: h_kl contradicts loss.exact_match_only",
    ),
    "topk across tokenizers": (["teachers.other.transport=topk", "teachers.other.top_k=8"], "teachers.1.transport: topk needs"),
    "topk without top_k": (["teachers.big.transport=topk"], "teachers.0.top_k: goes with transport: topk"),
    "top_k without topk": (["teachers.big.top_k=8"], "teachers.0.top_k: goes with transport: topk"),
    "a teacher twice": (["teachers.other.id=big"], "teachers.1 (big): id: used by an earlier teacher"),
    "capitals in an id": (["teachers.big.id=Big"], "teachers.0.id"),
    "underscores in an id": (["teachers.big.id=big_one"], "teachers.0.id"),
    "batches that do not divide": (
        ["training.global_batch_size=10", "training.micro_batch_size=4"],
        "training.global_batch_size: 10 is not a multiple of micro_batch_size 4",
    ),
    "warm-up to the end": (["training.warmup_steps=9", "training.max_steps=9"], "training.warmup_steps: 9 leaves nothing"),
    "a seed of more bits than NumPy takes": (["training.seed=4294967296"], "training.seed"),
    "a weight that dynamic scaling replaces": (["loss.kd_weight=2"], "loss.kd_weight: not used with dynamic_scaling"),
    "a weight of CE that dynamic scaling replaces": (["loss.ce_weight=0"], "loss.ce_weight: not used with dynamic_scaling"),
    "bits per byte of no text": (["evaluation.bits_per_byte=true"], "evaluation.bits_per_byte: needs evaluation.texts or"),
    "validation on training data": (["data.validation=[train.txt]"], "data.validation: train.txt is in data.train too"),
    "a tolerated value that nothing compares": (
        ["resources.tolerations=[{key: gpu, value: big}]"],
        "resources.tolerations.0.value: only with operator: Equal",
    ),
    "a comparison with no key": (
        ["resources.tolerations=[{operator: Equal, value: a}]"],
        "resources.tolerations.0.key: operator",
    ),
    "a token in a plain variable": (
        ["resources.env={HF_TOKEN: hf_abc}"],
        "resources.env: HF_TOKEN holds what looks like a secret; name a Kubernetes secret in resources.secrets",
    ),
    "a password in a plain variable": (
        ["resources.env={MLFLOW_TRACKING_URI: 'http://me:pass@host'}"],
        "resources.env: MLFLOW_TRACKING_URI holds what looks like a secret",
    ),
    "a variable of this library": (["resources.env={XTOKEN_SPEC: x}"], "resources.env: XTOKEN_SPEC is this library's own"),
    "the label that policies go by": (
        ["resources.labels={app.kubernetes.io/name: mine}"],
        "resources.labels: app.kubernetes.io/name is the pods' own",
    ),
    "two volumes in one place": (
        ["resources.pvc=[{name: a, mount_path: /data}, {name: b, mount_path: /data/}]"],
        "resources.pvc.1.mount_path: /data is an earlier claim's",
    ),
    "a loss of nothing": (["loss={dynamic_scaling: false, kd_weight: 0, ce_weight: 0}"], "loss.ce_weight: with kd_weight 0 too"),
    "a place for weights that are not loaded": (
        ["teachers.big.scores={}", "teachers.big.residency=resident"],
        "teachers.0.scores: no process runs in the training, so that residency: resident",
    ),
    "a part without weight": (
        ["data.train=[{uri: a, weight: 0}, {uri: b, weight: 1}]"],
        "data.train.0.weight: should be greater than 0",
    ),
    "a run to beat that is no URI": (
        ["output.promote_if={better_than: 7}"],
        "output.promote_if.better_than: should be a valid string",
    ),
    "NaN": (["training.learning_rate=.nan"], "training.learning_rate"),
    "infinity": (["loss.alpha=.inf", "loss.weight_metric=ce"], "loss.alpha"),
    "an unknown section": (["trainings.max_steps=3"], "trainings: no such field"),
    "an unknown field": (["training.max_step=3"], "training.max_step: no such field"),
    "a weight under select_teacher": (
        ["loss.aggregation=select_teacher", "teachers.big.weight=0.5"],
        "teachers.0 (big): weight: would be ignored",
    ),
    "a weight under weight_metric": (
        ["loss.weight_metric=ce", "teachers.big.weight=0.5"],
        "teachers.0 (big): weight: would be ignored",
    ),
    "no weight at all": (["teachers.big.weight=0", "teachers.other.weight=0"], "teachers: weight: all are zero"),
    "a negative weight": (["teachers.big.weight=-1"], "teachers.0.weight"),
    "alpha without weight_metric": (["loss.alpha=2.0"], "loss.alpha: only used with weight_metric"),
    "bytes of scores that nothing uses": (["loss.score_unit=byte"], "loss.score_unit: byte only applies"),
    "options of a W that is not built": (
        ["teachers.other.projection={uri: w, top_k: 2}"],
        "teachers.1.projection.uri: a stored projection",
    ),
    "a learning rate of a fixed W": (["teachers.other.projection={learning_rate: 0.1}"], "teachers.1.projection.learning_rate"),
    "a text column of chats": (["data.format=messages", "data.text_key=body"], "data.text_key: not used with format: messages"),
    "a chat column of texts": (["data.format=text", "data.messages_key=chat"], "data.messages_key: not used with format: text"),
    "validation without documents": (["training.eval_steps=5"], "training.eval_steps: needs data.validation"),
    "no training data": (["data.train=[]"], "data.train"),
    "a float for an integer": (["training.max_steps=1.5"], "training.max_steps"),
    "text for a number": (["training.max_steps=many"], "training.max_steps"),
    "a number for text": (["student.model=7"], "student.model"),
    "a mode that is none": (["loss.mode=kl"], "loss.mode"),
    "layers out of order": (["student.keep_layers=[3, 1]"], "student.keep_layers: layer indices must ascend"),
    "a layer twice": (["student.keep_layers=[1, 1]"], "student.keep_layers: layer indices must ascend"),
    "no layers": (["student.keep_layers=[]"], "student.keep_layers"),
    "a name unfit for Kubernetes": (["name=My Run"], "name"),
    "memory without a unit that is one": (["resources.memory=64GB"], "resources.memory"),
    "memory in parts, which KFP does not take": (["resources.memory=1.5Gi"], "resources.memory"),
    "memory in a unit that KFP does not take": (["resources.memory=64k"], "resources.memory"),
    "a truth for an amount": (["resources.cpu=true"], "resources.cpu"),
    "an id that would hide a column of the log": (["teachers.big.id=step"], "teachers.0.id: step is taken"),
    "no integer under its tag": (
        ["training.seed=!!int abc"],
        "--set training.seed: line 1: tags (tag:yaml.org,2002:int) are not taken",
    ),
    "no truth under its tag": (
        ["training.seed=!!bool abc"],
        "--set training.seed: line 1: tags (tag:yaml.org,2002:bool) are not taken",
    ),
    "no time under its tag": (
        ["training.seed=!!timestamp abc"],
        "--set training.seed: line 1: tags (tag:yaml.org,2002:timestamp) are not taken",
    ),
    "a number of too many digits": (["training.seed=" + "1" * 5000], "--set training.seed: a number has too many digits"),
    "too deep a nest": (["training.seed=" + "[" * 3000], "--set training.seed: line 1: nested more than 20 deep"),
    "a list that holds itself": (
        ["training.seed=&a [*a]"],
        "--set training.seed: line 1: alias *a stands for nothing that is complete before it",
    ),
    "a mount over the root": (["resources.pvc=[{name: models, mount_path: /}]"], "resources.pvc.0.mount_path"),
    "a claim that Kubernetes would refuse": (["resources.pvc=[{name: My_Claim, mount_path: /a}]"], "resources.pvc.0.name"),
    "an accelerator that is none": (["resources.gpu_type=a b"], "resources.gpu_type"),
    "an image with blanks": (["resources.image=my image"], "resources.image"),
    "a queue longer than a label": ([f"resources.queue={'q' * 64}"], "resources.queue"),
    "teachers whose tasks would have one name": (["teachers.0.id=a--b"], "teachers.0.id"),
    "a relative mount": (["resources.pvc=[{name: models, mount_path: models}]"], "resources.pvc.0.mount_path"),
    "an environment variable that is none": (["resources.secrets=[{secret: s, key: k, env: a-b}]"], "resources.secrets.0.env"),
    "no teacher": (["teachers=[]"], "teachers"),
    "an override of a key that is none": (["a" * 3000 + "=1"], "--set 'aaaa"),
    "an override of a key with a line break": (["a\nb=1"], "--set 'a\\nb=1': expected dotted.key=value"),
    "an override without a value": (["training.max_steps"], "--set training.max_steps: expected dotted.key=value"),
    "an override of a teacher that is none": (["teachers.nobody.weight=1"], "teachers.nobody: no such item"),
    "an override below a value": (["name.first=x"], "--set name.first: name has no fields"),
}


@pytest.mark.parametrize(("overrides", "message"), REJECTED.values(), ids=REJECTED)
def test_is_refused_in_one_line_that_names_the_field(overrides, message):
    with pytest.raises(InputError) as caught:
        load(*overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [0, 0]])
def test_averaged_logits_needs_weights_that_do_not_sum_to_zero(weights):
    teachers = [teacher | {"weight": weight} for teacher, weight in zip(SAME, weights)]
    with pytest.raises(InputError, match="teachers: weight: all are zero"):
        load("loss.aggregation=averaged_logits", teachers=teachers)


def test_averaged_logits_needs_whole_logits():
    teachers = [SAME[0], SAME[1] | {"transport": "topk", "top_k": 8}]
    with pytest.raises(InputError, match="averaged_logits needs full logits"):
        load("loss.aggregation=averaged_logits", teachers=teachers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", 'line 2: duplicate key "name"'),
        ("name: a\nstudent: {model: x, model: y}\n", 'line 2: duplicate key "model"'),
        ("name: [\n", "line 2"),
        ("- a\n", "a spec is a mapping"),
        ("", "a spec is a mapping"),
        ("1: a\n", "key 1 is not text"),
    ],
)
def test_refuses_text_that_is_no_spec(text, message):
    with pytest.raises(InputError) as caught:
        DistillationSpec.from_text(text)
    assert message in str(caught.value)


def test_all_complaints_come_at_once_and_say_what_was_meant():
    with pytest.raises(InputError) as caught:
        load("loss.mode=kl", "training.max_step=3", "max_steps=3", "teachers.big.weight=-1", "name=A", "zzz=1", "training.epochs=1",
             "training.max_steps=2", "data.validation={a: 1}")  # fmt: skip
    assert str(caught.value).splitlines() == [
        'spec: name: takes lower-case letters and digits, with hyphens between them (got "A")',
        "spec: teachers.0.weight: should be greater than or equal to 0 (got -1)",
        'spec: loss.mode: not one of partition_kl, p_kl, h_kl, gold, auto; did you mean p_kl? (got "kl")',
        'spec: data.validation: should be a list (got {"a": 1})',
        "spec: training.max_step: no such field; did you mean max_steps?",
        "spec: max_steps: no such field; did you mean training.max_steps?",
        "spec: zzz: no such field; there are name, student, teachers, loss, data, training, pilot, evaluation, output, resources",
    ]


def test_what_is_wrong_with_the_run_is_not_said_of_every_candidate():
    candidates = "[{name: plain}, {name: other, set: [loss.exact_match_only=true]}]"
    with pytest.raises(InputError) as caught:
        load(f"pilot.candidates={candidates}", "data.validation=[train.txt]")
    assert str(caught.value).splitlines() == [
        "spec: data.validation: train.txt is in data.train too",
        "spec: pilot.candidates.1: other: loss.exact_match_only: only with mode: p_kl",
    ]


def test_fields_of_a_part_are_named():
    with pytest.raises(InputError) as caught:
        load("data.train=[{urii: a}, b]")
    assert str(caught.value).splitlines() == [
        "spec: data.train.0.uri: required",
        "spec: data.train.0.urii: no such field; did you mean uri?",
    ]


def test_contradictions_come_at_once():
    with pytest.raises(InputError) as caught:
        load("training.epochs=1", "training.max_steps=2", "training.micro_batch_size=3", "loss.kd_weight=2")
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == [
        " loss.kd_weight", " training.epochs", " training.global_batch_size"
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), [("010", 10), ("0o17", 15), ("1e3", 1000), ("8.0", 8), ("0x10", 16)])
def test_numbers_are_those_of_yaml_1_2(text, value):
    assert load(f"training.max_steps={text}").training.max_steps == value


def test_words_that_look_like_times_are_words():
    with pytest.raises(InputError, match=r'training.max_steps: should be a valid integer \(got "1:30"\)'):
        load("training.max_steps=1:30")
    assert load("data.text_key=2001-01-01").data.text_key == "2001-01-01"


def test_one_text_is_a_list_of_one():
    spec = load("data.train=a.txt", "training.report_to=mlflow", "evaluation.tasks=hellaswag")
    assert (spec.data.train, spec.training.report_to, spec.evaluation.tasks) == (("a.txt",), ("mlflow",), ("hellaswag",))


@pytest.mark.parametrize("uri", ["s3://KEY:PLANTED@bucket/x", "https://PLANTED@host/x", "https://host/x?X-Amz-Signature=PLANTED"])
@pytest.mark.parametrize("field", ["student.model", "teachers.0.tokenizer", "data.train", "output.uri", "data.validation.nested"])
def test_keys_in_uris_are_refused_and_not_repeated(uri, field):
    with pytest.raises(InputError, match=field.removesuffix(".nested")) as caught:
        load(f"{field}={json.dumps(uri)}")
    assert "PLANTED" not in str(caught.value)


BOMB = "&b0 [l,l,l,l,l,l,l,l,l,l]"
for step in range(1, 9):
    BOMB = f"&b{step} [{BOMB}{f',*b{step - 1}' * 9}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"name: {BOMB}", "line 1: the spec is too large, its aliases"),
        ("[" * 200_000, "nested more than 20 deep"),
        ('{"a":' * 50_000, "nested more than 20 deep"),
        ("a: " + "x" * 300_000, "characters are too many"),
        ("a: &x " + "x" * 1000 + "\nb: [" + "*x," * 500 + "]", "line 2: the spec is too large, its aliases"),
        ("%YAML 1.1\n---\nname: on", "directives"),
        ('name: "\\ud800"', "half a character"),
        ('{"name": "a\\nb"}', "a line break"),
    ],
)  # fmt: skip
def test_what_would_grow_or_hide_is_refused_before_it_is_built(text, message):
    with pytest.raises(InputError, match=message):
        DistillationSpec.from_text(text)


def test_aliases_are_copies():
    text = "name: n\nstudent: &m {model: x}\nteachers: [{id: a, <<: *m}]\ndata: {train: x}\noutput: {uri: x}\n"
    spec = DistillationSpec.from_text(text, ["student.model=y"])
    assert (spec.student.model, spec.teachers[0].model) == ("y", "x")


def test_epochs_are_steps_of_the_rows_there_are():
    training = load("training.epochs=1.5", "training.global_batch_size=8").training
    assert [training.steps(rows) for rows in (8, 9, 800)] == [2, 2, 150]
    assert load("training.max_steps=7").training.steps(9) == 7
    with pytest.raises(InputError, match="training.warmup_steps: 9 leaves nothing of 2 steps"):
        load("training.epochs=1", "training.global_batch_size=8", "training.warmup_steps=9").training.steps(16)


def test_every_field_is_described():
    assert [field.path for field in spec_fields(DistillationSpec) if not field.description] == []


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="absent.yaml: cannot read the spec: No such file"):
        DistillationSpec.from_yaml(tmp_path / "absent.yaml")


def test_required_fields_are_named():
    for field in ("name", "student", "teachers", "data", "output"):
        with pytest.raises(InputError, match=f"{field}: required"):
            DistillationSpec.from_text(json.dumps({k: v for k, v in BASE.items() if k != field}))


def test_reads_numbers_as_people_write_them():
    spec = load("training.learning_rate=1e-3", "training.weight_decay=0", "loss.temperature=2")
    assert (spec.training.learning_rate, spec.training.weight_decay, spec.loss.temperature) == (1e-3, 0.0, 2.0)


def test_bits_are_measured_where_there_is_text():
    assert not load().measures_bits
    assert load("data.validation=[held-out.txt]").measures_bits and load("evaluation.texts=[held-out.txt]").measures_bits
    assert not load("evaluation.texts=[held-out.txt]", "evaluation.bits_per_byte=false").measures_bits


def test_a_volume_keeps_what_lies_below_its_mount():
    resources = load("resources.pvc=[{name: models, mount_path: /models/}]").resources
    assert [resources.keeps(path) for path in ("/models/a", "/models", "/models-2/a", "models/a")] == [True, False, False, False]


def test_amounts_may_be_numbers():
    resources = load("resources.cpu=16", "resources.memory=64000000000").resources
    assert (resources.cpu, resources.memory) == ("16", "64000000000")
    assert load("resources.cpu=0.5").resources.cpu == "0.5"


def test_yaml_words_stay_words():
    spec = load(student={"model": "no"}, data={"train": ["on"]})
    assert (spec.student.model, spec.data.train) == ("no", ("on",))


def test_a_null_projection_is_an_absent_one():
    assert not load("teachers.other.projection=null").teachers[1].cross_tokenizer


def test_overrides_reach_teachers_by_id_and_by_index():
    assert load("teachers.other.weight=0.25").teachers[1].weight == load("teachers.1.weight=0.25").teachers[1].weight == 0.25


def test_json_reads_back_to_an_equal_spec():
    spec = load("training.learning_rate=1e-5", "student.keep_layers=[0, 3]", "loss.mode=gold")
    assert DistillationSpec.from_text(spec.to_json()) == spec


def test_is_immutable():
    with pytest.raises(Exception, match="frozen"):
        load().name = "other"


@pytest.mark.parametrize("path", sorted(Path("pipelines/specs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_specs_of_this_repository_are_valid(path):
    spec = DistillationSpec.from_yaml(path)
    assert spec.name == path.stem
    assert spec.model_dump(mode="json", exclude_unset=True).keys() == yaml.safe_load(path.read_text()).keys()
