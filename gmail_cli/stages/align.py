"""``gmail align``: tune f_g, a copy of the image tower, until generated images land where their real partners do.

Algorithm 1, step 2 of the paper. f_r is frozen, so its embeddings of the real images are computed once; a training
step runs one tower. What comes out is a peft adapter, the merged model as a plain open_clip folder, the loss curve,
and a validation on held-out images that says whether alignment helped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gmail_cli.artifacts import Artifact, Slot, StageKey, Workspace
from gmail_cli.components.captions import Dataset
from gmail_cli.profile import Profile, settings
from gmail_cli.stages import sources

if TYPE_CHECKING:
    import numpy as np

    from gmail_cli.components.encoders import Clip
    from gmail_cli.components.images import GeneratedSet
    from gmail_cli.components.objectives import GeneratedFrom, Objective, Pairing, RealImage
    from gmail_cli.components.pixels import Pixels
    from gmail_cli.components.tuning import TunedTower

VERSION = 2
TRANSFER_ROWS = 20_000
"""Most generated training images that transfer is fitted on."""
JUDGED = 5_000
"""Most held-out real images that transfer is judged by."""

Progress = Callable[[int, int], None]


def plan_key(profile: Profile, *, generated: str) -> StageKey:
    """What `run` would make from the generate artifact of that digest, without loading a model."""
    return _key(profile, _read(profile), generated)


def run(profile: Profile, workspace: Workspace, *, generated: Artifact, progress: Progress | None = None) -> Artifact:
    """Align generated images with the real images of their captions (or find it done).

    Args:
        profile: Sections used: ``align``, ``model``, ``data`` (the real partners), ``runtime``; and ``seed``.
        workspace: Where the artifact goes.
        generated: A generate artifact.
        progress: Called with (steps done, steps in all).

    Returns:
        The artifact: ``adapter/`` (peft; not with ``method = "full"``), ``clip/`` (open_clip folder: f_g beside f_r's
        text tower), ``metrics.jsonl`` (the loss curve), ``validation.json``. Its summary says in ``verdict`` whether
        alignment helped.

    Raises:
        InputError: No real partner for a generated image, unreadable images, or a loss that is not finite.
        SetupError: A model or device this machine lacks.
        UsageError: Settings that do not fit the model.
    """
    real = _read(profile)
    key = _key(profile, real, generated.digest)
    with workspace.open(key) as slot:
        if slot.done:
            return slot.artifact
        work = _prepare(profile, slot, real, generated)
        tower = _train(profile, slot, work, progress=progress)
        report = _finish(profile, slot, work, tower)
        from gmail_cli.components.encoders import describe_device

        return slot.commit(summary=report, device=describe_device(work.clip.device))


# -- what to make ------------------------------------------------------------------------------------------------


def _read(profile: Profile) -> Dataset:
    return sources.read({**sources.source(profile, part="train"), "need_images": True})


def _key(profile: Profile, real: Dataset, generated: str) -> StageKey:
    from gmail_cli.components.encoders import model_digest

    align = profile.align
    objective = _objective(profile)
    chosen = {**settings(align), "objective": str(objective)}
    unused = [] if align.method == "lora" else ["lora_rank", "lora_alpha", "lora_targets"]
    unused += [] if align.schedule == "cosine-restarts" else ["cycles"]
    unused += [] if objective.contrasts else ["temperature", "false_negatives"]
    for name in unused:
        del chosen[name]
    return StageKey(
        stage="align",
        version=VERSION,
        settings=chosen,
        inputs={"generated": generated, "real": real.fingerprint},
        models={"clip": model_digest(profile.model.clip, revision=profile.model.revision, seed=profile.seed)},
        seed=profile.seed,
    )


def _objective(profile: Profile) -> Objective:
    from gmail_cli.components.objectives import Objective

    return Objective.parse(profile.align.objective, temperature=profile.align.temperature)


# -- making it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Work:
    """All that training and validation read.

    Attributes:
        clip: f_r.
        pixels: The generated images.
        generated, real: What pairing knows of each row.
        targets: f_r of the real images.
        before: f_r of the generated images.
        train, held: Generated rows to train on and to judge by.
        held_real: Real rows to judge by.
        pairing: Of the generated rows in ``train``, in that order; its candidates are real rows.
    """

    clip: Clip
    pixels: Pixels
    generated: Sequence[GeneratedFrom]
    real: Sequence[RealImage]
    targets: np.ndarray
    before: np.ndarray
    train: np.ndarray
    held: np.ndarray
    held_real: np.ndarray
    pairing: Pairing


def _prepare(profile: Profile, slot: Slot, dataset: Dataset, artifact: Artifact) -> _Work:
    import numpy as np
    import torch

    from gmail_cli.components import encoders, objectives
    from gmail_cli.components.images import GeneratedSet
    from gmail_cli.components.objectives import GeneratedFrom
    from gmail_cli.components.pixels import Pixels

    align, runtime = profile.align, profile.runtime
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    device = encoders.pick_device(runtime.device)
    clip = encoders.load_clip(
        profile.model.clip,
        revision=profile.model.revision,
        device=device,
        precision=align.precision,
        seed=profile.seed,
    )
    images = GeneratedSet.load(artifact.path)
    generated = [GeneratedFrom(row.owner, row.caption, row.label) for row in images.rows]
    used, real = _partners(dataset, images)
    pixels = Pixels(images.image_bytes, len(images), preprocess=clip.preprocess, device=device, workers=runtime.workers)

    def embed_real() -> np.ndarray:
        return encoders.embed_images(
            clip, lambda row: dataset.image_bytes(used[row]), len(used), workers=runtime.workers
        )

    targets = _cached(slot, "targets.npy", embed_real)
    before = _cached(slot, "before.npy", lambda: _embed(clip, pixels, np.arange(len(images))))

    def held(ids: list[str]) -> np.ndarray:
        return np.array(
            [objectives.held_out(each, share=align.validation, seed=profile.seed) for each in ids], dtype=bool
        )

    is_held, real_held = held([image.owner for image in generated]), held([image.id for image in real])
    train, learn = np.flatnonzero(~is_held), np.flatnonzero(~real_held)
    pairing = objectives.pair(
        [generated[row] for row in train],
        [real[row] for row in learn],
        method=align.pairing,
        generated_vectors=before[train],
        real_vectors=targets[learn],
        seed=profile.seed,
    ).with_candidates(learn)
    return _Work(
        clip=clip,
        pixels=pixels,
        generated=generated,
        real=real,
        targets=targets,
        before=before,
        train=train,
        held=np.flatnonzero(is_held),
        held_real=np.flatnonzero(real_held),
        pairing=pairing,
    )


def _partners(dataset: Dataset, images: GeneratedSet) -> tuple[list[int], list[RealImage]]:
    """The real images that could be anyone's partner: owners, and images of the same caption text or class."""
    from gmail_cli.components.objectives import RealImage

    owners = {row.owner for row in images.rows}
    texts = {row.caption for row in images.rows}
    labels = {row.label for row in images.rows} - {None}
    used, real = [], []
    for row, image in enumerate(dataset.images):
        own = frozenset(caption.text for caption in dataset.captions_of(image.id) if caption.kind == "short")
        if image.id in owners or own & texts or image.label in labels:
            used.append(row)
            real.append(RealImage(image.id, own, image.label))
    return used, real


def _cached(slot: Slot, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """An array kept in the slot while the stage works, so that a resumed run need not compute it again."""
    import numpy as np

    if not slot.has(name):
        slot.write_npy(name, compute())
    return np.load(slot.path(name), allow_pickle=False)


def _embed(clip: Clip, pixels: Pixels, rows: np.ndarray, *, batch_size: int = 256) -> np.ndarray:
    import numpy as np

    starts = range(0, len(rows), batch_size)
    parts = [clip.encode_images(pixels[rows[start : start + batch_size]]).cpu().numpy() for start in starts]
    return np.concatenate(parts) if parts else np.empty((0, clip.dim), dtype=np.float32)


def _train(profile: Profile, slot: Slot, work: _Work, *, progress: Progress | None) -> TunedTower:
    import numpy as np
    import torch

    from gmail_cli.components import objectives, tuning
    from gmail_cli.components.loop import Recipe, batch_indices, fit, seed_from

    align = profile.align
    if align.method == "full":
        tower = tuning.unfreeze(work.clip)
    else:
        tower = tuning.add_lora(
            work.clip, rank=align.lora_rank, alpha=align.lora_alpha, targets=align.lora_targets, seed=profile.seed
        )
    objective = _objective(profile)
    targets = torch.from_numpy(work.targets).to(work.clip.device)
    names = {text: number for number, text in enumerate(sorted({image.text for image in work.generated}))}
    captions = np.array([names[image.text] for image in work.generated])[work.train]

    def loss(indices: torch.Tensor, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rows = indices.numpy()
        partners = work.pairing.rows(rows, seed=seed_from("partner", profile.seed, step))
        mask = objectives.false_negatives(partners, captions=captions[rows], mode=align.false_negatives)
        pixels = work.pixels[work.train[rows]]
        upcoming = batch_indices(len(work.train), align.batch_size, seed=profile.seed, step=step + 1)
        work.pixels.prefetch(work.train[upcoming])
        with work.clip.autocast():
            embedded = tower(pixels)
        real = targets[torch.from_numpy(partners).to(targets.device)]
        return objective(embedded, real, false_negatives=None if mask is None else mask.to(real.device))

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
        tower,
        loss=loss,
        rows=len(work.train),
        recipe=recipe,
        checkpoints=slot.checkpoints("tower"),
        checkpoint_seconds=profile.runtime.checkpoint_seconds,
        progress=progress,
    )
    slot.write_jsonl("metrics.jsonl", curve)
    return tower


def _finish(profile: Profile, slot: Slot, work: _Work, tower: TunedTower) -> dict[str, Any]:
    """Write the models and the validation; the summary."""
    from gmail_cli.components import encoders, tuning

    merged = tuning.merge(work.clip, tower, name=f"{work.clip.name} aligned")
    if tower.adapter is not None:
        slot.write_folder("adapter", lambda folder: tuning.save_adapter(tower, folder, base=work.clip.name))
    slot.write_folder("clip", lambda folder: encoders.save_clip(merged, folder))
    validation = _validate(profile, work, merged)
    slot.write_json("validation.json", validation)
    for cache in ("targets.npy", "before.npy"):
        slot.remove(cache)
    whole = sum(parameter.numel() for parameter in work.clip.model.visual.parameters())
    return {
        "objective": str(_objective(profile)),
        "pairing": work.pairing.method,
        "generated": len(work.generated),
        "real": len(work.real),
        "trained_parameters": tower.trained,
        "trained_share": tower.trained / whole,
        "encoder": merged.digest,
        **validation,
    }


# -- validation --------------------------------------------------------------------------------------------------


def _validate(profile: Profile, work: _Work, merged: Clip) -> dict[str, Any]:
    """Gap and transfer on the held-out images, before (through f_r) and after (through f_g)."""
    import numpy as np

    from gmail_cli.components import encoders, objectives, transfer
    from gmail_cli.components.tasks import LARGEST_SCALE

    rng = np.random.default_rng(profile.seed)

    def some(rows: np.ndarray, *, most: int) -> np.ndarray:
        return rows[np.sort(rng.permutation(len(rows))[:most])]

    judged = some(work.held_real, most=JUDGED)
    real = [work.real[row] for row in judged]
    held = work.held[objectives.has_partner([work.generated[row] for row in work.held], real)]
    if min(len(held), len(real)) < 2:
        reason = "too few held-out images" if profile.align.validation else "align.validation is 0"
        return {"verdict": f"not validated: {reason}"}
    train = some(work.train, most=TRANSFER_ROWS)
    learn = np.setdiff1d(np.arange(len(work.real)), work.held_real)
    generated = [work.generated[row] for row in train]
    partners = objectives.pair(generated, [work.real[row] for row in learn], seed=profile.seed).with_candidates(learn)
    return transfer.validate(
        transfer.View(train=work.before[train], held=work.before[held]),
        transfer.View(train=_embed(merged, work.pixels, train), held=_embed(merged, work.pixels, held)),
        partners=work.targets[partners.rows(np.arange(len(train)), seed=profile.seed)],
        real=work.targets[judged],
        pairs=objectives.pair([work.generated[row] for row in held], real),
        task=transfer.make_task(
            generated,
            real,
            embed=lambda texts: encoders.embed_texts(work.clip, texts)[0],
            scale=min(float(work.clip.model.logit_scale.exp()), LARGEST_SCALE),
            seed=profile.seed,
        ),
        objective=profile.align.objective,
        seed=profile.seed,
    )
