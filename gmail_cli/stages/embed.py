"""``gmail embed``: unit embeddings of images and texts, each row with its id.

Real images go through f_r, generated ones through f_g (Algorithm 1, step 4, of the paper). In a run, each trained
text tower also embeds the test captions and the class prompts, and pairs of real and generated training images are
embedded to measure the modality gap before and after alignment.

    test-images  test-texts  test-classes       f_r and the text tower it came with
    test-images@<cell>  ...                     a trained cell's own towers, where they differ
    gap-real  gap-generated-naive  gap-generated-aligned      partners row by row: f_r, f_r and f_g
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gmail_cli.artifacts import Artifact, Slot, StageKey, Workspace
from gmail_cli.components.captions import Dataset
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import Profile, settings
from gmail_cli.stages import sources

if TYPE_CHECKING:
    from gmail_cli.components.encoders import Clip
    from gmail_cli.components.images import GeneratedSet
    from gmail_cli.components.tables import Flow, Table

VERSION = 1
TEXT_TASKS = ("clip-text", "long-clip", "clip")
"""Tasks whose cells have a text tower of their own."""

Progress = Callable[[int, int], None]


def plan_key(
    profile: Profile, *, generated: str | None = None, aligned: str | None = None, train: str | None = None
) -> StageKey:
    """What `run` would make from the artifacts with these digests, without loading a model."""
    given = {"generated": generated, "aligned": aligned, "train": train}
    return _key(profile, _read(profile), {name: digest for name, digest in given.items() if digest})


def run(
    profile: Profile,
    workspace: Workspace,
    *,
    generated: Artifact | None = None,
    aligned: Artifact | None = None,
    train: Artifact | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Embed the test set, and what the given artifacts add to it (or find it done).

    Args:
        profile: Sections used: ``embed``, ``model``, ``data``, ``align.validation``, ``runtime``; and ``seed``.
        workspace: Where the artifact goes.
        generated: Adds ``gap-real`` and ``gap-generated-naive``.
        aligned: Adds ``gap-generated-aligned``; needed for ``real_encoder = "tuned"``.
        train: Adds the tables of each cell that has a text tower of its own.
        progress: Called with (rows embedded, rows in all).

    Returns:
        The artifact: a folder per table (``vectors.npy``, ``rows.jsonl``, ``table.json``).

    Raises:
        InputError: Data or artifacts that are missing or do not fit.
        SetupError: A model or device this machine lacks.
        UsageError: ``real_encoder = "tuned"`` without an align artifact, bf16 on a CPU.
    """
    inputs = {"generated": generated, "aligned": aligned, "train": train}
    there = {name: artifact for name, artifact in inputs.items() if artifact is not None}
    test = _read(profile)
    with workspace.open(_key(profile, test, {name: artifact.digest for name, artifact in there.items()})) as slot:
        if slot.done:
            return slot.artifact
        return _make(profile, slot, test, there, progress=progress)


# -- what to make ------------------------------------------------------------------------------------------------


def _read(profile: Profile) -> Dataset:
    return sources.read(sources.source(profile, part="test"))


def _read_partners(profile: Profile) -> Dataset:
    return sources.read({**sources.source(profile, part="train"), "need_images": True})


def _key(profile: Profile, test: Dataset, given: Mapping[str, str]) -> StageKey:
    from gmail_cli.components.encoders import model_digest

    embed = profile.embed
    if embed.real_encoder == "tuned" and "aligned" not in given:
        hint = "Run gmail align first, or use --set embed.real_encoder=original."
        raise UsageError("embed.real_encoder = 'tuned' needs an align artifact and there is none", hint=hint)
    chosen = {**settings(embed), "protocol": sources.origins(profile)["protocol"]}
    inputs = {**given, "data": test.fingerprint}
    if not test.class_names:
        del chosen["templates"]
    if "generated" in given and embed.gap_count:
        inputs["partners"] = _read_partners(profile).fingerprint
        chosen["held_out"] = profile.align.validation if "aligned" in given else 0.0
    else:
        del chosen["gap_count"]
    digest = model_digest(profile.model.clip, revision=profile.model.revision, seed=profile.seed)
    models = {"clip": digest}
    return StageKey(stage="embed", version=VERSION, settings=chosen, inputs=inputs, models=models, seed=profile.seed)


# -- making it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Set:
    """One table to make.

    Attributes:
        name: Of the table.
        rows: What is known of each row; its ``text`` is embedded unless there are images.
        clip: Gives the encoder.
        space: Digest of the joint space the vectors live in.
        image_bytes: Encoded bytes of image i, for a table of images.
        flow: As in the table's header.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    clip: Callable[[], Clip]
    space: str
    image_bytes: Callable[[int], bytes] | None = None
    flow: Flow = "text"


def _make(
    profile: Profile, slot: Slot, test: Dataset, inputs: Mapping[str, Artifact], *, progress: Progress | None
) -> Artifact:
    import torch

    from gmail_cli.components.encoders import describe_device, pick_device

    if profile.runtime.threads:
        torch.set_num_threads(profile.runtime.threads)
    device = pick_device(profile.runtime.device)
    sets = list(_Plan(profile, test, inputs, device=str(device)).sets())
    total, done = sum(len(each.rows) for each in sets), 0
    for each in sets:
        if not slot.has(f"{each.name}/table.json"):
            report = (lambda at, _, done=done: progress(done + at, total)) if progress else None
            _write(slot, each.name, _embed(each, profile, progress=report))
        done += len(each.rows)
        if progress:
            progress(done, total)
    texts = {each.name: slot.read_jsonl(f"{each.name}/rows.jsonl") for each in sets if each.image_bytes is None}
    return slot.commit(
        summary={
            "origins": sources.origins(profile),
            "tables": {each.name: len(each.rows) for each in sets},
            "truncated_share": {
                name: sum(row["truncated"] for row in rows) / len(rows) for name, rows in texts.items()
            },
        },
        device=describe_device(device),
    )


def _embed(wanted: _Set, profile: Profile, *, progress: Progress | None) -> Table:
    from gmail_cli.components import encoders
    from gmail_cli.components.tables import Table

    embed, clip, rows = profile.embed, wanted.clip(), wanted.rows
    if wanted.image_bytes is not None:
        vectors = encoders.embed_images(
            clip,
            wanted.image_bytes,
            len(rows),
            batch_size=embed.batch_size,
            workers=profile.runtime.workers,
            progress=progress,
        )
    else:
        texts = [row["text"] for row in rows]
        vectors, cut = encoders.embed_texts(clip, texts, batch_size=embed.batch_size, progress=progress)
        rows = [{**row, "truncated": bool(each)} for row, each in zip(rows, cut, strict=True)]
    return Table.build(
        vectors,
        rows=rows,
        name=wanted.name,
        modality="text" if wanted.image_bytes is None else "image",
        flow=wanted.flow,
        encoder=clip.name,
        encoder_digest=clip.digest,
        space=wanted.space,
        preprocess=clip.tokenizer_digest if wanted.image_bytes is None else clip.preprocess.digest,
        dtype=embed.dtype,
    )


def _write(slot: Slot, name: str, table: Table) -> None:
    """The header comes last: a table with one is whole."""
    files = table.files()
    slot.write_npy(f"{name}/vectors.npy", files["vectors.npy"])
    slot.write_jsonl(f"{name}/rows.jsonl", files["rows.jsonl"])
    slot.write_json(f"{name}/table.json", files["table.json"])


class _Plan:
    """Which tables the inputs call for."""

    def __init__(self, profile: Profile, test: Dataset, inputs: Mapping[str, Artifact], *, device: str) -> None:
        self.profile, self.test, self.inputs, self.device = profile, test, inputs, device
        self._loaded: tuple[str, Clip] | None = None

    def sets(self) -> Iterator[_Set]:
        """The tables, those of one model after another."""
        space = self._space()
        real = self._aligned if self.profile.embed.real_encoder == "tuned" else self._original
        if self.test.has_images:
            yield self._images("test-images", clip=real, space=space)
        yield from self._texts("", clip=self._original, space=space)
        if "generated" in self.inputs and self.profile.embed.gap_count:
            yield from self._gap(space)
        if "train" in self.inputs:
            for row in self.inputs["train"].read_json("cells.json"):
                if row["task"] in TEXT_TASKS:
                    yield from self._cell(row, shared=space)

    def _space(self) -> str:
        from gmail_cli.components.encoders import model_digest

        model = self.profile.model
        return model_digest(model.clip, revision=model.revision, seed=self.profile.seed)

    def _original(self) -> Clip:
        return self._clip(self.profile.model.clip, name=self.profile.model.clip, revision=self.profile.model.revision)

    def _aligned(self) -> Clip:
        return self._clip(str(self.inputs["aligned"].folder("clip")), name=f"{self.profile.model.clip} aligned")

    def _clip(self, ref: str, *, name: str, revision: str = "") -> Clip:
        """A model; only the last one is held."""
        import dataclasses

        from gmail_cli.components.encoders import load_clip

        if self._loaded is None or self._loaded[0] != ref:
            embed = self.profile.embed
            clip = load_clip(
                ref, revision=revision, device=self.device, precision=embed.precision, seed=self.profile.seed
            )
            self._loaded = ref, dataclasses.replace(clip, name=name)
        return self._loaded[1]

    def _images(self, name: str, *, clip: Callable[[], Clip], space: str) -> _Set:
        rows = [{"id": image.id, "label": image.label} for image in self.test.images]
        return _Set(name=name, rows=rows, clip=clip, space=space, image_bytes=self.test.image_bytes, flow="real")

    def _texts(self, suffix: str, *, clip: Callable[[], Clip], space: str) -> Iterator[_Set]:
        captions = [
            {"id": each.id, "owner": each.owner, "text": each.text, "kind": each.kind} for each in self.test.captions
        ]
        if captions:
            yield _Set(name=f"test-texts{suffix}", rows=captions, clip=clip, space=space)
        prompts = [
            {"id": f"{label}/{number}", "label": label, "text": template.replace("{}", label)}
            for label in self.test.class_names
            for number, template in enumerate(self.profile.embed.templates)
        ]
        if prompts:
            yield _Set(name=f"test-classes{suffix}", rows=prompts, clip=clip, space=space)

    def _cell(self, row: Mapping[str, Any], *, shared: str) -> Iterator[_Set]:
        from gmail_cli.components.encoders import model_digest

        folder = self.inputs["train"].folder(f"{row['folder']}/clip")
        own = row["image_encoder"] == "own"
        space = model_digest(folder) if own else shared
        suffix, name = f"@{row['folder']}", str(row["name"])

        def clip() -> Clip:
            return self._clip(str(folder), name=name)

        if own and self.test.has_images:
            yield self._images(f"test-images{suffix}", clip=clip, space=space)
        yield from self._texts(suffix, clip=clip, space=space)

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

        yield _Set(name="gap-real", rows=real, clip=self._original, space=space, image_bytes=partner_bytes, flow="real")
        flows: list[tuple[str, Callable[[], Clip], Flow]] = [("gap-generated-naive", self._original, "real")]
        if "aligned" in self.inputs:
            flows.append(("gap-generated-aligned", self._aligned, "generated"))
        for name, clip, flow in flows:
            yield _Set(name=name, rows=drawn, clip=clip, space=space, image_bytes=drawn_bytes, flow=flow)


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
