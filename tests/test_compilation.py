"""Compiled blocks: the same bytes after a restart, in any order, by several processes; few shapes; refusals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from small_clips import VIT
from small_pipelines import KINDS, save
from small_training import World
from test_align import _fake_generation, _shifted
from torch._dynamo.utils import counters

from gmail_cli import profile as profiles
from gmail_cli.artifacts import Artifact, Workspace
from gmail_cli.components import captions as reader
from gmail_cli.components import clip_files, compilation, diffusion, encoders, pipelines, tuning
from gmail_cli.errors import SetupError, UsageError
from gmail_cli.profile import build
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import align, generate, train
from gmail_cli.stages.generate import checking

pytestmark = [
    # dynamo asks every tensor for its gradient and hides the warning, as an error cannot be hidden
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]
IMAGES = 12


@pytest.fixture(scope="module", autouse=True)
def compiled_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Inductor's cache in a folder of its own, which child processes share: all is compiled once, from nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def generated(folder: Path) -> Artifact:
    """A "generated" image of each scene; and the CLIP that is aligned."""
    (folder / "clip").mkdir()
    clip_files.save_clip(clip_files.build_clip(VIT), folder / "clip")
    scenes = reader.read("scenes:train", limit=IMAGES, scene_size=32)
    owners = [(image, scenes.captions_of(image.id)[0]) for image in scenes.images]
    rows = [{"caption_id": caption.id, "caption": caption.text, "owner": image.id} for image, caption in owners]
    images = [_shifted(scenes.image_bytes(row), seed=row) for row in range(IMAGES)]
    return _fake_generation(Workspace(folder / "runs", "test"), rows, images, "scenes")


def aligning(folder: Path, **changes: Any) -> Profile:
    """Two chunks of a batch, or the shares of two processes, are of one shape."""
    options = {"steps": 120, "batch_size": 8, "chunk": 4, "lr": 3e-3, "validation": 0.0, "compile": True, **changes}
    return build(
        {
            "data": {"train": "scenes:train", "train_limit": IMAGES, "scene_size": 32},
            "model": {"clip": str(folder / "clip")},
            "align": options,
            "runtime": {"device": "cpu", "threads": 1, "checkpoint_seconds": 0.0},
        }
    )


def command(stage: str, profile: Profile, workspace: Workspace, *more: str) -> list[str]:
    """The words of `gmail STAGE` with a profile of its own."""
    workspace.root.mkdir(exist_ok=True)
    text = workspace.root / "profile.toml"
    text.write_text(profiles.dump(profile))
    options = ["--profile", str(text), "--workspace", str(workspace.root), "--run", workspace.run, *more]
    return ["-m", "gmail_cli.cli", stage, *options]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def killed_and_resumed(arguments: list[str], checkpoint: Path) -> Artifact:
    """What a process that is killed at its first checkpoint and another one make."""
    with subprocess.Popen([sys.executable, *arguments], env=environment(), stderr=subprocess.PIPE, text=True) as child:
        while not checkpoint.exists() and child.poll() is None:
            time.sleep(0.005)
        assert child.poll() is None, child.communicate()[1]
        child.send_signal(signal.SIGKILL)
    again = subprocess.run([sys.executable, *arguments], env=environment(), check=True, capture_output=True, text=True)
    return Artifact.load(Path(again.stdout.strip()))


def plain_names(file: Path) -> bool:
    return not any("_orig_mod" in name for name in load_file(file))


def test_align_ends_in_the_same_bytes_after_a_kill(folder: Path, generated: Artifact, tmp_path: Path) -> None:
    profile, killed = aligning(folder), Workspace(tmp_path / "killed", "test")
    key = align.plan_key(profile, generated=generated.digest)
    checkpoint = killed.folder("align") / f"{key.digest[:12]}.partial/scratch/tower.safetensors"
    resumed = killed_and_resumed(command("align", profile, killed, "--generated", str(generated.path)), checkpoint)
    counters.clear()
    whole = align.run(profile, Workspace(tmp_path / "whole", "test"), generated=generated)
    assert counters["stats"]["unique_graphs"] == 2, "the first block, whose input takes no gradient, and all others"
    assert resumed.content == whole.content

    plain = align.run(aligning(folder, compile=False), Workspace(tmp_path / "plain", "test"), generated=generated)
    assert plain.digest != whole.digest
    assert "compile" not in plain.manifest["key"]["settings"]
    curves = [[row["loss"] for row in each.read_jsonl("metrics.jsonl")] for each in (whole, plain)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)
    assert plain_names(whole.file("adapter/adapter_model.safetensors"))
    loaded = open_clip.create_model(f"local-dir:{whole.folder('clip')}").eval()
    tower = tuning.load_adapter(clip_files.load_clip(folder / "clip"), whole.folder("adapter"))
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels), loaded.encode_image(pixels, normalize=True), atol=1e-5, rtol=0)


def test_two_processes_align_as_one_does(folder: Path, generated: Artifact, tmp_path: Path) -> None:
    profile = aligning(folder, steps=20)
    shared = Workspace(tmp_path / "shared", "test")
    arguments = command("align", profile, shared, "--generated", str(generated.path))
    together = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--no-python",
        "--",
    ]
    together += [sys.executable, *arguments]
    done = subprocess.run(together, env=environment(), check=True, capture_output=True, text=True, timeout=300)
    alone = align.run(profile, Workspace(tmp_path / "alone", "test"), generated=generated)
    found = Artifact.load(Path(done.stdout.strip()))
    assert found.digest == alone.digest
    curves = [[row["loss"] for row in each.read_jsonl("metrics.jsonl")] for each in (found, alone)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_a_captioner_ends_in_the_same_bytes_after_a_kill(folder: Path, tmp_path: Path) -> None:
    (folder / "world").mkdir()
    world = World(folder / "world").make()
    options = {"tasks": ["clipcap"], "arms": ["real"], "steps": 120, "batch_size": 4, "caption_tokens": 12}
    profile, killed = world.profile(**options, compile=True), Workspace(tmp_path / "killed", "test")
    digest = train.plan_key(profile).digest
    checkpoint = killed.folder("train") / f"{digest[:12]}.partial/scratch/clipcap.real.seed0.checkpoint.safetensors"
    resumed = killed_and_resumed(command("train", profile, killed), checkpoint)
    counters.clear()
    whole = train.run(profile, Workspace(tmp_path / "whole", "test"))
    assert counters["stats"]["unique_graphs"] == 1, "captions of all lengths are read at one"
    assert resumed.content == whole.content
    assert plain_names(whole.file("clipcap.real.seed0/head.safetensors"))
    plain = train.run(world.profile(**options), Workspace(tmp_path / "plain", "test"))
    assert plain.digest != whole.digest
    cell = "clipcap.real.seed0"
    curves = [[row["loss"] for row in each.read_jsonl(f"{cell}/metrics.jsonl")] for each in (whole, plain)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)


def test_text_towers_are_shown_few_shapes() -> None:
    clip = clip_files.build_clip(VIT)
    texts = [f"{'red ' * (row % 7)}ball {row}" for row in range(20)]
    ids = clip.tokenize(texts).ids
    wanted = clip.encode_texts(texts)
    compilation.compile_blocks(clip.model)
    counters.clear()
    with torch.no_grad():
        for rows in (1, 7, 20):
            found = nn_normalised(encoders.text_features(clip.model, ids[:rows]))
            torch.testing.assert_close(found, wanted[:rows], atol=1e-5, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1


def nn_normalised(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features, dim=-1)


REGIONS = {
    "sd1": {"BasicTransformerBlock"},
    "sdxl": {"BasicTransformerBlock"},
    "flux": {"FluxTransformerBlock", "FluxSingleTransformerBlock"},
    "sd3": {"JointTransformerBlock"},
    "pixart-sigma": {"BasicTransformerBlock"},
    "sana": {"SanaTransformerBlock"},
}


@pytest.mark.parametrize("kind", REGIONS)
def test_the_blocks_of_every_denoiser_are_found(kind: str) -> None:
    pipeline = KINDS[kind]()
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    compilation.compile_blocks(denoiser)
    assert {type(each).__name__ for each in denoiser.modules() if each._compiled_call_impl} == REGIONS[kind]


def drawing(folder: Path, captions: Path, **changes: Any) -> Profile:
    options = {"model": str(folder), "steps": 2, "guidance": 2.0, "batch_size": 4, "compile": True, **changes}
    return build(
        {
            "data": {"train": str(captions)},
            "generate": options,
            "runtime": {"device": "cpu", "threads": 1, "workers": 1},
        }
    )


def test_images_are_the_same_bytes_in_any_order_part_and_process(folder: Path, tmp_path: Path) -> None:
    pipeline = save("sd1", folder / "sd1")
    sampling = diffusion.Sampling(steps=2, guidance=2.0, batch_size=4)
    sampler = diffusion.Sampler(pipelines.load_pipeline(str(pipeline), compiled=True), sampling=sampling)
    jobs = [
        diffusion.Job(f"c{row}", f"{word} on a table", 0) for row, word in enumerate(["cat", "dog", "cow", "a", "b"])
    ]

    def drawn(some: list[diffusion.Job]) -> dict[diffusion.Job, bytes]:
        return {each.job: each.pixels.tobytes() for batch in sampler.draw(some) for each in batch}

    counters.clear()
    whole = drawn(jobs)
    assert counters["stats"]["unique_graphs"] == 1
    assert drawn(jobs[::-1]) == drawn(jobs[::2]) | drawn(jobs[1::2]) == whole
    assert counters["stats"]["unique_graphs"] == 1

    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(job.prompt for job in jobs))
    profile, workspace = drawing(pipeline, captions), Workspace(tmp_path / "runs", "test")
    artifact = generate.run(profile, workspace)
    plain = drawing(pipeline, captions, compile=False)
    assert "compile" not in generate.plan_key(plain).settings
    assert checking.regenerate(plain, artifact, count=3) == []
    words = command("artifacts", plain, workspace)
    words[3:3] = ["verify", "--regenerate", "5"]  # compiles in a process of its own, as the artifact says it was drawn
    subprocess.run([sys.executable, *words], env=environment(), check=True, capture_output=True, text=True)


@pytest.mark.parametrize("stage", ["generate", "align", "train"])
def test_a_machine_without_a_compiler_is_told_before_any_work(
    stage: str, folder: Path, generated: Artifact, tmp_path: Path
) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a cat")
    aligned = aligning(folder)
    options = {"tasks": ["clip-text"], "arms": ["real"], "compile": True}
    ready = build(
        aligned.model_dump() | drawing(Path("tiny"), captions).model_dump(include={"generate"}) | {"train": options}
    )
    workspace = Workspace(tmp_path / "runs", "test")
    seen: list[tuple[int, int]] = []

    def progress(*at: int) -> None:
        seen.append(at)

    nothing = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with nothing, pytest.raises(SetupError, match=rf"^{stage}\.compile = true needs a C\+\+ compiler"):
        if stage == "generate":
            generate.run(ready, workspace, progress=progress)
        elif stage == "align":
            align.run(ready, workspace, generated=generated, progress=progress)
        else:
            train.run(ready, workspace, progress=progress)
    assert seen == []


@pytest.mark.parametrize(
    ("settings", "runtime", "message"),
    [
        ({"tasks": ["linear-probe"]}, {}, "train.compile = true: none of the tasks ['linear-probe'] is compiled"),
        ({"tasks": ["llava"]}, {"sharding": "full"}, "train.compile = true does not go with runtime.sharding = 'full'"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    folder: Path, generated: Artifact, tmp_path: Path, settings: dict[str, Any], runtime: dict[str, Any], message: str
) -> None:
    values = aligning(folder).model_dump()
    values["train"] = {"arms": ["real"], "compile": True, **settings}
    values["runtime"] |= runtime
    with pytest.raises(UsageError, match=re.escape(message)):
        train.run(build(values), Workspace(tmp_path, "test"))
