"""The one gate command: style, types, import contract, tests. Run as ``python tests/check.py``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

COMMANDS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("lint-imports",),
    (sys.executable, "-m", "pytest", "-q", "--durations=25", *sys.argv[1:]),
)


def main() -> int:
    """Run every check; the first that fails stops the gate with its exit code."""
    for command in COMMANDS:
        print("+", " ".join(command), flush=True)
        code = subprocess.run(command, cwd=Path(__file__).parents[1], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
