"""The arms of an experiment: the same captions, seen with real or generated images of one flow or the other.

Flows: real images go through f_r; generated images through f_g when aligned, and through f_r, as if they were real,
when naive (paper, Algorithm 1). The arm ``mixed`` shows real and aligned images.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gmail_cli.components.captions import Dataset, Kind
from gmail_cli.components.embedding import embed_images, embed_texts, patch_tokens
from gmail_cli.components.encoders import Clip
from gmail_cli.components.images import GeneratedSet, Preprocess, batches
from gmail_cli.components.pairs import Candidates, Pairs, pair
from gmail_cli.errors import InputError

ArmName: TypeAlias = Literal["none", "texts", "real", "generated-naive", "generated-aligned", "mixed"]
ViewName: TypeAlias = Literal["texts", "real", "naive", "aligned"]
Fill: TypeAlias = Callable[[int, int], np.ndarray]
Cache: TypeAlias = Callable[[str, tuple[int, ...], str, Fill], np.ndarray]
"""``cache(name, shape, dtype, fill)``: the array that ``fill(start, stop)`` gives row by row, computed once."""
Features: TypeAlias = Callable[[ViewName, Sequence[str], Fill], np.ndarray]
"""``features(view, identities, fill)``: the embeddings that ``fill`` gives of the images with these SHA-256, from
wherever they were computed before."""

SHOWN: dict[ArmName, tuple[ViewName, ...]] = {
    "texts": ("texts",),
    "real": ("real",),
    "generated-naive": ("naive",),
    "generated-aligned": ("aligned",),
    "mixed": ("real", "aligned"),
}
"""What an arm shows; the arm ``none`` shows nothing."""


@dataclass(frozen=True, eq=False)
class View:
    """Images, or their embeddings, of one flow.

    Attributes:
        values: A row for each image.
        candidates: Which rows show a caption.
        real: Whether they are of the real flow.
    """

    values: Tensor
    candidates: Candidates
    real: bool


@dataclass(frozen=True, eq=False)
class Arm:
    """What an arm of the experiment shows: one view, or a mixture of a real and a generated one.

    Attributes:
        views: One or two views.
        share: Probability of the first view, where there are two.
        noise: Standard deviation of Gaussian noise that is added to every component of what is drawn.
    """

    views: tuple[View, ...]
    share: float = 1.0
    noise: float = 0.0

    def draw(self, rows: Int[Tensor, " batch"]) -> tuple[Tensor, Bool[Tensor, " batch"]]:
        """An image (or embedding) for each caption of a batch, and whether it is of the real flow."""
        last = self.views[-1]
        values = last.values[last.candidates.draw(rows).to(last.values.device)]
        real = torch.full((len(rows),), last.real)
        if len(self.views) == 2:
            first = self.views[0]
            others = first.values[first.candidates.draw(rows).to(first.values.device)]
            chosen = torch.rand(len(rows)) < self.share
            mask = chosen.to(values.device).view(-1, *[1] * (values.ndim - 1))
            values = torch.where(mask, others, values)
            real = torch.where(chosen, first.real, real)
        if self.noise:
            values = values + self.noise * torch.randn(values.shape).to(values.device)
        return values, real

    @property
    def flows(self) -> frozenset[bool]:
        """The flows shown: True for real, False for generated."""
        return frozenset(view.real for view in self.views)


@dataclass(frozen=True, eq=False)
class Meeting:
    """Paired embeddings of both flows, to fit the projection of a flow that the arm does not show."""

    real: Float[Tensor, "pairs dim"]
    generated: Float[Tensor, "pairs dim"]

    @classmethod
    def of(cls, real: View, generated: View, pairs: Pairs) -> Meeting:
        """For each caption one image of either flow."""
        rows = torch.arange(len(pairs))
        draws = (view.candidates.draw(rows, generator=torch.Generator().manual_seed(0)) for view in (real, generated))
        first, second = (
            view.values[rows.to(view.values.device)] for view, rows in zip((real, generated), draws, strict=True)
        )
        return cls(first, second)


class Material:
    """What an experiment trains on; images are embedded or decoded when an arm first shows them, and then kept.

    Args:
        dataset: The real images and their captions.
        generated: The generated images, where there are any.
        kinds: Kinds of captions to train on.
        f_r: Loads the encoder of real images.
        f_g: Loads the encoder of generated images.
        mix_ratio: Share of real images in the arm ``mixed``.
        device: Where embeddings are kept.
        workers: Threads that decode images.
        cache: Keeps decoded images.
        features: Keeps embeddings.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        generated: GeneratedSet | None,
        kinds: Sequence[Kind],
        f_r: Callable[[], Clip],
        f_g: Callable[[], Clip],
        mix_ratio: float,
        device: torch.device,
        workers: int,
        cache: Cache,
        features: Features,
    ) -> None:
        self.dataset, self.generated, self.device = dataset, generated, device
        self.pairs = pair(dataset, generated=generated.rows if generated else None, kinds=kinds)
        self._f_r, self._f_g = f_r, f_g
        self._mix_ratio, self._workers, self._cache, self._features = mix_ratio, workers, cache, features
        self._views: dict[str, View] = {}

    @functools.cached_property
    def clip(self) -> Clip:
        """f_r, with its text tower."""
        return self._f_r()

    @functools.cached_property
    def aligned_clip(self) -> Clip:
        """f_g; not needed where its embeddings are there already."""
        return self._f_g()

    def embedded(self, arm: ArmName) -> Arm:
        """Embeddings of the images that an arm shows; of the captions themselves for ``texts``."""
        return Arm(tuple(self._embeddings(view) for view in SHOWN[arm]), share=self._mix_ratio)

    def patches(self, arm: ArmName, *, grid: int) -> Arm:
        """Patch tokens of the images that an arm shows: half precision (images, tokens, width), kept on disk."""
        return Arm(tuple(self._patches(view, grid) for view in SHOWN[arm]), share=self._mix_ratio)

    def meeting(self, arm: ArmName) -> Meeting | None:
        """Real and generated embeddings of the same captions, for the arms of generated images alone."""
        if {"real", "texts"} & set(SHOWN[arm]):
            return None
        return Meeting.of(self._embeddings("real"), self._embeddings(SHOWN[arm][0]), self.pairs)

    def pixels(self, arm: ArmName, preprocess: Preprocess) -> Arm:
        """The images that an arm shows: uint8 (rows, size, size, 3), scaled and cropped, not normalised."""
        views = tuple(self._pixels(preprocess, real=view == "real") for view in SHOWN[arm])
        return Arm(views, share=self._mix_ratio)

    def identities(self, view: ViewName) -> list[str]:
        """SHA-256 of the bytes of each image that a view shows, in order.

        Raises:
            InputError: There are no such images.
        """
        _, rows, _ = self._shown(real=view == "real")
        if view != "real":
            assert self.generated is not None
            return [self.generated.rows[row].sha256 for row in rows]
        return [each for row in rows if (each := self.dataset.image_identities[row]) is not None]

    def _embeddings(self, view: ViewName) -> View:
        if view not in self._views:
            if view == "texts":
                self._views[view] = self._texts()
                return self._views[view]
            image_bytes, rows, candidates = self._shown(real=view == "real")

            def fill(start: int, stop: int) -> np.ndarray:
                clip = self.aligned_clip if view == "aligned" else self.clip
                return embed_images(clip, lambda i: image_bytes(rows[start + i]), stop - start, workers=self._workers)

            values = self._features(view, self.identities(view), fill)
            if values.shape[1] != self.clip.dim:
                raise InputError(
                    f"f_g embeds in {values.shape[1]} dimensions, f_r ({self.clip.name}) in {self.clip.dim}",
                    hint="Align from the same model.clip.",
                )
            self._views[view] = View(torch.from_numpy(values).to(self.device), candidates, real=view == "real")
        return self._views[view]

    def _texts(self) -> View:
        """Each different caption through the text tower, in the place of a real image."""
        numbers = self.pairs.text_ids.tolist()
        texts = list(dict.fromkeys(self.pairs.texts))

        def fill(start: int, stop: int) -> np.ndarray:
            return embed_texts(self.clip, texts[start:stop])[0]

        values = torch.from_numpy(self._cache("embeddings-texts", (len(texts), self.clip.dim), "float32", fill))
        rows = [[row] for row in range(len(texts))]
        return View(values.to(self.device), Candidates.of(rows[number] for number in numbers), real=True)

    def _patches(self, view: ViewName, grid: int) -> View:
        name = f"patches-{view}-{grid}"
        if name not in self._views:
            clip = self.aligned_clip if view == "aligned" else self.clip
            image_bytes, rows, candidates = self._shown(real=view == "real")
            size = clip.preprocess.size
            shape = clip.encode_patches(np.zeros((1, 3, size, size), dtype=np.uint8), grid=grid).shape[1:]

            def fill(start: int, stop: int) -> np.ndarray:
                return patch_tokens(
                    clip, lambda i: image_bytes(rows[start + i]), stop - start, grid=grid, workers=self._workers
                )

            values = torch.from_numpy(self._cache(name, (len(rows), *shape), "float16", fill))
            self._views[name] = View(values, candidates, real=view == "real")
        return self._views[name]

    def _pixels(self, preprocess: Preprocess, *, real: bool) -> View:
        plain = dataclasses.replace(preprocess, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
        name = f"pixels-{'real' if real else 'generated'}-{plain.digest[:8]}"
        if name not in self._views:
            image_bytes, rows, candidates = self._shown(real=real)

            def fill(start: int, stop: int) -> np.ndarray:
                read = batches(
                    lambda i: image_bytes(rows[i]),
                    [range(start, stop)],
                    preprocess=preprocess,
                    batch_size=256,
                    workers=self._workers,
                )
                return np.concatenate([batch.transpose(0, 2, 3, 1) for batch in read])

            shape = (len(rows), preprocess.size, preprocess.size, 3)
            values = torch.from_numpy(self._cache(name, shape, "uint8", fill))
            self._views[name] = View(values, candidates, real=real)
        return self._views[name]

    def _shown(self, *, real: bool) -> tuple[Callable[[int], bytes], Sequence[int], Candidates]:
        """Images of a flow: their bytes, the rows that are shown, and the candidates counted among those."""
        source = self.dataset if real else self.generated
        candidates = self.pairs.real if real else self.pairs.generated
        if source is None or candidates is None:
            raise InputError(
                f"{self.dataset.name} lacks the real image of some caption that is trained on",
                hint="Give the images with data.train_images, or leave out what needs real ones.",
            )
        rows, among = candidates.used()
        return source.image_bytes, rows.tolist(), among
