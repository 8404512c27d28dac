"""Programs that draw loss curves while they grow: TensorBoard, Weights & Biases, MLflow, Trackio.

``metrics.jsonl`` is always written and is the record; these receive the same rows as they come. Each is an optional
package. They change no result and enter no digest (``runtime.trackers``).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from gmail_cli.errors import SetupError

PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
"""Tracker -> the package that it needs."""
PROJECT = "gmail"

Row = Mapping[str, float]
Send = Callable[[Mapping[str, float], int], None]
"""``send(values, step)``: hand named values of a step to a program."""
Close = Callable[[bool], object]
"""``close(failed)``: say that the run is over, and whether it broke off."""


class Trackers:
    """The programs that a profile names, opened for one run; a context manager."""

    def __init__(self, names: Sequence[str], *, run: str, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open them, before anything is computed.

        Args:
            names: Out of ``PACKAGES``.
            run: What they call the run.
            folder: Where those that keep files may put them.
            settings: The resolved profile, for those that show it.

        Raises:
            SetupError: A package is not installed, or the program cannot be reached.
        """
        self._sent: dict[str, int] = {}
        self._open: list[tuple[Send, Close]] = []
        sections = {part: of for part, of in settings.items() if isinstance(of, dict)}
        flat = {f"{part}.{key}": value for part, of in sections.items() for key, value in of.items()}
        for name in names:
            _require(name)
        with redirect_stdout(sys.stderr):  # where results go is no place for what they have to say
            for name in names:
                self._open.append(_start(name, run, folder / name, flat))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        with redirect_stdout(sys.stderr):
            for _send, close in self._open:
                close(kind is not None)

    def __call__(self, name: str, curve: Sequence[Row]) -> None:
        """Send the rows of a curve that have not been sent yet.

        Args:
            name: Of what is trained: ``align``, or a cell of ``train``.
            curve: Its loss curve so far.
        """
        for row in curve[self._sent.get(name, 0) :]:
            values = {f"{name}/{key}": value for key, value in row.items() if key != "step"}
            with redirect_stdout(sys.stderr):
                for send, _close in self._open:
                    send(values, int(row["step"]))
        self._sent[name] = len(curve)


def _require(name: str) -> None:
    try:
        importlib.import_module(PACKAGES[name])
    except ImportError as error:
        hint = f"pip install {PACKAGES[name]}, or take it out of runtime.trackers."
        raise SetupError(f"runtime.trackers: {name} is not installed ({error})", hint=hint) from error


def _start(name: str, run: str, folder: Path, settings: Mapping[str, Any]) -> tuple[Send, Close]:
    try:
        return _OPEN[name](run, folder, settings)
    except Exception as error:
        hint = "Check its settings, or take it out of runtime.trackers."
        raise SetupError(f"runtime.trackers: {name} does not start: {error}", hint=hint) from error


def _tensorboard(run: str, folder: Path, settings: Mapping[str, Any]) -> tuple[Send, Close]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    writer.add_text("profile", "\n".join(f"    {name} = {value}" for name, value in settings.items()))

    def send(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send, lambda failed: writer.close()


def _wandb(run: str, folder: Path, settings: Mapping[str, Any]) -> tuple[Send, Close]:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    opened = wandb.init(project=PROJECT, name=run, dir=str(folder), config=dict(settings))
    opened.define_metric("*", step_metric="step")  # curves of several cells each begin at step 0
    return lambda values, step: opened.log({**values, "step": step}), lambda failed: opened.finish(int(failed))


def _mlflow(run: str, folder: Path, settings: Mapping[str, Any]) -> tuple[Send, Close]:
    import mlflow

    mlflow.set_experiment(PROJECT)
    mlflow.start_run(run_name=run)
    mlflow.log_params(dict(settings))
    return (
        lambda values, step: mlflow.log_metrics(dict(values), step=step),
        lambda failed: mlflow.end_run("FAILED" if failed else "FINISHED"),
    )


def _trackio(run: str, folder: Path, settings: Mapping[str, Any]) -> tuple[Send, Close]:
    import trackio

    trackio.init(project=PROJECT, name=run, config=dict(settings))
    return lambda values, step: trackio.log(dict(values), step=step), lambda failed: trackio.finish()


_OPEN: Mapping[str, Callable[[str, Path, Mapping[str, Any]], tuple[Send, Close]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
