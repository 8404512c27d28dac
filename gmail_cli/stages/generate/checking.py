"""Drawing without making an artifact: what a set would cost, and whether images come out as recorded."""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import replace
from typing import NamedTuple

from gmail_cli.artifacts import Artifact, Workspace, file_sha256, folder_digest
from gmail_cli.components import diffusion, pipelines
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile.generation import Generate
from gmail_cli.profile.schema import Profile
from gmail_cli.stages.generate.drawing import Progress, Work, encode, load_sampler
from gmail_cli.stages.generate.mixing import Mixture
from gmail_cli.stages.generate.planning import (
    AFTERWARDS,
    RECORDS,
    Record,
    drawn_by,
    generators,
    prompt,
    read,
    templates_of,
)

ACROSS_DEVICES = 2.0
"""Mean absolute difference of pixels, of 255, that another kind of device may make."""


def estimate(profile: Profile, workspace: Workspace, *, batches: int = 0) -> Record:
    """What `run` would make, and what it would cost.

    Args:
        profile: As for `run`.
        workspace: Where images of finished sets are that `run` would take over.
        batches: How many to draw now, after one that is not counted, to tell time and disk from; nothing is written.

    Returns:
        images, captions, reused, how many of the images are there already, with ``generate.rewrite`` also prompts, how
        many are to be written; with ``batches`` also seconds_per_prompt, seconds_per_image, seconds, bytes_per_image
        and bytes, and where ``generate.batch_size`` does not fit the memory, ``batch_size``: name of a generator -> a
        size that fits.

    Raises:
        UsageError: Imported images are not drawn.
    """
    mixture = Mixture(profile) if profile.generate.mix else None
    works = list(mixture.works.values()) if mixture else [Work(profile)]
    plan = mixture.plan if mixture else works[0].plan
    there = {each.key.digest: each.at_hand(workspace) for each in works}
    told: Record = {"images": len(plan), "captions": plan.captions, "reused": sum(there.values())}
    prompts = [work.prompts for work in works if work.prompts is not None]
    if prompts:
        told["prompts"] = sum(each.count for each in prompts)
    if not batches:
        return told
    if profile.generate.source == "import":
        raise UsageError("--warm-up: imported images are not drawn", hint="Leave --warm-up out.")
    writing = sum(each.seconds_each(batches) * each.count for each in prompts)
    seconds = size = 0.0
    smaller: dict[str, int] = {}
    for work in works:
        cost = _cost(work, batches)
        seconds += cost.seconds * (len(work.plan) - there[work.key.digest])
        size += cost.bytes * len(work.plan)
        if cost.batch_size < work.profile.generate.batch_size:
            smaller[work.key.settings["name"]] = cost.batch_size
        work.unload()
    return told | {
        **({"seconds_per_prompt": writing / told["prompts"]} if prompts else {}),
        "seconds_per_image": seconds / len(plan),
        "seconds": seconds + writing,
        "bytes_per_image": int(size / len(plan)),
        "bytes": int(size),
        **({"batch_size": smaller} if smaller else {}),
    }


class _Cost(NamedTuple):
    """Of an image: seconds and bytes; and in batches of which size."""

    seconds: float
    bytes: int
    batch_size: int


def _cost(work: Work, batches: int) -> _Cost:
    """What an image of one generator costs, from a few batches, halved until they fit the memory."""
    generate, sampler = work.profile.generate, work.sampler()

    def draw(count: int) -> list[int]:
        """Bytes of each image of so many batches."""
        drawn = (each for batch in sampler.draw(work.jobs, stop=count * sampler.sampling.batch_size) for each in batch)
        return [len(encode(each.pixels, extension=generate.format, quality=generate.quality)) for each in drawn]

    while True:
        size = sampler.sampling.batch_size
        try:
            draw(1)  # it also sets things up
            started = time.perf_counter()
            written = draw(min(batches, -(-len(work.plan) // size)))
        except diffusion.BatchTooLargeError:
            if size == 1:
                raise
            sampler.sampling = replace(sampler.sampling, batch_size=size // 2)
        else:
            return _Cost((time.perf_counter() - started) / len(written), sum(written) // len(written), size)


def regenerate(profile: Profile, artifact: Artifact, *, count: int, progress: Progress | None = None) -> list[str]:
    """Draw ``count`` images of an artifact again, chosen at random, and compare.

    On the kind of device that drew them the files must be equal byte for byte; across kinds (GPU and CPU) the mean
    absolute difference of the pixels may reach ``ACROSS_DEVICES``.

    Args:
        profile: ``runtime`` says where to draw, ``data.train`` the images that others began with. The settings are the
            artifact's own, as are the weights where they still lie, or can be had from the hub; those that moved are
            looked for at ``generate.model`` and ``generate.lora``.
        artifact: What `run` made with ``source = "pipeline"``.
        count: How many; no more than there are.
        progress: Called with (images drawn, images to draw).

    Returns:
        What differs, a sentence for each image; empty when all is as recorded.

    Raises:
        InputError: Imported images, another artifact, one of another version, or weights that are not found.
    """
    import secrets

    if artifact.stage != "generate" or artifact.manifest["key"]["settings"]["source"] != "pipeline":
        raise InputError(
            f"{artifact.path} holds no images that `gmail generate` drew", hint="Imported images cannot be drawn again."
        )
    artifact.require_version()
    key = artifact.manifest["key"]
    records = artifact.read_jsonl(RECORDS)
    rows = sorted(secrets.SystemRandom().sample(range(len(records)), min(count, len(records))))
    parts = drawn_by(key["settings"], key["models"])
    problems: dict[int, str] = {}
    done = 0
    for name, (own, models) in parts.items():
        chosen = [row for row in rows if len(parts) == 1 or records[row]["generator"] == name]
        if not chosen:
            continue
        again = _as_drawn(profile, artifact, name=name, own=own, models=models, seed=key["seed"])
        templates = templates_of(again.generate)
        jobs = []
        for record in (records[row] for row in chosen):
            told = prompt(
                templates,
                record["caption"],
                label=record["label"],
                k=record["k"],
                written=record.get("rewritten"),  # as it was written then
            )
            jobs.append(diffusion.Job(record["caption_id"], told, record["k"], record["owner"]))
        sampler, device = load_sampler(again, dataset=read(again) if again.generate.strength else None)
        alike = device.split(":")[0] == str(artifact.manifest["device"]).split(":")[0]
        drawn = (each for batch in sampler.draw(jobs) for each in batch)
        for row, image in zip(chosen, drawn, strict=True):
            record = records[row]
            content = encode(image.pixels, extension=again.generate.format, quality=again.generate.quality)
            if hashlib.sha256(content).hexdigest() != record["sha256"]:
                problem = _difference(image, record, artifact, tolerated=0.0 if alike else ACROSS_DEVICES)
                problems |= {row: f"{record['path']}: drawn again, {problem}"} if problem else {}
            done += 1
            if progress:
                progress(done, len(rows))
    return [problems[row] for row in sorted(problems)]


def _as_drawn(profile: Profile, artifact: Artifact, *, name: str, own: Record, models: Record, seed: int) -> Profile:
    """The profile that draws as one generator of an artifact did; of ``profile`` the data and the runtime stay.

    Raises:
        InputError: Its weights are neither where they were nor where ``profile`` says.
    """
    given = generators(profile.generate).get(name, profile.generate)
    kept = {name: value for name, value in own.items() if name not in ("name", "share", "rewrite", *AFTERWARDS)}
    unsaid = {"rewrite": {}, "strength": 0.0, "prompt_windows": 1, "compile": False, "keep_best": 0, "import_path": ""}
    unsaid |= {"timestep_spacing": "default", "mix": (), "model": "tiny", "revision": "", "lora": ""}
    weights = _weights(given, artifact, name=name, models=models)
    drawing = Generate.model_validate({**given.model_dump(), **unsaid, **kept, **weights})
    return profile.model_copy(update={"generate": drawing, "seed": seed})


def _weights(given: Generate, artifact: Artifact, *, name: str, models: Record) -> Record:
    """``model``, ``revision`` and ``lora`` of what drew: a hub model is named by its digest, files are looked for."""
    said = artifact.summary.get("weights", {})
    hub, at, revision = models["generator"].rpartition("@")
    found: Record = {"model": hub, "revision": revision} if at else {}
    for kind, key, digest_of, what in (
        ("generator", "model", _pipeline_digest, "pipeline"),
        ("lora", "lora", _lora_digest, "LoRA"),
    ):
        if kind not in models or key in found:
            continue
        named, was = getattr(given, key), said.get(kind) or said.get(f"{name}/{kind}", "")
        found[key] = next((each for each in dict.fromkeys((named, was)) if digest_of(each) == models[kind]), None)
        if found[key] is None:
            nor = f", nor is {was!r}" if was and was != named else ""
            raise InputError(
                f"generate.{key} = {named!r} is not the {what} that drew {artifact.path}{nor}",
                hint=f"Say where it is now with --set generate.{key}=PATH.",
            )
    return found


def _pipeline_digest(model: str) -> str | None:
    with contextlib.suppress(InputError):
        _, folder = pipelines.locate(model)
        return folder_digest(folder) if folder else None
    return None


def _lora_digest(file: str) -> str | None:
    with contextlib.suppress(InputError):
        return file_sha256(pipelines.locate_lora(file))
    return None


def _difference(drawn: diffusion.Drawn, record: Record, artifact: Artifact, *, tolerated: float) -> str | None:
    """How an image drawn again differs from the stored one; None where its pixels are close enough."""
    import numpy as np

    from gmail_cli.components import images

    stored = np.asarray(images.decode(artifact.file(record["path"]).read_bytes(), name=record["path"]))
    if stored.shape != drawn.pixels.shape:
        return f"pixels of shape {drawn.pixels.shape} instead of {stored.shape}"
    apart = float(np.abs(stored.astype(np.int16) - drawn.pixels).mean())
    return f"pixels differ by {apart:.3g} of 255 on average" if apart > tolerated or not tolerated else None
