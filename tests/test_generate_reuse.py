"""A set that has images in common with finished ones takes them over, and is the set that is drawn anew."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import test_mix
import test_rewriting
from test_generate import profile_for
from test_mix import MIX, folders  # noqa: F401
from test_rewriting import OWN, folder  # noqa: F401

from gmail_cli.artifacts import Artifact, Waiting, Workspace
from gmail_cli.components import captions, diffusion, pipelines
from gmail_cli.profile import build
from gmail_cli.stages import generate
from gmail_cli.stages.generate import checking, drawing

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


class Drawn:
    """How many images the sampler has drawn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        draw = diffusion.Sampler.draw

        def counted(sampler: diffusion.Sampler, jobs: Any, **where: Any) -> Any:
            for batch in draw(sampler, jobs, **where):
                self.count += len(batch)
                yield batch

        monkeypatch.setattr(diffusion.Sampler, "draw", counted)

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    monkeypatch.setattr(drawing, "SHARD", 8)
    return Drawn(monkeypatch)


def same(artifact: Artifact, expected: Artifact) -> None:
    """The files of a set that was drawn anew, and but for what was taken over its summary."""
    assert artifact.verify() == []
    assert artifact.content == expected.content
    assert {**artifact.summary, "reused": None} == {**expected.summary, "reused": None}
    assert artifact.manifest["device"] == expected.manifest["device"]


def test_more_images_of_each_caption_are_drawn_beside_those_that_are_there(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    workspace = Workspace(tmp_path / "runs", tell=told.append)
    one, three, two = (profile_for(pipeline_folder, captions_file, per_caption=count) for count in (1, 3, 2))
    expected = generate.run(three, Workspace(tmp_path / "anew"))
    first = generate.run(one, workspace)
    assert drawn.take() == 72 + 24
    assert told == []
    assert checking.estimate(three, workspace) == {"images": 72, "captions": 24, "reused": 24}
    at: list[tuple[int, int]] = []
    larger = generate.run(three, workspace, progress=lambda *each: at.append(each))
    assert drawn.take() == 48
    same(larger, expected)
    assert larger.summary["reused"] == {first.digest[:12]: 24}
    assert told == [f"generate: what {first.path} hold of these images is taken over"]
    assert at == sorted(at)
    assert at[-1] == (72, 72)
    links = [larger.path / row["path"] for row in larger.read_jsonl("records.jsonl") if row["k"] == 0]
    assert {path.stat().st_nlink for path in links} == {2}

    with monkeypatch.context() as patched:
        patched.setattr(pipelines, "load_pipeline", None)
        smaller = generate.run(two, Workspace(tmp_path / "runs", "another"))
        again = generate.run(three, Workspace(tmp_path / "runs", "another"))
    assert sum(smaller.summary["reused"].values()) == 48
    same(smaller, generate.run(two, Workspace(tmp_path / "anew-2")))
    same(again, expected)
    shutil.rmtree(first.path)
    assert larger.verify() == []


def test_more_captions_in_another_order_are_drawn_beside_those_that_are_there(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, drawn: Drawn
) -> None:
    content = json.loads(captions_file.read_text())
    content["images"].reverse()
    content["annotations"][5]["caption"] += ", at night"
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(content))
    generate.run(profile_for(pipeline_folder, captions_file, per_caption=2, limit=5), Workspace(tmp_path))
    drawn.take()
    profile = profile_for(pipeline_folder, changed, per_caption=2)
    made = generate.run(profile, Workspace(tmp_path))
    assert drawn.take() == 48 - 18  # those of one caption of the ten are others
    same(made, generate.run(profile, Workspace(tmp_path / "anew")))


@pytest.mark.parametrize("other", ["seed", "steps", "batch_size", "device", "version"])
def test_images_drawn_otherwise_are_not_taken(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, drawn: Drawn, other: str
) -> None:
    workspace = Workspace(tmp_path)
    profile = profile_for(pipeline_folder, captions_file, limit=2)
    changed: dict[str, Any] = {other: 3} if other in ("steps", "batch_size") else {}
    before = profile_for(pipeline_folder, captions_file, limit=2, per_caption=2, **changed)
    if other == "seed":
        before = before.model_copy(update={"seed": 1})
    artifact = generate.run(before, workspace)
    if other in ("device", "version"):
        file = artifact.path / "manifest.json"
        manifest = json.loads(file.read_text())
        if other == "device":
            manifest["device"] = "cuda: NVIDIA H200"
        else:
            manifest["key"]["version"] = 3
        file.write_text(json.dumps(manifest))
    drawn.take()
    assert "reused" not in generate.run(profile, workspace).summary
    assert drawn.take() == 4


def test_damaged_images_and_sets_are_drawn_again(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, drawn: Drawn
) -> None:
    workspace = Workspace(tmp_path / "runs")
    profile = profile_for(pipeline_folder, captions_file, limit=4, per_caption=2)
    first = generate.run(profile_for(pipeline_folder, captions_file, limit=4), workspace)
    gone, other = (first.path / row["path"] for row in first.read_jsonl("records.jsonl")[2:4])
    gone.unlink()
    other.write_bytes(other.read_bytes()[:-1] + b"\0")
    lines = (first.path / "records.jsonl").read_text().splitlines(keepends=True)
    lines[0] = lines[0].replace('"path":"images/', '"path":"images/../images/')
    (first.path / "records.jsonl").write_text("".join(lines))
    drawn.take()
    made = generate.run(profile, workspace)
    assert drawn.take() == 16 - 5
    expected = generate.run(profile, Workspace(tmp_path / "anew"))
    same(made, expected)
    shutil.rmtree(made.path)
    (first.path / "records.jsonl").unlink()
    drawn.take()
    same(generate.run(profile, workspace), expected)
    assert drawn.take() == 16


def test_stopped_half_way_it_goes_on_to_the_same_bytes_though_the_other_set_is_gone(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, drawn: Drawn
) -> None:
    profile = profile_for(pipeline_folder, captions_file, per_caption=3)
    expected = generate.run(profile, Workspace(tmp_path / "anew"))
    workspace = Workspace(tmp_path / "runs")
    first = generate.run(profile_for(pipeline_folder, captions_file), workspace)

    class Stop(Exception):  # noqa: N818
        pass

    for target in (3, 20, 37):

        def stop(done: int, total: int, target: int = target) -> None:
            if done >= target:
                raise Stop

        with pytest.raises(Stop):
            generate.run(profile, workspace, progress=stop)
    (partial,) = (tmp_path / "runs/default/generate").glob("*.partial")
    assert 37 <= len(list(partial.rglob("images/*/*.png"))) < 60
    shutil.rmtree(first.path)
    drawn.take()
    made = generate.run(profile, workspace)
    assert 24 <= drawn.take() < 48
    same(made, expected)
    assert 12 <= made.summary["reused"][first.digest[:12]] < 24


def test_killed_again_and_again_it_ends_in_the_same_bytes(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path
) -> None:
    profile = profile_for(pipeline_folder, captions_file, per_caption=3, steps=3)
    expected = generate.run(profile, Workspace(tmp_path / "anew"))
    generate.run(profile_for(pipeline_folder, captions_file, steps=3), Workspace(tmp_path / "runs"))
    context = multiprocessing.get_context("forkserver")
    partial = tmp_path / "runs/default/generate" / f"{expected.digest[:12]}.partial"
    kills = 0
    for target in (5, 31, 50):
        child = context.Process(target=generate.run, args=(profile, Workspace(tmp_path / "runs")))
        child.start()
        while child.is_alive() and len(list(partial.rglob("images/*/*.png"))) < target:
            time.sleep(0.002)
        child.kill()
        child.join()
        kills += child.exitcode != 0
    assert kills >= 2
    made = generate.run(profile, Workspace(tmp_path / "runs"))
    same(made, expected)
    assert sum(made.summary["reused"].values()) == 24


def test_parts_take_over_what_is_theirs(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, drawn: Drawn
) -> None:
    profile = profile_for(pipeline_folder, captions_file, per_caption=2)
    workspace = Workspace(tmp_path / "runs")
    generate.run(profile_for(pipeline_folder, captions_file, limit=7), workspace)
    drawn.take()
    parts = [generate.run_part(profile, workspace, part=(at, 3)) for at in (3, 1, 2)]
    assert [type(each) for each in parts] == [Waiting, Waiting, Artifact]
    assert isinstance(parts[2], Artifact)
    assert drawn.take() == 48 - 14
    same(parts[2], generate.run(profile, Workspace(tmp_path / "anew")))


def test_a_mixture_takes_over_the_images_of_each_generator(
    folders: Path,  # noqa: F811
    tmp_path: Path,
    drawn: Drawn,
) -> None:
    small, large = (test_mix.profile(folders, MIX, per_caption=count) for count in (1, 3))
    workspace = Workspace(tmp_path / "runs")
    generate.run(small, workspace)
    drawn.take()
    assert checking.estimate(large, workspace)["reused"] == 20
    made = generate.run(large, workspace)
    assert drawn.take() == 40
    same(made, generate.run(large, Workspace(tmp_path / "anew")))


def test_images_that_begin_as_real_ones_are_taken_over_while_those_are_the_same(
    folders: Path,  # noqa: F811
    tmp_path: Path,
    drawn: Drawn,
) -> None:
    workspace = Workspace(tmp_path / "runs")
    one, two = (test_mix.profile(folders, strength=0.5, per_caption=count) for count in (1, 2))
    generate.run(one, workspace)
    drawn.take()
    made = generate.run(two, workspace)
    assert drawn.take() == 20
    same(made, generate.run(two, Workspace(tmp_path / "anew")))
    others = two.model_copy(update={"data": two.data.model_copy(update={"scene_size": 32})})
    drawn.take()
    generate.run(others, workspace)
    assert drawn.take() == 40


def test_images_of_rewritten_captions_are_taken_over_where_the_same_is_written(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    drawn: Drawn,
) -> None:
    one, two = (test_rewriting.profile(folder, rewrite=OWN, per_caption=count) for count in (1, 2))
    workspace = Workspace(tmp_path / "runs")
    first = generate.run(one, workspace)
    drawn.take()
    expected = generate.run(two, Workspace(tmp_path / "anew"))
    count = len(first.read_jsonl("records.jsonl"))
    assert drawn.take() == 2 * count
    made = generate.run(two, workspace)
    assert drawn.take() == count
    same(made, expected)


def test_scores_and_choices_are_made_of_the_larger_set(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, drawn: Drawn
) -> None:
    workspace = Workspace(tmp_path / "runs")
    generate.run(profile_for(pipeline_folder, captions_file, limit=3, per_caption=2, keep_best=1), workspace)
    drawn.take()
    profile = profile_for(pipeline_folder, captions_file, limit=3, per_caption=4, keep_best=1)
    made = generate.run(profile, workspace)
    assert drawn.take() == 12
    anew = generate.run(profile, Workspace(tmp_path / "anew"))
    assert made.files["records.jsonl"] == anew.files["records.jsonl"]
    assert {**made.summary} == {**anew.summary}


def test_imported_images_are_brought_in_again(tmp_path: Path, pipeline_folder: Path, captions_file: Path) -> None:
    workspace = Workspace(tmp_path)
    drawn = generate.run(profile_for(pipeline_folder, captions_file, limit=2), workspace)
    for limit in (2, 1):
        profile = build({"generate": {"source": "import", "import_path": str(drawn.path), "limit": limit}})
        assert "reused" not in generate.run(profile, workspace).summary
    assert captions.read(str(drawn.path)).images
