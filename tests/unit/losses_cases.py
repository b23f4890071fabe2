"""Batches for the tests of the losses: the oracle's, and random ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from xtoken_core.losses import TeacherBatch
from xtoken_core.projection import Projection
from xtoken_core.spec import LossSpec


def oracle_case(path: Path, dtype: torch.dtype):
    """(student_logits, input_ids, token_mask, sample_mask), teachers, spec, {"loss", "grad", "metrics"} of one oracle file."""
    with safe_open(path, "pt") as file:
        meta, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    config = json.loads(meta["config"])
    teachers = []
    for i, teacher in enumerate(config.pop("teachers")):
        t = {name.removeprefix(f"teacher_{i}_"): tensor for name, tensor in tensors.items() if name.startswith(f"teacher_{i}_")}
        cross = teacher["kind"] == "cross"
        teachers.append(
            TeacherBatch(
                logits=t["logits"].to(dtype),
                input_ids=t.get("input_ids"),
                token_mask=t.get("token_mask"),
                student_chunk_id=t.get("student_chunk_id"),
                teacher_chunk_id=t.get("teacher_chunk_id"),
                chunk_valid=t.get("pair_valid"),
                chunk_exact=t.get("pair_is_correct"),
                projection=Projection(t["projection_indices"], t["projection_weights"], teacher["vocab_size"]) if cross else None,
                weight=teacher["weight"],
                mode=teacher["mode"],
            )
        )
    student = tensors["student_logits"].to(dtype).requires_grad_()
    batch = student, tensors["student_input_ids"], tensors["student_token_mask"], tensors["sample_mask"]
    expected = {
        "loss": float(meta["expected_loss"]),
        "grad": tensors["expected_grad"],
        "metrics": json.loads(meta["expected_metrics"]),
    }
    return batch, teachers, LossSpec(topk_scope="batch", **config), expected
