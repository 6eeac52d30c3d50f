"""Data-parallel training under torchrun: which process this is, and what all of them agree on.

Gradients are averaged by torch's DistributedDataParallel. Everything here is a no-op in a process
that torchrun did not start.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def torchrun_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, for the duration of the context.

    What holds on to the group, as what `data_parallel` returns does, must be gone when the context
    ends: gloo's threads last as long as the group, and may abort a process that ends before them.

    Parameters
    ----------
    device : torch.device
        Where to train; "cuda" becomes one GPU a process.

    Yields
    ------
    torch.device
        This process's device.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    # DistributedDataParallel imports it; defaults of its functions are the group that they find.
    import torch.distributed.nn

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    group = dist.group.WORLD
    try:
        yield device
    finally:
        dist.destroy_process_group()
        gc.collect()  # DistributedDataParallel is part of a cycle
        del group  # the last reference, and one that joins the threads without holding the GIL


def process_count() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank() -> int:
    """Return this process's number; 0 writes files and reports."""
    return dist.get_rank() if dist.is_initialized() else 0


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """Wrap `module`, whose forward is the loss, so that its backward averages the gradients."""
    if process_count() == 1:
        return module
    return DistributedDataParallel(
        module,
        device_ids=None if device.type == "cpu" else [device],
        gradient_as_bucket_view=True,
    )


def gradients_stay_local(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context whose backward passes add up gradients without averaging them."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def mean_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the mean of each value; the same to the bit in every process."""
    if process_count() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    mean: list[float] = (total / process_count()).tolist()
    return mean
