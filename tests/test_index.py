"""The index stage on real tables: what it writes, what it finds, what it refuses."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from test_cli import gmail

from gmail_cli.artifacts import Artifact, StageKey, Workspace
from gmail_cli.components.tables import Flow, Modality, Table
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import build
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import index, search, sources

SPACE = "5" * 64


def table(
    name: str,
    *,
    count: int = 40,
    modality: Modality = "image",
    flow: Flow = "real",
    seed: int = 0,
    first: int = 0,
    space: str = SPACE,
) -> Table:
    return Table.build(
        np.random.default_rng(seed).standard_normal((count, 8)).astype(np.float32),
        rows=[{"id": f"{name}-{first + row}", "text": f"row {first + row}"} for row in range(count)],
        name=name,
        modality=modality,
        flow=flow,
        encoder="tiny",
        encoder_digest=SPACE,
        space=space,
        preprocess="p",
    )


def embed(workspace: Workspace, *tables: Table) -> Artifact:
    described = [{**asdict(each.header), "first": each.ids[0]} for each in tables]
    key = StageKey(stage="embed", settings={"tables": described})
    with workspace.open(key) as slot:
        if slot.done:
            return slot.artifact
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
    hits = search.Searcher(made).vectors(TEXTS.vectors[:7], k=5)
    np.testing.assert_array_equal(hits.ids, np.argsort(-TEXTS.vectors[:7] @ IMAGES.vectors.T, axis=1)[:, :5])


def test_captions_live_with_the_images_they_describe(workspace: Workspace) -> None:
    rows = [{**row, "owner": f"test-images-{number % 3}"} for number, row in enumerate(TEXTS.rows)]
    made = index.run(profile(), workspace, embeddings=embed(workspace, IMAGES, replace(TEXTS, rows=rows)))
    found = made.read_jsonl("test-images.rows.jsonl")
    assert found[1] == {**IMAGES.rows[1], "captions": [f"row {number}" for number in range(1, 120, 3)]}
    assert found[3] == IMAGES.rows[3]


def test_texts_and_kind_do_what_they_say(workspace: Workspace) -> None:
    made = index.run(profile(texts=True, kind="ivf-flat"), workspace, embeddings=embed(workspace, IMAGES, TEXTS))
    about = made.read_json("index.json")["tables"]
    assert {name: entry["kind"] for name, entry in about.items()} == {
        "test-images": "ivf-flat",
        "test-texts": "ivf-flat",
    }
    hits = search.Searcher(made).vectors(IMAGES.vectors[:1], k=1, table="test-texts")
    assert hits.ids[0, 0] == np.argmax(TEXTS.vectors @ IMAGES.vectors[0])


def test_the_recall_target_reaches_the_index(workspace: Workspace) -> None:
    embeddings = embed(workspace, table("test-images", count=2000), TEXTS)
    loose = index.run(profile(kind="ivf-flat", recall_target=0.1), workspace, embeddings=embeddings)
    tight = index.run(profile(kind="ivf-flat", recall_target=1.0), workspace, embeddings=embeddings)
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
        search.Searcher(made).vectors(TEXTS.vectors[:1], k=1, table="photos")


def test_a_truncated_index_file_is_named(workspace: Workspace) -> None:
    made = index.run(profile(), workspace, embeddings=embed(workspace, IMAGES))
    path = made.file("test-images.faiss")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"test-images\.faiss has \d+ bytes, the manifest says"):
        search.Searcher(made).vectors(TEXTS.vectors[:1], k=1)


def test_an_index_of_another_table_in_its_place_is_refused(workspace: Workspace) -> None:
    made = index.run(profile(), workspace, embeddings=embed(workspace, IMAGES))
    other = index.run(profile(), workspace, embeddings=embed(workspace, table("test-images", count=39)))
    made.file("test-images.faiss").write_bytes(other.file("test-images.faiss").read_bytes())
    with pytest.raises(InputError, match=r"has \d+ bytes, the manifest says \d+"):
        search.Searcher(made).vectors(TEXTS.vectors[:1], k=1)


# -- changing an index ------------------------------------------------------------------------------------------------

MORE = table("test-images", count=15, first=40, seed=2)


def ids_file(folder: Path, *ids: str) -> Path:
    path = folder / "ids.txt"
    path.write_text("".join(f"{each}\n" for each in ids))
    return path


def nearest(made: Artifact, queries: np.ndarray, *, k: int = 5) -> list[list[str]]:
    searcher = search.Searcher(made)
    rows = made.read_jsonl("test-images.rows.jsonl")
    return [[rows[row]["id"] for row in hits] for hits in searcher.vectors(queries, k=k).ids]


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf-sq8"])
def test_rows_added_and_removed_keep_their_ids(workspace: Workspace, tmp_path: Path, kind: str) -> None:
    made = index.run(profile(kind=kind), workspace, embeddings=embed(workspace, IMAGES, TEXTS))
    gone = ids_file(tmp_path, "test-images-3", "test-images-17")
    changed = index.update(profile(), workspace, index=made, add=embed(workspace, MORE), remove=gone)
    assert changed.path != made.path
    assert made.verify() == changed.verify() == []
    assert not list(changed.path.glob("*entry*"))
    entry = changed.read_json("index.json")["tables"]["test-images"]
    assert entry | {"kind": kind, "count": 53, "recall_queries": "test-texts"} == entry
    assert entry["recall_at_10"] >= 0.9
    keep = [row for row in range(40) if row not in (3, 17)]
    vectors = np.concatenate([IMAGES.vectors[keep], MORE.vectors])
    ids = [*np.array(IMAGES.ids)[keep], *MORE.ids]
    expected = [[ids[row] for row in order[:5]] for order in np.argsort(-TEXTS.vectors[:9] @ vectors.T, axis=1)]
    found = nearest(changed, TEXTS.vectors[:9])
    shared = np.mean([len({*a} & {*b}) / 5 for a, b in zip(expected, found, strict=True)])
    assert shared > (0.8 if kind == "ivf-sq8" else 0.999)  # a byte a component of 8
    again = index.update(profile(), workspace, index=made, add=embed(workspace, MORE), remove=gone)
    assert again.path == changed.path


def test_a_row_is_replaced_by_removing_and_adding_its_id(workspace: Workspace, tmp_path: Path) -> None:
    made = index.run(profile(), workspace, embeddings=embed(workspace, IMAGES, TEXTS))
    new = table("test-images", count=1, first=3, seed=9)
    with pytest.raises(InputError, match="1 of the ids to add already, the first is 'test-images-3'"):
        index.update(profile(), workspace, index=made, add=embed(workspace, new))
    gone = ids_file(tmp_path, "test-images-3")
    changed = index.update(profile(), workspace, index=made, add=embed(workspace, new), remove=gone)
    assert nearest(changed, new.vectors, k=1) == [["test-images-3"]]
    rebuilt = index.update(profile(kind="ivf-flat"), workspace, index=changed, rebuild=True)
    assert rebuilt.read_json("index.json")["tables"]["test-images"]["kind"] == "ivf-flat"
    assert nearest(rebuilt, new.vectors, k=1) == [["test-images-3"]]
    assert nearest(rebuilt, TEXTS.vectors[:9]) == nearest(changed, TEXTS.vectors[:9])


def test_without_the_embeddings_recall_is_unknown_and_nothing_is_rebuilt(workspace: Workspace, tmp_path: Path) -> None:
    import shutil

    embeddings = embed(workspace, IMAGES, TEXTS)
    made = index.run(profile(), workspace, embeddings=embeddings)
    shutil.rmtree(embeddings.path)
    gone = ids_file(tmp_path, "test-images-3")
    changed = index.update(profile(), workspace, index=made, remove=gone)
    assert changed.read_json("index.json")["tables"]["test-images"]["recall_at_10"] is None
    assert changed.summary["note"].startswith("recall of test-images not measured")
    lost = f"embeddings that test-images was built from are in no run below .*: {embeddings.digest[:12]}"
    with pytest.raises(InputError, match=lost):
        index.update(profile(), workspace, index=made, rebuild=True)


def test_embeddings_of_other_runs_are_found(workspace: Workspace, tmp_path: Path) -> None:
    """Indexed in one run with ``--embeddings`` of another, and rebuilt in a third, or from another workspace."""
    made = index.run(profile(), Workspace(workspace.root, "b"), embeddings=embed(workspace, IMAGES, TEXTS))
    for place in (Workspace(workspace.root, "c"), Workspace(tmp_path / "elsewhere", "test")):
        rebuilt = index.update(profile(kind="ivf-flat"), place, index=made, rebuild=True)
        entry = rebuilt.read_json("index.json")["tables"]["test-images"]
        assert entry["kind"] == "ivf-flat"
        assert entry["recall_at_10"] is not None


def test_changes_that_cannot_be_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    embeddings = embed(workspace, IMAGES, TEXTS)
    made = index.run(profile(), workspace, embeddings=embeddings)
    with pytest.raises(UsageError, match="nothing to change"):
        index.update(profile(), workspace, index=made)
    with pytest.raises(InputError, match=r"1 id\(s\) that the index lacks, the first is 'nobody'"):
        index.update(profile(), workspace, index=made, remove=ids_file(tmp_path, "test-images-1", "nobody"))
    with pytest.raises(InputError, match="holds no ids"):
        index.update(profile(), workspace, index=made, remove=ids_file(tmp_path))
    with pytest.raises(UsageError, match="--remove takes every row of test-images"):
        index.update(profile(), workspace, index=made, remove=ids_file(tmp_path, *IMAGES.ids))
    with pytest.raises(InputError, match="test-images to add differs in space: 66666"):
        other = embed(workspace, table("test-images", first=90, space="6" * 64))
        index.update(profile(), workspace, index=made, add=other)
    with pytest.raises(InputError, match="holds none of the index's tables: test-images"):
        index.update(profile(), workspace, index=made, add=embed(workspace, TEXTS))
    with pytest.raises(InputError, match="was made by `gmail embed`"):
        index.update(profile(), workspace, index=embeddings, rebuild=True)


def test_commands_that_need_no_tower_load_none(workspace: Workspace, tmp_path: Path) -> None:
    """torch, open_clip and what they bring cost seconds; `gmail index` and `gmail score` read tables and files only."""
    embeddings = embed(workspace, IMAGES, TEXTS)
    for name, values in (("images", IMAGES.vectors), ("texts", TEXTS.vectors), ("owners", np.arange(120) % 40)):
        np.save(tmp_path / f"{name}.npy", values)
    files = [word for name in ("images", "texts", "owners") for word in (f"--{name}", f"{name}.npy")]
    for command in (
        ["index", "--workspace", "runs", "--run", "test", "--embeddings", str(embeddings.path)],
        ["score", "retrieval", *files],
    ):
        done = gmail(*command, cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
        assert done.returncode == 0, done.stderr
        loaded = {
            line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")
        }
        assert "numpy" in loaded
        assert not loaded & {"torch", "open_clip", "transformers", "torchvision"}


# -- limits and lists on disk -----------------------------------------------------------------------------------------


def test_limits_reach_the_chooser_and_the_table_is_kept(workspace: Workspace) -> None:
    embeddings = embed(workspace, table("test-images", count=3000), TEXTS)
    made = index.run(profile(max_memory=0.09, recall_target=0.8), workspace, embeddings=embeddings)
    entry = made.read_json("index.json")["tables"]["test-images"]
    assert entry["memory"] <= 0.09 * 2**20
    assert {each["kind"]: each["verdict"] for each in entry["candidates"]}["flat"] == "too large"
    assert index.candidates(made)["test-images"].count("\n") == 8
    with pytest.raises(UsageError, match=r"test-images, 3000 x 8, keeps to .*index\.max_memory = 0\.01 MiB"):
        index.run(profile(max_memory=0.01), workspace, embeddings=embeddings)
    with pytest.raises(UsageError, match=r"index\.max_latency = 1e-06 ms"):
        index.run(profile(max_latency=1e-6), workspace, embeddings=embeddings)


def test_lists_on_disk_are_part_of_the_artifact(workspace: Workspace) -> None:
    embeddings = embed(workspace, table("test-images", count=3000), TEXTS)
    made = index.run(profile(kind="ivf-flat", storage="disk"), workspace, embeddings=embeddings)
    here = index.run(profile(kind="ivf-flat"), workspace, embeddings=embeddings)
    assert made.verify() == []
    assert made.file("test-images.lists").stat().st_size > 3000 * 8 * 4
    assert made.file("test-images.faiss").stat().st_size < here.file("test-images.faiss").stat().st_size / 4
    assert nearest(made, TEXTS.vectors[:20]) == nearest(here, TEXTS.vectors[:20])
    more = embed(workspace, table("test-images", first=9000, seed=5))
    gone = workspace.root / "gone.txt"
    gone.write_text("\n".join(f"test-images-{row}" for row in range(0, 3000, 3)))
    changed, same = (index.update(profile(), workspace, index=each, add=more, remove=gone) for each in (made, here))
    assert changed.verify() == []
    entries = [each.read_json("index.json")["tables"]["test-images"] for each in (changed, same)]
    assert [entry["storage"] for entry in entries] == ["disk", "memory"]
    assert [entry["count"] for entry in entries] == [2040, 2040]
    assert entries[0]["recall_at_10"] == entries[1]["recall_at_10"]
    assert nearest(changed, TEXTS.vectors[:20]) == nearest(same, TEXTS.vectors[:20])
    rebuilt = index.update(profile(kind="ivf-flat"), workspace, index=made, rebuild=True)
    assert nearest(rebuilt, TEXTS.vectors[:20]) == nearest(here, TEXTS.vectors[:20])
    made.file("test-images.lists").write_bytes(made.file("test-images.lists").read_bytes()[:-9])
    with pytest.raises(InputError, match=r"test-images\.lists has \d+ bytes"):
        nearest(made, TEXTS.vectors[:1])
