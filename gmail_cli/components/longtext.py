"""Text towers that read long captions: CLIP's positions stretched or rotary, long and short captions learned together.

Long-CLIP (Zhang et al. 2024): the first positions are well trained and stay, the others are interpolated; long captions
meet whole image features, short ones only the principal components of the batch's. Sentences of a long caption as
further short captions are DreamLIP's (Zheng et al. 2024). Rotary positions, in a tower that is first distilled from the
one that it replaces, are TULIP's (Najdenkoska et al. 2025).
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from gmail_cli.components import parallel, rotary
from gmail_cli.components.arms import Arm
from gmail_cli.components.clip_files import build_clip, tensors_digest
from gmail_cli.components.encoders import Clip, text_features, text_features_by_length
from gmail_cli.components.loop import Job
from gmail_cli.components.pairs import Pairs
from gmail_cli.components.tasks import export_clip, image_text_loss, quick_attention
from gmail_cli.errors import InputError, UsageError

ShortTexts: TypeAlias = Literal["captions", "sentences", "both"]
Positions: TypeAlias = Literal["stretched", "rotary"]


def stretch(positions: Float[Tensor, "positions width"], *, length: int, keep: int) -> Float[Tensor, "length width"]:
    """Position embeddings for ``length`` positions: the first ``keep`` as they are, the others linearly interpolated.

    77 to 248 keeping 20 stretches by exactly four, as Long-CLIP does; past the last known position the last slope
    goes on.

    Args:
        positions: Of the tower as it came.
        length: Positions wanted.
        keep: Positions that stay.
    """
    rest = positions[keep:]
    place = torch.arange(length - keep, dtype=torch.float64) * len(rest) / (length - keep)
    left = place.long().clamp_max(len(rest) - 2)
    share = (place - left).to(positions).unsqueeze(1)
    return torch.cat([positions[:keep], torch.lerp(rest[left], rest[left + 1], share)])


def lengthened(clip: Clip, *, length: int, keep: int = 20, positions: Positions = "stretched") -> Clip:
    """``clip`` with a text tower that reads ``length`` tokens.

    Stretched, it is equal to ``clip`` on texts of at most ``keep`` tokens. With rotary positions it has everything else
    of ``clip`` and says nothing sensible before it is trained.

    Raises:
        UsageError: The tower reads as much already, has too few positions to keep, or no learned ones.
    """
    had = clip.context_length
    keep = 1 if positions == "rotary" else keep
    if length <= had or not 0 < keep <= had - 2:
        raise UsageError(
            f"train.context_length = {length} and train.keep_positions = {keep}: {clip.name} reads {had} tokens",
            hint=f"Lengthen to more than {had}, and keep from 1 to {had - 2}.",
        )
    state = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    name = next((name for name in ("positional_embedding", "text.positional_embedding") if name in state), None)
    if name is None:
        raise UsageError(f"the text tower of {clip.name} has no learned positions to stretch", hint="Take a CLIP.")
    config = copy.deepcopy(dict(clip.config))
    config["model_cfg"]["text_cfg"]["context_length"] = length
    if positions == "rotary":
        config["model_cfg"]["text_cfg"][rotary.KEY] = rotary.BASE
        state[name] = torch.zeros(length, state[name].shape[1])
    else:
        state[name] = stretch(state[name], length=length, keep=keep)
    tokenizer = copy.copy(clip.tokenizer)
    tokenizer.context_length = length
    longer = build_clip(
        config, name=f"{clip.name} to {length}", tokenizer=tokenizer, device=clip.device, precision=clip.precision
    )
    longer.model.load_state_dict(state)
    return dataclasses.replace(longer, digest=tensors_digest(config, longer.model.state_dict()))


def sentences(text: str) -> list[str]:
    """A text's sentences, as they end in a full stop, question or exclamation mark."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def short_texts(
    pairs: Pairs, *, owners: Sequence[str], captions: Mapping[str, Sequence[str]], choice: ShortTexts
) -> list[tuple[str, ...]]:
    """The short texts of each long caption: its image's short captions, its own sentences, or both.

    Args:
        pairs: The long captions.
        owners: The id of each one's image record.
        captions: Short captions by image record.
        choice: Which to take.

    Raises:
        InputError: Some long caption has none.
    """
    found = []
    for text, owner in zip(pairs.texts, owners, strict=True):
        own = tuple(captions.get(owner, ())) if choice != "sentences" else ()
        own += tuple(sentences(text)) if choice != "captions" else ()
        if not own:
            raise InputError(
                f"the image of the long caption {text[:60]!r} has no short caption",
                hint="Set train.short_texts=sentences, or train.short_weight=0.",
            )
        found.append(own)
    return found


def coarse(images: Float[Tensor, "batch dim"], *, components: int) -> Float[Tensor, "batch dim"]:
    """Unit embeddings without their details: the batch's mean and first principal components only.

    Args:
        images: Unit embeddings.
        components: How many; as many as there are leave the embeddings as they are.
    """
    mean = images.mean(dim=0)
    centred = images - mean
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:components]
    return functional.normalize(mean + centred @ axes.T @ axes, dim=-1)


class _Shorts:
    """Short texts tokenised once; one of each row's is drawn at every step."""

    def __init__(self, clip: Clip, texts: Sequence[Sequence[str]]) -> None:
        numbers: dict[str, int] = {}
        rows = [[numbers.setdefault(text, len(numbers)) for text in own] for own in texts]
        self.ids = clip.tokenize(list(numbers)).ids.to(torch.int32)
        self._start = torch.tensor([0, *map(len, rows)]).cumsum(0)
        self._texts = torch.tensor([number for own in rows for number in own])

    def draw(self, rows: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """The number of a text for each row."""
        start, stop = self._start[rows], self._start[rows + 1]
        return self._texts[start + (torch.rand(len(rows), dtype=torch.float64) * (stop - start)).long()]


def long_clip_job(
    clip: Clip,
    pairs: Pairs,
    arm: Arm | None,
    *,
    shorts: Sequence[Sequence[str]] | None,
    short_weight: float = 1.0,
    components: int = 32,
    teacher: Clip | None = None,
    distilled: int = 0,
) -> Job:
    """Train a lengthened text tower on long captions, and on short ones against coarse image embeddings.

    The image tower is frozen, as everywhere else: its embeddings come from f_r or f_g.

    Args:
        clip: From :func:`lengthened`; stays as it is.
        pairs: The long captions.
        arm: Image embeddings; None to export the lengthened tower as it is.
        shorts: Short texts of each long caption; None leaves the second loss out.
        short_weight: Weight of the second loss.
        components: Of :func:`coarse`; 0 shows short texts the whole embeddings.
        teacher: The tower before it was lengthened: in the first steps the new one learns to say what it says (cosine)
            of the captions, cut to what it reads. The loss curve then holds nothing but the loss.
        distilled: How many steps.
    """
    model = copy.deepcopy(clip.model)
    for name, parameter in model.named_parameters():
        fixed = name.startswith("visual.")
        fixed |= teacher is not None and name.endswith("positional_embedding")
        parameter.requires_grad_(not fixed)
    heard = None if teacher is None else teacher.tokenize(pairs.texts).ids.to(torch.int32)
    longs = clip.tokenize(pairs.texts).ids.to(torch.int32)
    brief = None if shorts is None else _Shorts(clip, shorts)
    read = text_features_by_length if clip.device.type == "cpu" else text_features

    def embed(ids: Tensor) -> Tensor:
        own = ids[parallel.ranks().share(len(ids))].long().to(clip.device)
        with quick_attention(clip.device):
            return parallel.gather(functional.normalize(read(model, own).float(), dim=-1), rows=len(ids))

    def loss(rows: Tensor, step: int) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        if teacher is None or heard is None:
            return contrast(rows)
        if step >= distilled:
            return contrast(rows)[0]
        with torch.no_grad():
            wanted = functional.normalize(read(teacher.model, heard[rows].long().to(clip.device)).float(), dim=-1)
        return 1 - (embed(heard[rows]) * wanted).sum(dim=-1).mean()

    def contrast(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert arm is not None
        drawn, _ = arm.draw(rows)
        images = drawn.to(clip.device)
        value, told = image_text_loss(
            model, images, embed(longs[rows]), positives=pairs.same_text(rows), excluded=pairs.siblings(rows)
        )
        if brief is None:
            return value, told
        texts = brief.draw(rows)
        same = texts[:, None] == texts[None, :]
        owners = pairs.owners[rows]
        short, brief_told = image_text_loss(
            model,
            coarse(images, components=components) if components else images,
            embed(brief.ids[texts]),
            positives=same,
            excluded=(owners[:, None] == owners[None, :]) & ~same,
        )
        told |= {"short_loss": short.detach(), "short_accuracy": brief_told["accuracy"]}
        return value + short_weight * short, told

    def export(folder: Path) -> None:
        export_clip(clip, model, folder)

    return Job(module=model, loss=loss, rows=len(pairs), export=export)
