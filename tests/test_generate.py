"""Generation: byte-stable sampling, resume, import."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gmail_cli.artifacts import Artifact, Waiting, Workspace
from gmail_cli.components import diffusion, pipelines, quality
from gmail_cli.errors import InputError, SetupError, UsageError
from gmail_cli.profile import Generate, Profile, build
from gmail_cli.stages import generate
from gmail_cli.stages.generate import checking, drawing, exporting, planning

# some of diffusers' schedulers ask numpy for copies in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def build_pipeline(folder: Path) -> Path:
    """Save a small untrained Stable Diffusion pipeline: 32 px images, 32 tokens."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = [chr(code) for code in range(97, 123)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={token: row for row, token in enumerate(tokens)}, merges=[], model_max_length=32)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=32,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def pipeline(pipeline_folder: Path) -> Any:
    return pipelines.load_pipeline(str(pipeline_folder))


SAMPLING = diffusion.Sampling(steps=3, guidance=3.0, batch_size=4, seed=5)
JOBS = [
    diffusion.Job(f"c{row}", f"{word} on a table", k)
    for row, word in enumerate(["cat", "dog", "cow"])
    for k in range(2)
]


def pixels(sampler: diffusion.Sampler, jobs: Sequence[diffusion.Job]) -> dict[diffusion.Job, bytes]:
    return {drawn.job: drawn.pixels.tobytes() for batch in sampler.draw(jobs) for drawn in batch}


# -- sampling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "reuse"),
    [("default", True), ("default", False), ("EulerAncestralDiscreteScheduler", True), ("DDPMScheduler", True)],
)
def test_an_image_is_the_same_bytes_in_any_order_neighbourhood_and_shard(
    pipeline_folder: Path, scheduler: str, reuse: bool
) -> None:
    loaded = pipelines.load_pipeline(str(pipeline_folder), scheduler=scheduler)
    sampler = diffusion.Sampler(loaded, sampling=SAMPLING)
    assert sampler.reuses_encodings
    sampler.reuses_encodings = reuse
    whole = pixels(sampler, JOBS)
    assert len(set(whole.values())) == len(JOBS)
    assert pixels(sampler, JOBS[::-1]) == whole
    assert pixels(sampler, [JOBS[4]]) == {JOBS[4]: whole[JOBS[4]]}
    for shards in (2, 4):
        assert {
            job: image for shard in range(shards) for job, image in pixels(sampler, JOBS[shard::shards]).items()
        } == whole


def test_reused_encodings_change_nothing_and_save_the_text_encoder(pipeline: Any) -> None:
    calls: list[int] = []
    hook = pipeline.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len((args or [kwargs["input_ids"]])[0])), with_kwargs=True
    )
    try:
        sampler = diffusion.Sampler(pipeline, sampling=SAMPLING)
        jobs = [dataclasses.replace(job, k=k) for job in JOBS[::2] for k in range(3)]
        reused = pixels(sampler, jobs)
        assert calls == [4, 4]  # three captions in one block of 4, and the empty negative prompt
        sampler.reuses_encodings = False
        assert pixels(sampler, jobs) == reused
    finally:
        hook.remove()


def test_starting_in_the_middle_yields_the_rest_of_the_same_images(pipeline: Any) -> None:
    sampler = diffusion.Sampler(pipeline, sampling=SAMPLING)
    whole = pixels(sampler, JOBS)
    late = [drawn for batch in sampler.draw(JOBS, start=5) for drawn in batch]
    assert [drawn.job for drawn in late] == JOBS[5:]
    assert all(drawn.pixels.tobytes() == whole[drawn.job] for drawn in late)


def test_each_part_of_a_jobs_identity_moves_its_seed() -> None:
    job = diffusion.Job("a", "a cat", 0)
    seeds = {
        diffusion.derived_seed(job, seed=0),
        diffusion.derived_seed(job, seed=1),
        diffusion.derived_seed(job, seed=0, attempt=1),
        diffusion.derived_seed(dataclasses.replace(job, k=1), seed=0),
        diffusion.derived_seed(dataclasses.replace(job, caption_id="b"), seed=0),
        diffusion.derived_seed(dataclasses.replace(job, prompt="a dog"), seed=0),
    }
    assert len(seeds) == 6
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("fault", [0.0, float("nan")])
def test_a_blank_or_broken_image_is_drawn_again(pipeline: Any, fault: float) -> None:
    sampler = diffusion.Sampler(pipeline, sampling=SAMPLING)
    whole = pixels(sampler, JOBS[:4])
    calls = 0

    def spoil(_module: object, _inputs: object, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= 2:
            output[2] = fault
        return output

    hook = pipeline.vae.decoder.register_forward_hook(spoil)
    try:
        drawn = next(sampler.draw(JOBS[:4]))
    finally:
        hook.remove()
    assert [each.attempt for each in drawn] == [0, 0, 2, 0]
    assert drawn[2].seed == diffusion.derived_seed(JOBS[2], seed=5, attempt=2)
    assert [each.pixels.tobytes() == whole[each.job] for each in drawn] == [True, True, False, True]


def test_a_generator_that_stays_blank_stops_the_run(pipeline: Any) -> None:
    sampler = diffusion.Sampler(pipeline, sampling=SAMPLING)
    hook = pipeline.vae.decoder.register_forward_hook(lambda _module, _inputs, output: output * 0)
    try:
        with pytest.raises(SetupError, match=r"'c0'.*cat on a table"):
            next(sampler.draw(JOBS[:4]))
    finally:
        hook.remove()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_batch_that_does_not_fit_the_memory_is_named(pipeline: Any, device: str) -> None:
    import torch

    def full(*_: object) -> None:
        if device == "cpu":
            torch.empty(1 << 60, dtype=torch.uint8)  # more than any machine has: torch's own error
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = pipeline.unet.register_forward_pre_hook(full)
    try:
        with pytest.raises(SetupError, match=r"batch of 4 images.*\n--set generate\.batch_size=2 "):
            next(diffusion.Sampler(pipeline, sampling=SAMPLING).draw(JOBS))
    finally:
        hook.remove()


def test_captions_longer_than_the_text_encoder_are_marked(pipeline: Any) -> None:
    sampler = diffusion.Sampler(pipeline, sampling=SAMPLING)
    jobs = [diffusion.Job("fits", "a" * 30, 0), diffusion.Job("cut", "a" * 31, 0)]  # 32 tokens with start and end
    assert [drawn.truncated for drawn in next(sampler.draw(jobs))] == [False, True]


SCHEDULERS = get_args(Generate.model_fields["scheduler"].annotation)


def test_every_scheduler_of_the_profile_draws_images_of_its_own(pipeline_folder: Path) -> None:
    images, four = {}, dataclasses.replace(SAMPLING, steps=4)
    for name in SCHEDULERS:
        loaded = pipelines.load_pipeline(str(pipeline_folder), scheduler=name)
        assert name in {"default", type(loaded.scheduler).__name__}
        images[name] = pixels(diffusion.Sampler(loaded, sampling=four), JOBS[:1])[JOBS[0]]
    assert images.pop("default") == images["DDIMScheduler"]
    assert len(set(images.values())) >= 7  # orders of one solver agree on so small a denoiser
    with pytest.raises(UsageError, match=r"FlowMatchEuler.*DDIMScheduler\n.*'default' or one of: DDIM"):
        pipelines.load_pipeline(str(pipeline_folder), scheduler="FlowMatchEulerDiscreteScheduler")
    pndm = pipelines.load_pipeline(str(pipeline_folder), scheduler="PNDMScheduler")
    with pytest.raises(UsageError, match=r"PNDMScheduler cannot draw with steps = 3"):
        pixels(diffusion.Sampler(pndm, sampling=SAMPLING), JOBS[:1])


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"nobody/nothing.*OFFLINE.*\n.*hf download nobody/nothing --revision abc"):
        pipelines.load_pipeline("nobody/nothing", revision="abc")
    with pytest.raises(InputError, match=r"model_index\.json"):
        pipelines.load_pipeline(str(tmp_path))
    with pytest.raises(InputError, match="does not exist"):
        pipelines.load_pipeline("./nowhere")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "X"]}')
    with pytest.raises(InputError, match="not a complete diffusers pipeline"):
        pipelines.load_pipeline(str(tmp_path))
    with pytest.raises(UsageError, match="float16"):
        pipelines.load_pipeline(str(tmp_path), dtype="float16")


# -- the stage -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def captions_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve image records of two captions each, as COCO writes them."""
    file = tmp_path_factory.mktemp("captions") / "coco.json"
    nouns = ["cat", "dog", "cow", "hen", "fox", "owl", "bee", "ant", "elk", "emu", "yak", "ape"]
    content = {
        "images": [{"id": row, "file_name": f"{row}.jpg"} for row in range(12)],
        "annotations": [
            {"id": 100 + 2 * row + turn, "image_id": row, "caption": f"{article} {noun} in a field"}
            for row, noun in enumerate(nouns)
            for turn, article in enumerate(("a", "one"))
        ],
    }
    file.write_text(json.dumps(content))
    return file


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
            assert image.size == (record["width"], record["height"]) == (32, 32)
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
    "scheduler": "EulerDiscreteScheduler",
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
    assert plain not in contents.values()
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


# -- interruption ----------------------------------------------------------------------------------------------


PRELOADED = [
    "gmail_cli.stages.generate.drawing",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.schedulers.scheduling_ddim",
    "transformers.models.clip.modeling_clip",
]


def test_killed_again_and_again_a_run_ends_in_the_bytes_of_one_never_killed(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path
) -> None:
    profile = profile_for(pipeline_folder, captions_file, per_caption=3, steps=3)  # 72 images in 18 batches
    expected = generate.run(profile, Workspace(tmp_path / "whole"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder = Workspace(tmp_path / "killed").folder("generate") / f"{expected.digest[:12]}.partial"
    chance = random.Random(7)
    kills = 0
    for target in sorted(chance.sample(range(1, 66), 3)):
        child = context.Process(target=generate.run, args=(profile, Workspace(tmp_path / "killed")))
        child.start()
        while child.is_alive() and len(list(folder.rglob("images/*/*.png"))) < target:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.1)
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
    assert kills >= 2
    assert len(list(folder.rglob("images/*/*.png"))) > 50
    resumed = generate.run(profile, Workspace(tmp_path / "killed"))
    assert resumed.files == expected.files
    assert resumed.content == expected.content
    assert resumed.summary == expected.summary
    assert resumed.verify() == []


def test_ctrl_c_finishes_the_batch_and_the_next_run_goes_on_from_there(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path
) -> None:
    profile = profile_for(pipeline_folder, captions_file)
    expected = generate.run(profile, Workspace(tmp_path / "whole"))
    workspace = Workspace(tmp_path / "stopped")

    def stop(done: int, total: int) -> None:
        if done == 8:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        generate.run(profile, workspace, progress=stop)
    assert signal.getsignal(signal.SIGINT) is handler
    assert workspace.is_partial(generate.plan_key(profile))
    told: list[int] = []
    resumed = generate.run(profile, workspace, progress=lambda done, total: told.append(done))
    assert told[0] == 12 == told[1] - 4
    assert resumed.content == expected.content


@pytest.mark.parametrize("last", [3, 6, 11])  # the key, then four images and their log in turn
def test_a_full_disk_is_named_and_nothing_is_lost(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    profile = profile_for(pipeline_folder, captions_file, limit=6)
    expected = generate.run(profile, Workspace(tmp_path / "whole"))
    workspace, whole, calls = Workspace(tmp_path / "full"), os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > last:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(SetupError, match="the disk is full"):
            generate.run(profile, workspace)
    assert generate.run(profile, workspace).content == expected.content


def test_a_damaged_image_of_an_interrupted_run_is_made_again(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path
) -> None:
    profile = profile_for(pipeline_folder, captions_file)
    expected = generate.run(profile, Workspace(tmp_path / "whole"))
    workspace = Workspace(tmp_path / "stopped")

    def stop(done: int, total: int) -> None:
        if done >= 8:
            raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        generate.run(profile, workspace, progress=stop)
    partial = workspace.folder("generate") / f"{expected.digest[:12]}.partial"
    (partial / "images" / "000" / "102-0.png").write_bytes(b"torn")
    with (partial / "scratch" / "records" / "000000000.growing").open("ab") as stream:
        stream.write(b'{"key": "torn')
    assert generate.run(profile, workspace).files == expected.files


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


# -- parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_drawn_apart_end_in_the_bytes_of_one_process(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    monkeypatch.setattr(drawing, "SHARD", 8)
    profile = profile_for(pipeline_folder, captions_file, per_caption=2, scheduler="EulerAncestralDiscreteScheduler")
    expected = generate.run(profile, Workspace(tmp_path / "whole"))  # 48 images in 6 shards
    workspace = Workspace(tmp_path / "parts")
    found = [generate.run_part(profile, workspace, part=(part, parts)) for part in range(parts, 0, -1)]
    counts = [each.done for each in found[:-1] if isinstance(each, Waiting)]
    assert len(counts) == parts - 1, "only the last one finds every shard done"
    assert counts == sorted(set(counts))
    assert isinstance(found[-1], Artifact)
    assert found[-1].content == expected.content
    assert found[-1].verify() == []
    assert found[-1].summary == expected.summary
    again = generate.run_part(profile, workspace, part=(1, parts))
    assert isinstance(again, Artifact)


def test_a_run_without_part_finishes_what_parts_left_and_makes_lost_images_again(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "SHARD", 8)
    profile = profile_for(pipeline_folder, captions_file)  # 24 images in 3 shards
    expected = generate.run(profile, Workspace(tmp_path / "whole"))
    workspace = Workspace(tmp_path / "parts")
    told: list[tuple[int, int]] = []
    waiting = generate.run_part(profile, workspace, part=(2, 2), progress=lambda *at: told.append(at))
    assert waiting == Waiting(generate.plan_key(profile), 2, 3)
    assert told[-1] == (16, 16)
    lost = next(workspace.folder("generate").rglob("111-0.png"))
    lost.write_bytes(b"torn")
    assert generate.run(profile, workspace).content == expected.content


def test_shards_that_another_process_draws_are_left_to_it(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "SHARD", 8)
    profile, workspace = profile_for(pipeline_folder, captions_file), Workspace(tmp_path)
    with (
        workspace.open(generate.plan_key(profile), shared=True) as slot,
        slot.log("records/000000008").claim() as mine,
    ):
        assert mine
        waiting = generate.run_part(profile, workspace, part=(1, 1))
        assert isinstance(waiting, Waiting)
        assert waiting.done == 2
    assert isinstance(generate.run_part(profile, workspace, part=(1, 1)), Artifact)


@pytest.mark.parametrize("part", [(0, 2), (3, 2)])
def test_parts_that_do_not_exist_are_refused(part: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"part {part[0]} of 2"):
        generate.run_part(build({}), Workspace(tmp_path), part=part)


# -- scores and filters ----------------------------------------------------------------------------------------


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
    from gmail_cli.components import captions, embedding, encoders

    workspace, artifact = scored
    assert artifact.verify() == []
    drawn = generate.run(scored_profile(pipeline_folder, score=False), workspace)
    rows, plain = artifact.read_jsonl("records.jsonl"), drawn.read_jsonl("records.jsonl")
    new = {*quality.COLUMNS, "copy_of"}
    assert [{key: value for key, value in row.items() if key not in new} for row in rows] == plain
    assert generate.plan_key(scored_profile(pipeline_folder)).digest == artifact.digest
    clip = encoders.load_clip("tiny")
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
    assert [Path(name).name for name in system.ls(f"/{tmp_path.name}/cut", detail=False)] == ["00000.tar"]
    exporting.export(artifact, target, shard_images=5)
    assert system.exists(f"/{tmp_path.name}/cut/images.parquet")


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
    assert read["webdataset"] == read["tars"] == [[[32, 32], row["caption"], row["sha256"]] for row in rows]
    assert read["table"] == [row["clip_score"] for row in rows]


# -- estimates -------------------------------------------------------------------------------------------------


def test_an_estimate_is_drawn_from_batches_that_are_not_kept(
    tmp_path: Path, pipeline_folder: Path, captions_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    profile = profile_for(pipeline_folder, captions_file, per_caption=2)
    assert checking.estimate(profile) == {"images": 48, "captions": 24}
    told = checking.estimate(profile, batches=2)
    made = generate.run(profile, Workspace(tmp_path / "runs"))
    sizes = [row["bytes"] for row in made.read_jsonl("records.jsonl")]
    assert told["bytes_per_image"] == sum(sizes[:8]) // 8
    assert told["bytes"] == 48 * told["bytes_per_image"]
    assert told["seconds"] == pytest.approx(48 * told["seconds_per_image"])
    assert 0 < told["seconds_per_image"] < 60
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    imported = build({"generate": {"source": "import", "import_path": str(made.path)}})
    with pytest.raises(UsageError, match="imported images are not drawn"):
        checking.estimate(imported, batches=1)


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
    artifact = generate.run(profile_for(pipeline_folder, captions_file), Workspace(tmp_path))
    with pytest.raises(InputError, match=r"generate\.model = 'tiny' is not the pipeline that drew"):
        checking.regenerate(build({}), artifact, count=1)
    source = artifact.path / "images"
    imported = generate.run(
        build({"generate": {"source": "import", "import_path": str(source)}}), Workspace(tmp_path, "imported")
    )
    with pytest.raises(InputError, match="holds no images that `gmail generate` drew"):
        checking.regenerate(build({}), imported, count=1)
