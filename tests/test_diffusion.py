"""Sampling: an image is a function of its job alone; what is drawn again, what cannot be drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from gmail_cli.components import diffusion, pipelines
from gmail_cli.errors import InputError, SetupError, UsageError
from gmail_cli.profile.generation import Generate

# some of diffusers' schedulers ask numpy for copies in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


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
