"""What runs inside a teacher process: the model, and where its weights are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel
from transformers.utils import logging

from xtoken_core.losses import teacher_scores
from xtoken_core.losses.types import HiddenLogits
from xtoken_core.models import decoder_layers, final_hidden, head_logits, load_model, vocabulary_rows
from xtoken_core.teachers.handle import Inputs, Shards, TeacherSetup
from xtoken_core.teachers.transport import Outbox, Shape


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
            logits = replace(logits, hidden=logits.hidden.flatten(0, 1)[inputs["gather"]])
        ids, mask, widths = (inputs[f"scored_{name}"] for name in ("input_ids", "token_mask", "token_bytes"))
        assert self.setup.scores is not None
        return teacher_scores(logits, ids, mask, inputs["sample_mask"], self.setup.scores, widths)


def shard(model: PreTrainedModel, shards: Shards, device: torch.device, whole: Sequence[nn.Parameter]) -> None:
    """Spreads the weights of all layers over the processes of `shards`; those of `whole` stay so. Each still runs its own samples."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{shards.address}",
        rank=shards.rank,
        world_size=shards.size,
        device_id=device if device.type == "cuda" else None,
    )
    mesh = init_device_mesh(device.type, (shards.size,))
    for module in (*decoder_layers(model), model.base_model):
        fully_shard(module, mesh=mesh, ignored_params=set(whole))


class Weights:
    """Where a model's weights are: on the device, or in host memory.

    Weights never change, so offloading only frees the device's copy. Onloading starts the copies on a stream of their
    own, layer by layer; each layer's forward waits for its own copy alone, so copying overlaps with compute.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, stay: Sequence[nn.Parameter] = (), movable: bool = True):
        """`stay`: parameters that live on the device already and are left alone; none move on a CPU, or where they are sharded."""
        self.device = device
        self.host: list[list[Tensor]] | None = None
        self.nbytes = 0
        self.on_device = device.type == "cpu" or not movable
        if self.on_device:
            return
        self.stream = torch.cuda.Stream(device)
        layers = decoder_layers(model)
        apart = {id(p) for p in stay} | {id(p) for layer in layers for p in layer.parameters()}
        others = [p for p in model.parameters() if id(p) not in apart]
        self.groups = [others, *(list(layer.parameters()) for layer in layers)]
        self.host = [[p.data for p in group] for group in self.groups]
        self.nbytes = sum(t.nbytes for group in self.host for t in group)
        self.arrived = [torch.cuda.Event() for _ in self.groups]
        model.base_model.register_forward_pre_hook(lambda *_: self._wait(0))
        for index, layer in enumerate(layers, 1):
            layer.register_forward_pre_hook(lambda *_, index=index: self._wait(index))
        for buffer_name, buffer in list(model.named_buffers()):
            owner, _, leaf = buffer_name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(device))

    def _wait(self, index: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.arrived[index])

    def onload(self) -> None:
        """Starts to copy the weights onto the device; their use waits as long as needed."""
        if self.on_device or self.host is None:
            return
        self.on_device = True
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        for group, host, arrived in zip(self.groups, self.host, self.arrived):
            for parameter, tensor in zip(group, host):
                parameter.data = torch.empty_like(tensor, device=self.device)
                with torch.cuda.stream(self.stream):
                    parameter.data.copy_(tensor, non_blocking=True)
            arrived.record(self.stream)

    def offload(self) -> None:
        """Frees the weights' device memory, and what the allocator keeps."""
        if self.host is None:
            return
        torch.cuda.synchronize(self.device)
        self.on_device = False
        for group, host in zip(self.groups, self.host):
            for parameter, tensor in zip(group, host):
                parameter.data = tensor
        torch.cuda.empty_cache()

    def pin_host(self) -> None:
        """Pins the host copy, so that it can be copied while the device computes."""
        if self.device.type == "cuda" and self.host is not None:
            self.host = [[t.pin_memory() for t in group] for group in self.host]
            if not self.on_device:
                self.offload()

    def forget_host(self) -> None:
        """Drops the host copy: the weights stay on the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.host = None
