"""`gmail generate` that is killed, and that starts again far along.

    python benchmarks/generate_restart.py kills [--kills 50] [--seed 0]
    python benchmarks/generate_restart.py scale [--captions 200000] [--per-caption 5]

`kills` draws 600 images with `tiny`, kills the process with signal 9 at random moments, each time starting it again,
and compares the artifact with that of a run that was never killed. `scale` plans 1,000,000 images, of which all but the
last 1,000 are said to have been drawn (the logs of finished shards are empty: a start does not read them), and measures
how long a new process, its imports done, takes until it would draw the next one, without loading the model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from gmail_cli.artifacts import Workspace
from gmail_cli.profile import Profile, build
from gmail_cli.stages import generate

PRELOADED = [
    "gmail_cli.stages.generate",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "transformers.models.clip.modeling_clip",
]


def profile_of(captions: Path, **chosen: Any) -> Profile:
    options = {"steps": 2, "guidance": 1.0, "batch_size": 4}
    return build({"data": {"train": str(captions)}, "generate": options | chosen})


def kills(root: Path, *, count: int, seed: int) -> dict[str, Any]:
    captions = root / "captions.txt"
    captions.write_text("".join(f"a red ball on a blue box, picture {row}\n" for row in range(200)))
    profile = profile_of(captions, per_caption=3)
    expected = generate.run(profile, Workspace(root / "whole"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    chance, killed, starts = random.Random(seed), 0, 0
    workspace = Workspace(root / "killed")
    folder = workspace.folder("generate") / f"{expected.digest[:12]}.partial"
    while killed < count and workspace.find(generate.plan_key(profile)) is None:
        child = context.Process(target=generate.run, args=(profile, workspace))
        child.start()
        starts += 1
        before = len(list(folder.rglob("images/*/*.png")))
        # most moments lie between the first new image and a few later, some in the loading before
        patience = time.monotonic() + chance.uniform(0.0, 4.0)
        while child.is_alive() and time.monotonic() < patience:
            if len(list(folder.rglob("images/*/*.png"))) > before + 2:
                time.sleep(chance.random() * 0.1)
                break
            time.sleep(0.002)
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
    resumed = generate.run(profile, workspace)
    records = resumed.read_jsonl("records.jsonl")
    return {
        "killed": killed,
        "starts": starts + 1,
        "images": len(records),
        "duplicates": len(records) - len({each["key"] for each in records}),
        "same_content": resumed.content == expected.content,
        "problems": resumed.verify(),
    }


def scale(root: Path, *, captions: int, per_caption: int) -> dict[str, Any]:
    file = root / "captions.txt"
    file.write_text(
        "".join(f"a red ball on a blue box beside a green cone, picture {row}\n" for row in range(captions))
    )
    profile = profile_of(file, per_caption=per_caption, batch_size=8)
    work = generate._Work(profile)
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
    work = generate._Work(profile)
    planned, planned_cpu = time.perf_counter() - start, time.process_time() - cpu
    first: list[int] = []

    class Stop(Exception):  # noqa: N818
        pass

    def chunks(slot: Any, rows: range) -> Any:
        first.append(rows.start)
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
    parser.add_argument("what", choices=["kills", "scale"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--per-caption", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "kills":
            told = kills(Path(folder), count=options.kills, seed=options.seed)
        else:
            told = scale(Path(folder), captions=options.captions, per_caption=options.per_caption)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
