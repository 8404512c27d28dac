"""Training on a machine that others use: the threads of a step wait for one another, and should not spin meanwhile.

    python benchmarks/contention.py [--busy 4] [--seconds 8]

Steps a second of the shipped CLIP (forward and backward, 64 pictures and texts) with torch's default number of threads,
alone and beside `--busy` processes that compute without end, with OpenMP's own spinning and with the one that `gmail`
sets (`GOMP_SPINCOUNT`, see gmail_cli/cli.py).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from gmail_cli.cli import SPIN


def steps_a_second(seconds: float) -> float:
    import torch

    from gmail_cli.components import clip_files

    model = clip_files.load_clip("tiny").model.train().requires_grad_(True)
    images, texts = torch.randn(64, 3, 64, 64), torch.randint(1, 500, (64, 77))

    def step() -> None:
        similarity = model.encode_image(images) @ model.encode_text(texts).T
        similarity.logsumexp(1).mean().backward()

    step()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step()
        steps += 1
    return steps / (time.perf_counter() - began)


def measure(seconds: float, *, spin: str | None) -> float:
    environment = {
        name: value for name, value in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_NUM_THREADS"}
    }
    if spin:
        environment["GOMP_SPINCOUNT"] = spin
    command = [sys.executable, __file__, "--child", "--seconds", str(seconds)]
    return float(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=4, help="other processes")
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(steps_a_second(arguments.seconds))
        return
    for count in (0, arguments.busy):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
        try:
            default, own = (measure(arguments.seconds, spin=spin) for spin in (None, SPIN))
        finally:
            for other in others:
                other.kill()
        speeds = f"{default:.2f} steps/s by default, {own:.2f} with GOMP_SPINCOUNT={SPIN}"
        print(f"{count} others: {speeds}, {own / default:.2f} times as many")


if __name__ == "__main__":
    main()
