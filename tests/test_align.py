"""`gmail align` end to end on a randomly initialised tiny model: outputs, resume, validation, refusals."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_clips import VIT

from gmail_cli import plan
from gmail_cli import profile as profiles
from gmail_cli.artifacts import Artifact, StageKey, Workspace
from gmail_cli.components import captions as reader
from gmail_cli.components import clip_files, embedding, tuning
from gmail_cli.components.images import GeneratedSet
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import align

IMAGES = 20


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    clip_files.save_clip(clip_files.build_clip(VIT), folder)
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("runs"), "test")


def _fake_generation(
    workspace: Workspace, rows: list[dict[str, Any]], images: list[Image.Image], name: str
) -> Artifact:
    """A generate artifact with these images, as an import would write it."""
    with workspace.open(StageKey(stage="generate", settings={"name": name})) as slot:
        if slot.done:
            return slot.artifact
        records = []
        for number, (row, image) in enumerate(zip(rows, images, strict=True)):
            stream = io.BytesIO()
            image.save(stream, "PNG")
            path = f"images/000/{number:03d}.png"
            slot.write_bytes(path, stream.getvalue())
            about = {"key": f"{number:03d}", "k": 0, "seed": number, "path": path, "width": 32, "height": 32}
            records.append({**about, "sha256": hashlib.sha256(stream.getvalue()).hexdigest(), "label": None, **row})
        slot.write_jsonl("records.jsonl", records)
        return slot.commit(summary={})


def _shifted(data: bytes, *, seed: int) -> Image.Image:
    """A "generated" version of an image: another colour cast, blur and noise."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((32, 32))).astype(np.float64)
    noise = np.random.default_rng(seed).normal(0, 6, pixels.shape)
    return Image.fromarray(np.clip(pixels * [0.6, 0.9, 1.1] + [60, 0, -20] + noise, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def generated(workspace: Workspace) -> Artifact:
    """Two images of each scene: siblings with one real partner."""
    scenes = reader.read("scenes:train", limit=IMAGES, scene_size=32)
    rows, images = [], []
    for row, image in enumerate(scenes.images):
        for number, caption in enumerate(scenes.captions_of(image.id)[:2]):
            rows.append({"caption_id": caption.id, "caption": caption.text, "owner": image.id})
            images.append(_shifted(scenes.image_bytes(row), seed=2 * row + number))
    return _fake_generation(workspace, rows, images, "scenes")


def _profile(clip_folder: Path, **changes: Any) -> Profile:
    values = {
        "data": {"train": "scenes:train", "train_limit": IMAGES, "scene_size": 32},
        "model": {"clip": str(clip_folder)},
        "align": {"steps": 30, "batch_size": 16, "lr": 3e-3, "validation": 0.25, "cycles": 2, **changes},
        "runtime": {"device": "cpu", "threads": 1, "checkpoint_seconds": 0.0},
    }
    return profiles.build(values)


def test_outputs_fit_one_another(clip_folder: Path, workspace: Workspace, generated: Artifact):
    profile = _profile(clip_folder)
    seen: list[tuple[int, int]] = []
    artifact = align.run(profile, workspace, generated=generated, progress=lambda *at: seen.append(at))
    assert artifact.digest == align.plan_key(profile, generated=generated.digest).digest
    assert artifact.verify() == []
    assert seen[-1] == (30, 30)
    assert align.run(profile, workspace, generated=generated).path == artifact.path

    f_r = clip_files.load_clip(clip_folder)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tower = tuning.load_adapter(f_r, artifact.folder("adapter"))
    plain = open_clip.create_model(f"local-dir:{artifact.folder('clip')}").eval()
    with torch.no_grad():
        aligned = plain.encode_image(pixels, normalize=True)
        torch.testing.assert_close(tower(pixels), aligned, atol=1e-5, rtol=0)
    assert (aligned - f_r.encode_images(pixels)).abs().max() > 1e-3
    assert clip_files.model_digest(artifact.folder("clip")) == artifact.summary["encoder"]

    curve = artifact.read_jsonl("metrics.jsonl")
    assert [row["step"] for row in curve] == [10, 20, 30]
    assert curve[-1]["loss"] < curve[0]["loss"]
    tensors = load_file(artifact.file("adapter/adapter_model.safetensors"))
    moved = sum(tensor.numel() for name, tensor in tensors.items() if ".out_proj." not in name)
    assert artifact.summary["trained_parameters"] == moved
    report = artifact.read_json("validation.json")
    assert report["held_out"] == {"generated": 8, "real": 4}
    assert set(report["before"]) == set(report["after"])
    assert report["verdict"].startswith("alignment ")
    assert artifact.summary["verdict"] == report["verdict"]


def test_cosine_closes_the_gap_on_images_it_never_saw(clip_folder: Path, workspace: Workspace, generated: Artifact):
    artifact = align.run(_profile(clip_folder, objective="cosine", steps=60), workspace, generated=generated)
    report = artifact.read_json("validation.json")
    assert 1 - report["after"]["paired_cosine"] < 0.5 * (1 - report["before"]["paired_cosine"])
    assert report["after"]["centroid_distance"] < 0.7 * report["before"]["centroid_distance"]


def test_a_sweep_embeds_through_f_r_once(clip_folder: Path, generated: Artifact, tmp_path: Path):
    """Two lines of a sweep: the second computes no features, says so, and ends in the bytes of a run without any."""
    said: list[str] = []
    workspace = Workspace(tmp_path / "sweep", "test", tell=said.append)
    lines = [_profile(clip_folder, steps=3, lora_rank=rank) for rank in (1, 2)]
    keys = [plan.steps(line, workspace, stages=["align"], given={"generated": generated})[0] for line in lines]
    assert [there for step in keys for _, there in step.features] == [False] * 4
    artifacts = [align.run(line, workspace, generated=generated) for line in lines]
    assert [text.split(" ")[0] for text in said] == ["computing", "computing", "reusing", "reusing"]
    [step] = plan.steps(_profile(clip_folder, steps=4), workspace, stages=["align"], given={"generated": generated})
    assert [(str(each).split("(")[1], there) for each, there in step.features] == [
        (f"20 real images through {clip_folder})", True),
        (f"40 generated images through {clip_folder})", True),
    ]
    alone = align.run(lines[1], Workspace(tmp_path / "alone", "test"), generated=generated)
    assert artifacts[1].content == alone.content
    clip = clip_files.load_clip(clip_folder)
    images = GeneratedSet.load(generated.path)
    stored = np.load(workspace.find(step.features[1][0].key).file("vectors.npy"))  # type: ignore[union-attr]
    np.testing.assert_array_equal(stored, embedding.embed_images(clip, images.image_bytes, len(images)))


_CHILD = """
import json, sys
from pathlib import Path
from gmail_cli import profile as profiles
from gmail_cli.artifacts import Artifact, Workspace
from gmail_cli.stages import align
root, generated, text = sys.argv[1:]
profile = profiles.loads(Path(text).read_text())
align.run(profile, Workspace(Path(root), "test"), generated=Artifact.load(Path(generated)))
"""


def test_kill_minus_nine_ends_in_the_same_bytes(
    clip_folder: Path, workspace: Workspace, generated: Artifact, tmp_path: Path
):
    profile = _profile(clip_folder, steps=400)
    text = tmp_path / "profile.toml"
    text.write_text(profiles.dump(profile))
    command = [sys.executable, "-c", _CHILD, str(tmp_path / "killed"), str(generated.path), str(text)]
    key = align.plan_key(profile, generated=generated.digest)
    checkpoint = tmp_path / "killed/test/align" / f"{key.digest[:12]}.partial/scratch/tower.safetensors"
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as child:
        while not checkpoint.exists() and child.poll() is None:
            time.sleep(0.01)
        assert child.poll() is None, "the run ended before its first checkpoint"
        child.send_signal(signal.SIGKILL)
    steps: list[int] = []
    killed = Workspace(tmp_path / "killed", "test")
    resumed = align.run(profile, killed, generated=generated, progress=lambda done, _total: steps.append(done))
    assert 0 < steps[0] < 400, "it started over"
    uninterrupted = align.run(profile, Workspace(tmp_path / "whole", "test"), generated=generated)
    assert resumed.content == uninterrupted.content


def test_two_processes_align_as_one_does_and_resume(
    clip_folder: Path, workspace: Workspace, generated: Artifact, tmp_path: Path
):
    """torchrun with two gloo processes, killed at a checkpoint and started again: the curve is that of one process."""
    profile = _profile(clip_folder, steps=60, objective="symmetric", bank=4)
    text = tmp_path / "profile.toml"
    text.write_text(profiles.dump(profile))
    shared = Workspace(tmp_path / "shared", "test")
    key = align.plan_key(profile, generated=generated.digest)
    checkpoint = shared.folder("align") / f"{key.digest[:12]}.partial/scratch/tower.safetensors"
    gmail = Path(sys.executable).with_name("gmail")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", "--"]
    command += [str(gmail), "align", "--profile", str(text), "--generated", str(generated.path)]
    command += ["--workspace", str(shared.root), "--run", "test"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, start_new_session=True) as run:
        while not checkpoint.exists() and run.poll() is None:
            time.sleep(0.01)
        assert run.poll() is None, "the run ended before its first checkpoint"
        os.killpg(run.pid, signal.SIGKILL)
    subprocess.run(["pkill", "-9", "-f", str(shared.root)], check=False)  # torchrun gives each process a session
    alone_space = Workspace(tmp_path / "alone", "test")
    alone = align.run(profile, alone_space, generated=generated)
    wanted = [row["loss"] for row in alone.read_jsonl("metrics.jsonl")]
    finished = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300)
    artifact = Artifact.load(Path(finished.stdout.strip()))
    assert artifact.digest == alone.digest
    kept = {each.digest: each.content for each in shared.artifacts() if each.stage == "features"}
    assert kept == {each.digest: each.content for each in alone_space.artifacts() if each.stage == "features"}
    found = [row["loss"] for row in artifact.read_jsonl("metrics.jsonl")]
    assert found == pytest.approx(wanted, abs=1e-5)


def test_class_captions_pair_with_any_image_of_the_class(clip_folder: Path, workspace: Workspace, tmp_path: Path):
    """Images made elsewhere: owners of their own, two captions in all, as in CIFAKE."""
    rng = np.random.default_rng(0)
    rows, images, real = [], [], tmp_path / "real"
    real.mkdir()
    lines = []
    for number in range(48):
        text = "a photo of a cat" if number % 2 else "a photo of a dog"
        base = np.full((32, 32, 3), 60 + 120 * (number % 2)) + rng.normal(0, 15, (32, 32, 3))
        Image.fromarray(base.clip(0, 255).astype(np.uint8)).save(real / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": text}))
        rows.append({"caption_id": f"g{number}", "caption": text, "owner": f"g{number}"})
        images.append(Image.fromarray((base * [0.7, 1, 1] + 30).clip(0, 255).astype(np.uint8)))
    (real / "captions.jsonl").write_text("\n".join(lines) + "\n")
    made = _fake_generation(workspace, rows, images, "classes")
    values = _profile(clip_folder, steps=10, objective="recommended", validation=0.25).model_dump()
    values["data"] = {"train": str(real / "captions.jsonl")}
    profile = profiles.build(values)
    artifact = align.run(profile, workspace, generated=made)
    assert artifact.summary["pairing"] == "random"
    assert artifact.summary["transfer_task"] == "classes"
    assert 0 <= artifact.summary["before"]["transfer"] <= 1
    with pytest.raises(InputError, match="owner's image"):
        align.run(
            profiles.build({**values, "align": {**values["align"], "pairing": "caption"}}), workspace, generated=made
        )


CHANGES: dict[str, Any] = {
    "objective": "cosine",
    "temperature": 0.5,
    "learn_temperature": True,
    "bank": 6,
    "pairing": "nearest",
    "false_negatives": "keep",
    "method": "full",
    "lora_rank": 1,
    "lora_alpha": 1.0,
    "lora_rank_stabilised": True,
    "lora_dropout": 0.5,
    "lora_targets": ["attn"],
    "steps": 3,
    "batch_size": 5,
    "chunk": 3,
    "lr": 1e-3,
    "weight_decay": 0.5,
    "schedule": "constant",
    "cycles": 1,
    "warmup": 2,
    "clip_norm": 0.01,
    "validation": 0.0,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_changes_digest_and_result(
    name: str, clip_folder: Path, workspace: Workspace, generated: Artifact
):
    base = align.run(_profile(clip_folder, steps=4), workspace, generated=generated)
    other = align.run(_profile(clip_folder, **{"steps": 4, name: CHANGES[name]}), workspace, generated=generated)
    assert other.digest != base.digest
    if name == "pairing":  # every scene has captions of its own, so its nearest is its owner
        assert other.summary["pairing"] == "nearest"
    else:
        assert other.files["clip/open_clip_model.safetensors"] != base.files["clip/open_clip_model.safetensors"]


TERMS = ["siglip", "stablerep", "text", "real-text", "hycd", "rafa", "eq1+0.5*text+0.1*rafa"]


@pytest.mark.parametrize("objective", TERMS)
def test_every_term_trains(objective: str, clip_folder: Path, workspace: Workspace, generated: Artifact):
    profile = _profile(clip_folder, objective=objective, steps=40, schedule="constant")
    if objective == "stablerep":
        generated = _one_caption_each(workspace, per_caption=3)
    curve = align.run(profile, workspace, generated=generated).read_jsonl("metrics.jsonl")
    assert {*objective.replace("0.5*", "").replace("0.1*", "").split("+")} <= set(curve[0])
    assert curve[-1]["loss"] < curve[0]["loss"]


@pytest.mark.parametrize("method", ["dora", "full", "projection"])
def test_every_method_trains_and_merges(method: str, clip_folder: Path, workspace: Workspace, generated: Artifact):
    artifact = align.run(_profile(clip_folder, method=method), workspace, generated=generated)
    curve = artifact.read_jsonl("metrics.jsonl")
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert ("adapter/adapter_config.json" in artifact.files) == (method == "dora")
    assert clip_files.model_digest(artifact.folder("clip")) == artifact.summary["encoder"]


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.4}, {"method": "dora", "objective": "real-text+coral"}])
def test_chunks_leave_the_loss_as_it_is(
    changes: dict[str, Any], clip_folder: Path, workspace: Workspace, generated: Artifact
):
    """GradCache: five images at a time (the last chunk has one), the loss and the gradient of all sixteen."""
    whole = align.run(_profile(clip_folder, **changes), workspace, generated=generated)
    parts = align.run(_profile(clip_folder, chunk=5, **changes), workspace, generated=generated)
    curves = [each.read_jsonl("metrics.jsonl") for each in (whole, parts)]
    assert parts.digest != whole.digest
    for name in ("loss", "grad_norm"):
        first, second = ([row[name] for row in curve] for curve in curves)
        assert second == pytest.approx(first, abs=1e-5 * max(first))


def test_stablerep_needs_several_images_of_a_caption(clip_folder: Path, workspace: Workspace):
    with pytest.raises(InputError, match="several generated images of a caption"):
        align.run(_profile(clip_folder, objective="stablerep"), workspace, generated=_one_caption_each(workspace))


def test_unpaired_needs_no_caption_that_a_real_image_has(clip_folder: Path, workspace: Workspace):
    """Captions from elsewhere: distributions are matched, and nothing pretends to judge transfer."""
    foreign = _one_caption_each(workspace, prefix="from another world: ")
    with pytest.raises(InputError, match="no real image of its caption"):
        align.run(_profile(clip_folder, objective="coral"), workspace, generated=foreign)
    with pytest.raises(UsageError, match="gives no partners, and eq1 needs them"):
        align.run(_profile(clip_folder, pairing="unpaired"), workspace, generated=foreign)
    profile = _profile(clip_folder, objective="coral+mmd", pairing="unpaired", steps=40)
    artifact = align.run(profile, workspace, generated=foreign)
    curve = artifact.read_jsonl("metrics.jsonl")
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]
    assert artifact.summary["pairing"] == "unpaired"
    assert artifact.summary["verdict"].startswith("not validated")


def _one_caption_each(workspace: Workspace, *, per_caption: int = 1, prefix: str = "") -> Artifact:
    """Images of one caption per scene; with a prefix, of captions that no real image has."""
    scenes = reader.read("scenes:train", limit=IMAGES, scene_size=32)
    rows, images = [], []
    for row, image in enumerate(scenes.images):
        caption = scenes.captions_of(image.id)[0]
        owner = f"elsewhere-{row}" if prefix else image.id
        for k in range(per_caption):
            rows.append({"caption_id": caption.id, "caption": prefix + caption.text, "owner": owner})
            images.append(_shifted(scenes.image_bytes(row), seed=row + 1000 * k))
    return _fake_generation(workspace, rows, images, f"{per_caption} {prefix}")


def test_settings_without_effect_do_not_change_the_digest(clip_folder: Path, generated: Artifact):
    def digest(**changes: Any) -> str:
        return align.plan_key(_profile(clip_folder, **changes), generated=generated.digest).digest

    assert digest(objective="paper") == digest(objective="eq1")
    assert digest(objective="cosine", temperature=0.07) == digest(objective="cosine", temperature=0.5)
    assert digest(objective="cosine", bank=0) == digest(objective="cosine", bank=9)
    assert digest(method="projection", lora_dropout=0.0) == digest(method="projection", lora_dropout=0.5)
    assert digest(method="full", lora_rank=4) == digest(method="full", lora_rank=8)
    assert digest(chunk=0) == digest()
    assert digest(schedule="cosine", cycles=4) == digest(schedule="cosine", cycles=3)
    assert digest(precision="bf16") != digest()


def test_bf16_is_refused_where_it_is_slow(
    clip_folder: Path, workspace: Workspace, generated: Artifact, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(UsageError, match=r"align\.precision = 'bf16'"):
        align.run(_profile(clip_folder, precision="bf16"), workspace, generated=generated)
