"""``gmail align``: tune f_g, a copy of the image tower, until generated images land where their real partners do.

Algorithm 1, step 2 of the paper. f_r is frozen, so its embeddings of the real images are computed once; a training
step runs one tower. What comes out is a peft adapter, the merged model as a plain open_clip folder, the loss curve,
and a validation on held-out images that says whether alignment helped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gmail_cli.artifacts import Artifact, Slot, StageKey, Workspace
from gmail_cli.components.captions import Dataset
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import settings
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import features as frozen
from gmail_cli.stages import sources
from gmail_cli.stages.features import Features

if TYPE_CHECKING:
    import numpy as np
    import torch

    from gmail_cli.components.encoders import Clip
    from gmail_cli.components.images import GeneratedSet
    from gmail_cli.components.objectives import Batch, Objective
    from gmail_cli.components.partners import GeneratedFrom, Pairing, RealImage
    from gmail_cli.components.pixels import Pixels
    from gmail_cli.components.tuning import TunedTower

TRANSFER_ROWS = 20_000
"""Most generated training images that transfer is fitted on."""
JUDGED = 5_000
"""Most held-out real images that transfer is judged by."""

Progress = Callable[[int, int], None]
Track = Callable[[str, Sequence[Mapping[str, float]]], None]


def plan_key(profile: Profile, *, generated: str) -> StageKey:
    """What `run` would make from the generate artifact of that digest, without loading a model."""
    return _key(profile, sources.read_partners(profile), generated)


def features(profile: Profile, *, generated: Artifact) -> list[Features]:
    """What `run` reads of f_r: its embeddings of the real images that can be partners, and of the generated images."""
    from gmail_cli.components.clip_files import model_digest
    from gmail_cli.components.images import GeneratedSet

    real, images = sources.read_partners(profile), GeneratedSet.load(generated.path)
    used, _ = _partners(real, images, every=profile.align.pairing == "unpaired")
    digest = model_digest(profile.model.clip, revision=profile.model.revision, seed=profile.seed)
    return [_of_real(profile, real, used, digest), _of_generated(profile, images, digest)]


def run(
    profile: Profile,
    workspace: Workspace,
    *,
    generated: Artifact,
    progress: Progress | None = None,
    track: Track | None = None,
) -> Artifact:
    """Align generated images with the real images of their captions (or find it done).

    Args:
        profile: Sections used: ``align``, ``model``, ``data`` (the real partners), ``runtime``; and ``seed``.
        workspace: Where the artifact goes.
        generated: A generate artifact.
        progress: Called with (images embedded, images) where features are missing, then with (steps done, steps).
        track: Called with ``align`` and the loss curve so far.

    Returns:
        The artifact: ``adapter/`` (peft; not with ``method = "full"``), ``clip/`` (open_clip folder: f_g beside f_r's
        text tower), ``metrics.jsonl`` (the loss curve), ``validation.json``. Its summary says in ``verdict`` whether
        alignment helped.

    Raises:
        InputError: No real partner for a generated image, unreadable images, or a loss that is not finite.
        SetupError: A model or device this machine lacks.
        UsageError: Settings that do not fit the model.
    """
    real = sources.read_partners(profile)
    key = _key(profile, real, generated.digest)
    with workspace.open(key) as slot:
        if slot.done:
            return slot.artifact
        work = _prepare(profile, workspace, slot, real, generated, progress=progress)
        tower = _train(profile, slot, work, progress=progress, track=track)
        report = _finish(profile, slot, work, tower)
        from gmail_cli.components.encoders import describe_device

        return slot.commit(summary=report, device=describe_device(work.clip.device))


# -- what to make ------------------------------------------------------------------------------------------------


def _key(profile: Profile, real: Dataset, generated: str) -> StageKey:
    from gmail_cli.components.clip_files import model_digest

    align = profile.align
    objective = _objective(profile)
    chosen = {**settings(align), "objective": str(objective)}
    lora = ["lora_rank", "lora_alpha", "lora_rank_stabilised", "lora_dropout", "lora_targets"]
    unused = [] if align.method in {"lora", "dora"} else lora
    unused += [] if align.schedule == "cosine-restarts" else ["cycles"]
    unused += [] if objective.contrasts else ["temperature", "learn_temperature"]
    unused += [] if objective.has_negatives else ["false_negatives", "bank"]
    unused += ["chunk"] if align.chunk == 0 else []
    unused += [] if align.compile else ["compile"]
    for name in unused:
        del chosen[name]
    return StageKey(
        stage="align",
        settings=chosen,
        inputs={"generated": generated, "real": real.fingerprint},
        models={"clip": model_digest(profile.model.clip, revision=profile.model.revision, seed=profile.seed)},
        seed=profile.seed,
    )


def _of_real(profile: Profile, real: Dataset, rows: Sequence[int], encoder: str) -> Features:
    identities = [real.image_identities[row] for row in rows]
    return _features(profile, [each for each in identities if each is not None], "real images", encoder)


def _of_generated(profile: Profile, images: GeneratedSet, encoder: str) -> Features:
    return _features(profile, [row.sha256 for row in images.rows], "generated images", encoder)


def _features(profile: Profile, images: Sequence[str], what: str, encoder: str) -> Features:
    precision, name = profile.align.precision, profile.model.clip
    return Features(images=tuple(images), what=what, encoder=name, encoder_digest=encoder, precision=precision)


def _objective(profile: Profile) -> Objective:
    from gmail_cli.components.objectives import PAIRED, Objective

    align = profile.align
    objective = Objective.parse(
        align.objective, temperature=align.temperature, learn_temperature=align.learn_temperature
    )
    if align.pairing == "unpaired" and objective.names & (PAIRED | {"real-text"}):
        named = sorted(objective.names & (PAIRED | {"real-text"}))
        raise UsageError(
            f"align.pairing = 'unpaired' gives no partners, and {', '.join(named)} needs them",
            hint="Use coral, mmd, text, hycd, rafa or stablerep, such as align.objective=text+coral.",
        )
    return objective


# -- making it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Work:
    """All that training and validation read.

    Attributes:
        clip: f_r.
        pixels: The generated images.
        real_pixels: The real images, row by row of ``real``; only where the objective looks at them.
        generated, real: What pairing knows of each row.
        targets: f_r of the real images.
        before: f_r of the generated images.
        train, held: Generated rows to train on and to judge by.
        learn, held_real: Real rows to train with and to judge by.
        pairing: Of the generated rows in ``train``, in that order; its candidates are real rows.
    """

    clip: Clip
    pixels: Pixels
    real_pixels: Pixels | None
    generated: Sequence[GeneratedFrom]
    real: Sequence[RealImage]
    targets: np.ndarray
    before: np.ndarray
    train: np.ndarray
    held: np.ndarray
    learn: np.ndarray
    held_real: np.ndarray
    pairing: Pairing


def _prepare(
    profile: Profile,
    workspace: Workspace,
    slot: Slot,
    dataset: Dataset,
    artifact: Artifact,
    *,
    progress: Progress | None,
) -> _Work:
    import numpy as np
    import torch

    from gmail_cli.components import clip_files, compilation, embedding, encoders
    from gmail_cli.components import partners as partnership
    from gmail_cli.components.images import GeneratedSet
    from gmail_cli.components.partners import GeneratedFrom
    from gmail_cli.components.pixels import Pixels

    align, runtime = profile.align, profile.runtime
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    device = encoders.pick_device(runtime.device)
    encoders.require_precision("align.precision", align.precision, device=device)
    if align.compile:
        compilation.require_compiler("align.compile", device=device)
    clip = clip_files.load_clip(
        profile.model.clip,
        revision=profile.model.revision,
        device=device,
        precision=align.precision,
        seed=profile.seed,
    )
    images = GeneratedSet.load(artifact.path)
    generated = [GeneratedFrom(row.owner, row.caption, row.label) for row in images.rows]
    used, real = _partners(dataset, images, every=align.pairing == "unpaired")
    pixels = Pixels(images.image_bytes, len(images), preprocess=clip.preprocess, device=device, workers=runtime.workers)

    def embed_real(start: int, stop: int) -> np.ndarray:
        return embedding.embed_images(
            clip, lambda row: dataset.image_bytes(used[start + row]), stop - start, workers=runtime.workers
        )

    def embed_generated(start: int, stop: int) -> np.ndarray:
        return _embed(clip, pixels, np.arange(start, stop))

    def frozen_features(wanted: Features, embed: frozen.Embed) -> np.ndarray:
        where = encoders.describe_device(device)
        return frozen.load(wanted, workspace, slot, embed=embed, device=where, shared=True, progress=progress)

    targets = frozen_features(_of_real(profile, dataset, used, clip.digest), embed_real)
    before = frozen_features(_of_generated(profile, images, clip.digest), embed_generated)

    def held(ids: list[str]) -> np.ndarray:
        return np.array(
            [partnership.held_out(each, share=align.validation, seed=profile.seed) for each in ids], dtype=bool
        )

    is_held, real_held = held([image.owner for image in generated]), held([image.id for image in real])
    train, learn = np.flatnonzero(~is_held), np.flatnonzero(~real_held)
    pairing = partnership.pair(
        [generated[row] for row in train],
        [real[row] for row in learn],
        method=align.pairing,
        generated_vectors=before[train],
        real_vectors=targets[learn],
        seed=profile.seed,
    ).with_candidates(learn)
    real_pixels = None
    if "real-text" in _objective(profile).names:
        real_pixels = Pixels(
            lambda row: dataset.image_bytes(used[row]),
            len(used),
            preprocess=clip.preprocess,
            device=device,
            workers=runtime.workers,
        )
    return _Work(
        clip=clip,
        pixels=pixels,
        real_pixels=real_pixels,
        generated=generated,
        real=real,
        targets=targets,
        before=before,
        train=train,
        held=np.flatnonzero(is_held),
        learn=learn,
        held_real=np.flatnonzero(real_held),
        pairing=pairing,
    )


def _partners(dataset: Dataset, images: GeneratedSet, *, every: bool) -> tuple[list[int], list[RealImage]]:
    """The real images that could be anyone's partner: owners, and images of the same caption text or class; or all."""
    from gmail_cli.components.partners import RealImage

    owners = {row.owner for row in images.rows}
    texts = {row.caption for row in images.rows}
    labels = {row.label for row in images.rows} - {None}
    used, real = [], []
    for row, image in enumerate(dataset.images):
        own = frozenset(caption.text for caption in dataset.captions_of(image.id) if caption.kind == "short")
        if every or image.id in owners or own & texts or image.label in labels:
            used.append(row)
            real.append(RealImage(image.id, own, image.label))
    return used, real


def _embed(clip: Clip, pixels: Pixels, rows: np.ndarray, *, batch_size: int = 256) -> np.ndarray:
    import numpy as np

    starts = range(0, len(rows), batch_size)
    parts = [clip.encode_images(pixels[rows[start : start + batch_size]]).cpu().numpy() for start in starts]
    return np.concatenate(parts) if parts else np.empty((0, clip.dim), dtype=np.float32)


def _tower(profile: Profile, clip: Clip) -> TunedTower:
    from gmail_cli.components import tuning

    align = profile.align
    if align.method == "full":
        return tuning.unfreeze(clip)
    if align.method == "projection":
        return tuning.unfreeze_projection(clip)
    return tuning.add_lora(
        clip,
        rank=align.lora_rank,
        alpha=align.lora_alpha,
        targets=align.lora_targets,
        dropout=align.lora_dropout,
        rank_stabilised=align.lora_rank_stabilised,
        decomposed=align.method == "dora",
        seed=profile.seed,
    )


class _Batches:
    """What the objective sees at each step; a function of the step and the seed alone."""

    def __init__(self, profile: Profile, work: _Work, tower: TunedTower, objective: Objective) -> None:
        import numpy as np
        import torch

        from gmail_cli.components import embedding
        from gmail_cli.components.objectives import TEXTUAL

        self._align, self._seed, self._work, self._tower = profile.align, profile.seed, work, tower
        self._names = objective.names
        self._device = work.clip.device
        self._targets = torch.from_numpy(work.targets).to(self._device)
        texts = {text: number for number, text in enumerate(sorted({image.text for image in work.generated}))}
        self._captions = np.array([texts[image.text] for image in work.generated])[work.train]
        records: dict[tuple[str, str], int] = {}
        self._records = np.array(
            [records.setdefault((image.owner, image.text), len(records)) for image in work.generated]
        )[work.train]
        self._shows = [[texts[text] for text in image.texts if text in texts] for image in work.real]
        self._texts = None
        if self._names & TEXTUAL:
            self._texts = torch.from_numpy(embedding.embed_texts(work.clip, list(texts))[0]).to(self._device)
        self._before = torch.from_numpy(work.before).to(self._device) if "hycd" in self._names else None
        self._groups = self._by_record() if "stablerep" in self._names else None

    def _by_record(self) -> list[np.ndarray]:
        import numpy as np

        order = np.argsort(self._records, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(self._records[order])) + 1)
        if max(map(len, groups)) < 2:
            raise InputError(
                "align.objective: stablerep needs several generated images of a caption, and there is one of each",
                hint="Generate more with --per-caption, or leave the term out.",
            )
        return groups

    def rows(self, step: int) -> np.ndarray:
        """Training rows of a step; whole captions at a time where images of one caption must meet."""
        import numpy as np

        from gmail_cli.components.loop import batch_indices

        if self._groups is None:
            return batch_indices(len(self._work.train), self._align.batch_size, seed=self._seed, step=step)
        count = max(1, self._align.batch_size // max(map(len, self._groups)))
        chosen = batch_indices(len(self._groups), count, seed=self._seed, step=step)
        return np.concatenate([self._groups[group] for group in chosen])

    def __call__(self, indices: torch.Tensor, step: int) -> Batch:
        import torch

        from gmail_cli.components import parallel
        from gmail_cli.components.loop import seed_from
        from gmail_cli.components.objectives import Batch, false_negatives

        work, rows, chunk = self._work, indices.numpy(), self._align.chunk
        partners = work.pairing.rows(rows, seed=seed_from("partner", self._seed, step))
        captions = self._captions[rows]
        share = parallel.ranks().share(len(rows))
        pixels = work.pixels[work.train[rows[share]]]
        upcoming = self.rows(step + 1)
        work.pixels.prefetch(work.train[upcoming[parallel.ranks().share(len(upcoming))]])
        with work.clip.autocast():
            embedded = parallel.gather(self._tower(pixels, chunk=chunk), rows=len(rows))
            seen = None
            if work.real_pixels is not None:
                seen = parallel.gather(self._tower(work.real_pixels[partners[share]], chunk=chunk), rows=len(rows))
        bank, bank_false = self._bank(partners, captions, step=step)
        anywhere = None
        if "rafa" in self._names:
            anywhere = self._targets[torch.from_numpy(self._random(len(rows), "anywhere", step=step))]
        return Batch(
            generated=embedded,
            real=self._targets[torch.from_numpy(partners)],
            false_negatives=self._mask(false_negatives(partners, captions=captions, mode=self._align.false_negatives)),
            same_caption=self._mask(torch.from_numpy(captions[:, None] == captions)),
            siblings=self._mask(torch.from_numpy(self._records[rows][:, None] == self._records[rows])),
            texts=None if self._texts is None else self._texts[torch.from_numpy(captions)],
            before=None if self._before is None else self._before[torch.from_numpy(work.train[rows])],
            anywhere=anywhere,
            seen=seen,
            bank=bank,
            bank_false=bank_false,
        )

    def _random(self, count: int, what: str, *, step: int) -> np.ndarray:
        import numpy as np

        from gmail_cli.components.loop import seed_from

        return np.random.default_rng(seed_from(what, self._seed, step)).choice(self._work.learn, count)

    def _mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        return None if mask is None else mask.to(self._device)

    def _bank(
        self, partners: np.ndarray, captions: np.ndarray, *, step: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Real images beyond the batch, and which of them are no negatives: partners, and more as ``mask-caption``."""
        import numpy as np
        import torch

        from gmail_cli.components.loop import seed_from

        if not self._align.bank:
            return None, None
        learn, size = self._work.learn, self._align.bank
        if size < len(learn):
            rng = np.random.default_rng(seed_from("bank", self._seed, step))
            learn = np.sort(rng.choice(learn, size, replace=False))
        false = np.isin(learn, partners)[None, :].repeat(len(partners), axis=0)
        if self._align.false_negatives == "mask-caption":
            number = {int(row): place for place, row in enumerate(learn)}
            shown: dict[int, list[int]] = {}
            for row, place in number.items():
                for text in self._shows[row]:
                    shown.setdefault(text, []).append(place)
            for place, text in enumerate(captions.tolist()):
                false[place, shown.get(text, [])] = True
        return self._targets[torch.from_numpy(learn)], torch.from_numpy(false).to(self._device)


def _train(profile: Profile, slot: Slot, work: _Work, *, progress: Progress | None, track: Track | None) -> TunedTower:
    import dataclasses

    from torch import nn

    from gmail_cli.components.compilation import compile_blocks
    from gmail_cli.components.loop import Recipe, fit
    from gmail_cli.components.objectives import Scales

    align = profile.align
    tower = _tower(profile, work.clip)
    if align.compile:
        compile_blocks(tower.visual)
    objective = dataclasses.replace(_objective(profile), text_temperature=1 / _text_scale(work.clip))
    scales = Scales(objective).to(work.clip.device)
    batches = _Batches(profile, work, tower, objective)

    def loss(indices: torch.Tensor, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return objective(batches(indices, step), scales)

    recipe = Recipe(
        steps=align.steps,
        batch_size=align.batch_size,
        lr=align.lr,
        weight_decay=align.weight_decay,
        schedule=align.schedule,
        cycles=align.cycles,
        warmup=align.warmup,
        clip_norm=align.clip_norm,
        seed=profile.seed,
    )
    curve = fit(
        nn.ModuleList([tower, scales]),
        loss=loss,
        rows=batches.rows,
        recipe=recipe,
        checkpoints=slot.checkpoints("tower"),
        checkpoint_seconds=profile.runtime.checkpoint_seconds,
        shared=True,
        log=functools.partial(track, "align") if track else None,
        progress=progress,
    )
    slot.write_jsonl("metrics.jsonl", curve)
    return tower


def _text_scale(clip: Clip) -> float:
    """The model's own inverse temperature between images and texts; 1 where it reads none."""
    from gmail_cli.components.tasks import LARGEST_SCALE

    if not clip.reads_texts:
        return 1.0

    return min(float(clip.model.logit_scale.exp()), LARGEST_SCALE)


def _finish(profile: Profile, slot: Slot, work: _Work, tower: TunedTower) -> dict[str, Any]:
    """Write the models and the validation; the summary."""
    from gmail_cli.components import clip_files, tuning
    from gmail_cli.components.loop import trained_parameters

    merged = tuning.merge(work.clip, tower, name=f"{work.clip.name} aligned")
    if tower.adapter is not None:
        slot.write_folder("adapter", lambda folder: tuning.save_adapter(tower, folder, base=work.clip.name))
    slot.write_folder("clip", lambda folder: clip_files.save_clip(merged, folder))
    validation = _validate(profile, work, merged)
    slot.write_json("validation.json", validation)
    trained = trained_parameters(tower)
    whole = sum(parameter.numel() for parameter in work.clip.model.visual.parameters())
    return {
        "objective": str(_objective(profile)),
        "pairing": work.pairing.method,
        "generated": len(work.generated),
        "real": len(work.real),
        "trained_parameters": trained,
        "trained_share": trained / whole,
        "encoder": merged.digest,
        **validation,
    }


# -- validation --------------------------------------------------------------------------------------------------


def _validate(profile: Profile, work: _Work, merged: Clip) -> dict[str, Any]:
    """Gap and transfer on the held-out images, before (through f_r) and after (through f_g)."""
    import numpy as np

    from gmail_cli.components import embedding, transfer
    from gmail_cli.components import partners as partnership

    rng = np.random.default_rng(profile.seed)

    def some(rows: np.ndarray, *, most: int) -> np.ndarray:
        return rows[np.sort(rng.permutation(len(rows))[:most])]

    judged = some(work.held_real, most=JUDGED)
    real = [work.real[row] for row in judged]
    held = work.held[partnership.has_partner([work.generated[row] for row in work.held], real)]
    if min(len(held), len(real)) < 2:
        reason = "too few held-out images" if profile.align.validation else "align.validation is 0"
        return {"verdict": f"not validated: {reason}"}
    learn = [work.real[row] for row in work.learn]
    known = work.train[partnership.has_partner([work.generated[row] for row in work.train], learn)]
    if len(known) < 2:
        return {"verdict": "not validated: no real image has the captions that were generated from"}
    train = some(known, most=TRANSFER_ROWS)
    generated = [work.generated[row] for row in train]
    partners = partnership.pair(generated, learn, seed=profile.seed).with_candidates(work.learn)
    task = transfer.make_task(
        generated,
        real,
        embed=(lambda texts: embedding.embed_texts(work.clip, texts)[0]) if work.clip.reads_texts else None,
        scale=_text_scale(work.clip),
        captioned=partners.method == "caption",
        seed=profile.seed,
    )
    if task is None:
        reason = f"{work.clip.name} reads no captions, and there are too few held-out images of each class"
        return {"verdict": f"not validated: {reason}"}
    return transfer.validate(
        transfer.View(train=work.before[train], held=work.before[held]),
        transfer.View(train=_embed(merged, work.pixels, train), held=_embed(merged, work.pixels, held)),
        partners=work.targets[partners.rows(np.arange(len(train)), seed=profile.seed)],
        real=work.targets[judged],
        pairs=partnership.pair([work.generated[row] for row in held], real),
        task=task,
        objective=profile.align.objective,
        seed=profile.seed,
    )
