"""CLIPScore and RefCLIPScore of captions, from embeddings (Hessel et al. 2021)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from gmail_cli.errors import InputError

WEIGHT = 2.5
PROMPT = "A photo depicts "
"""What published scores put before every caption and reference (section 3)."""


def clip_score(images: Float[np.ndarray, "n dim"], *, captions: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, " n"]:
    """2.5 max(cos, 0) of each image and its caption; unit rows.

    Raises:
        InputError: Unless there is one caption for each image.
    """
    if images.shape != captions.shape:
        raise InputError(
            f"images have shape {images.shape}, captions {captions.shape}; row i of both is one pair",
            hint="Give one caption for each image, by the same model.",
        )
    return WEIGHT * np.maximum((images.astype(np.float64) * captions).sum(axis=1), 0)


def reference_clip_score(
    scores: Float[np.ndarray, " n"],
    *,
    captions: Float[np.ndarray, "n dim"],
    references: Float[np.ndarray, "m dim"],
    owners: Int[np.ndarray, " m"],
) -> Float[np.ndarray, " n"]:
    """Harmonic mean of each CLIPScore and the highest cosine, at least 0, of its caption with a reference.

    Args:
        scores: Of :func:`clip_score`.
        captions: Unit rows.
        references: Unit rows.
        owners: For each reference the row of its image.

    Raises:
        InputError: An image has no reference.
    """
    missing = np.setdiff1d(np.arange(len(captions)), owners)
    if len(missing):
        raise InputError(
            f"{len(missing)} images have no reference, first row {missing[0]}", hint="Give references for all images."
        )
    best = np.zeros(len(captions))
    np.maximum.at(best, owners, (captions[owners].astype(np.float64) * references).sum(axis=1))
    total = scores + best
    return np.divide(2 * scores * best, total, out=np.zeros(len(best)), where=total > 0)
