"""How the student is spread over ranks: by DDP, or by FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers.trainer import OPTIMIZER_NAME

from xtoken_core.errors import InputError

WHOLE_SHARE = 0.25
"""Of a GPU's memory: FSDP keeps weights and gradients whole from one micro-batch of a step to the next while they take less."""


def configure(accelerator: Accelerator, model: nn.Module) -> None:
    """Settles, before the model is wrapped, what transformers' arguments do not.

    Under FSDP weights are gathered in float32 and autocast rounds products alone, as under DDP and on one GPU: the residual stream
    stays float32. (accelerate's own policy casts the weights, and with them the stream.)
    """
    if not accelerator.is_fsdp2:
        if accelerator.ddp_handler is not None:
            accelerator.ddp_handler.gradient_as_bucket_view = True  # no copy of the gradients
        return
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if accelerator.mixed_precision == "bf16":
        model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)
    plugin.reshard_after_forward = not fits_whole(model, accelerator.device)
    if plugin.reshard_after_forward:  # whole gradients would not fit either: each micro-batch's are summed over ranks at once
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True


def check_optimizer(checkpoint: Path, sharded: bool) -> None:
    """Raises InputError for a checkpoint whose optimizer has the form of a student that is not spread as this one is."""
    if (checkpoint / OPTIMIZER_NAME).exists() == sharded:
        was, now = ("by one process", "several") if sharded else ("by several processes under fsdp", "one")
        raise InputError(
            f"{checkpoint}: was saved {was}, and this training has {now}; go on with as many, or remove its checkpoints"
        )


def fits_whole(model: nn.Module, device: torch.device) -> bool:
    """Whether all weights and their gradients, in float32, take little of the device's memory; on a CPU: yes."""
    if device.type != "cuda":
        return True
    needed = sum(8 * p.numel() for p in model.parameters())
    return needed <= WHOLE_SHARE * torch.cuda.get_device_properties(device).total_memory


def between_micro_batches(model: Any, accelerator: Accelerator) -> None:
    """Before a micro-batch's forward: under FSDP its backward frees the gathered weights in the last one of a step, where they fit so long."""
    if isinstance(model, FSDPModule) and not accelerator.state.fsdp_plugin.reshard_after_forward:
        model.set_reshard_after_backward(accelerator.sync_gradients)
