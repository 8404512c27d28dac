"""FAISS search against an exact oracle, and refusal of what would rank wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gmail_cli.components import search
from gmail_cli.components.search import KINDS, Kind, Limits, VectorIndex
from gmail_cli.components.search import choosing as chooser
from gmail_cli.components.search.kinds import Recipe
from gmail_cli.errors import InputError, UsageError

APPROXIMATE = tuple(kind for kind in KINDS if kind != "flat")


def unit(count: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


VECTORS = unit(3000, 16, seed=0)
QUERIES = unit(50, 16, seed=1)


def oracle(vectors: np.ndarray, queries: np.ndarray, k: int = 10) -> np.ndarray:
    return np.argsort(-(queries @ vectors.T), axis=1)[:, :k]


def agreement(index: VectorIndex, vectors: np.ndarray, queries: np.ndarray = QUERIES) -> float:
    pairs = zip(oracle(vectors, queries), index.search(queries, k=10).ids, strict=True)
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in pairs]))


def make(kind: str, recall: float = 0.9, vectors: np.ndarray = VECTORS) -> search.Made:
    return search.build(vectors, queries=QUERIES, kind=kind, limits=Limits(recall=recall))


@pytest.fixture(scope="module")
def made() -> dict[str, search.Made]:
    return {kind: make(kind) for kind in KINDS}


# -- every kind -----------------------------------------------------------------------------------------------------


def test_four_hand_placed_vectors_come_back_in_order_of_their_cosine() -> None:
    vectors = np.array([[1, 0], [0, 1], [-1, 0], [0.6, 0.8]], dtype=np.float32)
    built = search.build(vectors, queries=vectors)
    hits = built.index.search(np.array([[1, 0]], dtype=np.float32), k=9)
    assert hits.ids.tolist() == [[0, 3, 1, 2]]
    np.testing.assert_allclose(hits.scores, [[1, 0.6, 0, -1]], atol=1e-6)
    assert built.recall == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_recall_reported_is_the_overlap_with_the_full_score_matrix(
    made: dict[str, search.Made], kind: Kind
) -> None:
    built = made[kind]
    assert built.index.kind == built.chosen.kind == kind
    assert built.index.count == 3000
    assert built.recall == pytest.approx(agreement(built.index, VECTORS), abs=1e-9)
    least = 0.8 if kind in ("ivf-pq", "ivf-opq") else 0.9  # two components a byte, and no finer code beside it
    assert built.recall >= least


@pytest.mark.parametrize("kind", ["hnsw", "ivf-flat"])
def test_the_effort_is_what_buys_recall(kind: str) -> None:
    lazy, eager = make(kind, 0.0), make(kind, 1.0)
    assert lazy.index.effort is not None
    assert eager.index.effort is not None
    assert lazy.index.effort < eager.index.effort
    assert lazy.recall < 0.95 < eager.recall


def test_the_effort_is_the_least_that_reaches_the_target() -> None:
    built = make("ivf-flat", 0.9)
    effort = built.index.effort
    assert effort is not None
    assert 1 < effort < built.index.most
    found = []
    for cells in (effort, effort // 2):
        built.index.set_effort(cells)
        found.append(search.measure_recall(built.index, VECTORS, QUERIES))
    assert found[0] >= 0.9 > found[1]


def test_codes_are_judged_by_exact_scores() -> None:
    """An index of codes overestimates some scores; by those, rows that are not among the nearest would count."""
    vectors, queries = unit(600, 16, seed=3), unit(1, 16, seed=4)
    best = search.exact(vectors, queries, k=10)
    far = np.argsort(queries @ vectors.T, axis=1)[:, :10]
    boasting = search.Hits(far, np.full((1, 10), 2.0, dtype=np.float32))
    assert search.recall_of_each(best, boasting, vectors=vectors, queries=queries).tolist() == [0.0]
    assert search.recall_of_each(best, best, vectors=vectors, queries=queries).tolist() == [1.0]


def test_exact_search_in_blocks_is_exact_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.indexes, "BLOCK", 7)
    found = search.exact(VECTORS[:100], QUERIES, k=10)
    np.testing.assert_array_equal(found.ids, oracle(VECTORS[:100], QUERIES))


def test_duplicates_do_not_lower_recall() -> None:
    vectors = np.repeat(VECTORS[:20], 50, axis=0)
    assert make("ivf-flat", 1.0, vectors).recall == 1.0


def test_half_precision_rows_pass_the_check() -> None:
    built = search.build(VECTORS.astype(np.float16), queries=QUERIES)
    assert built.index.count == 3000
    assert built.recall == 1.0


@pytest.mark.parametrize("dim", [7, 12])
@pytest.mark.parametrize("kind", APPROXIMATE)
def test_every_kind_takes_dimensions_that_no_power_of_two_divides(kind: str, dim: int) -> None:
    vectors, queries = unit(600, dim, seed=5), unit(20, dim, seed=6)
    built = search.build(vectors, queries=queries, kind=kind)
    assert built.recall == pytest.approx(agreement(built.index, vectors, queries), abs=1e-9)
    assert built.recall > 0.6


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_index_survives_its_file(made: dict[str, search.Made], kind: Kind, resident: bool, tmp_path: Path) -> None:
    index = made[kind].index
    index.write(tmp_path / "table.faiss")
    again = search.load(tmp_path / "table.faiss", resident=resident)
    assert (again.kind, again.count, again.dim, again.effort) == (kind, 3000, 16, index.effort)
    np.testing.assert_array_equal(again.search(QUERIES, k=5).ids, index.search(QUERIES, k=5).ids)


@pytest.mark.parametrize("damage", ["half", "empty", "another magic"])
def test_a_damaged_index_is_named_and_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "photos.faiss"
    make("flat").index.write(path)
    data = path.read_bytes()
    path.write_bytes({"half": data[: len(data) // 2], "empty": b"", "another magic": b"PNG!" + data[4:]}[damage])
    with pytest.raises(InputError, match=r"photos\.faiss .* is not a whole FAISS index"):
        search.load(path)


def test_another_metric_is_refused(tmp_path: Path) -> None:
    import faiss

    index = faiss.IndexFlatL2(16)
    index.add(VECTORS)
    faiss.write_index(index, str(tmp_path / "photos.faiss"))
    with pytest.raises(InputError, match="IndexFlatL2"):
        search.load(tmp_path / "photos.faiss")


def test_rows_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"id":"a"}\n{"id":"b","text":"zwei\u2028Zeilen"}\nnot json\n'.encode())
    rows = search.Rows(path)
    assert len(rows) == 3
    assert rows[1] == {"id": "b", "text": "zwei\u2028Zeilen"}
    assert rows[0] == {"id": "a"}
    with pytest.raises(InputError, match="line 3"):
        rows[2]


@pytest.mark.parametrize("kind", search.DISK_KINDS)
def test_lists_merged_from_shards_on_disk_find_what_lists_in_memory_find(
    made: dict[str, search.Made], kind: Kind, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shards = search.Shards(tmp_path / "scratch", tmp_path / "photos.lists", rows=700)
    built = search.build(VECTORS, queries=QUERIES, kind=kind, limits=Limits(recall=0.9), lists=shards)
    built.index.write(tmp_path / "photos.faiss", lists="photos.lists")
    assert len(list((tmp_path / "scratch").iterdir())) == 6
    folder = tmp_path / "moved"
    folder.mkdir()
    for name in ("photos.faiss", "photos.lists"):
        (tmp_path / name).rename(folder / name)
    again = search.load(folder / "photos.faiss", lists=True)
    assert (again.kind, again.count, again.effort) == (kind, 3000, made[kind].index.effort)
    np.testing.assert_array_equal(again.search(QUERIES, k=10).ids, made[kind].index.search(QUERIES, k=10).ids)
    assert not capfd.readouterr().out  # standard output is for results
    assert built.chosen.memory < made[kind].chosen.memory / 2
    assert (folder / "photos.faiss").stat().st_size == pytest.approx(built.chosen.memory, rel=0.1, abs=3000)


@pytest.mark.parametrize("kind", search.DISK_KINDS)
def test_lists_on_disk_are_changed_as_lists_in_memory_are(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    lists = search.Shards(tmp_path / "scratch", tmp_path / "old" / "lists")
    built = search.build(VECTORS[:2000], queries=QUERIES, kind=kind, limits=Limits(recall=0.9), lists=lists).index
    built.write(tmp_path / "old" / "photos.faiss", lists="lists")
    here = search.build(VECTORS[:2000], queries=QUERIES, kind=kind, limits=Limits(recall=0.9)).index
    keep = np.arange(2000) % 7 != 3
    parts = search.Shards(tmp_path / "parts", tmp_path / "lists", rows=300)
    old = tmp_path / "old" / "photos.faiss"
    changed = search.edit_on_disk(lambda: search.load(old, lists=True), keep=keep, add=VECTORS[2000:], shards=parts)
    assert len(list(parts.scratch.iterdir())) > 8
    wanted = search.edit(here, keep=keep, add=VECTORS[2000:])
    assert (changed.kind, changed.count, changed.effort) == (kind, int(keep.sum()) + 1000, wanted.effort)
    found, expected = (each.search(QUERIES, k=10) for each in (changed, wanted))
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
    none = np.empty((0, VECTORS.shape[1]), dtype=np.float32)
    changed.write(tmp_path / "photos.faiss", lists="lists")
    rest = search.edit_on_disk(
        lambda: search.load(tmp_path / "photos.faiss", lists=True),
        keep=np.arange(changed.count) < 5,
        add=none,
        shards=search.Shards(tmp_path / "again", tmp_path / "rest"),
    )
    assert set(rest.search(QUERIES, k=5).ids.ravel()) <= {-1, *range(5)}
    assert rest.count == 5


def test_an_interrupted_choice_on_disk_measures_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = search.Shards(tmp_path / "scratch", tmp_path / "lists")
    limits = Limits(recall=0.9, latency=1000.0)
    measure, seen = chooser._Job.measure, []

    def until_killed(self: chooser._Job, recipe: Recipe, **options: bool) -> Any:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(recipe.kind)
        return measure(self, recipe, **options)

    monkeypatch.setattr(chooser._Job, "measure", until_killed)
    with pytest.raises(KeyboardInterrupt):
        search.build(VECTORS, queries=QUERIES, limits=limits, lists=shards)
    before = shards.measured()
    assert list(before) == seen == ["ivf-flat", "ivf-sq8"]

    def noted(self: chooser._Job, recipe: Recipe, **options: bool) -> Any:
        seen.append(recipe.kind)
        return measure(self, recipe, **options)

    monkeypatch.setattr(chooser._Job, "measure", noted)
    made = search.build(VECTORS, queries=QUERIES, limits=limits, lists=shards)
    assert seen == list(search.DISK_KINDS)
    rows = {row.kind: row for row in made.candidates}
    for kind, row in before.items():
        assert rows[kind].latency == row["latency"] or rows[kind].verdict == "chosen"


def test_an_interrupted_build_on_disk_uses_the_shards_it_finds(tmp_path: Path) -> None:
    shards = search.Shards(tmp_path / "scratch", tmp_path / "lists", rows=700)
    first = search.build(VECTORS, queries=QUERIES, kind="ivf-sq8", lists=shards)
    ids = first.index.search(QUERIES, k=10).ids
    done = {path: path.stat().st_mtime_ns for path in shards.scratch.iterdir()}
    last = sorted(done)[-1]
    last.unlink()
    again = search.build(VECTORS, queries=QUERIES, kind="ivf-sq8", lists=shards)
    np.testing.assert_array_equal(again.index.search(QUERIES, k=10).ids, ids)
    assert {path for path, time in done.items() if path.stat().st_mtime_ns != time} == {last}


def test_kinds_without_lists_of_their_own_are_not_kept_on_disk(tmp_path: Path) -> None:
    shards = search.Shards(tmp_path, tmp_path / "lists")
    with pytest.raises(UsageError, match=r"'hnsw'\nKinds with lists on disk: ivf-flat, ivf-sq8"):
        search.build(VECTORS, queries=QUERIES, kind="hnsw", lists=shards)


# -- changing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rows_taken_out_and_put_in_are_found_under_their_new_numbers(kind: Kind, tmp_path: Path) -> None:
    keep = np.random.default_rng(7).random(3000) > 0.3
    more = unit(500, 16, seed=8)
    make(kind, 0.95).index.write(tmp_path / "index.faiss")
    index = search.load(tmp_path / "index.faiss", resident=True)
    effort = index.effort
    changed = search.edit(index, keep=keep, add=more)
    vectors = np.concatenate([VECTORS[keep], more])
    assert (changed.kind, changed.count, changed.effort) == (kind, len(vectors), effort)
    assert agreement(changed, vectors) >= (0.8 if kind in ("ivf-pq", "ivf-opq") else 0.9)
    changed.write(tmp_path / "changed.faiss")
    again = search.load(tmp_path / "changed.faiss")
    np.testing.assert_array_equal(again.search(QUERIES, k=10).ids, changed.search(QUERIES, k=10).ids)


def test_a_flat_index_after_a_change_is_one_built_from_what_is_left(tmp_path: Path) -> None:
    keep = np.arange(3000) % 7 != 0
    more = unit(10, 16, seed=8)
    index = search.edit(make("flat").index, keep=keep, add=more)
    fresh = make("flat", vectors=np.concatenate([VECTORS[keep], more])).index
    index.write(tmp_path / "a")
    fresh.write(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_does_not_fit_is_not_added() -> None:
    index, keep = make("flat").index, np.ones(3000, dtype=bool)
    with pytest.raises(InputError, match="8 dimensions and the index has 16"):
        search.edit(index, keep=keep, add=unit(1, 8, seed=2))
    with pytest.raises(InputError, match="the vectors to add: row 0 has length 2"):
        search.edit(index, keep=keep, add=2 * VECTORS[:1])


# -- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_predicted_to_a_tenth(kind: Kind, tmp_path: Path) -> None:
    """By the size of the file, which holds what memory holds but for the rounding of fast-scan's codes."""
    vectors = unit(20000, 32, seed=9)
    built = search.build(vectors, queries=QUERIES[:, :1] * 0 + unit(50, 32, seed=1), kind=kind, limits=Limits(recall=0))
    built.index.write(tmp_path / "index.faiss")
    size = (tmp_path / "index.faiss").stat().st_size
    predicted = search.predicted_bytes(kind, count=20000, dim=32)
    assert built.chosen.memory == predicted
    if kind == "ivf-pq-fastscan":
        predicted -= int(0.4 * 8 * 20000)
    assert predicted == pytest.approx(size, rel=0.1)


def test_product_quantisers_get_as_fine_as_the_memory_allows() -> None:
    from gmail_cli.components.search.kinds import recipe

    specs = [recipe("ivf-pq", count=100_000, dim=64, max_memory=each * 1e6).spec for each in (1e9, 3.0, 2.2, 0.1)]
    assert [spec.split(",")[1] for spec in specs] == ["PQ32x8", "PQ16x8", "PQ8x8", "PQ4x8"]


# -- the chooser ----------------------------------------------------------------------------------------------------


def verdicts(built: search.Made) -> dict[str, str]:
    return {row.kind: row.verdict for row in built.candidates}


def test_auto_is_exact_up_to_its_limit_and_measures_nothing_else() -> None:
    built = search.build(VECTORS, queries=QUERIES)
    assert built.index.kind == "flat"
    assert verdicts(built) == {"flat": "chosen"} | dict.fromkeys(APPROXIMATE, "not tried")


def test_auto_above_its_limit_takes_the_fastest_that_reaches_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser, "FLAT_LIMIT", 2000)
    built = search.build(VECTORS, queries=QUERIES, limits=Limits(recall=0.9))
    assert all(row.recall is not None and row.latency is not None for row in built.candidates)
    able = [row for row in built.candidates if row.recall is not None and row.recall >= 0.9]
    assert built.chosen == min(able, key=lambda row: row.latency or 0.0)
    assert [kind for kind, verdict in verdicts(built).items() if verdict == "chosen"] == [built.index.kind]
    assert built.recall == built.chosen.recall == pytest.approx(agreement(built.index, VECTORS), abs=1e-9)
    assert {row.kind for row in built.candidates if row.verdict == "recall too low"} == {
        row.kind for row in built.candidates if row.recall is not None and row.recall < 0.9
    }


def test_a_memory_limit_rules_out_what_is_larger() -> None:
    limit = 3000 * 16 * 4 - 1
    built = search.build(VECTORS, queries=QUERIES, limits=Limits(recall=0.9, memory=limit))
    assert built.chosen.memory <= limit
    for row in built.candidates:
        assert (row.verdict == "too large") == (row.memory > limit), row
    assert verdicts(built)["flat"] == "too large"
    assert built.recall >= 0.9


def test_a_latency_that_exact_search_keeps_to_leaves_it_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser, "FLAT_LIMIT", 2000)
    built = search.build(VECTORS, queries=QUERIES, limits=Limits(latency=60_000.0))
    assert built.index.kind == "flat"
    assert built.chosen.latency is not None


def test_candidates_measured_on_a_sample_are_measured_again_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser, "FLAT_LIMIT", 2000)
    limit = 3000 * 16 * 4 - 1
    built = search.build(VECTORS, queries=QUERIES, limits=Limits(recall=0.9, memory=limit), measured_rows=1000)
    assert built.index.count == 3000
    assert built.recall == pytest.approx(agreement(built.index, VECTORS), abs=1e-9)
    assert built.recall >= 0.9


def test_nothing_within_the_limits_is_said_with_the_limit_to_relax() -> None:
    with pytest.raises(UsageError, match=r"index\.max_memory = 0\.001 MiB") as refused:
        search.build(VECTORS, queries=QUERIES, limits=Limits(memory=0.001 * search.MIB))
    assert refused.value.hint.startswith("Raise index.max_memory to 1 (ivf-")
    assert "too large" in refused.value.message
    with pytest.raises(UsageError, match=r"index\.max_latency = 1e-06 ms") as refused:
        search.build(VECTORS, queries=QUERIES, limits=Limits(recall=0.9, latency=1e-6))
    assert "raise index.max_latency to" in refused.value.hint
    small = search.predicted_bytes("ivf-pq", count=3000, dim=16) - 8000
    with pytest.raises(UsageError, match="recall too low") as refused:
        search.build(VECTORS, queries=QUERIES, limits=Limits(recall=0.99, memory=small))
    assert "lower index.recall_target to 0." in refused.value.hint
    assert "or raise index.max_memory to 1 (" in refused.value.hint


def test_a_kind_that_is_named_keeps_to_the_limits_too() -> None:
    with pytest.raises(UsageError, match="too large"):
        search.build(VECTORS, queries=QUERIES, kind="hnsw", limits=Limits(memory=1000))
    with pytest.raises(UsageError, match="too slow"):
        search.build(VECTORS, queries=QUERIES, kind="ivf-flat", limits=Limits(latency=1e-6))


def test_slow_builders_wait_until_nothing_else_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser, "FLAT_LIMIT", 2000)
    monkeypatch.setattr(chooser, "PATIENCE", 0.0)
    built = search.build(VECTORS, queries=QUERIES, limits=Limits(recall=0.9))
    assert verdicts(built)["hnsw"].startswith("not tried: slow to build")
    assert built.index.kind == "flat"  # the only one that takes no time to build


def test_the_table_has_a_line_for_each_candidate() -> None:
    lines = search.candidates_table(search.build(VECTORS, queries=QUERIES).candidates).splitlines()
    assert lines[0].split() == ["kind", "MiB", "recall@10", "ms/query", "effort", "build", "s"]
    assert [line.split()[0] for line in lines[1:]] == list(KINDS)
    assert lines[1].split() == ["flat", "0.2", "1.0000", "-", "-", "-", "chosen", "Flat"]


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0.0, 0.99, 1.01, float("nan")])
def test_vectors_that_are_not_unit_length_are_refused(length: float) -> None:
    vectors = VECTORS.copy()
    vectors[7] *= length
    with pytest.raises(InputError, match=r"photos: row 7 has length"):
        search.build(vectors, queries=QUERIES, name="photos")


def test_queries_from_another_encoder_are_refused() -> None:
    index = make("flat").index
    with pytest.raises(InputError, match="8 dimensions and the index has 16"):
        index.search(unit(1, 8, seed=2), k=1)
    with pytest.raises(InputError, match="queries: row 0"):
        index.search(2 * QUERIES, k=1)


def test_nothing_to_index_is_an_error() -> None:
    with pytest.raises(InputError, match="holds no vectors"):
        search.build(VECTORS[:0], queries=QUERIES)


def test_too_few_vectors_for_a_code_book_are_an_error() -> None:
    with pytest.raises(InputError, match=r"ivf-pq learns codes from 256 vectors and photos has 40"):
        search.build(VECTORS[:40], queries=QUERIES, kind="ivf-pq", name="photos")
