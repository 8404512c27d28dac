"""One command as several processes of this machine, one for each GPU where there are several."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from gmail_cli.errors import GmailError

_PROGRESS = re.compile(r"^\S+: (\d+)/(\d+)$")


class PartError(GmailError):
    """A process that ended badly; its exit code is handed on."""

    def __init__(self, message: str, *, hint: str, exit_code: int) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


def devices() -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` may name here: those it names already, or all GPUs."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each for each in named.split(",") if each.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def together(
    arguments: Sequence[Sequence[str]],
    *,
    tell: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run ``gmail`` with each of several lists of arguments at once, and wait for all.

    Ctrl-C is handed to every process once, which finishes its batch; a second one ends them. A process that fails
    leaves the others to finish.

    Args:
        arguments: Of each process. The i-th gets the i-th GPU, counted round.
        tell: Called with what the processes say, a line at a time, with their number.
        progress: Called with (images done, images in all) over the processes.

    Raises:
        PartError: A process ended badly.
        KeyboardInterrupt: After Ctrl-C, when every process has ended.
    """
    gpus = devices()
    done: dict[int, tuple[int, int]] = {}
    lock = threading.Lock()

    def listen(number: int, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                found = _PROGRESS.match(line.rstrip())
                with lock:
                    if found is None:
                        tell(f"[{number + 1}/{len(arguments)}] {line.rstrip()}")
                        continue
                    done[number] = (int(found[1]), int(found[2]))
                    if progress and len(done) == len(arguments):
                        progress(sum(each for each, _ in done.values()), sum(total for _, total in done.values()))

    interrupts = 0
    processes: list[subprocess.Popen[str]] = []

    def interrupt(*_: object) -> None:
        nonlocal interrupts
        interrupts += 1
        for process in processes:
            process.send_signal(signal.SIGINT if interrupts == 1 else signal.SIGTERM)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        for number, words in enumerate(arguments):
            own = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "gmail_cli.cli", *words],
                    env=os.environ | own,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,  # so that a terminal's Ctrl-C comes through us alone
                )
            )
        ears = [threading.Thread(target=listen, args=each, daemon=True) for each in enumerate(processes)]
        for each in ears:
            each.start()
        codes = [process.wait() for process in processes]
        for each in ears:
            each.join()
    finally:
        signal.signal(signal.SIGINT, before)
        for process in processes:
            if process.poll() is None:
                process.terminate()
    if interrupts:
        raise KeyboardInterrupt
    failed = [number for number, code in enumerate(codes) if code]
    if failed:
        code = codes[failed[0]]
        how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
        raise PartError(
            f"process {failed[0] + 1} of {len(codes)} {how}" + (f", and {len(failed) - 1} more" if failed[1:] else ""),
            hint="What it said is above. Run the same command again: what is there is kept.",
            exit_code=code if code > 0 else 1,
        )
