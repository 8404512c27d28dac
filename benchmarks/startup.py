"""Wall time of ``gmail --help`` against a bare interpreter, the best of several: ``python benchmarks/startup.py``."""

from __future__ import annotations

import subprocess
import sys
import time


def best(*command: str, times: int = 7) -> float:
    """Least wall time of a command, seconds."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - start)
    return min(found)


if __name__ == "__main__":
    bare = best(sys.executable, "-c", "pass")
    shown = best(sys.executable, "-c", "from gmail_cli.cli import main; main()", "--help")
    print(f"python -c pass: {bare:.3f} s   gmail --help: {shown:.3f} s   (goal 0.25 s)")
