"""`gmail compare --plot`: results against the amount of training data, with a log-linear fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import gmail
from test_compare import captioned, cell, evaluation

from gmail_cli.artifacts import StageKey, Workspace
from gmail_cli.components import scaling, scores
from gmail_cli.components.metrics.intervals import Bootstrap
from gmail_cli.errors import InputError, UsageError
from gmail_cli.stages import compare

METRIC = "text_to_image_recall_at_1"
SIZES = {1000: 0.4, 3000: 0.5, 10000: 0.75}


def test_the_slope_is_that_of_least_squares_and_has_an_interval() -> None:
    runs = [(size, evaluation(str(size), cell(correct), cell(0.5, arm="none"))) for size, correct in SIZES.items()]
    [curve] = scaling.scaling(runs, metrics=[METRIC], bootstrap=Bootstrap(draws=500))["curves"]
    values = [cell(correct).scores[METRIC].value for correct in SIZES.values()]
    slope, intercept = np.polyfit(np.log10(list(SIZES)), values, 1)
    assert (curve["model"], curve["metric"]) == ("clip-text.real", METRIC)
    assert [(point["captions"], point["value"]) for point in curve["points"]] == list(zip(SIZES, values, strict=True))
    assert curve["slope"] == pytest.approx(slope)
    assert curve["intercept"] == pytest.approx(intercept)
    assert 0 < curve["slope_low"] < slope < curve["slope_high"]
    logs = np.log10(list(SIZES)) - np.log10(list(SIZES)).mean()
    widths = np.array([point["high"] - point["low"] for point in curve["points"]])
    apart = np.linalg.norm(logs / np.square(logs).sum() * widths)
    assert curve["slope_high"] - curve["slope_low"] < 0.9 * apart, "all sizes meet the same images"


def test_runs_of_one_size_are_its_seeds() -> None:
    runs = [
        (size, evaluation(str(size), cell(c, draw=d))) for size, c, d in ((10, 0.4, 1), (10, 0.6, 2), (100, 0.7, 3))
    ]
    [curve] = scaling.scaling(runs, metrics=[METRIC], bootstrap=Bootstrap(draws=200))["curves"]
    values = [cell(c, draw=d).scores[METRIC].value for c, d in ((0.4, 1), (0.6, 2), (0.7, 3))]
    assert [point["value"] for point in curve["points"]] == pytest.approx([np.mean(values[:2]), values[2]])
    assert curve["slope"] == pytest.approx(values[2] - np.mean(values[:2]))


def test_what_gives_no_curve_is_refused() -> None:
    a, b = evaluation("a", cell(0.5)), evaluation("b", cell(0.6, arm="mixed"))
    with pytest.raises(InputError, match="every run was trained on 1,000 captions"):
        scaling.scaling([(1000, a), (1000, b)])
    with pytest.raises(InputError, match="no model was trained at every size"):
        scaling.scaling([(1000, a), (3000, b)])


def _evaluated(root: Path, run: str, *, captions: int, correct: float) -> None:
    """A train artifact of that many captions, and its evaluation."""
    space = Workspace(root, run)
    with space.open(StageKey(stage="train", settings={"captions": captions})) as slot:
        trained = slot.commit(summary={"captions": captions})
    with space.open(StageKey(stage="eval", settings={}, inputs={"train": trained.digest})) as slot:
        rows = scores.to_parquet(cell(correct).scores)
        assert rows is not None
        slot.write_parquet("queries/one.parquet", rows)
        about = {"task": "clip-text", "arm": "real", "seed": 0, "dual_projection": False}
        results = {"protocol": "p/1", "test_set": "t" * 64, "seed": 0, "metrics": {}}
        slot.write_json("results.json", {**results, "cells": [{**about, "queries": "queries/one.parquet"}]})
        slot.commit(summary={})


def test_the_command_draws_the_curve(tmp_path: Path) -> None:
    for size, correct in SIZES.items():
        _evaluated(tmp_path / "runs", f"scale-{size}", captions=size, correct=correct)
    runs = [f"scale-{size}" for size in SIZES]
    done = gmail("compare", *runs, "--metric", METRIC, "--plot", "curve.svg", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"clip-text.real  {METRIC}  ")
    assert " at 1,000 captions, " in done.stdout
    page = compare.report(runs, root=tmp_path / "runs")["report.html"]
    assert "By the number of captions trained on" in page
    assert ">10,000</text>" in page
    alone = compare.report(runs[:1], root=tmp_path / "runs")["report.html"]
    assert "By the number of captions" not in alone
    picture = (tmp_path / "curve.svg").read_text()
    assert "captions trained on" in picture
    assert "<script" not in picture
    told = json.loads(gmail("compare", *runs, "--plot", "curve.png", "--json", cwd=tmp_path).stdout)
    assert told["schema"] == "gmail.scaling/1"
    with Image.open(tmp_path / "curve.png") as drawn:
        assert drawn.width > 100
    refused = gmail("compare", *runs, "--plot", "curve.doc", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (UsageError.exit_code, "")
    assert "cannot be a 'doc'" in refused.stderr


def test_a_metric_of_a_whole_set_has_a_slope_too() -> None:
    runs = [
        (size, evaluation(str(size), captioned(words)))
        for size, words in ((10, "a red ball on sand"), (1000, "a red ball on the grass"))
    ]
    [curve] = scaling.scaling(runs, metrics=["bleu_4"], bootstrap=Bootstrap(draws=200))["curves"]
    low, high = (point["value"] for point in curve["points"])
    assert curve["slope"] == pytest.approx((high - low) / 2)
    assert 0 < curve["slope_low"] < curve["slope"] < curve["slope_high"]
