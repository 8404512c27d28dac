"""The generate stage: plans, records, settings, estimates, imports, drawing again."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gmail_cli.artifacts import Workspace
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import build
from gmail_cli.profile.generation import Generate
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import generate
from gmail_cli.stages.generate import checking, drawing, planning

# some of diffusers' schedulers ask numpy for copies in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


# -- the stage -------------------------------------------------------------------------------------------------


def profile_for(pipeline_folder: Path, captions_file: Path, **generate: Any) -> Profile:
    chosen = {"model": str(pipeline_folder), "steps": 2, "guidance": 2.0, "batch_size": 4} | generate
    return build({"data": {"train": str(captions_file)}, "generate": chosen})


def test_generate_writes_an_image_and_a_record_for_every_caption_and_k(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path
) -> None:
    profile = profile_for(pipeline_folder, captions_file, per_caption=3, limit=2)
    told: list[tuple[int, int]] = []
    artifact = generate.run(profile, Workspace(tmp_path), progress=lambda *state: told.append(state))
    records = artifact.read_jsonl("records.jsonl")
    assert [(each["owner"], each["caption_id"], each["k"]) for each in records] == [
        (owner, caption, k)
        for owner, caption in [("0", "100"), ("0", "101"), ("1", "102"), ("1", "103")]
        for k in range(3)
    ]
    assert [each["key"] for each in records[:4]] == ["100-0", "100-1", "100-2", "101-0"]
    assert records[0]["path"] == "images/000/100-0.png"
    assert records[0]["caption"] == "a cat in a field"
    for record in records:
        content = artifact.file(record["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == record["sha256"] == artifact.files[record["path"]]["sha256"]
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == (record["width"], record["height"]) == (16, 16)
    assert len({each["sha256"] for each in records}) == 12
    assert artifact.verify() == []
    assert artifact.summary["images"] == 12
    assert artifact.summary["owners"] == 2
    assert artifact.summary["truncated_share"] == 0
    assert artifact.summary["scheduler"] == "DDIMScheduler"
    assert told == sorted(told)
    assert told[-1] == (12, 12)
    assert generate.plan_key(profile).digest == artifact.digest
    before = artifact.path.stat().st_mtime_ns
    assert generate.run(profile, Workspace(tmp_path)).path.stat().st_mtime_ns == before


def test_images_do_not_depend_on_the_run_they_are_part_of(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path
) -> None:
    def records(**chosen: int) -> list[dict[str, Any]]:
        profile = profile_for(pipeline_folder, captions_file, **chosen)
        return generate.run(profile, Workspace(tmp_path)).read_jsonl("records.jsonl")

    small, large = records(limit=1), records(limit=3, per_caption=2)
    by_key = {each["key"]: each["sha256"] for each in large}
    assert {each["key"]: each["sha256"] for each in small}.items() <= by_key.items()


def test_the_same_captions_are_the_same_plan_wherever_they_lie(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path
) -> None:
    copy = tmp_path / "moved.json"
    copy.write_bytes(captions_file.read_bytes())
    there = generate.plan_key(profile_for(pipeline_folder, captions_file))
    assert generate.plan_key(profile_for(pipeline_folder, copy)).digest == there.digest
    copy.write_text(copy.read_text().replace("cat", "cap"))
    assert generate.plan_key(profile_for(pipeline_folder, copy)).digest != there.digest


def test_coco_times_five_is_five_images_for_every_caption(shared_data: Path, pipeline_folder: Path) -> None:
    source = shared_data / "coco" / "captions_val2017.json"
    planned = planning.plan(profile_for(pipeline_folder, source, per_caption=5, limit=20))
    assert len({each.owner for each in planned}) == 20
    assert len({each.caption_id for each in planned}) == len(planned) / 5 >= 100


CHANGES: dict[str, Any] = {
    "name": "other",
    "limit": 1,
    "captions_per_image": 1,
    "per_caption": 2,
    "dtype": "bfloat16",
    "scheduler": "EulerAncestralDiscreteScheduler",
    "timestep_spacing": "trailing",
    "steps": 3,
    "guidance": 4.0,
    "prompt_template": ["a photo of {caption}", "{caption}"],
    "negative_prompt": "bad",
    "batch_size": 3,
    "format": "jpg",
}
OTHERWISE_TESTED = {
    *("score", "min_clip_score", "keep_best"),
    *("mix", "strength", "rewrite"),
    "source",
    "import_path",
    "model",
    "revision",
    "kinds",
    "height",
    "width",
    "quality",
    "lora",
    "lora_scale",
    *("prompt_windows", "compile"),
    *("safety_checker", "safety_revision", "unsafe_label", "max_unsafe"),
}


def test_every_setting_moves_the_digest(pipeline_folder: Path, captions_file: Path) -> None:
    assert CHANGES.keys() | OTHERWISE_TESTED == Generate.model_fields.keys()
    variants = [{}, *({name: value} for name, value in CHANGES.items())]
    variants += [{"format": "jpg", "quality": 50}, {"format": "webp"}, {"height": 16, "width": 24}]
    digests = {generate.plan_key(profile_for(pipeline_folder, captions_file, **each)).digest for each in variants}
    assert len(digests) == len(variants)
    png = [profile_for(pipeline_folder, captions_file, quality=quality) for quality in (1, 90)]
    assert len({generate.plan_key(each).digest for each in png}) == 1
    seeded = png[0].model_copy(update={"seed": 1})
    assert generate.plan_key(seeded).digest != generate.plan_key(png[0]).digest


def test_every_setting_moves_the_result(tmp_path: Path, pipeline_folder: Path, captions_file: Path) -> None:
    def content(**changed: Any) -> str:
        profile = profile_for(pipeline_folder, captions_file, **({"limit": 2} | changed))
        return generate.run(profile, Workspace(tmp_path)).content

    plain = content()
    moved = set(CHANGES) - {"batch_size"}  # which may leave eight bits of colour as they are
    contents = {name: content(**{name: CHANGES[name]}) for name in sorted(moved)}
    assert [name for name, each in contents.items() if each == plain] == []
    assert len(set(contents.values())) == len(contents)
    assert content(format="jpg", quality=50) != contents["format"]


def test_height_and_width_are_those_of_the_images(tmp_path: Path, pipeline_folder: Path, captions_file: Path) -> None:
    profile = profile_for(pipeline_folder, captions_file, limit=1, height=16, width=24)
    artifact = generate.run(profile, Workspace(tmp_path))
    with Image.open(artifact.file("images/000/100-0.png")) as image:
        assert image.size == (24, 16)


@pytest.mark.parametrize("extension", ["jpg", "webp"])
def test_lossy_formats_are_what_they_are_called(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, extension: str
) -> None:
    profile = profile_for(pipeline_folder, captions_file, format=extension, limit=1, captions_per_image=1)
    artifact = generate.run(profile, Workspace(tmp_path))
    with Image.open(artifact.file(f"images/000/100-0.{extension}")) as image:
        assert image.format == {"jpg": "JPEG", "webp": "WEBP"}[extension]


def test_kinds_choose_the_captions(pipeline_folder: Path) -> None:
    def planned(*kinds: str) -> planning.Plan:
        profile = build(
            {
                "data": {"train": "scenes:train", "train_limit": 2},
                "generate": {"model": str(pipeline_folder), "kinds": list(kinds)},
            }
        )
        return planning.plan(profile)

    short, long = planned("short"), planned("long")
    assert (len(short), len(long)) == (10, 2)
    assert {each.key for each in planned("short", "long")} == {each.key for each in [*short, *long]}


def test_a_hub_model_needs_its_revision_and_carries_it_in_the_key(captions_file: Path) -> None:
    def profile(revision: str) -> Profile:
        return build({"data": {"train": str(captions_file)}, "generate": {"model": "some/model", "revision": revision}})

    with pytest.raises(UsageError, match=r"some/model.*revision"):
        generate.plan_key(profile(""))
    assert generate.plan_key(profile("abc")).models == {"generator": "some/model@abc"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_template": "a photo"},
        {"negative_prompt": "bad", "guidance": 1.0},
        {"source": "import"},
        {"import_path": "folder"},
        {"height": 32},
        {"width": 30, "height": 32},
        {"kinds": []},
        {"keep_best": 2},
    ],
)
def test_settings_that_do_not_fit_together_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        build({"generate": wrong})


@given(st.lists(st.text(min_size=1, max_size=200), unique=True, max_size=8), st.integers(0, 10))
def test_keys_are_safe_file_names_and_never_meet(identities: list[str], k: int) -> None:
    keys = [planning.file_key(identity, k) for identity in identities]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[a-z0-9_-][a-z0-9._-]*", key) and len(key) < 120 for key in keys)


def test_a_plain_id_stays_readable() -> None:
    assert planning.file_key("000123#2", 4) == "000123_2-3ff9fe96a434-4"
    assert planning.file_key("scene-0001.c2", 0) == "scene-0001.c2-0"


# -- prompts ---------------------------------------------------------------------------------------------------


def test_a_template_holds_caption_and_class(tmp_path: Path, pipeline_folder: Path) -> None:
    file = tmp_path / "captions.jsonl"
    rows = [
        {"key": "a", "caption": "a {label} on a table", "label": "cat"},
        {"key": "b", "caption": "dogs", "label": "dog"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{label}: {caption}, a photo of a {label}"
    profile = profile_for(pipeline_folder, file, prompt_template=template)
    told = drawing.Work(profile).jobs
    assert [job.prompt for job in told] == [
        "cat: a {label} on a table, a photo of a cat",
        "dog: dogs, a photo of a dog",
    ]
    artifact = generate.run(profile, Workspace(tmp_path))
    assert [row["caption"] for row in artifact.read_jsonl("records.jsonl")] == ["a {label} on a table", "dogs"]
    assert checking.regenerate(profile, artifact, count=2) == []
    file.write_text(json.dumps({"key": "a", "caption": "a cat"}) + "\n")
    with pytest.raises(InputError, match=r"\{label\} and image 'a' of .*captions.jsonl has no class"):
        generate.plan_key(profile_for(pipeline_folder, file, prompt_template="{label}"))


# -- estimates -------------------------------------------------------------------------------------------------


def test_an_estimate_is_drawn_from_batches_that_are_not_kept(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    profile = profile_for(pipeline_folder, captions_file, per_caption=2)
    space = Workspace(tmp_path / "runs")
    assert checking.estimate(profile, space) == {"images": 48, "captions": 24, "reused": 0}
    told = checking.estimate(profile, space, batches=2)
    made = generate.run(profile, space)
    sizes = [row["bytes"] for row in made.read_jsonl("records.jsonl")]
    assert told["bytes_per_image"] == sum(sizes[:8]) // 8
    assert told["bytes"] == 48 * told["bytes_per_image"]
    assert told["seconds"] == pytest.approx(48 * told["seconds_per_image"])
    assert 0 < told["seconds_per_image"] < 60
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    imported = build({"generate": {"source": "import", "import_path": str(made.path)}})
    with pytest.raises(UsageError, match="imported images are not drawn"):
        checking.estimate(imported, space, batches=1)


# -- import ----------------------------------------------------------------------------------------------------


def _picture(red: int, *, suffix: str = ".png") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (9, 7), (red, 20, 30)).save(stream, format={".png": "PNG", ".jpg": "JPEG"}[suffix])
    return stream.getvalue()


PICTURES = {"a": _picture(10), "b": _picture(200, suffix=".jpg")}
TEXTS = {"a": "a red car", "b": "a blue car"}


def _folder(root: Path) -> Path:
    folder = root / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(PICTURES["a"])
    (folder / "b.jpg").write_bytes(PICTURES["b"])
    rows = [{"file_name": name, "caption": TEXTS[name[0]]} for name in ("a.png", "b.jpg")]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _tar(root: Path) -> Path:
    path = root / "shard.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in [("a.png", PICTURES["a"]), ("b.jpg", PICTURES["b"])]:
            members = [(name, content), (f"{name[0]}.txt", TEXTS[name[0]].encode())]
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def _parquet(root: Path) -> Path:
    path = root / "shard.parquet"
    rows = [
        {"key": key, "class": "car", "caption": TEXTS[key], "image": {"bytes": PICTURES[key], "path": None}}
        for key in ("a", "b")
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("make", [_folder, _tar, _parquet])
def test_images_made_elsewhere_come_in_byte_for_byte(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    source = make(tmp_path)
    profile = build({"generate": {"source": "import", "import_path": str(source), "name": "sd-1.4"}})
    artifact = generate.run(profile, Workspace(tmp_path / "runs"))
    records = artifact.read_jsonl("records.jsonl")
    assert [artifact.file(each["path"]).read_bytes() for each in records] == list(PICTURES.values())
    assert [Path(each["path"]).suffix for each in records] == [".png", ".jpg"]
    assert [each["caption"] for each in records] == list(TEXTS.values())
    assert {each["generator"] for each in records} == {"sd-1.4"}
    assert all((each["width"], each["height"], each["seed"], each["k"]) == (9, 7, None, 0) for each in records)
    assert [each["label"] for each in records] == ["car" if make is _parquet else None] * 2
    assert artifact.digest == generate.plan_key(profile).digest
    fewer = build({"generate": {"source": "import", "import_path": str(source), "name": "sd-1.4", "limit": 1}})
    assert generate.plan_key(fewer).digest != artifact.digest
    again = build({"generate": {"source": "import", "import_path": str(source)}})
    assert generate.run(again, Workspace(tmp_path / "runs")).summary["generator"] == "import"


def test_an_import_says_which_image_is_broken(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "b.jpg").write_bytes(PICTURES["b"][:150])
    profile = build({"generate": {"source": "import", "import_path": str(folder)}})
    with pytest.raises(InputError, match="cannot decode image 'b"):
        generate.run(profile, Workspace(tmp_path / "runs"))


def test_images_drawn_again_are_the_same(tmp_path: Path, pipeline_folder: Path, captions_file: Path) -> None:
    profile = profile_for(pipeline_folder, captions_file)
    artifact = generate.run(profile, Workspace(tmp_path))
    seen: list[tuple[int, int]] = []
    other = profile.model_copy(update={"generate": profile.generate.model_copy(update={"steps": 9, "guidance": 1.0})})
    assert checking.regenerate(other, artifact, count=3, progress=lambda *at: seen.append(at)) == []
    assert seen[-1] == (3, 3)
    count = artifact.summary["images"]
    assert checking.regenerate(profile, artifact, count=10 * count) == []

    record = artifact.read_jsonl("records.jsonl")[0]
    rows = [json.dumps({**row, "k": row["k"] + 1}) for row in artifact.read_jsonl("records.jsonl")]
    artifact.file("records.jsonl").write_text("\n".join(rows) + "\n")
    problems = checking.regenerate(profile, artifact, count=count)
    assert len(problems) == count
    assert problems[0].startswith(f"{record['path']}: drawn again, pixels differ by ")


def test_what_cannot_be_drawn_again(tmp_path: Path, pipeline_folder: Path, captions_file: Path) -> None:
    moving = tmp_path / "before"
    shutil.copytree(pipeline_folder, moving)
    artifact = generate.run(profile_for(moving, captions_file), Workspace(tmp_path))
    assert checking.regenerate(build({}), artifact, count=2) == [], "the artifact says what drew it"
    moved = moving.rename(tmp_path / "after")
    with pytest.raises(
        InputError, match=r"generate\.model = 'tiny' is not the pipeline that drew .*, nor is '.*before'"
    ):
        checking.regenerate(build({}), artifact, count=1)
    assert checking.regenerate(build({"generate": {"model": str(moved)}}), artifact, count=2) == []
    source = artifact.path / "images"
    imported = generate.run(
        build({"generate": {"source": "import", "import_path": str(source)}}), Workspace(tmp_path, "imported")
    )
    with pytest.raises(InputError, match="holds no images that `gmail generate` drew"):
        checking.regenerate(build({}), imported, count=1)
