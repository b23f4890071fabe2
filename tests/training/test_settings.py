"""What `auto` means for a training."""

import pytest

from xtoken_core.spec import DistillationSpec
from xtoken_core.training.settings import training_loss

VALUES = {"name": "run", "student": {"model": "s"}, "data": {"train": ["text"]}, "output": {"uri": "out"}}
SAME = {"id": "same", "model": "t"}
OTHER = {"id": "other", "model": "t", "projection": {}}


@pytest.mark.parametrize(
    ("teachers", "loss", "share"),
    [
        ([SAME], {}, 0.3),
        ([OTHER], {}, 1.0),
        ([SAME, OTHER], {}, 1.0),
        ([SAME], {"dynamic_scaling": True}, 1.0),
        ([SAME], {"dynamic_scaling": 1}, 1.0),
        ([OTHER], {"dynamic_scaling": 0.5}, 0.5),
        ([SAME], {"dynamic_scaling": False}, 0.0),
    ],
)
def test_the_share_of_kd(teachers, loss, share):
    """By the vocabularies, where it is not given; a spec that is stored and read again means the same."""
    spec = DistillationSpec.model_validate(VALUES | {"teachers": teachers, "loss": loss})
    for again in (spec, DistillationSpec.from_text(spec.to_json())):
        resolved = training_loss(again, baseline=False)
        assert resolved.share == share and resolved.mode == "p_kl" and resolved.dynamic_scaling != "auto"
