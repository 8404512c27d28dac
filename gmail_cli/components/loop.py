"""The resumable training loop: everything a step does is a function of (parameters, seed, step).

Batch ``step`` is read from a permutation that depends on (seed, epoch) only, the random generators are
seeded from (seed, step) before each step, and the learning rate is computed from ``step``. A checkpoint is
therefore parameters, buffers, optimiser moments, averaged parameters, the step and the loss curve so far, in
one flat mapping of tensors; a killed run that is started again ends with the same parameters and the same
curve, bit for bit on a CPU. When checkpoints are taken does not change the result.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from gmail_cli.components import parallel
from gmail_cli.errors import InputError, UsageError

Schedule: TypeAlias = Literal["cosine", "cosine-restarts", "constant"]
Row: TypeAlias = dict[str, float]
Loss: TypeAlias = Callable[[Tensor, int], Tensor | tuple[Tensor, dict[str, Tensor]]]

CHECKPOINT_SHARE = 0.01
"""Largest share of the training time that writing checkpoints may take."""


class Checkpoints(Protocol):
    """Where checkpoints are kept; the stage provides it, the loop never writes files.

    ``save`` must replace the earlier checkpoint atomically and must be done with the tensors when it returns.
    """

    def load(self) -> dict[str, Tensor] | None: ...

    def save(self, tensors: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train: AdamW with decoupled weight decay on matrices only (not on biases, norms and scalars).

    Attributes:
        steps: Optimiser steps in all.
        batch_size: Rows per step.
        lr: Highest learning rate.
        weight_decay: AdamW's decay for parameters of two and more dimensions.
        betas: AdamW's moment decay rates.
        schedule: Shape of the learning rate after the warm-up; see `learning_rate`.
        cycles: Number of cosine cycles of ``cosine-restarts``.
        warmup: Steps over which the learning rate rises linearly.
        clip_norm: Largest gradient norm, or None not to clip.
        ema: Decay of the exponential average of the parameters, or None to keep none.
        seed: Seed of data order and of all randomness within steps.
        log_every: Steps per row of the loss curve; checkpoints fall on the same steps.
        restart: From this step on a second stage begins, with a warm-up and a schedule of its own; 0 for none.
        restart_lr: Highest learning rate of the second stage.
    """

    steps: int
    batch_size: int
    lr: float
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    schedule: Schedule = "cosine"
    cycles: int = 4
    warmup: int = 0
    clip_norm: float | None = 1.0
    ema: float | None = None
    seed: int = 0
    log_every: int = 10
    restart: int = 0
    restart_lr: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something to train, ready for `fit`, and what becomes of it.

    Attributes:
        module: As `fit` wants it.
        loss: As `fit` wants it.
        rows: As `fit` wants it.
        export: Writes the trained result into an empty folder.
        evaluate: Measures the trained result, where the task has a measure of its own.
        share: Shares the module out among the ranks, which call it together before `fit`, where it is not to be whole
            on each.
    """

    module: nn.Module
    loss: Loss
    rows: int | Callable[[int], np.ndarray]
    export: Callable[[Path], None]
    evaluate: Callable[[], dict[str, float]] | None = None
    share: Callable[[], None] | None = None


def seed_from(*parts: int | str) -> int:
    """A seed in [0, 2**63) that is a hash (SHA-256) of ``parts``."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(seed_from("epoch", seed, epoch)).permutation(n)


def batch_indices(n: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """Rows of batch ``step``: int64 of length ``batch_size``, each below ``n``.

    The epochs' permutations of ``range(n)`` are laid end to end and cut into batches, so after any number of
    epochs every row has been used equally often; a batch over an epoch's edge may hold a row twice.

    Raises:
        InputError: If there is nothing to draw from.
    """
    if n < 1:
        raise InputError("there are no rows to train on", hint="Check the data section of the profile.")
    start = step * batch_size
    pieces = []
    while start < (step + 1) * batch_size:
        epoch, offset = divmod(start, n)
        piece = _permutation(n, seed, epoch)[offset : offset + (step + 1) * batch_size - start]
        pieces.append(piece)
        start += len(piece)
    return np.concatenate(pieces)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Learning rate of 0-based ``step``: a linear rise over ``warmup`` steps, then the schedule.

    ``cosine`` falls from ``lr`` to 0 over the remaining steps; ``cosine-restarts`` does so ``cycles`` times
    (Loshchilov and Hutter 2017, equal periods; the paper trains with warm restarts); ``constant`` stays.
    A recipe of two stages does so in each.
    """
    if recipe.restart and step >= recipe.restart:
        second = replace(recipe, steps=recipe.steps - recipe.restart, lr=recipe.restart_lr, restart=0)
        return learning_rate(step - recipe.restart, second)
    if recipe.restart:
        return learning_rate(step, replace(recipe, steps=recipe.restart, restart=0))
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.lr
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    if recipe.schedule == "cosine-restarts":
        progress = math.modf(progress * recipe.cycles)[0]
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * progress))


def seed_everything(*parts: int | str) -> None:
    """Seed torch (every device), numpy's and Python's global generators from a hash of ``parts``."""
    seed = seed_from(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries called within a step draw from it
    random.seed(seed)


def trained_parameters(module: nn.Module) -> int:
    """Number of values that training changes."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


class _State:
    """What a checkpoint holds: trainable parameters and buffers, AdamW's moments, averages, step, curve."""

    def __init__(self, module: nn.Module, recipe: Recipe) -> None:
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        persistent = module.state_dict().keys()
        self.buffers = {n: b for n, b in module.named_buffers() if n in persistent}
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        others = [p for p in self.parameters.values() if p.ndim < 2]
        groups = [{"params": kind, "weight_decay": recipe.weight_decay} for kind in parallel.apart(matrices)]
        groups += [{"params": kind, "weight_decay": 0.0} for kind in parallel.apart(others)]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
        self.ema = None if recipe.ema is None else {n: p.detach().clone() for n, p in self.parameters.items()}
        self.curve: list[Row] = []
        self.step = 0

    def tensors(self) -> dict[str, Tensor]:
        held = {f"parameter/{n}": p for n, p in self.parameters.items()}
        held |= {f"buffer/{n}": b for n, b in self.buffers.items()}
        held |= {f"ema/{n}": p for n, p in (self.ema or {}).items()}
        for name, parameter in self.parameters.items():
            held |= {f"adam/{key}/{name}": value for key, value in self.optimizer.state[parameter].items()}
        held = {name: parallel.whole(value.detach()).cpu().contiguous() for name, value in held.items()}
        for key in self.curve[0] if self.curve else ():
            held[f"curve/{key}"] = torch.tensor([row[key] for row in self.curve], dtype=torch.float64)
        held["step"] = torch.tensor(self.step)
        return held

    def restore(self, held: dict[str, Tensor]) -> None:
        expected = {f"parameter/{n}": p for n, p in self.parameters.items()}
        expected |= {f"buffer/{n}": b for n, b in self.buffers.items()}
        expected |= {f"ema/{n}": p for n, p in (self.ema or {}).items()}
        for name, target in expected.items():
            if name not in held or held[name].shape != target.shape:
                raise InputError(
                    f"the checkpoint does not fit this model at {name}",
                    hint="Remove the .partial folder of this stage and start it again.",
                )
            with torch.no_grad():
                target.copy_(parallel.as_sharded(held[name], target))
        for name, parameter in self.parameters.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = held.get(f"adam/{key}/{name}")
                if value is not None:
                    blank = torch.empty_like(parameter) if key != "step" else torch.empty((), device=parameter.device)
                    value = parallel.as_sharded(value, blank)
                    self.optimizer.state[parameter][key] = blank.copy_(value).detach()
        columns = {k.removeprefix("curve/"): v.tolist() for k, v in held.items() if k.startswith("curve/")}
        if columns:
            self.curve = [
                _row(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)
            ]
        self.step = int(held["step"])


def _row(values: Row) -> Row:
    """A curve row with its keys in one order, whatever order a checkpoint gave them in."""
    first = {"step": int(values["step"]), "loss": values["loss"], "lr": values["lr"]}
    return first | {key: values[key] for key in sorted(values) if key not in first}


def fit(
    module: nn.Module,
    *,
    loss: Loss,
    rows: int | Callable[[int], np.ndarray],
    recipe: Recipe,
    checkpoints: Checkpoints | None = None,
    checkpoint_seconds: float = 30.0,
    shared: bool = False,
    log: Callable[[list[Row]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Train ``module`` in place and return the loss curve.

    Args:
        module: Owns every parameter to train (``requires_grad``) and every buffer that training changes. The
            caller sets train or eval modes; frozen parameters are the caller's to restore. With
            ``recipe.ema`` it holds the averaged parameters in the end.
        loss: ``loss(indices, step)`` with int64 ``indices`` (a CPU tensor) gives a scalar, or a scalar and a
            mapping of further scalars to log (the same ones every step). It may draw from the global
            generators: they are seeded from (seed, step).
        rows: Number of training rows, drawn by `batch_indices`; or a function from step to the row indices.
        recipe: How to train.
        checkpoints: Where to resume from and save to.
        checkpoint_seconds: Least time between two checkpoints. The loop waits longer where saving takes more
            than `CHECKPOINT_SHARE` of the time. Does not change the result.
        shared: The loss is computed by all ranks of `gmail_cli.components.parallel` together: all start from rank 0's
            checkpoint, average their gradients, and rank 0 alone saves. Of a language model that
            `gmail_cli.components.parallel.shard` has shared out, the module holds what it trained as a whole in the
            end, and cannot be run any more.
        log: Receives the curve so far at each new row, and in the end. A row has step (steps done), loss
            (mean since the row before), lr, grad_norm (before clipping) and the further scalars.
        progress: Called with (steps done, steps in all).

    Raises:
        InputError: If loss or gradient stop being finite, naming the step (the last good checkpoint stays),
            or if the checkpoint does not fit the module.
        UsageError: If the module has nothing to train.
    """
    if not trained_parameters(module):
        raise UsageError("nothing to train: every parameter is frozen", hint="Choose what to tune.")
    state = _State(module, recipe)
    parameters = list(state.parameters.values())
    sharded = parallel.is_sharded(parameters)
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    held = checkpoints.load() if checkpoints else None
    if shared:
        held = parallel.from_first(held)
        checkpoints = checkpoints if parallel.ranks().rank == 0 else None
    if held is not None:
        state.restore(held)
        held = None
    if progress:
        progress(state.step, recipe.steps)
    window: list[dict[str, Tensor]] = []
    saved_at, save_cost = time.monotonic(), 0.0
    with torch.random.fork_rng(devices=devices), _deterministic(on=not devices):
        while state.step < recipe.steps:
            step = state.step
            if callable(rows):
                indices = rows(step)
            else:
                indices = batch_indices(rows, recipe.batch_size, seed=recipe.seed, step=step)
            seed_everything("step", recipe.seed, step)
            lr = learning_rate(step, recipe)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            state.optimizer.zero_grad(set_to_none=True)
            outcome = loss(torch.from_numpy(indices), step)
            value, extra = outcome if isinstance(outcome, tuple) else (outcome, {})
            value.backward()
            if shared:
                parallel.average_gradients(parameters)
            norm = parallel.clip_gradients(parameters, recipe.clip_norm or math.inf)
            state.optimizer.step()
            if state.ema is not None and recipe.ema is not None:
                decay = min(recipe.ema, (1 + step) / (10 + step))
                averages = parallel.apart(state.ema.values())
                with torch.no_grad():
                    for average, now in zip(averages, parallel.apart(parameters), strict=True):
                        torch._foreach_lerp_(average, now, 1 - decay)
            window.append({"loss": value.detach(), "grad_norm": norm.detach(), **extra})
            state.step += 1
            if state.step % recipe.log_every and state.step < recipe.steps:
                continue
            state.curve.append(_close(window, step=state.step, lr=lr))
            window.clear()
            if log:
                log(state.curve)
            if progress:
                progress(state.step, recipe.steps)
            wait = max(checkpoint_seconds, save_cost / CHECKPOINT_SHARE)
            due = bool(checkpoints) and state.step < recipe.steps and time.monotonic() - saved_at >= wait
            if parallel.agreed(due) if sharded else due:
                started = time.monotonic()
                held = state.tensors()  # all ranks give what they hold, rank 0 writes it
                if checkpoints:
                    checkpoints.save(held)
                held = None
                saved_at = time.monotonic()
                save_cost = saved_at - started
    if state.ema is not None:
        with torch.no_grad():
            for name, parameter in state.parameters.items():
                parameter.copy_(state.ema[name])
    if sharded:
        parallel.unshard_trained(module)
    if log:
        log(state.curve)
    return state.curve


@contextlib.contextmanager
def _deterministic(*, on: bool) -> Iterator[None]:
    """On a CPU, torch adds gradients of repeated indices in parallel unless it is told to keep an order."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(on or before)
    torch.utils.deterministic.fill_uninitialized_memory = fill and before
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _close(window: list[dict[str, Tensor]], *, step: int, lr: float) -> Row:
    """The curve row of the steps in ``window``, the last of which was the ``step``-th (1-based)."""
    columns = {key: torch.stack([row[key].detach().float() for row in window]).tolist() for key in window[0]}
    for key in ("loss", "grad_norm"):
        for offset, value in enumerate(columns[key]):
            if not math.isfinite(value):
                raise InputError(
                    f"{key} became {value} at step {step - len(window) + 1 + offset}",
                    hint="Lower the learning rate or lengthen the warm-up, then run the stage again.",
                )
    means = {key: math.fsum(values) / len(values) for key, values in columns.items()}
    return _row({"step": step, "lr": lr, **means})
