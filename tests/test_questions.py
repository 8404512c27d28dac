"""ScienceQA and MMMU: what counts as the answer, by hand; the files; CLIPScore."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gmail_cli.cli import main
from gmail_cli.components.metrics.answers import mmmu_choice, mmmu_open, science_qa_choice
from gmail_cli.components.metrics.clipscore import clip_score
from gmail_cli.components.questions import DISCIPLINES
from gmail_cli.errors import InputError, UsageError
from gmail_cli.stages import score


@pytest.mark.parametrize(
    ("response", "choices", "expected"),
    [
        ("B", 3, 1),
        (" C\n", 3, None),  # a line end becomes ". ", as in LLaVA's script
        (" C ", 3, 2),
        ("D", 3, None),
        ("A. because", 2, 0),
        ("B\nbecause", 2, 1),
        ("A.", 2, None),
        ("So the answer is A.", 2, None),
        ("The answer is A or so. The answer is B.", 2, 1),
        ("I think. The answer is B", 2, 1),
        ("The answer is F.", 5, None),
        ("b", 2, None),
        ("", 2, None),
    ],
)
def test_science_qa_answers(response: str, choices: int, expected: int | None) -> None:
    assert science_qa_choice(response, choices=choices) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", 1),
        ("(B).", 1),
        ("Not (A) but (C), I think (A) is wrong", 0),  # the last one named
        ("A or B", 1),
        ("The answer is (B) and not A ", 1),  # brackets come before bare letters
        ("It must be the blue whale, clearly so", 2),
        ("blue whale", None),  # five words or fewer are not searched for the options' texts
        ("E", None),
        ("", None),
    ],
)
def test_mmmu_choices(response: str, expected: int | None) -> None:
    assert mmmu_choice(response, options=["ant", "bee", "Blue Whale", "cat"]) == expected


@pytest.mark.parametrize(
    ("response", "answers", "right"),
    [
        ("The result is 3.14159", ["3.14"], True),
        ("1,234 units", ["1234"], True),
        ("x = 5\ny = 7", ["7"], True),
        ("x = 5\ny = 7", ["5"], False),  # an equals sign counts in the last line alone
        ("x is 5\ny is 7", ["5"], True),
        ("so y is 7", ["y"], False),
        ("final blue final  =", ["blue"], True),  # nothing after the last word: the whole counts
        ("The answer is Paris.", ["paris"], True),
        ("London", ["paris"], False),
        ("It is 1e3", ["1000"], True),
        ("thus 0.001", ["0"], True),  # two decimals
        ("maybe rome", ["Paris", "Rome"], True),
        ("", ["x y"], False),
    ],
)
def test_mmmu_open_answers(response: str, answers: list[str], right: bool) -> None:
    assert mmmu_open(response, answers=answers) is right


def test_mmmu_has_thirty_subjects_in_six_disciplines() -> None:
    assert [len(subjects) for subjects in DISCIPLINES.values()] == [4, 5, 5, 5, 4, 7]


def science_qa(folder: Path) -> Path:
    folder.mkdir()
    problem = {"choices": ["x", "y"], "question": "?", "answer": 1}
    problems = {
        "1": {**problem, "subject": "natural science", "grade": "grade2", "hint": "h", "image": None},
        "2": {**problem, "subject": "social science", "grade": "grade7", "hint": "", "image": "image.png"},
        "3": {**problem, "subject": "natural science", "grade": "grade12", "hint": "", "image": None, "answer": 0},
        "4": {**problem, "subject": "language science", "grade": "grade1", "hint": "", "image": None},
    }
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["1", "2", "3"], "train": ["4"]}))
    return folder


def write_lines(file: Path, responses: dict[str, str]) -> Path:
    file.write_text("\n".join(json.dumps({"question_id": key, "text": text}) for key, text in responses.items()))
    return file


def test_science_qa_is_scored_by_subject_context_and_grade(tmp_path: Path) -> None:
    folder = science_qa(tmp_path / "sqa")
    given = write_lines(tmp_path / "answers.jsonl", {"3": "B", "1": "The answer is B.", "2": "hm"})
    found = score.questions(folder, predictions=given)
    assert found.protocol == "score-scienceqa/1"
    assert found.metrics == pytest.approx(
        {
            "accuracy": 1 / 3,
            "natural_science_accuracy": 1 / 2,
            "text_context_accuracy": 1,
            "grades_1_to_6_accuracy": 1,
            "social_science_accuracy": 0,
            "image_context_accuracy": 0,
            "grades_7_to_12_accuracy": 0,
            "no_context_accuracy": 0,
            "answered_share": 2 / 3,
        }
    )
    assert found.n["natural_science"] == 2
    low, high = found.intervals["accuracy"]
    assert low <= 1 / 3 <= high
    assert score.questions(folder, predictions=write_lines(given, {"4": "B"}), split="train").metrics["accuracy"] == 1


def mmmu(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [
        {
            "id": "validation_Math_1",
            "options": "['1', '2', '3', '4']",
            "answer": "B",
            "question_type": "multiple-choice",
        },
        {"id": "validation_Art_Theory_2", "options": "['a', 'b']", "answer": "A", "question_type": "multiple-choice"},
        {"id": "validation_Math_3", "options": "[]", "answer": "['7', 'seven']", "question_type": "open"},
    ]
    rows[0] |= changes
    pq.write_table(pa.Table.from_pylist(rows), folder / "validation-00000-of-00001.parquet")
    return folder


def test_mmmu_is_scored_by_discipline_and_a_guess_counts_as_its_expectation(tmp_path: Path) -> None:
    given = tmp_path / "answers.json"
    given.write_text(
        json.dumps(
            {"validation_Math_1": "no idea", "validation_Art_Theory_2": "(A)", "validation_Math_3": "It is seven"}
        )
    )
    found = score.questions(mmmu(tmp_path / "mmmu"), predictions=given)
    assert found.protocol == "score-mmmu/1"
    assert found.metrics == pytest.approx(
        {
            "accuracy": (0.25 + 1 + 1) / 3,
            "science_accuracy": 1.25 / 2,
            "multiple_choice_accuracy": 1.25 / 2,
            "art_and_design_accuracy": 1,
            "open_accuracy": 1,
            "answered_share": 2 / 3,
        }
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"1": "A", "2": "B"}', "1 questions have no response: 3"),
        ('{"1": "A", "2": "B", "3": "A", "9": "A"}', "1 questions are not in the set: 9"),
        ('{"1": "A", "2": "B", "3": 1}', "question 3 has response 1, which is no text"),
        ('{"question_id": "1", "text": "A"}\n{"question_id": "1", "text": "A"}', "question 1 has a second response"),
        ('[{"id": "1", "text": "A"}]', "holds no responses"),
        ("A", "holds no responses"),
    ],
)
def test_responses_that_do_not_fit_are_named(tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "answers.json"
    file.write_text(content)
    with pytest.raises(InputError, match=problem):
        score.questions(science_qa(tmp_path / "sqa"), predictions=file)


def test_questions_that_are_bad_are_named(tmp_path: Path) -> None:
    given = write_lines(tmp_path / "answers.jsonl", {"1": "A"})
    folder = science_qa(tmp_path / "sqa")
    with pytest.raises(InputError, match="has no split 'tets'") as caught:
        score.questions(folder, predictions=given, split="tets")
    assert caught.value.hint == "There are: test, train."
    (folder / "pid_splits.json").write_text('{"test": ["5"]}')
    with pytest.raises(InputError, match="problem 5 has no choices"):
        score.questions(folder, predictions=given)
    with pytest.raises(InputError, match="is no set of questions"):
        score.questions(tmp_path, predictions=given)
    for changes, problem in (
        ({"answer": "?"}, "validation_Math_1 has no answer"),
        ({"answer": "E"}, "has answer 'E' and 4 options"),
        ({"options": "__import__('os')"}, "has answer 'B' and 0 options"),
        ({"id": "validation_Math_3"}, "holds question 'validation_Math_3' twice"),
    ):
        with pytest.raises(InputError, match=problem):
            score.questions(mmmu(tmp_path / "mmmu", **changes), predictions=given)
    pq.write_table(pa.table({"image": [1]}), tmp_path / "mmmu" / "validation-00000-of-00001.parquet")
    with pytest.raises(InputError, match="as MMMU"):
        score.questions(tmp_path / "mmmu", predictions=given)


def test_the_command_holds_a_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    science_qa(tmp_path / "sqa")

    def run(*more: str) -> int:
        monkeypatch.setattr(
            sys, "argv", ["gmail", "score", "qa", "--questions", "sqa", "--predictions", "a.jsonl", *more]
        )
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    write_lines(Path("a.jsonl"), {"1": "B", "2": "B", "3": "A"})
    assert run("--json") == 0
    Path("base.json").write_text(capsys.readouterr().out)
    assert run("--baseline", "base.json") == 0
    write_lines(Path("a.jsonl"), {"1": "B", "2": "A", "3": "A"})
    capsys.readouterr()
    assert run("--baseline", "base.json", "--tolerance", "accuracy=50") == 5
    assert "social_science_accuracy" in capsys.readouterr().err


# -- CLIPScore ---------------------------------------------------------------------------------------------------


def test_clip_scores_by_hand(tmp_path: Path) -> None:
    arrays = {
        "images": np.array([[2.0, 0], [0, 1], [1, 0]]),
        "captions": np.array([[3.0, 4], [0, 5], [-1, 0.5]]),
        "references": np.array([[0.0, 1], [1, 0], [0, 1], [1, 0], [1, 0]]),
        "owners": np.array([0, 0, 1, 2, 2]),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    files = {name: tmp_path / f"{name}.npy" for name in arrays}
    found = score.clipscore(**files).metrics
    first = 2.5 * 0.6
    assert found["clip_score"] == pytest.approx((first + 2.5 + 0) / 3)
    harmonic = 2 * first * 0.8 / (first + 0.8)
    assert found["ref_clip_score"] == pytest.approx((harmonic + 2 * 2.5 * 1 / 3.5 + 0) / 3)
    alone = score.clipscore(files["images"], captions=files["captions"])
    assert alone.left_out == {"ref_clip_score": "no references given"}
    assert alone.metrics == {"clip_score": found["clip_score"]}
    with pytest.raises(UsageError, match="go together"):
        score.clipscore(files["images"], captions=files["captions"], owners=files["owners"])
    np.save(files["owners"], np.array([0, 0, 2, 2, 2]))
    with pytest.raises(InputError, match="1 images have no reference, first row 1"):
        score.clipscore(**files)
    with pytest.raises(InputError, match="row i of both is one pair"):
        clip_score(np.eye(3), captions=np.eye(3)[:2])
