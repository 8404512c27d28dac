"""Features of frozen towers: computed once, shared, resumed, swept up when nothing needs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gmail_cli.artifacts import Artifact, StageKey, Workspace
from gmail_cli.errors import InputError
from gmail_cli.stages import features
from gmail_cli.stages.features import Features

IMAGES, DIM = 20, 3


class Tower:
    """Embeds image i as the unit vector of (i, 1, 2), and says which rows it was asked for."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.asked: list[tuple[int, int]] = []
        self.fails_at = fails_at

    def __call__(self, start: int, stop: int) -> np.ndarray:
        if start == self.fails_at:
            raise KeyboardInterrupt
        self.asked.append((start, stop))
        rows = np.stack([[row, 1.0, 2.0] for row in range(start, stop)]).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def wanted(*, count: int = IMAGES, encoder: str = "e", precision: str = "fp32") -> Features:
    images = tuple(f"sha{number}" for number in range(count))
    return Features(images=images, what="real images", encoder="tiny", encoder_digest=encoder, precision=precision)


def load(
    workspace: Workspace, tower: Tower, *, wanted: Features, reader: str = "a", parent: str | None = None
) -> np.ndarray:
    """The features, read by an align artifact called ``reader``."""
    inputs = {} if parent is None else {"generated": parent}
    with workspace.open(StageKey(stage="align", settings={"name": reader}, inputs=inputs)) as slot:
        found = features.load(wanted, workspace, slot, embed=tower, device="cpu")
        slot.commit(summary={})
    return found


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CHUNK", 8)


def test_the_second_reader_computes_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    workspace, tower = Workspace(tmp_path, "r", tell=said.append), Tower()
    first = load(workspace, tower, wanted=wanted())
    second = load(workspace, tower, wanted=wanted(), reader="b")
    assert tower.asked == [(0, 8), (8, 16), (16, 20)]
    np.testing.assert_array_equal(first, Tower()(0, IMAGES))
    np.testing.assert_array_equal(second, first)
    name = f"features {wanted().key.digest[:12]} (20 real images through tiny)"
    assert said == [f"computing {name}", f"reusing {name}"]
    assert all(artifact.verify() == [] for artifact in workspace.artifacts())


def test_other_runs_read_them_in_place(tmp_path: Path) -> None:
    tower = Tower()
    for run in ("one", "two"):
        load(Workspace(tmp_path, run), tower, wanted=wanted())
    assert len(tower.asked) == 3
    assert not (tmp_path / "two" / "features").exists()


@pytest.mark.parametrize("other", [{"count": 19}, {"encoder": "f"}, {"precision": "bf16"}])
def test_other_images_towers_and_arithmetic_are_other_features(other: dict[str, str], tmp_path: Path) -> None:
    workspace, tower = Workspace(tmp_path, "r"), Tower()
    load(workspace, Tower(), wanted=wanted())
    load(workspace, tower, wanted=wanted(**other), reader="b")
    assert len(tower.asked) == 3


def test_an_interrupted_computation_goes_on_at_its_shard(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, "r")
    with pytest.raises(KeyboardInterrupt):
        load(workspace, Tower(fails_at=8), wanted=wanted())
    tower = Tower()
    found = load(workspace, tower, wanted=wanted())
    assert tower.asked == [(8, 16), (16, 20)]
    np.testing.assert_array_equal(found, Tower()(0, IMAGES))


def test_without_images_there_are_no_rows_of_the_right_width(tmp_path: Path) -> None:
    empty = np.zeros((0, DIM), dtype=np.float32)
    with Workspace(tmp_path, "r").open(StageKey(stage="align", settings={})) as slot:
        found = features.load(
            wanted(count=0), Workspace(tmp_path, "r"), slot, embed=lambda start, stop: empty, device="cpu"
        )
    assert found.shape == (0, DIM)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, "r")
    load(workspace, Tower(), wanted=wanted())
    artifact = features.find(wanted(), workspace)
    assert artifact is not None
    with artifact.file("vectors.npy").open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(InputError, match=r"vectors\.npy is damaged: 100 bytes"):
        load(workspace, Tower(), wanted=wanted(), reader="b")


def test_garbage_is_what_no_kept_artifact_has_read(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, "r")
    old, new = wanted(count=10), wanted(count=12)
    load(workspace, Tower(), wanted=old)
    load(workspace, Tower(), wanted=new, reader="b")  # align's latest
    paths = {each.key.digest: _there(features.find(each, workspace)).path for each in (old, new)}
    removed = workspace.collect_garbage()
    assert paths[old.key.digest] in removed
    assert [artifact.stage for artifact in workspace.artifacts()] == ["features", "align"]
    assert features.find(new, workspace) is not None
    assert features.find(old, workspace) is None


def _there(artifact: Artifact | None) -> Artifact:
    assert artifact is not None
    return artifact
