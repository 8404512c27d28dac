"""Several processes that train one model: each computes its share of every batch, all take the same step.

Started by ``torchrun``; without it there is one rank and nothing here does anything. A batch is embedded in shares, the
embeddings are gathered with gradients, and the loss is that of the whole batch on every rank; a loss that is a mean
over tokens is computed in shares and added up. So negatives reach over all ranks and the result is that of one process,
up to the order of sums, whatever the number of ranks.

Every rank holds the whole model, unless a language model in it is sharded (`shard`): then a rank holds its share of
that one's weights, gradients and moments, and the parameters that it trains are `DTensor`.
"""

from __future__ import annotations

import datetime as dt
import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from gmail_cli.errors import SetupError

TIMEOUT = dt.timedelta(minutes=30)
"""How long a rank waits for the others within a step, until the run ends with an error. `barrier` waits on."""


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
    distributed.init_process_group(backend, timeout=TIMEOUT)
    _waiting()
    return Ranks(distributed.get_rank(), distributed.get_world_size())


@functools.cache
def _waiting() -> distributed.ProcessGroup | None:
    """The group in which ranks wait for one that works alone, for days if need be; on CPUs, so that no GPU spins."""
    return distributed.new_group(backend="gloo", timeout=dt.timedelta(days=365))


def barrier() -> None:
    """Wait until every rank is here, however long that takes."""
    if ranks().count > 1:
        distributed.barrier(group=_waiting())


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
    """Replace each gradient by its mean over the ranks; a rank whose share did not reach a parameter counts as zero.

    Those of sharded parameters are that mean already.
    """
    world = ranks()
    parameters = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if world.count == 1 or not parameters:
        return
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
    """What rank 0 holds, on every rank; so that all go on from one checkpoint. Waits for rank 0 as `barrier` does."""
    world = ranks()
    if world.count == 1:
        return tensors
    barrier()
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


# -- sharding ----------------------------------------------------------------------------------------------------


def shard(model: nn.Module, lm: Any, *, device: torch.device) -> None:
    """Leave each rank its share of the language model in ``model``, on ``device`` (FSDP2; ZeRO's third stage).

    Each tensor is cut along its first dimension. A layer is gathered when it computes, forward and backward, and let go
    again; the gradients of what it trains are averaged over the ranks into shares. What else ``model`` holds stays
    whole. All begin with rank 0's values, a layer at a time, so the others need hold none before (torch's ``meta``
    device). With one rank the model only moves there.

    Args:
        model: Always called as a whole, by all ranks together.
        lm: transformers' causal language model in it, or one with peft's adapters.
        device: Of the ranks' shares.
    """
    world = ranks()
    if world.count == 1:
        model.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world.count,))
    stacks = [module for module in lm.modules() if isinstance(module, nn.ModuleList)]
    layers = max(stacks, key=lambda stack: sum(each.numel() for each in stack.parameters()), default=())
    first, last = lm.get_input_embeddings(), lm.get_output_embeddings()
    tied = first.weight is last.weight
    done: set[nn.Module] = set()
    for part in [*layers, first, last]:
        done |= _start_alike(part, device=device, but=done)
        if tied and part is last:
            last.weight = first.weight
        if not tied or part not in (first, last):
            fully_shard(part, mesh=mesh)
    if tied:
        fully_shard([first, last], mesh=mesh)
    _start_alike(model, device=device, but=done)
    own = set(lm.parameters())
    fully_shard(model, mesh=mesh, ignored_params={each for each in model.parameters() if each not in own})


def _start_alike(module: nn.Module, *, device: torch.device, but: set[nn.Module]) -> set[nn.Module]:
    """Give ``module`` rank 0's values on ``device``, but for what in it has them; the modules in it that now have."""
    first = ranks().rank == 0
    found = set(module.modules()) - but
    if first:
        module.to(device)
    for each in (each for each in module.modules() if each in found):  # in one order on all ranks
        if not first:
            each.to_empty(device=device, recurse=False)
        for tensor in (*each.parameters(recurse=False), *each.buffers(recurse=False)):
            distributed.broadcast(tensor.detach(), 0)
    return found


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether this rank holds only its share of some of them."""
    return any(isinstance(each, DTensor) for each in parameters)


def apart(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those that are whole, and those that are sharded: no operation of torch takes both. Empty lists are left out."""
    kinds: list[list[Tensor]] = [[], []]
    for each in tensors:
        kinds[isinstance(each, DTensor)].append(each)
    return [kind for kind in kinds if kind]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's values from all ranks, which have to ask together; another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_sharded(values: Tensor, like: Tensor) -> Tensor:
    """This rank's share of ``values``, where ``like`` is sharded."""
    if not isinstance(like, DTensor):
        return values
    return distribute_tensor(values.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def clip_gradients(parameters: Sequence[Tensor], limit: float) -> Float[Tensor, ""]:
    """Scale all gradients so that their norm is ``limit`` at most; the norm before, over all ranks' shares."""
    kinds = apart(parameter for parameter in parameters if parameter.grad is not None)
    norms = [whole(nn.utils.get_total_norm([each.grad for each in kind])) for kind in kinds]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, limit, norm)
    return norm


def agreed(decision: bool) -> bool:
    """What rank 0 has decided."""
    told = torch.tensor([decision], device="cuda" if torch.cuda.is_available() else "cpu")
    distributed.broadcast(told, 0)
    return bool(told)


def unshard_trained(module: nn.Module) -> None:
    """Put whole tensors where ``module`` trained sharded ones, on every rank: to be written, not to be run any more."""
    for name, parameter in list(module.named_parameters()):
        if parameter.requires_grad and isinstance(parameter, DTensor):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Parameter(parameter.detach().full_tensor()))
