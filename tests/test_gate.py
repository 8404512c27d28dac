"""What counts as a fall, and how it is shown: table, JUnit XML, GitHub annotations; the options on both commands."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from gmail_cli.cli import main
from gmail_cli.components import gate
from gmail_cli.components.gate import Check
from gmail_cli.errors import InputError, UsageError

BASE = {"clip-text.real.text_to_image_recall_at_1": 0.50, "clipcap.real.cider": 1.0, "gap.real.centroid_distance": 0.1}


@pytest.mark.parametrize(
    ("now", "tolerance", "fallen"),
    [
        ({}, {}, []),
        ({"clipcap.real.cider": 0.995}, {}, ["clipcap.real.cider"]),
        ({"clipcap.real.cider": 0.995}, {"cider": 0.5}, []),
        ({"clipcap.real.cider": 0.9949}, {"cider": 0.5}, ["clipcap.real.cider"]),
        ({"clipcap.real.cider": 0.99}, {"all": 1.0}, []),
        ({"clipcap.real.cider": 0.99}, {"all": 1.0, "clipcap.real.cider": 0.1}, ["clipcap.real.cider"]),
        ({"gap.real.centroid_distance": 0.9}, {}, []),
        ({"gap.real.centroid_distance": 0.9}, {"centroid_distance": 1.0}, ["gap.real.centroid_distance"]),
        ({"gap.real.centroid_distance": 0.01}, {"centroid_distance": 0.0}, []),
        ({"clipcap.real.cider": 2.0}, {}, []),
    ],
)
def test_what_counts_as_a_fall(now: dict[str, float], tolerance: dict[str, float], fallen: list[str]) -> None:
    found = gate.compare({**BASE, **now}, baseline=BASE, tolerance=tolerance)
    assert [check.metric for check in found if check.fell] == fallen


def test_a_short_name_holds_for_the_metrics_of_all_models() -> None:
    before = {f"clip.{arm}.text_to_image_recall_at_1": 0.5 for arm in ("none", "real")} | {"clipcap.real.cider": 1.0}
    now = {name: value - 0.01 for name, value in before.items()}
    found = gate.compare(now, baseline=before, tolerance={"text_to_image_recall_at_1": 1.0})
    assert [check.metric for check in found if check.fell] == ["clipcap.real.cider"]
    assert len(found) == 3


@pytest.mark.parametrize("name", ["frechet_distance", "kernel_distance", "text_to_image_median_rank", "mean_rank"])
def test_a_lower_distance_or_rank_is_no_fall(name: str) -> None:
    [lower] = gate.compare({name: 1.0}, baseline={name: 2.0}, tolerance={})
    [higher] = gate.compare({name: 2.0}, baseline={name: 1.0}, tolerance={})
    assert (lower.fell, higher.fell) == (False, True)
    assert not gate.lower_is_better("text_to_image_mean_reciprocal_rank")


def test_a_metric_that_is_gone_is_a_fall() -> None:
    now = {name: value for name, value in BASE.items() if "cider" not in name}
    found = gate.compare(now, baseline=BASE, tolerance={"all": 5})
    assert [str(check) for check in found if check.fell] == ["clipcap.real.cider: 100.00 -> missing"]


def test_a_tolerance_for_nothing_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="Did you mean 'cider'"):
        gate.compare(BASE, baseline=BASE, tolerance={"cidre": 1.0})
    with pytest.raises(UsageError, match="cider=-1 is negative"):
        gate.compare(BASE, baseline=BASE, tolerance={"cider": -1.0})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a x/1 document"),
        ('{"schema": "x/1"}', "holds no metrics"),
        ('{"schema": "x/1", "metrics": {"a": NaN}}', "metric a is nan, not a number"),
        ('{"schema": "x/1", "metrics": {"a": "1"}}', "metric a is '1', not a number"),
    ],
)
def test_bad_baselines_are_named(tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "baseline.json"
    file.write_text(content)
    with pytest.raises(InputError, match=problem):
        gate.read(file, schema="x/1", hint="")


CHECKS = [
    Check("clip.real.recall", 0.5, 0.48, 0.5),
    Check("clip.real.other", 0.5, 0.5, 0),
    Check("clip.none.<&\x01", 0.5, None, 0),
]


def test_the_table_lines_up() -> None:
    lines = gate.table(CHECKS).splitlines()
    assert lines[0].split() == ["metric", "baseline", "now", "change", "allowed"]
    assert lines[1].split() == ["clip.real.recall", "50.00", "48.00", "-2.00", "0.5"]
    assert lines[3].split()[1:] == ["50.00", "missing", "0"]
    assert len({len(line) for line in lines}) == 1


def test_junit_is_xml_whatever_the_names_are() -> None:
    suites = ET.fromstring(gate.junit(CHECKS, suite="gmail.eval"))
    assert (suites.get("tests"), suites.get("failures")) == ("3", "2")
    cases = suites.findall("testsuite/testcase")
    assert [case.get("name") for case in cases] == ["recall", "other", "<&\ufffd"]
    assert cases[0].get("classname") == "gmail.eval.clip.real"
    assert [case.find("failure") is not None for case in cases] == [True, False, True]
    assert cases[0].find("failure").get("message") == "clip.real.recall: 50.00 -> 48.00 (-2.00, allowed 0.5)"  # type: ignore[union-attr]


def test_annotations_are_one_line_each_and_at_most_ten() -> None:
    assert gate.github_annotations(CHECKS[:1], title="a, b: c") == [
        "::error title=a%2C b%3A c::clip.real.recall: 50.00 -> 48.00 (-2.00, allowed 0.5)"
    ]
    assert gate.github_annotations(CHECKS[1:2], title="t") == ["::notice title=t::1 metrics held"]
    many = [Check(f"a\n::error::{n}%", 1.0, 0.0, 0) for n in range(12)]
    lines = gate.github_annotations(many, title="t")
    assert len(lines) == 10
    assert lines[0] == "::error title=t::a%0A::error::0%25: 100.00 -> 0.00 (-100.00, allowed 0)"
    assert lines[-1] == "::error title=t::3 more metrics fell; the log lists them"
    assert len(gate.github_annotations(many[:10], title="t")) == 10


# -- the options -------------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run ``gmail score retrieval ...`` in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("images.npy", rng.normal(size=(40, 4)))
    np.save("owners.npy", np.arange(40))
    save_texts(noise=0.3)

    def run(*arguments: str) -> tuple[int, str, str]:
        files = ("--images", "images.npy", "--texts", "texts.npy", "--owners", "owners.npy")
        monkeypatch.setattr(sys, "argv", ["gmail", "score", "retrieval", *files, *arguments])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


def save_texts(*, noise: float, count: int = 40) -> None:
    images = np.load("images.npy")
    np.save("texts.npy", images[:count] + noise * np.random.default_rng(1).normal(size=(count, 4)))
    np.save("owners.npy", np.arange(count))


def test_scores_are_held_against_what_json_printed(score: Run) -> None:
    code, out, _ = score("--json")
    Path("base.json").write_text(out)
    code, out, err = score("--baseline", "base.json")
    assert (code, err) == (0, "12 metrics held against base.json\n")
    save_texts(noise=0.9)
    code, out, err = score("--baseline", "base.json", "--junit", "gate.xml", "--annotations", "github", "--json")
    assert code == 5
    now = json.loads(out)["metrics"]
    before = json.loads(Path("base.json").read_text())["metrics"]
    fallen = {
        name for name in now if (now[name] - before[name]) * (-1 if re.search("(mean|median)_rank", name) else 1) < 0
    }
    assert len(fallen) >= 8
    assert set(re.findall(r"^  (\w+) +[\d.]+ +[\d.]+ ", err, re.MULTILINE)) == fallen
    assert err.count("::error title=score-retrieval/1::") == min(10, len(fallen))
    assert int(ET.parse("gate.xml").getroot().get("failures", "")) == len(fallen)
    code, _, err = score("--baseline", "base.json", "--tolerance", "all=100000")
    assert code == 0, err


def test_scores_of_other_files_are_not_comparable(score: Run) -> None:
    Path("base.json").write_text(score("--json")[1])
    save_texts(noise=0.3, count=39)
    code, _, err = score("--baseline", "base.json")
    assert code == 3
    assert "error: the baseline base.json was measured with n {'images': 40, 'texts': 40" in err
    save_texts(noise=0.3)
    document = json.loads(Path("base.json").read_text())
    document["settings"] |= {"hit": "all right answers", "dim": 512}
    Path("base.json").write_text(json.dumps(document))
    code, _, err = score("--baseline", "base.json")
    assert code == 3
    assert "measured with hit 'all right answers', this one with 'any right answer among the first k'" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--junit", "gate.xml"), 2, "error: --junit gate.xml without --baseline"),
        (("--annotations", "github"), 2, "error: --annotations github without --baseline"),
        (("--tolerance", "all=1"), 2, "error: --tolerance all=1 without --baseline"),
        (("--baseline", "base.json", "--tolerance", "recall"), 2, "error: --tolerance 'recall' is not METRIC=POINTS"),
        (("--baseline", "base.json", "--tolerance", "recal=1"), 2, "error: tolerance 'recal' is no metric"),
        (("--baseline", "no.json"), 3, "error: cannot read the baseline no.json"),
        (("--baseline", "base.json", "--junit", "no/gate.xml"), 4, "error: cannot write --junit no/gate.xml"),
    ],
)
def test_options_that_cannot_work(score: Run, arguments: tuple[str, ...], code: int, message: str) -> None:
    Path("base.json").write_text(score("--json")[1])
    found, out, err = score(*arguments)
    assert found == code
    assert message in err
    assert (out == "") == (code != 4), "what is wrong with the options is said before anything is measured"
