"""Several gloo processes take the steps of one; this file is also what each of them runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gmail_cli.components import objectives, parallel
from gmail_cli.components.loop import Recipe, fit
from gmail_cli.components.objectives import Batch, Objective, Scales
from gmail_cli.components.parallel import Ranks
from gmail_cli.errors import SetupError

ROWS, BATCH = 40, 10


def train() -> tuple[list[dict[str, float]], list[float]]:
    """A few steps of Eq. 1, its symmetric form and a learned temperature; the curve and the final parameters."""
    torch.manual_seed(3)
    seen, real = torch.randn(ROWS, 6), nn.functional.normalize(torch.randn(ROWS, 4), dim=1)
    tower = nn.Linear(6, 4)
    objective = Objective.parse("symmetric+0.5*coral+siglip", temperature=0.2, learn_temperature=True)
    scales = Scales(objective)

    def loss(rows: torch.Tensor, _step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        share = parallel.ranks().share(len(rows))
        own = nn.functional.normalize(tower(seen[rows[share]]), dim=1)
        mask = objectives.false_negatives(rows.numpy() // 2, captions=rows.numpy(), mode="mask")
        batch = Batch(generated=parallel.gather(own, rows=len(rows)), real=real[rows], false_negatives=mask)
        return objective(batch, scales)

    recipe = Recipe(steps=12, batch_size=BATCH, lr=0.05, log_every=1)
    curve = fit(nn.ModuleList([tower, scales]), loss=loss, rows=ROWS, recipe=recipe, shared=True)
    values = [value for module in (tower, scales) for p in module.parameters() for value in p.flatten().tolist()]
    return curve, values


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_take_the_steps_of_one(count: int, tmp_path: Path) -> None:
    """Shares of ten rows are uneven for four processes."""
    curve, values = train()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen([sys.executable, __file__, str(tmp_path)], env={**environment, "RANK": str(rank)})
        for rank in range(count)
    ]
    assert [process.wait(120) for process in processes] == [0] * count
    for rank in range(count):
        theirs = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [row["loss"] for row in theirs["curve"]] == pytest.approx([row["loss"] for row in curve], abs=1e-5)
        assert [row["grad_norm"] for row in theirs["curve"]] == pytest.approx(
            [row["grad_norm"] for row in curve], rel=1e-4
        )
        assert theirs["values"] == pytest.approx(values, abs=1e-5)
        assert theirs["computed"] == Ranks(rank, count).sizes(BATCH)[rank] < BATCH


@given(st.integers(1, 9), st.integers(0, 50))
def test_shares_cover_a_batch_once(count: int, more: int) -> None:
    rows = list(range(count + more))
    shares = [rows[Ranks(rank, count).share(len(rows))] for rank in range(count)]
    assert [row for share in shares for row in share] == rows
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_rows_are_refused() -> None:
    with pytest.raises(SetupError, match="3 processes share batches of 2 rows"):
        Ranks(0, 3).share(2)


if __name__ == "__main__":
    found, parameters = train()
    world = parallel.ranks()
    share = world.share(BATCH)
    told = {"curve": found, "values": parameters, "computed": share.stop - share.start}
    (Path(sys.argv[1]) / f"{world.rank}.json").write_text(json.dumps(told))
    parallel.barrier()
