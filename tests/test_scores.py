"""Scores of arms worked by hand: means, seeds, comparisons, shares, the modality gap."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_evaluate import table

from gmail_cli.components import measure, scores
from gmail_cli.components.metrics.intervals import Bootstrap
from gmail_cli.components.scores import Cell, Scores


def of(*values: float) -> Scores:
    return Scores.mean(np.array(values), groups=np.arange(len(values)))


def three_arms(naive: Scores, aligned: Scores, real: Scores) -> list[Cell]:
    arms = {"generated-naive": naive, "generated-aligned": aligned, "real": real}
    return [Cell(task="clip-text", arm=arm, seed=0, scores={"cider": each}) for arm, each in arms.items()]


def test_a_mean_and_its_interval_resample_images_not_queries() -> None:
    same = Scores.mean(np.array([1.0, 1, 0, 0]), groups=np.array([0, 0, 1, 1]))
    low, high = same.interval(Bootstrap(draws=400))
    assert same.value == 0.5
    assert (low, high) == (0.0, 1.0)  # two images only: each draw is 0, 0.5 or 1
    assert Scores.whole(0.3, queries=4).interval(Bootstrap(draws=400)) == (None, None)


def test_seeds_are_averaged_query_by_query_and_by_statistic() -> None:
    assert scores.over_seeds([of(1, 0, 0), of(1, 1, 0)]).values.tolist() == [1.0, 0.5, 0.0]
    ratio = Scores(columns=np.array([[1.0, 2.0], [1, 2]]), groups=np.arange(2), statistic=lambda s: s[:, 0] / s[:, 1])
    other = replace(ratio, columns=np.array([[3.0, 4.0], [3, 4]]))
    assert scores.over_seeds([ratio, other]).value == pytest.approx((0.5 + 0.75) / 2)


def test_results_by_hand() -> None:
    ones, zeros = np.ones(50), np.zeros(50)
    naive = of(*np.concatenate([ones[:20], zeros[:30]]))  # 0.4
    aligned = of(*np.concatenate([ones[:35], zeros[:15]]))  # 0.7
    real = of(*np.concatenate([ones[:40], zeros[:10]]))  # 0.8
    found = scores.results(three_arms(naive, aligned, real), protocol="p/1", bootstrap=Bootstrap(draws=500, level=0.9))
    assert found["metrics"] == pytest.approx(
        {"clip-text.generated-naive.cider": 0.4, "clip-text.generated-aligned.cider": 0.7, "clip-text.real.cider": 0.8}
    )
    [against_naive, against_real] = found["comparisons"]
    assert (against_naive["baseline"], against_real["baseline"]) == ("generated-naive", "real")
    assert against_naive["difference"] == pytest.approx(0.3)
    assert against_real["difference"] == pytest.approx(-0.1)
    assert 0 < against_naive["low"] < 0.3 < against_naive["high"]
    assert against_naive["by_seed"] == pytest.approx([0.3])
    [share] = found["shares"]
    assert share["share"] == pytest.approx(0.75)
    assert share["low"] < 0.75 < share["high"] <= 1
    assert {row["protocol"] for row in found["rows"]} == {"p/1"}


def test_there_is_no_share_where_real_is_not_better_than_naive() -> None:
    found = scores.results(
        three_arms(of(1, 0, 1, 0), of(1, 1, 1, 0), of(1, 0, 0, 1)),
        protocol="p",
        bootstrap=Bootstrap(draws=200),
    )
    assert found["shares"][0]["share"] is None


def test_p_values_are_corrected_for_all_comparisons() -> None:
    values = np.random.default_rng(0).random(60)
    cells = three_arms(of(*values), of(*(values + 0.05 * np.sin(np.arange(60)))), of(*(values + 0.2)))
    found = scores.results(cells, protocol="p", bootstrap=Bootstrap(draws=500))["comparisons"]
    assert [row["p_value"] for row in found][1] == pytest.approx(2 / 501)  # the smaller of two p = 1/501, times two


def test_an_arm_with_one_seed_stands_beside_every_seed_and_a_missing_seed_compares_nothing() -> None:
    cells = [Cell(task="clipcap", arm="generated-aligned", seed=seed, scores={"cider": of(1, 1, 0)}) for seed in (0, 1)]
    none = Cell(task="clipcap", arm="none", seed=None, scores={"cider": of(0, 1, 0)})
    naive = [Cell(task="clipcap", arm="generated-naive", seed=seed, scores={"cider": of(1, 0, 0)}) for seed in (0, 5)]
    found = scores.results([*cells, none, *naive], protocol="p", bootstrap=Bootstrap(draws=200))["comparisons"]
    assert [(row["baseline"], row["by_seed"]) for row in found] == [("none", pytest.approx([1 / 3, 1 / 3]))]


def test_dual_projection_is_compared_with_itself_and_else_without() -> None:
    def cell(arm: str, dual: bool, *values: float) -> Cell:
        return Cell(task="clipcap", arm=arm, seed=0, dual_projection=dual, scores={"cider": of(*values)})

    cells = [
        cell("generated-aligned", True, 1, 1, 0, 1),
        cell("generated-naive", False, 0, 0, 0, 1),
        cell("real", False, 1, 1, 1, 1),
        cell("real", True, 1, 1, 0, 1),
    ]
    found = scores.results(cells, protocol="p", bootstrap=Bootstrap(draws=200))["comparisons"]
    assert {row["baseline"]: row["difference"] for row in found} == {
        "generated-naive": pytest.approx(0.5),
        "real": 0.0,
    }


def test_mean_per_class_weighs_classes_not_images() -> None:
    from gmail_cli.components.metrics.classification import classify

    found = classify(np.array([[1.0, 0], [1, 0], [1, 0], [1, 0]]), labels=np.array([0, 0, 0, 1]))
    measured = measure.classified(found, prefix="")
    assert measured["top_1_accuracy"].value == 0.75
    assert measured["mean_per_class_accuracy"].value == 0.5
    low, high = measured["mean_per_class_accuracy"].interval(Bootstrap(draws=200))
    assert low is not None
    assert high is not None
    assert 0 <= low <= 0.5 <= high <= 1


def test_the_gap_is_measured_on_pairs_held_out_of_alignment_where_they_are_enough() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((120, 8)).astype(np.float32)
    far = np.concatenate([vectors[:60], -vectors[60:]])
    for held, expected in ((60, 1.0), (20, 0.0)):
        rows = [{"id": str(row), "held_out": row < held} for row in range(120)]
        real, generated = (table(name, v, rows, "image", "real") for name, v in (("gap-real", vectors), ("gap", far)))
        assert measure.modality_gap(real, generated=generated)["paired_cosine"].value == pytest.approx(
            expected, abs=1e-5
        )


def test_the_gap_of_a_collapsed_encoder_and_of_few_images_leaves_out_what_is_not_defined() -> None:
    rows = [{"id": str(row)} for row in range(30)]
    flat = table("flat", np.ones((30, 8)), rows, "image", "real")
    found = measure.modality_gap(flat, generated=flat)
    assert "maximum_mean_discrepancy" not in found, "no scale"
    assert found["vendi_score"].value == pytest.approx(1)
    few = table("few", np.eye(8)[:5], rows[:5], "image", "real")
    assert {"frechet_distance", "maximum_mean_discrepancy"} <= set(measure.modality_gap(few, generated=few))
    assert "precision" not in measure.modality_gap(few, generated=few), "5 images have no 5 neighbours"
