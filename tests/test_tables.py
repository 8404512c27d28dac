"""Embedding tables: what is written is read back, and what does not fit is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmail_cli.components.tables import Table, require_same_space
from gmail_cli.errors import InputError


def table(count: int = 4, dim: int = 3, **changes: Any) -> Table:
    vectors = np.random.default_rng(0).normal(size=(count, dim)) + 0.1
    about: dict[str, Any] = {
        "rows": [{"id": f"i{n}", "owner": "x"} for n in range(count)],
        "name": "test-images",
        "modality": "image",
        "flow": "real",
        "encoder": "tiny",
        "encoder_digest": "d1",
        "space": "s1",
        "preprocess": "p1",
    }
    return Table.build(vectors, **(about | changes))


def save(made: Table, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    content = made.files()
    np.save(folder / "vectors.npy", content["vectors.npy"])
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content["rows.jsonl"]))
    (folder / "table.json").write_text(json.dumps(content["table.json"]))
    return folder


@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 5), dim=st.integers(1, 9), dtype=st.sampled_from(["float32", "float16"]))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, count: int, dim: int, dtype: Any) -> None:
    made = table(count, dim, dtype=dtype)
    back = Table.load(save(made, tmp_path_factory.mktemp("table")))
    assert back.header == made.header
    assert (back.header.count, back.header.dim, back.header.dtype) == (count, dim, dtype)
    assert back.rows == made.rows
    assert np.array_equal(back.vectors, made.vectors)


def test_build_scales_to_unit_length_in_float32_before_the_cast() -> None:
    large = np.full((1, 4), 60_000.0)  # its norm overflows float16
    made = Table.build(
        large,
        rows=[{"id": "a"}],
        name="t",
        modality="text",
        flow="text",
        encoder="e",
        encoder_digest="d",
        space="s",
        preprocess="p",
        dtype="float16",
    )
    assert made.vectors.tolist() == [[0.5] * 4]


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_vectors_without_direction_are_refused(value: float) -> None:
    vectors = np.eye(3, dtype=np.float32)
    vectors[1] = value
    made = table(3)
    about = {key: getattr(made.header, key) for key in ("name", "modality", "flow", "encoder", "space", "preprocess")}
    with pytest.raises(InputError, match=r"vector 1 \(id 'i1'\) is zero or not finite; 1 such"):
        Table.build(vectors, rows=made.rows, encoder_digest="d", **about)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 5}, "the header says"),
        ({"dim": 2}, "the header says"),
        ({"dtype": "float16"}, "the header says"),
        ({"normalised": False}, "not normalised"),
        ({"modality": "sound"}, "modality is 'sound'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"count": "4"}, "count is '4'"),
        ({"flow": "text"}, "does not go with"),
        ({"model": "x"}, "missing or unknown: model"),
    ],
)
def test_headers_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = save(table(), tmp_path)
    header = json.loads((folder / "table.json").read_text())
    (folder / "table.json").write_text(json.dumps(header | change))
    with pytest.raises(InputError, match=message):
        Table.load(folder)


def test_rows_and_vectors_that_do_not_fit_are_refused() -> None:
    made = table()
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("3 rows for 4 vectors", {"rows": made.rows[:3]}),
        ("row 3 has no id", {"rows": [*made.rows[:3], {"owner": "x"}]}),
        ("id 'i0' is there twice", {"rows": [*made.rows[:3], made.rows[0]]}),
        ("vector 0 .* not of unit length; 4 such", {"vectors": made.vectors * np.float32(1.002)}),
        ("vector 0 .* not finite", {"vectors": made.vectors * np.float32(np.nan)}),
    ]
    for message, change in wrong:
        with pytest.raises(InputError, match=message):
            replace(made, **change).check()
    replace(made, vectors=made.vectors * np.float32(1.0005)).check()


@pytest.mark.parametrize("name", ["vectors.npy", "rows.jsonl", "table.json"])
def test_missing_and_torn_files_are_refused(tmp_path: Path, name: str) -> None:
    folder = save(table(), tmp_path)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError):
        Table.load(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match="cannot read the embedding table"):
        Table.load(folder)


def test_pickled_vectors_are_refused(tmp_path: Path) -> None:
    folder = save(table(), tmp_path)
    np.save(folder / "vectors.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot read"):
        Table.load(folder)


def test_only_tables_of_one_space_are_compared() -> None:
    images = table()
    texts = table(2, name="test-texts", modality="text", flow="text", encoder_digest="d2", preprocess="tokens")
    require_same_space(images, texts)
    for changes, message in (
        ({"dim": 4}, "differ in dim: 3 and 4"),
        ({"space": "s2"}, "differ in space: s1 and s2"),
        ({"preprocess": "p2"}, "preprocessed differently"),
    ):
        with pytest.raises(InputError, match=message):
            require_same_space(images, table(**changes))
    require_same_space(images, table(flow="generated"))
