"""Many small trainings for `tests.benchmarks.pilot`: `python -m tests.benchmarks.pilot_runs RESULTS.jsonl FOLDER`, half an hour on one core.

Models of a few hundred thousand weights, on this repository's own code and the demo's text: eight settings of text, rate and size, each with
cross-entropy and two teachers of which scores are read, two seeds, and four lengths, each with its whole schedule. A line is as the lab's.
What is there already is not run again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny import TEXTS, tiny_model
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.projection import make_projection
from xtoken_core.spec import CandidateSpec, DistillationSpec
from xtoken_core.spec.pilot import CE
from xtoken_core.training.distill import distill
from xtoken_core.training.inputs import TrainingInputs
from xtoken_core.workflow.pilot import run_place
from xtoken_core.workflow.rungs import WITHOUT_TEACHERS, Place
from xtoken_core.workflow.scoring import score_teacher

SOURCE = Path(__file__).parents[2] / "xtoken_core"
LENGTHS = (20, 40, 80, 160)
SEEDS = (0, 1)
TEACHER_STEPS = 600
SETTINGS: dict[str, dict[str, Any]] = {
    "code": {"text": "code", "rate": 1e-3, "width": 48},
    "code-fast": {"text": "code", "rate": 4e-3, "width": 48},
    "code-scarce": {"text": "code", "rate": 2e-3, "width": 48, "max_rows": 240},
    "prose": {"text": "prose", "rate": 1e-3, "width": 48},
    "prose-wide": {"text": "prose", "rate": 2e-3, "width": 96},
    "prose-scarce": {"text": "prose", "rate": 2e-3, "width": 48, "max_rows": 240},
    "both": {"text": "both", "rate": 2e-3, "width": 48},
    "both-wide": {"text": "both", "rate": 1e-3, "width": 96},
}
"""Text that is trained on, peak of the learning rate, hidden units of the student; both texts are held out everywhere."""
CANDIDATES = (CandidateSpec(name="same", teachers=("same",)), CandidateSpec(name="other", teachers=("other",)))


def write_texts(folder: Path) -> None:
    """Two corpora, each with documents that are held out."""
    code = [path.read_text(encoding="utf-8")[:6000] for path in sorted(SOURCE.rglob("*.py"))]
    prose = [json.loads(line)["text"][:6000] for line in (TEXTS / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    both = [text for pair in zip(code, prose) for text in pair]
    for name, documents in (("code", code), ("prose", prose), ("both", both)):
        parts = {"train": [d for n, d in enumerate(documents) if n % 6], "held-out": [d[:1500] for d in documents[::6][:24]]}
        for part, kept in parts.items():
            lines = "".join(json.dumps({"text": text}) + "\n" for text in kept)
            (folder / f"{name}-{part}.jsonl").write_text(lines, encoding="utf-8")


def write_model(folder: Path, vocab_size: int, width: int, seed: int) -> str:
    """A random Llama of two layers, or four where it is wide, with a tokenizer."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4 if width == 128 else 2}
    return str(tiny_model(folder, vocab_size, seed, max_position_embeddings=1024, **sizes, **heads))


def spec_of(root: Path, student: str, text: str, rate: float, seed: int, max_rows: int | None = None) -> DistillationSpec:
    """A run of `student` from both teachers' scores, as long as the longest run."""
    data = {"train": [str(root / f"{text}-train.jsonl")], "max_length": 64, "max_rows": max_rows}
    training = {
        "max_steps": LENGTHS[-1],
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "learning_rate": rate,
        "precision": "fp32",
    }
    teachers = [{"id": name, "model": str(root / name / "last"), "scores": {"top_k": 32}} for name in ("same", "other")]
    teachers[1]["projection"] = {}
    held_out = [str(root / f"{text}-held-out.jsonl") for text in ("code", "prose")]
    values = {"student": {"model": student}, "teachers": teachers, "loss": {"mode": "partition_kl"}, "data": data}
    values |= {"name": "pilot-runs", "evaluation": {"texts": held_out}, "output": {"uri": "unused"}}
    training |= {"seed": seed, "warmup_steps": 8}
    return DistillationSpec.from_text(json.dumps(values | {"training": training}))


def make_teacher(root: Path, name: str, vocab_size: int) -> None:
    """A wider model that has read both texts for TEACHER_STEPS."""
    if (root / name / "last").exists():
        return
    spec = spec_of(root, write_model(root / f"{name}-before", vocab_size, 128, seed=5), "both", 2e-3, seed=5)
    spec = spec.model_copy(update={"teachers": (), "training": spec.training.model_copy(update={"max_steps": TEACHER_STEPS})})
    prepare_rows(spec, root / f"{name}-rows" / "train", "train")
    distill(spec, TrainingInputs((root / f"{name}-rows",)), root / name, baseline=True)


def made_inputs(root: Path, spec: DistillationSpec, setting: str) -> TrainingInputs:
    """Rows, W and both teachers' scores of a setting."""
    folder = root / setting
    if not (folder / "rows" / "train" / "rows.json").exists():
        prepare_rows(spec, folder / "rows" / "train", "train")
        make_projection(spec, "other").save(folder / "w.safetensors")
    for teacher in ("same", "other"):
        score_teacher(spec, teacher, folder / "rows", folder / teacher)
    scores = {teacher: (folder / teacher,) for teacher in ("same", "other")}
    return TrainingInputs((folder / "rows",), {"other": "partition_kl"}, {"other": folder / "w.safetensors"}, scores)


def lines(root: Path, setting: str, done: set[str]) -> Iterator[dict[str, Any]]:
    """The runs of one setting."""
    options = SETTINGS[setting]
    for seed in SEEDS:
        student = write_model(root / f"student-{options['width']}-{seed}", 512, options["width"], seed)
        spec = spec_of(root, student, options["text"], options["rate"], seed, options.get("max_rows", 8 * LENGTHS[-1]))
        inputs = made_inputs(root, spec, setting)
        for candidate in (WITHOUT_TEACHERS, *CANDIDATES):
            for steps in LENGTHS:
                key = f"small-{setting}-{candidate.name}-{seed}-{steps}"
                if key in done:
                    continue
                used = (
                    inputs
                    if candidate.name == CE
                    else TrainingInputs(
                        inputs.rows, inputs.modes, inputs.projections, {candidate.name: inputs.scores[candidate.name]}
                    )
                )
                trial = run_place(spec, Place(1, steps / LENGTHS[-1], candidate), used, root / "run" / key)
                arm = {"name": candidate.name, "loss": None if candidate.name == CE else {"mode": "partition_kl"}}
                job = {"setting": f"small-{setting}", "arm": arm, "seed": seed, "steps": trial.steps}
                held_out = {Path(name).stem.removesuffix("-held-out"): round(bits, 6) for name, bits in trial.per_corpus.items()}
                yield {"key": key, "job": job, "held_out": held_out}


def main(results: Path, root: Path) -> None:
    """Appends a line for each run that `results` lacks."""
    torch.set_num_threads(1)
    root.mkdir(parents=True, exist_ok=True)
    write_texts(root)
    make_teacher(root, "same", 512)
    make_teacher(root, "other", 800)
    done = {json.loads(line)["key"] for line in results.read_text().splitlines()} if results.exists() else set()
    for setting in SETTINGS:
        for line in lines(root, setting, done):
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
