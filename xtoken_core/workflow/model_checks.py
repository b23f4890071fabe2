"""What the models' configurations say against the spec, found before anything is prepared or trained."""

from __future__ import annotations

from xtoken_core.configs import check_attention, empty_model, positions, read_config
from xtoken_core.errors import InputError
from xtoken_core.layers import prune_layers
from xtoken_core.spec import DistillationSpec


def check_models(spec: DistillationSpec) -> None:
    """Reads every model's configuration, builds its shapes and prunes the student's.

    Raises InputError, which names the field, for a model that will not load, for rows longer than a model has positions, for
    an attention that a model lacks, and for layers that the student cannot do without.
    """
    refs = {"student.model": spec.student.model} | {f"teachers.{t.id}.model": t.model for t in spec.teachers}
    for field, ref in refs.items():
        try:
            config = read_config(ref)
            model = empty_model(ref, config)
        except InputError as e:
            raise InputError(f"{field}: {e}") from None
        check_attention(ref, config, spec.training.attention)
        bound = positions(config)
        for limit, length in (("data.max_length", spec.data.max_length), ("evaluation.window", spec.evaluation.window)):
            if bound is not None and length is not None and length > bound:
                raise InputError(f"{limit}: {length} tokens a row, but {field} ({ref}) has {bound} positions")
        if field == "student.model" and spec.student.keep_layers is not None:
            prune_layers(model, spec.student.keep_layers)
