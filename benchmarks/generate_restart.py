"""`gmail generate` that starts again far along.

    python benchmarks/generate_restart.py [--captions 200000] [--per-caption 5]

Plans 1,000,000 images, of which all but the last 1,000 are said to have been drawn (the logs of finished shards are
empty: a start does not read them), and measures how long a new process, its imports done, takes until it would draw the
next one, without loading the model. What `kill -9` leaves is looked at by benchmarks/kill.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from gmail_cli.artifacts import Workspace
from gmail_cli.profile import build
from gmail_cli.profile.schema import Profile
from gmail_cli.stages.generate import drawing


def profile_of(captions: Path, **chosen: Any) -> Profile:
    options = {"steps": 2, "guidance": 1.0, "batch_size": 4}
    return build({"data": {"train": str(captions)}, "generate": options | chosen})


def scale(root: Path, *, captions: int, per_caption: int) -> dict[str, Any]:
    file = root / "captions.txt"
    file.write_text(
        "".join(f"a red ball on a blue box beside a green cone, picture {row}\n" for row in range(captions))
    )
    profile = profile_of(file, per_caption=per_caption, batch_size=8)
    work = drawing.Work(profile)
    total, left = len(work.plan), 1000
    workspace = Workspace(root / "runs")
    with workspace.open(work.key) as slot:
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
    return {"images": total, **told}


def restart(profile: Profile, workspace: Workspace, queue: Any) -> None:
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
            "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--per-caption", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        told = scale(Path(folder), captions=options.captions, per_caption=options.per_caption)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
