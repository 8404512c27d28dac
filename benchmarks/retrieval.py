"""Retrieval ranks of this package beside CLIP_benchmark's way: equality, time, memory.

    python benchmarks/retrieval.py [--images 5000] [--captions 5] [--dim 512] [--repeat 3]
    python benchmarks/retrieval.py --embeddings runs/<run>/embed/latest
    python benchmarks/retrieval.py --images 200000 --slice 60

With --slice only the first seconds of our side are run, on the whole input: what all would take follows from the share
of tiles done, and memory is already that of all.

Random unit vectors with a common part per image, or the test images and short test captions of an embed artifact.
Each side runs in a process of its own, so that its peak
memory above the inputs can be read. CLIP_benchmark's own functions are called where it is installed;
otherwise its method (the whole score matrix, top k, a one-hot tensor per k) is written out below.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

KS = (1, 5, 10)


def world(images: int, captions: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(images), captions)
    vectors = rng.standard_normal((images, dim), dtype=np.float32)
    texts = rng.standard_normal((len(owners), dim), dtype=np.float32)
    for start in range(0, len(texts), 1000):
        texts[start : start + 1000] += 0.12 * vectors[owners[start : start + 1000]]
    for table in (vectors, texts):
        table /= np.linalg.norm(table, axis=1, keepdims=True)
    return vectors, texts, owners


def embedded(artifact: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, short captions and the row of each caption's image, as an embed artifact holds them."""
    from gmail_cli.artifacts import Artifact
    from gmail_cli.components.tables import Table

    images, texts = (Table.load(Artifact.load(artifact).folder(name)) for name in ("test-images", "test-texts"))
    rows = {name: row for row, name in enumerate(images.ids)}
    short = [number for number, row in enumerate(texts.rows) if row["kind"] == "short"]
    owners = np.array([rows[texts.rows[number]["owner"]] for number in short])
    return np.array(images.vectors, np.float32), np.array(texts.vectors[short], np.float32), owners


def ours(images: np.ndarray, texts: np.ndarray, owners: np.ndarray) -> dict[str, float]:
    from gmail_cli.components.metrics.retrieval import retrieval_metrics, retrieval_ranks

    found = retrieval_metrics(retrieval_ranks(images, texts=texts, owners=owners), ks=KS)
    return {name: value for name, value in found.items() if "recall_at" in name}


def peer(images: np.ndarray, texts: np.ndarray, owners: np.ndarray) -> dict[str, float]:
    import torch

    try:
        from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
    except ImportError:
        batchify = recall_at_k = None
    print("peer:", "written out here" if recall_at_k is None else "clip_benchmark", file=sys.stderr)
    scores = torch.from_numpy(texts) @ torch.from_numpy(images).T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(texts)), torch.from_numpy(owners)] = True
    found = {}
    for k in KS:
        for name, table, truth in (
            ("text_to_image", scores, positive),
            ("image_to_text", scores.T, positive.T),
        ):
            if recall_at_k is not None:
                share = batchify(recall_at_k, table, truth, 64, "cpu", k=k)
            else:
                parts = []
                for rows, own in zip(table.split(64), truth.split(64), strict=True):
                    top = rows.topk(k, dim=1).indices
                    chosen = torch.nn.functional.one_hot(top, num_classes=rows.shape[1])
                    parts.append((chosen * own[:, None]).sum(dim=(1, 2)))
                share = torch.cat(parts)
            found[f"{name}_recall_at_{k}"] = float((share > 0).float().mean())
    return found


class _EnoughError(Exception):
    """Raised inside the ranking when the slice is done."""


def part(options: argparse.Namespace) -> None:
    """Rank for some seconds and print what all would take."""
    from gmail_cli.components.metrics.retrieval import retrieval_ranks

    images, texts, owners = world(options.images, options.captions, options.dim)
    print(f"{len(images)} x {len(texts)}, {options.dim} dimensions, {os.cpu_count()} cores")
    Path("/proc/self/clear_refs").write_text("5")
    before, begun, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    marks: list[tuple[int, int, float, float]] = []  # the first and the last

    def progress(done: int, total: int) -> None:
        marks[1:] = [(done, total, time.perf_counter(), time.process_time())]
        if marks[-1][2] - marks[0][2] > options.slice:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        retrieval_ranks(images, texts=texts, owners=owners, progress=progress)
    (first, total, clock, used), (last, _, clock_now, used_now) = marks[0], marks[-1]
    print(f"before the tiles: {clock - begun:.0f} s, {used - cpu:.0f} s of CPU time")
    scale = (total - 1) / (last - first)
    print(f"tiles {last} of {total} in {clock_now - clock:.0f} s, {used_now - used:.0f} s of CPU time")
    print(f"all: {scale * (clock_now - clock) / 60:.1f} minutes, {scale * (used_now - used) / 60:.1f} of CPU time")
    print(f"peak {memory('VmHWM') / 1024:.2f} GiB, {memory('VmHWM') - before:.0f} MB above the inputs")


def memory(field: str) -> float:
    """A field of /proc/self/status in MB: VmRSS now, VmHWM the peak since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(options: argparse.Namespace) -> None:
    if options.side == "ours":
        import gmail_cli.components.metrics.retrieval  # noqa: F401
    else:
        import torch  # noqa: F401
    inputs = (
        embedded(options.embeddings) if options.embeddings else world(options.images, options.captions, options.dim)
    )
    Path("/proc/self/clear_refs").write_text("5")
    before, best = memory("VmRSS"), float("inf")
    for _ in range(options.repeat if options.side == "ours" else 1):
        start = time.perf_counter()
        found = ours(*inputs) if options.side == "ours" else peer(*inputs)
        best = min(best, time.perf_counter() - start)
    print(best, memory("VmHWM") - before, *(f"{name}={value}" for name, value in found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("images", 5000), ("captions", 5), ("dim", 512), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--embeddings", type=Path, metavar="ARTIFACT", help="an embed artifact instead of random vectors"
    )
    parser.add_argument("--slice", type=float, metavar="SECONDS", help="rank for so long and say what all would take")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.slice:
        part(options)
        return
    if options.side:
        measure(options)
        return
    found, seconds = {}, {}
    images, captions, dim = options.images, options.images * options.captions, options.dim
    if options.embeddings:
        vectors, texts, _ = embedded(options.embeddings)
        images, captions, dim = len(vectors), len(texts), vectors.shape[1]
    print(f"{images} x {captions}, {dim} dimensions, {os.cpu_count()} cores")
    for side in ("ours", "peer"):
        command = [sys.executable, __file__, "--side", side, *sys.argv[1:]]
        words = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        seconds[side] = float(words[0])
        found[side] = {word.split("=")[0]: float(word.split("=")[1]) for word in words[2:]}
        print(f"{side}: {seconds[side]:.2f} s, {float(words[1]):.0f} MB above the inputs")
    for name, value in found["ours"].items():
        print(f"  {name:27} {value:.5f}  differs by {abs(value - found['peer'][name]):.1e}")
    print(f"ours is {seconds['peer'] / seconds['ours']:.1f} times as fast")


if __name__ == "__main__":
    main()
