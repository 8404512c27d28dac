"""Generation that is interrupted, or shared by several processes, ends in the bytes of one that is not."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from test_generate import profile_for

from gmail_cli.artifacts import Artifact, Waiting, Workspace
from gmail_cli.errors import SetupError, UsageError
from gmail_cli.profile import build
from gmail_cli.stages import generate
from gmail_cli.stages.generate import drawing

# some of diffusers' schedulers ask numpy for copies in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


PRELOADED = [
    "gmail_cli.stages.generate.drawing",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.schedulers.scheduling_ddim",
    "transformers.models.clip.modeling_clip",
]


def test_killed_again_and_again_a_run_ends_in_the_bytes_of_one_never_killed(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path
) -> None:
    profile = profile_for(pipeline_folder, captions_file, per_caption=3, steps=3)  # 72 images in 18 batches
    expected = generate.run(profile, Workspace(tmp_path / "whole"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder = Workspace(tmp_path / "killed").folder("generate") / f"{expected.digest[:12]}.partial"
    chance = random.Random(7)
    kills = 0
    for target in sorted(chance.sample(range(1, 66), 3)):
        child = context.Process(target=generate.run, args=(profile, Workspace(tmp_path / "killed")))
        child.start()
        while child.is_alive() and len(list(folder.rglob("images/*/*.png"))) < target:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.1)
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
    assert kills >= 2
    assert len(list(folder.rglob("images/*/*.png"))) > 50
    resumed = generate.run(profile, Workspace(tmp_path / "killed"))
    assert resumed.files == expected.files
    assert resumed.content == expected.content
    assert resumed.summary == expected.summary
    assert resumed.verify() == []


def test_ctrl_c_finishes_the_batch_and_the_next_run_goes_on_from_there(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path
) -> None:
    profile = profile_for(pipeline_folder, captions_file)
    expected = generate.run(profile, Workspace(tmp_path / "whole"))
    workspace = Workspace(tmp_path / "stopped")

    def stop(done: int, total: int) -> None:
        if done == 8:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        generate.run(profile, workspace, progress=stop)
    assert signal.getsignal(signal.SIGINT) is handler
    assert workspace.is_partial(generate.plan_key(profile))
    told: list[int] = []
    resumed = generate.run(profile, workspace, progress=lambda done, total: told.append(done))
    assert told[0] == 12 == told[1] - 4
    assert resumed.content == expected.content


@pytest.mark.parametrize("last", [3, 6, 11])  # the key, then four images and their log in turn
def test_a_full_disk_is_named_and_nothing_is_lost(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    profile = profile_for(pipeline_folder, captions_file, limit=6)
    expected = generate.run(profile, Workspace(tmp_path / "whole"))
    workspace, whole, calls = Workspace(tmp_path / "full"), os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > last:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(SetupError, match="the disk is full"):
            generate.run(profile, workspace)
    assert generate.run(profile, workspace).content == expected.content


def test_a_damaged_image_of_an_interrupted_run_is_made_again(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path
) -> None:
    profile = profile_for(pipeline_folder, captions_file)
    expected = generate.run(profile, Workspace(tmp_path / "whole"))
    workspace = Workspace(tmp_path / "stopped")

    def stop(done: int, total: int) -> None:
        if done >= 8:
            raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        generate.run(profile, workspace, progress=stop)
    partial = workspace.folder("generate") / f"{expected.digest[:12]}.partial"
    (partial / "images" / "000" / "102-0.png").write_bytes(b"torn")
    with (partial / "scratch" / "records" / "000000000.growing").open("ab") as stream:
        stream.write(b'{"key": "torn')
    assert generate.run(profile, workspace).files == expected.files


# -- parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_drawn_apart_end_in_the_bytes_of_one_process(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    monkeypatch.setattr(drawing, "SHARD", 8)
    profile = profile_for(pipeline_folder, captions_file, per_caption=2, scheduler="EulerAncestralDiscreteScheduler")
    expected = generate.run(profile, Workspace(tmp_path / "whole"))  # 48 images in 6 shards
    workspace = Workspace(tmp_path / "parts")
    found = [generate.run_part(profile, workspace, part=(part, parts)) for part in range(parts, 0, -1)]
    counts = [each.done for each in found[:-1] if isinstance(each, Waiting)]
    assert len(counts) == parts - 1, "only the last one finds every shard done"
    assert counts == sorted(set(counts))
    assert isinstance(found[-1], Artifact)
    assert found[-1].content == expected.content
    assert found[-1].verify() == []
    assert found[-1].summary == expected.summary
    again = generate.run_part(profile, workspace, part=(1, parts))
    assert isinstance(again, Artifact)


def test_a_run_without_part_finishes_what_parts_left_and_makes_lost_images_again(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "SHARD", 8)
    profile = profile_for(pipeline_folder, captions_file)  # 24 images in 3 shards
    expected = generate.run(profile, Workspace(tmp_path / "whole"))
    workspace = Workspace(tmp_path / "parts")
    told: list[tuple[int, int]] = []
    waiting = generate.run_part(profile, workspace, part=(2, 2), progress=lambda *at: told.append(at))
    assert waiting == Waiting(generate.plan_key(profile), 2, 3)
    assert told[-1] == (16, 16)
    lost = next(workspace.folder("generate").rglob("111-0.png"))
    lost.write_bytes(b"torn")
    assert generate.run(profile, workspace).content == expected.content


def test_shards_that_another_process_draws_are_left_to_it(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "SHARD", 8)
    profile, workspace = profile_for(pipeline_folder, captions_file), Workspace(tmp_path)
    with (
        workspace.open(generate.plan_key(profile), shared=True) as slot,
        slot.log("records/000000008").claim() as mine,
    ):
        assert mine
        waiting = generate.run_part(profile, workspace, part=(1, 1))
        assert isinstance(waiting, Waiting)
        assert waiting.done == 2
    assert isinstance(generate.run_part(profile, workspace, part=(1, 1)), Artifact)


@pytest.mark.parametrize("part", [(0, 2), (3, 2)])
def test_parts_that_do_not_exist_are_refused(part: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"part {part[0]} of 2"):
        generate.run_part(build({}), Workspace(tmp_path), part=part)
