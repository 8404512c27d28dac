"""Trackers: every row of a curve once, in order; a package that is missing is named before anything is computed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from gmail_cli.errors import SetupError
from gmail_cli.trackers import PACKAGES, Trackers


def test_rows_are_sent_once_and_in_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[tuple[dict[str, float], int]] = []
    closed: list[bool] = []

    def opened(run: str, folder: Path, settings: dict[str, object]):
        assert (run, folder, settings) == ("r", tmp_path / "tensorboard", {"align.lr": 0.1})
        print("opened")
        return lambda values, step: (print("sent"), sent.append((dict(values), step))), closed.append

    monkeypatch.setitem(sys.modules["gmail_cli.trackers"]._OPEN, "tensorboard", opened)
    monkeypatch.setitem(PACKAGES, "tensorboard", "json")
    settings = {"name": "x", "align": {"lr": 0.1}}
    with Trackers(["tensorboard"], run="r", folder=tmp_path, settings=settings) as track:
        curve = [{"step": 10, "loss": 2.0}]
        track("align", curve)
        curve.append({"step": 20, "loss": 1.0})
        track("align", curve)
        track("align", curve)
        track("cell", curve[:1])
    assert sent == [({"align/loss": 2.0}, 10), ({"align/loss": 1.0}, 20), ({"cell/loss": 2.0}, 10)]
    assert closed == [False]
    told = capsys.readouterr()
    assert told.out == ""  # that is where results go
    assert "opened" in told.err
    assert "sent" in told.err
    with (
        pytest.raises(ValueError, match="broke off"),
        Trackers(["tensorboard"], run="r", folder=tmp_path, settings=settings),
    ):
        raise ValueError("broke off")
    assert closed == [False, True]


@pytest.mark.parametrize("name", [name for name in PACKAGES if importlib.util.find_spec(PACKAGES[name]) is None])
def test_a_missing_package_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=f"runtime.trackers: {name} is not installed") as caught:
        Trackers([name], run="r", folder=tmp_path, settings={})
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(f"pip install {PACKAGES[name]}")
