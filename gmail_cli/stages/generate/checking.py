"""Drawing without making an artifact: what a set would cost, and whether images come out as recorded."""

from __future__ import annotations

import hashlib

from gmail_cli.artifacts import Artifact
from gmail_cli.components import diffusion
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import Profile
from gmail_cli.stages.generate.drawing import RECORDS, Progress, Work, encode, load_sampler
from gmail_cli.stages.generate.planning import AFTERWARDS, Record, models_of, prompt

ACROSS_DEVICES = 2.0
"""Mean absolute difference of pixels, of 255, that another kind of device may make."""


def estimate(profile: Profile, *, batches: int = 0) -> Record:
    """What `run` would make, and what it would cost.

    Args:
        profile: As for `run`.
        batches: How many to draw now, after one that is not counted, to tell time and disk from; nothing is written.

    Returns:
        images, captions; with ``batches`` also seconds_per_image, seconds, bytes_per_image and bytes.

    Raises:
        UsageError: Imported images are not drawn.
    """
    import time

    work = Work(profile)
    told: Record = {"images": len(work.plan), "captions": work.plan.captions}
    if not batches:
        return told
    if profile.generate.source == "import":
        raise UsageError("--warm-up: imported images are not drawn", hint="Leave --warm-up out.")
    generate, sampler = profile.generate, work.sampler()

    def draw(count: int) -> list[int]:
        """Bytes of each image of so many batches."""
        drawn = (each for batch in sampler.draw(work.jobs, stop=count * generate.batch_size) for each in batch)
        return [len(encode(each.pixels, extension=generate.format, quality=generate.quality)) for each in drawn]

    draw(1)  # it also sets things up
    started = time.perf_counter()
    written = draw(min(batches, -(-len(work.plan) // generate.batch_size)))
    seconds = (time.perf_counter() - started) / len(written)
    size = sum(written) // len(written)
    return told | {
        "seconds_per_image": seconds,
        "seconds": seconds * len(work.plan),
        "bytes_per_image": size,
        "bytes": size * len(work.plan),
    }


def regenerate(profile: Profile, artifact: Artifact, *, count: int, progress: Progress | None = None) -> list[str]:
    """Draw ``count`` images of an artifact again, chosen at random, and compare.

    On the kind of device that drew them the files must be equal byte for byte; across kinds (GPU and CPU) the mean
    absolute difference of the pixels may reach ``ACROSS_DEVICES``.

    Args:
        profile: ``generate.model`` and ``generate.revision`` name the pipeline, ``runtime`` says where to draw; the
            other settings are the artifact's own.
        artifact: What `run` made with ``source = "pipeline"``.
        count: How many; no more than there are.
        progress: Called with (images drawn, images to draw).

    Returns:
        What differs, a sentence for each image; empty when all is as recorded.

    Raises:
        InputError: Imported images, another artifact, one of another version, or a pipeline that is not the one that
            drew it.
    """
    import secrets

    if artifact.stage != "generate" or artifact.manifest["key"]["settings"]["source"] != "pipeline":
        raise InputError(
            f"{artifact.path} holds no images that `gmail generate` drew", hint="Imported images cannot be drawn again."
        )
    artifact.require_version()
    key = artifact.manifest["key"]
    own = {name: value for name, value in key["settings"].items() if name not in ("name", "source", *AFTERWARDS)}
    profile = profile.model_copy(
        update={"generate": profile.generate.model_copy(update=own | {"source": "pipeline"}), "seed": key["seed"]}
    )
    there = models_of(profile.generate)
    for name, setting, what in (("generator", "model", "pipeline"), ("lora", "lora", "LoRA")):
        if there.get(name) != key["models"].get(name):
            given = getattr(profile.generate, setting)
            raise InputError(
                f"generate.{setting} = {given!r} is not the {what} that drew {artifact.path}",
                hint=f"Name it with --set generate.{setting}=... (and generate.revision, of a hub model).",
            )
    records = artifact.read_jsonl(RECORDS)
    rows = sorted(secrets.SystemRandom().sample(range(len(records)), min(count, len(records))))
    template = profile.generate.prompt_template
    chosen = [records[row] for row in rows]
    jobs = [diffusion.Job(r["caption_id"], prompt(template, r["caption"], r["label"]), r["k"]) for r in chosen]
    sampler, device = load_sampler(profile)
    alike = device.split(":")[0] == str(artifact.manifest["device"]).split(":")[0]
    drawn = (each for batch in sampler.draw(jobs) for each in batch)
    problems = []
    for done, (record, image) in enumerate(zip(chosen, drawn, strict=True)):
        content = encode(image.pixels, extension=profile.generate.format, quality=profile.generate.quality)
        if hashlib.sha256(content).hexdigest() != record["sha256"]:
            problem = _difference(image, record, artifact, tolerated=0.0 if alike else ACROSS_DEVICES)
            problems += [f"{record['path']}: drawn again, {problem}"] if problem else []
        if progress:
            progress(done + 1, len(rows))
    return problems


def _difference(drawn: diffusion.Drawn, record: Record, artifact: Artifact, *, tolerated: float) -> str | None:
    """How an image drawn again differs from the stored one; None where its pixels are close enough."""
    import numpy as np

    from gmail_cli.components import images

    stored = np.asarray(images.decode(artifact.file(record["path"]).read_bytes(), name=record["path"]))
    if stored.shape != drawn.pixels.shape:
        return f"pixels of shape {drawn.pixels.shape} instead of {stored.shape}"
    apart = float(np.abs(stored.astype(np.int16) - drawn.pixels).mean())
    return f"pixels differ by {apart:.3g} of 255 on average" if apart > tolerated or not tolerated else None
