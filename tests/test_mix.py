"""Several generators in one set, images that begin as real ones, prompts of class names."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_pipelines
from PIL import Image

from gmail_cli.artifacts import Artifact, Waiting, Workspace, canonical_json, digest_of_list
from gmail_cli.components import captions, pipelines
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import build, dump, loads
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import generate
from gmail_cli.stages.generate import checking, drawing, exporting, mixing, planning

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

MIX = [{"name": "plain", "share": 3}, {"name": "turbo", "model": "sdxl-turbo", "steps": 1, "guidance": 0.0}]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generators")
    for kind in ("sd1", "sdxl-turbo", "pixart-sigma"):
        small_pipelines.save(kind, folder / kind)
    return folder


def profile(folders: Path, mix: list[dict[str, Any]] | None = None, *, seed: int = 0, **changed: Any) -> Profile:
    chosen = {"model": str(folders / "sd1"), "steps": 2, "guidance": 3.0, "batch_size": 4, "per_caption": 2}
    mix = [each | ({"model": str(folders / each["model"])} if "model" in each else {}) for each in mix or ()]
    data = {"train": "scenes:train", "train_limit": 4, "scene_size": 24}
    return build({"data": data, "generate": {**chosen, "mix": mix, **changed}, "seed": seed})


def images(artifact: Artifact) -> dict[str, bytes]:
    assert artifact.verify() == []
    return {row["key"]: artifact.file(row["path"]).read_bytes() for row in artifact.read_jsonl("records.jsonl")}


# -- mixtures --------------------------------------------------------------------------------------------------


def test_each_image_of_a_mixture_is_the_one_that_its_generator_draws_alone(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    mixed = generate.run(profile(folders, MIX), Workspace(tmp_path), progress=lambda *at: told.append(at))
    assert told == sorted(told)
    assert told[-1] == (40, 40)
    records = mixed.read_jsonl("records.jsonl")
    counts = Counter(row["generator"] for row in records)
    assert counts == mixed.summary["generators"]
    assert set(counts) == {"plain", "turbo"}
    alone = {
        "plain": generate.run(profile(folders), Workspace(tmp_path / "alone")),
        "turbo": generate.run(
            profile(folders, model=str(folders / "sdxl-turbo"), steps=1, guidance=0.0), Workspace(tmp_path / "alone")
        ),
    }
    assert [row["key"] for row in records] == [row["key"] for row in alone["plain"].read_jsonl("records.jsonl")]
    bytes_of = {name: images(artifact) for name, artifact in alone.items()}
    found = images(mixed)
    assert all(found[row["key"]] == bytes_of[row["generator"]][row["key"]] for row in records)
    assert generate.plan_key(profile(folders, MIX)).digest == mixed.digest

    assert checking.regenerate(build({}), mixed, count=6) == []
    exporting.export(mixed, str(tmp_path / "set"))
    models = mixed.manifest["key"]["models"]
    import pyarrow.parquet as pq

    rows = pq.read_table(tmp_path / "set" / "images.parquet").to_pylist()
    assert [row["model"] for row in rows] == [models[f"{row['generator']}/generator"] for row in records]

    monkeypatch.setattr(drawing, "SHARD", 4)
    parts = [generate.run_part(profile(folders, MIX), Workspace(tmp_path / "parts"), part=(at, 2)) for at in (2, 1)]
    assert isinstance(parts[0], Waiting)
    assert isinstance(parts[1], Artifact)
    assert parts[1].content == mixed.content
    with monkeypatch.context() as patched:
        patched.setattr(pipelines, "load_pipeline", None)  # nothing is drawn
        assert generate.run(profile(folders, MIX), Workspace(tmp_path)).path == mixed.path
        assert checking.estimate(profile(folders, MIX), Workspace(tmp_path / "none"))["images"] == 40


def test_who_draws_an_image_depends_on_seed_caption_and_k_and_follows_the_shares() -> None:
    def drawn(mix: list[dict[str, Any]], limit: int = 500, *, seed: int = 0) -> dict[str, str]:
        data = {"train": "scenes:train", "train_limit": limit}
        mixture = generate._work(build({"data": data, "generate": {"mix": mix}, "seed": seed}))
        return {planned.key: name for name, work in mixture.works.items() for planned in work.plan}

    mix = [{"name": "a", "share": 1.0}, {"name": "b", "steps": 3, "share": 3.0}]
    many = drawn(mix)
    assert len(many) == 2500
    assert Counter(many.values())["b"] == pytest.approx(0.75 * 2500, abs=4 * (2500 * 0.75 * 0.25) ** 0.5)
    few = drawn(mix, limit=20)
    assert few.items() <= many.items()
    assert drawn(mix, seed=1) != many
    third = drawn([*mix, {"name": "c", "steps": 4, "share": 4.0}])
    assert {key for key, name in third.items() if name == "a"} < {key for key, name in many.items() if name == "a"}


def test_what_is_said_of_a_part_of_a_plan_is_what_its_images_say() -> None:
    """Told without making up a million names of files (`planning.Part`)."""
    data = {"train": "scenes:train", "train_limit": 30}
    whole = planning.plan(build({"data": data, "generate": {"per_caption": 3}}))
    for rows in (np.arange(len(whole)), np.flatnonzero(np.random.default_rng(0).random(len(whole)) < 0.2)):
        part = planning.Part(whole, rows)
        images = list(part)
        said = [[each.caption_id, each.caption, each.owner, each.label, each.k] for each in images]
        assert part.digest() == digest_of_list(canonical_json(each) for each in said)
        assert part.captions == len({each.caption_id for each in images})
        assert part.owners == len({each.owner for each in images})
    assert planning.Part(whole, np.arange(len(whole))).digest() == whole.digest()
    about = [(each.caption_id, each.caption, each.k) for each in whole]
    hashed = [hashlib.sha256(canonical_json(["mix", 7, *each]).encode()).digest()[:8] for each in about]
    places = list(mixing._places(whole, seed=7))
    assert places == pytest.approx([int.from_bytes(each, "big") / 2**64 for each in hashed])


def test_a_mixture_survives_the_profile_and_is_checked(folders: Path) -> None:
    mixed = profile(folders, [*MIX, {"name": "worded", "prompt_template": "a photo of {caption}"}])
    assert loads(dump(mixed), name="custom") == mixed
    assert planning.generators(mixed.generate)["turbo"].steps == 1
    assert planning.generators(mixed.generate)["worded"].steps == 2
    for wrong, said in (
        ([{"name": "a"}, {"name": "a"}], "names a generator twice: a, a"),
        ([{"name": "a", "step": 1}], r"unknown key 'generate\.mix\.0\.step'; did you mean 'steps'\?"),
        ([{"name": "a", "share": 0.0}], r"generate\.mix\.0\.share"),
        ([{"name": "a", "guidance": 1.0, "negative_prompt": "b"}], "negative_prompt has no effect"),
    ):
        with pytest.raises(UsageError, match=said):
            build({"generate": {"mix": wrong}})
    with pytest.raises(UsageError, match="mix names generators and source"):
        build({"generate": {"mix": MIX[:1], "source": "import", "import_path": "x"}})


# -- beginning with the real image -----------------------------------------------------------------------------


def test_images_begin_as_the_real_ones_and_move_with_the_strength(folders: Path, tmp_path: Path) -> None:
    """The small autoencoder is untrained, so what is compared is how far images lie from those of other strengths."""

    def drawn(strength: float, **changed: Any) -> dict[str, np.ndarray]:
        made = generate.run(profile(folders, strength=strength, steps=10, limit=2, **changed), Workspace(tmp_path))
        rows = made.read_jsonl("records.jsonl")
        assert {(row["width"], row["height"]) for row in rows} == {(32, 24) if changed else (16, 16)}
        return {row["key"]: np.asarray(Image.open(made.file(row["path"])), dtype=float) for row in rows}

    def apart(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> float:
        return float(np.mean([np.abs(left[key] - right[key]).mean() for key in left]))

    little, some, much = drawn(0.1), drawn(0.2), drawn(1.0)
    assert 0 < apart(little, some) < apart(little, much)
    drawn(0.5, width=32, height=24)
    again = profile(folders, strength=0.2, steps=10, limit=2)
    artifact = generate.run(again, Workspace(tmp_path))
    assert checking.regenerate(again, artifact, count=5) == []
    assert "partners" in artifact.manifest["key"]["inputs"]
    fewer = again.model_copy(update={"data": again.data.model_copy(update={"train_limit": 1})})
    with pytest.raises(InputError, match=r"scenes:train has no image 'train-00000\d' to begin with"):
        checking.regenerate(fewer, artifact, count=40)
    moved = again.model_copy(update={"data": again.data.model_copy(update={"scene_seed": 1})})
    assert generate.plan_key(moved).digest != artifact.digest


def test_a_set_without_images_and_a_family_that_begins_only_with_noise_are_refused(
    folders: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"generate\.strength: .* PixArtSigmaPipeline"):
        generate.run(profile(folders, model=str(folders / "pixart-sigma"), strength=0.5), Workspace(tmp_path))
    file = tmp_path / "captions.txt"
    file.write_text("a cat\n")
    texts = profile(folders, strength=0.5)
    texts = texts.model_copy(update={"data": texts.data.model_copy(update={"train": str(file)})})
    with pytest.raises(InputError, match="carries no images"):
        generate.plan_key(texts)


# -- class names -----------------------------------------------------------------------------------------------


def test_images_of_a_class_take_templates_in_turn(folders: Path, tmp_path: Path) -> None:
    file = tmp_path / "classes.jsonl"
    file.write_text("".join(json.dumps({"caption": name, "label": name}) + "\n" for name in ("tench", "goldfish")))

    def told(*templates: str, k: int) -> list[tuple[str, str]]:
        chosen = profile(folders, prompt_template=list(templates), per_caption=k)
        work = drawing.Work(chosen.model_copy(update={"data": captions_of(file)}))
        return [(job.prompt, planned.label) for job, planned in zip(work.jobs, work.plan, strict=True)]

    def captions_of(path: Path) -> Any:
        return build({"data": {"train": str(path)}}).data

    assert told("a {label}", "two of {label}", k=3) == [
        *(("a tench", "tench"), ("two of tench", "tench"), ("a tench", "tench")),
        *(("a goldfish", "goldfish"), ("two of goldfish", "goldfish"), ("a goldfish", "goldfish")),
    ]
    eighty = [prompt for prompt, label in told("openai-imagenet", k=80) if label == "tench"]
    assert len(set(eighty)) == 80
    assert all("tench" in prompt and "{" not in prompt for prompt in eighty)
    assert captions.read(file).class_names == ("goldfish", "tench")
    with pytest.raises(UsageError, match=r"imagenet-openai.* is none of openai-imagenet"):
        profile(folders, prompt_template="imagenet-openai")
    with pytest.raises(UsageError, match=r"'a \{label\}, \{\}' has \{\}, which is none of \{caption\}"):
        profile(folders, prompt_template="a {label}, {}")
