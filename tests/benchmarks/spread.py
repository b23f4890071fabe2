"""One student by DDP and by FSDP2, on two ranks over gloo, in bf16: `python -m tests.benchmarks.spread STUDENT`

Prints loss and gradient norm of three steps for each: they must agree within rounding, since under both the residual stream is float32.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from pipelines.warm import IMPORTED
from tests.support.tiny import tiny_model, tiny_run
from tests.support.training_run import OTHER_IDS, changed, losses, start_ranks
from xtoken_core.data.prepare import prepare_rows
from xtoken_core.forking import start_server
from xtoken_core.projection import build_projection
from xtoken_core.spec import DistillationSpec
from xtoken_core.tokenization import TokenTable, load_tokenizer

TRAINING = {"max_steps": 3, "global_batch_size": 4, "micro_batch_size": 1, "scheduler": "constant", "precision": "bf16"}


def main(student: str, folder: Path) -> None:
    """Trains both ways, under a toy teacher with another tokenizer."""
    data = {"validation": [], "max_length": 96}
    values = changed(tiny_run(folder, 1), student={"model": student}, data=data, training=TRAINING, loss={"mode": "partition_kl"})
    tiny_model(folder / "other", OTHER_IDS, seed=1)
    spec = DistillationSpec.model_validate(values)
    prepare_rows(spec, folder / "rows" / "train", "train")
    tokenizers = load_tokenizer(student), load_tokenizer(str(folder / "other"))
    projection = build_projection(*tokenizers, spec.teachers[0].projection)
    projection.save(folder / "w.safetensors", *(TokenTable.from_tokenizer(t).fingerprint for t in tokenizers))
    start_server(IMPORTED)
    for sharding in ("ddp", "fsdp"):
        for rank in start_ranks(changed(values, training={"sharding": sharding}), folder, folder / sharding):
            rank.finish()
        for step, loss, norm in losses(folder / sharding):
            print(json.dumps({"sharding": sharding, "step": step, "loss": loss, "grad_norm": norm}), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(sys.argv[1], Path(made))
