"""The whole tool, small: ``gmail run`` on the built-in world, and Flickr8k photographs in two formats."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from test_cli import ROOT, gmail

from gmail_cli.artifacts import Artifact, Workspace
from gmail_cli.components import clip_files
from gmail_cli.components.tables import Table
from gmail_cli.profile import build
from gmail_cli.stages import embed, evaluate, index

SMALL = (
    *("--set", "data.train_limit=24", "--set", "data.test_limit=40", "--set", "generate.steps=2"),
    *("--set", "align.steps=2", "--set", "align.batch_size=8", "--set", "train.steps=2", "--set", "train.batch_size=8"),
    *("--set", "train.warmup=0", "--set", "embed.gap_count=12", "--set", "eval.resamples=100"),
)


def test_run_makes_a_report_and_a_second_run_reuses_everything(tmp_path: Path) -> None:
    first = gmail("run", "tiny", *SMALL, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    artifact = tmp_path / first.stdout.strip()
    report = (artifact / "report.html").read_text(encoding="utf-8")
    assert "generated-aligned" in report
    assert "<script" not in report
    results = json.loads((artifact / "results.json").read_text(encoding="utf-8"))
    assert results["protocol"] == "scenes-1k/1"
    arms = {row["arm"] for row in results["rows"] if row["task"] == "clip-text"}
    assert arms == {"none", "real", "generated-naive", "generated-aligned"}
    clip_scores_are_those_of_plain_open_clip(artifact, results, Artifact.load(tmp_path / "runs/tiny/embed/latest"))
    second = gmail("run", "tiny", *SMALL, cwd=tmp_path)
    assert second.stdout == first.stdout
    assert second.stderr.count("complete already, reused") == 6
    planned = json.loads(gmail("run", "tiny", *SMALL, "--dry-run", "--json", cwd=tmp_path).stdout)["plan"]
    assert [step["state"] for step in planned] == ["complete"] * 6
    changed = gmail("run", "tiny", *SMALL, "--set", "align.lora_rank=2", "--dry-run", cwd=tmp_path).stdout
    assert "changed settings.lora_rank: 4 -> 2" in changed
    assert changed.count("would run") == 5
    assert gmail("artifacts", "verify", cwd=tmp_path).returncode == 0
    page = tmp_path / "hits.html"
    found = gmail("search", "runs/tiny/index/latest", "a red ball", "-k", "3", "--html", str(page), cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 3
    assert page.read_text(encoding="utf-8").count("data:image/") == 3


def clip_scores_are_those_of_plain_open_clip(artifact: Path, results: dict[str, Any], embedded: Artifact) -> None:
    """CLIPScore and RefCLIPScore of the captions on disk, as Hessel et al. write them down."""
    model = open_clip.create_model(f"local-dir:{clip_files.SHIPPED['tiny']}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_files.SHIPPED['tiny']}")
    images, texts = (Table.load(embedded.folder(name)) for name in ("test-images", "test-texts"))

    def vectors(captions: list[str]) -> np.ndarray:
        with torch.inference_mode():
            found = model.encode_text(tokenizer([f"A photo depicts {each}" for each in captions]))
        return torch.nn.functional.normalize(found, dim=-1).numpy()

    rows = [row for row in results["rows"] if row["metric"] == "ref_clip_score"]
    assert {row["arm"] for row in rows} == {"real", "generated-naive", "generated-aligned"}
    scores, both = [], []
    said = json.loads((artifact / "predictions/clipcap.real.seed0.json").read_text(encoding="utf-8"))
    captions = dict(zip(images.ids, vectors([said[name] for name in images.ids]), strict=True))
    for name, image in zip(images.ids, images.vectors, strict=True):
        scores.append(2.5 * max(image @ captions[name], 0))
        own = vectors([row["text"] for row in texts.rows if (row["owner"], row["kind"]) == (name, "short")])
        best = max((own @ captions[name]).max(), 0)
        both.append(2 / (1 / scores[-1] + 1 / best) if scores[-1] and best else 0)
    for metric, expected in (("clip_score", scores), ("ref_clip_score", both)):
        [row] = [each for each in results["rows"] if (each["metric"], each["arm"]) == (metric, "real")]
        assert row["value"] == pytest.approx(np.mean(expected), abs=1e-5)
        assert row["low"] < row["value"] < row["high"]


def test_coco_captions_become_five_images_each_as_typed(shared_data: Path, tmp_path: Path) -> None:
    """The line of README and docs on the real file: every caption counts, whatever the default profile says."""
    typed = "generate --captions ../shared/data/coco/captions_val2017.json --per-caption 5 --limit 1"
    assert (ROOT / "../shared/data").samefile(shared_data)
    made = gmail(*typed.split(), "--workspace", str(tmp_path), cwd=ROOT)
    assert made.returncode == 0, made.stderr
    artifact = Artifact.load(Path(made.stdout.strip()))
    records = artifact.read_jsonl("records.jsonl")
    assert len(records) == 25
    assert {record["owner"] for record in records} == {"397133"}
    assert len({record["caption"] for record in records}) == 5
    assert [record["k"] for record in records] == [*range(5)] * 5
    assert len({record["sha256"] for record in records}) == 25
    assert artifact.verify() == []


PHOTOS = 60


@pytest.fixture(scope="module")
def flickr(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """The first dev photographs as COCO JSON with a folder, and the same as a WebDataset tar."""
    folder = shared_data / "flickr8k"
    described = json.loads((folder / "captions_dev.json").read_text(encoding="utf-8"))
    texts: dict[int, list[str]] = {}
    for row in described["annotations"]:
        texts.setdefault(row["image_id"], []).append(row["caption"])
    shard = tmp_path_factory.mktemp("shards") / "dev-00000.tar"
    with tarfile.open(shard, "w") as tar:
        for row in described["images"][:PHOTOS]:
            record = {"image_id": row["id"], "captions": texts[row["id"]]}
            photo = (folder / "dev" / row["file_name"]).read_bytes()
            for suffix, content in ((".jpg", photo), (".json", json.dumps(record).encode())):
                member = tarfile.TarInfo(f"{row['id']:06d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(folder / "captions_dev.json"), str(folder / "dev"), str(shard)


def measured(workspace: Workspace, test: str, images: str) -> tuple[Artifact, Artifact]:
    profile = build(
        {
            "name": "flickr8k",
            "data": {"test": test, "test_images": images, "test_limit": PHOTOS, "protocol": "flickr8k-dev-60/1"},
            "eval": {"resamples": 100, "examples": 2},
        }
    )
    embedded = embed.run(profile, workspace)
    index.run(profile, workspace, embeddings=embedded)
    return embedded, evaluate.run(profile, workspace, embeddings=embedded)


def test_photographs_embed_and_score_the_same_from_json_and_from_tar(
    flickr: tuple[str, str, str], tmp_path: Path
) -> None:
    annotations, images, shard = flickr
    first, scores = measured(Workspace(tmp_path, "json"), annotations, images)
    second, again = measured(Workspace(tmp_path, "tar"), shard, "")
    tables = [[Table.load(each.folder(name)) for name in ("test-images", "test-texts")] for each in (first, second)]
    for one, other in zip(*tables, strict=True):
        assert np.array_equal(one.vectors, other.vectors)
        assert [row.get("text") for row in one.rows] == [row.get("text") for row in other.rows]
    metrics = scores.read_json("results.json")["metrics"]
    assert metrics == again.read_json("results.json")["metrics"]

    photographs, texts = tables[0]
    rows = {name: row for row, name in enumerate(photographs.ids)}
    owners = np.array([rows[row["owner"]] for row in texts.rows])
    similarity = np.asarray(texts.vectors) @ np.asarray(photographs.vectors).T
    for k in (1, 5, 10):
        nearest = np.argsort(-similarity, axis=1)[:, :k]
        expected = (nearest == owners[:, None]).any(axis=1).mean()
        assert metrics[f"clip.none.text_to_image_recall_at_{k}"] == pytest.approx(expected, abs=1e-4)
        nearest = np.argsort(-similarity.T, axis=1)[:, :k]
        expected = (owners[nearest] == np.arange(PHOTOS)[:, None]).any(axis=1).mean()
        assert metrics[f"clip.none.image_to_text_recall_at_{k}"] == pytest.approx(expected, abs=1e-4)
