"""Zero-shot classification of this package beside CLIP_benchmark: equality, time, memory, on the same embeddings.

    python benchmarks/classification.py [--images 50000] [--classes 1000] [--templates 8] [--dim 512]
    python benchmarks/classification.py --embeddings runs/<run>/embed/latest

Random unit vectors with a common part per class, or the labelled test images and prompts of an embed artifact. The peer
is CLIP_benchmark's own `evaluate`, whose model here looks embeddings up; it needs `clip-benchmark` and `scikit-learn`
importable. Each side runs in a process of its own, so that its peak memory above the inputs can be read.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

BATCH = 64


class World(NamedTuple):
    """Unit rows of images and prompts, and the class of each."""

    images: np.ndarray
    labels: np.ndarray
    prompts: np.ndarray
    of_class: np.ndarray


def random_world(images: int, classes: int, templates: int, dim: int) -> World:
    rng = np.random.default_rng(0)
    means = rng.standard_normal((classes, dim), dtype=np.float32)
    labels, of_class = rng.integers(classes, size=images), np.repeat(np.arange(classes), templates)
    tables = []
    for rows, share in ((labels, 0.12), (of_class, 1.0)):
        table = rng.standard_normal((len(rows), dim), dtype=np.float32)
        table += share * means[rows]
        tables.append(table / np.linalg.norm(table, axis=1, keepdims=True))
    return World(tables[0], labels, tables[1], of_class)


def embedded(artifact: Path) -> World:
    """The labelled test images and the prompts that an embed artifact holds."""
    from gmail_cli.artifacts import Artifact
    from gmail_cli.components.tables import Table

    images, prompts = (Table.load(Artifact.load(artifact).folder(name)) for name in ("test-images", "test-classes"))
    names = list(dict.fromkeys(row["label"] for row in prompts.rows))
    labels, of_class = (np.array([names.index(row["label"]) for row in table.rows]) for table in (images, prompts))
    return World(np.array(images.vectors, np.float32), labels, np.array(prompts.vectors, np.float32), of_class)


def ours(world: World) -> dict[str, float]:
    from gmail_cli.components.metrics import classification

    classes = int(world.of_class.max()) + 1
    vectors = classification.class_embeddings(world.prompts, class_rows=world.of_class, classes=classes)
    found = classification.zero_shot(world.images, class_vectors=vectors, labels=world.labels).metrics()
    return {name: found[key] for name, key in NAMES.items()}


NAMES = {"acc1": "top_1_accuracy", "acc5": "top_5_accuracy", "mean_per_class_recall": "mean_per_class_accuracy"}


class Batches:
    """The images, batch by batch, as a torch DataLoader gives them."""

    def __init__(self, world: World, classes: int) -> None:
        self.world, self.dataset = world, SimpleNamespace(classes=[str(each) for each in range(classes)])

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        import torch

        for start in range(0, len(self.world.images), BATCH):
            rows = slice(start, start + BATCH)
            yield torch.from_numpy(self.world.images[rows]), torch.from_numpy(self.world.labels[rows])


def peer(world: World) -> dict[str, float]:
    import torch
    from clip_benchmark.metrics import zeroshot_classification

    zeroshot_classification.tqdm = lambda rows: rows
    # its accuracy calls float() on an array of one number, which numpy refuses from 2.4 on
    zeroshot_classification.float = lambda value: float(np.asarray(value).reshape(-1)[0])
    prompts = torch.from_numpy(world.prompts)
    classes = int(world.of_class.max()) + 1
    rows = {str(each): np.flatnonzero(world.of_class == each) for each in range(classes)}
    model = SimpleNamespace(encode_image=lambda images: images, encode_text=lambda texts: prompts[texts])
    return dict(
        zeroshot_classification.evaluate(
            model,
            Batches(world, classes),
            lambda texts: torch.from_numpy(rows[texts[0]]),
            list(rows),
            ["{c}"],
            "cpu",
            amp=False,
        )
    )


def memory(field: str) -> float:
    """A field of /proc/self/status in MB: VmRSS now, VmHWM the peak since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(options: argparse.Namespace) -> None:
    if options.side == "ours":
        import gmail_cli.components.metrics.classification  # noqa: F401
    else:
        from clip_benchmark.metrics import zeroshot_classification  # noqa: F401
    world = (
        embedded(options.embeddings)
        if options.embeddings
        else random_world(options.images, options.classes, options.templates, options.dim)
    )
    Path("/proc/self/clear_refs").write_text("5")
    before, seconds, used = memory("VmRSS"), [], []
    for _ in range(options.repeat):
        start, cpu = time.perf_counter(), time.process_time()
        found = ours(world) if options.side == "ours" else peer(world)
        seconds.append(time.perf_counter() - start)
        used.append(time.process_time() - cpu)
    print(min(seconds), min(used), memory("VmHWM") - before, *(f"{name}={value!r}" for name, value in found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("images", 50_000), ("classes", 1000), ("templates", 8), ("dim", 512), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--embeddings", type=Path, metavar="ARTIFACT", help="an embed artifact instead of random vectors"
    )
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        measure(options)
        return
    what = options.embeddings or f"{options.images} x {options.classes}, {options.dim} dimensions"
    print(f"{what}, {os.cpu_count()} cores")
    found, used = {}, {}
    for side in ("ours", "peer"):
        command = [sys.executable, __file__, "--side", side, *sys.argv[1:]]
        words = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        used[side] = float(words[1])
        found[side] = {word.split("=")[0]: float(word.split("=")[1]) for word in words[3:]}
        about = f"{float(words[0]):.2f} s, {used[side]:.2f} s of CPU time"
        print(f"{side}: {about}, {float(words[2]):.0f} MB above the inputs")
    for name, value in found["ours"].items():
        print(f"  {NAMES[name]:24} {value:.6f}  differs by {abs(value - found['peer'][name]):.1e}")
    print(f"ours takes {used['ours'] / used['peer']:.2f} times the CPU time")


if __name__ == "__main__":
    main()
