"""The spec: every option of the system, its default and its bounds, one module per section of the YAML.

`DistillationSpec.from_yaml(path, overrides)` is the way in. Unknown keys, duplicate keys, contradictions and bad
values raise `InputError` with one line that names the field. Loading touches no model, data or network.
"""

from xtoken_core.spec.data import DataSpec, TrainSource
from xtoken_core.spec.evaluation import EvaluationSpec
from xtoken_core.spec.loss import LossSpec
from xtoken_core.spec.output import OutputSpec
from xtoken_core.spec.pilot import CandidateSpec, PilotSpec
from xtoken_core.spec.resources import NodeRequirement, ResourcesSpec, SecretEnv, Toleration, VolumeClaim
from xtoken_core.spec.student import LoraSpec, StudentSpec
from xtoken_core.spec.teachers import Mode, ProjectionSpec, TeacherSpec
from xtoken_core.spec.training import TrainingSpec
from xtoken_core.spec.whole import DistillationSpec

__all__ = [
    "CandidateSpec",
    "DataSpec",
    "DistillationSpec",
    "EvaluationSpec",
    "LoraSpec",
    "LossSpec",
    "Mode",
    "NodeRequirement",
    "OutputSpec",
    "PilotSpec",
    "ProjectionSpec",
    "ResourcesSpec",
    "SecretEnv",
    "StudentSpec",
    "TeacherSpec",
    "Toleration",
    "TrainSource",
    "TrainingSpec",
    "VolumeClaim",
]
