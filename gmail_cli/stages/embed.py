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

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gmail_cli.artifacts import (
    Artifact,
    Checkpoints,
    Slot,
    StageKey,
    Waiting,
    Workspace,
    digest_of,
    digest_of_each,
    export_folder,
)
from gmail_cli.components import prompts
from gmail_cli.components.captions import Dataset
from gmail_cli.components.metrics.gap import evenly_spaced
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import Profile, settings
from gmail_cli.stages import sources

if TYPE_CHECKING:
    import numpy as np

    from gmail_cli.components.encoders import Clip
    from gmail_cli.components.images import GeneratedSet
    from gmail_cli.components.tables import Flow

TEXT_TASKS = ("clip-text", "long-clip", "clip")
"""Tasks whose cells have a text tower of their own."""

Progress = Callable[[int, int], None]
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


def _read_partners(profile: Profile) -> Dataset:
    return sources.read({**sources.source(profile, part="train"), "need_images": True})


def _labelled(profile: Profile, test: Dataset) -> tuple[Dataset, list[int]] | None:
    """The training set and those of its images that features of a labelled test set are classified by, if wanted.

    Raises:
        InputError: The training set has no labels, or lacks a class of the test set.
    """
    embed = profile.embed
    if not embed.train_count or embed.flow == "generated" or not (test.has_images and test.class_names):
        return None
    training = _read_partners(profile)
    labelled = [row for row, image in enumerate(training.images) if image.label is not None]
    if not labelled:
        hint = "Give a labelled set as data.train, or set embed.train_count=0."
        raise InputError(f"embed.train_count = {embed.train_count}, and {training.name} has no labels", hint=hint)
    rows = [labelled[place] for place in evenly_spaced(len(labelled), limit=embed.train_count).tolist()]
    known = {training.images[row].label for row in rows}
    lacking = next((image.label for image in test.images if image.label not in known), None)
    if lacking is not None:
        raise InputError(
            f"the test images have class {lacking!r}, and none of the {len(rows)} training images taken has it",
            hint="Raise embed.train_count, or set it to 0.",
        )
    return training, rows


def _used(profile: Profile, given: Mapping[str, _Given | None]) -> dict[str, _Given]:
    """The inputs that are there and matter: a set that is embedded as generated images stands alone."""
    matter = ("aligned",) if profile.embed.flow == "generated" else tuple(given)
    return {name: each for name in matter if (each := given[name]) is not None}


def _digests(given: Mapping[str, Artifact]) -> dict[str, str]:
    return {name: artifact.digest for name, artifact in given.items()}


def _key(profile: Profile, test: Dataset, given: Mapping[str, str]) -> StageKey:
    from gmail_cli.components.encoders import model_digest

    embed = profile.embed
    chosen = {**settings(embed), "protocol": sources.origins(profile)["protocol"]}
    if embed.flow == "generated":
        del chosen["real_encoder"]
    for name, value, otherwise in (("flow", "generated", "real"), ("real_encoder", "tuned", "original")):
        if chosen.get(name) == value and "aligned" not in given:
            hint = f"Run gmail align first, name one with --aligned, or use --set embed.{name}={otherwise}."
            raise UsageError(f"embed.{name} = {value!r} needs an align artifact and there is none", hint=hint)
    inputs = {**given, "data": test.fingerprint}
    labelled = _labelled(profile, test)
    if labelled is None:
        del chosen["train_count"]
    else:
        inputs["labelled"] = labelled[0].fingerprint
    if not test.class_names:
        del chosen["templates"]
    else:
        chosen["templates"] = list(prompts.templates(embed.templates))
    if "generated" in given and embed.gap_count:
        inputs["partners"] = _read_partners(profile).fingerprint
        chosen["held_out"] = profile.align.validation if "aligned" in given else 0.0
    else:
        del chosen["gap_count"]
    digest = model_digest(profile.model.clip, revision=profile.model.revision, seed=profile.seed)
    models = {"clip": digest}
    return StageKey(stage="embed", settings=chosen, inputs=inputs, models=models, seed=profile.seed)


# -- making it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Set:
    """One table to make.

    Attributes:
        name: Of the table.
        count: Its rows.
        row: What is known of row i; its ``text`` is embedded unless there are images.
        clip: Gives the encoder.
        space: Digest of the joint space the vectors live in.
        encoder: Digest of the encoder.
        content: What each row is embedded from: SHA-256 of the image's bytes, or the text.
        image_bytes: Encoded bytes of image i, for a table of images.
        flow: As in the table's header.
    """

    name: str
    count: int
    row: Callable[[int], Mapping[str, Any]]
    clip: Callable[[], Clip]
    space: str
    encoder: str
    content: Callable[[], Iterable[str | None]]
    image_bytes: Callable[[int], bytes] | None = None
    flow: Flow = "text"


class _Job:
    """One table on its way: shards in the slot's scratch folder, then the table; or a copy of one in ``earlier``.

    Attributes:
        key: Equal for tables with equal vectors.
        found: The artifact and the name of the table that it is copied from.
    """

    def __init__(self, wanted: _Set, slot: Slot, profile: Profile, earlier: Sequence[Artifact]) -> None:
        self.wanted, self._slot, self._profile = wanted, slot, profile
        rows = profile.embed.shard_rows
        how = settings(profile.embed)
        arithmetic = {name: how[name] for name in ("precision", "batch_size", "shard_rows", "dtype")}
        about = {
            "images": wanted.image_bytes is not None,
            "content": digest_of_each(wanted.content()),
            "encoder": wanted.encoder,
        }
        self.key = digest_of({**about, **arithmetic})
        self.found = next(
            (
                (artifact, name)
                for artifact in earlier
                for name, key in artifact.summary.get("table_keys", {}).items()
                if key == self.key
            ),
            None,
        )
        self.shards = [range(start, min(start + rows, wanted.count)) for start in range(0, wanted.count, rows)]

    def has(self, shard: range) -> bool:
        """Whether a shard (or the table) is done."""
        return self.merged or self.found is not None or self._shard(shard).exists()

    @property
    def merged(self) -> bool:
        """Whether the table is whole: its header is written last."""
        return self._slot.has(f"{self.wanted.name}/table.json")

    def fill(self, shards: Sequence[range], *, progress: Progress | None) -> None:
        """Embed shards, each saved as soon as it is there."""
        if not shards:
            return
        import torch

        from gmail_cli.components.tables import unit_rows

        wanted = self.wanted
        for shard, (vectors, truncated) in zip(shards, self._embed(shards, progress=progress), strict=True):
            rows = [wanted.row(row) for row in shard]
            dtype = self._profile.embed.dtype
            stored = unit_rows(vectors, rows=rows, name=wanted.name, dtype=dtype, first=shard.start)
            tensors = {"vectors": torch.from_numpy(stored)}
            if truncated is not None:
                tensors["truncated"] = torch.from_numpy(truncated)
            self._shard(shard).save(tensors)

    def _embed(
        self, shards: Sequence[range], *, progress: Progress | None
    ) -> Iterable[tuple[np.ndarray, np.ndarray | None]]:
        from gmail_cli.components import embedding

        wanted, size = self.wanted, self._profile.embed.batch_size
        clip = wanted.clip()
        if wanted.image_bytes is None:
            return embedding.text_shards(
                clip, lambda row: wanted.row(row)["text"], shards, batch_size=size, progress=progress
            )
        workers = self._profile.runtime.workers
        images = embedding.image_shards(
            clip, wanted.image_bytes, shards, batch_size=size, workers=workers, progress=progress
        )
        return ((vectors, None) for vectors in images)

    def merge(self) -> None:
        """Lay the shards one after another: the table's folder, its header last."""
        import numpy as np

        from gmail_cli.components.tables import Header

        wanted, slot, dtype = self.wanted, self._slot, self._profile.embed.dtype
        clip, texts = wanted.clip(), wanted.image_bytes is None
        cut: list[np.ndarray] = []

        def blocks() -> Iterator[np.ndarray]:
            if self.found is not None:
                folder = self.found[0].folder(self.found[1])
                vectors = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
                with (folder / "rows.jsonl").open("rb") as lines:
                    for shard in self.shards:
                        if texts:
                            cut.append(np.array([json.loads(next(lines))["truncated"] for _ in shard], dtype=bool))
                        yield np.asarray(vectors[shard.start : shard.stop])
                return
            for shard in self.shards:
                tensors = self._shard(shard).load()
                if tensors is None:
                    self._shard(shard).remove()
                    hint = "Run the same command again: only that shard is embedded again."
                    raise InputError(f"rows {shard.start} to {shard.stop - 1} of {wanted.name} are damaged", hint=hint)
                if texts:
                    cut.append(tensors["truncated"].numpy())
                yield tensors["vectors"].numpy()

        def rows() -> Iterator[Mapping[str, Any]]:
            for shard, truncated in zip(self.shards, cut, strict=True):
                for row, each in zip(shard, truncated.tolist(), strict=True):
                    yield {**wanted.row(row), "truncated": each}

        header = Header(
            name=wanted.name,
            modality="text" if texts else "image",
            flow=wanted.flow,
            dim=clip.dim,
            dtype=dtype,
            count=wanted.count,
            normalised=True,
            encoder=clip.name,
            encoder_digest=clip.digest,
            space=wanted.space,
            preprocess=clip.tokenizer_digest if texts else clip.preprocess.digest,
        )
        slot.write_npy_blocks(f"{wanted.name}/vectors.npy", blocks(), shape=(wanted.count, clip.dim), dtype=dtype)
        slot.write_jsonl(f"{wanted.name}/rows.jsonl", rows() if texts else map(wanted.row, range(wanted.count)))
        slot.write_json(f"{wanted.name}/table.json", asdict(header))
        for shard in self.shards:
            self._shard(shard).remove()

    def truncated_share(self) -> float:
        """Share of the texts that were cut to the context length."""
        with self._slot.path(f"{self.wanted.name}/rows.jsonl").open("rb") as lines:
            return sum(json.loads(line)["truncated"] for line in lines) / self.wanted.count

    def _shard(self, shard: range) -> Checkpoints:
        return self._slot.checkpoints(f"shards/{self.wanted.name}/{shard.start:012d}")


def _jobs(
    profile: Profile, workspace: Workspace, slot: Slot, test: Dataset, inputs: Mapping[str, Artifact]
) -> list[_Job]:
    earlier = [each for each in workspace.artifacts() if each.stage == "embed"]
    return [_Job(each, slot, profile, earlier) for each in _sets(profile, test, inputs)]


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


def _sets(profile: Profile, test: Dataset, inputs: Mapping[str, Artifact]) -> Iterator[_Set]:
    import torch

    from gmail_cli.components.encoders import pick_device, require_precision

    if profile.runtime.threads:
        torch.set_num_threads(profile.runtime.threads)
    device = pick_device(profile.runtime.device)
    require_precision("embed.precision", profile.embed.precision, device=device)
    return _Plan(profile, test, inputs, device=str(device)).sets()


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of one table as progress of all."""
    return (lambda at, _: progress(before + at, total)) if progress else None


class _Plan:
    """Which tables the inputs call for."""

    def __init__(self, profile: Profile, test: Dataset, inputs: Mapping[str, Artifact], *, device: str) -> None:
        self.profile, self.test, self.inputs, self.device = profile, test, inputs, device
        self._train = _labelled(profile, test)
        self._loaded: tuple[str, Clip] | None = None

    def sets(self) -> Iterator[_Set]:
        """The tables, those of one model after another."""
        space, embed = self._space(), self.profile.embed
        through: dict[str, Any] = {"clip": self._original, "encoder": space, "flow": "real"}
        if embed.flow == "generated" or embed.real_encoder == "tuned":
            through = {"clip": self._aligned, "encoder": self._aligned_digest(), "flow": "generated"}
        yield from self._images("", space=space, **through)
        if self._original().reads_texts:
            yield from self._texts("", clip=self._original, encoder=space, space=space)
        if "generated" in self.inputs and self.profile.embed.gap_count:
            yield from self._gap(space)
        if "train" in self.inputs:
            for row in self.inputs["train"].read_json("cells.json"):
                if row["task"] in TEXT_TASKS and (row["task"], row["arm"]) != ("clip-text", "none"):
                    yield from self._cell(row, shared=space)

    def _space(self) -> str:
        from gmail_cli.components.encoders import model_digest

        model = self.profile.model
        return model_digest(model.clip, revision=model.revision, seed=self.profile.seed)

    def _original(self) -> Clip:
        return self._clip(self.profile.model.clip, name=self.profile.model.clip, revision=self.profile.model.revision)

    def _aligned(self) -> Clip:
        return self._clip(str(self.inputs["aligned"].folder("clip")), name=f"{self.profile.model.clip} aligned")

    def _aligned_digest(self) -> str:
        from gmail_cli.components.encoders import model_digest

        return model_digest(self.inputs["aligned"].folder("clip"))

    def _clip(self, ref: str, *, name: str, revision: str = "") -> Clip:
        """A model; only the last one is held."""
        import dataclasses

        from gmail_cli.components.encoders import load_clip, rounded

        if self._loaded is None or self._loaded[0] != ref:
            embed = self.profile.embed
            clip = load_clip(
                ref, revision=revision, device=self.device, precision=embed.precision, seed=self.profile.seed
            )
            self._loaded = ref, dataclasses.replace(rounded(clip), name=name)
        return self._loaded[1]

    def _images(
        self, suffix: str, *, clip: Callable[[], Clip], encoder: str, space: str, flow: Flow = "real"
    ) -> Iterator[_Set]:
        """The test images, and the labelled training images, through one encoder."""
        through = partial(_Set, clip=clip, encoder=encoder, space=space, flow=flow)
        if self.test.has_images:
            yield through(name=f"test-images{suffix}", **_images_of(self.test, range(len(self.test))))
        if self._train is not None:
            yield through(name=f"train-images{suffix}", **_images_of(*self._train))

    def _texts(self, suffix: str, *, clip: Callable[[], Clip], encoder: str, space: str) -> Iterator[_Set]:
        captions, texts = self.test.captions, partial(_Set, clip=clip, encoder=encoder, space=space)

        def row(at: int) -> Mapping[str, Any]:
            each = captions[at]
            return {"id": each.id, "owner": each.owner, "text": each.text, "kind": each.kind}

        def said() -> Iterator[str]:
            return (each.text for each in captions)

        if captions:
            yield texts(name=f"test-texts{suffix}", count=len(captions), row=row, content=said)
        classes = prompts.rows(self.test, self.profile.embed.templates)

        def prompted() -> Iterator[str]:
            return (str(each["text"]) for each in classes)

        if classes:
            name, row_of = f"test-classes{suffix}", classes.__getitem__
            yield texts(name=name, count=len(classes), row=row_of, content=prompted)

    def _cell(self, row: Mapping[str, Any], *, shared: str) -> Iterator[_Set]:
        from gmail_cli.components.encoders import model_digest

        folder = self.inputs["train"].folder(f"{row['folder']}/clip")
        own = row["image_encoder"] == "own"
        encoder = model_digest(folder)
        space = encoder if own else shared
        suffix, name = f"@{row['folder']}", str(row["name"])

        def clip() -> Clip:
            return self._clip(str(folder), name=name)

        if own:
            yield from self._images(suffix, clip=clip, encoder=encoder, space=space)
        yield from self._texts(suffix, clip=clip, encoder=encoder, space=space)

    def _gap(self, space: str) -> Iterator[_Set]:
        from gmail_cli.components.images import GeneratedSet

        generated = GeneratedSet.load(self.inputs["generated"].path)
        partners = _read_partners(self.profile)
        held = self.profile.align.validation if "aligned" in self.inputs else 0.0
        pairs = _pairs(generated, partners, held=held, seed=self.profile.seed)[: self.profile.embed.gap_count]
        if not pairs:
            hint = "Give the real images of the generated captions as data.train, or set embed.gap_count=0."
            raise InputError("no generated image has a real partner to measure the gap with", hint=hint)
        here = [pair.generated for pair in pairs]
        there = [pair.real for pair in pairs]
        real = [{"id": partners.images[pair.real].id, "held_out": pair.held_out} for pair in pairs]
        drawn = [
            {
                "id": generated.rows[pair.generated].key,
                "owner": partners.images[pair.real].id,
                "text": generated.rows[pair.generated].caption,
                "held_out": pair.held_out,
            }
            for pair in pairs
        ]

        def partner_bytes(row: int) -> bytes:
            return partners.image_bytes(there[row])

        def drawn_bytes(row: int) -> bytes:
            return generated.image_bytes(here[row])

        def photographs(name: str) -> _Set:
            return _Set(
                name=name,
                count=len(pairs),
                row=real.__getitem__,
                clip=self._original,
                space=space,
                encoder=space,
                content=lambda: (partners.image_identities[row] for row in there),
                image_bytes=partner_bytes,
                flow="real",
            )

        def images(name: str, clip: Callable[[], Clip], encoder: str, flow: Flow) -> _Set:
            return _Set(
                name=name,
                count=len(pairs),
                row=drawn.__getitem__,
                clip=clip,
                space=space,
                encoder=encoder,
                content=lambda: (generated.rows[row].sha256 for row in here),
                image_bytes=drawn_bytes,
                flow=flow,
            )

        yield photographs("gap-real")
        yield images("gap-generated-naive", self._original, space, "real")
        if "aligned" in self.inputs:
            yield images("gap-generated-aligned", self._aligned, self._aligned_digest(), "generated")


def _images_of(dataset: Dataset, rows: Sequence[int]) -> dict[str, Any]:
    """What a :class:`_Set` wants to know of some images."""

    def row(at: int) -> Mapping[str, Any]:
        image = dataset.images[rows[at]]
        return {"id": image.id, "label": image.label}

    return {
        "count": len(rows),
        "row": row,
        "content": lambda: (dataset.image_identities[at] for at in rows),
        "image_bytes": lambda at: dataset.image_bytes(rows[at]),
    }


@dataclass(frozen=True)
class _Pair:
    generated: int
    real: int
    held_out: bool


def _pairs(generated: GeneratedSet, partners: Dataset, *, held: float, seed: int) -> list[_Pair]:
    """Generated images with real partners, each real image once; those held out of alignment first.

    The partner is the owner, or else the next unused real image with the same caption.
    """
    from gmail_cli.components.partners import held_out

    row_of = {image.id: row for row, image in enumerate(partners.images)}
    kept = {image.id for image in partners.images if held_out(image.id, share=held, seed=seed)}
    free: dict[tuple[str, bool], list[int]] = {}
    for caption in reversed(partners.captions_of_kind("short")):
        free.setdefault((caption.text, caption.owner in kept), []).append(row_of[caption.owner])
    used: set[int] = set()
    pairs = []
    for place, row in enumerate(generated.rows):
        own = row_of.get(row.owner)
        aside = held_out(row.owner, share=held, seed=seed)
        choices = [own] if own is not None else free.get((row.caption, aside), [])
        while choices and choices[-1] in used:
            choices.pop()
        if choices:
            used.add(choices[-1])
            pairs.append(_Pair(place, choices[-1], aside))
    return sorted(pairs, key=lambda pair: not pair.held_out)
