"""Scenes as little photographs: analytic shapes with light, shadow, texture, focus and camera noise.

Every shape is a signed distance to its edge, which gives the share of each pixel it covers, and a surface normal,
which gives its shading. Everything is elementwise float32 arithmetic on small windows of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8

from gmail_cli.components.scenes.world import Dice, Scene, SceneObject
from gmail_cli.errors import UsageError

Plane = Float32[np.ndarray, "#rows #columns"]
Picture = Float32[np.ndarray, "rows columns 3"]
Colour = tuple[float, float, float]

_PAINT: dict[str, Colour] = {
    "red": (0.86, 0.09, 0.10),
    "orange": (1.00, 0.47, 0.04),
    "yellow": (0.98, 0.86, 0.10),
    "green": (0.10, 0.62, 0.18),
    "blue": (0.11, 0.27, 0.86),
    "purple": (0.47, 0.13, 0.66),
    "pink": (1.00, 0.50, 0.70),
    "white": (0.96, 0.96, 0.94),
}
_PUFFS = ((0.0, 0.0, 0.045), (-0.06, 0.012, 0.032), (0.06, 0.012, 0.034))  # of a cloud: x, y, radius
_BARK, _CREAM, _SLATE, _GLASS, _RUBBER = (
    (0.36, 0.23, 0.13),
    (0.93, 0.88, 0.76),
    (0.27, 0.24, 0.27),
    (0.62, 0.78, 0.88),
    (0.09, 0.09, 0.10),
)


@dataclass(frozen=True)
class _Sky:
    """Colours at zenith and horizon, and the light that falls from it."""

    zenith: Colour
    horizon: Colour
    tint: Colour
    ambient: float
    diffuse: float
    shadow: float
    reach: float  # length of shadows, in object heights
    haze: float  # how much of the horizon's colour far things take on


_SKIES = {
    "day": _Sky((0.22, 0.47, 0.86), (0.70, 0.85, 0.97), (1.0, 1.0, 0.97), 0.50, 0.62, 0.50, 0.30, 0.10),
    "sunset": _Sky((0.38, 0.25, 0.52), (1.00, 0.58, 0.26), (1.0, 0.84, 0.70), 0.44, 0.60, 0.48, 0.75, 0.16),
    "night": _Sky((0.02, 0.03, 0.12), (0.10, 0.13, 0.30), (0.76, 0.84, 1.0), 0.50, 0.42, 0.40, 0.35, 0.12),
    "overcast": _Sky((0.52, 0.55, 0.60), (0.76, 0.78, 0.80), (0.95, 0.97, 1.0), 0.68, 0.24, 0.25, 0.05, 0.12),
    "fog": _Sky((0.80, 0.81, 0.82), (0.86, 0.87, 0.87), (1.0, 1.0, 1.0), 0.72, 0.16, 0.15, 0.02, 0.38),
}
_GROUNDS: dict[str, Colour] = {
    "grass": (0.33, 0.56, 0.20),
    "sand": (0.87, 0.75, 0.50),
    "snow": (0.93, 0.95, 0.99),
    "water": (0.16, 0.42, 0.58),
    "tiles": (0.60, 0.59, 0.58),
    "planks": (0.58, 0.38, 0.22),
}
_BACKDROPS: dict[str, Colour] = {
    "mountains": (0.42, 0.44, 0.54),
    "hills": (0.36, 0.50, 0.32),
    "forest": (0.13, 0.29, 0.17),
    "city": (0.42, 0.40, 0.43),
}


@dataclass(frozen=True)
class _Shot:
    """A scene about to be drawn: what the parts of the drawing share."""

    scene: Scene
    size: int
    dice: Dice

    @property
    def sky(self) -> _Sky:
        return _SKIES[self.scene.sky]

    @property
    def horizon(self) -> float:
        """The horizon on a pixel boundary, as a share of the side from the top."""
        return round(self.scene.camera.horizon * self.size) / self.size

    @property
    def lit_from(self) -> float:
        """The side the light comes from: -1 left, 1 right."""
        return -1.0 if self.scene.light == "left" else 1.0

    def base(self, thing: SceneObject) -> float:
        """Where an object touches the ground."""
        return self.horizon + (1.0 - self.horizon) * thing.ground


def render(scene: Scene, *, size: int = 64) -> UInt8[np.ndarray, "size size 3"]:
    """Draw a scene as a square RGB picture of ``size`` pixels; the same scene gives the same picture.

    Raises:
        UsageError: When ``size`` is below 16.
    """
    if size < 16:
        raise UsageError(f"scenes cannot be drawn at {size} pixels", hint="Ask for a size of at least 16.")
    shot = _Shot(scene, size, Dice(scene.seed, "texture"))
    picture = np.empty((size, size, 3), np.float32)
    skyline = round(shot.horizon * size)
    _draw_sky(picture[:skyline], shot)
    _draw_ground(picture[skyline:], shot)
    far_to_near = sorted(scene.objects, key=lambda thing: thing.ground)
    for thing in far_to_near:
        if thing.depth == "far":
            _draw_object(picture, shot, thing)
    if scene.camera.soft:
        _defocus(picture)
    for thing in far_to_near:
        if thing.depth == "near":
            _draw_object(picture, shot, thing)
    _expose(picture, shot)
    return np.rint(np.clip(picture, 0.0, 1.0) * 255.0).astype(np.uint8)


def _draw_sky(picture: Picture, shot: _Shot) -> None:
    scene, sky, dice, size = shot.scene, shot.sky, shot.dice, shot.size
    rows = picture.shape[0]
    y, x = _grid(slice(0, rows), slice(0, size), size)
    zenith, horizon = np.asarray(sky.zenith, np.float32), np.asarray(sky.horizon, np.float32)
    picture[:] = zenith + ((y / shot.horizon) ** 1.3)[..., None] * (horizon - zenith)
    side = 0.5 + 0.34 * shot.lit_from + dice.uniform(-0.05, 0.05)
    if scene.sky == "night":
        stars = dice.generator.random((rows, size), dtype=np.float32) > 1.0 - 40.0 / (size * size)
        picture[stars] = 0.75
        _blend(picture, _cover(np.hypot(x - side, y - 0.10) - 0.055, size), (0.93, 0.93, 0.85))
    elif scene.sky in ("day", "sunset"):
        distance = np.hypot(x - side, y - (0.10 if scene.sky == "day" else shot.horizon - 0.16))
        _blend(picture, 0.55 * np.exp(-((distance / 0.16) ** 2)), (1.0, 0.93, 0.70))
        _blend(picture, _cover(distance - 0.055, size), (1.0, 0.97, 0.80))
    for number in range(scene.clouds):
        centre = 0.5 - shot.lit_from * (0.24 * number - 0.10) + dice.uniform(-0.05, 0.05)
        height = dice.uniform(0.07, 0.15)
        puffs = [np.hypot((x - centre - dx) / 1.6, y - height - dy) - radius for dx, dy, radius in _PUFFS]
        colour = (1.0, 1.0, 1.0) if scene.sky == "day" else (0.93, 0.62, 0.55)
        _blend(picture, 0.9 * _cover(np.minimum.reduce(puffs), size, soft=2.5), colour)
    if scene.backdrop != "open":
        _draw_backdrop(picture, shot)


def _draw_backdrop(picture: Picture, shot: _Shot) -> None:
    scene, sky, dice, size = shot.scene, shot.sky, shot.dice, shot.size
    y, x = _grid(slice(0, picture.shape[0]), slice(0, size), size)
    if scene.backdrop == "mountains":
        peaks = [(0.22 * i + dice.uniform(-0.05, 0.05), dice.uniform(0.13, 0.22)) for i in range(6)]
        tops = np.maximum.reduce([height - 0.9 * np.abs(x - at) for at, height in peaks])
    elif scene.backdrop == "hills":
        a, b = dice.uniform(0.0, 6.0), dice.uniform(0.0, 6.0)
        tops = 0.075 + 0.03 * np.sin(6.0 * x + a) + 0.02 * np.sin(11.0 * x + b)
    elif scene.backdrop == "forest":
        shift = dice.uniform(0.0, 1.0)
        teeth = np.abs((x * 13.0 + shift) % 1.0 - 0.5)
        tops = 0.14 - 0.12 * teeth + 0.02 * np.sin(9.0 * x + 6.0 * shift)
    else:
        towers = dice.generator.random(11, dtype=np.float32) * 0.15 + 0.05
        tops = towers[(x * 11.0).astype(np.int64)]
    haze = np.asarray(sky.horizon, np.float32)
    tint = np.asarray(sky.tint, np.float32)
    colour = np.asarray(_BACKDROPS[scene.backdrop], np.float32) * tint * (sky.ambient + 0.4 * sky.diffuse)
    colour += (0.2 + sky.haze) * (haze - colour)
    height = shot.horizon - y
    cover = _cover(height - tops, size)
    _blend(picture, cover, colour)
    if scene.backdrop == "mountains":
        snow = (colour + 2.0 * tint * (sky.ambient + 0.3)) / 3.0
        _blend(picture, cover * _cover(0.12 - height, size), snow)
    if scene.backdrop == "city":
        windows = ((x * 33.0) % 1.0 > 0.5) & ((y * 22.0) % 1.0 > 0.5) & (height < tops - 0.02)
        glass = np.asarray((1.0, 0.85, 0.45), np.float32) if scene.sky == "night" else 0.75 * colour
        _blend(picture, 0.8 * windows.astype(np.float32), glass)


def _draw_ground(picture: Picture, shot: _Shot) -> None:
    scene, sky, size = shot.scene, shot.sky, shot.size
    rows = picture.shape[0]
    y, x = _grid(slice(size - rows, size), slice(0, size), size)
    below = (y - shot.horizon) / (1.0 - shot.horizon)  # 0 at the horizon, 1 at the lower edge
    away = 1.0 / (below + 0.12)  # distance on the ground plane
    across = (x - 0.5) * away
    near = 0.35 + 0.65 * below
    speck = shot.dice.generator.random((rows, size), dtype=np.float32) - 0.5
    phase = shot.dice.uniform(0.0, 7.0)
    value: Plane
    if scene.ground == "grass":
        value = 1.0 + 0.30 * speck * near + 0.06 * np.sin(across * 5.0 + phase) * np.sin(away * 4.0)
    elif scene.ground == "sand":
        value = 1.0 + 0.07 * np.sin(away * 9.0 + across * 2.0 + phase) * near + 0.07 * speck
    elif scene.ground == "snow":
        value = 0.97 + 0.04 * np.sin(across * 3.0 + phase) * np.sin(away * 2.0) + 0.03 * speck
    elif scene.ground == "water":
        waves = np.sin(away * 16.0 + 1.5 * np.sin(across * 6.0 + phase))
        value = 1.0 + (0.22 * waves + 0.05 * speck) * near
    elif scene.ground == "tiles":
        dark = (np.floor(across * 3.0 + phase) + np.floor(away * 1.7)) % 2.0
        value = 1.08 - 0.38 * dark + 0.04 * speck
    else:
        plank = across * 5.0 + phase
        seam = np.abs(plank % 1.0 - 0.5) > 0.44
        value = 1.0 + 0.16 * np.sin(np.floor(plank) * 2.4) - 0.4 * seam * near + 0.06 * speck
    light = (sky.ambient + 0.65 * sky.diffuse) * np.asarray(sky.tint, np.float32)
    picture[:] = value[..., None] * (np.asarray(_GROUNDS[scene.ground], np.float32) * light)
    if scene.ground == "water":
        _blend(picture, 0.35 * (1.0 - 0.6 * below), sky.horizon)
    _blend(picture, 1.6 * sky.haze * (1.0 - below) ** 2, sky.horizon)


def _draw_object(picture: Picture, shot: _Shot, thing: SceneObject) -> None:
    base, size, height = shot.base(thing), shot.size, thing.height
    if shot.scene.ground == "water":
        _draw_reflection(picture, shot, thing)
    else:
        _draw_shadow(picture, shot, thing)
    rows = _span(base - 1.06 * height, base + 1.0 / size, size)
    patch = _Patch(shot, thing, rows)
    _SHAPES[thing.kind](patch)
    if thing.depth == "far":
        patch.colour += shot.sky.haze * (np.asarray(shot.sky.horizon, np.float32) - patch.colour)
    _blend(picture[rows, patch.columns], patch.cover, patch.colour)


def _draw_shadow(picture: Picture, shot: _Shot, thing: SceneObject) -> None:
    base, size, height = shot.base(thing), shot.size, thing.height
    reach = shot.sky.reach * height
    centre = thing.x - 0.5 * shot.lit_from * reach
    wide, flat = _FOOTPRINTS[thing.kind] * height + 0.5 * reach + 0.01, 0.10 * height + 0.012
    rows = _span(base - 1.2 * flat, base + 1.2 * flat, size)
    columns = _span(centre - 1.2 * wide, centre + 1.2 * wide, size)
    y, x = _grid(rows, columns, size)
    square = ((x - centre) / wide) ** 2 + ((y - base) / flat) ** 2
    picture[rows, columns] *= (1.0 - shot.sky.shadow * np.clip(1.6 - 1.2 * square, 0.0, 1.0))[..., None]


def _draw_reflection(picture: Picture, shot: _Shot, thing: SceneObject) -> None:
    base = shot.base(thing)
    rows = _span(base, base + 0.5 * thing.height, shot.size)
    patch = _Patch(shot, thing, rows)
    patch.v = -patch.v
    _SHAPES[thing.kind](patch)
    fade = 0.5 * np.clip(1.0 - patch.v / 0.55, 0.0, 1.0)
    _blend(picture[rows, patch.columns], patch.cover * fade, 0.8 * patch.colour)


def _defocus(picture: Picture) -> None:
    """Blur far parts, the upper ones, with a (1, 2, 1)/4 filter along both axes; near ground stays sharp."""
    size = picture.shape[0]
    y, _ = _grid(slice(0, size), slice(0, 1), size)
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = 0.25 * (padded[:-2] + padded[2:]) + 0.5 * padded[1:-1]
    blurred = 0.25 * (rows[:, :-2] + rows[:, 2:]) + 0.5 * rows[:, 1:-1]
    _blend(picture, np.clip((0.84 - y) / 0.14, 0.0, 1.0), blurred)


def _expose(picture: Picture, shot: _Shot) -> None:
    camera, size = shot.scene.camera, shot.size
    y, x = _grid(slice(0, size), slice(0, size), size)
    gain = {"dark": 0.82, "even": 1.0, "bright": 1.15}[camera.exposure]
    picture *= (gain * (1.04 - 0.36 * ((x - 0.5) ** 2 + (y - 0.5) ** 2)))[..., None]
    strength = 0.08 if camera.grainy else 0.02
    picture += strength * (shot.dice.generator.random(picture.shape, dtype=np.float32) - 0.5)


class _Patch:
    """The window of a picture one object covers, in the object's own coordinates.

    ``u`` runs from left to right and ``v`` upwards from the ground, in units of the object's height.
    """

    def __init__(self, shot: _Shot, thing: SceneObject, rows: slice) -> None:
        size, sky = shot.size, shot.sky
        self.columns = _span(thing.x - 0.65 * thing.height, thing.x + 0.65 * thing.height, size)
        shape = (rows.stop - rows.start, self.columns.stop - self.columns.start)
        y, x = _grid(rows, self.columns, size)
        flip = -1.0 if thing.mirrored else 1.0
        self.u = np.broadcast_to(flip * (x - thing.x) / thing.height, shape)
        self.v = np.broadcast_to((shot.base(thing) - y) / thing.height, shape)
        self.pixel = 1.0 / (size * thing.height)
        self.material = thing.material
        self.paint = np.asarray(_PAINT[thing.colour], np.float32)
        self.pattern = np.asarray((0.30, 0.30, 0.34) if thing.colour == "white" else (0.97, 0.97, 0.95), np.float32)
        self.bulge = 1.2 if thing.material == "shiny" else 0.3  # of flat faces; polished ones catch a highlight
        self.sky = sky
        self.night = shot.scene.sky == "night"
        self.light = (0.58 * flip * shot.lit_from, 0.58, 0.57)
        self.cover = np.zeros(shape, np.float32)
        self.colour = np.zeros((*shape, 3), np.float32)

    def fill(
        self,
        distance: Plane,
        colour: Colour | None = None,
        *,
        nx: Plane | float = 0.0,
        ny: Plane | float = 0.0,
    ) -> None:
        """Paint where ``distance`` is negative, in the object's own colour and material unless told another.

        ``nx`` and ``ny`` are the surface normal's parts to the right and upwards; the rest faces the viewer.
        """
        nz = np.sqrt(np.clip(1.0 - np.square(nx) - np.square(ny), 0.0, 1.0))
        lx, ly, lz = self.light
        lambert = np.asarray(np.clip(nx * lx + ny * ly + nz * lz, 0.0, 1.0), np.float32)
        shade = self.sky.ambient + self.sky.diffuse * lambert
        shiny = colour is None and self.material == "shiny"
        if shiny:
            shade = shade * (0.72 + 0.4 * lambert)
        surface = self._surface() if colour is None else np.asarray(colour, np.float32)
        lit = shade[..., None] * np.asarray(self.sky.tint, np.float32) * surface
        if shiny:
            side = math.copysign(0.52, lx)
            glare = np.asarray(np.clip(side * nx + 0.42 * ny + 0.74 * nz, 0.0, 1.0), np.float32) ** 24
            lit = lit + (0.9 * (self.sky.ambient + 0.3) * glare)[..., None]
        cover = np.clip(0.5 - distance / self.pixel, 0.0, 1.0)
        _blend(self.colour, cover, lit)
        self.cover = np.maximum(self.cover, cover)

    def _surface(self) -> Picture | Float32[np.ndarray, "3"]:
        if self.material == "striped":
            wave = (self.v * 3.6 + self.u * 1.2) % 1.0
            width = 3.8 * self.pixel
            mask = np.clip((0.25 - np.abs(wave - 0.5)) / width + 0.5, 0.0, 1.0)
        elif self.material == "spotted":
            row = np.floor(self.v * 4.2)
            a = (self.u * 4.2 + 0.5 * (row % 2.0)) % 1.0 - 0.5
            b = (self.v * 4.2) % 1.0 - 0.5
            mask = np.clip((0.27 - np.hypot(a, b)) / (4.2 * self.pixel) + 0.5, 0.0, 1.0)
        else:
            return self.paint
        return self.paint + mask[..., None] * (self.pattern - self.paint)


def _ball(p: _Patch) -> None:
    radius = 0.47
    x, y = p.u / radius, (p.v - radius) / radius
    p.fill((np.hypot(x, y) - 1.0) * radius, nx=x, ny=y)


def _cube(p: _Patch) -> None:
    u, v = p.u, p.v
    front = ((-0.46, 0.0), (0.26, 0.0), (0.26, 0.72), (-0.46, 0.72))
    side = ((0.26, 0.0), (0.46, 0.2), (0.46, 0.92), (0.26, 0.72))
    top = ((-0.46, 0.72), (0.26, 0.72), (0.46, 0.92), (-0.26, 0.92))
    p.fill(_convex(u, v, side), nx=0.92)
    p.fill(_convex(u, v, top), nx=0.05, ny=0.85 + 0.1 * u)
    p.fill(_convex(u, v, front), nx=p.bulge * (u + 0.1), ny=p.bulge * (v - 0.36))


def _cone(p: _Patch) -> None:
    reach = 0.44 * (1.0 - p.v)
    sides = (np.abs(p.u) - reach) * 0.9
    foot = (np.hypot(p.u / 0.44, (p.v - 0.08) / 0.09) - 1.0) * 0.09
    floor = np.minimum(0.08 - p.v, foot)
    p.fill(np.maximum(sides, floor), nx=np.clip(p.u / np.maximum(reach, 0.02), -0.95, 0.95), ny=0.25)


def _cylinder(p: _Patch) -> None:
    half = 0.31
    walls = np.abs(p.u) - half
    foot = (np.hypot(p.u / half, (p.v - 0.09) / 0.08) - 1.0) * 0.08
    lid = (np.hypot(p.u / half, (p.v - 0.90) / 0.08) - 1.0) * 0.08
    body = np.minimum(np.maximum(walls, np.abs(p.v - 0.495) - 0.405), np.minimum(foot, lid))
    p.fill(body, nx=np.clip(p.u / half, -0.94, 0.94), ny=0.3)
    p.fill(lid, nx=0.2, ny=0.95)


def _ring(p: _Patch) -> None:
    middle, tube = 0.34, 0.13
    x, y = p.u, p.v - 0.47
    radius = np.maximum(np.hypot(x, y), 1e-3)
    around = np.clip((radius - middle) / tube, -1.0, 1.0)
    p.fill(np.abs(radius - middle) - tube, nx=around * x / radius, ny=around * y / radius)


def _star(p: _Patch) -> None:
    outer, inner, fifth = 0.54, 0.24, 2.0 * math.pi / 5.0
    x, y = p.u, p.v - outer * math.cos(0.5 * fifth)
    radius, angle = np.hypot(x, y), np.arctan2(x, y)
    folded = (angle + 0.5 * fifth) % fifth - 0.5 * fifth
    along, across = radius * np.cos(folded), radius * np.abs(np.sin(folded))
    dx, dy = outer - inner * math.cos(0.5 * fifth), inner * math.sin(0.5 * fifth)
    edge = ((along - outer) * dy + across * dx) / math.hypot(dx, dy)
    facet = 0.55 * np.sign(folded)
    p.fill(edge, nx=facet * np.cos(angle), ny=0.1 - facet * np.sin(angle))


def _mushroom(p: _Patch) -> None:
    stem = 0.12 + 0.05 * (0.5 - p.v) ** 2 * 4.0
    p.fill(np.maximum(np.abs(p.u) - stem, np.abs(p.v - 0.25) - 0.25), _CREAM, nx=np.clip(p.u / 0.18, -0.9, 0.9))
    x, y = p.u / 0.50, (p.v - 0.44) / 0.50
    cap = np.maximum((np.hypot(x, y) - 1.0) * 0.5, 0.42 - p.v + 0.12 * p.u**2)
    p.fill(cap, nx=np.clip(x, -0.95, 0.95), ny=np.clip(y, 0.0, 0.95))


def _tree(p: _Patch) -> None:
    p.fill(np.maximum(np.abs(p.u) - 0.075, np.abs(p.v - 0.22) - 0.22), _BARK, nx=np.clip(p.u / 0.08, -0.9, 0.9))
    for cu, cv, radius in (
        (-0.22, 0.52, 0.20),
        (0.22, 0.52, 0.20),
        (0.0, 0.56, 0.24),
        (-0.12, 0.74, 0.20),
        (0.12, 0.77, 0.21),
    ):
        x, y = (p.u - cu) / radius, (p.v - cv) / radius
        p.fill((np.hypot(x, y) - 1.0) * radius, nx=np.clip(x, -0.95, 0.95), ny=np.clip(y, -0.95, 0.95))


def _house(p: _Patch) -> None:
    u, v = p.u, p.v
    p.fill(_box(u - 0.24, v - 0.75, 0.06, 0.17), _BARK)
    p.fill(_box(u, v - 0.27, 0.42, 0.27), nx=p.bulge * u, ny=p.bulge * (v - 0.27))
    p.fill(_convex(u, v, ((-0.54, 0.50), (0.54, 0.50), (0.0, 0.98))), _SLATE, nx=0.0, ny=0.5)
    p.fill(_box(u + 0.2, v - 0.16, 0.085, 0.16), _BARK)
    p.fill(_box(u - 0.17, v - 0.28, 0.11, 0.09), (1.6, 1.35, 0.7) if p.night else _GLASS)


def _car(p: _Patch) -> None:
    u, v = p.u, p.v
    p.fill(_convex(u, v, ((-0.42, 0.32), (0.30, 0.32), (0.14, 0.58), (-0.30, 0.58))), nx=0.1, ny=0.4)
    p.fill(_convex(u, v, ((-0.34, 0.34), (0.22, 0.34), (0.10, 0.53), (-0.26, 0.53))), _GLASS, nx=0.1, ny=0.3)
    p.fill(_box(u, v - 0.24, 0.54, 0.09) - 0.04, nx=0.8 * u, ny=np.clip((v - 0.22) / 0.2, -0.8, 0.8))
    for wheel in (-0.33, 0.33):
        radius = np.hypot(u - wheel, v - 0.12)
        p.fill(radius - 0.125, _RUBBER)
        p.fill(radius - 0.05, (0.7, 0.7, 0.72))


_SHAPES: dict[str, Callable[[_Patch], None]] = {
    "ball": _ball,
    "cube": _cube,
    "cone": _cone,
    "cylinder": _cylinder,
    "ring": _ring,
    "star": _star,
    "mushroom": _mushroom,
    "tree": _tree,
    "house": _house,
    "car": _car,
}
_FOOTPRINTS = {
    "ball": 0.34,
    "cube": 0.46,
    "cone": 0.42,
    "cylinder": 0.32,
    "ring": 0.28,
    "star": 0.34,
    "mushroom": 0.26,
    "tree": 0.30,
    "house": 0.44,
    "car": 0.54,
}


def _grid(rows: slice, columns: slice, size: int) -> tuple[Plane, Plane]:
    """Pixel centres as shares of the side: y of shape (rows, 1) and x of shape (1, columns)."""
    y = (np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5) / size
    x = (np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5) / size
    return y[:, None], x[None, :]


def _span(low: float, high: float, size: int) -> slice:
    """The pixels that a stretch of the picture touches."""
    return slice(max(0, int(low * size)), min(size, int(high * size) + 1))


def _cover(distance: Plane, size: int, *, soft: float = 1.0) -> Plane:
    """Share of each pixel inside a shape, from the signed distance to its edge."""
    return np.clip(0.5 - distance * (size / soft), 0.0, 1.0)


def _blend(picture: Picture, cover: Plane, colour: Colour | Float32[np.ndarray, "*shape 3"]) -> None:
    """Lay ``colour`` over a picture or a window of it, in place."""
    picture += cover[..., None] * (np.asarray(colour, np.float32) - picture)


def _box(u: Plane, v: Plane, half_width: float, half_height: float) -> Plane:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _convex(u: Plane, v: Plane, corners: tuple[tuple[float, float], ...]) -> Plane:
    """Signed distance bound of a convex polygon whose corners run counter-clockwise."""
    edges = []
    for (ax, ay), (bx, by) in zip(corners, (*corners[1:], corners[0]), strict=True):
        length = math.hypot(bx - ax, by - ay)
        edges.append((u - ax) * ((by - ay) / length) - (v - ay) * ((bx - ax) / length))
    return np.maximum.reduce(edges)
