"""``gmail generate``: one image file and one record for every (caption, k).

Images are drawn from captions (``source = "pipeline"``) or brought in from elsewhere (``source = "import"``). Records
are appended in order, each after its image is on disk, so an interrupted run continues after its last whole record
and ends in the bytes of a run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmail_cli.artifacts import Artifact, Slot, StageKey, Workspace, digest_of, folder_digest
from gmail_cli.components import captions as reader
from gmail_cli.components import diffusion
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import Profile, settings
from gmail_cli.stages import sources

if TYPE_CHECKING:
    import numpy as np

    from gmail_cli.components.captions import Caption, Dataset, Image

RECORDS = "records.jsonl"
PER_FOLDER = 1000
"""Images in one folder."""
IMPORT_CHUNK = 64
"""Images brought in between two writes of their records."""
ACROSS_DEVICES = 2.0
"""Mean absolute difference of pixels, of 255, that another kind of device may make."""
_PIPELINE_ONLY = (
    *("per_caption", "dtype", "scheduler", "steps", "guidance", "prompt_template"),
    *("negative_prompt", "height", "width", "batch_size", "format", "quality"),
)
_BY_CONTENT = ("import_path", "model", "revision", "limit", "kinds", "captions_per_image")
"""Settings that enter a key through the content they choose: its inputs and models."""
_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}

Progress = Callable[[int, int], None]
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Planned:
    """One image to make: which caption it belongs to and what its file is called (without an extension)."""

    key: str
    stem: str
    caption_id: str
    caption: str
    owner: str
    label: str | None
    k: int


def plan_key(profile: Profile) -> StageKey:
    """What `run` would make, without loading a model; captions and images enter by content, not by path.

    Raises:
        InputError: Captions or images that are missing or corrupt.
        UsageError: A hub model without its revision.
    """
    dataset = _read(profile)
    return _key(profile, dataset, _planned(profile, dataset))


def plan(profile: Profile) -> list[Planned]:
    """The images `run` would make, in their order; raises what `plan_key` raises."""
    return _planned(profile, _read(profile))


def run(profile: Profile, workspace: Workspace, *, progress: Progress | None = None) -> Artifact:
    """Make (or find) the images that a profile asks for.

    ``gmail generate --captions coco.json --per-caption 5 --limit 20`` takes the first 20 image records of the file;
    each has 5 captions, each caption gets 5 images: 500 in all.

    Args:
        profile: What is read of it: ``generate``, ``data``, ``runtime`` and ``seed``.
        workspace: Where the artifact goes.
        progress: Called with (images done, images in all).

    Returns:
        The artifact: ``images/<000>/<key>.<ext>`` and ``records.jsonl`` with one object per image: key, caption_id,
        caption, owner, label, k, seed, attempt, sha256, path, width, height, truncated, generator.

    Raises:
        InputError: Captions or images that are missing or corrupt.
        SetupError: A model or device this machine lacks.
        UsageError: Settings that do not fit the model.
        KeyboardInterrupt: After Ctrl-C, when the batch in progress is on disk.
    """
    dataset = _read(profile)
    plan = _planned(profile, dataset)
    key = _key(profile, dataset, plan)
    with workspace.open(key) as slot:
        if slot.done:
            return slot.artifact
        start = _finished(slot, plan)
        if profile.generate.source == "import":
            about: Record = {}
            device = "cpu"
            chunks = _imported(slot, plan, dataset, name=key.settings["name"], start=start)
        else:
            sampler, device = _sampler(profile)
            about = _describe(sampler)
            chunks = _drawn(slot, plan, sampler, profile=profile, name=key.settings["name"], start=start)
        _store(slot, chunks, workers=profile.runtime.workers, start=start, total=len(plan), progress=progress)
        return slot.commit(summary=_summary(slot.read_jsonl(RECORDS), plan) | about, device=device)


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
    own = {name: value for name, value in key["settings"].items() if name not in ("name", "source")}
    profile = profile.model_copy(
        update={"generate": profile.generate.model_copy(update=own | {"source": "pipeline"}), "seed": key["seed"]}
    )
    place, folder = diffusion.locate(profile.generate.model)
    there = folder_digest(folder) if folder else f"{place}@{profile.generate.revision}"
    if there != key["models"]["generator"]:
        raise InputError(
            f"generate.model = {profile.generate.model!r} is not the pipeline that drew {artifact.path}",
            hint="Name it with --set generate.model=... (and generate.revision, of a hub model).",
        )
    records = artifact.read_jsonl(RECORDS)
    rows = sorted(secrets.SystemRandom().sample(range(len(records)), min(count, len(records))))
    template = profile.generate.prompt_template
    chosen = [records[row] for row in rows]
    jobs = [diffusion.Job(r["caption_id"], template.replace("{caption}", r["caption"]), r["k"]) for r in chosen]
    sampler, device = _sampler(profile)
    alike = device.split(":")[0] == str(artifact.manifest["device"]).split(":")[0]
    drawn = (each for batch in sampler.draw(jobs) for each in batch)
    problems = []
    for done, (record, image) in enumerate(zip(chosen, drawn, strict=True)):
        content = _encode(image.pixels, extension=profile.generate.format, quality=profile.generate.quality)
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


# -- what to make ----------------------------------------------------------------------------------------------


def _read(profile: Profile) -> Dataset:
    generate, data = profile.generate, profile.data
    if generate.source == "import":
        return reader.read(generate.import_path, limit=generate.limit or None, on_bad=data.on_bad, need_images=True)
    limit = min(filter(None, (generate.limit, data.train_limit)), default=None)
    return sources.read({**sources.source(profile, part="train"), "images": None, "limit": limit})


def _planned(profile: Profile, dataset: Dataset) -> list[Planned]:
    """Every image of the artifact, in its final order: by image record, caption, k."""
    generate = profile.generate
    plan: list[Planned] = []

    def add(key: str, caption: Caption | None, image: Image, k: int) -> None:
        stem = f"images/{len(plan) // PER_FOLDER:03d}/{key}"
        caption_id, text = (caption.id, caption.text) if caption else ("", "")
        plan.append(Planned(key, stem, caption_id, text, image.id, image.label, k))

    for image in dataset.images:
        suitable = [each for each in dataset.captions_of(image.id) if each.kind in generate.kinds]
        if generate.source == "import":
            add(file_key(image.id, 0), suitable[0] if suitable else None, image, 0)
            continue
        for caption in suitable[: generate.captions_per_image or None]:
            for k in range(generate.per_caption):
                add(file_key(caption.id, k), caption, image, k)
    if not plan:
        raise InputError(
            f"{dataset.name} has no {' or '.join(generate.kinds)} caption", hint="set generate.kinds to others"
        )
    assert len({planned.key for planned in plan}) == len(plan), "two images share a key"
    return plan


def file_key(identity: str, k: int) -> str:
    """A file name for image ``k`` of an id: the id where it is a plain, lower-case name, else made so, and a hash."""
    plain = re.sub(r"[^a-z0-9._-]", "_", identity.lower()).lstrip(".")[:80]
    if plain != identity:
        plain += "-" + hashlib.sha256(identity.encode()).hexdigest()[:12]
    return f"{plain}-{k}"


def _key(profile: Profile, dataset: Dataset, plan: list[Planned]) -> StageKey:
    generate = profile.generate
    chosen = {name: value for name, value in settings(generate).items() if name not in _BY_CONTENT}
    captions = [(each.caption_id, each.caption, each.owner, each.label, each.k) for each in plan]
    if generate.source == "import":
        for unused in _PIPELINE_ONLY:
            del chosen[unused]
        chosen["name"] = generate.name or "import"
        inputs = {"images": dataset.fingerprint, "captions": digest_of(captions)}
        return StageKey(stage="generate", settings=chosen, inputs=inputs)
    if generate.format == "png":
        del chosen["quality"]
    place, folder = diffusion.locate(generate.model)
    if folder is None and not generate.revision:
        raise UsageError(
            f"generate.model = {generate.model!r} is a hub id without generate.revision",
            hint="set generate.revision to a commit of the model's repository: the artifact then names its weights",
        )
    shown = generate.model if folder is None or generate.model == "tiny" else Path(place).resolve().name
    chosen["name"] = generate.name or shown
    return StageKey(
        stage="generate",
        settings=chosen,
        inputs={"captions": digest_of(captions)},
        models={"generator": folder_digest(folder) if folder else f"{place}@{generate.revision}"},
        seed=profile.seed,
    )


# -- making it -------------------------------------------------------------------------------------------------


def _sampler(profile: Profile) -> tuple[diffusion.Sampler, str]:
    """The loaded pipeline, and the device it is on, for the manifest."""
    import torch

    generate = profile.generate
    if profile.runtime.threads:
        torch.set_num_threads(profile.runtime.threads)
    device = profile.runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = diffusion.load_pipeline(
        generate.model,
        revision=generate.revision,
        scheduler=generate.scheduler,
        dtype=generate.dtype,
        device=device,
    )
    sampling = diffusion.Sampling(
        steps=generate.steps,
        guidance=generate.guidance,
        negative_prompt=generate.negative_prompt,
        height=generate.height,
        width=generate.width,
        batch_size=generate.batch_size,
        seed=profile.seed,
    )
    shown = f"cuda: {torch.cuda.get_device_name()}" if device == "cuda" else device
    return diffusion.Sampler(pipeline, sampling=sampling), shown


def _describe(sampler: diffusion.Sampler) -> Record:
    """What drew the images, as far as the settings do not say it."""
    return {
        "pipeline": type(sampler.pipeline).__name__,
        "scheduler": type(sampler.pipeline.scheduler).__name__,
        "encodings_reused": sampler.reuses_encodings,
    }


Task = Callable[[], Record]
"""Writes one image and returns its record; run on a worker thread."""


def _drawn(
    slot: Slot, plan: list[Planned], sampler: diffusion.Sampler, *, profile: Profile, name: str, start: int
) -> Iterator[list[Task]]:
    generate = profile.generate
    template = generate.prompt_template
    jobs = [diffusion.Job(each.caption_id, template.replace("{caption}", each.caption), each.k) for each in plan]

    def task(planned: Planned, drawn: diffusion.Drawn) -> Record:
        content = _encode(drawn.pixels, extension=generate.format, quality=generate.quality)
        made = {"seed": drawn.seed, "attempt": drawn.attempt, "truncated": drawn.truncated, "generator": name}
        height, width, _ = drawn.pixels.shape
        return _write(slot, planned, content, extension=generate.format, width=width, height=height) | made

    position = start
    for batch in sampler.draw(jobs, start=start):
        yield [_bind(task, plan[position + row], drawn) for row, drawn in enumerate(batch)]
        position += len(batch)


def _imported(slot: Slot, plan: list[Planned], dataset: Dataset, *, name: str, start: int) -> Iterator[list[Task]]:
    def task(row: int) -> Record:
        content = dataset.image_bytes(row)
        extension, width, height = _inspect(content, name=f"image {plan[row].owner!r}")
        made = {"seed": None, "attempt": 0, "truncated": False, "generator": name}
        return _write(slot, plan[row], content, extension=extension, width=width, height=height) | made

    for first in range(start, len(plan), IMPORT_CHUNK):
        yield [_bind(task, row) for row in range(first, min(first + IMPORT_CHUNK, len(plan)))]


def _bind(task: Callable[..., Record], *arguments: Any) -> Task:
    return lambda: task(*arguments)


def _write(slot: Slot, planned: Planned, content: bytes, *, extension: str, width: int, height: int) -> Record:
    path = f"{planned.stem}.{extension}"
    slot.write_bytes(path, content)
    return {
        "key": planned.key,
        "caption_id": planned.caption_id,
        "caption": planned.caption,
        "owner": planned.owner,
        "label": planned.label,
        "k": planned.k,
        "sha256": hashlib.sha256(content).hexdigest(),
        "path": path,
        "width": width,
        "height": height,
    }


def _finished(slot: Slot, plan: list[Planned]) -> int:
    """How many images an interrupted run has finished: the longest prefix of the plan with record and file."""
    records = slot.read_jsonl(RECORDS)
    count = 0
    for planned, record in zip(plan, records, strict=False):
        if record["key"] != planned.key or not slot.has(record["path"]):
            break
        count += 1
    if count < len(records):
        slot.keep_rows(RECORDS, count)
    return count


def _store(
    slot: Slot,
    chunks: Iterable[list[Task]],
    *,
    workers: int,
    start: int,
    total: int,
    progress: Progress | None,
) -> None:
    """Run tasks on worker threads while the next chunk is being drawn; append the records of each chunk in order."""
    done = start
    waiting: list[Future[Record]] = []

    def flush() -> None:
        nonlocal done
        slot.append_jsonl(RECORDS, [future.result() for future in waiting])
        done += len(waiting)
        if progress:
            progress(done, total)

    with _deferred_interrupt() as interrupted, ThreadPoolExecutor(max(1, workers)) as pool:
        for chunk in chunks:
            running = [pool.submit(task) for task in chunk]
            flush()
            waiting = running
            if interrupted():
                break
        flush()
        if interrupted():
            raise KeyboardInterrupt


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold the first Ctrl-C until it is asked for; the second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def handler(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handler)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _summary(records: list[Record], plan: list[Planned]) -> Record:
    count = len(records)
    return {
        "images": count,
        "captions": len({planned.caption_id for planned in plan}),
        "owners": len({planned.owner for planned in plan}),
        "truncated_share": sum(record["truncated"] for record in records) / count,
        "redrawn": sum(record["attempt"] > 0 for record in records),
        "generator": records[0]["generator"],
    }


# -- image files -----------------------------------------------------------------------------------------------


def _encode(pixels: np.ndarray, *, extension: str, quality: int) -> bytes:
    import PIL.Image

    stream = io.BytesIO()
    options = {} if extension == "png" else {"quality": quality}
    PIL.Image.fromarray(pixels).save(stream, format={"jpg": "JPEG"}.get(extension, extension.upper()), **options)
    return stream.getvalue()


def _inspect(content: bytes, *, name: str) -> tuple[str, int, int]:
    """Extension, width and height (upright) of an encoded image that can be decoded."""
    import PIL.Image

    from gmail_cli.components import images

    upright = images.decode(content, name=name)
    with PIL.Image.open(io.BytesIO(content)) as image:
        kind = str(image.format)
    if kind not in _EXTENSIONS:
        raise InputError(f"{name} is a {kind} image", hint=f"Import {', '.join(_EXTENSIONS)}.")
    return _EXTENSIONS[kind], upright.width, upright.height
