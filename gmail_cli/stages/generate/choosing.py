"""What is done with images that are there: scores, and which to keep, each an artifact of its own with a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gmail_cli.artifacts import Artifact, Slot, StageKey, Workspace, canonical_json, folder_digest
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile.generation import Generate
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import features, sources
from gmail_cli.stages.generate.drawing import Progress
from gmail_cli.stages.generate.planning import RECORDS, Record, limit_of
from gmail_cli.stages.generate.writing import counted

if TYPE_CHECKING:
    import numpy as np
    import torch

    from gmail_cli.components.captions import Dataset
    from gmail_cli.components.encoders import Clip
    from gmail_cli.components.safety import SafetyChecker

REJECTED = "rejected.jsonl"
REPORT = "report.html"
SCORES = 3
"""Version of the scores and their report: raised when they say something else of the same images."""


def filtered(generate: Generate) -> bool:
    return generate.min_clip_score > 0 or generate.keep_best > 0 or generate.max_unsafe < 1


def scored(generate: Generate) -> bool:
    return generate.score or filtered(generate) or bool(generate.safety_checker)


def afterwards(profile: Profile, workspace: Workspace, made: Artifact, *, progress: Progress | None) -> Artifact:
    """Score and choose among the images of an artifact, as far as the profile asks for it."""
    if scored(profile.generate):
        made = _score(profile, workspace, made, progress=progress)
    return _choose(profile, workspace, made) if filtered(profile.generate) else made


def scored_key(profile: Profile, drawn: StageKey) -> StageKey:
    from gmail_cli.components.clip_files import model_digest

    clip = model_digest(profile.model.clip, revision=profile.model.revision, seed=profile.seed)
    inputs = {**drawn.inputs, "drawn": drawn.digest}
    real = partners(profile)
    if real is not None:
        inputs["partners"] = real.fingerprint
    settings, models = {**drawn.settings, "score": SCORES}, {**drawn.models, "clip": clip}
    generate = profile.generate
    if generate.safety_checker:
        settings["unsafe_label"] = generate.unsafe_label
        models["safety_checker"] = _checker_digest(generate)
    return replace(drawn, settings=settings, inputs=inputs, models=models)


def checker_of(generate: Generate, *, device: str | torch.device = "cpu") -> SafetyChecker:
    """The safety checker, loaded; raises what `safety.load_checker` raises, and as `scored_key`."""
    from gmail_cli.components import safety

    _checker_digest(generate)
    return safety.load_checker(
        generate.safety_checker, revision=generate.safety_revision, label=generate.unsafe_label, device=device
    )


def _checker_digest(generate: Generate) -> str:
    """Which weights say what is unsafe.

    Raises:
        InputError: No such folder.
        UsageError: A hub id without its revision.
    """
    from gmail_cli.components import safety

    folder = safety.locate(generate.safety_checker)
    if folder is not None:
        return folder_digest(folder, suffixes=(".json", ".safetensors"))
    if not generate.safety_revision:
        raise UsageError(
            f"generate.safety_checker = {generate.safety_checker!r} is a hub id without generate.safety_revision",
            hint="set generate.safety_revision to a commit of the model's repository",
        )
    return f"{generate.safety_checker}@{generate.safety_revision}"


def chosen_key(profile: Profile, scored: StageKey) -> StageKey:
    generate = profile.generate
    chosen = {"min_clip_score": generate.min_clip_score, "keep_best": generate.keep_best}
    if generate.max_unsafe < 1:
        chosen["max_unsafe"] = generate.max_unsafe
    return replace(scored, settings={**scored.settings, **chosen}, inputs={**scored.inputs, "scored": scored.digest})


def _key_in(artifact: Artifact) -> StageKey:
    return StageKey(**{name: value for name, value in artifact.manifest["key"].items() if name != "version"})


def partners(profile: Profile) -> Dataset | None:
    """The real images that drawn captions describe, where they are at hand."""
    if profile.generate.source == "import":
        return None
    dataset = sources.read({**sources.source(profile, part="train"), "limit": limit_of(profile)})
    return dataset if dataset.has_images else None


def _score(profile: Profile, workspace: Workspace, drawn: Artifact, *, progress: Progress | None) -> Artifact:
    from gmail_cli.components import clip_files, encoders, quality
    from gmail_cli.components.images import GeneratedSet

    with workspace.open(scored_key(profile, _key_in(drawn))) as slot:
        if slot.done:
            return slot.artifact
        images = GeneratedSet.load(drawn.path)
        captions = [each.caption for each in images.rows]
        if not all(captions):
            bare = next(each for each in images.rows if not each.caption)
            hint = "Set generate.score = false and name no generate.safety_checker."
            raise InputError(f"image {bare.key!r} has no caption to score it by", hint=hint)
        device = encoders.pick_device(profile.runtime.device)
        parts = quality.chunks([f"{each.caption_id} {each.caption}" for each in images.rows])
        clip: Clip | None = None
        checker: SafetyChecker | None = None
        generate, workers = profile.generate, profile.runtime.workers
        real = partners(profile)
        held: quality.RealImages | None = None
        for part in parts:
            log = slot.log(f"scores/{part.start:09d}")
            with log.claim() as mine:
                if mine:
                    clip = clip or clip_files.load_clip(
                        profile.model.clip, revision=profile.model.revision, device=device, seed=profile.seed
                    )
                    if real is not None and held is None:
                        row_of = {image.id: row for row, image in enumerate(real.images)}
                        held = quality.RealImages(
                            [image.id for image in real.images],
                            _embedded(profile, workspace, slot, clip, real),
                            [row_of[each.owner] for each in images.rows],
                        )
                    content = images.image_bytes
                    found = quality.score(
                        clip, part, image_bytes=content, captions=captions, real=held, workers=workers
                    )
                    if generate.safety_checker:
                        checker = checker or checker_of(generate, device=device)
                        unsafe = checker.score(content, part, workers=workers)
                        found = [row | {"unsafe": value} for row, value in zip(found, unsafe, strict=True)]
                    log.keep(0)
                    log.append(found)
                    log.complete()
            if progress:
                progress(part.stop, len(images))
        scores = [row for part in parts for row in slot.log(f"scores/{part.start:09d}").read()]
        rows = [record | row for record, row in zip(drawn.read_jsonl(RECORDS), scores, strict=True)]
        adopt_all(slot, drawn, rows)
        slot.write_jsonl(RECORDS, rows)
        told = {
            name: quality.summarise(values)
            for name in (*quality.COLUMNS, "unsafe")
            if (values := [row[name] for row in rows if row.get(name) is not None])
        }
        summary = {name: value for name, value in drawn.summary.items() if name != "reused"} | told
        slot.write_text(REPORT, _report(slot.key, drawn, summary, rows, rejected=(), real=real))
        return slot.commit(summary=summary, device=encoders.describe_device(device))


def _embedded(profile: Profile, workspace: Workspace, slot: Slot, clip: Clip, real: Dataset) -> np.ndarray:
    """Every real image through f_r, kept for whoever asks next."""
    from gmail_cli.components import embedding, encoders

    identities = tuple(str(each) for each in real.image_identities)
    wanted = features.Features(
        images=identities, what="real images", encoder=profile.model.clip, encoder_digest=clip.digest
    )

    def embed(start: int, stop: int) -> np.ndarray:
        return embedding.embed_images(
            clip, lambda row: real.image_bytes(start + row), stop - start, workers=profile.runtime.workers
        )

    return features.load(wanted, workspace, slot, embed=embed, device=encoders.describe_device(clip.device))


def _choose(profile: Profile, workspace: Workspace, scored: Artifact) -> Artifact:
    from gmail_cli.components import quality

    generate = profile.generate
    with workspace.open(chosen_key(profile, _key_in(scored))) as slot:
        if slot.done:
            return slot.artifact
        rows = scored.read_jsonl(RECORDS)
        reasons = quality.choose(
            rows, minimum=generate.min_clip_score, best=generate.keep_best, most_unsafe=generate.max_unsafe
        )
        kept = [row for row, reason in zip(rows, reasons, strict=True) if not reason]
        rejected = [row | {"reason": reason} for row, reason in zip(rows, reasons, strict=True) if reason]
        adopt_all(slot, scored, kept)
        slot.write_jsonl(RECORDS, kept)
        slot.write_jsonl(REJECTED, rejected)
        captions = {row["caption_id"] for row in kept}
        summary = {
            **scored.summary,
            "images": len(kept),
            "captions": len(captions),
            "owners": len({row["owner"] for row in kept}),
            "truncated_share": sum(row["truncated"] for row in kept) / len(kept),
            "redrawn": sum(row["attempt"] > 0 for row in kept),
            **counted(kept),
            "clip_score": quality.summarise([row["clip_score"] for row in kept]),
            **({"unsafe": quality.summarise([row["unsafe"] for row in kept])} if generate.safety_checker else {}),
            "rejected": len(rejected),
            "captions_without_image": len({row["caption_id"] for row in rejected} - captions),
        }
        page = _report(slot.key, scored, summary, kept, rejected=rejected, real=partners(profile))
        slot.write_text(REPORT, page)
        return slot.commit(summary=summary, device=scored.manifest["device"])


def _report(
    key: StageKey,
    origin: Artifact,
    summary: Mapping[str, Any],
    rows: Sequence[Record],
    *,
    rejected: Sequence[Record],
    real: Dataset | None,
) -> str:
    """The page on a set, with images from the artifact it was made of."""
    from gmail_cli.components import report

    places = {image.id: row for row, image in enumerate(real.images)} if real else {}

    def real_bytes(owner: str) -> bytes | None:
        return real.image_bytes(places[owner]) if real and owner in places else None

    return report.generated_page(
        report.generated_set(
            rows,
            rejected=rejected,
            summary=summary,
            image_bytes=lambda row: origin.file(row["path"]).read_bytes(),
            real_bytes=real_bytes,
            provenance=tuple(_provenance(key, origin)),
        )
    )


def _provenance(key: StageKey, origin: Artifact) -> Iterator[tuple[str, str]]:
    yield "artifact", key.digest
    for kind, named in (("model", key.models), ("input", key.inputs)):
        for name, digest in sorted(named.items()):
            yield f"{kind} {name}", digest
    for name, value in sorted(key.settings.items()):
        yield f"generate.{name}", value if isinstance(value, str) else canonical_json(value)
    yield "seed", str(key.seed)
    manifest = origin.manifest
    yield "made of", f"{origin.digest[:12]}, made {manifest['created']}, {manifest['machine']}, {manifest['device']}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())


def adopt_all(slot: Slot, origin: Artifact, records: Sequence[Record]) -> None:
    """Take over the images of another artifact, without copies where the file system can."""
    for record in records:
        name, sha256, size = record["path"], record["sha256"], record["bytes"]
        if slot.adopt(name, sha256=sha256, size=size):
            continue
        slot.link_loose(name, origin.file(name))
        if not slot.adopt(name, sha256=sha256, size=size):
            hint = "Run `gmail artifacts verify`, delete the artifact and generate again."
            raise InputError(f"{origin.path / name} is not as recorded", hint=hint)
