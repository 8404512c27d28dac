"""`gmail embed`: which tables, what is in them, resume, and the real-encoder rule."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_clips import VIT

from gmail_cli import profile as profiles
from gmail_cli.artifacts import Artifact, StageKey, Workspace
from gmail_cli.components import captions as reader
from gmail_cli.components import encoders, tables
from gmail_cli.components.tables import Table
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import Profile
from gmail_cli.stages import embed

TEST, TRAIN = 6, 8


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three random models: f_r, f_g and a trained cell."""
    folders = {}
    for seed, name in enumerate(("f_r", "f_g", "cell")):
        folders[name] = tmp_path_factory.mktemp(name)
        encoders.save_clip(encoders.build_clip(VIT, seed=seed), folders[name])
    return folders


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("runs"), "test")


@pytest.fixture(scope="module")
def generated(workspace: Workspace) -> Artifact:
    """Two images of each training scene: the scene itself, byte for byte."""
    scenes = reader.read("scenes:train", limit=TRAIN, scene_size=32)
    with workspace.open(StageKey(stage="generate", version=1, settings={})) as slot:
        records = []
        for row, image in enumerate(scenes.images):
            for caption in scenes.captions_of(image.id)[:2]:
                path = f"images/000/{len(records)}.png"
                slot.write_bytes(path, scenes.image_bytes(row))
                records.append(
                    {
                        "key": f"key{len(records)}",
                        "caption_id": caption.id,
                        "caption": caption.text,
                        "owner": image.id,
                        "label": image.label,
                        "k": 0,
                        "seed": 1,
                        "sha256": hashlib.sha256(scenes.image_bytes(row)).hexdigest(),
                        "path": path,
                        "width": 32,
                        "height": 32,
                    }
                )
        slot.write_jsonl("records.jsonl", records)
        return slot.commit(summary={})


def _model_artifact(
    workspace: Workspace, stage: str, folders: dict[str, Path], cells: list[dict[str, Any]]
) -> Artifact:
    with workspace.open(StageKey(stage=stage, version=1, settings={})) as slot:
        for name, source in folders.items():
            clip = encoders.load_clip(source)
            slot.write_folder(name, lambda folder, clip=clip: encoders.save_clip(clip, folder))
        slot.write_json("cells.json", cells)
        return slot.commit(summary={})


@pytest.fixture(scope="module")
def aligned(workspace: Workspace, clips: dict[str, Path]) -> Artifact:
    return _model_artifact(workspace, "align", {"clip": clips["f_g"]}, [])


@pytest.fixture(scope="module")
def train(workspace: Workspace, clips: dict[str, Path]) -> Artifact:
    rows = [("clip-text", "f_r"), ("clip", "own"), ("clipcap", "f_r")]
    cells = [
        {"name": f"{task}.real.seed0", "folder": f"{task}.real.seed0", "task": task, "arm": "real", "seed": 0}
        | {"dual_projection": False, "image_encoder": encoder}
        for task, encoder in rows
    ]
    folders = {f"{row['folder']}/clip": clips["cell"] for row in cells if row["task"] != "clipcap"}
    return _model_artifact(workspace, "train", folders, cells)


def _profile(clips: dict[str, Path], **changes: Any) -> Profile:
    return profiles.build(
        {
            "data": {
                "train": "scenes:train",
                "train_limit": TRAIN,
                "test": "scenes:test",
                "test_limit": TEST,
                "scene_size": 32,
            },
            "model": {"clip": str(clips["f_r"])},
            "embed": {"batch_size": 4, **changes},
            "align": {"validation": 0.5},
            "runtime": {"device": "cpu"},
        }
    )


def _tables(artifact: Artifact) -> dict[str, Table]:
    return {name: Table.load(artifact.folder(name)) for name in artifact.summary["tables"]}


@pytest.fixture(scope="module")
def whole(
    clips: dict[str, Path], workspace: Workspace, generated: Artifact, aligned: Artifact, train: Artifact
) -> Artifact:
    return embed.run(_profile(clips), workspace, generated=generated, aligned=aligned, train=train)


def test_a_run_makes_every_table_its_inputs_call_for(whole: Artifact):
    found = _tables(whole)
    assert set(found) == {
        *("test-images", "test-texts", "test-classes"),
        *("test-texts@clip-text.real.seed0", "test-classes@clip-text.real.seed0"),
        *("test-images@clip.real.seed0", "test-texts@clip.real.seed0", "test-classes@clip.real.seed0"),
        *("gap-real", "gap-generated-naive", "gap-generated-aligned"),
    }
    assert whole.verify() == []
    images, texts = found["test-images"], found["test-texts"]
    assert len(images.ids) == TEST
    assert {row["kind"] for row in texts.rows} == {"short", "long"}
    assert {row["owner"] for row in texts.rows} == set(images.ids)
    long = [row["truncated"] for row in texts.rows if row["kind"] == "long"]
    assert all(long), "32 positions cannot hold a long caption"
    assert 0 < whole.summary["truncated_share"]["test-texts"] <= 1


def test_tables_that_may_be_compared_share_a_space(whole: Artifact):
    found = _tables(whole)
    tables.require_same_space(found["test-images"], found["test-texts@clip-text.real.seed0"])
    tables.require_same_space(found["test-images@clip.real.seed0"], found["test-texts@clip.real.seed0"])
    with pytest.raises(InputError, match="space"):
        tables.require_same_space(found["test-images"], found["test-texts@clip.real.seed0"])
    with pytest.raises(InputError, match="generated"):
        tables.require_same_space(found["gap-generated-aligned"], found["test-texts"])


def test_each_table_comes_from_its_own_encoder(whole: Artifact, clips: dict[str, Path]):
    found, models = _tables(whole), {name: encoders.load_clip(folder) for name, folder in clips.items()}
    test = reader.read("scenes:test", limit=TEST, scene_size=32)
    train = reader.read("scenes:train", limit=TRAIN, scene_size=32)
    rows = {image.id: row for row, image in enumerate(train.images)}

    def images(data: reader.Dataset, model: str, ids: list[str]) -> np.ndarray:
        place = {image.id: row for row, image in enumerate(data.images)}
        return encoders.embed_images(models[model], lambda row: data.image_bytes(place[ids[row]]), len(ids))

    def check(name: str, expected: np.ndarray) -> None:
        np.testing.assert_allclose(found[name].vectors, expected, atol=1e-6, err_msg=name)

    ids = found["test-images"].ids
    assert ids == [image.id for image in test.images]
    check("test-images", images(test, "f_r", ids))
    check("test-images@clip.real.seed0", images(test, "cell", ids))
    texts = [row["text"] for row in found["test-texts"].rows]
    check("test-texts", encoders.embed_texts(models["f_r"], texts)[0])
    check("test-texts@clip-text.real.seed0", encoders.embed_texts(models["cell"], texts)[0])
    prompts = found["test-classes"].rows
    assert prompts[0]["text"] == f"a photo of a {prompts[0]['label']}."
    assert [row["label"] for row in prompts] == list(test.class_names)

    partners = found["gap-real"].ids
    assert sorted(partners) == sorted(rows)  # one pair for each real image
    assert partners == [row["owner"] for row in found["gap-generated-naive"].rows]
    held = [row["held_out"] for row in found["gap-real"].rows]
    assert held == sorted(held, reverse=True)
    assert True in held
    check("gap-real", images(train, "f_r", partners))
    check("gap-generated-naive", images(train, "f_r", partners))  # the generated images are copies of the real ones
    check("gap-generated-aligned", images(train, "f_g", partners))


def test_captions_alone_make_texts_alone(clips: dict[str, Path], workspace: Workspace, tmp_path: Path):
    file = tmp_path / "captions.txt"
    file.write_text("a cat\na dog\n")
    artifact = embed.run(profiles.build({**_profile(clips).model_dump(), "data": {"test": str(file)}}), workspace)
    assert artifact.summary["tables"] == {"test-texts": 2}


def test_real_images_through_f_g_only_when_asked(
    clips: dict[str, Path], workspace: Workspace, whole: Artifact, aligned: Artifact
):
    tuned = _profile(clips, real_encoder="tuned")
    with pytest.raises(UsageError, match="align artifact"):
        embed.run(tuned, workspace)
    made = _tables(embed.run(tuned, workspace, aligned=aligned))["test-images"]
    original = _tables(whole)["test-images"]
    assert made.header.encoder_digest == encoders.model_digest(clips["f_g"]) != original.header.encoder_digest
    assert np.abs(made.vectors - original.vectors).max() > 1e-2


def test_an_interrupted_run_keeps_whole_tables(
    clips: dict[str, Path], tmp_path: Path, whole: Artifact, workspace: Workspace, monkeypatch: pytest.MonkeyPatch,
    generated: Artifact, aligned: Artifact, train: Artifact,
):  # fmt: skip
    other, profile = Workspace(tmp_path, "test"), _profile(clips)
    done: list[str] = []
    original: Callable[..., Table] = embed._embed

    def stops(wanted: Any, *args: Any, **kwargs: Any) -> Table:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(wanted.name)
        return original(wanted, *args, **kwargs)

    inputs = {"generated": generated, "aligned": aligned, "train": train}
    monkeypatch.setattr(embed, "_embed", stops)
    with pytest.raises(KeyboardInterrupt):
        embed.run(profile, other, **inputs)
    rest: list[str] = []
    monkeypatch.setattr(embed, "_embed", lambda each, *a, **k: (rest.append(each.name), original(each, *a, **k))[1])
    artifact = embed.run(profile, other, **inputs)
    assert not set(done) & set(rest)
    assert artifact.content == whole.content


@pytest.mark.parametrize(
    "changes", [{"dtype": "float16"}, {"templates": ["a {}"]}, {"gap_count": 3}, {"batch_size": 5}]
)
def test_every_setting_changes_digest_and_result(
    changes: dict[str, Any], clips: dict[str, Path], workspace: Workspace, whole: Artifact, generated: Artifact
):
    base = embed.run(_profile(clips), workspace, generated=generated)
    profile = _profile(clips, **changes)
    artifact = embed.run(profile, workspace, generated=generated)
    assert artifact.digest == embed.plan_key(profile, generated=generated.digest).digest != base.digest
    if "batch_size" not in changes:  # which may move the last bits only
        assert artifact.content != base.content
    if "dtype" in changes:
        assert {table.vectors.dtype for table in _tables(artifact).values()} == {np.dtype(np.float16)}
    if "gap_count" in changes:
        assert artifact.summary["tables"]["gap-real"] == 3


def test_templates_must_name_the_class(clips: dict[str, Path]):
    with pytest.raises(UsageError, match="must hold {} once"):
        _profile(clips, templates=["a photo"])


def test_bf16_on_a_cpu_is_refused(clips: dict[str, Path], workspace: Workspace):
    with pytest.raises(UsageError, match="bf16"):
        embed.run(_profile(clips, precision="bf16"), workspace)
