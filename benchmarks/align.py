"""Alignment and captioner training against loops written by hand, and a sweep with and without kept features.

    python benchmarks/align.py                          ViT-S/32 at 224 pixels, batch 16
    python benchmarks/align.py --model tiny --batch 64  the shipped CLIP
    python benchmarks/align.py --only sweep

All in one process, one after another, in CPU seconds (but ``loading``): ratios hold on a busy machine too. The loops
get every advantage: their pixels are decoded and normalised before the clock starts.

- ``step``: a step of `gmail align` (Eq. 1, LoRA rank 4) against plain PyTorch with plain peft on cached targets, and
  against loops that run a second tower on the real images, without gradients (f_r embedded anew) and with them; and
  with `align.compile`, whose compiling (wall time; none where torch's cache has it) is not in the step.
- ``clipcap``: images a second of `gmail train`, start-up and the one embedding of each image included, against the same
  loop encoding the images again every time they are shown.
- ``sweep``: three lines over align.lora_rank, with features kept and with them deleted between the lines.
- ``loading``: steps of `gmail align` on JPEG files of 512 pixels that memory does not hold, decoded beside the steps:
  how much of the wall time a step waits for its images, and how long the same steps take when they are held. Idle cores
  wanted.
- ``cells``: `gmail train` in the second of two lines over align.lora_rank, all arms, with the first line's cells there
  and without.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gmail_cli import profile as profiles
from gmail_cli.artifacts import Artifact, StageKey, Workspace
from gmail_cli.components import captions, clip_files, embedding, tuning
from gmail_cli.components.arms import Arm, View
from gmail_cli.components.heads import Captioner, load_lm
from gmail_cli.components.images import GeneratedSet
from gmail_cli.components.loop import Recipe, fit
from gmail_cli.components.pairs import pair
from gmail_cli.components.pixels import Pixels
from gmail_cli.components.tasks import clipcap_job
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import align, train

SMALL = {
    "model_cfg": {
        "embed_dim": 384,
        "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 384, "layers": 12, "head_width": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {},
}
WARM = 10
"""Steps before the clock starts; a row of the loss curve, where progress is told."""


def make(workspace: Workspace, *, count: int, size: int = 64) -> Artifact:
    """A generate artifact: scenes in other colours, with noise; PNG files, JPEG files from 512 pixels on."""
    scenes = captions.read("scenes:train", limit=count)
    kind = ("PNG", {}) if size < 512 else ("JPEG", {"quality": 95})
    with workspace.open(StageKey(stage="generate", settings={"count": count, "size": size})) as slot:
        if slot.done:
            return slot.artifact
        rows = []
        for number, image in enumerate(scenes.images):
            caption = scenes.captions_of(image.id)[0]
            drawn = Image.open(io.BytesIO(scenes.image_bytes(number))).convert("RGB").resize((size, size))
            pixels = np.asarray(drawn, dtype=np.float64)
            noise = np.random.default_rng(number).normal(0, 6, pixels.shape)
            stream = io.BytesIO()
            shown = Image.fromarray((pixels * [0.6, 0.9, 1] + noise).clip(0, 255).astype(np.uint8))
            shown.save(stream, kind[0], **kind[1])
            path = f"images/000/{number:05d}.{kind[0].lower()}"
            slot.write_bytes(path, stream.getvalue())
            row = {"key": f"{number:05d}", "caption_id": caption.id, "caption": caption.text, "owner": image.id}
            about = {"label": None, "k": 0, "seed": number, "path": path, "width": size, "height": size}
            rows.append({**row, **about, "sha256": hashlib.sha256(stream.getvalue()).hexdigest()})
        slot.write_jsonl("records.jsonl", rows)
        return slot.commit(summary={})


def profile(clip: str, options: argparse.Namespace, **changes: Any) -> Profile:
    steps = {"steps": WARM + options.steps, "batch_size": options.batch, "validation": 0.0}
    return profiles.build(
        {
            "data": {"train": "scenes:train", "train_limit": options.images},
            "model": {"clip": clip},
            "align": {**steps, **changes},
            "train": {"tasks": ["clipcap"], "arms": ["real"], "steps": options.caption_steps, "batch_size": 64},
            "runtime": {"device": "cpu", "threads": options.threads, "checkpoint_seconds": 1e9},
        }
    )


def stage_step(given: Profile, root: Path, generated: Artifact) -> tuple[float, float]:
    """CPU seconds of a step of `gmail align`, and seconds from its start to the clock's."""
    at: dict[int, float] = {}
    began = time.perf_counter()
    waited = 0.0
    steps = given.align.steps

    def progress(done: int, total: int) -> None:
        nonlocal waited
        if total == steps:
            at[done] = time.process_time()
            waited = time.perf_counter() - began if done == WARM else waited

    align.run(given, Workspace(root, "stage"), generated=generated, progress=progress)
    return (at[steps] - at[WARM]) / (steps - WARM), waited


def loop_step(
    step: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], *, rows: int, batch: int, steps: int
) -> float:
    """CPU seconds of a step of a plain training loop."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    torch.manual_seed(0)
    for number in range(2 + steps):
        if number == 2:
            start = time.process_time()
        optimizer.zero_grad()
        step(torch.randperm(rows)[:batch]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return (time.process_time() - start) / steps


def step(options: argparse.Namespace, clip_ref: str, root: Path, generated: Artifact) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    given = profile(clip_ref, options)
    ours, start = stage_step(given, root, generated)
    compiled, compiled_start = stage_step(profile(clip_ref, options, compile=True), root, generated)
    clip = clip_files.load_clip(clip_ref)
    scenes, images = captions.read("scenes:train", limit=options.images), GeneratedSet.load(generated.path)
    every = np.arange(options.images)

    def read(image_bytes: Callable[[int], bytes]) -> Tensor:
        return Pixels(image_bytes, len(every), preprocess=clip.preprocess, device=clip.device)[every]

    real, drawn = read(scenes.image_bytes), read(images.image_bytes)
    targets = torch.cat([clip.encode_images(part) for part in real.split(64)]).clone()

    def tower() -> nn.Module:
        visual = clip_files.load_clip(clip_ref).model.visual
        config = LoraConfig(r=4, lora_alpha=8, target_modules=list(tuning.lora_targets(visual)))
        return get_peft_model(visual, config)

    def eq1(generated: Tensor, real: Tensor) -> Tensor:
        logits = nn.functional.normalize(generated, dim=-1) @ nn.functional.normalize(real, dim=-1).T / 0.07
        return nn.functional.cross_entropy(logits, torch.arange(len(logits)))

    def timed(loss: Callable[[nn.Module, Tensor], Tensor]) -> float:
        f_g = tower()
        trained = [parameter for parameter in f_g.parameters() if parameter.requires_grad]
        return loop_step(
            lambda rows: loss(f_g, rows), trained, rows=options.images, batch=options.batch, steps=options.steps
        )

    def frozen(f_g: nn.Module, rows: Tensor) -> Tensor:
        with torch.no_grad():
            partners = clip.model.visual(real[rows])
        return eq1(f_g(drawn[rows]), partners)

    by_hand = timed(lambda f_g, rows: eq1(f_g(drawn[rows]), targets[rows]))
    two_frozen = timed(frozen)
    two_trained = timed(lambda f_g, rows: eq1(f_g(drawn[rows]), f_g(real[rows])))
    return {
        "align_step": round(ours, 4),
        "compiled_step": round(compiled, 4),
        "compiled_over_align": round(compiled / ours, 3),
        "compiling_seconds": round(compiled_start - start, 1),
        "by_hand": round(by_hand, 4),
        "over_by_hand": round(ours / by_hand, 3),
        "two_towers_frozen": round(two_frozen, 4),
        "two_towers_frozen_over_align": round(two_frozen / ours, 2),
        "two_towers_trained": round(two_trained, 4),
        "two_towers_trained_over_align": round(two_trained / ours, 2),
    }


class Encoding(Arm):
    """An arm that encodes each image anew whenever it is shown."""

    encode: Callable[[Tensor], Tensor]

    def draw(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        images = self.views[0].candidates.draw(rows)
        return self.encode(images), torch.ones(len(rows), dtype=torch.bool)


def clipcap(options: argparse.Namespace, clip_ref: str, root: Path) -> dict[str, Any]:
    given = profile(clip_ref, options)
    steps, batch = given.train.steps, given.train.batch_size
    start = time.process_time()
    train.run(given, Workspace(root, "clipcap"))
    ours = steps * batch / (time.process_time() - start)

    clip, scenes = clip_files.load_clip(clip_ref), captions.read("scenes:train", limit=options.images)
    lm, tokenizer = load_lm("tiny")
    pairs = pair(scenes)
    captioner = Captioner(clip.dim, lm=lm, tokenizer=tokenizer, lm_name="tiny")
    assert pairs.real is not None
    arm = Encoding((View(torch.empty(0), pairs.real, True),))

    def encode(images: Tensor) -> Tensor:
        rows = images.tolist()
        return torch.from_numpy(embedding.embed_images(clip, lambda row: scenes.image_bytes(rows[row]), len(rows)))

    object.__setattr__(arm, "encode", encode)
    job = clipcap_job(captioner, pairs, arm, meeting=None, caption_tokens=given.train.caption_tokens)
    few = 4
    start = time.process_time()
    fit(job.module, loss=job.loss, rows=job.rows, recipe=Recipe(steps=few, batch_size=batch, lr=1e-4))
    theirs = few * batch / (time.process_time() - start)
    return {
        "times_each_image_is_shown": round(steps * batch / options.images, 1),
        "images_per_second": round(ours, 1),
        "encoding_every_time": round(theirs, 1),
        "ratio": round(ours / theirs, 2),
    }


def sweep(options: argparse.Namespace, clip_ref: str, root: Path, generated: Artifact) -> dict[str, Any]:
    """Three lines; what is measured is everything `gmail align` does in one process, without the start of Python."""
    seconds = {}
    align.run(
        profile(clip_ref, options, lora_rank=1), Workspace(root / "first", "sweep"), generated=generated
    )  # imports
    for kept in (True, False):
        spaces = [Workspace(root / f"kept-{kept}" / ("" if kept else str(rank)), "sweep") for rank in (2, 4, 6)]
        start = time.process_time()
        for rank, space in zip((2, 4, 6), spaces, strict=True):
            align.run(profile(clip_ref, options, lora_rank=rank), space, generated=generated)
        seconds[kept] = time.process_time() - start
    return {
        "kept": round(seconds[True], 2),
        "each_line_anew": round(seconds[False], 2),
        "saved": round(1 - seconds[True] / seconds[False], 3),
    }


def loading(options: argparse.Namespace, clip_ref: str, root: Path) -> dict[str, Any]:
    generated = make(Workspace(root, "large"), count=options.images, size=512)
    given = profile(clip_ref, options)
    get, limits = Pixels.__getitem__, Pixels.__init__.__kwdefaults__
    assert limits is not None
    usual = limits["in_memory"]
    found: dict[str, Any] = {}
    for name, in_memory in (("held", usual), ("decoded", 0)):
        at: dict[int, float] = {}
        waits: list[tuple[float, float]] = []

        def timed(pixels: Pixels, rows: np.ndarray, waits: list[tuple[float, float]] = waits) -> Tensor:
            began = time.perf_counter()
            values = get(pixels, rows)
            waits.append((began, time.perf_counter() - began))
            return values

        def progress(done: int, total: int, at: dict[int, float] = at) -> None:
            if total == given.align.steps:
                at[done] = time.perf_counter()

        limits["in_memory"], Pixels.__getitem__ = in_memory, timed  # type: ignore[method-assign]
        try:
            align.run(given, Workspace(root / name, "loading"), generated=generated, progress=progress)
        finally:
            limits["in_memory"], Pixels.__getitem__ = usual, get  # type: ignore[method-assign]
        seconds = at[given.align.steps] - at[WARM]
        waited = sum(wait for began, wait in waits if at[WARM] <= began < at[given.align.steps])
        found[name] = {
            "seconds_a_step": round(seconds / options.steps, 4),
            "share_waiting_for_images": round(waited / seconds, 4),
        }
    ratio = found["decoded"]["seconds_a_step"] / found["held"]["seconds_a_step"]
    return {**found, "decoded_over_held": round(ratio, 3)}


def cells(options: argparse.Namespace, clip_ref: str, root: Path, generated: Artifact) -> dict[str, Any]:
    """What is measured is everything `gmail train` does in one process; features are there in both cases."""

    def of(rank: int) -> Profile:
        made = profile(clip_ref, options, lora_rank=rank)
        section = made.train.model_copy(
            update={
                "tasks": ("clip-text", "clipcap"),
                "arms": ("none", "real", "generated-naive", "generated-aligned"),
                "batch_size": 48,
                "lr": 3e-4,
            }
        )
        return made.model_copy(update={"train": section})

    spaces = {name: Workspace(root / "cells", name) for name in ("first", "kept", "anew")}
    aligned = {rank: align.run(of(rank), spaces["first"], generated=generated) for rank in (2, 4)}
    for rank in (2, 4):  # features, and imports
        train.run(of(rank), spaces["first"], generated=generated, aligned=aligned[rank])
    train.run(of(2), spaces["kept"], generated=generated, aligned=aligned[2])
    seconds, made = {}, {}
    for name in ("kept", "anew"):
        start = time.process_time()
        made[name] = train.run(of(4), spaces[name], generated=generated, aligned=aligned[4])
        seconds[name] = time.process_time() - start
    assert made["kept"].files == made["anew"].files
    return {
        "second_line": round(seconds["kept"], 2),
        "second_line_anew": round(seconds["anew"], 2),
        "ratio": round(seconds["anew"] / seconds["kept"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="tiny or another model.clip; default: a random ViT-S/32")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--caption-steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["step", "clipcap", "sweep", "loading", "cells"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"clock": "CPU seconds", "model": options.model or "ViT-S/32, random weights"}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        clip_ref = options.model
        if not clip_ref:
            (root / "clip").mkdir()
            clip_files.save_clip(clip_files.build_clip(SMALL), root / "clip")
            clip_ref = str(root / "clip")
        generated = make(Workspace(root, "made"), count=options.images)
        if options.only in (None, "step"):
            found["step"] = step(options, clip_ref, root, generated)
        if options.only in (None, "clipcap"):
            found["clipcap"] = clipcap(options, clip_ref, root)
        if options.only in (None, "sweep"):
            found["sweep"] = sweep(options, clip_ref, root, generated)
        if options.only in (None, "loading"):
            found["loading"] = loading(options, clip_ref, root)
        if options.only in (None, "cells"):
            found["cells"] = cells(options, clip_ref, root, generated)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
