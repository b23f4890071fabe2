"""The files of a run that never was, in the shapes of real ones, for tests of the report.

`python -m tests.support.report_sample FOLDER` writes its report and a comparison there, to look at.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

from xtoken_core.report.compare import write_comparison
from xtoken_core.report.page import write_report
from xtoken_core.report.run import Run
from xtoken_core.results.evaluation import Evaluation
from xtoken_core.results.rows import RowStatistics
from xtoken_core.results.subject import BEFORE, BEST, LAST, TWIN_BEST, TWIN_LAST, Subject, teacher_subject
from xtoken_core.results.training import LogLine, TeacherLine, TrainingSummary
from xtoken_core.results.vocabulary import OverlapReport, ProjectionStats
from xtoken_core.results.workflow import ReadInput, Task
from xtoken_core.spec import DistillationSpec

SPEC = """
name: smollm2-from-gemma-and-smollm2
student: {model: models/SmolLM2-135M-Instruct, keep_layers: [0, 1, 2, 3, 4, 5, 24, 25, 26, 27, 28, 29]}
teachers:
  - {id: gemma, model: models/gemma-3-270m, projection: {}}
  - {id: smollm, model: models/SmolLM2-135M-Instruct}
loss: {mode: p_kl, weight_metric: ce}
data: {train: [texts/train], validation: [texts/validation], max_length: 256}
training: {max_steps: 120, global_batch_size: 4, micro_batch_size: 2, learning_rate: 1.0e-3, warmup_steps: 10, eval_steps: 10}
evaluation: {ce_baseline: true, texts: [texts/kjv, texts/carroll]}
output: {uri: runs/demo}
"""

LEVELS = {
    BEFORE: 3.221,
    BEST: 1.842,
    LAST: 1.851,
    TWIN_BEST: 2.402,
    TWIN_LAST: 2.931,
    teacher_subject("gemma"): 1.062,
    teacher_subject("smollm"): 1.124,
}

PROMPTS = [
    (
        "And it came to pass in those days, that",
        " there went out a decree from Caesar Augustus, that all the world should be taxed.",
    ),
    ("Alice was beginning to get very tired of", " sitting by her sister on the bank, and of having nothing to do."),
    ('The second law <of> "thermodynamics" & its\nlimits:', " entropy does not decrease."),
]


def parts(folder: Path, *, seed: int = 0, shift: float = 0.0, steps: int = 120) -> dict:
    """The arguments of `Run.collect`, with the folders of trainings written."""
    rng = np.random.default_rng(seed)
    for name in ("run", "baseline"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        _log(folder / name / "log.jsonl", rng, steps, twin=name == "baseline")
    _summary(steps).write(folder / "run" / "summary.json")
    return {
        "spec": DistillationSpec.from_text(SPEC, [f"training.max_steps={steps}", f"training.seed={seed}"]),
        "training": folder / "run",
        "baseline": folder / "baseline",
        "results": [_result(who, level + shift, np.random.default_rng(99)) for who, level in LEVELS.items()],
        "overlap": _overlap(),
        "projections": {"gemma": _projection(rng)},
        "prepare": {split: _prepare(split) for split in ("train", "validation")},
        "inputs": _inputs(),
        "tasks": _tasks(),
    }


def sample_run(folder: Path, **options: float) -> Run:
    """The run as the report component collects it."""
    return Run.collect(**parts(folder, **options))


def _log(path: Path, rng: np.random.Generator, steps: int, twin: bool) -> Path:
    lines = []
    for step in range(steps + 1):
        done, noise = step / steps, rng.normal(0, 0.05, 8)
        if step:
            ce = 2.6 * math.exp(-(9 if twin else 4) * done) + (0.3 if twin else 1.9) + noise[0] * 3
            kd = {
                "gemma": 0.9 * math.exp(-5 * done) + 0.2 + noise[1] / 3,
                "smollm": 60 * math.exp(-6 * done) + 0.7 + abs(noise[2]),
            }
            line = {
                "step": step,
                "ce": ce,
                "loss": ce if twin else 2 * ce,
                "accuracy": 0.62 - 0.4 * math.exp(-4 * done) + noise[3] / 5,
            }
            line |= {
                "learning_rate": 1e-3 * min(1, step / 10) * (0.5 + 0.5 * math.cos(math.pi * done)),
                "grad_norm": 0.6 + 3 * math.exp(-8 * done) + abs(noise[4]),
            }
            line |= {
                "tokens": step * 1000,
                "tokens_per_second": 700 + 400 * noise[5],
                "seconds_step": 1.4 + noise[6],
                "memory_gib": (1.9 if twin else 3.1) + min(1, 5 * done) * 0.8,
            }
            if not twin:
                line |= {"kd": sum(kd.values()), "scale": ce / sum(kd.values()), "seconds_teachers": 0.75 + noise[7] / 3}
                line["teachers"] = {
                    "gemma": TeacherLine(kd=kd["gemma"], weight=0.6 + noise[1], seconds=0.5 + noise[7] / 4),
                    "smollm": TeacherLine(kd=kd["smollm"], weight=0.4 - noise[1], seconds=0.25 + noise[7] / 8),
                }
                line |= {"selected": "gemma" if noise[1] > 0 else "smollm"}
            lines.append(LogLine(**line))
        if step % 10 == 0:
            bits = 1.85 + 1.37 * math.exp(-6 * done) if not twin else 2.3 + 0.9 * math.exp(-14 * done) + 0.6 * done**1.5
            lines.append(LogLine(step=step, validation_bits_per_byte=bits))
    path.write_text("".join(line.model_dump_json(exclude_defaults=True) + "\n" for line in lines))
    return path


def _result(who: Subject, level: float, rng: np.random.Generator) -> Evaluation:
    size = rng.integers(400, 4000, 24)
    bits = size * (level + rng.normal(0, 0.15, 24)) + np.random.default_rng(len(who.key)).normal(0, 20, 24)
    corpora = ["texts/kjv"] * 12 + ["texts/carroll"] * 12
    total = bits.sum() / size.sum()
    halves = {name: slice(12 * i, 12 * i + 12) for i, name in enumerate(("texts/kjv", "texts/carroll"))}
    per_corpus = {
        name: {
            "total": (t := bits[part].sum() / size[part].sum()),
            "low": t - 0.08,
            "high": t + 0.08,
            "documents": 12,
            "bytes": int(size[part].sum()),
        }
        for name, part in halves.items()
    }
    student = who.role != "teacher"
    tasks = {
        "arc_easy": {
            "metric": "acc",
            "value": 0.61 - 0.09 * level,
            "samples": 1000,
            "shots": 0,
            "higher_is_better": True,
        },
        "winogrande": {
            "metric": "acc",
            "value": 0.53 - 0.01 * level,
            "samples": 1267,
            "shots": 3,
            "higher_is_better": True,
        },
    }
    tasks["mmlu"] = tasks["arc_easy"] | {"shots": 3, "samples": 14042, "parts": {}}
    for part, samples in {"mmlu_stem": 3153, "mmlu_humanities": 4705}.items():
        tasks["mmlu"]["parts"][part] = tasks["winogrande"] | {"samples": samples, "low": 0.3, "high": 0.6}
    return Evaluation.model_validate({
        "subject": who,
        "model": who.key,
        "bits_per_byte": {
            "total": total,
            "low": total - 0.05,
            "high": total + 0.05,
            "per_corpus": per_corpus,
            "documents": {"corpus": corpora, "bits": bits.tolist(), "bytes": size.tolist()},
        },
        "tasks": {name: entry | {"low": entry["value"] - 0.03, "high": entry["value"] + 0.03} for name, entry in tasks.items()},
        "agreement": {t: {"top1": 0.75 - level / 8, "kl": level / 3, "chunks": 5000, "mode": "p_kl"} for t in ("gemma", "smollm")} if student else {},
        "tokens_per_second": 2100 + 300 * len(who.key),
        "samples": [{"prompt": p, "text": f" the {'king' if level < 2 else 'the the'} said unto the people of <{who.key}>.", "reference": r} for p, r in PROMPTS] if student else [],
    })  # fmt: skip


def _summary(steps: int) -> TrainingSummary:
    environment = {
        "python": "3.11.7",
        "platform": "Linux-6.1-x86_64-with-glibc2.36",
        "versions": {"xtoken-pipelines": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "kfp": "2.17.0"},
        "commit": "1a3e1f5",
        "cpu": "AMD EPYC",
        "cpu_cores": 2,
        "memory_gib": 23.5,
        "devices": [],
    }
    phases = {"gemma": 61.0, "smollm": 30.0, "student": 96.0, "validation": 21.0, "checkpoint": 6.0}
    summary = {"steps": steps, "tokens": steps * 1000, "seconds": 214.0, "best_step": steps - 10, "modes": {"gemma": "p_kl"}}
    return TrainingSummary.model_validate(
        {**summary, "parameters": 74_400_000, "seconds_by_phase": phases, "environment": environment}
    )


def _overlap() -> OverlapReport:
    def coverage(digits: float) -> dict:
        shares = {
            "letter": 0.83,
            "digit": digits,
            "punctuation": 0.97,
            "whitespace": 0.91,
            "single_character": 0.99,
            "other": 0.42,
        }
        return {
            name: {"tokens": 1000 * (i + 1), "covered": int(1000 * (i + 1) * s), "share": s}
            for i, (name, s) in enumerate(shares.items())
        }

    reason = "no two- or three-digit tokens on the student's side"
    gemma = {
        "tokenizer": "models/gemma-3-270m",
        "fingerprint": "9f0b2c4417aa",
        "size": 262144,
        "same_vocabulary": False,
        "shared": 34000,
        "coefficient": 0.6912,
        "mode": "p_kl",
    }
    same = {
        "tokenizer": "models/SmolLM2-135M-Instruct",
        "reason": "every id stands for the same bytes as the student's",
        "fingerprint": "5a7c01d2e9ff",
        "size": 49152,
        "same_vocabulary": True,
        "shared": 49152,
        "coefficient": 1.0,
        "mode": "same_vocabulary",
    }
    return OverlapReport.model_validate(
        {
            "student": {"tokenizer": "models/SmolLM2-135M-Instruct", "fingerprint": "5a7c01d2e9ff", "size": 49152},
            "teachers": {"gemma": gemma | {"coverage": coverage(1.0), "reason": reason}, "smollm": same | {"coverage": {}}},
            "matrix": {
                "names": ["student", "gemma", "smollm"],
                "coefficient": [[1.0, 0.691, 1.0], [0.691, 1.0, 0.691], [1.0, 0.691, 1.0]],
            },
        }
    )


def _projection(rng: np.random.Generator) -> ProjectionStats:
    picture = rng.gamma(0.3, 2.0, (48, 64)) * (rng.random((48, 64)) < 0.6)
    picture[np.arange(48), np.arange(48) * 64 // 48] += 300
    examples = [
        {"student": " thermodynamics", "pieces": [[" therm", 0.9], ["odynamics", 0.1]]},
        {"student": "\n\n\n", "pieces": [["\n", 1.0]]},
    ]
    tokens = ["2024", " the", " tokenizer", "():\\n", "naïve"]
    pieces = ["2", "0", "4", "␣the", "␣token", "izer", "():", "\\n", "na", "ïve"]
    weights = [[0.9, 0.099, 0.001, *[0] * 7], [0, 0, 0, 1, *[0] * 6], [0, 0, 0, 0, 0.909, 0.091, 0, 0, 0, 0]]
    weights += [[0] * 6 + [0.909, 0.091, 0, 0], [0] * 8 + [0.909, 0.091]]
    block = {"rows": tokens, "columns": pieces, "weights": weights}
    counts = {"0": 12, "1": 34012, "2": 11000, "3": 3500, "4": 628}
    numbers = {
        "rows": 49152,
        "columns": 262144,
        "entries": 70000,
        "exact": 33980,
        "multi": 15128,
        "single_inexact": 32,
        "empty": 12,
        "seconds": 3.2,
    }
    return ProjectionStats.model_validate(
        {**numbers, "entries_per_row": counts, "picture": picture.round(3).tolist(), "block": block, "examples": examples}
    )


def _prepare(split: str) -> RowStatistics:
    size = 61_000 if split == "train" else 24_000
    corpora = {f"texts/{split}": {"documents": 41, "bytes": size}}
    teachers = {"gemma": {"tokens": size // 4, "chunks": size // 5, "exact_chunks": int(size / 5 * 0.999)}}
    numbers = {
        "documents": 41,
        "rows": 16 * size // 61_000,
        "bytes": size,
        "student_tokens": size // 4,
        "dropped_documents": {},
        "seconds": 2.1,
    }
    return RowStatistics.model_validate({**numbers, "corpora": corpora, "teachers": teachers})


def _inputs() -> list[ReadInput]:
    models = {"student.model": "models/SmolLM2-135M-Instruct", "teachers.gemma.model": "models/gemma-3-270m"}
    read = models | {"data.train": "texts/train", "data.validation": "texts/validation"}
    return [ReadInput(field=name, uri=uri, version="c0ffee12deadbeef") for name, uri in read.items()]


def _tasks() -> list[Task]:
    needs = {
        "teachers": "resolve",
        "student-before": "resolve",
        "student-after": "distill",
        "baseline": "distill-baseline",
    }
    evaluations = [f"evaluate-{group}" for group in needs]
    return [
        Task(name="resolve", seconds=1.3),
        Task(name="overlap", after=["resolve"], seconds=4.8, status="cached"),
        Task(name="projections", after=["resolve", "overlap"], seconds=5.9, status="cached"),
        Task(name="prepare", after=["resolve", "overlap"], seconds=8.1),
        Task(name="distill", after=["resolve", "prepare", "projections", "overlap"], seconds=214.0),
        Task(name="distill-baseline", after=["resolve", "prepare"], seconds=131.0),
        *(Task(name=f"evaluate-{g}", after=["resolve", needs[g]], seconds=9.0 + 3 * i) for i, g in enumerate(needs)),
        Task(name="report", after=[*evaluations, "distill"]),
    ]


if __name__ == "__main__":
    out = Path(sys.argv[1])
    one = sample_run(out / "one")
    print(write_report(one, out / "one"))
    print(write_comparison([one, sample_run(out / "two", seed=1, shift=0.07, steps=900)], out / "compare.html"))
