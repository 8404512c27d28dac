"""What goes wrong while images are made: Ctrl-C, disks, captions, shards, hubs. Nothing is lost, all is named."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gmail_cli import cli
from gmail_cli.artifacts import Artifact
from gmail_cli.components import pipelines
from gmail_cli.stages.generate import drawing

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a file of 24 captions."""
    monkeypatch.chdir(tmp_path)
    Path("captions.txt").write_text("".join(f"a cat and {row} dogs\n" for row in range(24)))
    return tmp_path


def gmail(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["gmail", *arguments])
    try:
        cli.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def line(pipeline: Path | str, *more: str, captions: str = "captions.txt", run: str = "one") -> list[str]:
    options = [f"generate.model={pipeline}", "generate.steps=2", "generate.guidance=2.0", "generate.batch_size=4"]
    return ["generate", "--captions", captions, "--run", run, *(f"--set={each}" for each in options), *more]


def latest(run: str, workspace: str = "runs") -> Artifact:
    return Artifact.load(Path(workspace, run, "generate", "latest"))


def test_ctrl_c_finishes_the_batch_and_says_what_is_there(
    here: Path, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting(drawing.Work):
        def _chunks(self, *arguments: object) -> Iterator[list[drawing.Task]]:
            for number, chunk in enumerate(super()._chunks(*arguments)):  # type: ignore[arg-type]
                if number == 2:
                    os.kill(os.getpid(), signal.SIGINT)
                yield chunk

    with monkeypatch.context() as patched:
        patched.setattr("gmail_cli.stages.generate.Work", Interrupting)
        assert gmail(monkeypatch, *line(pipeline_folder)) == 130
    told = capsys.readouterr().err
    assert "interrupted: 12 of 24 images are there; the same command resumes where it stopped" in told
    records = next(here.glob("runs/one/generate/*.partial/scratch/records/*.growing"))
    rows = [json.loads(each) for each in records.read_text().splitlines()]
    assert len(rows) == len(list(here.rglob("*.png"))) == 12
    assert gmail(monkeypatch, *line(pipeline_folder)) == 0
    assert gmail(monkeypatch, *line(pipeline_folder, "--workspace", "whole")) == 0
    assert latest("one").content == latest("one", "whole").content


@pytest.mark.parametrize("largest", [700, 3000])  # an image does not fit; the log does not, and is torn
def test_a_file_that_may_not_grow_is_named_and_nothing_is_lost(
    here: Path,
    pipeline_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    largest: int,
) -> None:
    """The kernel's own refusal, at a limit on the size of files, in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        assert gmail(monkeypatch, *line(pipeline_folder)) == 4
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    name = ".png" if largest == 700 else ".growing"
    told = capsys.readouterr().err
    assert f"{name}\n" in told.partition("larger than this system allows: could not write ")[2]
    assert "finished files are kept" in told
    assert not list(here.rglob("*.tmp"))
    assert gmail(monkeypatch, *line(pipeline_folder)) == 0
    assert gmail(monkeypatch, *line(pipeline_folder, "--workspace", "whole")) == 0
    assert latest("one").content == latest("one", "whole").content


def test_captions_that_break_in_the_middle_stop_before_anything_is_drawn(
    here: Path, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("captions.jsonl").write_text('{"caption": "a cat"}\n{"caption": "a d')
    assert gmail(monkeypatch, *line(pipeline_folder, captions="captions.jsonl")) == 3
    assert "captions.jsonl:2: not JSON" in capsys.readouterr().err
    assert not list(here.glob("runs/**/*.png"))
    assert gmail(monkeypatch, *line(pipeline_folder, "--on-bad", "skip", captions="captions.jsonl")) == 0
    assert latest("one").summary["images"] == 1


def test_a_shard_that_ends_early_is_named_before_anything_is_taken_from_it(
    here: Path, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gmail(monkeypatch, *line(pipeline_folder)) == 0
    assert gmail(monkeypatch, "artifacts", "export", str(latest("one").path), "set", "--shard-images", "12") == 0
    shard = here / "set" / "00001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    taken = ["generate", "--import", "set/*.tar", "--run", "taken"]
    assert gmail(monkeypatch, *taken) == 3
    assert "cannot read the tar" in (told := capsys.readouterr().err)
    assert "00001.tar" in told
    shard.write_bytes(whole)
    assert gmail(monkeypatch, *taken) == 0
    assert latest("taken").summary["images"] == 24


def test_a_hub_that_has_gone_is_no_loss_to_what_is_cached(
    here: Path, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real cache of the hub, and an address at which nobody answers."""
    from huggingface_hub import constants

    commit = "0123456789" * 4
    repository = here / "cache" / "models--some--model"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "snapshots" / commit).symlink_to(pipeline_folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(here / "cache"), raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between five attempts
    assert gmail(monkeypatch, *line("some/model", f"--set=generate.revision={commit}")) == 0, capsys.readouterr().err
    gone = line("some/other", "--set=generate.revision=abc", run="gone")
    assert gmail(monkeypatch, *gone) == 4
    told = capsys.readouterr().err
    assert "generate.model = 'some/other' cannot be loaded: the hub cannot be reached" in told
    assert "hf download some/other --revision abc" in told


class Full:
    """A memory that holds so many rows of the denoiser (of which guidance takes two an image), after some refusals."""

    def __init__(self, rows: int, *, refusals: int = 0) -> None:
        self.rows, self.refusals = rows, refusals

    def __call__(self, module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        self.refusals -= 1
        if len(inputs[0]) > self.rows or self.refusals >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[Full], None]:
    """Give the pipelines that are loaded from now on a memory."""
    load = pipelines.load_pipeline

    def limit(full: Full) -> None:
        def loaded(*arguments: Any, **options: Any) -> Any:
            pipeline = load(*arguments, **options)
            pipeline.unet.register_forward_pre_hook(full)
            return pipeline

        monkeypatch.setattr(pipelines, "load_pipeline", loaded)

    return limit


def test_a_batch_that_fits_once_the_memory_is_emptied_gives_the_same_bytes(
    here: Path, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, memory: Callable[[Full], None]
) -> None:
    assert gmail(monkeypatch, *line(pipeline_folder, "--workspace", "whole")) == 0
    memory(full := Full(8, refusals=1))
    assert gmail(monkeypatch, *line(pipeline_folder)) == 0
    assert full.refusals < 0
    assert latest("one").content == latest("one", "whole").content


def test_a_warm_up_finds_the_batch_that_fits_and_a_run_names_a_smaller_one(
    here: Path,
    pipeline_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    memory: Callable[[Full], None],
) -> None:
    memory(Full(2))  # one image
    assert gmail(monkeypatch, *line(pipeline_folder, "--dry-run", "--warm-up", "2")) == 0
    assert "does not fit the memory; use --set generate.batch_size=1\n" in capsys.readouterr().out
    assert not list(here.rglob("*.png"))
    assert gmail(monkeypatch, *line(pipeline_folder)) == 4
    told = capsys.readouterr().err
    assert "a batch of 4 images does not fit the memory" in told
    assert "--set generate.batch_size=2" in told
    memory(Full(0))
    assert gmail(monkeypatch, *line(pipeline_folder, "--dry-run", "--warm-up", "2")) == 4
    assert "a batch of 1 images does not fit" in capsys.readouterr().err
