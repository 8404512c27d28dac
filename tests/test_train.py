"""The train stage on the built-in world, with real models of two layers and random weights."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_training import IMAGES, SIDE, World, clip_config

from gmail_cli import plan
from gmail_cli.artifacts import Artifact, Workspace
from gmail_cli.components import captions, ifcap, scenes, sitta
from gmail_cli.components.clip_files import build_clip, load_clip, save_clip
from gmail_cli.components.embedding import embed_images
from gmail_cli.components.heads import classify, generate_captions, load_captioner, load_probe
from gmail_cli.components.images import GeneratedImage
from gmail_cli.components.pairs import pair
from gmail_cli.components.tasks import few_shots
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import build
from gmail_cli.profile.schema import ArmName, TaskName, Train
from gmail_cli.stages import embed, evaluate, sources, train

SELF = Path(__file__)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world")).make()


ARMS = ["none", "real", "generated-naive", "generated-aligned", "mixed"]
READ_BY = {
    "real": [*get_args(TaskName)],
    "mixed": ["clip-text"],
    "texts": ["clipcap", "ifcap"],
}
RESUMED = {"tasks": ["clip-text"], "arms": ["real", "generated-aligned"], "steps": 40, "batch_size": 8}


def test_text_towers_of_all_arms(world: World) -> None:
    artifact = world.train(arms=ARMS, kinds=["short", "long"])
    rows = artifact.read_json("cells.json")
    assert [row["name"] for row in rows] == [f"clip-text.{arm}.seed0" for arm in ARMS]
    assert [row["steps"] for row in rows] == [0, 40, 40, 40, 40]
    assert {row["captions"] for row in rows} == {3 * IMAGES}  # two short ones and a long one of each scene
    f_r, texts = load_clip(world.folder / "clip"), ["a red ball", "two trees on snow"]
    outputs = []
    for row in rows:
        folder = artifact.folder(row["folder"])
        plain = open_clip.create_model(f"local-dir:{folder / 'clip'}").eval()
        tokens = open_clip.get_tokenizer(f"local-dir:{folder / 'clip'}")(texts)
        with torch.inference_mode():
            outputs.append(plain.encode_text(tokens, normalize=True))
        for name, value in plain.visual.state_dict().items():
            assert torch.equal(value, f_r.model.visual.state_dict()[name])
        curve = artifact.read_jsonl(f"{row['folder']}/metrics.jsonl")
        assert len(curve) == row["steps"] // 10
        if curve:
            assert curve[-1]["loss"] < curve[0]["loss"]
            assert row["final_loss"] == curve[-1]["loss"]
            assert row["trained_parameters"] > 0
    torch.testing.assert_close(outputs[0], f_r.encode_texts(texts))
    for i in range(len(outputs)):
        for j in range(i):
            assert not torch.allclose(outputs[i], outputs[j], atol=1e-3)


LONG = {"tasks": ["long-clip"], "kinds": ["long"], "context_length": 120}


def test_long_text_towers_read_to_the_end(world: World) -> None:
    artifact = world.train(arms=["none", "real", "generated-aligned"], **LONG)
    rows = artifact.read_json("cells.json")
    assert {row["captions"] for row in rows} == {IMAGES}
    text = captions.read("scenes:train", limit=1, scene_size=SIDE).captions_of_kind("long")[0].text
    f_r = load_clip(world.folder / "clip")
    assert f_r.tokenize([text]).truncated.all()
    towers = [load_clip(artifact.folder(row["folder"]) / "clip") for row in rows]
    for row, tower in zip(rows, towers, strict=True):
        assert tower.context_length == 120
        plain = open_clip.create_model(f"local-dir:{artifact.folder(row['folder']) / 'clip'}").eval()
        with torch.inference_mode():
            theirs = plain.encode_text(tower.tokenize([text]).ids, normalize=True)
        torch.testing.assert_close(tower.encode_texts([text]), theirs)
        assert tower.lengths(tower.tokenize([text]).ids).item() > f_r.context_length
    torch.testing.assert_close(towers[0].encode_texts(["a red ball"]), f_r.encode_texts(["a red ball"]))
    assert not torch.allclose(towers[1].encode_texts([text]), towers[0].encode_texts([text]), atol=1e-3)
    curve = artifact.read_jsonl("long-clip.real.seed0/metrics.jsonl")
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert curve[-1]["short_loss"] < curve[0]["short_loss"]


def test_rotary_text_towers(world: World) -> None:
    artifact = world.train(arms=["none", "real"], positions="rotary", distil_share=0.5, steps=20, **LONG)
    untrained, trained = (
        load_clip(artifact.folder(row["folder"]) / "clip") for row in artifact.read_json("cells.json")
    )
    text = captions.read("scenes:train", limit=1, scene_size=SIDE).captions_of_kind("long")[0].text
    assert trained.lengths(trained.tokenize([text]).ids).item() > load_clip(world.folder / "clip").context_length
    assert trained.model.positional_embedding.abs().max() == 0 < untrained.model.positional_embedding.abs().max()
    curve = artifact.read_jsonl("long-clip.real.seed0/metrics.jsonl")
    assert set(curve[0]) == {"step", "loss", "lr", "grad_norm"}
    assert curve[0]["loss"] < 1 < curve[1]["loss"]  # a cosine distance in the first ten steps, then contrasts


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context_length", 100),
        ("keep_positions", 30),
        ("positions", "rotary"),
        ("short_weight", 0.0),
        ("short_texts", "sentences"),
        ("coarse_components", 2),
    ],
)
def test_settings_of_long_clip_move_the_result(world: World, name: str, value: Any) -> None:
    options = {"arms": ["real"], "steps": 3, **LONG}
    weights = "long-clip.real.seed0/clip/open_clip_model.safetensors"
    base, other = world.train(**options), world.train(**{**options, name: value})
    assert base.digest != other.digest
    assert base.files[weights] != other.files[weights]


def test_long_clip_asks_for_long_captions(world: World) -> None:
    with pytest.raises(UsageError, match=r"train.kinds = \['short'\]"):
        world.train(tasks=["long-clip"], arms=["real"])


def test_a_killed_stage_ends_in_the_same_bytes(world: World, tmp_path: Path) -> None:
    whole = world.train(Workspace(tmp_path, "whole"), **RESUMED)
    environment = os.environ | {"PYTHONPATH": str(SELF.parents[1]), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(SELF), str(world.folder), str(tmp_path)]
    done = subprocess.run(script, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["killed"] * 3 + ["finished"]
    resumed = Workspace(tmp_path, "killed").latest("train")
    assert resumed is not None
    assert resumed.digest == whole.digest
    assert resumed.content == whole.content
    assert resumed.verify() == []


def test_a_finished_cell_is_kept(world: World, tmp_path: Path) -> None:
    workspace, profile = Workspace(tmp_path, "cut"), world.profile(arms=["real", "generated-naive"], steps=20)

    def interrupt(done: int, total: int) -> None:
        assert total == 40
        if done >= 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.run(profile, workspace, **world.inputs(), progress=interrupt)
    (partial,) = workspace.folder("train").glob("*.partial")
    before = (partial / "clip-text.real.seed0" / "cell.json").stat().st_ino
    seen: list[int] = []
    artifact = train.run(profile, workspace, **world.inputs(), progress=lambda done, total: seen.append(done))
    assert artifact.file("clip-text.real.seed0/cell.json").stat().st_ino == before
    assert min(seen) >= 20
    assert train.run(profile, workspace, **world.inputs()).path == artifact.path


def test_a_cell_that_an_earlier_artifact_holds_is_not_trained_again(world: World, tmp_path: Path) -> None:
    said: list[str] = []
    swept, fresh = Workspace(tmp_path, "swept", tell=said.append), Workspace(tmp_path / "apart", "fresh")
    options = {"tasks": ["clip-text", "clipcap"], "arms": ["none", "real", "generated-aligned"], "steps": 4}
    first = train.run(world.profile(**options), swept, **world.inputs())
    inputs = world.inputs() | {"aligned": world._make_aligned(swept, by=0.9)}
    profile = world.profile(**options, seeds=[0, 1])
    (step,) = plan.steps(profile, swept, stages=["train"], given=inputs)
    kept = ["clip-text.none.seed0", "clip-text.real.seed0", "clipcap.real.seed0"]
    assert [name for name, path in step.cells if path == first.path] == kept
    assert {path for name, path in step.cells if name not in kept} == {None}
    said.clear()
    second = train.run(profile, swept, **inputs)
    assert [line for line in said if "seed" in line] == [f"reusing {name} of train/{first.path.name}" for name in kept]
    alone = train.run(profile, fresh, **inputs)
    assert second.files == alone.files
    assert second.content == alone.content
    assert second.verify() == []
    weights = "clipcap.{}.seed0/head.safetensors"
    assert second.files[weights.format("real")] == first.files[weights.format("real")]
    assert second.files[weights.format("generated-aligned")] != first.files[weights.format("generated-aligned")]


@pytest.mark.parametrize("task", ["clip-text", "clipcap", "ifcap", "llava", "linear-probe"])
def test_a_cell_does_not_depend_on_what_was_trained_before_it(world: World, tmp_path: Path, task: str) -> None:
    options = {"tasks": [task], "steps": 2, "batch_size": 4}
    name = f"{task}.generated-naive.seed0"
    made = []
    for arms in (["generated-naive"], ["real", "generated-naive"]):
        artifact = train.run(world.profile(arms=arms, **options), Workspace(tmp_path, str(len(arms))), **world.inputs())
        made.append({file: entry["sha256"] for file, entry in artifact.files.items() if file.startswith(f"{name}/")})
    assert made[0] == made[1]


def test_a_damaged_cell_is_trained_again(world: World, tmp_path: Path) -> None:
    said: list[str] = []
    workspace = Workspace(tmp_path, "damaged", tell=said.append)
    options = {"tasks": ["linear-probe"], "arms": ["real"], "steps": 3}
    first = train.run(world.profile(**options), workspace, **world.inputs())
    name = "linear-probe.real.seed0"
    content = first.file(f"{name}/head.safetensors").read_bytes()
    first.file(f"{name}/head.safetensors").write_bytes(content[:-1] + b"?")
    second = train.run(world.profile(**options, seeds=[0, 1]), workspace, **world.inputs())
    assert second.file(f"{name}/head.safetensors").read_bytes() == content
    assert f"training anew, as its files are damaged: {name} of train/{first.path.name}" in said


@pytest.mark.parametrize(("arm", "tasks"), READ_BY.items())
def test_the_digest_of_a_cell_covers_every_setting_that_it_reads(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str, tasks: list[str]
) -> None:
    profile = world.profile(tasks=tasks, arms=[arm], kinds=["long"], steps=1, batch_size=4, context_length=100)
    read: set[str] = set()

    class Watched(type(profile.train)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in Train.model_fields:
                read.add(name)
            return super().__getattribute__(name)

    def watched(cell: train.Cell, *args: Any, **options: Any) -> Any:
        read.clear()
        row = trained(cell, *args, **options)
        unseen[cell.name] = read - set(train._settings_of(cell, profile))
        return row

    unseen: dict[str, set[str]] = {}
    trained = train._train
    monkeypatch.setattr(train, "_train", watched)
    section = Watched.model_construct(**dict(profile.train))
    train.run(profile.model_copy(update={"train": section}), Workspace(tmp_path, "watched"), **world.inputs())
    assert unseen == {cell.name: set() for cell in train.cells(profile)}


def test_a_setting_of_another_task_or_arm_does_not_move_the_digest_of_a_cell(world: World) -> None:
    given = {"generated": "0" * 64, "aligned": "1" * 64}
    options = {"tasks": ["clip-text", "linear-probe"], "arms": ["real", "mixed"]}
    keys = train.cell_keys(world.profile(**options), **given)
    for changed, moved in (
        ({"shots": 2}, {"linear-probe.real.seed0", "linear-probe.mixed.seed0"}),
        ({"mix_ratio": 0.25}, {"clip-text.mixed.seed0", "linear-probe.mixed.seed0"}),
        ({"prefix_length": 4}, set()),
        ({"lr": 0.1}, set(keys)),
    ):
        others = train.cell_keys(world.profile(**options, **changed), **given)
        assert {name for name in keys if keys[name] != others[name]} == moved


def test_captioners_with_and_without_dual_projection(world: World) -> None:
    artifact = world.train(tasks=["clipcap"], arms=["generated-aligned"], dual_projection="both", tune_lm=True)
    rows = artifact.read_json("cells.json")
    assert [row["name"] for row in rows] == [f"clipcap.generated-aligned.seed0{end}" for end in ("", "+dual")]
    assert rows[1]["trained_parameters"] - rows[0]["trained_parameters"] == 32 * 33
    f_r = load_clip(world.folder / "clip")
    data = captions.read("scenes:test", limit=4, scene_size=SIDE)
    features = torch.from_numpy(embed_images(f_r, data.image_bytes, 4))
    for row in rows:
        curve = artifact.read_jsonl(f"{row['folder']}/metrics.jsonl")
        assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]
        written = generate_captions(load_captioner(artifact.folder(row["folder"])), features, max_tokens=12)
        assert len(written) == 4
        assert any(written)


def test_a_captioner_trained_on_texts_alone(world: World) -> None:
    options = {"tasks": ["clipcap"], "arms": ["texts"], "steps": 6}
    profile = world.profile(**options)
    alone = train.run(profile, world.workspace)  # neither images nor artifacts are read
    assert alone.read_json("cells.json")[0]["captions"] == 5 * IMAGES
    weights = "clipcap.texts.seed0/head.safetensors"
    for name, value in {"text_noise": 0.2, "text_memory": 20, "dual_projection": "on"}.items():
        other = train.run(world.profile(**options, **{name: value}), world.workspace)
        assert other.files.get(weights) != alone.files[weights]
        if name == "text_memory":
            memory = load_captioner(other.folder("clipcap.texts.seed0")).memory
            f_r = load_clip(world.folder / "clip")
            texts = list(
                dict.fromkeys(c.text for c in sources.read(sources.source(profile, part="train")).captions_of_kind())
            )
            torch.testing.assert_close(memory, f_r.encode_texts(texts[:20]))


def test_captioners_that_retrieve_or_map_linearly(world: World, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, "captioners")
    arms = ["texts", "real", "generated-aligned"]
    artifact = world.train(workspace, tasks=["ifcap", "sitta"], arms=arms, steps=20, token_orders=2, caption_memory=40)
    rows = artifact.read_json("cells.json")
    assert [row["name"] for row in rows if row["task"] == "sitta"] == [f"sitta.{arm}.seed0" for arm in arms[1:]]
    data = captions.read("scenes:test", limit=3, scene_size=SIDE)
    f_r = load_clip(world.folder / "clip")
    features = torch.from_numpy(embed_images(f_r, data.image_bytes, 3))
    for row in rows:
        folder = artifact.folder(row["folder"])
        assert row["trained_parameters"] > 0
        if row["task"] == "sitta":
            assert row["steps"] == 0
            assert 0 < row["metrics"]["explained"] < 1
            written = sitta.write_captions(
                sitta.load_linear_map(folder), features, embed=f_r.encode_texts, max_tokens=6
            )
        else:
            curve = artifact.read_jsonl(f"{row['folder']}/metrics.jsonl")
            assert curve[-1]["loss"] < curve[0]["loss"]
            captioner = ifcap.load_retrieval_captioner(folder)
            assert len(captioner.captions) == 40
            torch.testing.assert_close(captioner.vectors, f_r.encode_texts(captioner.captions), atol=1e-5, rtol=0)
            written = ifcap.write_captions(captioner, features, max_tokens=12)
        assert len(written) == 3
    weights = {artifact.files[f"{row['folder']}/head.safetensors"]["sha256"] for row in rows}
    assert len(weights) == len(rows)
    profile = world.profile()
    seen = {
        "data": profile.data.model_copy(update={"test": "scenes:test", "test_limit": 4}),
        "embed": profile.embed.model_copy(update={"gap_count": 0}),
        "eval": profile.eval.model_copy(
            update={"meteor": "off", "clip_score": False, "resamples": 100, "caption_tokens": 6}
        ),
    }
    profile = profile.model_copy(update=seen)
    embeddings = embed.run(profile, workspace, train=artifact)
    results = evaluate.run(profile, workspace, embeddings=embeddings, train=artifact).read_json("results.json")
    told = {name.removesuffix(".cider") for name in results["metrics"] if name.endswith(".cider")}
    assert told == {f"{row['task']}.{row['arm']}" for row in rows}


def test_probes_know_classes_on_real_images(world: World) -> None:
    artifact = world.train(
        tasks=["linear-probe"], arms=["none", "real", "generated-aligned"], dual_projection="on", steps=80, lr=0.02
    )
    rows = artifact.read_json("cells.json")
    ends = ("none.seed0", "real.seed0+dual", "generated-aligned.seed0+dual")
    assert [row["name"] for row in rows] == [f"linear-probe.{end}" for end in ends]
    f_r = load_clip(world.folder / "clip")
    data = captions.read("scenes:train", limit=IMAGES, scene_size=SIDE)
    features = torch.from_numpy(embed_images(f_r, data.image_bytes, IMAGES))
    probe = load_probe(artifact.folder(rows[1]["folder"]))
    labels = torch.tensor([probe.class_names.index(image.label or "") for image in data.images])
    assert (classify(probe, features).argmax(1) == labels).float().mean() > 0.4  # random features; chance is 0.17
    zero_shot = load_probe(artifact.folder(rows[0]["folder"]))
    known = {*labels.tolist()}
    assert len(known) < len(zero_shot.class_names)  # some class has no caption here, and is never the answer
    assert {*classify(zero_shot, features).argmax(1).tolist()} <= known


def test_a_few_shot_probe_sees_so_many_images_of_each_class(world: World) -> None:
    data = captions.read("scenes:train", limit=IMAGES, scene_size=SIDE)
    pairs = pair(data, kinds=["short"])
    rows = few_shots(pairs, 2, seed=1)
    images = {(int(pairs.labels[row]), int(pairs.owners[row])) for row in rows.tolist()}
    assert len(images) == len(rows), "one caption of an image"
    every = {(int(label), int(owner)) for label, owner in zip(pairs.labels, pairs.owners, strict=True)}
    for label in {label for label, _ in every}:
        there, chosen = (sum(each == label for each, _ in found) for found in (every, images))
        assert chosen == min(2, there)
    assert rows.tolist() != few_shots(pairs, 2, seed=2).tolist()
    settings = {"tasks": ["linear-probe"], "arms": ["real"], "steps": 5}
    few, all_of_them = (world.train(**settings, shots=shots) for shots in (1, 0))
    assert few.digest != all_of_them.digest
    assert "shots" not in all_of_them.manifest["key"]["settings"]
    name = "linear-probe.real.seed0/head.safetensors"
    assert few.files[name] != all_of_them.files[name]


def test_a_clip_from_random_weights_and_one_fine_tuned(world: World) -> None:
    options = {"tasks": ["clip"], "arms": ["real", "generated-naive"], "steps": 30, "augment": "crop"}
    fresh = world.train(
        architecture=str(world.folder / "architecture.json"), vocabulary=640, patch_dropout=0.25, **options
    )
    tuned = world.train(**options)
    for artifact in (fresh, tuned):
        for row in artifact.read_json("cells.json"):
            assert row["image_encoder"] == "own"
            curve = artifact.read_jsonl(f"{row['folder']}/metrics.jsonl")
            assert curve[-1]["loss"] < curve[0]["loss"]
            folder = artifact.folder(row["folder"]) / "clip"
            ours, plain = load_clip(folder), open_clip.create_model(f"local-dir:{folder}").eval()
            pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
            with torch.inference_mode():
                expected = plain.encode_image(pixels, normalize=True)
            torch.testing.assert_close(ours.encode_images(pixels), expected)
    sizes = [
        load_clip(a.folder("clip.real.seed0") / "clip").config["model_cfg"]["text_cfg"]["vocab_size"]
        for a in (fresh, tuned)
    ]
    assert sizes[0] == 640
    assert sizes[1] == 700


def test_the_class_loss_teaches_a_clip_its_classes(world: World) -> None:
    options = {"tasks": ["clip"], "arms": ["real"], "steps": 60, "lr": 3e-3}
    taught = world.train(class_weight=4.0, **options)
    curve = taught.read_jsonl("clip.real.seed0/metrics.jsonl")
    assert curve[-1]["class_accuracy"] > curve[0]["class_accuracy"] + 0.2
    plain = world.train(**options)
    assert "class_accuracy" not in plain.read_jsonl("clip.real.seed0/metrics.jsonl")[0]

    prompts = [f"a photo of a {name}." for name in scenes.CLASS_NAMES]
    shown = captions.read("scenes:train", limit=IMAGES, scene_size=SIDE)
    labels = torch.tensor([scenes.CLASS_NAMES.index(image.label) for image in shown.images])

    def known(artifact: Artifact) -> float:
        clip = load_clip(artifact.folder("clip.real.seed0") / "clip")
        images = torch.from_numpy(embed_images(clip, shown.image_bytes, IMAGES))
        return float(((images @ clip.encode_texts(prompts).T).argmax(1) == labels).float().mean())

    assert known(taught) > known(plain) + 0.2


def test_a_class_loss_needs_classes(world: World, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_text('{"image": "a.png", "caption": "red"}\n')
    profile = world.profile(tasks=["clip"], arms=["real"], class_weight=1.0)
    data = profile.data.model_copy(update={"train": str(tmp_path / "captions.jsonl"), "train_limit": 0})
    with pytest.raises(InputError, match=r"train\.class_weight needs images with a class"):
        train.run(profile.model_copy(update={"data": data}), world.workspace)


# -- plans and pairs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["clip"], "arms": ["real"], "batch_size": 1}, r"train\.batch_size = 1: task clip learns by telling"),
        ({"tasks": ["clipcap"], "arms": ["none"]}, "clipcap can be trained on none of them"),
        ({"tasks": ["clip-text"], "arms": ["texts"]}, "clip-text can be trained on none of them"),
        ({"tasks": ["clip"], "arms": ["real", "generated-aligned"]}, "can be trained on 'generated-aligned'"),
        ({"tasks": ["clip-text"], "dual_projection": "on"}, "applies to none of the tasks"),
        ({"tasks": ["clipcap"], "arms": ["real"], "lm": "owner/name"}, "needs train.lm_revision"),
        ({"tasks": ["clip"], "arms": ["real"], "architecture": "ViT-Z"}, "no model that open_clip knows"),
    ],
)
def test_settings_that_cannot_work(world: World, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train.plan_key(world.profile(**settings), generated="0" * 64, aligned="1" * 64)


def test_arms_need_their_artifacts(world: World) -> None:
    with pytest.raises(InputError, match="generated-naive needs the generate artifact"):
        train.plan_key(world.profile(arms=["real", "generated-naive"]))
    with pytest.raises(InputError, match="generated-aligned needs the align artifact"):
        train.plan_key(world.profile(arms=["generated-aligned"]), generated="0" * 64)
    key = train.plan_key(world.profile(arms=["real"]), aligned="1" * 64)
    assert set(key.inputs) == {"data"}


@pytest.mark.parametrize("task", ["clipcap", "llava"])
def test_f_g_of_another_model_is_refused(world: World, tmp_path: Path, task: str) -> None:
    other = build_clip(clip_config(700), seed=9, tokenizer=load_clip(world.folder / "clip").tokenizer)
    (tmp_path / "clip").mkdir()
    save_clip(other, tmp_path / "clip")
    profile = world.profile(tasks=[task], arms=["real", "generated-aligned"])
    profile = profile.model_copy(update={"model": profile.model.model_copy(update={"clip": str(tmp_path / "clip")})})
    with pytest.raises(InputError, match="was aligned from another model"):
        train.run(profile, world.workspace, **world.inputs())


def test_every_task_and_arm_of_the_profile_exists() -> None:
    assert set(get_args(TaskName)) == set(train.TASKS)
    assert set(get_args(ArmName)) == {arm for task in train.TASKS.values() for arm in task.arms}


@given(arms=st.sets(st.sampled_from(ARMS), min_size=1), seeds=st.sets(st.integers(0, 4), min_size=1))
def test_cell_names_are_unique_and_none_has_one_seed(arms: set[str], seeds: set[int]) -> None:
    settings = {"tasks": ["clip-text"], "arms": sorted(arms), "seeds": sorted(seeds)}
    found = train.cells(build({"train": settings}))
    assert len({cell.name for cell in found}) == len(found)
    assert len(found) == len(arms - {"none"}) * len(seeds) + ("none" in arms)


def test_the_key_follows_what_is_trained_but_not_how_it_runs(world: World) -> None:
    options = {"generated": "0" * 64, "aligned": "1" * 64}
    profile = world.profile(arms=["real"])
    key = train.plan_key(profile, **options)
    hurried = profile.model_copy(update={"runtime": profile.runtime.model_copy(update={"checkpoint_seconds": 9.0})})
    assert train.plan_key(hurried, **options).digest == key.digest
    assert train.plan_key(world.profile(arms=["real"], steps=41), **options).digest != key.digest
    assert train.plan_key(world.profile(arms=["real"], seeds=[1]), **options).digest != key.digest


def record(caption_id: str, owner: str, text: str, *, k: int = 0, label: str | None = None) -> GeneratedImage:
    return GeneratedImage(f"{caption_id}-{k}", caption_id, text, owner, label, k, k, "", f"images/{k}", 8, 8)


def test_all_arms_share_the_captions_that_were_drawn_from() -> None:
    data = captions.read("scenes:train", limit=3, scene_size=16)
    first = [data.captions_of(image.id)[0] for image in data.images]
    generated = [record(c.id, c.owner, c.text, k=k) for c in first[:2] for k in range(2)]
    pairs = pair(data, generated=generated, kinds=("short", "long"))
    long = [c.text for c in data.captions if c.kind == "long"][:2]
    assert list(pairs.texts) == [c.text for c in first[:2]] + long
    assert pairs.owners.tolist() == [0, 1, 0, 1]
    assert pairs.real is not None
    assert pairs.generated is not None
    rows = torch.arange(4).repeat(50)
    assert set(pairs.real.draw(rows[rows == 1]).tolist()) == {1}
    assert set(pairs.generated.draw(rows[rows == 1]).tolist()) == {2, 3}
    assert set(pairs.generated.draw(rows[rows == 3]).tolist()) == {2, 3}  # a long caption: its owner's images
    assert pairs.siblings(torch.arange(4))[0].tolist() == [False, False, True, False]
    names = [pairs.class_names[row] for row in pairs.labels]
    assert names == [image.label for image in data.images[:2]] * 2
    with pytest.raises(InputError, match="no long caption"):
        pair(captions.Dataset("none", data.images, tuple(first), (), data.sources), kinds=("long",))


def test_class_captions_meet_any_real_image_of_the_class(tmp_path: Path) -> None:
    for i, text in enumerate(["a cat", "a dog", "a cat"]):
        (tmp_path / f"{i}.png").write_bytes(scenes.scene_bytes("train", i, size=16))
        with (tmp_path / "captions.jsonl").open("a") as stream:
            stream.write(json.dumps({"image": f"{i}.png", "caption": text}) + "\n")
    data = captions.read(tmp_path / "captions.jsonl")
    generated = [record("g0", "fake0", "a cat", label="cat"), record("g1", "fake1", "a dog", label="dog")]
    pairs = pair(data, generated=generated)
    assert pairs.real is not None
    drawn = pairs.real.draw(torch.zeros(60, dtype=torch.long))
    assert set(drawn.tolist()) == {0, 2}
    assert pairs.class_names == ("cat", "dog")
    assert pairs.labels.tolist() == [0, 1]
    stranger = [record("g2", "fake2", "a cow")]
    assert pair(data, generated=stranger).real is None


def train_in_a_child(home: World, results: Workspace, reached: Path) -> int:
    """Train in a forked process that notes the steps it has done, and return its id."""
    child = os.fork()
    if child == 0:
        profile = home.profile(**RESUMED)
        train.run(profile, results, **home.inputs(), progress=lambda done, _: reached.write_text(str(done)) and None)
        os._exit(0)
    return child


if __name__ == "__main__":  # killed in the first cell, about its end, and in the second cell; then left to finish
    at = Path(sys.argv[2], "steps")
    at.write_text("0")
    for stop in (10, random.choice([30, 40]), 60, None):
        identity = train_in_a_child(World(Path(sys.argv[1])), Workspace(Path(sys.argv[2]), "killed"), at)
        if stop is not None:
            while int(at.read_text() or 0) < stop:
                time.sleep(0.002)
            os.kill(identity, signal.SIGKILL)
        _, status = os.waitpid(identity, 0)
        print("killed" if os.WIFSIGNALED(status) else "finished", flush=True)
