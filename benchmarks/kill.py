"""`kill -9` on the commands themselves, at random moments; then the same command again until it is done.

    python benchmarks/kill.py [--stage generate ...] [--kills 50] [--seed 0] [--set section.key=value ...]

Runs generate, align, train and embed of the profile `tiny` (or the stages named and those they need) twice: once
undisturbed in ./whole, once in ./killed, where a command is killed at a random moment of the time that it takes to
write, again and again. One that gets done before is compared, deleted and begun anew, until it has been killed
`--kills` times. Exits with 1 unless manifest digest and the hash of every file are always the same.

Every command is a process of its own, forked from this one, which has the imports done: so most of the time goes into
what can be interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: threads do not survive a fork

import diffusers  # noqa: F401 - imported so that the commands need not
import open_clip  # noqa: F401
import peft  # noqa: F401
import transformers  # noqa: F401

import gmail_cli.components.diffusion
import gmail_cli.components.heads  # noqa: F401
from gmail_cli.artifacts import Artifact
from gmail_cli.cli import main as gmail

STAGES = ("generate", "align", "train", "embed")
QUICK = ("data.train_limit=120", "data.test_limit=100", "train.steps=20", "train.batch_size=32", "align.steps=40",
         "align.batch_size=48", "embed.gap_count=50", "runtime.checkpoint_seconds=1", "runtime.threads=1")  # fmt: skip


def start(stage: str, *, folder: Path, options: list[str]) -> int:
    """`gmail STAGE` in a process group of its own; its id."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        sys.stdout = Path("stdout").open("w")  # noqa: SIM115 - open until the end
        sys.stderr = Path("stderr").open("w")  # noqa: SIM115
        sys.argv = ["gmail", stage, "--profile", "tiny", *options]
        gmail()
    except SystemExit as done:
        code = int(done.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(process: int) -> bool:
    """Whether it has ended, well; this process stops when it ended badly."""
    found, status = os.waitpid(process, os.WNOHANG)
    if found and status:
        sys.exit(f"a command ended with {os.waitstatus_to_exitcode(status)}; see ./whole/stderr or ./killed/stderr")
    return bool(found)


def finish(process: int, *, folder: Path) -> Artifact:
    while not ended(process):
        time.sleep(0.02)
    return load(folder=folder)


def load(*, folder: Path) -> Artifact:
    """What the command that has just ended there made."""
    return Artifact.load(folder / (folder / "stdout").read_text().strip())


def written(stage: str, *, folder: Path) -> dict[Path, int]:
    found = {}
    for path in folder.glob(f"runs/tiny/{stage}/*.partial/**/*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            found[path] = path.stat().st_mtime_ns
    return found


def wait_for_writing(stage: str, *, folder: Path, process: int) -> bool:
    """Until the command has written something into its unfinished folder; false where it has ended."""
    before = written(stage, folder=folder)
    while written(stage, folder=folder) == before:
        if ended(process):
            return False
        time.sleep(0.02)
    return True


def killed(process: int, *, after: float) -> bool:
    """Kill the command after so many seconds; false where it has ended before."""
    due = time.monotonic() + after
    while time.monotonic() < due:
        if ended(process):
            return False
        time.sleep(0.005)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return True


def contents(artifact: Artifact) -> dict[str, str]:
    """File -> SHA-256 of every file of the artifact but its manifest, which holds times."""
    files = sorted(path for path in artifact.path.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(artifact.path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", action="append", choices=STAGES, help="kill this command; may be repeated")
    parser.add_argument("--kills", type=int, default=5, help="kills of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--set", action="append", default=[], help="further settings")
    arguments = parser.parse_args()
    options = [part for setting in (*QUICK, *arguments.set) for part in ("--set", setting)]
    moments = random.Random(arguments.seed)
    chosen = arguments.stage or STAGES
    failed = False
    for stage in STAGES[: 1 + max(map(STAGES.index, chosen))]:
        undisturbed = start(stage, folder=Path("whole"), options=options)
        wait_for_writing(stage, folder=Path("whole"), process=undisturbed)
        began = time.monotonic()
        whole = finish(undisturbed, folder=Path("whole"))
        writing = time.monotonic() - began
        expected = contents(whole)
        kills = whole_runs = unlike = 0
        while True:
            process = start(stage, folder=Path("killed"), options=options)
            last = kills == arguments.kills or stage not in chosen
            if last:
                made = finish(process, folder=Path("killed"))
            else:
                writes = wait_for_writing(stage, folder=Path("killed"), process=process)
                if writes and killed(process, after=moments.uniform(0, writing)):
                    kills += 1
                    continue
                made = load(folder=Path("killed"))
            whole_runs += 1
            unlike += made.digest != whole.digest or contents(made) != expected
            if last:
                break
            shutil.rmtree(Path("killed/runs/tiny") / stage)
        failed |= bool(unlike)
        print(
            f"{stage:9} writes for {writing:.1f} s; killed {kills} times on the way to {whole_runs} artifacts of "
            f"{len(expected)} files; {unlike} of them unlike the undisturbed one",
            flush=True,
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
