"""CLIP encoders: what a batch of images or texts becomes in them, and where and how precisely they compute.

A :class:`Clip` is an open_clip model, or one in transformers format (``transformers_models.py``), with its tokenizer,
its preprocessing and a digest of its content. ``clip_files.py`` loads and saves it, ``embedding.py`` embeds whole sets
with it, ``tuning.py`` tunes a copy of its image tower.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from gmail_cli.components import compilation, transformers_models
from gmail_cli.components.images import Preprocess
from gmail_cli.components.pixels import normalised
from gmail_cli.errors import InputError, SetupError, UsageError

Precision: TypeAlias = Literal["fp32", "bf16"]

_PROBE = "".join(map(chr, range(32, 127))) + " A photo of two tabby cats, and one dog."
_POOLS_AT_END = frozenset({"argmax", "eos"})


@dataclass(frozen=True)
class Tokens:
    """Texts as a tower reads them.

    Attributes:
        ids: Token ids, padded to the tower's context length.
        truncated: Which texts were longer than that.
    """

    ids: Int[Tensor, "batch length"]
    truncated: Bool[Tensor, " batch"]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A model in eval mode with all that is needed to embed with it.

    Attributes:
        model: The open_clip module (``CLIP`` or ``CustomTextCLIP``), or one of ``transformers_models``; fp32 weights.
        tokenizer: Of the text tower; None where there is none.
        preprocess: From stored image bytes to what the image tower reads.
        config: Content of ``open_clip_config.json``: ``model_cfg`` and ``preprocess_cfg``; of a model in transformers
            format also ``transformers``, its ``config.json``.
        name: How the model was asked for.
        digest: SHA-256 over config and weights; ``clip_files.model_digest`` gives the same without loading.
        device: Where it computes.
        precision: ``bf16`` computes under autocast, or in bf16 weights (:func:`rounded`); embeddings are fp32.
    """

    model: Any
    tokenizer: Any
    preprocess: Preprocess
    config: Mapping[str, Any]
    name: str
    digest: str
    device: torch.device
    precision: Precision = "fp32"

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return int(self.config["model_cfg"]["embed_dim"])

    @property
    def context_length(self) -> int:
        """Most tokens the text tower reads, start and end included."""
        return int(self.model.context_length)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(iter(self.model.parameters())).dtype

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256 over what the tokenizer makes of a probe text: equal for tokenizers that read alike."""
        return hashlib.sha256(self.tokenizer([_PROBE]).numpy().tobytes()).hexdigest()

    @property
    def reads_texts(self) -> bool:
        """Whether there is a text tower."""
        return self.tokenizer is not None

    @functools.cached_property
    def vocabulary(self) -> int:
        """How many tokens the text tower knows."""
        text = getattr(self.model, "text", self.model)
        return max(each.num_embeddings for each in text.modules() if isinstance(each, nn.Embedding))

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids of ``texts``; what does not fit is cut, keeping the end-of-text token last.

        Raises:
            InputError: The tokenizer is another model's, with tokens that this text tower does not know.
            UsageError: There is no text tower.
        """
        if not self.reads_texts:
            raise UsageError(
                f"{self.name} has no text tower, and this needs one",
                hint="Take a CLIP or SigLIP as model.clip. A tower of images alone serves gmail align, and the tasks "
                "linear-probe, clipcap and llava on every arm but none.",
            )
        ids = self.tokenizer(list(texts))
        if len(ids) and int(ids.max()) >= self.vocabulary:
            raise InputError(
                f"the tokenizer of {self.name} gives token {int(ids.max())} for {texts[0][:40]!r} or a text beside it, "
                f"and its text tower knows {self.vocabulary} tokens",
                hint="It is another model's: give the folder the tokenizer that the model was trained with.",
            )
        truncated = torch.zeros(len(ids), dtype=torch.bool)
        full = torch.nonzero(self.lengths(ids) == self.context_length).flatten().tolist()
        if full:
            longer = self.tokenizer([texts[row] for row in full], context_length=self.context_length + 1)
            truncated[full] = self.lengths(longer) > self.context_length
        return Tokens(ids=ids, truncated=truncated)

    def lengths(self, ids: Int[Tensor, "batch length"]) -> Int[Tensor, " batch"]:
        """Number of tokens of each row without its padding."""
        if _pool_type(self.model) in _POOLS_AT_END:
            return _ends(self.model, ids) + 1
        plain = getattr(self.tokenizer, "tokenizer", None)
        pad = getattr(plain, "pad_token_id", 0)
        ends = int(pad == getattr(plain, "eos_token_id", None))  # one of the padding tokens is the end of the text
        return ((ids != pad).sum(dim=-1) + ends).clamp(max=ids.shape[1])

    @torch.inference_mode()
    def encode_images(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit fp32 embeddings of preprocessed images."""
        with self.autocast():
            features = self.model.encode_image(pixels.to(self.device, self.dtype))
        return nn.functional.normalize(features.float(), dim=-1)

    def encode_pixels(self, pixels: UInt8[np.ndarray, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit fp32 embeddings of decoded and scaled images, not normalised yet."""
        with torch.inference_mode():
            values = _upload(torch.from_numpy(pixels), self.device)
            return self.encode_images(normalised(values, preprocess=self.preprocess))

    @torch.inference_mode()
    def encode_patches(
        self, pixels: UInt8[np.ndarray, "batch 3 height width"], *, grid: int = 0
    ) -> Float[Tensor, "batch tokens width"]:
        """Patch tokens of decoded and scaled images, fp32, row by row of the picture.

        Of a vision transformer the last layer but one, without its class token, as LLaVA takes them (Liu et al. 2023);
        of other towers the cells of their last feature map.

        Args:
            pixels: As for :meth:`encode_pixels`.
            grid: Average them to so many rows and columns; 0 keeps all.

        Raises:
            UsageError: The tower has fewer.
        """
        values = normalised(_upload(torch.from_numpy(pixels), self.device), preprocess=self.preprocess)
        with self.autocast():
            if isinstance(self.model, transformers_models.Joint | transformers_models.ImagesOnly):
                maps = transformers_models.patch_maps(self.model, values).float()
            else:
                maps = self.model.visual.forward_intermediates(
                    values, indices=[_token_layer(self.model.visual)], stop_early=True, intermediates_only=True
                )["image_intermediates"][0].float()
        if grid:
            if min(maps.shape[2:]) < grid:
                raise UsageError(
                    f"train.visual_grid = {grid}: {self.name} has {maps.shape[2]} by {maps.shape[3]} patches",
                    hint="Ask for no more than there are; 0 takes them all.",
                )
            maps = nn.functional.adaptive_avg_pool2d(maps, grid)
        return maps.flatten(2).transpose(1, 2)

    @torch.inference_mode()
    def encode_tokens(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch dim"]:
        """Unit fp32 embeddings of token ids; those of a GPU's model are best given on the CPU."""
        length = text_length(self.model, ids)
        with self.autocast():
            features = text_features(self.model, _upload(ids[:, :length], self.device), length=length)
        return nn.functional.normalize(features.float(), dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """Unit fp32 embeddings of texts, in one batch."""
        return self.encode_tokens(self.tokenize(texts).ids)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context to run the model in: bf16 autocast where fp32 weights are to compute in bf16."""
        if self.precision == "fp32" or self.dtype == torch.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def rounded(clip: Clip) -> Clip:
    """The model as it embeds in its precision: with ``bf16`` every weight is rounded to bf16.

    For models that are not trained: autocast would round the weights anew in every batch, and leaves normalisation and
    softmax in fp32, which on a CPU costs what the rest gains.

    Args:
        clip: Its own model is rounded, not a copy; in fp32 nothing happens.
    """
    if clip.precision == "bf16":
        clip.model.to(torch.bfloat16)
    return clip


def require_precision(key: str, precision: Precision, *, device: torch.device) -> None:
    """Refuse arithmetic that the device has no instructions for.

    Args:
        key: The profile's key, for the message.
        precision: Its value.
        device: Where it would compute.

    Raises:
        UsageError: bf16 on a CPU without AVX-512 (or another set that oneDNN computes bf16 with).
    """
    if precision == "bf16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise UsageError(f"{key} = 'bf16': this CPU has no fast bf16, some 80 times slower than fp32", hint="Use fp32.")


def pick_device(choice: str) -> torch.device:
    """The device of a ``runtime.device`` setting; ``auto`` takes a GPU when torch sees one.

    Raises:
        SetupError: A device this machine lacks.
    """
    if choice == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (choice == "cuda" and not torch.cuda.is_available()) or (
        choice == "mps" and not torch.backends.mps.is_available()
    ):
        raise SetupError(f"runtime.device = {choice!r}: torch sees none", hint="Use auto or cpu.")
    return torch.device(choice)


def describe_device(device: torch.device) -> str:
    """A device in words, for a manifest."""
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def _token_layer(visual: Any) -> int:
    """Which layer's output, counted from the end, is taken as patch tokens."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    trunk = visual.trunk if isinstance(visual, TimmModel) else None
    plain = isinstance(visual, VisionTransformer) or (hasattr(trunk, "blocks") and hasattr(trunk, "patch_embed"))
    return -2 if plain else -1


# -- text towers -------------------------------------------------------------------------------------------------


def text_length(model: Any, ids: Int[Tensor, "batch length"]) -> int:
    """How many positions of these texts can matter.

    In a causal tower that pools at the end-of-text token nothing after that token has any influence, so a batch ends at
    its last end-of-text token. Other towers read all positions.
    """
    return int(_ends(model, ids).max()) + 1 if _trims(model) and len(ids) else ids.shape[1]


def text_features(
    model: Any, ids: Int[Tensor, "batch length"], *, length: int | None = None
) -> Float[Tensor, "batch dim"]:
    """Text features before normalisation, differentiable, reading only the positions that can matter.

    A compiled tower reads some more rows and positions, so that it is shown few shapes.

    Args:
        model: The open_clip module.
        ids: Token ids, on the model's device.
        length: :func:`text_length` of ``ids``, where it is known without asking the device.
    """
    tower = getattr(model, "text", model)
    count, ids = len(ids), compilation.filled(ids, model=tower)
    if not _trims(model):
        return model.encode_text(ids)[:count]
    from open_clip.transformer import text_global_pool

    length = text_length(model, ids) if length is None else length
    length = compilation.rounded(length, model=tower, most=ids.shape[1])
    ids = ids[:, :length]
    dtype = tower.transformer.get_cast_dtype()
    hidden = tower.token_embedding(ids).to(dtype) + tower.positional_embedding[:length].to(dtype)
    hidden = tower.ln_final(tower.transformer(hidden, attn_mask=tower.attn_mask[:length, :length]))
    pooled = text_global_pool(hidden, ids, _pool_type(model), eos_token_id=_eos_id(model))[:count]
    if isinstance(tower.text_projection, nn.Module):
        return tower.text_projection(pooled)
    return pooled if tower.text_projection is None else pooled @ tower.text_projection


def text_features_by_length(
    model: Any, ids: Int[Tensor, "batch length"], *, bucket: int = 64
) -> Float[Tensor, "batch dim"]:
    """:func:`text_features` with texts of like length read together, so that few padded positions are computed.

    Worth it on a CPU, where captions of a batch differ widely in length; the order of the result is that of ``ids``.
    """
    if not _trims(model) or len(ids) <= bucket:
        return text_features(model, ids)
    order = _ends(model, ids).argsort(stable=True)
    parts = torch.cat([text_features(model, ids[rows]) for rows in order.split(bucket)])
    return parts[order.argsort()]


def _pool_type(model: Any) -> str:
    tower = getattr(model, "text", model)
    return str(getattr(tower, "text_pool_type", getattr(tower, "pool_type", "")))


def _eos_id(model: Any) -> int | None:
    tower = getattr(model, "text", model)
    return getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))


def _trims(model: Any) -> bool:
    tower = getattr(model, "text", model)
    causal = isinstance(getattr(tower, "attn_mask", None), Tensor) and not getattr(tower, "use_pad_mask", False)
    return causal and getattr(tower, "cls_emb", None) is None and _pool_type(model) in _POOLS_AT_END


def _ends(model: Any, ids: Int[Tensor, "batch length"]) -> Int[Tensor, " batch"]:
    """Position of each row's first end-of-text token."""
    return (ids if _pool_type(model) == "argmax" else (ids == _eos_id(model)).int()).argmax(dim=-1)


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a GPU is given it without waiting for what it is doing."""
    if device.type != "cuda" or values.device.type == "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
