"""Whether TensorBoard, Weights & Biases, MLflow and Trackio hold what `metrics.jsonl` holds.

    pip install tensorboard wandb mlflow trackio
    python benchmarks/trackers.py

Trains two cells of profile `tiny` with each of them, offline, in an empty folder, and reads back what each kept: every
value of every step, the run's state and its settings. Nothing leaves the machine. The tests do without it because the
packages are large and pin older versions of others; use an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from gmail_cli.trackers import PACKAGES, PROJECT

Curves = dict[tuple[str, int], float]
"""(name of a value, step) -> value."""


def recorded(folder: Path, run: str) -> Curves:
    """What the artifact says."""
    found: Curves = {}
    for file in folder.glob(f"runs/{run}/train/latest/*/metrics.jsonl"):
        for row in map(json.loads, file.read_text().splitlines()):
            found |= {(f"{file.parent.name}/{key}", row["step"]): value for key, value in row.items() if key != "step"}
    return found


def tensorboard(folder: Path, run: str) -> tuple[Curves, str, int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "runs" / run / ".trackers" / "tensorboard"))
    events.Reload()
    curves = {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    profile = events.Tensors("profile/text_summary")[0].tensor_proto.string_val[0].decode()
    return curves, "", len(profile.splitlines())


def wandb(folder: Path, run: str) -> tuple[Curves, str, int]:
    curves: Curves = {}
    state, settings = "", 0
    (file,) = folder.glob(f"runs/{run}/.trackers/wandb/wandb/offline-run-*/*.wandb")
    for record in _wandb_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            step = row.pop("step")
            curves |= {(name, step): value for name, value in row.items() if not name.startswith("_")}
        elif kind == "run":
            settings += sum(not update.key.startswith("_") for update in record.run.config.update)
        elif kind == "exit":
            state = f"exit code {record.exit.exit_code}"
    return curves, state, settings


def _wandb_records(path: Path) -> Iterator[Any]:
    """Records of a `.wandb` file: LevelDB's log format behind a header of 7 bytes, holding wandb's own messages."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        piece = data[at + 7 : at + 7 + size]
        at += 7 + size
        whole = piece if kind in (1, 2) else whole + piece  # 1 is a whole record, 2 to 4 its first, middle, last piece
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def mlflow(folder: Path, run: str) -> tuple[Curves, str, int]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(PROJECT)
    (found,) = client.search_runs([experiment.experiment_id], filter_string=f"attributes.run_name = '{run}'")
    histories = {name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
    curves = {(name, each.step): each.value for name, history in histories.items() for each in history}
    return curves, found.info.status, len(found.data.params)


def trackio(folder: Path, run: str) -> tuple[Curves, str, int]:
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    (found,) = (each for each in Api().runs(PROJECT) if each.name == run)
    curves = {
        (name, row["step"]): value
        for row in SQLiteStorage.get_logs(PROJECT, run)
        for name, value in row.items()
        if name not in ("step", "timestamp")
    }
    return curves, "", sum(not name.startswith("_") for name in found.config)


READERS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        offline = {
            "WANDB_MODE": "offline",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
            "TRACKIO_DIR": str(folder / "trackio"),
        }
        for name in PACKAGES:
            command = ["train", "--profile", "tiny", "--run", name, "--task", "clip-text", "--task", "clipcap"]
            command += ["--arm", "real", "--set", "data.train_limit=32", "--set", "train.steps=30"]
            command += ["--set", f'runtime.trackers=["{name}"]']
            made = subprocess.run(
                [sys.executable, "-m", "gmail_cli.cli", *command],
                cwd=folder,
                env=os.environ | offline,
                capture_output=True,
                text=True,
                check=True,
            )
            assert Path(made.stdout.strip()).parts[:3] == ("runs", name, "train"), made.stdout  # and nothing else
            expected = recorded(folder, name)
            curves, state, settings = READERS[name](folder, name)
            assert curves.keys() == expected.keys(), sorted(curves.keys() ^ expected.keys())
            assert all(math.isclose(curves[key], value, rel_tol=1e-6) for key, value in expected.items())
            told = f"{name} {metadata.version(PACKAGES[name])}: {len(expected)} values as recorded, {settings} settings"
            print(told + (f", {state}" if state else ""))


if __name__ == "__main__":
    main()
