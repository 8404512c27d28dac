"""``gmail train`` by several gloo processes: the curves of one, killed and gone on with another number of them, which
share out the language model."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_training import IMAGES, SIDE, World, clip_config
from test_heads import TEXTS, pairs_of
from test_llava import record

from gmail_cli import plan
from gmail_cli.artifacts import Workspace
from gmail_cli.components import captions, loop, parallel
from gmail_cli.components.arms import Arm, View
from gmail_cli.components.clip_files import build_clip
from gmail_cli.components.parallel import Ranks
from gmail_cli.components.tasks import clip_job
from gmail_cli.errors import UsageError
from gmail_cli.profile.schema import Profile

SELF = Path(__file__)
TASKS = ("linear-probe", "clip-text", "long-clip", "clip", "clipcap", "ifcap", "sitta", "llava")
WEIGHTS = {"clipcap": "head", "ifcap": "head", "llava": "projector", "sitta": "head"}
"""Not a CLIP's: its key biases have no gradient but rounding, which AdamW makes steps of."""


def profile_of(home: World, talks: Path, *, sharding: str = "none") -> Profile:
    settings: dict[str, Any] = {
        "tasks": list(TASKS),
        "arms": ["mixed"],
        "kinds": ["long"],
        "steps": 20,
        "batch_size": 10,
        "context_length": 96,
        "dual_projection": "on",
        "visual_grid": 2,
        "lora_rank": 2,
        "conversations": str(talks),
    }
    profile = home.profile(**settings)
    return profile.model_copy(update={"runtime": profile.runtime.model_copy(update={"sharding": sharding})})


def write_talks(home: World) -> Path:
    """A text for every image, and as many without one: some shares of a batch show no image at all."""
    data = captions.read("scenes:train", limit=IMAGES, scene_size=SIDE)
    talks = [record("<image>\nwhat", data.captions_of(each.id)[0].text, image=f"{each.id}.jpg") for each in data.images]
    file = home.folder / "talks.json"
    file.write_text(json.dumps([*talks, *[record("which ball", "red")] * 3 * len(talks)]))
    return file


def test_processes_train_as_one_does_and_go_on_in_another_number(tmp_path: Path) -> None:
    home = World(tmp_path / "home")
    home.folder.mkdir()
    home.make()
    profile = profile_of(home, write_talks(home))
    environment = os.environ | {"PYTHONPATH": f"{SELF.parents[1]}:{SELF.parent}", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(SELF), str(home.folder), str(tmp_path)]
    with subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, text=True) as run:
        alone = plan.execute(
            profile,
            Workspace(tmp_path, "alone"),
            stages=["train"],
            given=home.inputs(),
            progress=lambda _: lambda *_: None,
        )["train"]
        told, _ = run.communicate(timeout=300)
    assert told.split() == ["killed"] * 2 + ["finished"] * 3
    found = Workspace(tmp_path, "together").latest("train")
    assert found is not None
    assert found.digest == alone.digest
    for row in alone.read_json("cells.json"):
        curves = [made.read_jsonl(f"{row['folder']}/metrics.jsonl") for made in (alone, found)]
        assert [len(curve) for curve in curves] == [0 if row["task"] == "sitta" else 2] * 2
        for column in curves[0][0] if curves[0] else ():
            wanted, given = ([each[column] for each in curve] for curve in curves)
            assert given == pytest.approx(wanted, abs=1e-5, rel=1e-4 if column == "grad_norm" else 0), row["name"]
        if row["task"] in WEIGHTS:
            name = f"{row['folder']}/{WEIGHTS[row['task']]}.safetensors"
            weights = [load_file(made.file(name)) for made in (alone, found)]
            for key, value in weights[0].items():
                torch.testing.assert_close(weights[1][key], value, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("tower", "dropout", "named"),
    [
        ({}, 0.5, r"train.patch_dropout = 0.5 would see .* of each of 2 processes"),
        ({"layers": [1, 1, 1, 1], "width": 8, "patch_size": None}, 0.0, "the batch normalisation of custom would see"),
    ],
)
def test_what_depends_on_the_whole_batch_is_not_shared(
    tower: dict[str, Any], dropout: float, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = clip_config(600)
    del config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]
    config["model_cfg"]["text_cfg"]["vocab_size"] = 49408
    config["model_cfg"]["vision_cfg"] |= tower
    clip, pairs = build_clip(config), pairs_of(TEXTS, labels=(-1,) * 4, names=())
    assert pairs.real is not None
    arm = Arm((View(torch.zeros(4, SIDE, SIDE, 3, dtype=torch.uint8), pairs.real, real=True),))
    monkeypatch.setattr(parallel, "ranks", lambda: Ranks(0, 2))
    with pytest.raises(UsageError, match=named):
        clip_job(clip, pairs, arm, patch_dropout=dropout)


@pytest.mark.parametrize(("tower", "together"), [("fastvit_t8", False), ("convnext_atto", True)])
def test_channels_lie_together_but_where_torch_writes_past_its_memory(tower: str, together: bool) -> None:
    """In MobileCLIP's stem there are strided convolutions of one pixel."""
    config = clip_config(49408)
    del config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]
    vision = {"image_size": 64, "timm_model_name": tower, "timm_model_pretrained": False, "timm_pool": "avg"}
    config["model_cfg"] |= {"vision_cfg": vision, "custom_text": True}
    clip, pairs = build_clip(config), pairs_of(TEXTS, labels=(-1,) * 4, names=())
    assert pairs.real is not None
    arm = Arm((View(torch.zeros(4, 64, 64, 3, dtype=torch.uint8), pairs.real, real=True),))
    job, seen = clip_job(clip, pairs, arm), []
    job.module.visual.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    value = job.loss(torch.arange(4), 0)
    (value[0] if isinstance(value, tuple) else value).backward()
    kernels = [each for each in job.module.parameters() if each.ndim == 4 and min(each.shape[1:]) > 1]
    for each in [*seen, *kernels]:
        assert each.is_contiguous(memory_format=torch.channels_last) == together
        assert each.is_contiguous() != together


def start(home: World, results: Workspace, count: int) -> list[int]:
    """As many processes as torchrun would start, with its variables; their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            sharding = "full" if count == 3 else "none"
            profile = profile_of(home, home.folder / "talks.json", sharding=sharding)
            plan.execute(profile, results, stages=["train"], given=home.inputs(), progress=lambda _: lambda *_: None)
            os._exit(0)
    return children


if __name__ == "__main__":  # two processes, killed when the last cell has a checkpoint; then three finish
    loop.CHECKPOINT_SHARE = math.inf
    results = Workspace(Path(sys.argv[2]), "together")
    for count in (2, 3):
        children = start(World(Path(sys.argv[1])), results, count)
        while count == 2 and not list(results.folder("train").glob("*/scratch/llava.*.checkpoint.safetensors")):
            time.sleep(0.01)
        for child in children:
            if count == 2:
                os.kill(child, signal.SIGKILL)
        for child in children:
            _, status = os.waitpid(child, 0)
            print("killed" if os.WIFSIGNALED(status) else "finished" if status == 0 else "failed", flush=True)
