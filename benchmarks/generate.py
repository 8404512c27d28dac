"""`gmail generate` beside the networks it runs and beside two loops over the same images.

    python benchmarks/generate.py [--model tiny] [--images 160] [--per-caption 5] [--steps 10] [--batch-size 8]
        [--dtype float32] [--format png] [--uncompiled]

Overhead is what the stage costs outside text encoder, denoiser and VAE: captions, noise, the sampler's arithmetic,
encoding, hashing and writing files, records and the manifest. The plain loop calls the same pipeline with one caption
at a time and saves a PNG. The hand-batched loop is the fastest that could be written with diffusers: each caption is
encoded once, batches are full, networks channels-last, one generator on the device makes all noise, files are encoded
and written on threads while the next batch is drawn. It records nothing, cannot be resumed, and an image depends on its
batch. On a CPU all are counted in CPU seconds of one thread of torch (encoding threads included), so that other work on
the machine does not enter; on a GPU in seconds. Loading the model is left out.
`compiled` is the stage with `generate.compile`, beside the hand-batched loop with denoiser and decoder compiled whole,
both once compiled; compiling is told apart, in seconds of wall time.

Speed needs no trained weights: benchmarks/full_size.py writes Stable Diffusion 2.1-base and SDXL at full size, to be
named by --model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from gmail_cli.artifacts import Workspace
from gmail_cli.components import diffusion, pipelines
from gmail_cli.profile import build
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import generate
from gmail_cli.stages.generate import drawing, planning

ON_GPU = torch.cuda.is_available()
NETWORKS = ("text_encoder", "unet", "transformer")


def now(cpu_clock: Callable[[], float]) -> float:
    if ON_GPU:
        torch.cuda.synchronize()
        return time.perf_counter()
    return cpu_clock()


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """``function`` that adds the time it takes to ``spent[name]``."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = now(time.thread_time)
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + now(time.thread_time) - start

    return wrapper


def instrument(pipeline: Any, spent: dict[str, float]) -> None:
    for name in NETWORKS:
        network = getattr(pipeline, name, None)
        if network is not None:
            network.forward = timed(network.forward, spent, name)
    pipeline.vae.decode = timed(pipeline.vae.decode, spent, "vae")


def stage_seconds(profile: Profile, root: Path, *, spent: dict[str, float]) -> tuple[float, int]:
    """Time of the stage without loading, and the images it made."""
    load = pipelines.load_pipeline
    loading = 0.0

    def loader(*args: Any, **kwargs: Any) -> Any:
        nonlocal loading
        start = now(time.process_time)
        pipeline = load(*args, **kwargs)
        instrument(pipeline, spent)
        loading = now(time.process_time) - start
        return pipeline

    pipelines.load_pipeline = loader
    try:
        start = now(time.process_time)
        artifact = generate.run(profile, Workspace(root))
        total = now(time.process_time) - start
    finally:
        pipelines.load_pipeline = load
    return total - loading, artifact.summary["images"]


def hand_seconds(profile: Profile, root: Path, *, compiled: bool) -> float:
    """Time of the hand-batched loop, of Stable Diffusion or SDXL, after a batch that is not counted."""
    settings, device = profile.generate, "cuda" if ON_GPU else "cpu"
    pipeline = pipelines.load_pipeline(settings.model, revision=settings.revision, dtype=settings.dtype, device=device)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    if compiled:
        pipeline.unet.compile()
        pipeline.vae.decoder.compile()
    plan, size = planning.plan(profile), settings.batch_size
    names = diffusion.ENCODED[type(pipeline).__name__]
    generator = torch.Generator(device).manual_seed(0)
    root.mkdir()

    def encoded(captions: list[str]) -> dict[str, list[torch.Tensor]]:
        with torch.no_grad():
            found = pipeline.encode_prompt(
                captions, device=device, num_images_per_prompt=1, do_classifier_free_guidance=settings.guidance > 1
            )
        return {name: list(each) for name, each in zip(names, found, strict=True) if each is not None}

    def draw(start: int, stop: int, pool: ThreadPoolExecutor) -> None:
        captions = list(dict.fromkeys(each.caption for each in plan[start:stop]))
        prompts: dict[str, dict[str, torch.Tensor]] = {}
        for first in range(0, len(captions), size):
            part = captions[first : first + size]
            rows = encoded(part)
            prompts |= {caption: {name: rows[name][row] for name in rows} for row, caption in enumerate(part)}
        waiting: list[Future[int]] = []
        for first in range(start, stop, size):
            batch = plan[first : first + size]
            given = {
                name: torch.stack([prompts[each.caption][name] for each in batch]) for name in prompts[captions[0]]
            }
            images = pipeline(
                **given,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                generator=generator,
                output_type="pt",
            ).images
            pixels = images.float().mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            for each in waiting:
                each.result()
            waiting = [pool.submit(save, *each) for each in zip(batch, pixels, strict=True)]
        for each in waiting:
            each.result()

    def save(planned: planning.Planned, pixels: Any) -> int:
        content = drawing.encode(pixels, extension=settings.format, quality=settings.quality)
        return (root / f"{planned.key}.{settings.format}").write_bytes(content)

    with ThreadPoolExecutor(max(1, profile.runtime.workers)) as pool:
        draw(0, size, pool)
        start = now(time.process_time)
        draw(0, len(plan), pool)
        return now(time.process_time) - start


def loop_seconds(profile: Profile, root: Path) -> float:
    """Time of one caption at a time, its image saved as PNG."""
    settings = profile.generate
    pipeline = pipelines.load_pipeline(
        settings.model, revision=settings.revision, dtype=settings.dtype, device="cuda" if ON_GPU else "cpu"
    )
    start = now(time.process_time)
    for planned in planning.plan(profile):
        image = pipeline(
            planned.caption,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=torch.Generator().manual_seed(planned.k),
        ).images[0]
        image.save(root / f"{planned.key}.png")
    return now(time.process_time) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--per-caption", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--format", default="png")
    parser.add_argument("--uncompiled", action="store_true", help="leave out what is compiled")
    options = parser.parse_args()
    if options.images % options.batch_size or options.images % options.per_caption:
        parser.error("--images must be a multiple of --batch-size and of --per-caption")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        captions = root / "captions.txt"
        told = range(options.images // options.per_caption)
        captions.write_text("\n".join(f"a red ball beside a blue house, picture {row}" for row in told))
        taken = ("model", "per_caption", "steps", "batch_size", "dtype", "format")
        chosen = {"guidance": 2.5, **{name: getattr(options, name) for name in taken}}

        def profile(**more: Any) -> Profile:
            return build({"data": {"train": str(captions)}, "generate": chosen | more})

        generate.run(profile(limit=1), Workspace(root / "warm"))
        spent: dict[str, float] = {}
        stage, images = stage_seconds(profile(), root / "stage", spent=spent)
        hand = hand_seconds(profile(), root / "hand", compiled=False)
        found: dict[str, Any] = {"stage": stage, "hand_batched": hand}
        if not options.uncompiled:
            first = time.perf_counter()
            another = profile(compile=True).model_copy(update={"seed": 1})
            stage_seconds(another, root / "compiling", spent={})  # and one set
            again = time.perf_counter()
            found["compiled"], _ = stage_seconds(profile(compile=True), root / "compiled", spent={})
            found["compiling"] = again - first - (time.perf_counter() - again)
            found["hand_batched_compiled"] = hand_seconds(profile(), root / "hand-compiled", compiled=True)
            found["compiled_over_stage"] = found["compiled"] / stage
            found["hand_compiled_over_compiled"] = found["hand_batched_compiled"] / found["compiled"]
        (root / "loop").mkdir()
        found["plain_loop"] = loop_seconds(profile(), root / "loop")
    networks = sum(spent.values())
    found |= {
        "overhead": stage / networks - 1,
        "hand_over_stage": hand / stage,
        "loop_over_stage": found["plain_loop"] / stage,
    }
    clock = "seconds on a GPU" if ON_GPU else "CPU seconds"
    shown = {name: round(seconds, 3) for name, seconds in spent.items()}
    rounded = {name: round(value, 3) for name, value in found.items()}
    print(json.dumps({"images": images, "clock": clock, "networks": shown, **rounded}, indent=1))


if __name__ == "__main__":
    main()
