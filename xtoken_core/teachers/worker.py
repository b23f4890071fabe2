"""What runs inside a teacher process: the model, and where its weights are."""

from __future__ import annotations

import os
import resource
import signal
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from xtoken_core.errors import InputError
from xtoken_core.losses import teacher_scores
from xtoken_core.losses.types import HiddenLogits
from xtoken_core.models import final_hidden, head_logits, load_model, vocabulary_rows
from xtoken_core.teachers.setup import Inputs, TeacherSetup
from xtoken_core.teachers.transport import Outbox, Shape, remove_traces
from xtoken_core.teachers.weights import Weights, shard


class TeacherServer:
    """A loaded teacher. Its public methods are the commands of the pipe; each returns what the reply holds."""

    def __init__(self, setup: TeacherSetup):
        logging.disable_progress_bar()
        self.setup = setup
        self.model = load_model(setup.model, setup.dtype, setup.attention, setup.packed).requires_grad_(False)
        self.rows = vocabulary_rows(self.model, setup.num_ids, setup.min_rows, setup.model)
        self.outbox = Outbox(setup.device)
        shared = self._share_head() if setup.transport == "hidden" or setup.shards is not None else []
        if setup.shards is not None:
            shard(self.model, setup.shards, setup.device, whole=shared)
        self.weights = Weights(self.model, setup.device, stay=shared, movable=setup.shards is None)
        if setup.residency == "resident":
            self.settle(resident=True)

    def _share_head(self) -> list[nn.Parameter]:
        """Moves the lm_head (and the embedding tied to it) into buffers that the student maps, for good."""
        head = self.model.get_output_embeddings()
        shared = [p for p in (head.weight, getattr(head, "bias", None)) if p is not None]
        for name, parameter in zip(("head", "bias"), shared):
            (place,) = self.outbox.tensors(name, [tuple(parameter.shape)], parameter.dtype)
            parameter.data = place.copy_(parameter.data)
        return shared

    def describe(self) -> dict[str, Any]:
        """What the student needs to know: rows of the lm_head, its form, bytes of the weights that can be offloaded."""
        head = head_logits(self.model, torch.empty(0), self.rows)
        shape = tuple(self.model.get_output_embeddings().weight.shape)
        form = {"shape": shape, "bias": head.bias is not None, "scale": head.scale, "softcap": head.softcap}
        return {"rows": self.rows, "head": form, "weight_bytes": self.weights.nbytes, "handles": self.outbox.announce()}

    def onload(self) -> dict[str, Any]:
        """Brings the weights onto the device."""
        self.weights.onload()
        return {}

    def offload(self) -> dict[str, Any]:
        """Frees the device memory of weights and activations."""
        self.weights.offload()
        return {}

    def settle(self, resident: bool) -> dict[str, Any]:
        """Fixes whether the weights stay on the device from now on; if not, their host memory is pinned."""
        if resident:
            self.weights.onload()
            self.weights.forget_host()
        else:
            self.weights.pin_host()
        return {}

    @torch.no_grad()
    def run(self, micro_batches: Sequence[Inputs]) -> dict[str, Any]:
        """Runs all micro-batches into the buffers: `shapes` per micro-batch, `scores` [n][2], `working_bytes` on a GPU."""
        device, transport = self.setup.device, self.setup.transport
        width = {"hidden": self.model.config.get_text_config().hidden_size, "logits": self.rows, "topk": self.setup.top_k}[
            transport
        ]
        shapes: list[Shape] = [(*batch["input_ids"].shape, width) for batch in micro_batches]
        if transport == "topk":
            outputs = self.outbox.tensors("values", shapes, self.setup.dtype)
            indices = self.outbox.tensors("indices", shapes, torch.int32)
        else:
            outputs = self.outbox.tensors(transport, shapes, self.setup.dtype)
        scores = []
        for n, batch in enumerate(micro_batches):
            inputs = {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in batch.items()}
            hidden = final_hidden(self.model, inputs["input_ids"], inputs.get("position_ids"))
            logits = head_logits(self.model, hidden, self.rows)
            if self.setup.scores is not None:
                scores.append(self._score(logits, inputs))
            if transport == "hidden":
                outputs[n].copy_(hidden)
            elif transport == "logits":
                outputs[n].copy_(logits.dense())
            else:
                values, ids = logits.dense().topk(outputs[n].shape[-1])
                outputs[n].copy_(values)
                indices[n].copy_(ids)
        result = {"shapes": shapes, "scores": [s.tolist() for s in scores], "handles": self.outbox.announce()}
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the student may read as soon as it has the reply
            result["working_bytes"] = torch.cuda.max_memory_reserved(device) - torch.cuda.memory_allocated(device)
        return result

    def _score(self, logits: HiddenLogits, inputs: dict[str, Tensor]) -> Tensor:
        if "gather" in inputs:
            logits = logits.over_positions(lambda tensor: tensor.flatten(0, 1)[inputs["gather"]])
        ids, mask, widths = (inputs[f"scored_{name}"] for name in ("input_ids", "token_mask", "token_bytes"))
        assert self.setup.scores is not None
        return teacher_scores(logits, ids, mask, inputs["sample_mask"], self.setup.scores, widths)


def teacher_main(pipe: Connection, setup: TeacherSetup, student: int) -> None:
    """Serves commands until it is told to close or the student, a process id, is gone. The body of a teacher process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the student closes its teachers
    torch.set_num_threads(setup.threads)
    try:
        server = TeacherServer(setup)
        pipe.send(("done", _stamped(time.monotonic(), server.describe())))
        while (message := pipe.recv())[0] != "close":
            command, arguments = message
            started = time.monotonic()
            pipe.send(("done", _stamped(started, getattr(server, command)(*arguments))))
    except (EOFError, BrokenPipeError):
        for process in (student, os.getpid()):
            remove_traces(process)  # the student is gone and cannot
        os._exit(0)  # torch would miss its counters
    except InputError as e:
        pipe.send(("bad input", str(e)))
    except BaseException as e:
        traceback.print_exc()
        pipe.send(("failed", f"{type(e).__name__}: {e}"))


def _stamped(started: float, result: dict[str, Any]) -> dict[str, Any]:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"started": started, "ended": time.monotonic(), "host_bytes": memory, **result}
