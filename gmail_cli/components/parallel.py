"""Several processes that train one model: each computes its share of every batch, all take the same step.

Started by ``torchrun``; without it there is one rank and nothing here does anything. A batch is embedded in shares, the
embeddings are gathered with gradients, and the loss is that of the whole batch on every rank; a loss that is a mean
over tokens is computed in shares and added up. So negatives reach over all ranks and the result is that of one process,
up to the order of sums, whatever the number of ranks.
"""

from __future__ import annotations

import datetime as dt
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn

from gmail_cli.errors import SetupError


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int = 0
    count: int = 1

    def share(self, rows: int) -> slice:
        """Which of a batch's rows this rank computes; shares differ by one row at most."""
        sizes = self.sizes(rows)
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def sizes(self, rows: int) -> list[int]:
        """How many rows each rank computes.

        Raises:
            SetupError: There are more ranks than rows.
        """
        if rows < self.count:
            raise SetupError(
                f"{self.count} processes share batches of {rows} rows",
                hint="Start fewer with torchrun --nproc-per-node, or raise the batch size.",
            )
        return [rows // self.count + (rank < rows % self.count) for rank in range(self.count)]


@functools.cache
def ranks() -> Ranks:
    """The ranks that ``torchrun`` started; joins them (gloo on CPUs, NCCL on GPUs) when first asked.

    Raises:
        SetupError: Fewer GPUs here than processes.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks()
    if torch.cuda.is_available():
        place, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if place >= devices:
            raise SetupError(f"process {place} has no GPU: torch sees {devices}", hint="Start one process per GPU.")
        torch.cuda.set_device(place)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=dt.timedelta(days=30))  # others wait while one generates
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def barrier() -> None:
    """Wait until every rank is here."""
    if ranks().count > 1:
        distributed.barrier()


def gather(local: Float[Tensor, "share dim"], *, rows: int) -> Float[Tensor, "rows dim"]:
    """All ranks' rows in order, where gradients reach this rank's own.

    These gradients are multiplied with the number of ranks, so that the mean over ranks (:func:`average_gradients`)
    is the gradient of the whole, for parameters behind the rows and for others alike.

    Args:
        local: The rows of this rank's share.
        rows: How many there are on all ranks.
    """
    world = ranks()
    if world.count == 1:
        return local
    sizes = world.sizes(rows)
    padded = local.new_zeros((max(sizes), *local.shape[1:]))
    padded[: len(local)] = local.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    parts[world.rank] = local + (world.count - 1) * (local - local.detach())
    return torch.cat(parts)


def add(part: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The sum of all ranks' parts of a loss, with gradients as :func:`gather` has them."""
    count = ranks().count
    return part if count == 1 else gather(part[None, None], rows=count).sum()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks; a rank whose share did not reach a parameter counts as zero."""
    world = ranks()
    if world.count == 1:
        return
    parameters = list(parameters)
    reached = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    reached = reached.to(parameters[0].device)
    distributed.all_reduce(reached, distributed.ReduceOp.MAX)
    gradients = []
    for parameter, anywhere in zip(parameters, reached.tolist(), strict=True):
        if anywhere:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= world.count
    for gradient, mean in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def from_first(tensors: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """What rank 0 holds, on every rank; so that all go on from one checkpoint."""
    world = ranks()
    if world.count == 1:
        return tensors
    from safetensors.torch import load, save

    device = "cuda" if torch.cuda.is_available() else "cpu"
    content = save(tensors) if tensors and world.rank == 0 else b""
    size = torch.tensor([len(content)], device=device)
    distributed.broadcast(size, 0)
    if not int(size):
        return None
    data = torch.empty(int(size), dtype=torch.uint8, device=device)
    if world.rank == 0:
        data.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    distributed.broadcast(data, 0)
    return load(data.cpu().numpy().tobytes())
