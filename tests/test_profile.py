"""Profiles: every shipped one loads, round trips hold, and errors name the key and the nearest known one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmail_cli import profile as profiles
from gmail_cli import shipped
from gmail_cli.errors import UsageError
from gmail_cli.profile.generation import Generator
from gmail_cli.profile.schema import SECTIONS, Profile

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.mark.parametrize("path", shipped.profiles().values(), ids=lambda path: path.stem)
def test_every_shipped_profile_loads_says_what_it_costs_and_survives_a_round_trip(path: Path) -> None:
    loaded = profiles.load(path)
    assert loaded.name == path.stem
    assert loaded.summary
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert profiles.loads(profiles.dump(loaded)) == loaded


@given(
    name=TEXT,
    train=TEXT,
    limit=st.integers(0, 2**40),
    holdout=st.floats(0, 1),
    seconds=st.floats(0, 1e12),
    stages=st.lists(st.sampled_from(["generate", "align", "train", "embed", "index", "eval"])),
)
def test_dump_then_load_gives_an_equal_profile(
    name: str, train: str, limit: int, holdout: float, seconds: float, stages: list[str]
) -> None:
    values: dict[str, Any] = {
        "name": name,
        "stages": stages,
        "data": {"train": train, "train_limit": limit, "holdout": holdout},
        "runtime": {"checkpoint_seconds": seconds},
    }
    built = profiles.build(values)
    assert profiles.loads(profiles.dump(built)) == built


def test_every_field_has_a_docstring_in_the_schema() -> None:
    schema = json.dumps(profiles.schema())
    for name in SECTIONS:
        section = Profile.model_fields[name].annotation
        assert section is not None
        for key, field in section.model_fields.items():
            assert field.description, f"{name}.{key} has no docstring"
            assert json.dumps(field.description)[1:-1] in schema
    assert all(field.description for field in Generator.model_fields.values())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.trian=1", "unknown key 'data.trian'; did you mean 'train'?"),
        ("modle.clip=x", "unknown key 'modle'; did you mean 'model'?"),
        ("data.train_limit=many", 'data.train_limit = "many"'),
        ("data.train_limit=-1", "greater than or equal to 0"),
        ("data.holdout=1.5", "less than or equal to 1"),
        ("data.train_limit", "not of the form key=value"),
        ("name.x=1", "'name' is not a section"),
        ("runtime.device=tpu", "'auto', 'cpu', 'cuda' or 'mps'"),
    ],
)
def test_a_bad_override_is_named(override: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        profiles.load("tiny", overrides=[override])
    assert expected in str(caught.value)
    assert str(caught.value).startswith("--set"), "it was typed, not read from the profile"


def test_a_bad_key_of_a_file_is_named_with_the_file() -> None:
    with pytest.raises(UsageError) as caught:
        profiles.loads("[data]\ntrian = 1\n", overrides=["data.limit=3"], origin="mine.toml")
    first, second = sorted(str(caught.value).splitlines())
    assert first.startswith("--set: unknown key 'data.limit'")
    assert second.startswith("mine.toml: unknown key 'data.trian'")


def test_a_bad_value_is_told_by_the_option_that_gave_it() -> None:
    given = {"overrides": ["data.train_limit=-1", "train.steps=0"], "options": {"data.train_limit": "--limit"}}
    with pytest.raises(UsageError) as caught:
        profiles.load("tiny", **given)
    assert [line.partition(" = ")[0] for line in str(caught.value).splitlines()] == [
        "--limit: data.train_limit",
        "--set: train.steps",
    ]
    with pytest.raises(UsageError, match=r"^--set: data\.train_limit = -2"):
        profiles.load("tiny", overrides=["data.train_limit=5", "data.train_limit=-2"], options=given["options"])


@pytest.mark.parametrize("moving", ["main", "master", "HEAD", "refs/pr/3"])
@pytest.mark.parametrize(
    "key",
    [
        *("model.revision", "train.lm_revision", "generate.revision", "generate.safety_revision"),
        "generate.rewrite.revision",
    ],
)
def test_a_revision_that_moves_is_refused(key: str, moving: str) -> None:
    with pytest.raises(UsageError, match=rf'^--set: {re.escape(key)} = "{moving}": a branch moves.* give a commit'):
        profiles.load("tiny", overrides=[f"{key}={moving}"])
    profiles.load("tiny", overrides=[f"{key}=4e63672c03103b6c636b8fb4119ba982469b2955"])


def test_overrides_take_toml_values_and_bare_strings() -> None:
    loaded = profiles.load("tiny", overrides=["data.train=some file.json", "data.train_limit=7", 'stages=["embed"]'])
    assert (loaded.data.train, loaded.data.train_limit, loaded.stages) == ("some file.json", 7, ("embed",))


def test_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GMAIL_PROFILE", raising=False)
    assert profiles.locate(None).stem == "tiny"
    (tmp_path / "gmail.toml").write_text('name = "here"')
    assert profiles.load().name == "here"
    (tmp_path / "other.toml").write_text("seed = 3")
    assert profiles.locate(None, environment={"GMAIL_PROFILE": "other.toml"}) == Path("other.toml")
    assert profiles.load(profiles.locate("other.toml", environment={"GMAIL_PROFILE": "tiny"})).seed == 3


def test_an_unknown_profile_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no profile 'tinny'") as caught:
        profiles.load("tinny")
    assert "Did you mean 'tiny'?" in caught.value.hint
    with pytest.raises(UsageError, match="GMAIL_PROFILE"):
        profiles.locate(None, environment={"GMAIL_PROFILE": "nowhere.toml"})


def test_broken_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[data\n")
    with pytest.raises(UsageError, match=r"broken\.toml is not valid TOML"):
        profiles.load(path)
    path.write_bytes(b'name = "\xff"')
    with pytest.raises(UsageError, match="not UTF-8"):
        profiles.load(path)


def test_what_is_held_out_does_not_move_with_the_seed() -> None:
    from gmail_cli.stages import sources

    first, second = (profiles.build({"data": {"train": "a.json", "holdout": 0.1}, "seed": seed}) for seed in (0, 1))
    for part in ("train", "test"):
        assert sources.source(first, part=part) == sources.source(second, part=part)
        assert sources.source(first, part=part)["holdout"][0] == part
