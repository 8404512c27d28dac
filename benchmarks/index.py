"""The automatic choice of an index beside autofaiss, and what it promises against what is measured.

    python benchmarks/index.py [--count 1000000] [--dim 128] [--max-memory MIB] [--max-latency MS]
    python benchmarks/index.py --count 100000 --dim 512 --autofaiss /path/to/python     (one that imports autofaiss)

Vectors are made up, the hard part is kept: images lie in clusters of uneven size in a space whose directions matter
unevenly, texts lie apart from them by a constant offset (the modality gap, cosine about 0.3 to the image they
describe) and are never indexed. Recall is measured again with 1,000 texts the choice has not seen, and memory in a
fresh process that loads the index whole.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

QUERIES = 1000
K = 10

AUTOFAISS = """
import sys, time
import faiss, numpy as np
from autofaiss import build_index
vectors, queries = np.load(sys.argv[1]), np.load(sys.argv[2])
def now():
    return np.array([time.perf_counter(), time.process_time()])
start = now()
index, info = build_index(vectors, save_on_disk=False, metric_type="ip", nb_cores=int(sys.argv[3]), verbose=40)
built = now() - start
start = now()
index.search(queries, 10)
batch = 1000 * (now() - start) / len(queries)
np.save(sys.argv[4], index.search(queries, 10)[1])
print("RESULT", *built, *batch, type(faiss.downcast_index(index)).__name__)
"""


def world(count: int, dim: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, dim) and 2,000 texts, unit rows."""
    rng = np.random.default_rng(seed)
    spread = np.arange(1, dim + 1, dtype=np.float32) ** -0.35
    spread *= (dim / (spread**2).sum()) ** 0.5
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
    topics = max(count // 400, 8)
    centres = rng.standard_normal((topics, dim), dtype=np.float32) * spread
    share = rng.pareto(1.5, topics) + 0.2
    offset = rng.standard_normal((2, dim)).astype(np.float32)
    offset /= np.linalg.norm(offset, axis=1, keepdims=True)
    topic = rng.choice(topics, size=count, p=share / share.sum())
    images = np.empty((count, dim), dtype=np.float32)

    def place(rows: np.ndarray, which: int) -> np.ndarray:
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True) @ turn + 0.9 * offset[which]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    chosen = rng.choice(count, size=2 * QUERIES, replace=count < 2 * QUERIES)
    meant = np.empty((2 * QUERIES, dim), dtype=np.float32)
    for start in range(0, count, 50_000):
        own = topic[start : start + 50_000]
        rows = centres[own] + 0.8 * rng.standard_normal((len(own), dim), dtype=np.float32) * spread
        images[start : start + len(own)] = place(rows, 0)
        here = (chosen >= start) & (chosen < start + len(own))
        meant[here] = rows[chosen[here] - start]
    texts = meant + 0.9 * rng.standard_normal(meant.shape, dtype=np.float32) * spread * float(np.std(meant))
    return images, place(texts, 1)


def now() -> np.ndarray:
    """Wall clock and CPU time, seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def memory() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def loaded(path: str) -> None:
    """In a process of its own: MiB that loading the index whole takes."""
    from gmail_cli.components import search

    np.zeros(1)
    search.exact(np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32), k=1)
    before = memory()
    index = search.load(Path(path), resident=True)
    print(memory() - before, index.count)


def main() -> None:
    from gmail_cli.components import search
    from gmail_cli.components.search.indexes import recall_of_each

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--kind", default="auto")
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--max-memory", type=float, default=float("inf"), metavar="MIB")
    parser.add_argument("--max-latency", type=float, default=float("inf"), metavar="MS")
    parser.add_argument("--autofaiss", metavar="PYTHON", help="an interpreter with autofaiss, to compare with")
    parser.add_argument("--loaded", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loaded:
        loaded(options.loaded)
        return
    images, texts = world(options.count, options.dim)
    tuning, fresh = texts[:QUERIES], texts[QUERIES:]
    print(
        f"{options.count} x {options.dim}, {os.cpu_count()} cores, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS')}"
    )
    limits = search.Limits(options.recall, options.max_memory * search.MIB, options.max_latency)
    start = now()
    made = search.build(images, queries=tuning, kind=options.kind, limits=limits)
    built = now() - start
    print(search.candidates_table(made.candidates))
    start = now()
    found = made.index.search(fresh, k=K)
    batch = 1000 * (now() - start) / len(fresh)
    best = search.exact(images, fresh, k=K)
    again = recall_of_each(best, found, vectors=images, queries=fresh).mean()
    print(
        f"built and chosen in {built[0]:.2f} s ({built[1]:.2f} s of CPU time), "
        f"{batch[0]:.3f} ms/query batched ({batch[1]:.3f})"
    )
    print(f"recall@10 of the choice {made.recall:.4f}, with texts it has not seen {again:.4f}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index.faiss")
        made.index.write(path)
        command = [sys.executable, __file__, "--loaded", str(path)]
        taken = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[0])
        promised = made.chosen.memory / search.MIB
        print(f"memory: {promised:.1f} MiB predicted, {taken:.1f} taken ({100 * (promised / taken - 1):+.1f} %)")
        if options.autofaiss:
            names = [str(Path(folder, name)) for name in ("images.npy", "texts.npy", "ids.npy")]
            np.save(names[0], images)
            np.save(names[1], fresh)
            cores = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
            command = [options.autofaiss, "-c", AUTOFAISS, names[0], names[1], cores, names[2]]
            shown = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ""}
            )
            words = next(line for line in shown.stdout.splitlines() if line.startswith("RESULT")).split()
            kind, (peer_built, peer_batch) = words[-1], np.array(words[1:-1], dtype=float).reshape(2, 2)
            theirs = search.Hits(np.load(names[2]), best.scores)
            recall = recall_of_each(best, theirs, vectors=images, queries=fresh).mean()
            print(
                f"autofaiss: {kind}, built in {peer_built[0]:.1f} s ({peer_built[1]:.1f} s of CPU time), "
                f"{peer_batch[0]:.3f} ms/query batched ({peer_batch[1]:.3f}), recall {recall:.4f}"
            )
            ratios = zip(peer_built / built, peer_batch / batch, ("wall clock", "CPU time"), strict=True)
            for of_build, of_batch, clock in ratios:
                print(f"autofaiss by {clock}: {of_build:.0f} times our build, {of_batch:.1f} times our batched search")


if __name__ == "__main__":
    main()
