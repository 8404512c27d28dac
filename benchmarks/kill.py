"""`kill -9` on the commands themselves, at random moments; then the same command again until it is done.

    python benchmarks/kill.py [--kills 3] [--seed 0] [--set section.key=value ...]

Runs generate, align, train and embed of the profile `tiny` twice: once undisturbed in ./whole, once in ./killed, where
each command is killed with its children `--kills` times, at random moments after it has begun to write. Prints a line
for each stage and exits with 1 unless manifest digest and the hash of every file are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from gmail_cli.artifacts import Artifact

STAGES = ("generate", "align", "train", "embed")
QUICK = ("data.train_limit=120", "data.test_limit=100", "train.steps=20", "train.batch_size=32", "align.steps=40",
         "align.batch_size=48", "embed.gap_count=50", "runtime.checkpoint_seconds=1", "runtime.threads=1")  # fmt: skip


def start(stage: str, *, folder: Path, options: list[str]) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["gmail", stage, "--profile", "tiny", *options]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str], *, folder: Path) -> Artifact:
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{process.args!r} ended with {process.returncode}")
    return Artifact.load(folder / output.strip())


def written(stage: str, *, folder: Path) -> dict[Path, int]:
    found = {}
    for path in folder.glob(f"runs/tiny/{stage}/*.partial/**/*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            found[path] = path.stat().st_mtime_ns
    return found


def wait_for_writing(stage: str, *, folder: Path, process: subprocess.Popen[str]) -> None:
    """Until the command has written something into its unfinished folder, or has ended."""
    before = written(stage, folder=folder)
    while process.poll() is None and written(stage, folder=folder) == before:
        time.sleep(0.05)


def contents(artifact: Artifact) -> dict[str, str]:
    """File -> SHA-256 of every file of the artifact but its manifest, which holds times."""
    files = sorted(path for path in artifact.path.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(artifact.path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="kills of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--set", action="append", default=[], help="further settings")
    arguments = parser.parse_args()
    options = [part for setting in (*QUICK, *arguments.set) for part in ("--set", setting)]
    moments = random.Random(arguments.seed)
    failed = False
    for stage in STAGES:
        began = time.monotonic()
        undisturbed = start(stage, folder=Path("whole"), options=options)
        wait_for_writing(stage, folder=Path("whole"), process=undisturbed)
        writing = time.monotonic()
        whole = finish(undisturbed, folder=Path("whole"))
        took, share = time.monotonic() - began, (time.monotonic() - writing) / arguments.kills
        killed = 0
        for _ in range(arguments.kills):
            process = start(stage, folder=Path("killed"), options=options)
            wait_for_writing(stage, folder=Path("killed"), process=process)
            try:
                process.wait(timeout=moments.uniform(0, share))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
        resumed = finish(start(stage, folder=Path("killed"), options=options), folder=Path("killed"))
        same = whole.digest == resumed.digest and contents(whole) == contents(resumed)
        failed |= not same or not killed
        files = len(contents(whole))
        print(
            f"{stage:9} {took:5.0f} s  killed {killed} times  {files} files  {'same' if same else 'DIFFERENT'}",
            flush=True,
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
