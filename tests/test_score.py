"""``gmail score``: numbers against peers and naive definitions, output, and every kind of bad file."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gmail_cli.cli import main
from gmail_cli.components.metrics.ptb import tokenise

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run ``gmail score ...`` in a folder of its own: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gmail", "score", *arguments])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def document(answer: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = answer
    assert code == 0, err
    return json.loads(out)


def coco(captions: dict[int, list[str]]) -> dict[str, Any]:
    annotations = [{"image_id": image, "caption": text} for image, texts in captions.items() for text in texts]
    return {
        "images": [{"id": image} for image in captions],
        "annotations": [{"id": n, **annotation} for n, annotation in enumerate(annotations)],
    }


def write(references: Any, results: Any) -> tuple[str, ...]:
    Path("references.json").write_text(references if isinstance(references, str) else json.dumps(references))
    Path("results.json").write_text(results if isinstance(results, str) else json.dumps(results))
    return ("captions", "--references", "references.json", "--results", "results.json", "--meteor", "off")


REFERENCES = {n: [f"a cat number {n} sits", f"the cat {n}"] for n in range(1, 9)}
RESULTS = [{"image_id": n, "caption": f"a cat {n} sits"} for n in REFERENCES]


# --- captions -----------------------------------------------------------------------------------------------


def test_captions_equal_pycocoevalcap(score: Run, shared_data: Path) -> None:
    """300 images of val2017, one caption of each against the others."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    captions: dict[int, list[str]] = {}
    for row in json.loads((shared_data / "coco" / "captions_val2017.json").read_text())["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    captions = dict(list(captions.items())[:300])
    results = [{"image_id": image, "caption": texts[0]} for image, texts in reversed(captions.items())]
    references = {image: texts[1:] for image, texts in captions.items()}
    found = document(score(*write(coco(references), results), "--json"))

    truths = {image: [tokenise(text) for text in texts] for image, texts in references.items()}
    hypotheses = {image: [tokenise(texts[0])] for image, texts in captions.items()}
    bleu, _ = Bleu(4).compute_score(truths, hypotheses, verbose=0)
    expected = dict(zip(("bleu_1", "bleu_2", "bleu_3", "bleu_4"), bleu, strict=True))
    expected |= {"rouge_l": Rouge().compute_score(truths, hypotheses)[0]}
    expected |= {"cider": Cider().compute_score(truths, hypotheses)[0]}
    assert found["metrics"] == pytest.approx(expected, abs=1e-6)
    assert 0 < found["metrics"]["bleu_4"] < 1 > found["metrics"]["rouge_l"]
    for name, (low, high) in found["intervals"].items():
        assert low < found["metrics"][name] < high
    assert {*found["intervals"]} == {*expected}
    assert found["n"]["images"] == 300
    assert found["protocol"] == "score-captions/1"


def test_meteor_is_there_with_java_and_explained_without(
    score: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = write(coco(REFERENCES), RESULTS)[:-2]
    monkeypatch.setenv("PATH", str(tmp_path))
    found = document(score(*arguments, "--json"))
    assert "meteor" not in found["metrics"]
    assert "no 'java' is on the PATH" in found["left_out"]["meteor"]
    assert "Stanford CoreNLP" in found["left_out"]["spice"]
    assert found["metrics"]["bleu_1"] > 0
    code, out, err = score(*arguments, "--meteor", "on")
    assert (code, out) == (4, "")
    assert "METEOR needs Java" in err


def test_images_without_references_are_counted_and_empty_captions_score_nothing(score: Run) -> None:
    results = [{**row, "caption": "" if row["image_id"] == 3 else row["caption"]} for row in RESULTS]
    found = document(score(*write(coco(REFERENCES | {77: []}), results), "--json"))
    assert found["n"] == {"images": 8, "references": 16, "images_without_references": 1}
    assert "1 images have an empty caption, which scores 0" in found["notes"]
    assert (
        found["metrics"]["rouge_l"] < document(score(*write(coco(REFERENCES), RESULTS), "--json"))["metrics"]["rouge_l"]
    )


@pytest.mark.parametrize(
    ("references", "results", "message"),
    [
        ("{", RESULTS, "references.json is not JSON"),
        ("", RESULTS, "references.json is not JSON"),
        ([], RESULTS, "references.json is not a COCO captions file"),
        ({"annotations": []}, RESULTS, "references.json is not a COCO captions file"),
        ({"images": [], "annotations": {}}, RESULTS, "references.json is not a COCO captions file"),
        ({"images": [{}], "annotations": []}, RESULTS, "images[0]: id is None, not a text or an integer"),
        ({"images": [{"id": 1}, {"id": 1}], "annotations": []}, RESULTS, "images[1] (id 1): duplicate id 1"),
        ({"images": [{"id": 1}], "annotations": [7]}, RESULTS, "annotations[0]: is 7, not an object"),
        (
            {"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "a cat"}]},
            RESULTS,
            "annotations[0]: image_id 2 is not among the images",
        ),
        (
            {"images": [{"id": 1}], "annotations": [{"id": 5, "image_id": 1, "caption": "a cat"}] * 2},
            RESULTS,
            "annotations[1]: duplicate id 5",
        ),
        (coco({1: [], 2: []}), RESULTS, "references.json holds no caption"),
        (coco({1: [" "]}), RESULTS, "annotations[0]: empty caption of image 1"),
        (coco(REFERENCES), "nonsense", "results.json is not JSON"),
        (coco(REFERENCES), "", "results.json is not JSON"),
        (coco(REFERENCES), {"1": "a cat"}, "results.json holds no list of results"),
        (coco(REFERENCES), [*RESULTS, "a cat"], "1 bad records in results.json:\n  [8]: is 'a cat', not an object"),
        (coco(REFERENCES), [{"caption": "a cat"}], "[0]: image_id is None, not a text or an integer"),
        (coco(REFERENCES), [{"image_id": True, "caption": "a cat"}], "[0]: image_id is True"),
        (coco(REFERENCES), [{"image_id": 1, "caption": None}], "[0]: the caption of image 1 is None, not a text"),
        (coco(REFERENCES), [*RESULTS, RESULTS[2]], "1 captions are for images that have one already: '3'"),
        (coco(REFERENCES), RESULTS[:2], "6 images of the references have no caption: 3, 4, 5, 6, 7, ..."),
        (coco(REFERENCES), [], "8 images of the references have no caption: 1, 2, 3, 4, 5, ..."),
        (
            coco(REFERENCES),
            [*RESULTS, {"image_id": 99, "caption": "a dog"}],
            "1 images are not among the references: 99",
        ),
    ],
)
def test_bad_caption_files_are_named(score: Run, references: Any, results: Any, message: str) -> None:
    code, out, err = score(*write(references, results))
    assert (code, out) == (3, "")
    assert err.startswith("error: ")
    assert message in err
    assert "\nhint: " in err


def test_missing_files_and_options(score: Run) -> None:
    write(coco(REFERENCES), RESULTS)
    assert score("captions", "--references", "none.json", "--results", "results.json")[0] == 3
    assert score("captions", "--references", "references.json", "--results", "none.json")[0] == 3
    assert score("captions", "--references", "references.json")[0] == 2
    assert score("fidelity", "--real", "a.npy", "--generated", "b.npy", "--neighbours", "0")[0] == 2
    code, out, err = score("gap", "--real", "a.npy", "--generated", "b.npy")
    assert (code, out) == (3, "")
    assert "error: cannot read a.npy as a .npy array: No such file or directory" in err


# --- embeddings ---------------------------------------------------------------------------------------------


def clouds(*, rows: int = 40, others: int = 40, dim: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    real = rng.normal(size=(rows, dim)).astype(np.float32)
    noise = rng.normal(size=(others, dim)).astype(np.float32)
    return real, real[np.arange(others) % rows] + 0.5 * noise + 0.3


def save(**arrays: Any) -> None:
    for name, array in arrays.items():
        np.save(f"{name}.npy", array)


RETRIEVAL = ("retrieval", "--images", "images.npy", "--texts", "texts.npy", "--owners", "owners.npy")
FIDELITY = ("fidelity", "--real", "real.npy", "--generated", "generated.npy")
GAP = ("gap", "--real", "real.npy", "--generated", "generated.npy")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_retrieval_equals_sorting_every_row(score: Run, dtype: type) -> None:
    rng = np.random.default_rng(1)
    images = (rng.normal(size=(30, 8)) * rng.uniform(0.1, 9, size=(30, 1))).astype(dtype)
    owners = rng.permutation(np.concatenate([np.arange(1, 30), rng.integers(1, 30, size=50)]))
    texts = (images[owners] / 4 + rng.normal(size=(79, 8))).astype(dtype)
    save(images=images, texts=texts, owners=owners.astype(np.int32))
    found = document(score(*RETRIEVAL, "--true-recall", "--json"))

    def unit(rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(np.float64)
        return rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))

    cosine = unit(texts) @ unit(images).T
    by_text, by_image = np.argsort(-cosine, axis=1), np.argsort(-cosine, axis=0).T[1:]
    first = [int(np.flatnonzero(owners[order] == image)[0]) + 1 for image, order in enumerate(by_image, start=1)]
    for k in (1, 5, 10):
        hit = np.mean([owner in order[:k] for owner, order in zip(owners, by_text, strict=True)])
        assert found["metrics"][f"text_to_image_recall_at_{k}"] == pytest.approx(hit)
        hit = np.mean([image in owners[order[:k]] for image, order in enumerate(by_image, start=1)])
        assert found["metrics"][f"image_to_text_recall_at_{k}"] == pytest.approx(hit)
        share = [np.sum(owners[o[:k]] == image) / np.sum(owners == image) for image, o in enumerate(by_image, start=1)]
        assert found["metrics"][f"image_to_text_true_recall_at_{k}"] == pytest.approx(np.mean(share))
    assert found["metrics"]["image_to_text_median_rank"] == np.median(first)
    assert found["metrics"]["image_to_text_mean_rank"] == pytest.approx(np.mean(first))
    assert found["n"] == {"images": 30, "texts": 79, "image_queries": 29, "images_without_text": 1}
    assert "1 images have no text: they are candidates for texts, and no queries" in found["notes"]
    assert "normalised in float32" in found["settings"]["similarity"]
    low, high = found["settings"]["norms_before"]["images"]
    assert low < 1 < high
    low, high = found["intervals"]["text_to_image_recall_at_1"]
    assert low < found["metrics"]["text_to_image_recall_at_1"] < high


def test_a_collapsed_model_is_not_perfect(score: Run) -> None:
    save(images=np.ones((20, 4)), texts=np.ones((40, 4)), owners=np.repeat(np.arange(20), 2))
    assert document(score(*RETRIEVAL, "--json"))["metrics"]["text_to_image_recall_at_1"] == pytest.approx(1 / 20)


def test_fidelity_says_what_its_numbers_depend_on(score: Run) -> None:
    real, generated = clouds(others=30)
    save(real=real, generated=generated.astype(np.float16))
    found = document(score(*FIDELITY, "--neighbours", "3", "--json"))
    assert {*found["metrics"]} == {
        "frechet_distance",
        "kernel_distance",
        "precision",
        "recall",
        "density",
        "coverage",
        "vendi_score",
        "real_vendi_score",
    }
    assert found["n"] == {"real": 40, "generated": 30}
    assert found["settings"]["neighbours"] == 3
    assert (found["settings"]["kernel_subsets"], found["settings"]["kernel_subset_size"]) == (100, 30)
    assert "here d = 6 and N = 30" in found["notes"][0]
    assert found["left_out"] == {}
    assert found["intervals"] == {}
    save(generated=real)
    same = document(score(*FIDELITY, "--json"))["metrics"]
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert same["vendi_score"] == same["real_vendi_score"]
    assert [same[name] for name in ("precision", "recall", "density", "coverage")] == [1, 1, 1, 1]


def test_gap_of_pairs_equals_its_definitions(score: Run) -> None:
    real, generated = clouds()
    save(real=real, generated=generated)
    found = document(score(*GAP, "--json"))
    x, y = real.astype(np.float64), generated.astype(np.float64)
    cosine = (x @ y.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)
    apart = cosine[~np.eye(40, dtype=bool)]
    metrics = found["metrics"]
    assert metrics["paired_cosine"] == pytest.approx(np.diag(cosine).mean())
    assert metrics["unpaired_cosine"] == pytest.approx(apart.mean())
    assert metrics["centroid_distance"] == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)))
    assert metrics["covariance_distance"] == pytest.approx(np.linalg.norm(np.cov(x.T) - np.cov(y.T)))
    assert {*metrics} == {
        "paired_cosine",
        "unpaired_cosine",
        "centroid_cosine",
        "centroid_distance",
        "covariance_distance",
        "frechet_distance",
        "maximum_mean_discrepancy",
        "linear_separability",
        "neighbour_separability",
    }
    assert found["settings"]["rows_are_pairs"] is True
    assert any("row i of both is taken as one pair" in note for note in found["notes"])
    assert any("not all of unit length" in note for note in found["notes"])
    assert {*found["intervals"]} == {"paired_cosine"}


def test_classification_of_features(score: Run) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120) * 2  # the numbers need not follow one another
    features = np.eye(6)[labels] * 4 + rng.normal(size=(120, 6))
    save(train=features[:80], train_labels=labels[:80], test=features[80:], test_labels=labels[80:])
    files = ("--train", "train.npy", "--train-labels", "train_labels.npy")
    tested = ("--test", "test.npy", "--test-labels", "test_labels.npy")
    found = document(score("classification", *files, *tested, "--neighbours", "5", "--json"))
    unit = features / np.linalg.norm(features, axis=1)[:, None]
    nearest = np.argsort(-(unit[80:] @ unit[:80].T), axis=1)[:, :5]
    votes = np.stack([(labels[nearest] == each).sum(axis=1) for each in (0, 2, 4)], axis=1)
    own = votes[np.arange(40), labels[80:] // 2]
    expected = ((own == votes.max(axis=1)) / (votes == votes.max(axis=1)[:, None]).sum(axis=1)).mean()
    assert found["metrics"]["nearest_neighbour_top_1_accuracy"] == pytest.approx(expected)
    assert {*found["metrics"]} == {
        f"{by}_{name}"
        for by in ("nearest_neighbour", "nearest_mean", "linear_probe")
        for name in ("top_1_accuracy", "mean_per_class_accuracy")
    }
    assert min(found["metrics"].values()) > 0.8
    assert found["n"] == {"train": 80, "test": 40, "classes": 3}
    weak = document(score("classification", *files, *tested, "--strength", "1e-6", "--json"))
    assert weak["settings"]["linear_probe"] != found["settings"]["linear_probe"]
    save(test_labels=np.where(labels[80:] == 2, 3, labels[80:]))
    code, _, err = score("classification", *files, *tested)
    assert (code, "test_labels.npy has class 3, which train_labels.npy lacks" in err) == (3, True)
    save(train_labels=labels[:80].astype(float))
    code, _, err = score("classification", *files, *tested)
    assert (code, "train_labels.npy holds no class numbers from 0" in err) == (3, True)
    save(train_labels=labels[:79], test_labels=labels[80:])
    code, _, err = score("classification", *files, *tested)
    assert (code, "labels have shape (79,)" in err) == (3, True)


def test_gap_of_sets_that_are_no_pairs(score: Run) -> None:
    real, generated = clouds(others=9)
    save(real=real, generated=generated)
    found = document(score(*GAP, "--json"))
    assert "paired_cosine" not in found["metrics"]
    assert found["left_out"]["paired_cosine"] == "40 real and 9 generated rows are no pairs"
    assert "9 rows of each set are fewer than 10" in found["left_out"]["linear_separability"]
    assert "unpaired_cosine" in found["metrics"]
    assert found["settings"]["compared_rows"] == 9


def test_tables_show_what_json_holds(score: Run) -> None:
    real, generated = clouds()
    save(real=real, generated=generated, images=real, texts=generated, owners=np.arange(40))
    for arguments in (write(coco(REFERENCES), RESULTS), RETRIEVAL, FIDELITY, GAP):
        found = document(score(*arguments, "--json"))
        code, out, err = score(*arguments)
        assert (code, err) == (0, "")
        assert out.startswith(found["protocol"] + ": ")
        for name, value in found["metrics"].items():
            (shown,) = re.findall(rf"^  {name} +(\S+)", out, re.MULTILINE)
            assert float(shown) == pytest.approx(value, abs=5e-5)
        for text in (*found["left_out"], *found["notes"], *found["settings"]):
            assert text in out


def pickled(path: str) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def npz(path: str) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones((3, 2)))
    Path(path).write_bytes(buffer.getvalue())


def cut_short(path: str) -> None:
    np.save(path, np.ones((9, 6)))
    Path(path).write_bytes(Path(path).read_bytes()[:-8])


def with_value(value: float, dtype: type = np.float32) -> np.ndarray:
    rows = np.ones((9, 6), dtype)
    rows[4, 2] = value
    return rows


@pytest.mark.parametrize("command", [FIDELITY, GAP, RETRIEVAL], ids=["fidelity", "gap", "retrieval"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (with_value(np.nan), "row 4 holds nan (column 2)"),
        (with_value(-np.inf, np.float16), "row 4 holds -inf (column 2)"),
        (with_value(1e300, np.float64), "row 4 holds 1e+300 (column 2); every value must be finite in float32"),
        (np.ones(9, np.float32), "an array of shape (9,) and type float32"),
        (np.ones((3, 3, 6), np.float32), "an array of shape (3, 3, 6)"),
        (np.ones((0, 6), np.float32), "an array of shape (0, 6)"),
        (np.ones((9, 0), np.float32), "an array of shape (9, 0)"),
        (np.ones((9, 6), np.int64), "type int64"),
        (np.ones((9, 6), np.complex64), "type complex64"),
        (np.full((9, 6), "a"), "type <U1"),
        (np.ones((9, 5), np.float32), "6 dimensions"),
        (pickled, "Object arrays cannot be loaded"),
        (npz, "as a .npy array: "),
        (cut_short, "as a .npy array: "),
        (lambda path: Path(path).write_bytes(b""), "as a .npy array: "),
        (lambda path: Path(path).write_text("1 2 3\n4 5 6\n"), "as a .npy array: "),
    ],
)
def test_bad_embeddings_are_named(score: Run, command: tuple[str, ...], bad: Any, message: str) -> None:
    save(real=np.eye(6), images=np.eye(6), owners=np.zeros(9, np.int64))
    path = command[4]
    bad(path) if callable(bad) else np.save(path, bad)
    code, out, err = score(*command)
    assert (code, out) == (3, "")
    assert err.startswith("error: ")
    assert path in err
    assert message in err
    assert "\nhint: " in err


@pytest.mark.parametrize(
    ("owners", "message"),
    [
        (np.arange(8), "owners has shape (8,) and type int64; expected integers of shape (9,)"),
        (np.arange(9.0), "owners has shape (9,) and type float64"),
        (np.zeros((9, 1), np.int64), "owners has shape (9, 1)"),
        (np.arange(9), "owners[6] is 6; rows go from 0 to 5"),
        (np.arange(-1, 8) % 6 - 1, "owners[1] is -1; rows go from 0 to 5"),
        (np.array(["a"] * 9), "owners has shape (9,) and type <U1"),
    ],
)
def test_bad_owners_are_named(score: Run, owners: np.ndarray, message: str) -> None:
    save(images=np.eye(6), texts=np.ones((9, 6)), owners=owners)
    code, out, err = score(*RETRIEVAL)
    assert (code, out) == (3, "")
    assert f"error: {message}" in err


def test_zero_vectors_have_no_cosine(score: Run) -> None:
    rows = np.ones((9, 6))
    rows[7] = 0
    save(images=np.eye(6), texts=rows, owners=np.arange(9) % 6, real=np.ones((9, 6)), generated=rows)
    code, _, err = score(*RETRIEVAL)
    assert code == 3
    assert "error: texts.npy: row 7 has length zero, so it has no cosine with anything" in err
    for command in (GAP, FIDELITY):
        code, _, err = score(*command)
        assert code == 3
        assert "vector 7 has length zero" in err


def test_too_few_rows_are_named(score: Run) -> None:
    save(real=np.eye(6), generated=np.eye(6)[:3])
    code, _, err = score(*FIDELITY)
    assert code == 3
    assert "3 generated images cannot have 5 nearest neighbours each" in err
    save(generated=np.eye(6)[:1])
    code, _, err = score(*GAP)
    assert code == 3
    assert "a covariance needs at least two rows" in err


# --- the guide ----------------------------------------------------------------------------------------------


def test_the_guide_runs_as_written(tmp_path: Path) -> None:
    """Console blocks of the section run in order, in one shell; each text block is what the block before it printed."""
    guide = (ROOT / "docs/guides/evaluate.md").read_text(encoding="utf-8")
    section = guide.partition("\n## Score what others made\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(console|text)\n(.*?)```", section, re.DOTALL)
    assert [kind for kind, _ in blocks].count("text") == 4
    tool = f'gmail() {{ "{sys.executable}" -m gmail_cli.cli "$@"; }}; python() {{ "{sys.executable}" "$@"; }}\n'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    printed = ""
    for kind, text in blocks:
        if kind == "text":
            assert printed == text
            continue
        done = subprocess.run(
            ["bash", "-e", "-c", tool + text],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        printed = done.stdout
