"""Batches for the tests of the losses: the oracle's, and random ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from xtoken_core.losses import CellCut, TeacherBatch
from xtoken_core.partition import Partition
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


def scored(teacher: TeacherBatch, k: int, temperature: float = 1.0) -> TeacherBatch:
    """The same cross-tokenizer teacher as partition_kl reads it where it ran before the training."""
    projection = teacher.projection
    logits = teacher.logits[..., : projection.teacher_vocab_size]
    cut = CellCut.of(projection.cells, logits.shape[-1], k, temperature)
    return replace(teacher, logits=cut(logits, teacher.input_ids))


MODES = ("partition_kl", "p_kl", "gold", "h_kl")


def random_segmentation(generator: torch.Generator, batch: int, length: int, chunks: int) -> torch.Tensor:
    """[batch, length] ascending chunk ids below `chunks`; some tokens lie outside, some chunks have none."""
    ids = torch.randint(0, chunks, (batch, length), generator=generator).sort(1).values
    return ids.masked_fill(torch.rand(batch, length, generator=generator) < 0.2, -1)


def random_projection(generator: torch.Generator, student_vocab: int, teacher_vocab: int, k: int = 3) -> Projection:
    """Rows of 0 to k entries that sum to 1; about half of them a single entry."""
    indices = torch.randint(0, teacher_vocab, (student_vocab, k), generator=generator)
    entries = torch.randint(0, k + 1, (student_vocab, 1), generator=generator)
    entries = torch.where(torch.rand(student_vocab, 1, generator=generator) < 0.4, 1, entries)
    outside = torch.arange(k)[None] >= entries
    weights = torch.rand(student_vocab, k, generator=generator).pow(3).masked_fill(outside, 0)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)
    count = max(2, student_vocab // 2)
    cells = Partition(
        *(torch.randint(-1, count, (vocab,), generator=generator) for vocab in (student_vocab, teacher_vocab)), count
    )
    weights = weights.masked_fill((entries == 1) & ~outside, 1)
    return Projection(indices.masked_fill(outside, -1), weights, teacher_vocab, cells=cells)


def identity_projection(vocab: int) -> Projection:
    """Every token is the teacher's token of the same id."""
    same = torch.arange(vocab)
    return Projection(same[:, None], torch.ones(vocab, 1), vocab, cells=Partition(same, same, vocab))


def random_batch(seed: int, batch: int, length: int, vocab: int, dtype: torch.dtype = torch.float64):
    """(student_logits with gradient, input_ids, token_mask, sample_mask): about a sixth masked, the first sample counts."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(batch, length, vocab, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    ids = torch.randint(0, vocab, (batch, length), generator=generator)
    mask = (torch.rand(batch, length, generator=generator) > 0.15).long()
    samples = (torch.rand(batch, generator=generator) > 0.15).float().index_fill(0, torch.tensor([0]), 1)
    return logits, ids, mask, samples


def random_teacher(
    seed: int, batch: int, student_length: int, student_vocab: int, cross: bool, dtype: torch.dtype = torch.float64, **fields
) -> TeacherBatch:
    """A teacher for a `random_batch` of these sizes. Cross-tokenizer: its own vocabulary, length, masks, chunks and W."""
    generator = torch.Generator().manual_seed(seed + 1000)
    length, vocab = student_length, student_vocab
    if cross:
        length, vocab = student_length + seed % 3, student_vocab + 2 + seed % 5
    logits = (3 * torch.randn(batch, length, vocab, generator=generator, dtype=torch.float64)).to(dtype)
    token_bytes = torch.randint(1, 6, (batch, length), generator=generator)
    if not cross:
        return TeacherBatch(logits, token_bytes=token_bytes, **fields)
    chunks = max(2, student_length * 2 // 3)
    return TeacherBatch(
        logits=logits,
        input_ids=torch.randint(0, vocab, (batch, length), generator=generator),
        token_mask=(torch.rand(batch, length, generator=generator) > 0.15).long(),
        student_chunk_id=random_segmentation(generator, batch, student_length, chunks),
        teacher_chunk_id=random_segmentation(generator, batch, length, chunks),
        chunk_valid=torch.rand(batch, chunks, generator=generator) > 0.15,
        chunk_exact=torch.rand(batch, chunks, generator=generator) > 0.3,
        projection=random_projection(generator, student_vocab, vocab),
        token_bytes=token_bytes,
        **fields,
    )
