"""Where a teacher's weights are: on the device, in host memory, or spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from xtoken_core.layers import decoder, decoder_layers
from xtoken_core.teachers.setup import Shards


def shard(model: PreTrainedModel, shards: Shards, device: torch.device, whole: Sequence[nn.Parameter]) -> None:
    """Spreads the weights of all layers over the processes of `shards`; those of `whole` stay so. Each still runs its own samples."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=shards.address,
        rank=shards.rank,
        world_size=shards.size,
        device_id=device if device.type == "cuda" else None,
    )
    mesh = init_device_mesh(device.type, (shards.size,))
    for module in (*decoder_layers(model), decoder(model)):
        fully_shard(module, mesh=mesh, ignored_params=set(whole))


class Weights:
    """Where a model's weights are: on the device, or in host memory.

    Weights never change, so offloading only frees the device's copy. Onloading starts the copies on a stream of their
    own, layer by layer; each layer's forward waits for its own copy alone, so copying overlaps with compute.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, stay: Sequence[nn.Parameter], movable: bool):
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
        decoder(model).register_forward_pre_hook(lambda *_: self._wait(0))
        for index, layer in enumerate(layers, 1):
            layer.register_forward_pre_hook(lambda *_, index=index: self._wait(index))
        for buffer_name, buffer in list(model.named_buffers()):
            owner, _, leaf = buffer_name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(device))

    def _wait(self, index: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.arrived[index])

    def onload(self, layers: int | None = None) -> None:
        """Starts to copy the weights onto the device; their use waits as long as needed. layers: only so many of the first layers'."""
        if self.on_device or self.host is None:
            return
        self.on_device = True
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        count = None if layers is None else layers + 1  # before them: what belongs to no layer
        for group, host, arrived in list(zip(self.groups, self.host, self.arrived))[:count]:
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
