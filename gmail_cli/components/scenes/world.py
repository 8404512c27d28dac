"""What a scene is, and how scene number i of a split is drawn from a seed.

Every scene is a function of (world seed, split, index) through SHA-256, so it does not depend on what was sampled
before it. A scene belongs to exactly one split: a hash of its *key* (kind, colour and place of the main object,
and the ground), all of which every caption states, decides which. Hence neither a description nor a caption text
of one split can occur in another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from gmail_cli.errors import UsageError

SPLITS = ("train", "val", "test")
CLASS_NAMES = ("ball", "cube", "cone", "cylinder", "ring", "star", "mushroom", "tree", "house", "car")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
MATERIALS = ("matte", "shiny", "striped", "spotted")
PLACES = ("left", "middle", "right")
DEPTHS = ("near", "far")
SIZES = ("large", "small")
GROUNDS = ("grass", "sand", "snow", "water", "tiles", "planks")
SKIES = ("day", "sunset", "night", "overcast", "fog")
BACKDROPS = ("open", "mountains", "hills", "forest", "city")
EXPOSURES = ("dark", "even", "bright")

SHARES = {"train": range(70), "val": range(70, 85), "test": range(85, 100)}
"""Percentiles of the key's hash that belong to each split."""

# Depth, size and apparent height (a share of the picture's side), the largest first.
_RANKS = (("near", "large", 0.44), ("near", "small", 0.31), ("far", "large", 0.265), ("far", "small", 0.19))
_CENTRES = {"left": 0.20, "middle": 0.50, "right": 0.80}

_T = TypeVar("_T")


@dataclass(frozen=True)
class SceneObject:
    """One object; positions and heights are shares of the picture's side, y counts downwards.

    Attributes:
        kind: One of ``CLASS_NAMES``.
        colour: One of ``COLOURS``.
        material: One of ``MATERIALS``.
        place: Where it stands from left to right, one of ``PLACES``.
        depth: One of ``DEPTHS``.
        size: One of ``SIZES``, the object's own size: a far object looks smaller.
        x: Its centre.
        ground: How far down between horizon (0) and lower edge (1) it touches the ground.
        height: Its apparent height.
        mirrored: Whether its asymmetric parts point left.
    """

    kind: str
    colour: str
    material: str
    place: str
    depth: str
    size: str
    x: float
    ground: float
    height: float
    mirrored: bool


@dataclass(frozen=True)
class Camera:
    """How the picture was taken.

    Attributes:
        horizon: Height of the horizon, as a share of the side from the top.
        exposure: One of ``EXPOSURES``.
        grainy: Whether sensor noise is strong.
        soft: Whether everything behind the nearest objects is out of focus.
    """

    horizon: float
    exposure: str
    grainy: bool
    soft: bool

    @property
    def high(self) -> bool:
        """Whether the horizon lies in the upper part of its range, so that much ground is seen."""
        return self.horizon < 0.42


@dataclass(frozen=True)
class Scene:
    """A scene: its facts, and a seed for what has no name (textures, noise, the wording of captions).

    ``objects`` is ordered by apparent size, the main object first. ``light`` is the side of sun or moon, and
    ``clouds`` counts the clouds of a day or sunset sky (0 under other skies).
    """

    split: str
    index: int
    seed: int
    objects: tuple[SceneObject, ...]
    ground: str
    sky: str
    light: str
    clouds: int
    backdrop: str
    camera: Camera

    @property
    def scene_id(self) -> str:
        """``test-000123``."""
        return f"{self.split}-{self.index:06d}"

    @property
    def label(self) -> str:
        """The class of the main object."""
        return self.objects[0].kind


def sample_scene(split: str, index: int, *, seed: int = 0) -> Scene:
    """Scene ``index`` of a split; the splits are endless and disjoint.

    Raises:
        UsageError: For an unknown split or a negative index.
    """
    if split not in SPLITS:
        raise UsageError(f"no split {split!r} in the scene world", hint=f"Choose one of {', '.join(SPLITS)}.")
    if index < 0:
        raise UsageError(f"scene index {index} is negative", hint="Scenes are counted from 0.")
    dice = Dice(seed, "scene", split, index)
    kind = dice.pick(CLASS_NAMES)
    while True:
        colour, place, ground = dice.pick(COLOURS), dice.pick(PLACES), dice.pick(GROUNDS)
        if percentile(kind, colour, place, ground) in SHARES[split]:
            break
    sky = dice.pick(SKIES)
    return Scene(
        split=split,
        index=index,
        seed=int(dice.generator.random() * 2**53),
        objects=_draw_objects(dice, kind, colour, place),
        ground=ground,
        sky=sky,
        light=dice.pick(("left", "right")),
        clouds=dice.pick((0, 1, 2)) if sky in ("day", "sunset") else 0,
        backdrop=dice.pick(BACKDROPS),
        camera=Camera(
            horizon=dice.pick((0.0, 0.08)) + dice.uniform(0.37, 0.41),
            exposure=dice.pick(EXPOSURES),
            grainy=dice.chance(0.35),
            soft=dice.chance(0.4),
        ),
    )


def attributes(scene: Scene) -> dict[str, str]:
    """The facts of a scene by name, those of its main object without prefix, for results per attribute."""
    main = scene.objects[0]
    return {
        "class": main.kind,
        "colour": main.colour,
        "material": main.material,
        "position": main.place,
        "depth": main.depth,
        "size": main.size,
        "count": str(len(scene.objects)),
        "ground": scene.ground,
        "sky": scene.sky,
        "backdrop": scene.backdrop,
    }


class Dice:
    """Draws that depend only on the parts given; uses ``Generator.random`` alone, the stablest of its streams."""

    def __init__(self, *parts: object) -> None:
        digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
        self.generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.generator.random())

    def chance(self, probability: float) -> bool:
        return float(self.generator.random()) < probability

    def pick(self, options: Sequence[_T]) -> _T:
        return options[int(self.generator.random() * len(options))]

    def shuffled(self, options: Sequence[_T]) -> list[_T]:
        keys = self.generator.random(len(options))
        return [options[i] for i in np.argsort(keys, kind="stable")]


def percentile(kind: str, colour: str, place: str, ground: str) -> int:
    """Where in 0..99 a scene's key falls; ``SHARES`` says which split that is."""
    key = f"{kind}/{colour}/{place}/{ground}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") % 100


def _draw_objects(dice: Dice, kind: str, colour: str, place: str) -> tuple[SceneObject, ...]:
    count = dice.pick((1, 1, 1, 2, 2, 2, 2, 3, 3, 3))
    # The main object looks strictly larger than the others, so that the label is plain to see.
    rank = dice.pick((0, 0, 1, 2, 3)) if count == 1 else dice.pick((0, 0, 0, 1, 2))
    objects = [_draw_object(dice, kind, colour, place, rank)]
    for other_place in dice.shuffled([name for name in PLACES if name != place])[: count - 1]:
        names = {(thing.kind, thing.colour) for thing in objects}
        while (kind, colour) in names:
            kind, colour = dice.pick(CLASS_NAMES), dice.pick(COLOURS)
        # Shapes fill their height differently, hence the wide step below a main object that is not the largest.
        smaller = dice.pick((1, 2, 3)) if rank == 0 else 3
        objects.append(_draw_object(dice, kind, colour, other_place, smaller))
    return (objects[0], *sorted(objects[1:], key=lambda thing: -thing.height))


def _draw_object(dice: Dice, kind: str, colour: str, place: str, rank: int) -> SceneObject:
    depth, size, height = _RANKS[rank]
    height *= dice.uniform(0.94, 1.06)
    margin = 0.52 * height
    return SceneObject(
        kind=kind,
        colour=colour,
        material=dice.pick(MATERIALS),
        place=place,
        depth=depth,
        size=size,
        x=min(1.0 - margin, max(margin, _CENTRES[place] + dice.uniform(-0.035, 0.035))),
        ground=dice.uniform(0.74, 0.88) if depth == "near" else dice.uniform(0.22, 0.34),
        height=height,
        mirrored=dice.chance(0.5),
    )
