"""The index stage on real tables: what it writes, what it finds, what it refuses."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from gmail_cli.artifacts import Artifact, StageKey, Workspace
from gmail_cli.components.tables import Flow, Modality, Table
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import Profile, build
from gmail_cli.stages import index, sources

SPACE = "5" * 64


def table(name: str, *, count: int = 40, modality: Modality = "image", flow: Flow = "real", seed: int = 0) -> Table:
    return Table.build(
        np.random.default_rng(seed).standard_normal((count, 8)).astype(np.float32),
        rows=[{"id": f"{name}-{row}", "text": f"row {row}"} for row in range(count)],
        name=name,
        modality=modality,
        flow=flow,
        encoder="tiny",
        encoder_digest=SPACE,
        space=SPACE,
        preprocess="p",
    )


def embed(workspace: Workspace, *tables: Table) -> Artifact:
    key = StageKey(stage="embed", version=1, settings={"tables": [asdict(each.header) for each in tables]})
    with workspace.open(key) as slot:
        for each in tables:
            files = each.files()
            slot.write_npy(f"{each.header.name}/vectors.npy", files["vectors.npy"])
            slot.write_jsonl(f"{each.header.name}/rows.jsonl", files["rows.jsonl"])
            slot.write_json(f"{each.header.name}/table.json", files["table.json"])
        return slot.commit(summary={"origins": sources.origins(profile())})


def profile(**values: object) -> Profile:
    return build({"index": values, "data": {"test_limit": 40}})


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "runs", "test")


IMAGES = table("test-images")
TEXTS = table("test-texts", count=120, modality="text", flow="text", seed=1)


def test_every_image_table_gets_an_index_with_its_rows(workspace: Workspace) -> None:
    embeddings = embed(workspace, IMAGES, TEXTS, table("test-images@clip.real.seed0"))
    made = index.run(profile(), workspace, embeddings=embeddings)
    about = made.read_json("index.json")["tables"]
    assert list(about) == ["test-images"]
    assert about["test-images"] | {"kind": "flat", "count": 40, "dim": 8, "recall_at_10": 1.0} == about["test-images"]
    assert about["test-images"]["recall_queries"] == "test-texts"
    assert made.read_jsonl("test-images.rows.jsonl") == list(IMAGES.rows)
    assert made.manifest["key"]["inputs"] == {"embeddings": embeddings.digest}
    hits = index.search_vectors(made, TEXTS.vectors[:7], k=5)
    np.testing.assert_array_equal(hits.ids, np.argsort(-TEXTS.vectors[:7] @ IMAGES.vectors.T, axis=1)[:, :5])


def test_texts_and_kind_do_what_they_say(workspace: Workspace) -> None:
    made = index.run(profile(texts=True, kind="ivf"), workspace, embeddings=embed(workspace, IMAGES, TEXTS))
    about = made.read_json("index.json")["tables"]
    assert {name: entry["kind"] for name, entry in about.items()} == {"test-images": "ivf", "test-texts": "ivf"}
    hits = index.search_vectors(made, IMAGES.vectors[:1], k=1, table="test-texts")
    assert hits.ids[0, 0] == np.argmax(TEXTS.vectors @ IMAGES.vectors[0])


def test_the_recall_target_reaches_the_index(workspace: Workspace) -> None:
    embeddings = embed(workspace, table("test-images", count=2000), TEXTS)
    loose = index.run(profile(kind="ivf", recall_target=0.1), workspace, embeddings=embeddings)
    tight = index.run(profile(kind="ivf", recall_target=1.0), workspace, embeddings=embeddings)
    entries = [made.read_json("index.json")["tables"]["test-images"] for made in (loose, tight)]
    assert entries[0]["effort"] < entries[1]["effort"]
    assert entries[0]["recall_at_10"] < entries[1]["recall_at_10"] == 1.0


def test_the_same_inputs_are_reused_and_others_are_not(workspace: Workspace) -> None:
    embeddings = embed(workspace, IMAGES)
    first = index.run(profile(), workspace, embeddings=embeddings)
    assert index.run(profile(), workspace, embeddings=embeddings).path == first.path
    assert index.run(profile(kind="hnsw"), workspace, embeddings=embeddings).path != first.path
    assert first.read_json("index.json")["tables"]["test-images"]["recall_queries"] == "test-images"


def test_no_image_table_is_an_error(workspace: Workspace) -> None:
    with pytest.raises(InputError, match="no image table"):
        index.run(profile(), workspace, embeddings=embed(workspace, TEXTS))


def test_an_unknown_table_is_named_with_those_there_are(workspace: Workspace) -> None:
    made = index.run(profile(), workspace, embeddings=embed(workspace, IMAGES))
    with pytest.raises(UsageError, match="no table 'photos'\nIt has: test-images"):
        index.search_vectors(made, TEXTS.vectors[:1], k=1, table="photos")


def test_a_truncated_index_file_is_named(workspace: Workspace) -> None:
    made = index.run(profile(), workspace, embeddings=embed(workspace, IMAGES))
    path = made.file("test-images.faiss")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"test-images\.faiss .* is not a whole FAISS index"):
        index.search_vectors(made, TEXTS.vectors[:1], k=1)


def test_an_index_of_another_table_in_its_place_is_refused(workspace: Workspace) -> None:
    made = index.run(profile(), workspace, embeddings=embed(workspace, IMAGES))
    other = index.run(profile(), workspace, embeddings=embed(workspace, table("test-images", count=39)))
    made.file("test-images.faiss").write_bytes(other.file("test-images.faiss").read_bytes())
    with pytest.raises(InputError, match=r"holds 39 vectors .* says 40"):
        index.search_vectors(made, TEXTS.vectors[:1], k=1)
