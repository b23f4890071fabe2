"""What a run costs, by arithmetic: floating point operations, seconds of a step, bytes of memory and of disk. Only sizes go in.

Sources: 2 operations a weight and token forward, twice that backward (Kaplan et al., arXiv 2001.08361); attention over a row
by its two matrix products, of which causality leaves half. The shares of a product's rate that teachers and student reach, and what
activations and teachers' work take a token, are fitted to measured steps (docs/scale.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

GIB = 2**30
PRODUCT = 790e12
"""Operations a second of a large bfloat16 product on an H100 or H200, measured (989e12 by the data sheet)."""
_TEACHER = {"eager": 0.655, "compiled": 0.853, "fp8": 1.32}
"""Share of PRODUCT of a teacher that takes many rows a forward; fp8: compiled too."""
_STUDENT = {"eager": 0.51, "compiled": 0.585}
"""Share of PRODUCT of the student, its losses within."""
_MICRO_BATCH = 25e-12
"""Seconds that a micro-batch takes for each trained weight beside its products: weights rounded, gradients added up, launches of the host."""
NVLINK, NETWORK = 355e9, 50e9
"""Bytes a second of an all-reduce on a host, measured; of each GPU's share of the network, assumed (400 Gb/s)."""
PER_HOST = 8
"""GPUs."""
BYTES_PER_TOKEN = 4.0
"""Of text, where no run has shown another; English prose 4.2 to 4.6, code 3.2 to 3.8."""
STEP_BYTES = 2 * GIB
"""Of a step that only loads tokenizers: imports, and tables of a few hundred thousand tokens."""
_LAYER_BYTES = 44
"""Of a layer's activations, a token and hidden unit, in 16 bits; the residual stream is in 32."""
_WORK_BYTES = 15
"""Of a teacher's forward pass, likewise."""
_PROCESS_BYTES = 0.6 * GIB
"""Of a process that has the GPU open."""
FORWARD_TOKENS = 16384
"""Of one forward pass of a teacher, which keeps no activations and may take more at a time than the student."""
SCORED_LOGITS = 2**26
"""Numbers of logits that are there at a time while scores are computed."""
_TILE = 2048
"""Rows of logits that the losses form at a time."""
_STATE_BYTES = 16
"""Of a trained weight: it, its gradient and Adam's two moments, in float32."""
_WHOLE_BYTES, _WHOLE_ROOM = 8, 20e9
"""Of a trained weight under FSDP: it and its gradient, which lie whole on each GPU from one micro-batch of a step to the next while that takes
no more than a quarter of 80 GB."""
_BUCKET_BYTES = 4
"""Of a trained weight under DDP: its gradient's place in the buckets, beside that of the micro-batches before the last."""
_CHECKPOINT_BYTES = 12
"""Of a trained weight in a checkpoint: it and the two moments."""
_EVALUATED_TOKENS, _LOGITS_COPIES = 1024, 4
"""Tokens that get full logits at a time, if a row is not longer, and how often these lie in memory: logits, log-probabilities, what
the losses make."""
_STUDENT_ROW_BYTES, _TEACHER_ROW_BYTES = 7, 15
"""Of a token in prepared rows: id, mask, length; on a teacher's side also chunk ids of both sides."""


@dataclass(frozen=True)
class StepShape:
    """What of a step's settings its time and memory depend on."""

    rows: float
    """On each GPU."""
    length: int
    """Tokens of a row."""
    micro_batch: int = 1
    """Rows."""
    compiled: bool = False
    recomputed: bool = False
    """Activation checkpointing."""
    trained: int | None = None
    """Weights of the student that are trained, adapters of one that stays as it is; None: all."""
    fp8: tuple[bool, ...] = ()
    """By teacher: products in 8 bits; empty: none."""
    gpus: int = 1


@dataclass(frozen=True)
class ModelSize:
    """What a model's configuration says of its size."""

    parameters: int
    active: int
    """Parameters that one token meets: of experts only those it is sent to; the embedding left out."""
    layers: int
    hidden: int
    rows: int
    """Of the lm_head."""
    heads: int | None = None
    """Width of all query heads together; None: `hidden`."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSize:
        """Counts the weights of a model, which may lie on the meta device."""
        config = model.config.get_text_config()
        named = {name: weight.numel() for name, weight in model.named_parameters()}
        experts = sum(count for name, count in named.items() if ".experts." in name)
        embedding = model.get_input_embeddings().get_parameter("weight")
        head = model.get_output_embeddings()
        tied = head is None or head.weight is embedding  # then its weights are met in the head
        total = sum(named.values())
        met = total - experts + round(experts * _share_of_experts(config)) - (0 if tied else embedding.numel())
        per_head = getattr(config, "head_dim", None)
        heads = None if per_head is None else config.num_attention_heads * per_head
        return cls(total, met, config.num_hidden_layers, config.hidden_size, config.vocab_size, heads)

    def forward_flops(self, tokens: int, row: int) -> float:
        """Operations of a forward pass over `tokens` in rows of `row` tokens."""
        return 2.0 * tokens * (self.active + self.layers * (self.heads or self.hidden) * row)

    def training_flops(self, tokens: int, row: int, recomputed: bool, trained: int | None = None) -> float:
        """Operations of forward and backward pass; `recomputed`: activation checkpointing runs the forward pass twice.

        trained: weights that have a gradient; None: all.
        """
        forward = self.forward_flops(tokens, row)
        return (3 if recomputed else 2) * forward + (forward if trained is None else 2.0 * tokens * trained)

    def student_bytes(self, shape: StepShape, width: int, spread: int = 1) -> float:
        """Memory of a student's training: state, weights in the compute dtype, activations, losses, its process.

        width: bytes of a number of the compute dtype. spread: ranks over which FSDP spreads state; 1: DDP, where there are several GPUs.
        """
        adapted, tokens = shape.trained is not None, shape.micro_batch * shape.length
        trained = self.parameters if shape.trained is None else shape.trained
        state = (trained * _STATE_BYTES + (self.parameters - trained) * (width if adapted else 4)) / spread
        copies = trained * ((width if width < 4 else 0) + (_BUCKET_BYTES if shape.gpus > spread == 1 else 0))
        if spread > 1 and trained * _WHOLE_BYTES <= _WHOLE_ROOM:
            copies += trained * _WHOLE_BYTES
        layer = _LAYER_BYTES / 2 * width * self.hidden * tokens
        activations = layer + self.layers * width * self.hidden * tokens if shape.recomputed else self.layers * layer
        losses = 2 * _TILE * self.rows * width + (0 if adapted else self.rows * self.hidden * (8 + width))
        return state + copies + activations + losses + _PROCESS_BYTES

    def teacher_bytes(self, shape: StepShape, width: int, fp8: bool = False) -> float:
        """Memory of a teacher on the GPU, and of the hidden states that it hands over."""
        head = self.rows * self.hidden
        weights = head * width + (self.parameters - head) * (1 if fp8 else width)
        work = _WORK_BYTES * max(FORWARD_TOKENS, shape.length) * self.hidden * width
        return weights + work + shape.rows * shape.length * self.hidden * width + _PROCESS_BYTES

    def scoring_bytes(self, length: int, width: int) -> float:
        """Memory of a teacher whose scores are computed, over rows of `length` tokens."""
        shape = StepShape(rows=max(1, FORWARD_TOKENS // length), length=length)
        return self.teacher_bytes(shape, width) + _LOGITS_COPIES * SCORED_LOGITS * 4


@dataclass(frozen=True)
class StepSeconds:
    """The parts of a step, one after the other."""

    teachers: float
    student: float
    gradients: float
    """Their sum over GPUs, as if none of it were hidden behind the backward pass."""

    @property
    def total(self) -> float:
        """Of the step."""
        return self.teachers + self.student + self.gradients


def step_seconds(student: ModelSize, teachers: Sequence[ModelSize], shape: StepShape) -> StepSeconds:
    """An optimizer step on H100s or H200s. Teachers stay on the GPU; data are there."""
    tokens, how = round(shape.rows * shape.length), "compiled" if shape.compiled else "eager"
    kinds = ["fp8" if fp8 and shape.compiled else how for fp8 in shape.fp8 or [False] * len(teachers)]
    taught = sum(t.forward_flops(tokens, shape.length) / (_TEACHER[kind] * PRODUCT) for t, kind in zip(teachers, kinds))
    trained = student.parameters if shape.trained is None else shape.trained
    products = student.training_flops(tokens, shape.length, shape.recomputed, shape.trained) / (_STUDENT[how] * PRODUCT)
    learned = products + shape.rows / shape.micro_batch * trained * _MICRO_BATCH
    return StepSeconds(taught, learned, gradient_seconds(4 * trained, shape.gpus))


def forward_seconds(size: ModelSize, tokens: int, row: int) -> float:
    """A model that reads `tokens` in rows of `row`, not compiled, on an H100 or H200."""
    return size.forward_flops(tokens, row) / (_TEACHER["eager"] * PRODUCT)


def gradient_seconds(size: float, gpus: int) -> float:
    """A ring's all-reduce of `size` bytes on a host, and between hosts, where each GPU carries its part."""
    host = min(gpus, PER_HOST)
    return 2 * (host - 1) / host * size / NVLINK + (2 * size / PER_HOST / NETWORK if gpus > PER_HOST else 0)


def evaluation_bytes(models: Sequence[ModelSize], width: int, row: int) -> int:
    """Memory of the device that compares models: their weights, and their logits for rows of `row` tokens. width: bytes of a weight."""
    logits = max(_EVALUATED_TOKENS, row) * sum(size.rows for size in models) * 4 * _LOGITS_COPIES
    return sum(size.parameters for size in models) * width + logits


def host_bytes(models: Sequence[ModelSize], gpu: bool, row: int) -> int:
    """Host memory of a step that loads models for evaluation, one after another, each through a mapped file of its own size.

    On a GPU (bfloat16) a model leaves the host before the next is read; a CPU (float32) keeps all of them, and their logits.
    """
    loading = max(size.parameters for size in models) * (2 if gpu else 4)
    return STEP_BYTES + loading + (loading if gpu else evaluation_bytes(models, 4, row))


def checkpoint_bytes(trained: int) -> int:
    """A checkpoint on disk, of so many trained weights."""
    return trained * _CHECKPOINT_BYTES


def score_bytes(top_k: int, precision: str) -> int:
    """Of a token in a teacher's scores: k values and ids, and four numbers."""
    return top_k * (8 if precision == "fp32" else 6) + 16


def row_bytes(student_tokens: int, cross_teachers: int) -> int:
    """Prepared rows on disk, where every teacher needs as many tokens as the student."""
    return student_tokens * (_STUDENT_ROW_BYTES + cross_teachers * _TEACHER_ROW_BYTES)


def _share_of_experts(config: PreTrainedConfig) -> float:
    """Of all experts those that a token is sent to."""
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    total = next((value for name in counts if (value := getattr(config, name, None))), None)
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_k", None)
    return chosen / total if total and chosen else 1.0
