"""Exports to an object store: a server of the S3 protocol, spoken to over HTTP."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import small_pipelines

from gmail_cli.artifacts import Artifact, Workspace
from gmail_cli.components import captions
from gmail_cli.errors import SetupError, UsageError
from gmail_cli.profile import build
from gmail_cli.stages import generate
from gmail_cli.stages.generate import exporting

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:moto"),
]

READERS = """
import fsspec, json, sys
import datasets, webdataset
from webdataset.gopen import gopen_schemes

gopen_schemes["s3"] = lambda url, mode="rb", bufsize=8192, **_: fsspec.open(url, mode).open()
shards = [f"s3://sets/made/0000{number}.tar" for number in range(3)]
samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("png", "txt", "json"))
options = {"split": "train", "cache_dir": sys.argv[1]}
table = datasets.load_dataset("parquet", data_files="s3://sets/made/images.parquet", **options)
tars = datasets.load_dataset("webdataset", data_files={"train": shards}, **options)
print(json.dumps({
    "webdataset": [[image.size, text, about["sha256"]] for image, text, about in samples],
    "table": table["sha256"][:],
    "tars": [[each["png"].size, each["txt"], each["json"]["sha256"]] for each in tars],
}))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    missing = [name for name in ("moto", "flask", "s3fs") if importlib.util.find_spec(name) is None]
    if missing:
        message = f"{' and '.join(missing)} of the extra dev not installed"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        running.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, found by the variables that every S3 client knows."""
    import s3fs

    told = {"AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for name, value in (told | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    if system.exists("sets"):
        system.rm("sets", recursive=True)
    system.mkdir("sets")
    return "s3://sets"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Twelve images."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "captions.txt").write_text("".join(f"a cat and {row} dogs\n" for row in range(12)))
    chosen = {"model": str(small_pipelines.save("sd1", folder / "sd1")), "steps": 2, "guidance": 2.0, "batch_size": 4}
    profile = build({"data": {"train": str(folder / "captions.txt")}, "generate": chosen})
    return generate.run(profile, Workspace(folder / "runs"))


def test_an_export_goes_up_file_by_file_the_table_last_and_is_read_where_it_lies(
    bucket: str, server: str, drawn: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import s3fs

    with caplog.at_level(logging.INFO, logger="werkzeug"):
        exporting.export(drawn, f"{bucket}/made", shard_images=5)
    asked = re.findall(r'"(PUT|POST|DELETE) ([^ ?]*)', caplog.text)
    names = [*(f"0000{number}.tar" for number in range(3)), "images.parquet"]
    mark = "/sets/made/images.parquet.unfinished"
    puts = [("PUT", mark), *(("PUT", f"/sets/made/{name}") for name in names)]
    assert asked == [*puts, ("DELETE", mark)], "each is put once, in order; nothing is renamed"

    system = s3fs.S3FileSystem()
    system.invalidate_cache()
    rows = drawn.read_jsonl("records.jsonl")
    dataset = captions.read(f"{bucket}/made/0000*.tar", need_images=True)
    assert [image.id for image in dataset.images] == [row["key"] for row in rows]
    assert hashlib.sha256(dataset.image_bytes(7)).hexdigest() == rows[7]["sha256"]
    done = subprocess.run(
        [sys.executable, "-c", READERS, str(tmp_path / "cache")],
        env=os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert read["webdataset"] == read["tars"] == [[[16, 16], row["caption"], row["sha256"]] for row in rows]
    assert read["table"] == [row["sha256"] for row in rows]
    with pytest.raises(UsageError, match="is there already"):
        exporting.export(drawn, f"{bucket}/made")


def test_an_export_that_was_cut_short_has_no_table_and_is_written_over(bucket: str, drawn: Artifact) -> None:
    import s3fs

    def stop(done: int, total: int) -> None:
        if done > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exporting.export(drawn, f"{bucket}/cut", shard_images=5, progress=stop)
    system = s3fs.S3FileSystem()
    assert system.ls("sets/cut", detail=False) == ["sets/cut/00000.tar", "sets/cut/images.parquet.unfinished"]
    system.pipe_file("sets/cut/readme.txt", b"kept")
    exporting.export(drawn, f"{bucket}/cut", shard_images=5)
    system.invalidate_cache()
    names = ["00000.tar", "00001.tar", "00002.tar", "images.parquet", "readme.txt"]
    assert system.ls("sets/cut", detail=False) == [f"sets/cut/{name}" for name in names]
    with pytest.raises(UsageError, match="sets/cut is there already"):
        exporting.export(drawn, f"{bucket}/cut")
    with pytest.raises(SetupError, match="cannot write s3://nobody/made"):
        exporting.export(drawn, "s3://nobody/made")


def test_an_export_goes_on_with_fewer_tars_and_leaves_none_of_the_others(bucket: str, drawn: Artifact) -> None:
    import s3fs

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exporting.export(drawn, f"{bucket}/fewer", shard_images=2, progress=stop)
    exporting.export(drawn, f"{bucket}/fewer", shard_images=6)
    system = s3fs.S3FileSystem()
    system.invalidate_cache()
    names = ["00000.tar", "00001.tar", "images.parquet"]
    assert system.ls("sets/fewer", detail=False) == [f"sets/fewer/{name}" for name in names]
    assert len(captions.read(f"{bucket}/fewer/*.tar", need_images=True).images) == 12


def test_what_lies_at_an_address_and_is_no_export_is_left_alone(bucket: str, drawn: Artifact) -> None:
    import s3fs

    system = s3fs.S3FileSystem()
    system.pipe_file("sets/others/00000.tar", b"somebody's")
    with pytest.raises(UsageError, match=r"s3://sets/others holds something else: 00000\.tar"):
        exporting.export(drawn, f"{bucket}/others")
    assert system.cat_file("sets/others/00000.tar") == b"somebody's"


def test_an_address_without_its_slashes_is_named(drawn: Artifact) -> None:
    with pytest.raises(UsageError, match="'s3:sets/made' is no address") as caught:
        exporting.export(drawn, "s3:sets/made")
    assert caught.value.hint == "Write s3://sets/made."


def test_a_store_that_does_not_let_in_or_does_not_answer_is_named(
    bucket: str, drawn: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import s3fs

    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"retries": {"max_attempts": 0}}})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(SetupError, match=f"cannot write {bucket}/made: Could not connect"):
        exporting.export(drawn, f"{bucket}/made")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(SetupError, match=f"cannot write {bucket}/made: Unable to locate credentials"):
        exporting.export(drawn, f"{bucket}/made")
    with pytest.raises(SetupError, match=r"cannot read \S+/made/00000\.tar: Unable to locate credentials"):
        captions.read(f"{bucket}/made/00000.tar")
