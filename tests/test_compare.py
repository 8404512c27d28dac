"""`gmail compare`: pairing, pooling, correction, and every way in which two evaluations do not fit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_cli import gmail

from gmail_cli import artifacts
from gmail_cli.artifacts import StageKey, Workspace
from gmail_cli.components import comparison, measure, scores
from gmail_cli.components.comparison import Evaluation
from gmail_cli.components.metrics.intervals import Bootstrap, paired_difference
from gmail_cli.components.report import names
from gmail_cli.components.scores import Cell, Scores
from gmail_cli.errors import InputError, UsageError
from gmail_cli.stages import compare

IMAGES = 60


def cell(correct: float, *, arm: str = "real", seed: int | None = 0, draw: int = 0) -> Cell:
    """A model that finds about ``correct`` of 2 texts of each image; its images agree with those of other models."""
    rng = np.random.default_rng(7)
    hard = np.repeat(rng.random(IMAGES), 2) + 0.1 * np.random.default_rng(draw).random(2 * IMAGES)
    hits = (hard < correct).astype(float)
    owners = np.repeat(np.arange(IMAGES), 2)
    found = {
        "text_to_image_recall_at_1": Scores.mean(hits, groups=owners),
        "text_to_image_recall_at_5": Scores.mean(np.minimum(1, hits + 0.5), groups=owners),
    }
    return Cell(task="clip-text", arm=arm, seed=seed, scores=found)


def evaluation(label: str, *cells: Cell, seed: int = 0) -> Evaluation:
    return Evaluation(label=label, path=label, protocol="p/1", test_set="t" * 64, seed=seed, cells=cells)


def test_a_difference_is_the_paired_bootstrap_by_image() -> None:
    found = comparison.compare([evaluation("a", cell(0.5)), evaluation("b", cell(0.6))], bootstrap=Bootstrap(draws=500))
    [row] = found["comparisons"]
    a, b = (cell(each).scores["text_to_image_recall_at_1"] for each in (0.5, 0.6))
    test = paired_difference(a.values, other=b.values, groups=a.groups, bootstrap=Bootstrap(draws=500))
    assert (row["run"], row["baseline"], row["n"]) == ("b", "a", 2 * IMAGES)
    assert (row["difference"], row["p_value"]) == (pytest.approx(b.value - a.value), test.p_value)
    assert (row["low"], row["high"]) == (test.difference.low, test.difference.high)
    unpaired = [(each["low"], each["high"]) for each in found["rows"]]
    assert unpaired[0][1] > unpaired[1][0], "the intervals overlap and the paired test is sure all the same"
    assert row["low"] > 0


def test_runs_of_one_label_are_seeds_of_one_system() -> None:
    found = comparison.compare(
        [
            evaluation("a", cell(0.5, draw=1), seed=0),
            evaluation("a", cell(0.6, draw=2), cell(0.7, seed=1, draw=3), seed=1),
            evaluation("b", cell(0.9)),
        ],
        bootstrap=Bootstrap(draws=200),
    )
    row = found["rows"][0]
    values = [cell(c, draw=d).scores["text_to_image_recall_at_1"].value for c, d in ((0.5, 1), (0.6, 2), (0.7, 3))]
    assert row["value"] == pytest.approx(np.mean(values))
    assert row["sd"] == pytest.approx(np.std(values, ddof=1))
    assert row["seeds"] == [{"profile": 0, "train": 0}, {"profile": 1, "train": 0}, {"profile": 1, "train": 1}]
    assert [each["label"] for each in found["runs"]] == ["a", "a", "b"]
    assert len(found["comparisons"]) == 1


def test_p_values_are_corrected_for_every_test_of_the_table() -> None:
    runs = [evaluation(label, cell(c), cell(c, arm="none")) for label, c in (("a", 0.4), ("b", 0.7), ("c", 0.7))]
    found = comparison.compare(runs, metrics=["all"], bootstrap=Bootstrap(draws=200))
    assert len(found["comparisons"]) == 2 * 2 * 2
    assert min(row["p_value"] for row in found["comparisons"]) == pytest.approx(8 / 201)
    alone = comparison.compare(
        [runs[0], runs[1]], metrics=["text_to_image_recall_at_1"], bootstrap=Bootstrap(draws=200)
    )
    assert min(row["p_value"] for row in alone["comparisons"]) == pytest.approx(2 / 201)


def test_one_label_is_tabulated_without_tests() -> None:
    found = comparison.compare(
        [evaluation("a", cell(0.5)), evaluation("a", cell(0.6), seed=1)], bootstrap=Bootstrap(draws=200)
    )
    assert found["comparisons"] == []
    assert "differences" not in comparison.text(found)


def captioned(words: str) -> Cell:
    """A captioner that says the same of every image, scored against three references each."""
    rng = np.random.default_rng(3)
    known = ("a red ball on the grass", "one blue cube lies in snow", "a green cone stands on sand", "the red cube")
    references = {f"{row}": [known[each] for each in rng.integers(len(known), size=3)] for row in range(40)}
    found, _ = measure.captions(references, predictions=dict.fromkeys(references, words), meteor="off")
    # METEOR's counts need Java: 4 words of each, of which as many match as BLEU-1 counts, in one chunk
    counts = np.zeros((40, 23))
    counts[:, [0, 1]], counts[:, [4, 5, 21, 22]], counts[:, 20] = 4, found["bleu_1"].columns[:, [2]], 1
    found["meteor"] = replace(found["bleu_1"], columns=counts, statistic=scores.OF_CORPUS["meteor"])
    return Cell(task="clipcap", arm="real", seed=0, scores=found)


def test_metrics_of_a_whole_set_are_resampled_by_image_and_tested_in_pairs() -> None:
    first, second = captioned("a red ball on sand"), captioned("a red ball on the grass")
    stored = {}
    for cell_ in (first, second):
        table = scores.to_parquet(cell_.scores)
        assert table is not None
        stored[cell_.scores["bleu_4"].value] = kept = replace(cell_, scores=scores.from_parquet(table))
        assert {name: each.value for name, each in kept.scores.items()} == pytest.approx(
            {name: each.value for name, each in cell_.scores.items()}
        )
    assert len(stored) == 2
    runs = [evaluation(label, cell_) for label, cell_ in zip("ab", stored.values(), strict=True)]
    found = comparison.compare(runs, metrics=["all"], bootstrap=Bootstrap(draws=200))
    tests = {row["metric"]: row for row in found["comparisons"]}
    assert set(tests) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider"}
    rng = np.random.default_rng(0)
    drawn = rng.integers(40, size=(200, 40))
    for name in ("bleu_1", "bleu_4", "meteor"):
        one, two = (each.scores[name] for each in (first, second))
        of_draw = [
            two.statistic(two.columns[rows].sum(axis=0, keepdims=True))[0]
            - one.statistic(one.columns[rows].sum(axis=0, keepdims=True))[0]
            for rows in drawn
        ]
        assert tests[name]["difference"] == pytest.approx(two.value - one.value)
        assert (tests[name]["low"], tests[name]["high"]) == pytest.approx(tuple(np.quantile(of_draw, [0.025, 0.975])))
        extreme = np.abs(np.array(of_draw) - tests[name]["difference"]) >= abs(tests[name]["difference"]) - 1e-12
        assert tests[name]["p_value"] == pytest.approx(min(1, (extreme.sum() + 1) / 201 * 7), abs=0.1)
    assert tests["bleu_4"]["low"] > 0


def test_two_sets_of_queries_are_no_pair() -> None:
    with pytest.raises(InputError, match="have 2 and 3 queries; a paired test needs the same ones"):
        scores.difference(
            Scores.mean(np.ones(2), groups=np.arange(2)),
            other=Scores.mean(np.ones(3), groups=np.arange(3)),
            bootstrap=Bootstrap(draws=200),
        )


def test_evaluations_that_do_not_fit_are_refused() -> None:
    a = evaluation("a", cell(0.5))
    with pytest.raises(InputError, match="a was measured with protocol 'p/1', b with 'q/1'"):
        comparison.compare([a, replace(a, path="b", protocol="q/1")])
    with pytest.raises(InputError, match="a and b were tested on different sets"):
        comparison.compare([a, replace(a, path="b", test_set="u" * 64)])
    with pytest.raises(InputError, match=r"no model in common \(a: clip-text.real; b: clip-text.none\)"):
        comparison.compare([a, evaluation("b", cell(0.5, arm="none"))])
    with pytest.raises(UsageError, match="'text_to_image_recal_at_1'") as caught:
        comparison.compare([a], metrics=["text_to_image_recal_at_1"])
    assert caught.value.hint == "Did you mean 'text_to_image_recall_at_1'?"


def test_tables_hold_what_the_document_holds() -> None:
    found = comparison.compare(
        [evaluation("a_1|x", cell(0.5)), evaluation("b", cell(0.7))], bootstrap=Bootstrap(draws=200)
    )
    row = comparison.table(found)[1]
    test = found["comparisons"][0]
    assert row[7] == f"{100 * test['difference']:+.2f}"
    assert row[8] == f"{100 * test['low']:+.2f} to {100 * test['high']:+.2f}"
    for written in (comparison.text(found), comparison.markdown(found), comparison.latex(found)):
        assert row[7] in written
        assert "p after Holm over 1 tests" in written
    assert "a_1\\|x" in comparison.markdown(found)
    assert r"a\_1|x & " in comparison.latex(found)
    assert len({line.count("|") - line.count("\\|") for line in comparison.markdown(found).splitlines()[:4]}) == 1


def write(root: Path, run: str, correct: float, *, test_set: str = "t" * 64) -> Path:
    """An eval artifact as `gmail eval` leaves it, with one model."""
    with Workspace(root, run).open(StageKey(stage="eval", settings={"correct": correct})) as slot:
        rows = scores.to_parquet(cell(correct).scores)
        assert rows is not None
        slot.write_parquet("queries/one.parquet", rows)
        about = {"task": "clip-text", "arm": "real", "seed": 0, "dual_projection": False}
        metrics = {"gap.generated-naive.paired_cosine": 0.52}
        results = {"protocol": "p/1", "test_set": test_set, "seed": 0, "metrics": metrics}
        slot.write_json("results.json", {**results, "cells": [{**about, "queries": "queries/one.parquet"}]})
        return slot.commit(summary={}).path


def test_the_command_finds_runs_by_name_folder_and_artifact(tmp_path: Path) -> None:
    write(tmp_path / "runs", "first", 0.5)
    path = write(tmp_path / "runs", "second", 0.7)
    wanted = json.loads(gmail("compare", "first", "second", "--json", cwd=tmp_path).stdout)
    for other in ("runs/second", str(path), "runs/second/eval/latest"):
        found = json.loads(gmail("compare", "first", other, "--json", cwd=tmp_path).stdout)
        assert found["comparisons"] == wanted["comparisons"]
    shown = gmail("compare", "old=first", "new=second", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^clip-text.real +text_to_image_recall_at_1 +new +", shown.stdout, re.MULTILINE)
    again = write(tmp_path / "runs", "second", 0.8)
    both = json.loads(gmail("compare", str(path), str(again), "--json", cwd=tmp_path).stdout)
    assert [row["label"] for row in both["runs"]] == [f"second/{each.name[:6]}" for each in (path, again)]


def test_a_folder_that_is_called_like_a_run_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [str(write(Path("runs"), run, correct)) for run, correct in (("first", 0.5), ("second", 0.7))]

    def compared(*runs: str) -> list[str]:
        return [each["path"] for each in compare.run(runs, root=Path("runs"), bootstrap=Bootstrap(draws=100))["runs"]]

    Path("second", "notes").mkdir(parents=True)
    Path("third").mkdir()
    assert compared("first", "second") == paths
    with pytest.raises(InputError, match="no evaluation of 'third' in runs"):
        compared("first", "third")
    here = str(write(Path(), "second", 0.9))
    for command in (compare.run, compare.report):
        with pytest.raises(InputError, match="'second' is a run in runs and a folder here") as caught:
            command(["first", "second"], root=Path("runs"))
        assert caught.value.hint == "Write runs/second or ./second."
    assert compared("runs/second", "./second") == [paths[1], here]


def test_the_command_says_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "runs", "first", 0.5)
    write(tmp_path / "runs", "other", 0.5, test_set="u" * 64)
    with monkeypatch.context() as before:
        before.setitem(artifacts.VERSIONS, "eval", 1)
        write(tmp_path / "runs", "old", 0.5)
    for arguments, message in (
        (("first", "third"), "error: no evaluation of 'third' in runs\nhint: Runs that have one: first, old, other."),
        (("first", "runs/first"), "which is compared already"),
        (("first", "other"), "were tested on different sets"),
        (("first", "old"), "was made by version 1 of `gmail eval`, and this gmail has version"),
    ):
        done = gmail("compare", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (3, "")
        assert message in done.stderr


def classified(share: float, seed: int) -> Cell:
    """A classifier that is right on about ``share`` of 90 images of one class and 30 of another, never of a third."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 2], [90, 30])
    right = (rng.random(120) < share * np.repeat([0.9, 0.5], [90, 30])).astype(float)
    found = {"m_mean_per_class_accuracy": Scores.per_class(right, labels=labels, classes=3, groups=np.arange(120))}
    table = scores.to_parquet(found)
    assert table is not None
    return Cell(task="clip", arm="real", seed=0, scores=scores.from_parquet(table))


def test_mean_per_class_accuracy_is_tested_in_pairs() -> None:
    """Against a plain loop over draws, after it has been stored; two seeds of the second system."""
    a, *b = (classified(share, seed) for share, seed in ((0.6, 0), (1.0, 1), (0.9, 2)))
    runs = [evaluation("a", a), evaluation("b", b[0]), evaluation("b", b[1], seed=1)]
    [row] = comparison.compare(runs, metrics=["m_mean_per_class_accuracy"], bootstrap=Bootstrap(draws=200))[
        "comparisons"
    ]
    right = [each.scores["m_mean_per_class_accuracy"].columns.toarray()[:, :3].sum(axis=1) for each in (a, *b)]
    labels = np.repeat([0, 2], [90, 30])

    def mean(values: np.ndarray, rows: np.ndarray) -> float:
        return float(np.mean([values[rows][labels[rows] == each].mean() for each in (0, 2)]))

    drawn = np.random.default_rng(0).integers(120, size=(200, 120))
    of_draw = [(mean(right[1], rows) + mean(right[2], rows)) / 2 - mean(right[0], rows) for rows in drawn]
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.quantile(of_draw, [0.025, 0.975])))
    whole = np.arange(120)
    assert row["difference"] == pytest.approx(
        (mean(right[1], whole) + mean(right[2], whole)) / 2 - mean(right[0], whole)
    )
    assert row["p_value"] == pytest.approx(1 / 201)


def test_the_report_of_runs_is_one_page_and_two_tables(tmp_path: Path) -> None:
    for run, correct in (("first", 0.5), ("<b>second", 0.7)):
        write(tmp_path / "runs", run, correct)
    done = gmail("report", "first", "<b>second", "--output", "out", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{Path('out') / 'report.html'}\n"), done.stderr
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<b>second" not in page
    assert "&lt;b&gt;second" in page
    assert "script" not in page
    assert "second against first: 1 measurably better, 0 worse, 0 without" in page
    [row] = comparison.compare([evaluation("a", cell(0.5)), evaluation("b", cell(0.7))])["comparisons"]
    assert f"{names.show('', row['difference'])} points above first" in page
    assert f"{100 * row['difference']:+.2f}" in page
    assert f"{100 * row['difference']:+.2f}" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert r"\toprule" in (tmp_path / "out" / "report.tex").read_text(encoding="utf-8")
    assert "0.520" in page, "the gap of each run"
    refused = gmail("report", "first", "--output", "out/report.md", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (4, "")
    assert "cannot write --output out/report.md" in refused.stderr
