"""`gmail embed`: which tables, what is in them, resume, and the real-encoder rule."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from small_clips import VIT

from gmail_cli import plan
from gmail_cli import profile as profiles
from gmail_cli.artifacts import Artifact, StageKey, Waiting, Workspace, disk
from gmail_cli.components import captions as reader
from gmail_cli.components import clip_files, embedding, tables
from gmail_cli.components.images import GeneratedSet
from gmail_cli.components.tables import Table
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import embed
from gmail_cli.stages.embed.jobs import Job

TEST, TRAIN = 6, 8


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three random models: f_r, f_g and a trained cell."""
    folders = {}
    for seed, name in enumerate(("f_r", "f_g", "cell")):
        folders[name] = tmp_path_factory.mktemp(name)
        clip_files.save_clip(clip_files.build_clip(VIT, seed=seed), folders[name])
    return folders


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("runs"), "test")


@pytest.fixture(scope="module")
def generated(workspace: Workspace) -> Artifact:
    """Two images of each training scene: the scene itself, byte for byte."""
    scenes = reader.read("scenes:train", limit=TRAIN, scene_size=32)
    with workspace.open(StageKey(stage="generate", settings={})) as slot:
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
    workspace: Workspace, stage: str, folders: dict[str, Path], cells: list[dict[str, Any]], **key: Any
) -> Artifact:
    with workspace.open(StageKey(stage=stage, **{"settings": {}, **key})) as slot:
        for name, source in folders.items():
            clip = clip_files.load_clip(source)
            slot.write_folder(name, lambda folder, clip=clip: clip_files.save_clip(clip, folder))
        slot.write_json("cells.json", cells)
        return slot.commit(summary={})


@pytest.fixture(scope="module")
def aligned(workspace: Workspace, clips: dict[str, Path]) -> Artifact:
    return _model_artifact(workspace, "align", {"clip": clips["f_g"]}, [], models=_models(clips))


def _models(clips: dict[str, Path]) -> dict[str, str]:
    return {"clip": clip_files.model_digest(clips["f_r"])}


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
    tables.require_same_space(found["gap-real"], found["gap-generated-aligned"])


def test_each_table_comes_from_its_own_encoder(whole: Artifact, clips: dict[str, Path]):
    found, models = _tables(whole), {name: clip_files.load_clip(folder) for name, folder in clips.items()}
    test = reader.read("scenes:test", limit=TEST, scene_size=32)
    train = reader.read("scenes:train", limit=TRAIN, scene_size=32)
    rows = {image.id: row for row, image in enumerate(train.images)}

    def images(data: reader.Dataset, model: str, ids: list[str]) -> np.ndarray:
        place = {image.id: row for row, image in enumerate(data.images)}
        return embedding.embed_images(models[model], lambda row: data.image_bytes(place[ids[row]]), len(ids))

    def check(name: str, expected: np.ndarray) -> None:
        np.testing.assert_allclose(found[name].vectors, expected, atol=1e-6, err_msg=name)

    ids = found["test-images"].ids
    assert ids == [image.id for image in test.images]
    check("test-images", images(test, "f_r", ids))
    check("test-images@clip.real.seed0", images(test, "cell", ids))
    texts = [row["text"] for row in found["test-texts"].rows]
    check("test-texts", embedding.embed_texts(models["f_r"], texts)[0])
    check("test-texts@clip-text.real.seed0", embedding.embed_texts(models["cell"], texts)[0])
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
    assert made.header.flow == "generated"
    assert made.header.encoder_digest == clip_files.model_digest(clips["f_g"]) != original.header.encoder_digest
    assert np.abs(made.vectors - original.vectors).max() > 1e-2


# -- shards ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(clips: dict[str, Path], workspace: Workspace, generated: Artifact, aligned: Artifact) -> Artifact:
    """A run in shards of 4 rows, never interrupted."""
    return embed.run(_profile(clips, shard_rows=4), workspace, generated=generated, aligned=aligned)


def test_shards_move_no_row(sharded: Artifact, whole: Artifact):
    expected = _tables(whole)
    for name, table in _tables(sharded).items():
        assert table.rows == expected[name].rows
        np.testing.assert_allclose(table.vectors, expected[name].vectors, atol=1e-6, err_msg=name)


def _embed_until_killed(at: int, profile: Profile, workspace: Workspace, inputs: dict[str, Artifact]) -> None:
    """Embed, and die at the ``at``-th time that something is flushed to disk and not yet renamed."""
    flush, left = disk.fsync, itertools.count(at - 1, -1)

    def deadly(path: Path) -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(path)

    disk.fsync = deadly
    embed.run(profile, workspace, **inputs)


def test_killed_again_and_again_a_run_loses_one_shard_at_a_time(
    clips: dict[str, Path], tmp_path: Path, sharded: Artifact, generated: Artifact, aligned: Artifact,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    profile, workspace = _profile(clips, shard_rows=4), Workspace(tmp_path, "test")
    inputs = {"generated": generated, "aligned": aligned}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gmail_cli.stages.embed", "gmail_cli.components.clip_files", "open_clip"])
    scratch = workspace.folder("embed") / f"{sharded.digest[:12]}.partial" / "scratch" / "shards"
    there: list[set[str]] = []
    for at in (3, 6, 11):  # in a shard of images, between the files of a table, in a shard of texts
        child = context.Process(target=_embed_until_killed, args=(at, profile, workspace, inputs))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        there.append({f"{file.parent.name}/{int(file.stem)}" for file in scratch.rglob("*.safetensors")})
    assert there[-1], "the last kill must leave shards to reuse"
    assert there[0] == {"test-images/0"}, "one shard done, the second one lost"
    asked: set[str] = set()
    fill = Job.fill

    def record(job: Any, shards: Any, *, progress: Any) -> None:
        asked.update(f"{job.wanted.name}/{shard.start}" for shard in shards)
        fill(job, shards, progress=progress)

    monkeypatch.setattr(Job, "fill", record)
    artifact = embed.run(profile, workspace, **inputs)
    assert artifact.content == sharded.content
    assert not asked & there[-1]
    assert not any(name.startswith("test-images/") for name in asked), "that table was whole"
    assert artifact.verify() == []


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_embedded_apart_end_in_the_bytes_of_one_process(
    parts: int, clips: dict[str, Path], tmp_path: Path, sharded: Artifact, generated: Artifact, aligned: Artifact
):
    profile, workspace = _profile(clips, shard_rows=4), Workspace(tmp_path, "test")
    inputs = {"generated": generated, "aligned": aligned}
    found = [embed.run_part(profile, workspace, part=(part, parts), **inputs) for part in range(parts, 0, -1)]
    counts = [each.done for each in found[:-1] if isinstance(each, Waiting)]
    assert len(counts) == parts - 1, "only the last one finds every shard done"
    assert counts == sorted(set(counts))
    assert isinstance(found[-1], Artifact)
    assert found[-1].content == sharded.content
    again = embed.run_part(profile, workspace, part=(1, parts), **inputs)
    assert isinstance(again, Artifact)
    assert again.path == found[-1].path


def test_a_run_without_part_finishes_what_parts_left(
    clips: dict[str, Path], tmp_path: Path, sharded: Artifact, generated: Artifact, aligned: Artifact
):
    profile, workspace = _profile(clips, shard_rows=4), Workspace(tmp_path, "test")
    inputs = {"generated": generated, "aligned": aligned}
    waiting = embed.run_part(profile, workspace, part=(2, 3), **inputs)
    assert isinstance(waiting, Waiting)
    assert 0 < waiting.done < waiting.shards
    assert workspace.is_partial(waiting.key)
    assert embed.run(profile, workspace, **inputs).content == sharded.content


def test_parts_run_at_once(
    clips: dict[str, Path], tmp_path: Path, sharded: Artifact, generated: Artifact, aligned: Artifact
):
    profile, workspace = _profile(clips, shard_rows=4), Workspace(tmp_path, "test")
    context = multiprocessing.get_context("forkserver")
    options = {"generated": generated, "aligned": aligned}
    children = [
        context.Process(target=embed.run_part, args=(profile, workspace), kwargs={"part": (part, 2), **options})
        for part in (1, 2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    made = workspace.latest("embed")
    assert made is not None, "whoever finished last has merged"
    assert made.content == sharded.content


@pytest.mark.parametrize("part", [(0, 2), (3, 2)])
def test_parts_that_do_not_exist_are_refused(part: tuple[int, int], clips: dict[str, Path], workspace: Workspace):
    with pytest.raises(UsageError, match=f"part {part[0]} of 2"):
        embed.run_part(_profile(clips), workspace, part=part)


def test_a_damaged_shard_is_embedded_again(clips: dict[str, Path], tmp_path: Path, whole: Artifact):
    profile, workspace = _profile(clips, shard_rows=4), Workspace(tmp_path, "test")
    waiting = embed.run_part(profile, workspace, part=(1, 2))
    assert isinstance(waiting, Waiting)
    shard = next(workspace.folder("embed").rglob("test-images/000000000000.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(InputError, match="rows 0 to 3 of test-images are damaged"):
        embed.run(profile, workspace)
    np.testing.assert_allclose(
        _tables(embed.run(profile, workspace))["test-images"].vectors, _tables(whole)["test-images"].vectors, atol=1e-6
    )


def test_tables_are_read_by_numpy_and_pyarrow(sharded: Artifact):
    from pyarrow import json as arrow_json

    folder = sharded.folder("test-texts")
    table = Table.load(folder)
    mapped = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
    assert isinstance(table.vectors, np.memmap), "vectors are mapped, not read"
    assert np.array_equal(mapped, table.vectors)
    rows = arrow_json.read_json(folder / "rows.jsonl")
    assert rows["id"].to_pylist() == table.ids
    assert rows["truncated"].to_pylist() == [row["truncated"] for row in table.rows]


def test_clip_retrieval_reads_an_export(sharded: Artifact, tmp_path: Path):
    from pyarrow import parquet

    left_out = embed.export(sharded, tmp_path / "out")
    folder = tmp_path / "out"
    (images,) = (np.load(file, mmap_mode="r") for file in sorted((folder / "img_emb").glob("*.npy")))
    (texts,) = (np.load(file, mmap_mode="r") for file in sorted((folder / "text_emb").glob("*.npy")))
    metadata = parquet.read_table(folder / "metadata", columns=["image_path", "caption"]).to_pylist()
    found = _tables(sharded)
    assert len(images) == len(texts) == len(metadata) == TEST
    assert np.array_equal(images, found["test-images"].vectors)
    assert [row["image_path"] for row in metadata] == found["test-images"].ids
    place = {row["id"]: at for at, row in enumerate(found["test-texts"].rows)}
    for row, vector in zip(metadata, texts, strict=True):
        own = [each for each in found["test-texts"].rows if each["owner"] == row["image_path"]]
        assert row["caption"] == own[0]["text"]
        assert np.array_equal(vector, found["test-texts"].vectors[place[own[0]["id"]]])
    assert left_out == len(place) - TEST
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"], "no temporary folder stays"
    with pytest.raises(UsageError, match="there already"):
        embed.export(sharded, tmp_path / "out")


def test_texts_alone_are_exported_alone(
    clips: dict[str, Path], workspace: Workspace, tmp_path: Path, aligned: Artifact
):
    from pyarrow import parquet

    file = tmp_path / "captions.txt"
    file.write_text("a cat\na dog\n")
    artifact = embed.run(profiles.build({**_profile(clips).model_dump(), "data": {"test": str(file)}}), workspace)
    assert embed.export(artifact, tmp_path / "out") == 0
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["metadata", "text_emb"]
    captions = parquet.read_table(tmp_path / "out" / "metadata")["caption"].to_pylist()
    assert captions == ["a cat", "a dog"]
    with pytest.raises(InputError, match="holds no embeddings"):
        embed.export(aligned, tmp_path / "other")


# -- labelled training images ------------------------------------------------------------------------------------


def _labelled(clips: dict[str, Path], **changes: Any) -> Profile:
    base = _profile(clips, train_count=30).model_dump()
    return profiles.build({**base, "data": {**base["data"], "train_limit": 60, "test_limit": 3, **changes}})


def test_labelled_training_images_go_through_the_encoders_of_the_test_images(
    clips: dict[str, Path], workspace: Workspace, train: Artifact
):
    made = embed.run(_labelled(clips), workspace, train=train)
    assert made.digest == embed.plan_key(_labelled(clips), train=train.digest).digest
    found = _tables(made)
    scenes = reader.read("scenes:train", limit=60, scene_size=32)
    rows = np.linspace(0, 59, 30).astype(int)
    for name, model in (("train-images", "f_r"), ("train-images@clip.real.seed0", "cell")):
        table, images = found[name], found[name.replace("train", "test")]
        assert table.rows == [{"id": scenes.images[row].id, "label": scenes.images[row].label} for row in rows]
        assert table.header.encoder_digest == images.header.encoder_digest
        expected = embedding.embed_images(
            clip_files.load_clip(clips[model]), lambda place: scenes.image_bytes(rows[place]), len(rows)
        )
        np.testing.assert_allclose(table.vectors, expected, atol=1e-6)
    assert not any(name.startswith("train-images@clip-text") for name in found)


def test_training_images_without_the_classes_of_the_test_set_are_refused(
    clips: dict[str, Path], workspace: Workspace, tmp_path: Path
):
    with pytest.raises(InputError, match=r"have class '\w+', and none of the 2 training images taken has it"):
        embed.run(_labelled(clips, train_limit=2, test_limit=TEST), workspace)
    scenes = reader.read("scenes:train", limit=2, scene_size=32)
    for row, image in enumerate(scenes.images):
        (tmp_path / f"{image.id}.png").write_bytes(scenes.image_bytes(row))
    with pytest.raises(InputError, match=r"embed.train_count = 30, and .* has no labels"):
        embed.run(_labelled(clips, train=str(tmp_path), train_limit=0), workspace)
    unlabelled = _labelled(clips, test=str(tmp_path), test_limit=0)  # nothing to classify
    assert set(_tables(embed.run(unlabelled, workspace))) == {"test-images"}


# -- flows -------------------------------------------------------------------------------------------------------


def test_generated_images_go_through_f_g(
    clips: dict[str, Path], workspace: Workspace, generated: Artifact, aligned: Artifact, train: Artifact
):
    base = _profile(clips).model_dump()
    given = profiles.build({**base, "data": {"test": str(generated.path)}, "embed": {"flow": "generated"}})
    with pytest.raises(UsageError, match="needs an align artifact"):
        embed.run(given, workspace, generated=generated)
    made = embed.run(given, workspace, generated=generated, aligned=aligned, train=train)
    assert made.digest == embed.plan_key(given, aligned=aligned.digest).digest
    assert made.manifest["key"]["settings"]["flow"] == "generated"
    found = _tables(made)
    assert set(found) == {"test-images", "test-texts", "test-classes"}, "a generated set is embedded alone"
    images = GeneratedSet.load(generated.path)
    assert found["test-images"].ids == [row.key for row in images.rows]
    assert [row["owner"] for row in found["test-texts"].rows] == [row.key for row in images.rows]
    assert found["test-images"].header.flow == "generated"
    f_g = embedding.embed_images(clip_files.load_clip(clips["f_g"]), images.image_bytes, len(images))
    np.testing.assert_allclose(found["test-images"].vectors, f_g, atol=1e-6)
    through_f_r = given.model_copy(update={"embed": _profile(clips).embed})
    naive = _tables(embed.run(through_f_r, workspace))["test-images"]
    assert naive.header.flow == "real"
    f_r = embedding.embed_images(clip_files.load_clip(clips["f_r"]), images.image_bytes, len(images))
    np.testing.assert_allclose(naive.vectors, f_r, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "float16"}, {"templates": ["a {}"]}, {"gap_count": 3}, {"batch_size": 5}, {"shard_rows": 3}],
)
def test_every_setting_changes_digest_and_result(
    changes: dict[str, Any], clips: dict[str, Path], workspace: Workspace, whole: Artifact, generated: Artifact
):
    base = embed.run(_profile(clips), workspace, generated=generated)
    profile = _profile(clips, **changes)
    artifact = embed.run(profile, workspace, generated=generated)
    assert artifact.digest == embed.plan_key(profile, generated=generated.digest).digest != base.digest
    if not {"batch_size", "shard_rows"} & set(changes):  # which may move the last bits only
        assert artifact.content != base.content
    if "dtype" in changes:
        assert {table.vectors.dtype for table in _tables(artifact).values()} == {np.dtype(np.float16)}
    if "gap_count" in changes:
        assert artifact.summary["tables"]["gap-real"] == 3


def test_templates_must_name_the_class(clips: dict[str, Path]):
    with pytest.raises(UsageError, match=r"must hold \{\} once"):
        _profile(clips, templates=["a photo"])


def test_bf16_computes_in_rounded_weights_and_is_refused_where_it_is_slow(
    clips: dict[str, Path], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    mkldnn = torch.ops.mkldnn
    monkeypatch.setattr(mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(UsageError, match=r"embed\.precision = 'bf16'"):
        embed.run(_profile(clips, precision="bf16"), workspace)
    monkeypatch.setattr(mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    exact, rounded = (_tables(embed.run(_profile(clips, precision=each), workspace)) for each in ("fp32", "bf16"))
    for name, table in rounded.items():
        assert table.vectors.dtype == np.float32
        cosine = (table.vectors * exact[name].vectors).sum(axis=1)
        assert 0.99 < cosine.min() < cosine.max()
        assert np.abs(np.linalg.norm(table.vectors, axis=1) - 1).max() < 1e-6, "normalised in fp32"
        assert not np.array_equal(table.vectors, exact[name].vectors)


def test_a_table_that_is_there_is_copied(
    clips: dict[str, Path], generated: Artifact, aligned: Artifact, tmp_path: Path
):
    """Another alignment embeds through f_g alone; the bytes are those of a run that embeds everything."""
    said: list[str] = []
    space = Workspace(tmp_path, "sweep", tell=said.append)
    embed.run(_profile(clips), space, generated=generated, aligned=aligned)
    assert said == []
    other = _model_artifact(
        Workspace(tmp_path, "other"),
        "align",
        {"clip": clips["cell"]},
        [],
        settings={"another": True},
        models=_models(clips),
    )
    copied = embed.run(_profile(clips), space, generated=generated, aligned=other)
    names = [text.removeprefix("reusing ").split(" of embed/")[0] for text in said]
    assert {*copied.summary["tables"]} - {*names} == {"gap-generated-aligned"}
    alone = embed.run(_profile(clips), Workspace(tmp_path / "alone", "r"), generated=generated, aligned=other)
    assert copied.content == alone.content
    smaller = embed.run(_profile(clips, batch_size=2), space, generated=generated, aligned=other)
    assert smaller.digest != copied.digest
    assert len(said) == len(names), "other batches move the last bits"


def test_f_g_of_another_model_is_refused(clips: dict[str, Path], workspace: Workspace, aligned: Artifact):
    others = {**clips, "f_r": clips["cell"]}
    with pytest.raises(InputError, match="was aligned from another model"):
        embed.run(_profile(others), workspace, aligned=aligned)


def test_random_weights_are_told_once(tmp_path: Path) -> None:
    (tmp_path / "small-random.json").write_text(json.dumps(VIT["model_cfg"]))
    open_clip.add_model_config(tmp_path / "small-random.json")
    (tmp_path / "captions.txt").write_text("A red ball on grass.\nA blue cube on snow.\n")
    said = "model.clip = 'small-random' is an architecture without weights, so they are random"
    for clip, heard in (("small-random", 1), ("small-random", 0), ("tiny", 0)):
        told: list[str] = []
        profile = profiles.build({"data": {"test": str(tmp_path / "captions.txt")}, "model": {"clip": clip}})
        space = Workspace(tmp_path / "runs", "r", tell=told.append)
        plan.execute(profile, space, stages=["embed"], progress=lambda _: lambda *_: None)
        assert sum(line.startswith(said) for line in told) == heard
