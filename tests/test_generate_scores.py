"""Scores of generated images, which of them are kept, and what an export says of them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gmail_cli.artifacts import Artifact, Workspace
from gmail_cli.components import pipelines, quality
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import build
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import generate
from gmail_cli.stages.generate import checking, exporting

# some of diffusers' schedulers ask numpy for copies in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> tuple[Workspace, Artifact]:
    """Three images of each of four captions of scenes, with scores by the shipped CLIP."""
    workspace = Workspace(tmp_path_factory.mktemp("scored"))
    return workspace, generate.run(scored_profile(pipeline_folder), workspace)


def scored_profile(pipeline_folder: Path, **changed: Any) -> Profile:
    chosen = {"model": str(pipeline_folder), "steps": 2, "guidance": 2.0, "batch_size": 4, "per_caption": 3}
    chosen |= {"captions_per_image": 2, "score": True}
    return build({"data": {"train": "scenes:train", "train_limit": 2}, "generate": chosen | changed})


def test_scores_are_cosines_of_the_frozen_clip(scored: tuple[Workspace, Artifact], pipeline_folder: Path) -> None:
    from gmail_cli.components import captions, clip_files, embedding

    workspace, artifact = scored
    assert artifact.verify() == []
    drawn = generate.run(scored_profile(pipeline_folder, score=False), workspace)
    rows, plain = artifact.read_jsonl("records.jsonl"), drawn.read_jsonl("records.jsonl")
    new = {*quality.COLUMNS, "copy_of"}
    assert [{key: value for key, value in row.items() if key not in new} for row in rows] == plain
    assert generate.plan_key(scored_profile(pipeline_folder)).digest == artifact.digest
    clip = clip_files.load_clip("tiny")
    contents = [artifact.file(row["path"]).read_bytes() for row in rows]
    images = embedding.embed_images(clip, contents.__getitem__, len(rows))
    texts, _ = embedding.embed_texts(clip, [row["caption"] for row in rows])
    real = captions.read("scenes:train", limit=2)
    partners = embedding.embed_images(clip, real.image_bytes, 2)
    owners = [image.id for image in real.images]
    for at, row in enumerate(rows):
        twins = [images[at] @ images[other] for other in range(at // 3 * 3, at // 3 * 3 + 3) if other != at]
        assert row["clip_score"] == pytest.approx(2.5 * max(0, images[at] @ texts[at]), abs=1e-5)
        assert row["twin_similarity"] == pytest.approx(max(twins), abs=1e-5)
        assert row["partner_similarity"] == pytest.approx(images[at] @ partners[owners.index(row["owner"])], abs=1e-5)
        assert row["copy_similarity"] == pytest.approx((images[at] @ partners.T).max(), abs=1e-5)
        assert row["copy_of"] == owners[int((images[at] @ partners.T).argmax())]
    assert artifact.summary["clip_score"]["mean"] == pytest.approx(
        sum(row["clip_score"] for row in rows) / 12, abs=1e-5
    )
    assert checking.regenerate(scored_profile(pipeline_folder), artifact, count=2) == []


def test_the_best_are_kept_and_the_others_recorded_without_drawing_again(
    scored: tuple[Workspace, Artifact], pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, artifact = scored
    monkeypatch.setattr(pipelines, "load_pipeline", None)  # nothing is drawn
    rows = artifact.read_jsonl("records.jsonl")
    best = generate.run(scored_profile(pipeline_folder, keep_best=1), workspace)
    kept, rejected = best.read_jsonl("records.jsonl"), best.read_jsonl("rejected.jsonl")
    groups = [rows[at : at + 3] for at in range(0, 12, 3)]
    assert kept == [max(group, key=lambda row: row["clip_score"]) for group in groups]
    assert [{key: value for key, value in row.items() if key != "reason"} for row in rejected] == [
        row for row in rows if row not in kept
    ]
    assert {row["reason"] for row in rejected} == {"not among the 1 best of its caption"}
    assert set(best.files) == {"records.jsonl", "rejected.jsonl", "report.html", *(row["path"] for row in kept)}
    assert best.verify() == []
    assert (best.summary["images"], best.summary["rejected"], best.summary["captions"]) == (4, 8, 4)

    line = sorted(row["clip_score"] for row in rows)[-2]
    above = generate.run(scored_profile(pipeline_folder, min_clip_score=line), workspace)
    assert [row["clip_score"] >= line for row in above.read_jsonl("records.jsonl")] == [True, True]
    assert above.summary["captions"] + above.summary["captions_without_image"] == 4
    with pytest.raises(InputError, match=r"no image has a clip_score of 2\.5 or more; the highest of 12 is"):
        generate.run(scored_profile(pipeline_folder, min_clip_score=2.5), workspace)
    digests = [scored_profile(pipeline_folder, **each) for each in ({}, {"keep_best": 1}, {"min_clip_score": line})]
    assert len({generate.plan_key(each).digest for each in digests}) == 3
    assert generate.plan_key(digests[1]).digest == best.digest


# -- export ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remote", [False, True])
def test_an_export_is_read_by_us_and_says_where_each_image_lies(
    scored: tuple[Workspace, Artifact], tmp_path: Path, remote: bool
) -> None:
    import fsspec

    from gmail_cli.components import captions

    artifact = scored[1]
    target = f"memory://{tmp_path.name}/set" if remote else str(tmp_path / "set")
    told: list[tuple[int, int]] = []
    exporting.export(artifact, target, shard_images=5, progress=lambda *at: told.append(at))
    assert told[-1] == (12, 12)
    system, root = fsspec.core.url_to_fs(target)
    assert sorted(Path(name).name for name in system.ls(root, detail=False)) == [
        *(f"0000{shard}.tar" for shard in range(3)),
        "images.parquet",
    ]
    rows = artifact.read_jsonl("records.jsonl")
    with system.open(f"{root}/images.parquet") as stream:
        table = pq.read_table(stream).to_pylist()
    assert [{key: row[key] for key in rows[0] if key != "path"} for row in table] == [
        {key: value for key, value in row.items() if key != "path"} for row in rows
    ]
    assert {row["settings"] for row in table} == {artifact.digest}
    assert {row["model"] for row in table} == {artifact.manifest["key"]["models"]["generator"]}
    for row in table:
        content = system.cat_file(f"{root}/{row['shard']}", start=row["offset"], end=row["offset"] + row["bytes"])
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
    dataset = captions.read(f"{target}/0000*.tar", need_images=True)
    assert [image.id for image in dataset.images] == [row["key"] for row in rows]
    assert [caption.text for caption in dataset.captions] == [row["caption"] for row in rows]
    assert dataset.image_bytes(7) == artifact.file(rows[7]["path"]).read_bytes()
    texts = captions.read(f"{target}/images.parquet")
    assert [caption.text for caption in texts.captions] == [row["caption"] for row in rows]
    with pytest.raises(UsageError, match="is there already"):
        exporting.export(artifact, target)
    exporting.export(artifact, f"{target}-again", shard_images=5)
    for name in system.ls(root, detail=False):
        again = name.replace("/set/", "/set-again/")
        assert system.cat_file(again) == system.cat_file(name)


def test_an_export_that_was_cut_short_has_no_table_and_is_written_over(
    scored: tuple[Workspace, Artifact], tmp_path: Path
) -> None:
    import fsspec

    artifact, target = scored[1], f"memory://{tmp_path.name}/cut"
    system = fsspec.filesystem("memory")

    def stop(done: int, total: int) -> None:
        if done > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exporting.export(artifact, target, shard_images=5, progress=stop)

    def there() -> list[str]:
        return sorted(Path(name).name for name in system.ls(f"/{tmp_path.name}/cut", detail=False))

    assert there() == ["00000.tar", "images.parquet.unfinished"]
    exporting.export(artifact, target, shard_images=5)
    count = -(-len(artifact.read_jsonl("records.jsonl")) // 5)
    assert there() == [*(f"{number:05d}.tar" for number in range(count)), "images.parquet"]


READERS = """
import glob, json, sys
import datasets, webdataset
folder, cache = sys.argv[1:]
shards = sorted(glob.glob(folder + "/*.tar"))
samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("png", "txt", "json"))
options = {"split": "train", "cache_dir": cache}
table = datasets.load_dataset("parquet", data_files=folder + "/images.parquet", **options)
tars = datasets.load_dataset("webdataset", data_files={"train": shards}, **options)
print(json.dumps({
    "webdataset": [[image.size, text, about["sha256"]] for image, text, about in samples],
    "table": table["clip_score"][:],
    "tars": [[each["png"].size, each["txt"], each["json"]["sha256"]] for each in tars],
}))
"""


def test_webdataset_and_datasets_read_an_export(scored: tuple[Workspace, Artifact], tmp_path: Path) -> None:
    missing = [name for name in ("webdataset", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        message = f"{' and '.join(missing)} of the extra dev not installed"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    exporting.export(scored[1], str(tmp_path / "set"), shard_images=5)
    command = [sys.executable, "-c", READERS, str(tmp_path / "set"), str(tmp_path / "cache")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    rows = scored[1].read_jsonl("records.jsonl")
    assert read["webdataset"] == read["tars"] == [[[16, 16], row["caption"], row["sha256"]] for row in rows]
    assert read["table"] == [row["clip_score"] for row in rows]
