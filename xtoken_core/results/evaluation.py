"""What one model is worth: the file of an evaluation."""

from __future__ import annotations

from xtoken_core.results.record import Record
from xtoken_core.results.subject import Subject


class Bits(Record):
    """Bits per byte with an interval over documents."""

    total: float | None = None
    low: float | None = None
    high: float | None = None


class CorpusBits(Bits):
    """Bits per byte of one corpus."""

    documents: int
    bytes: int


class Documents(Record):
    """Every held-out document, the same in the same order for everybody, so that differences are paired."""

    corpus: list[str] = []
    bits: list[float] = []
    bytes: list[int] = []


class BitsPerByte(Bits):
    """Bits per byte of the held-out text."""

    per_corpus: dict[str, CorpusBits] = {}
    documents: Documents = Documents()


class TaskScore(Record):
    """A benchmark's result, of a task or of a group of tasks."""

    metric: str = ""
    value: float | None = None
    stderr: float | None = None
    """The harness's own."""
    low: float | None = None
    high: float | None = None
    samples: int = 0
    shots: int | None = None
    """None where the tasks of a group differ."""
    higher_is_better: bool = True
    metrics: dict[str, float] = {}
    """All that the harness reports."""
    scores: str = ""
    """Right or wrong, by question ("0110"), where answers are."""
    questions: str = ""
    """Digest of the questions."""
    parts: dict[str, TaskScore] = {}
    """What a group consists of."""


class Agreement(Record):
    """How far a student and a teacher predict the same (see `evaluation.agreement`)."""

    top1: float | None = None
    kl: float | None = None
    chunks: int
    mode: str


class Sample(Record):
    """A greedy continuation of a held-out prompt, the same prompts for everybody."""

    prompt: str
    text: str
    reference: str = ""


class Evaluation(Record):
    """What one model is worth."""

    subject: Subject
    model: str = ""
    window: int = 0
    stride: int = 0
    """Tokens."""
    seconds: float = 0.0
    tokens_per_second: float | None = None
    """Of the measurement of bits per byte."""
    bits_per_byte: BitsPerByte | None = None
    agreement: dict[str, Agreement] = {}
    """By teacher."""
    tasks: dict[str, TaskScore] = {}
    samples: list[Sample] = []
