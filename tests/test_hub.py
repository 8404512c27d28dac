"""Weights from a hub: one on this machine that speaks the hub's protocol, asked by the real commands."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import open_clip
import pytest
import small_checkers
import small_pipelines
import torch
from local_hub import Hub, commit_of, local_hub
from PIL import Image
from preloaded import preloaded
from safetensors.torch import load_file, save_file

from gmail_cli.artifacts import Artifact, Workspace
from gmail_cli.components import captions, pipelines
from gmail_cli.components.tables import Table

WEIGHTS = Path(__file__).resolve().parents[1] / "gmail_cli" / "weights" / "tiny"
NOWHERE = "0" * 40
OF_TRANSFORMERS = ("config.json", "preprocessor_config.json")
SMALL = (
    *("data.train_limit=6", "data.test_limit=4", "generate.steps=1", "align.steps=1", "align.batch_size=4"),
    *("align.validation=0", "train.steps=1", "train.batch_size=4", 'train.tasks=["clipcap"]'),
    *('train.arms=["real", "generated-aligned"]', "embed.gap_count=2", "eval.clip_score=false"),
    *("generate.unsafe_label=nsfw", "generate.name=small"),
)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped models; the CLIP as many are kept: for transformers too, and with weights in every format."""
    clip = tmp_path_factory.mktemp("repository") / "clip"
    shutil.copytree(WEIGHTS / "clip", clip)
    for name in OF_TRANSFORMERS:
        (clip / name).write_text(json.dumps({"model_type": "clip", "file": name}))
    for name in ("pytorch_model.bin", "tf_model.h5", "model.safetensors"):
        (clip / name).write_bytes(b"not read")
    tag = clip.parent / "tag"
    tag.mkdir()
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu", precision="fp16")
    save_file(model.state_dict(), tag / "open_clip_model.safetensors")
    light, both, pickled = (clip.parent / name for name in ("light", "both", "pickled"))
    pipeline = pipelines.load_pipeline(str(small_pipelines.save("sd1", clip.parent / "sd1")))
    pipeline.save_pretrained(light, variant="fp16")
    for place in (both, pickled):
        shutil.copytree(clip.parent / "sd1", place)
    shutil.copytree(light, both, dirs_exist_ok=True)
    (both / "v1-5-pruned.ckpt").write_bytes(b"not read")
    (pickled / "unet" / "diffusion_pytorch_model.safetensors").rename(pickled / "unet" / "diffusion_pytorch_model.bin")
    checker = small_checkers.classifier(clip.parent / "checker")
    (checker / "pytorch_model.bin").write_bytes(b"not read")
    return {
        "small/clip": clip,
        "small/pipeline": WEIGHTS / "pipeline",
        "small/lm": WEIGHTS / "lm",
        "small/checker": checker,
        "gated/pipeline": WEIGHTS / "pipeline",
        "published/light": light,
        "published/both": both,
        "published/pickled": pickled,
        open_clip.get_pretrained_cfg("ViT-B-32", "openai")["hf_hub"].strip("/"): tag,
    }


@pytest.fixture(scope="module")
def hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    with local_hub(repositories, gated={"gated/pipeline": "accepted"}) as running:
        yield running


Gmail: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def gmail(hub: Hub, user: Path) -> Iterator[Gmail]:
    """The command, with the hub and an empty cache."""
    found = {"HF_ENDPOINT": hub.url, "HF_HOME": str(user / "home"), "HF_HUB_OFFLINE": "0"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command, env = [str(user / "gmail"), *arguments], {**os.environ, **found}
        return subprocess.run(command, cwd=user, env=env, capture_output=True, text=True, timeout=600, check=False)

    with preloaded(user / "gmail", environment=found):
        yield run


def _settings(*pairs: str) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


def test_a_run_from_hub_weights_is_the_run_from_the_same_weights_on_disk(
    hub: Hub, gmail: Gmail, user: Path, repositories: dict[str, Path]
) -> None:
    commits = {name: commit_of(folder) for name, folder in repositories.items()}
    models = (
        *("generate.model=small/pipeline", f"generate.revision={commits['small/pipeline']}"),
        *("model.clip=hf-hub:small/clip", f"model.revision={commits['small/clip']}"),
        *("train.lm=small/lm", f"train.lm_revision={commits['small/lm']}"),
        *("generate.safety_checker=small/checker", f"generate.safety_revision={commits['small/checker']}"),
    )
    local = (f"generate.safety_checker={repositories['small/checker']}",)
    runs = {}
    for name, given in (("hub", models), ("disk", local)):
        done = gmail("run", "tiny", "--run", name, *_settings(*SMALL, *given))
        assert done.returncode == 0, done.stderr
        runs[name] = Workspace(user / "runs", name)
    fetched = list(hub.served)
    assert {line.partition("@")[0] for line in fetched} == {name for name in repositories if "small/" in name}
    clip = {line.rpartition("/")[2] for line in fetched if line.startswith("small/clip@")}
    assert clip == {*OF_TRANSFORMERS, *(path.name for path in (WEIGHTS / "clip").iterdir())}, "one file of weights"
    assert not [line for line in fetched if line.endswith("checker/pytorch_model.bin")]
    for stage, kind in (
        ("generate", ".png"),
        ("generate", "records.jsonl"),
        ("align", ".safetensors"),
        ("train", ".safetensors"),
    ):
        hubs, disks = (_latest(runs[name], stage) for name in ("hub", "disk"))
        assert hubs.digest != disks.digest
        assert _hashes(hubs, kind) == _hashes(disks, kind), stage
    found = [_latest(run, "eval").read_json("results.json")["aggregates"] for run in runs.values()]
    assert [row["mean"] for row in found[0]] == [row["mean"] for row in found[1]]
    again = gmail("generate", "--profile", "tiny", "--limit", "2", *_settings("generate.steps=2", *models[:2]))
    assert again.returncode == 0, again.stderr
    assert hub.served == fetched, "what was fetched once is in the cache"


def test_weights_that_open_clip_knows_by_a_tag(
    hub: Hub, gmail: Gmail, user: Path, repositories: dict[str, Path]
) -> None:
    """`ViT-B-32/openai`, at its real size, with random weights."""
    chosen = ("model.clip=ViT-B-32/openai", "data.test_limit=2", "embed.gap_count=0", 'embed.templates=["{}"]')
    done = gmail("embed", "--captions", "scenes:test", "--run", "tag", *_settings(*chosen))
    assert done.returncode == 0, done.stderr
    (repository,) = (name for name in repositories if not name.startswith(("small/", "published/", "gated/")))
    assert [line for line in hub.served if repository in line] == [
        f"{repository}@{commit_of(repositories[repository])}/open_clip_model.safetensors"
    ]
    found = Table.load(_latest(Workspace(user / "runs", "tag"), "embed").folder("test-images"))
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32-quickgelu")
    model.load_state_dict(load_file(repositories[repository] / "open_clip_model.safetensors"))
    images = captions.read("scenes:test", limit=2)
    batch = torch.stack([preprocess(Image.open(io.BytesIO(images.image_bytes(row)))) for row in range(2)])
    with torch.no_grad():
        expected = model.eval().encode_image(batch, normalize=True).numpy()
    assert np.abs(found.vectors - expected).max() < 1e-4


def _latest(run: Workspace, stage: str) -> Artifact:
    found = run.latest(stage)
    assert found is not None
    return found


def _hashes(artifact: Artifact, kind: str) -> dict[str, str]:
    found = {name: entry["sha256"] for name, entry in artifact.files.items() if name.endswith(kind)}
    assert found, artifact.path
    return found


def test_a_pipeline_with_several_sets_of_weights_or_only_light_ones(
    hub: Hub, gmail: Gmail, user: Path, repositories: dict[str, Path]
) -> None:
    (user / "cat.txt").write_text("a cat\n")

    def draw(name: str) -> subprocess.CompletedProcess[str]:
        model = (f"generate.model={name}", f"generate.revision={commit_of(repositories[name])}")
        return gmail("generate", "--captions", "cat.txt", "--run", name[-4:], *_settings(*model, "generate.steps=1"))

    drawn = {}
    for name in ("published/both", "published/light"):
        done = draw(name)
        assert done.returncode == 0, done.stderr
        drawn[name] = _hashes(_latest(Workspace(user / "runs", name[-4:]), "generate"), ".png")
    assert drawn["published/both"] == drawn["published/light"], "they hold the same numbers"
    weights = [line for line in hub.served if line.startswith("published/both@") and line.endswith(("tensors", "ckpt"))]
    assert len(weights) == 3
    assert not [line for line in weights if "fp16" in line]
    refused = draw("published/pickled")
    assert refused.returncode == 4
    assert "'published/pickled' lacks weights in .safetensors files" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "repository", "why"),
    [
        ("embed --set model.clip=RN50/openai", "RN50/openai", "repository"),
        ("generate --set generate.model=small/pipeline --set generate.revision=NO", "small/pipeline", "revision"),
        ("generate --set generate.model=small/no --set generate.revision=NO", "small/no", "repository"),
        ("embed --set model.clip=hf-hub:small/clip --set model.revision=NO", "small/clip", "revision"),
        (
            "train --task clipcap --arm real --set train.lm=small/no --set train.lm_revision=NO",
            "small/no",
            "repository",
        ),
    ],
)
def test_what_the_hub_lacks_is_named(gmail: Gmail, arguments: str, repository: str, why: str) -> None:
    stage, *others = arguments.replace("=NO", f"={NOWHERE}").split()
    done = gmail(stage, "--profile", "tiny", *others)
    assert done.returncode == 4
    error, hint = done.stderr.strip().splitlines()[-2:]
    assert error.startswith("error: ")
    assert repository in error
    reason, advice = {
        "revision": (f"it has no revision '{NOWHERE}'", "Give a commit or a tag of that repository."),
        "repository": (
            "the hub has no such repository",
            "Check the name; to see a private one, log in with `hf auth login`, or set HF_TOKEN.",
        ),
    }[why]
    assert error.endswith(f" cannot be loaded: {reason}")
    assert hint == f"hint: {advice}"


def test_weights_whose_terms_were_not_accepted_are_named(
    gmail: Gmail, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [
        "generate.model=gated/pipeline",
        f"generate.revision={commit_of(WEIGHTS / 'pipeline')}",
        "generate.steps=1",
    ]
    arguments = ["--profile", "tiny", *_settings(*chosen), "--limit", "1", "--run", "gated"]
    for token in ("", "of-another-user"):
        monkeypatch.setenv("HF_TOKEN", token)
        done = gmail("generate", *arguments)
        assert done.returncode == 4
        error, hint = done.stderr.strip().splitlines()[-2:]
        assert error == (
            "error: generate.model = 'gated/pipeline' cannot be loaded: it is for those who accepted its owner's terms"
        )
        assert hint == (
            "hint: Accept them on the repository's page (or ask for access there), then log in with `hf auth login`, "
            "or set HF_TOKEN."
        )
    assert not list((user / "runs" / "gated").rglob("*.png"))
    monkeypatch.setenv("HF_TOKEN", "accepted")
    assert gmail("generate", *arguments).returncode == 0
