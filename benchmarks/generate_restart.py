"""`gmail generate` that starts again far along.

    python benchmarks/generate_restart.py [--captions 200000] [--per-caption 5] [--earlier 3]

Plans 1,000,000 images, of which all but the last 1,000 are said to have been drawn (the logs of finished shards are
empty: a start does not read them), and measures how long a new process, its imports done, takes until it would draw the
next one, without loading the model, and the memory it takes beside the imports. With `--earlier`, a finished set of so
many images of each caption lies beside it: the first start looks for what it can take over (`looking_seconds`), later
ones remember. What `kill -9` leaves is looked at by benchmarks/kill.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gmail_cli.artifacts import Workspace
from gmail_cli.profile import build
from gmail_cli.profile.schema import Profile
from gmail_cli.stages.generate import drawing

PLANNED = ("key", "caption_id", "caption", "owner", "label", "k")


def profile_of(captions: Path, **chosen: Any) -> Profile:
    options = {"steps": 2, "guidance": 1.0, "batch_size": 4}
    return build({"data": {"train": str(captions)}, "generate": options | chosen})


def scale(root: Path, *, captions: int, per_caption: int, earlier: int) -> dict[str, Any]:
    file = root / "captions.txt"
    file.write_text(
        "".join(f"a red ball on a blue box beside a green cone, picture {row}\n" for row in range(captions))
    )
    profile = profile_of(file, per_caption=per_caption, batch_size=8)
    work = drawing.Work(profile)
    total, left = len(work.plan), 1000
    workspace = Workspace(root / "runs")
    if earlier:
        finished(workspace, profile_of(file, per_caption=earlier, batch_size=8))
    looking: dict[str, Any] = {}
    with workspace.open(work.key) as slot:
        start = time.perf_counter()
        work.look(slot, workspace)
        if earlier:
            there = work.earlier.find(work.plan[:5000])
            looking = {"looking_seconds": round(time.perf_counter() - start, 2), "there_of_5000": len(there)}
        for shard in work.shards:
            log = slot.log(f"records/{shard.start:09d}")
            rows = range(shard.start, min(shard.stop, total - left))
            if not rows:
                break
            with log.claim():
                if rows.stop == shard.stop:
                    log.complete()
                    continue
                for row in rows:  # the shard that was being drawn: its images are looked at
                    planned = work.plan[row]
                    slot.write_loose(f"{planned.stem}.png", b"x")
                    log.append([{"key": planned.key, "path": f"{planned.stem}.png", "bytes": 1}])
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=restart, args=(profile, workspace, queue))
    child.start()
    told = queue.get()
    child.join()
    return {"images": total, **looking, **told}


def finished(workspace: Workspace, profile: Profile) -> None:
    """A set as `gmail generate` leaves it, but for its images."""
    work = drawing.Work(profile)
    files = {}
    with workspace.open(work.key) as slot:

        def records() -> Iterator[dict[str, Any]]:
            for planned in work.plan:
                made = {"path": f"{planned.stem}.png", "bytes": 400_000, "sha256": "0" * 64, "seed": 1234567890}
                files[made["path"]] = {"sha256": made["sha256"], "size": made["bytes"]}
                made |= {"attempt": 0, "truncated": False, "generator": "tiny", "width": 512, "height": 512}
                yield made | {name: getattr(planned, name) for name in PLANNED}

        slot.write_jsonl("records.jsonl", records())
        manifest = slot.commit(summary={}).path / "manifest.json"
    made = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(made | {"files": made["files"] | files}, indent=1, sort_keys=True))


def restart(profile: Profile, workspace: Workspace, queue: Any) -> None:
    import safetensors.torch  # noqa: F401

    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    imported = memory("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    work = drawing.Work(profile)
    planned, planned_cpu = time.perf_counter() - start, time.process_time() - cpu
    first: list[int] = []

    class Stop(Exception):  # noqa: N818
        pass

    def chunks(slot: Any, shard: range, start: int) -> Any:
        first.append(start)
        raise Stop

    work._chunks = chunks  # type: ignore[method-assign]
    try:
        with workspace.open(work.key) as slot:
            work.look(slot, workspace)
            work.fill(slot, work.shards, progress=None)
    except Stop:
        pass
    queue.put(
        {
            "reading_and_planning_seconds": round(planned, 2),
            "ready_seconds": round(time.perf_counter() - start, 2),
            "ready_cpu_seconds": round(time.process_time() - cpu, 2),
            "planning_cpu_seconds": round(planned_cpu, 2),
            "next_image": first[0],
            "memory_mb": (memory("VmHWM") - imported) // 1024,
        }
    )


def memory(name: str) -> int:
    """Of this process, in kB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--per-caption", type=int, default=5)
    parser.add_argument("--earlier", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        told = scale(Path(folder), captions=options.captions, per_caption=options.per_caption, earlier=options.earlier)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
