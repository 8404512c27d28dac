"""`gmail generate` beside the networks it runs and beside a plain loop over the same images.

    python benchmarks/generate.py [--model tiny] [--images 160] [--per-caption 5] [--steps 10] [--batch-size 8]

Overhead is what the stage costs outside text encoder, denoiser and VAE: captions, noise, the sampler's arithmetic,
encoding, hashing and writing files, records and the manifest. The plain loop calls the same pipeline with one caption
at a time and saves a PNG. On a CPU both are counted in CPU seconds of one thread of torch (encoding threads included),
so that other work on the machine does not enter; on a GPU in seconds. Loading the model is left out of both.
`compiled` is the stage with `generate.compile`, once compiled; compiling is told apart, in seconds of wall time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gmail_cli.artifacts import Workspace
from gmail_cli.components import pipelines
from gmail_cli.profile import build
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import generate
from gmail_cli.stages.generate import planning

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
    options = parser.parse_args()
    torch.set_num_threads(1)
    count = options.images // options.per_caption
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        captions = root / "captions.txt"
        captions.write_text("\n".join(f"a red ball beside a blue house, picture {row}" for row in range(count)))
        chosen = {"model": options.model, "per_caption": options.per_caption, "steps": options.steps, "guidance": 2.5}
        profile = build({"data": {"train": str(captions)}, "generate": {**chosen, "batch_size": options.batch_size}})
        warm = build({"data": {"train": str(captions)}, "generate": {**chosen, "limit": 1}})
        generate.run(warm, Workspace(root / "warm"))
        spent: dict[str, float] = {}
        stage, images = stage_seconds(profile, root, spent=spent)
        chosen["compile"] = True
        compiled_profile = build(
            {"data": {"train": str(captions)}, "generate": {**chosen, "batch_size": options.batch_size}}
        )
        first = time.perf_counter()
        stage_seconds(compiled_profile.model_copy(update={"seed": 1}), root / "compiling", spent={})  # and one set
        again = time.perf_counter()
        compiled, _ = stage_seconds(compiled_profile, root / "compiled", spent={})
        compiling = again - first - (time.perf_counter() - again)
        (root / "loop").mkdir()
        loop = loop_seconds(profile, root / "loop")
    networks = sum(spent.values())
    print(
        json.dumps(
            {
                "images": images,
                "clock": "seconds on a GPU" if ON_GPU else "CPU seconds",
                "networks": {name: round(seconds, 3) for name, seconds in spent.items()},
                "stage": round(stage, 3),
                "overhead": round(stage / networks - 1, 4),
                "compiled": round(compiled, 3),
                "compiled_over_stage": round(compiled / stage, 3),
                "compiling_seconds": round(compiling, 1),
                "plain_loop": round(loop, 3),
                "ratio": round(loop / stage, 2),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
