"""Wall time of ``gmail --help`` against a bare interpreter, the best of several: ``python benchmarks/startup.py``.

With the folder of a finished run (``python benchmarks/startup.py runs/tiny``) also that of ``gmail eval --baseline`` on
its stored evaluation; call it where the run was made, with the profile it was made with (``GMAIL_PROFILE``).
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

GMAIL = (sys.executable, "-c", "from gmail_cli.cli import main; main()")


def best(*command: str, times: int = 7) -> float:
    """Least wall time of a command, seconds."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found.append(time.perf_counter() - start)
    return min(found)


if __name__ == "__main__":
    bare = best(sys.executable, "-c", "pass")
    shown = best(*GMAIL, "--help")
    print(f"python -c pass: {bare:.3f} s   gmail --help: {shown:.3f} s   (goal 0.25 s)")
    for run in map(Path, sys.argv[1:]):
        place = ("--workspace", str(run.parent), "--run", run.name)
        held = best(*GMAIL, "eval", *place, "--baseline", str(run / "eval" / "latest"), "--tolerance", "all=1")
        print(f"gmail eval --baseline: {held:.3f} s   (goal 2 s)")
