"""Where generated images know something that f_r does not: classes it never saw.

    python benchmarks/cifake_novel.py ../shared/data/cifake

f_r is trained on photographs of eight CIFAR-10 classes, f_g is aligned on Stable Diffusion images of the same eight.
Text towers and probes are then trained on generated images of all ten classes (or real ones, or none) and tested on
held-out photographs of all ten; accuracy of the two new classes is given apart. About half an hour of one CPU core.
Works in the current folder: ./known gets the photographs and images of the eight classes, ./runs the artifacts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from gmail_cli.artifacts import Artifact
from gmail_cli.components import heads
from gmail_cli.components.tables import Table

NEW = ("horse", "truck")


def keep_known(source: Path, target: Path) -> None:
    """Copy the Parquet files of ``source`` without the new classes."""
    target.mkdir(exist_ok=True)
    for file in sorted(source.glob("*.parquet")):
        if not (target / file.name).exists():
            table = pq.read_table(file)
            known = pc.invert(pc.is_in(table["class"], value_set=pa.array(NEW)))
            pq.write_table(table.filter(known), target / file.name)


def gmail(*arguments: str) -> str:
    """The artifact that a command made."""
    print("gmail", *arguments, flush=True)
    return subprocess.run(["gmail", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def accuracies(embeddings: Artifact, train: Artifact) -> dict[str, tuple[float, float, float]]:
    """Cell -> accuracy over all classes, over the new ones, and over the known ones."""
    tables = {name: Table.load(embeddings.folder(name)) for name in ("test-images", "test-classes")}
    images = np.asarray(tables["test-images"].vectors, dtype=np.float32)
    labels = np.array([row["label"] for row in tables["test-images"].rows])
    new = np.isin(labels, NEW)
    found = {}
    for cell in train.read_json("cells.json"):
        if cell["task"] == "linear-probe":
            probe = heads.load_probe(train.folder(cell["folder"]))
            scores = heads.classify(probe, torch.from_numpy(images)).numpy()
            names = np.array(probe.class_names)
        else:
            table = Table.load(embeddings.folder(f"test-classes@{cell['folder']}"))
            scores = images @ np.asarray(table.vectors, dtype=np.float32).T
            names = np.array([row["label"] for row in table.rows])
        right = names[scores.argmax(axis=1)] == labels
        found[cell["name"]] = float(right.mean()), float(right[new].mean()), float(right[~new].mean())
    return found


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of CIFAKE's real-*.parquet and generated-*.parquet")
    parser.add_argument("--steps", type=int, default=1000, help="steps of f_r")
    parser.add_argument("--objectives", nargs="*", default=["paper", "recommended"])
    given = parser.parse_args()
    known = Path("known")
    keep_known(given.data, known)

    def source(folder: Path, kind: str) -> str:
        return f"{folder}/{kind}-*.parquet"

    train = f"data.train={source(known, 'real')}"
    steps = f"train.steps={given.steps}"
    gmail(
        "run",
        "cifake-clip",
        "--run",
        "novel-clip",
        "--set",
        train,
        "--set",
        train.replace("train", "test"),
        "--set",
        steps,
    )
    clip = ("--profile", "cifake", "--set", "model.clip=runs/novel-clip/train/latest/clip.real.seed0/clip")
    images = f"generate.import_path={source(known, 'generated')}"
    eight = gmail("generate", *clip, "--run", "novel-known", "--set", images)
    every = gmail(
        *("generate", *clip, "--run", "novel", "--set", f"generate.import_path={source(given.data, 'generated')}")
    )
    real = f"data.train={source(given.data, 'real')}"
    for objective in given.objectives:
        aligned = gmail(
            *("align", *clip, "--run", "novel", "--generated", eight, "--set", train),
            *("--set", f"align.objective={objective}"),
        )
        data = (*clip, "--run", "novel", "--set", real, "--set", real.replace("train", "test"))
        made = gmail("train", *data, "--generated", every, "--aligned", aligned)
        embedded = gmail("embed", *data, "--train", made, "--set", "embed.gap_count=0")
        gmail("eval", *data, "--embeddings", embedded)
        found = accuracies(Artifact.load(Path(embedded)), Artifact.load(Path(made)))
        groups: dict[str, list[tuple[float, float, float]]] = {}
        for name, values in found.items():
            cell = name.partition(".seed")[0] + "+dual" * name.endswith("+dual")
            groups.setdefault(cell, []).append(values)
        for cell, seeds in groups.items():
            mean, sd = np.mean(seeds, axis=0), np.std(seeds, axis=0, ddof=min(1, len(seeds) - 1))
            shown = [f"{100 * m:.1f} +- {100 * s:.1f}" for m, s in zip(mean, sd, strict=True)]
            row = dict(zip(("all", "new", "known"), shown, strict=True))
            print(json.dumps({"objective": objective, "cell": cell, **row}))


if __name__ == "__main__":
    main()
