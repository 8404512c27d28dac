"""What can be trained on the images of an arm: a text tower, a whole CLIP, a captioner, a class probe.

Each function returns a `Job` for the training loop. An arm differs from another only in the images (or their
embeddings) that it shows with a caption; captions, their order and the number of steps are the same. The losses of text
tower, CLIP and captioner are shared by the processes of ``torchrun`` (``parallel.py``).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional

from gmail_cli.components import parallel
from gmail_cli.components.arms import Arm, Meeting
from gmail_cli.components.clip_files import save_clip
from gmail_cli.components.encoders import Clip, text_features, text_features_by_length
from gmail_cli.components.heads import IGNORED, Captioner, Head, Probe, save_head
from gmail_cli.components.loop import Job
from gmail_cli.components.pairs import Pairs
from gmail_cli.errors import InputError, UsageError

Augment: TypeAlias = Literal["none", "crop", "crop-flip"]

CLIP_FOLDER = "clip"
LARGEST_SCALE = 100.0
"""Upper bound of CLIP's inverse temperature (Radford et al. 2021)."""
NEVER = -1e4
"""Logit of a class that cannot be the answer."""
PROMPT = "a photo of a {}."
"""What a class is called in the class loss of ``clip``."""


# -- image-text contrast -----------------------------------------------------------------------------------------


def contrastive_loss(
    images: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "batch dim"],
    *,
    scale: Tensor,
    positives: Bool[Tensor, "batch batch"],
    excluded: Bool[Tensor, "batch batch"],
) -> tuple[Tensor, Tensor]:
    """CLIP's symmetric loss with several positives (UniCL, Yang et al. 2022), and the share of images that rank one
    of theirs first.

    Args:
        images: Unit image embeddings.
        texts: Unit text embeddings.
        scale: Inverse temperature.
        positives: Which image fits which text; symmetric, with a full diagonal.
        excluded: Neither positives nor negatives (siblings); symmetric, disjoint from ``positives``.
    """
    logits = (scale * images @ texts.T).masked_fill(excluded, -torch.inf)
    weights = positives / positives.sum(dim=1, keepdim=True)

    def one_way(scores: Tensor) -> Tensor:
        log_shares = scores.log_softmax(dim=1).masked_fill(~positives, 0.0)
        return -(weights * log_shares).sum(dim=1).mean()

    return (one_way(logits) + one_way(logits.T)) / 2, _first_is_right(logits, positives)


def sigmoid_loss(
    images: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "batch dim"],
    *,
    scale: Tensor,
    bias: Tensor,
    positives: Bool[Tensor, "batch batch"],
    excluded: Bool[Tensor, "batch batch"],
) -> tuple[Tensor, Tensor]:
    """SigLIP's loss (Zhai et al. 2023) with several positives, and the share of images that rank one of theirs first.

    ``-1/batch sum_ij log sigmoid(z_ij (scale sim(i, j) + bias))`` over the pairs that are not excluded, z = 1 where
    they fit and -1 elsewhere. Arguments as in `contrastive_loss`.
    """
    logits = scale * images @ texts.T + bias
    judged = functional.logsigmoid(torch.where(positives, logits, -logits)).masked_fill(excluded, 0.0)
    return -judged.sum() / len(logits), _first_is_right(logits.masked_fill(excluded, -torch.inf), positives)


def _first_is_right(logits: Tensor, positives: Tensor) -> Tensor:
    best = logits.detach().argmax(dim=1, keepdim=True)
    return positives.gather(1, best).float().mean()


def image_text_loss(
    model: Any,
    images: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "batch dim"],
    *,
    positives: Bool[Tensor, "batch batch"],
    excluded: Bool[Tensor, "batch batch"],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that a model was made for, and the figures of its step: SigLIP's where it has a bias, CLIP's otherwise.

    Args:
        model: Has ``logit_scale`` (a logarithm) and perhaps ``logit_bias``, as open_clip's and transformers' have.
        images: Unit image embeddings.
        texts: Unit text embeddings.
        positives: See `contrastive_loss`.
        excluded: The same.
    """
    scale, bias = (
        model.logit_scale.exp().reshape(()),
        getattr(model, "logit_bias", None),
    )  # transformers: vectors of one
    given: dict[str, Any] = {"positives": positives.to(images.device), "excluded": excluded.to(images.device)}
    if bias is None:
        scale = scale.clamp(max=LARGEST_SCALE)
        value, accuracy = contrastive_loss(images, texts, scale=scale, **given)
    else:
        value, accuracy = sigmoid_loss(images, texts, scale=scale, bias=bias.reshape(()), **given)
    return value, {"accuracy": accuracy, "temperature": 1 / scale.detach()}


class _Texts:
    """Texts tokenised once, each different text once."""

    def __init__(self, clip: Clip, pairs: Pairs) -> None:
        first = first_of_each(pairs.text_ids)
        self.ids = clip.tokenize([pairs.texts[row] for row in first.tolist()]).ids.to(torch.int32)
        self.of_caption = pairs.text_ids

    def embed(self, model: Any, rows: Int[Tensor, " batch"], *, device: torch.device) -> Float[Tensor, "batch dim"]:
        """Unit embeddings, differentiable; equal texts of a batch are encoded once, by one rank."""
        different, where = torch.unique(self.of_caption[rows], return_inverse=True)
        read = text_features_by_length if device.type == "cpu" else text_features
        share = parallel.ranks().share(len(different))
        features = functional.normalize(read(model, self.ids[different[share]].long().to(device)).float(), dim=-1)
        return functional.embedding(where.to(device), parallel.gather(features, rows=len(different)))


def first_of_each(ids: Int[Tensor, " captions"]) -> Int[Tensor, " different"]:
    """Row of the first caption with each text; ids are numbered in that order."""
    first = torch.full((int(ids.max()) + 1,), len(ids))
    return first.scatter_reduce(0, ids, torch.arange(len(ids)), "amin")


def clip_text_job(clip: Clip, pairs: Pairs, arm: Arm | None) -> Job:
    """Train the text tower against frozen image embeddings (paper, 3.1 and appendix C).

    Args:
        clip: f_r; stays as it is. Its inverse temperature, and SigLIP's bias, are trained with the text tower.
        pairs: The captions.
        arm: Image embeddings; None to export f_r's own text tower.
    """
    model = copy.deepcopy(clip.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("visual."))
    texts = _Texts(clip, pairs)

    def loss(rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        assert arm is not None
        images, _ = arm.draw(rows)
        with quick_attention(clip.device):
            embedded = texts.embed(model, rows, device=clip.device)
        same, siblings = pairs.same_text(rows), pairs.siblings(rows)
        return image_text_loss(model, images.to(clip.device), embedded, positives=same, excluded=siblings)

    def export(folder: Path) -> None:
        export_clip(clip, model, folder)

    return Job(module=model, loss=loss, rows=len(pairs), export=export)


def clip_job(
    clip: Clip,
    pairs: Pairs,
    arm: Arm,
    *,
    augment: Augment = "none",
    patch_dropout: float = 0.0,
    whole_from: int = 0,
    class_weight: float = 0.0,
) -> Job:
    """Train a whole CLIP, from random weights or from given ones.

    Args:
        clip: Where to start; stays as it is.
        pairs: The captions.
        arm: uint8 pixels (rows, size, size, 3), cut to what the image tower reads.
        augment: ``crop`` shifts by up to an eighth of the side, repeating the border; ``crop-flip`` also mirrors,
            which is wrong where captions speak of left and right.
        patch_dropout: Share of patches left out (Li et al. 2023, FLIP); vision transformers only.
        whole_from: From this step on all patches are seen.
        class_weight: Weight of a second loss, for images with a class: the cross-entropy of telling the class from
            the others by their prompts, as in zero-shot classification. Captions alone hardly ask for the class
            where colour, place and setting already tell the images of a batch apart (labels and captions in one
            space: UniCL, Yang et al. 2022).

    Raises:
        InputError: A class weight without classes.
        UsageError: Patch dropout for a tower without patches to drop; several processes for what depends on the whole
            batch: patch dropout, or a tower with batch normalisation.
    """
    from open_clip.transformer import PatchDropout, VisionTransformer
    from torch.nn.modules.batchnorm import _BatchNorm

    layout = _layout(clip)
    model = copy.deepcopy(clip.model).requires_grad_(True).train().to(memory_format=layout)
    together = parallel.ranks().count > 1
    if together and (patch_dropout or any(isinstance(module, _BatchNorm) for module in model.modules())):
        what = f"train.patch_dropout = {patch_dropout}" if patch_dropout else f"the batch normalisation of {clip.name}"
        raise UsageError(
            f"{what} would see the share of a batch of each of {parallel.ranks().count} processes, not the batch",
            hint="Train task clip with one process, or a tower without it.",
        )
    dropout = None
    if patch_dropout:
        if not isinstance(model.visual, VisionTransformer):
            raise UsageError(
                f"train.patch_dropout = {patch_dropout}: the image tower of {clip.name} has no patches to drop",
                hint="Set it to 0, or train a vision transformer.",
            )
        dropout = model.visual.patch_dropout = PatchDropout(patch_dropout)
    texts = _Texts(clip, pairs)
    if class_weight and not bool((pairs.labels >= 0).any()):
        raise InputError("train.class_weight needs images with a class, and none has one", hint="Set it to 0.")
    prompts = clip.tokenize([PROMPT.format(name) for name in pairs.class_names]).ids if class_weight else None
    mean, std = (torch.tensor(values, device=clip.device) for values in (clip.preprocess.mean, clip.preprocess.std))

    def loss(rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        stored, _ = arm.draw(rows)
        share = parallel.ranks().share(len(rows))
        shown = augmented(stored, augment)[share].to(clip.device)
        pixels = ((shown.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        if dropout is not None:
            dropout.prob = patch_dropout if step < whole_from else 0.0
        with quick_attention(clip.device):
            own = functional.normalize(model.encode_image(pixels).float(), dim=-1)
            images = parallel.gather(own, rows=len(rows))
            embedded = texts.embed(model, rows, device=clip.device)
            names = None if prompts is None else text_features(model, prompts.to(clip.device))
        same, siblings = pairs.same_text(rows), pairs.siblings(rows)
        value, told = image_text_loss(model, images, embedded, positives=same, excluded=siblings)
        if names is None:
            return value, told
        scores = model.logit_scale.exp().clamp(max=LARGEST_SCALE) * images @ functional.normalize(names.float()).T
        labels = pairs.labels[rows].to(clip.device)
        # The mean over all rows, so that a batch without a class is no division by zero.
        classes = functional.cross_entropy(scores, labels, ignore_index=-1, reduction="sum") / len(rows)
        right = (scores.detach().argmax(dim=1) == labels).float().mean()
        return value + class_weight * classes, {**told, "class_accuracy": right}

    def export(folder: Path) -> None:
        if dropout is not None:
            model.visual.patch_dropout = nn.Identity()
        export_clip(clip, model, folder)

    return Job(module=model, loss=loss, rows=len(pairs), export=export)


def _layout(clip: Clip) -> torch.memory_format:
    """How images and kernels lie in memory: the channels of a pixel together, which is faster.

    Not on a CPU for towers with strided convolutions of one pixel (MobileCLIP): on large images torch 2.15 writes past
    the end of its memory in the gradient of those.
    """
    strided = any(
        isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1} and max(module.stride) > 1
        for module in clip.model.visual.modules()
    )
    return torch.contiguous_format if strided and clip.device.type == "cpu" else torch.channels_last


def augmented(pixels: UInt8[Tensor, "batch size size 3"], augment: Augment) -> UInt8[Tensor, "batch size size 3"]:
    """Shift (and mirror) each image at random; what comes in from outside repeats the border."""
    if augment == "none":
        return pixels
    count, size = pixels.shape[:2]
    reach = size // 8
    shifts = torch.randint(-reach, reach + 1, (2, count, 1))
    down, across = (torch.arange(size) + shifts).clamp(0, size - 1)
    if augment == "crop-flip":
        across = torch.where(torch.rand(count, 1) < 0.5, across.flip(1), across)
    return pixels[torch.arange(count)[:, None, None], down[:, :, None], across[:, None, :]]


def export_clip(clip: Clip, model: Any, folder: Path) -> None:
    """Write a trained model beside the rest of ``clip`` as an open_clip folder ``clip/`` in ``folder``."""
    (folder / CLIP_FOLDER).mkdir()
    save_clip(
        dataclasses.replace(clip, model=model.eval().to(memory_format=torch.contiguous_format)), folder / CLIP_FOLDER
    )


@contextlib.contextmanager
def quick_attention(device: torch.device) -> Iterator[None]:
    """On a CPU, attention as matrix products and a softmax: its backward pass is several times faster."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type != "cpu":
        yield
    else:
        with sdpa_kernel([SDPBackend.MATH]):
            yield


# -- heads -------------------------------------------------------------------------------------------------------


def clipcap_job(captioner: Captioner, pairs: Pairs, arm: Arm, *, meeting: Meeting | None, caption_tokens: int) -> Job:
    """Train a prefix captioner on embeddings (ClipCap, Mokady et al. 2021).

    Args:
        captioner: Trained in place.
        pairs: The captions.
        arm: Image embeddings.
        meeting: See `prepare_projection`.
        caption_tokens: Longer captions are cut, keeping the end-of-text token.
    """
    finish = prepare_projection(captioner, arm, meeting)
    device = captioner.mapping.state_dict()[next(iter(captioner.mapping.state_dict()))].device
    first = first_of_each(pairs.text_ids)
    table = captioner.tokenize([pairs.texts[row] for row in first.tolist()], limit=caption_tokens)

    def loss(rows: Tensor, step: int) -> Tensor:
        features, real = arm.draw(rows)
        share = parallel.ranks().share(len(rows))
        whole = table[pairs.text_ids[rows]]
        lengths = (whole != IGNORED).sum(dim=1)
        tokens = whole[share, : int(lengths[share].max())]
        mean = captioner(features[share].to(device), real[share].to(device), tokens.to(device))
        return parallel.add(mean * (int(lengths[share].sum()) / int(lengths.sum())))

    def export(folder: Path) -> None:
        finish()
        save_head(captioner, folder)

    return Job(module=captioner, loss=loss, rows=len(pairs), export=export)


def few_shots(pairs: Pairs, shots: int, *, seed: int) -> Int64[np.ndarray, " rows"]:
    """Captions of ``shots`` images of each class, drawn by ``seed``, one of an image; all of a class that has fewer."""
    chosen: dict[int, dict[int, int]] = {}
    labels, owners = pairs.labels.tolist(), pairs.owners.tolist()
    for row in np.random.default_rng(seed).permutation(len(pairs)).tolist():
        images = chosen.setdefault(labels[row], {})
        if len(images) < shots:
            images.setdefault(owners[row], row)
    return np.array(sorted(row for images in chosen.values() for row in images.values()), dtype=np.int64)


def probe_job(
    probe: Probe,
    pairs: Pairs,
    arm: Arm,
    *,
    meeting: Meeting | None,
    rows: int | Callable[[int], Int64[np.ndarray, " batch"]] | None = None,
) -> Job:
    """Train a class probe on embeddings, labelled by the class of the caption's image.

    Args:
        probe: Trained in place.
        pairs: The captions.
        arm: Image embeddings.
        meeting: See `prepare_projection`.
        rows: Captions to train on, as `loop.fit` takes them; None for all.

    Raises:
        InputError: A caption's image has no class.
    """
    if bool((pairs.labels < 0).any()):
        row = int((pairs.labels < 0).nonzero()[0])
        raise InputError(
            f"the image of caption {pairs.texts[row][:60]!r} has no class", hint="linear-probe needs labelled data."
        )
    finish = prepare_projection(probe, arm, meeting)

    def loss(rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        features, real = arm.draw(rows)
        device = probe.linear.weight.device
        logits = probe(features.to(device), real.to(device))
        labels = pairs.labels[rows].to(device)
        accuracy = (logits.detach().argmax(dim=1) == labels).float().mean()
        return functional.cross_entropy(logits, labels), {"accuracy": accuracy}

    def export(folder: Path) -> None:
        finish()
        save_head(probe, folder)

    return Job(module=probe, loss=loss, rows=len(pairs) if rows is None else rows, export=export)


@torch.no_grad()
def zero_shot_probe(clip: Clip, pairs: Pairs) -> Probe:
    """The probe that needs no training: each class is the mean embedding of its captions (Radford et al. 2021).

    A class that no caption belongs to is never the answer.
    """
    probe = Probe(clip.dim, pairs.class_names).to(clip.device)
    first = first_of_each(pairs.text_ids)
    embedded = torch.cat([clip.encode_texts([pairs.texts[row] for row in rows.tolist()]) for rows in first.split(256)])
    labels = pairs.labels[first].to(clip.device)
    for row in range(len(pairs.class_names)):
        if not bool((labels == row).any()):
            probe.linear.bias[row] = NEVER
            continue
        centre = functional.normalize(embedded[labels == row].mean(dim=0), dim=0)
        probe.linear.weight[row] = clip.model.logit_scale.exp() * centre / clip.dim**0.5
    return probe


def prepare_projection(head: Head, arm: Arm, meeting: Meeting | None) -> Any:
    """Train only the projections of the flows that the arm shows; returns what to do after training.

    An arm without real images leaves the real projection to be fitted to the ``meeting`` (`DualProjection.meet`).
    """
    projection = head.projection
    if projection is None:
        return lambda: None
    projection.real.requires_grad_(True in arm.flows)
    projection.generated.requires_grad_(False in arm.flows)
    if True in arm.flows:
        return lambda: None
    assert meeting is not None, "an arm without real images needs paired embeddings"
    return lambda: projection.meet(
        functional.normalize(meeting.real.float(), dim=-1), functional.normalize(meeting.generated.float(), dim=-1)
    )
