"""One process works alone for longer than a collective may take, and the others wait for it."""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from small_training import World
from torch import distributed

from gmail_cli import plan
from gmail_cli.artifacts import Workspace
from gmail_cli.components import parallel

SELF = Path(__file__)
TIMEOUT, ALONE = 3.0, 4.0
"""Seconds: that a collective may take, and that the first process works alone at least."""


def slow(cell: str, rows: Any) -> None:
    """A tracker that holds up the first process in the middle of a cell that it trains alone."""
    if cell.startswith("linear-probe") and len(rows) == 1:
        time.sleep(ALONE)


def work(home: World, folder: Path, *, number: int, port: int) -> None:
    """What one of two processes does: tasks of the first one, a shared one, and then a wait that has an end."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(number), "LOCAL_RANK": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    parallel.TIMEOUT = dt.timedelta(seconds=TIMEOUT)
    profile = home.profile(tasks=["sitta", "linear-probe", "clip-text"], arms=["real"], steps=12)
    start = time.monotonic()
    plan.execute(
        profile,
        Workspace(folder, "together"),
        stages=["train"],
        given=home.inputs(),
        progress=lambda _: lambda *_: None,
        track=slow if number == 0 else None,
    )
    told: dict[str, Any] = {"took": time.monotonic() - start, "sum": float(parallel.add(torch.tensor(1.0)))}
    if number == 0:
        time.sleep(ALONE)
    try:
        distributed.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        told["error"] = str(error)
    (folder / f"{number}.json").write_text(json.dumps(told))


def test_the_others_wait_for_one_that_works_alone_however_long(tmp_path: Path) -> None:
    home = World(tmp_path / "home")
    home.folder.mkdir()
    home.make()
    environment = os.environ | {"PYTHONPATH": f"{SELF.parents[1]}:{SELF.parent}", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(SELF), str(home.folder), str(tmp_path)], env=environment, check=True, timeout=120
    )
    told = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    assert all(each["took"] > ALONE > TIMEOUT and each["sum"] == 2.0 for each in told)
    assert "Timed out" in told[1]["error"]  # or the wait of a step has no end, and this test shows nothing
    found = Workspace(tmp_path, "together").latest("train")
    assert found is not None
    assert [row["task"] for row in found.read_json("cells.json")] == ["sitta", "linear-probe", "clip-text"]


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            work(World(Path(sys.argv[1])), Path(sys.argv[2]), number=number, port=port)
            os._exit(0)
    ends = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(any(ends))
