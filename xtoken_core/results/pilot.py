"""The pilot: what each short run came to, and pilot.json, the verdict."""

from __future__ import annotations

from typing import Self
from urllib.parse import quote, unquote

from xtoken_core.results.record import Record


class Blocks(Record):
    """Held-out text in at most some dozens of blocks of whole documents, the same for every run: few numbers, and still paired."""

    bits: list[float] = []
    bytes: list[int] = []


class Trial(Record):
    """One short run. Its schedule ends with it."""

    candidate: str
    """Empty where none was left to be tried."""
    rung: int
    """From 1."""
    steps: int = 0
    tokens: int = 0
    """Of the student."""
    seconds_per_step: float | None = None
    """Median over the steps, teachers included."""
    ranks: int = 1
    bits_per_byte: float | None = None
    """Of the held-out text, at the end."""
    per_corpus: dict[str, float] = {}
    blocks: Blocks = Blocks()
    failed: str = ""
    """Why it has no outcome."""

    def to_parameter(self) -> str:
        """JSON with quotes percent-encoded: KFP's lists of parameters do not escape those of their strings."""
        return quote(self.model_dump_json(), safe=" !#$&'()*+,/:;<=>?@[]^`{|}~")

    @classmethod
    def from_parameter(cls, text: str) -> Self:
        """Reads what `to_parameter` wrote. Raises InputError."""
        return cls.parse(unquote(text), "results")


class Extent(Record):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class Gain(Extent):
    """Bits per byte by which a candidate is ahead of cross-entropy after `steps`."""

    steps: int


class Outlook(Record):
    """What is expected of a candidate."""

    candidate: str
    changes: list[str] = []
    """What it changes in the spec, as --set takes it."""
    teachers: list[str] = []
    measured: list[Gain] = []
    """Of its short runs; intervals over documents."""
    expected: Gain | None = None
    """At the main run's steps, against cross-entropy of as many."""
    same_time: Extent | None = None
    """The same, against cross-entropy with the steps that the candidate's time would buy."""
    cost: float | None = None
    """Time of a step, over a step of cross-entropy."""
    course: list[Gain] = []
    """What is expected between the last short run and the main run's end, for the picture."""
    failed: str = ""


class Pilot(Record):
    """pilot.json: the verdict, and what it rests on."""

    steps: int
    """Of the main run."""
    chosen: str
    """The candidate to run, `ce` where it is better not to distil."""
    reason: str
    """One line."""
    next: str = ""
    """What to do now, one line; empty where the main run follows."""
    enough_text: bool
    """Whether the rows would last for the steps of cross-entropy that the best candidate's time buys, none seen twice."""
    outlooks: list[Outlook]
    """The best one first."""
    trials: list[Trial]
    audit: list[str] = []
    """Lines on teachers that are no better than the student."""
