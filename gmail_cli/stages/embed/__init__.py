"""``gmail embed``: unit embeddings of images and texts, each row with its id.

Real images go through f_r, generated ones through f_g (Algorithm 1, step 4, of the paper): ``embed.flow`` says which
the given images are. In a run, each trained text tower also embeds the test captions and the class prompts, and pairs
of real and generated training images are embedded to measure the modality gap before and after alignment.

    test-images  test-texts  test-classes       the given set: f_r (or f_g) and the text tower that f_r came with
    train-images                                labelled training images through the same encoder (embed.train_count)
    test-images@<cell>  ...                     a trained cell's own towers, where they differ from CLIP's
    gap-real  gap-generated-naive  gap-generated-aligned      partners row by row: f_r, f_r and f_g

A table is embedded in shards of ``embed.shard_rows`` rows. Each is written when it is there, whole or absent, and
depends on nothing but its own rows: a killed run begins again at the shard it was in, and several processes
(:func:`run_part`) may share the shards. At the end they are laid one after another. A table that an earlier artifact of
the run holds already, of the same images or texts through the same encoder, is copied from there: in a sweep over
``align`` only what went through f_g or a trained tower is embedded again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from gmail_cli.artifacts import Artifact, Slot, StageKey, Waiting, Workspace, export_folder
from gmail_cli.components import prompts
from gmail_cli.components.captions import Dataset
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import settings
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import sources
from gmail_cli.stages.embed.jobs import Job, Progress, Wanted
from gmail_cli.stages.embed.planning import Plan, labelled_images

_Given = TypeVar("_Given")


def plan_key(
    profile: Profile, *, generated: str | None = None, aligned: str | None = None, train: str | None = None
) -> StageKey:
    """What `run` would make from the artifacts with these digests, without loading a model."""
    given = {"generated": generated, "aligned": aligned, "train": train}
    return _key(profile, _read(profile), _used(profile, given))


def run(
    profile: Profile,
    workspace: Workspace,
    *,
    generated: Artifact | None = None,
    aligned: Artifact | None = None,
    train: Artifact | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Embed the given set, and what the given artifacts add to it (or find it done).

    Args:
        profile: Sections used: ``embed``, ``model``, ``data``, ``align.validation``, ``runtime``; and ``seed``.
        workspace: Where the artifact goes.
        generated: Adds ``gap-real`` and ``gap-generated-naive``; unused with ``flow = "generated"``.
        aligned: Adds ``gap-generated-aligned``; needed for ``flow = "generated"`` and ``real_encoder = "tuned"``.
        train: Adds the tables of each cell that has a text tower of its own; unused with ``flow = "generated"``.
        progress: Called with (rows embedded, rows in all).

    Returns:
        The artifact: a folder per table (``vectors.npy``, ``rows.jsonl``, ``table.json``).

    Raises:
        InputError: Data or artifacts that are missing or do not fit.
        SetupError: A model or device this machine lacks.
        UsageError: f_g is asked for without an align artifact, bf16 on a CPU that is slow at it.
    """
    there = _used(profile, {"generated": generated, "aligned": aligned, "train": train})
    if aligned:
        sources.require_clip_of(aligned, profile)
    test = _read(profile)
    with workspace.open(_key(profile, test, _digests(there))) as slot:
        if slot.done:
            return slot.artifact
        return _make(profile, workspace, slot, test, there, progress=progress)


def run_part(
    profile: Profile,
    workspace: Workspace,
    *,
    part: tuple[int, int],
    generated: Artifact | None = None,
    aligned: Artifact | None = None,
    train: Artifact | None = None,
    progress: Progress | None = None,
) -> Artifact | Waiting:
    """Embed one of several parts of what ``run`` embeds; the process that finds all parts done makes the artifact.

    Part i of n is every n-th shard. The processes of all parts may run together, on machines that share the workspace;
    one that was killed is started again with the same part, or left to ``run``.

    Args:
        profile: As for ``run``; the same in every process.
        workspace: As for ``run``.
        part: (i, n): which part, counted from 1, of how many.
        generated: As for ``run``.
        aligned: As for ``run``.
        train: As for ``run``.
        progress: Called with (rows embedded, rows of the part).

    Raises:
        UsageError: As ``run``; or i is not one of 1 to n.
    """
    number, parts = part
    sources.require_part(number, parts)
    there = _used(profile, {"generated": generated, "aligned": aligned, "train": train})
    if aligned:
        sources.require_clip_of(aligned, profile)
    test = _read(profile)
    with workspace.open(_key(profile, test, _digests(there)), shared=True) as slot:
        if slot.done:
            return slot.artifact
        jobs = _jobs(profile, workspace, slot, test, there)
        every = [(job, shard) for job in jobs for shard in job.shards]
        own = [pair for pair in every[number - 1 :: parts] if not pair[0].has(pair[1])]
        total, done = sum(len(shard) for _, shard in own), 0
        for job in jobs:
            mine = [shard for other, shard in own if other is job]
            job.fill(mine, progress=_shifted(progress, done, total))
            done += sum(map(len, mine))
        filled = sum(job.has(shard) for job, shard in every)
        waiting = Waiting(slot.key, filled, len(every))
    if waiting.done < waiting.shards:
        return waiting
    return run(profile, workspace, generated=generated, aligned=aligned, train=train)


def export(artifact: Artifact, folder: Path) -> int:
    """Write the test tables of an embed artifact in clip-retrieval's folder layout.

    Args:
        artifact: What ``run`` made.
        folder: A folder that is new or empty.

    Returns:
        Captions left out: those of an image beyond its first.

    Raises:
        InputError: Not an embed artifact, or it holds neither images nor captions.
        UsageError: The folder holds something.
    """
    from gmail_cli.components.exchange import write_clip_retrieval
    from gmail_cli.components.tables import Table

    names = ("test-images", "test-texts") if artifact.stage == "embed" else ()
    there = [name for name in names if f"{name}/table.json" in artifact.files]
    if not there:
        hint = "Give a folder made by `gmail embed`, such as runs/tiny/embed/latest."
        if artifact.stage in ("align", "train"):
            hint = "Its models need no export: clip/ loads in open_clip or transformers as it is, adapter/ in peft."
        raise InputError(f"{artifact.path} holds no embeddings of images or captions", hint=hint)
    images, texts = (Table.load(artifact.folder(name)) if name in there else None for name in names)
    left_out = 0

    def write(empty: Path) -> None:
        nonlocal left_out
        left_out = write_clip_retrieval(empty, images=images, texts=texts)

    export_folder(folder, write)
    return left_out


# -- what to make ------------------------------------------------------------------------------------------------


def _read(profile: Profile) -> Dataset:
    return sources.read(sources.source(profile, part="test"))


def _used(profile: Profile, given: Mapping[str, _Given | None]) -> dict[str, _Given]:
    """The inputs that are there and matter: a set that is embedded as generated images stands alone."""
    matter = ("aligned",) if profile.embed.flow == "generated" else tuple(given)
    return {name: each for name in matter if (each := given[name]) is not None}


def _digests(given: Mapping[str, Artifact]) -> dict[str, str]:
    return {name: artifact.digest for name, artifact in given.items()}


def _key(profile: Profile, test: Dataset, given: Mapping[str, str]) -> StageKey:
    from gmail_cli.components.clip_files import model_digest

    embed = profile.embed
    chosen = {**settings(embed), "protocol": sources.origins(profile)["protocol"]}
    if embed.flow == "generated":
        del chosen["real_encoder"]
    for name, value, otherwise in (("flow", "generated", "real"), ("real_encoder", "tuned", "original")):
        if chosen.get(name) == value and "aligned" not in given:
            hint = f"Run gmail align first, name one with --aligned, or use --set embed.{name}={otherwise}."
            raise UsageError(f"embed.{name} = {value!r} needs an align artifact and there is none", hint=hint)
    inputs = {**given, "data": test.fingerprint}
    labelled = labelled_images(profile, test)
    if labelled is None:
        del chosen["train_count"]
    else:
        inputs["labelled"] = labelled[0].fingerprint
    if not test.class_names:
        del chosen["templates"]
    else:
        chosen["templates"] = list(prompts.templates(embed.templates))
    if "generated" in given and embed.gap_count:
        inputs["partners"] = sources.read_partners(profile).fingerprint
        chosen["held_out"] = profile.align.validation if "aligned" in given else 0.0
    else:
        del chosen["gap_count"]
    digest = model_digest(profile.model.clip, revision=profile.model.revision, seed=profile.seed)
    models = {"clip": digest}
    return StageKey(stage="embed", settings=chosen, inputs=inputs, models=models, seed=profile.seed)


# -- making it ---------------------------------------------------------------------------------------------------


def _jobs(
    profile: Profile, workspace: Workspace, slot: Slot, test: Dataset, inputs: Mapping[str, Artifact]
) -> list[Job]:
    earlier = [each for each in workspace.artifacts() if each.stage == "embed"]
    return [Job(each, slot, profile, earlier) for each in _sets(profile, test, inputs)]


def _make(
    profile: Profile,
    workspace: Workspace,
    slot: Slot,
    test: Dataset,
    inputs: Mapping[str, Artifact],
    *,
    progress: Progress | None,
) -> Artifact:
    from gmail_cli.components.encoders import describe_device, pick_device

    jobs = _jobs(profile, workspace, slot, test, inputs)
    total, done = sum(job.wanted.count for job in jobs), 0
    for job in jobs:
        if not job.merged:
            if job.found is not None and workspace.tell:
                workspace.tell(f"reusing {job.wanted.name} of {job.found[0].stage}/{job.found[0].path.name}")
            missing = [shard for shard in job.shards if not job.has(shard)]
            there = job.wanted.count - sum(map(len, missing))
            job.fill(missing, progress=_shifted(progress, done + there, total))
            job.merge()
        done += job.wanted.count
        if progress:
            progress(done, total)
    return slot.commit(
        summary={
            "origins": sources.origins(profile),
            "tables": {job.wanted.name: job.wanted.count for job in jobs},
            "table_keys": {job.wanted.name: job.key for job in jobs},
            "truncated_share": {
                job.wanted.name: job.truncated_share() for job in jobs if job.wanted.image_bytes is None
            },
        },
        device=describe_device(pick_device(profile.runtime.device)),
    )


def _sets(profile: Profile, test: Dataset, inputs: Mapping[str, Artifact]) -> Iterator[Wanted]:
    import torch

    from gmail_cli.components.encoders import pick_device, require_precision

    if profile.runtime.threads:
        torch.set_num_threads(profile.runtime.threads)
    device = pick_device(profile.runtime.device)
    require_precision("embed.precision", profile.embed.precision, device=device)
    return Plan(profile, test, inputs, device=str(device)).sets()


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of one table as progress of all."""
    return (lambda at, _: progress(before + at, total)) if progress else None
