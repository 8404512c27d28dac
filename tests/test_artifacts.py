"""Artifacts: atomic, content-addressed, resumable, verified; two processes never tear one another's work."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gmail_cli import artifacts, plan
from gmail_cli.artifacts import Artifact, StageKey, Workspace, canonical_json, digest_of, folder_digest
from gmail_cli.errors import InputError, UsageError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def key(**settings: Any) -> StageKey:
    return StageKey(stage="align", settings=settings)


def make(workspace: Workspace, *, note: str = "x", **settings: Any) -> Artifact:
    with workspace.open(key(**settings)) as slot:
        if slot.done:
            return slot.artifact
        slot.write_json("a/values.json", {"note": note})
        slot.write_npy("vectors.npy", np.arange(6, dtype=np.float32))
        slot.write_jsonl("log.jsonl", [{"step": 1}, {"step": 2}])
        return slot.commit(summary={"note": note})


@given(JSON, st.text(max_size=5), st.integers())
def test_a_digest_depends_on_values_not_on_their_order(value: Any, name: str, number: int) -> None:
    first = {"a": value, "b": number, name: 0}
    second = dict(reversed(list(first.items())))
    assert digest_of(first) == digest_of(second)
    assert json.loads(canonical_json(first)) == first
    assert digest_of(first) != digest_of({**first, "b": number + 1} if name != "b" else {**first, "b": 1})


@given(st.dictionaries(st.sampled_from(["lr", "rank", "name"]), JSON, max_size=3))
def test_a_key_round_trips_through_the_manifest(settings: dict[str, Any]) -> None:
    made = key(**settings)
    written = made.to_json()
    assert written.pop("version") == artifacts.VERSIONS["align"]
    assert StageKey(**written).digest == made.digest


def test_commit_reuse_and_verify(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, "r")
    artifact = make(workspace, rank=4)
    assert artifact.path == tmp_path / "r/align" / key(rank=4).digest[:12]
    assert set(artifact.files) == {"a/values.json", "vectors.npy", "log.jsonl"}
    assert artifact.verify() == []
    assert sorted(p.name for p in artifact.path.iterdir()) == ["a", "log.jsonl", "manifest.json", "vectors.npy"]
    again = make(workspace, rank=4, note="never written")
    assert again.summary == {"note": "x"}
    other = make(workspace, rank=8)
    assert (tmp_path / "r/align/latest").resolve() == other.path
    make(workspace, rank=4)
    assert (tmp_path / "r/align/latest").resolve() == artifact.path
    assert other.content == artifact.content
    assert other.digest != artifact.digest


def test_verify_finds_a_flipped_bit_a_missing_and_a_foreign_file(tmp_path: Path) -> None:
    artifact = make(Workspace(tmp_path, "r"))
    path = artifact.file("vectors.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    artifact.file("log.jsonl").unlink()
    (artifact.path / "stray.txt").write_text("?")
    assert artifact.verify() == [
        "log.jsonl is missing",
        "vectors.npy has other bytes than the manifest says",
        "stray.txt is not in the manifest",
    ]
    with pytest.raises(InputError, match=r"log\.jsonl is missing"):
        artifact.file("log.jsonl")


def test_verify_finds_an_edited_manifest(tmp_path: Path) -> None:
    artifact = make(Workspace(tmp_path, "r"))
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    manifest["key"]["settings"]["rank"] = 5
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json has another key than its digest says" in Artifact.load(artifact.path).verify()


def test_an_interrupted_slot_keeps_whole_files_and_drops_a_torn_line(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, "r")

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), workspace.open(key()) as slot:
        slot.write_bytes("one.bin", b"1")
        with slot.log("rows").claim() as mine:
            assert mine
            slot.log("rows").append([{"n": 1}])
        with slot.scratch("rows.growing").open("ab") as stream:
            stream.write(b'{"n": 2')
        slot.write_loose("loose.bin", b"12")
        slot.write_loose("other.bin", b"12")
        slot.checkpoints("cell").save({"w": torch.ones(2)})
        slot.write_with("two.bin", fail)
    assert workspace.is_partial(key())
    with pytest.raises(InputError, match="unfinished"):
        Artifact.load(tmp_path / "r/align" / f"{key().digest[:12]}.partial")
    with workspace.open(key()) as slot:
        assert slot.has("one.bin")
        assert not slot.has("two.bin")
        assert slot.log("rows").read() == [{"n": 1}]
        assert not slot.has("loose.bin")
        assert not slot.adopt("loose.bin", sha256="0", size=3)
        assert slot.adopt("loose.bin", sha256=hashlib.sha256(b"12").hexdigest(), size=2)
        restored = slot.checkpoints("cell").load()
        assert restored is not None
        assert torch.equal(restored["w"], torch.ones(2))
        artifact = slot.commit(summary={})
    assert set(artifact.files) == {"one.bin", "loose.bin"}
    assert artifact.verify() == []


def test_a_log_has_one_writer_until_it_is_complete(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, "r")
    with workspace.open(key(), shared=True) as slot, workspace.open(key(), shared=True) as other:
        with slot.log("rows").claim() as mine, other.log("rows").claim() as theirs:
            assert (mine, theirs) == (True, False)
            slot.log("rows").append([{"n": 1}, {"n": 2}])
        with other.log("rows").claim() as theirs:
            assert theirs
            other.log("rows").complete()
        with slot.log("rows").claim() as mine:
            assert not mine
        assert slot.log("rows").read() == [{"n": 1}, {"n": 2}]
        slot.log("rows").keep(1)
        assert not other.log("rows").is_complete()
        assert other.log("rows").read() == [{"n": 1}]


def test_a_damaged_checkpoint_reads_as_none(tmp_path: Path) -> None:
    with Workspace(tmp_path, "r").open(key()) as slot:
        store = slot.checkpoints("c")
        assert store.load() is None
        store.save({"w": torch.ones(3)})
        slot.scratch("c.safetensors").write_bytes(b"\x00" * 9)
        assert store.load() is None


def test_a_folder_is_written_whole(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, "r")

    def half(folder: Path) -> None:
        (folder / "a").write_text("1")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError), workspace.open(key()) as slot:
        slot.write_folder("model", half)
    with workspace.open(key()) as slot:
        assert not slot.has_folder("model")
        slot.write_folder("model", lambda folder: (folder / "b").write_text("2"))
        assert slot.has_folder("model")
        artifact = slot.commit(summary={})
    assert set(artifact.files) == {"model/b"}
    assert artifact.folder("model") == artifact.path / "model"


WORKER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from gmail_cli.artifacts import StageKey, Workspace
    workspace = Workspace(Path(sys.argv[1]), "r", tell=lambda text: print("waits", text, flush=True))
    with workspace.open(StageKey(stage="align", settings={})) as slot:
        if slot.done:
            print("reused", flush=True)
        else:
            print("works", flush=True)
            for number in range(int(sys.argv[2])):
                if not slot.has(f"{number}.bin"):
                    slot.write_bytes(f"{number}.bin", bytes([number % 251]) * 1000)
                    time.sleep(float(sys.argv[3]))
            slot.commit(summary={})
            print("done", flush=True)
    """
)


def start(root: Path, count: int, pause: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(root), str(count), str(pause)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def test_two_processes_at_once_one_works_the_other_waits_and_reuses(tmp_path: Path) -> None:
    first = start(tmp_path, 5, 0.2)
    assert first.stdout is not None
    assert first.stdout.readline() == "works\n"
    second = start(tmp_path, 5, 0.2)
    out, _ = second.communicate(timeout=60)
    assert first.wait(timeout=60) == 0
    assert out.startswith(f"waits process {first.pid} is making align-")
    assert out.endswith("reused\n")
    first.stdout.close()


def test_kill_dash_nine_then_the_same_command_ends_in_the_same_content(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole", 30, 0)
    whole.communicate(timeout=60)
    rng = np.random.default_rng(0)
    for _ in range(3):
        process = start(tmp_path / "killed", 30, 0.01)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(float(rng.uniform(0.01, 0.15)))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    start(tmp_path / "killed", 30, 0).communicate(timeout=60)
    first, second = (Artifact.load(tmp_path / name / "r/align/latest") for name in ("whole", "killed"))
    assert second.verify() == []
    assert len(second.files) == 30
    assert (first.content, first.digest) == (second.content, second.digest)


def test_processes_that_share_a_slot_save_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, "r")
    with workspace.open(key(), shared=True) as first, workspace.open(key(), shared=True) as second:
        first.checkpoints("a").save({"x": torch.ones(2)})
        second.checkpoints("b").save({"x": torch.zeros(2)})
        assert workspace.collect_garbage() == []
        for write in (lambda: first.write_text("x", "x"), lambda: first.commit(summary={})):
            with pytest.raises(AssertionError, match="share a slot"):
                write()
    with workspace.open(key()) as slot:
        assert [slot.checkpoints(name).exists() for name in "abc"] == [True, True, False]
        slot.write_text("x", "x")
        artifact = slot.commit(summary={})
    assert set(artifact.files) == {"x"}
    with workspace.open(key(), shared=True) as done:
        assert done.done


def test_one_that_opens_a_slot_alone_waits_for_those_that_share_it(tmp_path: Path) -> None:
    asked = threading.Event()
    workspace = Workspace(tmp_path, "r", tell=lambda _text: asked.set())
    seen: list[bool] = []

    def alone() -> None:
        with workspace.open(key()) as slot:
            seen.append(slot.checkpoints("a").exists())

    with workspace.open(key(), shared=True) as slot:
        waiting = threading.Thread(target=alone)
        waiting.start()
        assert asked.wait(60)
        slot.checkpoints("a").save({"x": torch.ones(2)})
    waiting.join(60)
    assert seen == [True]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_blocks_of_rows_are_written_as_the_whole_array(tmp_path: Path, dtype: str) -> None:
    rows = np.arange(21, dtype=dtype).reshape(7, 3)
    with Workspace(tmp_path, "r").open(key()) as slot:
        whole = slot.write_npy("whole.npy", rows).read_bytes()
        blocks = slot.write_npy_blocks(
            "blocks.npy", (rows[at : at + 2] for at in range(0, 7, 2)), shape=(7, 3), dtype=dtype
        )
        assert blocks.read_bytes() == whole
        with pytest.raises(AssertionError, match="6 rows"):
            slot.write_npy_blocks("short.npy", [rows[:6]], shape=(7, 3), dtype=dtype)
        assert not slot.has("short.npy")


def test_garbage_is_what_no_latest_needs(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, "r")
    old = make(workspace, rank=1)
    parent = make(workspace, rank=2)
    with workspace.open(StageKey(stage="train", settings={}, inputs={"aligned": parent.digest})) as slot:
        child = slot.commit(summary={})
    newest = make(workspace, rank=3)
    with workspace.open(key(rank=4)) as slot:
        partial = slot.path("x").parent
    assert workspace.garbage() == [partial, old.path]
    assert workspace.collect_garbage() == [partial, old.path]
    assert {artifact.digest for artifact in workspace.artifacts()} == {parent.digest, child.digest, newest.digest}


def test_gc_leaves_what_a_process_is_writing(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, "r")
    process = start(tmp_path, 50, 0.05)
    assert process.stdout is not None
    process.stdout.readline()
    assert workspace.garbage() == []
    assert workspace.collect_garbage() == []
    out, _ = process.communicate(timeout=60)
    assert out == "done\n"


def test_gc_keeps_what_another_run_was_made_from(tmp_path: Path) -> None:
    workspace, other = Workspace(tmp_path, "r"), Workspace(tmp_path, "s")
    used, unused = make(workspace, rank=1), make(workspace, rank=2)
    newest = make(workspace, rank=3)
    with other.open(StageKey(stage="train", settings={}, inputs={"aligned": used.digest})) as slot:
        slot.commit(summary={})
    assert workspace.collect_garbage() == [unused.path]
    assert {artifact.digest for artifact in workspace.artifacts()} == {used.digest, newest.digest}


@pytest.mark.parametrize("run", ["", "..", "a/b", ".hidden", "a\\b"])
def test_a_run_name_stays_inside_its_folder(tmp_path: Path, run: str) -> None:
    with pytest.raises(UsageError, match="run name"):
        Workspace(tmp_path, run)


def test_loading_what_is_no_artifact_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not an artifact"):
        Artifact.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        Artifact.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"not a gmail\.manifest/1"):
        Artifact.load(tmp_path)


def test_training_on_given_images_finds_what_was_aligned_with_them(tmp_path: Path) -> None:
    elsewhere, workspace = Workspace(tmp_path, "images"), Workspace(tmp_path, "r")
    made = []
    for number in range(2):
        with elsewhere.open(StageKey(stage="generate", settings={"number": number})) as slot:
            made.append(slot.commit(summary={}))
    with workspace.open(StageKey(stage="align", settings={}, inputs={"generated": made[1].digest})) as slot:
        aligned = slot.commit(summary={})
    assert plan.find_inputs("train", workspace, given={"generated": made[1]})["aligned"].digest == aligned.digest
    assert "aligned" not in plan.find_inputs("train", workspace, given={"generated": made[0]})


def test_what_another_version_of_a_stage_made_is_refused_but_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path, "r")
    old, now = make(workspace), artifacts.VERSIONS["align"]
    monkeypatch.setitem(artifacts.VERSIONS, "align", now + 1)
    said = rf"was made by version {now} of `gmail align`, and this gmail has version {now + 1}"
    for read in (
        lambda: Artifact.load(old.path),
        lambda: workspace.latest("align"),
        lambda: plan.find_inputs("embed", workspace, given={}),
    ):
        with pytest.raises(InputError, match=said) as refused:
            read()
        assert refused.value.hint.startswith("Run `gmail align` again")
    with workspace.open(StageKey(stage="train", settings={}, inputs={"aligned": old.digest})) as slot:
        child = slot.commit(summary={})
    with pytest.raises(InputError, match=said):  # an input is found through what was made from it
        plan.find_inputs("embed", workspace, given={"train": child})
    assert [each.digest for each in workspace.artifacts()] == [old.digest, child.digest]
    assert workspace.garbage() == []
    new = make(workspace)
    assert new.digest != old.digest
    assert Artifact.load(new.path).digest == new.digest
    assert Artifact.load(old.path, any_version=True).verify() == []


def test_a_model_folder_digest_follows_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"1")
    first = folder_digest(tmp_path)
    (tmp_path / "w.safetensors").write_bytes(b"22")
    assert folder_digest(tmp_path) != first
    with pytest.raises(InputError, match="is not a folder"):
        folder_digest(tmp_path / "none")


def test_an_export_that_was_killed_leaves_nothing_when_it_is_made_again(tmp_path: Path) -> None:
    """Not even where each process has the same number, as in a container."""

    def in_a_child(writer: Callable[[Path], object]) -> int:
        child = os.fork()
        if child == 0:
            artifacts.export_folder(tmp_path / "made", writer)
            os._exit(0)
        return os.waitpid(child, 0)[1]

    def killed(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    def whole(folder: Path) -> None:
        (folder / "file").write_bytes(b"whole")

    def beside_another(folder: Path) -> None:
        whole(folder)
        assert in_a_child(killed) == signal.SIGKILL
        assert (folder / "file").read_bytes() == b"whole", "a process that still writes is left alone"

    assert in_a_child(killed) == signal.SIGKILL
    (tmp_path / f".made.{os.getpid()}.tmp").mkdir()
    assert len(list(tmp_path.iterdir())) == 2
    artifacts.export_folder(tmp_path / "made", whole)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    (tmp_path / "made" / "file").unlink()
    artifacts.export_folder(tmp_path / "made", beside_another)
    assert (tmp_path / "made" / "file").read_bytes() == b"whole"
