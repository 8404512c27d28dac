"""With which real images a generated image is paired, and which images are kept out of alignment to judge it by."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from gmail_cli.errors import InputError

Method: TypeAlias = Literal["auto", "caption", "random", "nearest", "optimal-transport", "unpaired"]
ASSIGNED_AT_ONCE = 2000
"""Largest one-to-one assignment that optimal transport solves in one piece (its time grows with the cube)."""


@dataclass(frozen=True, eq=False)
class Pairing:
    """The real images each generated image may be paired with.

    Attributes:
        method: How they were found: ``caption``, ``random``, ``nearest``, ``optimal-transport`` or ``unpaired``.
        candidates: Real rows; those of generated row i are ``candidates[start[i] : start[i] + size[i]]``.
        start: Where each generated row's candidates begin.
        size: How many it has; above 1 one is drawn anew at each step.
    """

    method: str
    candidates: Int[np.ndarray, " candidates"]
    start: Int[np.ndarray, " generated"]
    size: Int[np.ndarray, " generated"]

    def rows(self, indices: Int[np.ndarray, " batch"], *, seed: int) -> Int[np.ndarray, " batch"]:
        """The real row of each generated row; ``seed`` decides where there is a choice."""
        drawn = np.random.default_rng(seed).random(len(indices))
        return self.candidates[self.start[indices] + (drawn * self.size[indices]).astype(np.int64)]

    def with_candidates(self, rows: Int[np.ndarray, " real"]) -> Pairing:
        """The same pairing where real image i of the pairing is row ``rows[i]`` of a larger table."""
        return dataclasses.replace(self, candidates=rows[self.candidates])


@dataclass(frozen=True)
class RealImage:
    """What pairing needs to know of a real image: its id, its captions' texts and its class."""

    id: str
    texts: frozenset[str]
    label: str | None = None


@dataclass(frozen=True)
class GeneratedFrom:
    """What pairing needs to know of a generated image: the caption it was drawn from, its owner and its class."""

    owner: str
    text: str
    label: str | None = None


def pair(
    generated: Sequence[GeneratedFrom],
    real: Sequence[RealImage],
    *,
    method: Method = "auto",
    generated_vectors: Float[np.ndarray, "generated dim"] | None = None,
    real_vectors: Float[np.ndarray, "real dim"] | None = None,
    seed: int = 0,
) -> Pairing:
    """Find the real images that each generated image is trained towards.

    ``caption`` takes the image that the caption describes (its owner). The others choose among all real images of the
    same caption text (or class, where no image has the text): ``random`` draws one anew each time, ``nearest`` takes
    the most similar under f_r, ``optimal-transport`` the one-to-one assignment of greatest total similarity.
    ``auto`` is ``caption`` where owners are at hand and ``random`` elsewhere. ``unpaired`` draws any real image at all.

    Args:
        generated: One entry for each generated image.
        real: One entry for each real image.
        method: See above.
        generated_vectors: f_r of the generated images; for ``nearest`` and ``optimal-transport``.
        real_vectors: f_r of the real images; likewise.
        seed: Of the pieces that a large assignment is cut into.

    Raises:
        InputError: Some generated image has no partner.
    """
    row_of = {image.id: row for row, image in enumerate(real)}
    owned = [row_of.get(image.owner, -1) for image in generated]
    if method == "auto":
        method = "caption" if owned and min(owned) >= 0 else "random"
    if method == "caption":
        _require_all(owned, generated, what="owner's image", hint="Set align.pairing=random.")
        return _fixed(method, np.array(owned, dtype=np.int64))

    if method == "unpaired":
        if not real:
            raise InputError("there are no real images to align with", hint="Give them as data.train.")
        every = np.arange(len(real), dtype=np.int64)
        return Pairing(
            method, every, np.zeros(len(generated), dtype=np.int64), np.full(len(generated), len(real), dtype=np.int64)
        )

    groups = _groups(real)
    keys = [_key(image, groups) for image in generated]
    _require_all([0 if key else -1 for key in keys], generated, what="real image of its caption", hint="")
    members: dict[tuple[str, str], list[int]] = {}
    for row, key in enumerate(keys):
        members.setdefault(key or ("", ""), []).append(row)
    if method == "random":
        start, size = np.zeros(len(keys), dtype=np.int64), np.zeros(len(keys), dtype=np.int64)
        pieces: list[int] = []
        for key, rows in members.items():
            start[rows], size[rows] = len(pieces), len(groups[key])
            pieces += groups[key]
        return Pairing(method, np.array(pieces, dtype=np.int64), start, size)

    assert generated_vectors is not None, "nearest and optimal-transport need f_r of both"
    assert real_vectors is not None, "nearest and optimal-transport need f_r of both"
    chosen = np.full(len(keys), -1, dtype=np.int64)
    choose = _nearest if method == "nearest" else _assigned
    for key, rows in members.items():
        there = np.array(groups[key], dtype=np.int64)
        rng = np.random.default_rng(seed)
        chosen[rows] = there[choose(generated_vectors[rows], real_vectors[there], rng)]
    return _fixed(method, chosen)


def has_partner(generated: Sequence[GeneratedFrom], real: Sequence[RealImage]) -> Bool[np.ndarray, " generated"]:
    """Which generated images have their owner, or an image of their caption text or class, among ``real``."""
    ids, groups = {image.id for image in real}, _groups(real)
    return np.array([image.owner in ids or _key(image, groups) is not None for image in generated], dtype=bool)


def _groups(real: Sequence[RealImage]) -> dict[tuple[str, str], list[int]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for row, image in enumerate(real):
        for text in sorted(image.texts):
            groups.setdefault(("text", text), []).append(row)
        if image.label is not None:
            groups.setdefault(("label", image.label), []).append(row)
    return groups


def _key(image: GeneratedFrom, groups: Mapping[tuple[str, str], list[int]]) -> tuple[str, str] | None:
    wanted = [("text", image.text)] + ([("label", image.label)] if image.label is not None else [])
    return next((key for key in wanted if key in groups), None)


def _require_all(rows: Sequence[int], generated: Sequence[GeneratedFrom], *, what: str, hint: str) -> None:
    missing = [image for row, image in zip(rows, generated, strict=True) if row < 0]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(generated)} generated images have no {what} among the real images, "
            f"such as {missing[0].text!r} (owner {missing[0].owner!r})",
            hint=hint or "Give the real images of these captions as data.train.",
        )


def _fixed(method: str, rows: Int[np.ndarray, " generated"]) -> Pairing:
    return Pairing(method, rows, np.arange(len(rows)), np.ones(len(rows), dtype=np.int64))


def _nearest(
    generated: Float[np.ndarray, "generated dim"], real: Float[np.ndarray, "real dim"], _rng: np.random.Generator
) -> Int[np.ndarray, " generated"]:
    pieces = [generated[start : start + 1024] @ real.T for start in range(0, len(generated), 1024)]
    return np.concatenate([piece.argmax(axis=1) for piece in pieces])


def _assigned(
    generated: Float[np.ndarray, "generated dim"], real: Float[np.ndarray, "real dim"], rng: np.random.Generator
) -> Int[np.ndarray, " generated"]:
    """One-to-one within random pieces of at most ``ASSIGNED_AT_ONCE`` (minibatch optimal transport)."""
    from scipy.optimize import linear_sum_assignment

    step = min(len(real), ASSIGNED_AT_ONCE)
    order = rng.permutation(len(generated))
    left = rng.permutation(len(real))
    chosen = np.empty(len(generated), dtype=np.int64)
    for start in range(0, len(order), step):
        rows = order[start : start + step]
        if len(left) < len(rows):
            left = rng.permutation(len(real))
        there, left = left[:step], left[step:]
        _, best = linear_sum_assignment(generated[rows] @ real[there].T, maximize=True)
        chosen[rows] = there[best]
    return chosen


def held_out(identity: str, *, share: float, seed: int) -> bool:
    """Whether an image is kept out of training: about ``share`` of them, by a hash of seed and id.

    The same answer wherever it is asked, so that what comes later can judge by images alignment never saw.
    """
    digest = hashlib.sha256(f"align\x1f{seed}\x1f{identity}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
