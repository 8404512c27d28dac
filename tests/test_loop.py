"""The training loop: data order, schedules, resume after SIGKILL, stopping on a loss that is not finite."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gmail_cli.components.loop import Recipe, batch_indices, fit, learning_rate
from gmail_cli.errors import InputError, UsageError

SELF = Path(__file__)


class FileCheckpoints:
    """The stage's side of the protocol: one file, replaced atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> dict[str, Tensor] | None:
        return load_file(self.path) if self.path.exists() else None

    def save(self, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(288, 4),
    ]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def train(folder: Path, *, pause: float = 0.0, steps: int = 120) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train a small network with dropout, batch statistics, averaging and restarts; log into ``folder``."""
    module = small_network()
    images = torch.randn(50, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = images.mean((1, 2, 3)).argsort().argsort() // 13

    def loss(rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        time.sleep(pause)
        noisy = images[rows] + 0.1 * torch.randn(len(rows), 3, 8, 8)
        logits = module(noisy.to(memory_format=torch.channels_last))
        accuracy = (logits.argmax(1) == labels[rows]).float().mean()
        return nn.functional.cross_entropy(logits, labels[rows]), {"accuracy": accuracy}

    curve = fit(
        module,
        loss=loss,
        rows=len(images),
        recipe=Recipe(steps=steps, batch_size=8, lr=1e-2, schedule="cosine-restarts", warmup=10, ema=0.95, log_every=5),
        checkpoints=FileCheckpoints(folder / "checkpoint.safetensors"),
        checkpoint_seconds=0.0,
        log=lambda rows: (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows)) and None,
    )
    return module, curve


def same_tensors(a: nn.Module, b: dict[str, Tensor]) -> bool:
    mine = a.state_dict()
    return mine.keys() == b.keys() and all(torch.equal(mine[k], b[k]) for k in mine)


def test_a_killed_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    module, _ = train(whole)
    environment = os.environ | {"PYTHONPATH": str(SELF.parents[1]), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(SELF), str(cut)]
    done = subprocess.run(script, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["killed"] * 3 + ["finished"]
    assert same_tensors(module, load_file(cut / "final.safetensors"))
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_when_checkpoints_are_taken_changes_nothing(tmp_path: Path) -> None:
    module = small_network()
    recipe = Recipe(steps=20, batch_size=8, lr=1e-2)
    data = torch.randn(30, 3, 8, 8)

    def run(**options: object) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        module.load_state_dict(start)
        curve = fit(module, loss=lambda i, _: module(data[i]).square().mean(), rows=30, recipe=recipe, **options)
        return {k: v.clone() for k, v in module.state_dict().items()}, curve

    start = {k: v.clone() for k, v in module.state_dict().items()}
    plain, plain_curve = run()
    saved, curve = run(checkpoints=FileCheckpoints(tmp_path / "c.safetensors"), checkpoint_seconds=0.0)
    assert (tmp_path / "c.safetensors").exists()
    assert curve == plain_curve
    assert all(torch.equal(plain[k], saved[k]) for k in plain)


def test_loss_falls(tmp_path: Path) -> None:
    _, curve = train(tmp_path)
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"]
    assert [row["step"] for row in curve] == list(range(5, 121, 5))
    assert set(curve[0]) == {"step", "loss", "lr", "grad_norm", "accuracy"}


def test_the_average_of_the_parameters_is_what_remains() -> None:
    module = nn.Linear(1, 1, bias=False)
    seen: list[float] = []

    def loss(rows: Tensor, step: int) -> Tensor:
        seen.append(module.weight.item())
        return module.weight.sum()

    fit(module, loss=loss, rows=1, recipe=Recipe(steps=30, batch_size=1, lr=0.1, schedule="constant", ema=0.6))
    average = seen[0]
    last = seen[-1] + seen[1] - seen[0]  # a constant gradient: AdamW's steps are equal (but for its decay)
    for step, weight in enumerate([*seen[1:], last]):
        average += (1 - min(0.6, (1 + step) / (10 + step))) * (weight - average)
    assert module.weight.item() == pytest.approx(average, abs=2e-3)
    assert abs(average - last) > 0.05


def test_only_matrices_decay() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    recipe = Recipe(steps=1, batch_size=1, lr=0.1, weight_decay=0.5, schedule="constant")
    fit(module, loss=lambda i, s: 0 * module(torch.zeros(1, 4)).sum(), rows=1, recipe=recipe)
    after = dict(module.named_parameters())
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * 0.95)
    assert all(torch.equal(after[n], before[n]) for n in before if n != "0.weight")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    module = nn.Linear(2, 1)
    checkpoints = FileCheckpoints(tmp_path / "c.safetensors")

    def loss(rows: Tensor, step: int) -> Tensor:
        return module(torch.ones(1, 2)).sum() * (float("nan") if step == 16 else 1.0)

    with pytest.raises(InputError, match="nan at step 17"):
        fit(
            module,
            loss=loss,
            rows=4,
            recipe=Recipe(steps=40, batch_size=2, lr=0.1, log_every=5),
            checkpoints=checkpoints,
            checkpoint_seconds=0.0,
        )
    held = checkpoints.load()
    assert held is not None
    assert held["step"] in (5, 10, 15)
    assert all(torch.isfinite(value).all() for value in held.values())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoints = FileCheckpoints(tmp_path / "c.safetensors")

    def train_of_width(width: int) -> None:
        module = nn.Linear(width, 1)
        fit(
            module,
            loss=lambda rows, step: module(torch.ones(1, width)).sum(),
            rows=1,
            recipe=Recipe(steps=2, batch_size=1, lr=0.1, log_every=1),
            checkpoints=checkpoints,
            checkpoint_seconds=0.0,
        )

    train_of_width(3)
    with pytest.raises(InputError, match="does not fit this model at parameter/weight"):
        train_of_width(4)


def test_a_frozen_module_is_refused() -> None:
    module = nn.Linear(2, 1).requires_grad_(requires_grad=False)
    with pytest.raises(UsageError, match="frozen"):
        fit(module, loss=lambda i, s: torch.zeros(()), rows=1, recipe=Recipe(steps=1, batch_size=1, lr=0.1))


def test_the_caller_s_generator_is_left_alone() -> None:
    module = nn.Linear(2, 1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(
        module,
        loss=lambda i, s: module(torch.randn(1, 2)).sum(),
        rows=1,
        recipe=Recipe(steps=2, batch_size=1, lr=0.1),
    )
    assert torch.equal(torch.rand(3), expected)


@given(n=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 9))
def test_every_row_is_used_equally_often(n: int, batch_size: int, seed: int) -> None:
    steps = n  # n * batch_size draws are a whole number of epochs
    drawn = np.concatenate([batch_indices(n, batch_size, seed=seed, step=s) for s in range(steps)])
    assert np.array_equal(np.bincount(drawn, minlength=n), np.full(n, batch_size))


def test_order_depends_on_the_seed() -> None:
    assert not np.array_equal(batch_indices(100, 50, seed=0, step=0), batch_indices(100, 50, seed=1, step=0))
    with pytest.raises(InputError):
        batch_indices(0, 4, seed=0, step=0)


def test_schedules() -> None:
    cosine = Recipe(steps=110, batch_size=1, lr=2.0, warmup=10)
    assert learning_rate(0, cosine) == pytest.approx(0.2)
    assert learning_rate(9, cosine) == learning_rate(10, cosine) == 2.0
    assert learning_rate(60, cosine) == pytest.approx(1.0)
    assert learning_rate(109, cosine) < 0.001
    restarts = Recipe(steps=110, batch_size=1, lr=2.0, warmup=10, schedule="cosine-restarts", cycles=4)
    assert [learning_rate(s, restarts) for s in (10, 35, 60, 85)] == [2.0] * 4
    assert learning_rate(34, restarts) < 0.02
    assert learning_rate(99, Recipe(steps=100, batch_size=1, lr=2.0, schedule="constant")) == 2.0


def train_in_a_child(folder: Path) -> int:
    """Train in a forked process and return its id."""
    child = os.fork()
    if child == 0:
        trained, _ = train(folder, pause=0.005)
        save_file({k: v.contiguous() for k, v in trained.state_dict().items()}, folder / "final.safetensors")
        os._exit(0)
    return child


if __name__ == "__main__":  # started three times and killed at random, then left to finish
    target, chance = Path(sys.argv[1]), random.Random()
    for attempt in range(4):
        identity = train_in_a_child(target)
        if attempt < 3:
            while not (target / "checkpoint.safetensors").exists():
                time.sleep(0.005)
            time.sleep(chance.uniform(0.0, 0.15))
            os.kill(identity, signal.SIGKILL)
        _, status = os.waitpid(identity, 0)
        print("killed" if os.WIFSIGNALED(status) else "finished", flush=True)
