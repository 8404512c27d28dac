"""Scenes as little photographs: analytic shapes with light, shadow, texture, focus and camera noise.

Every shape is a signed distance to its edge, which gives the share of each pixel it covers, and a surface normal,
which gives its shading. Everything is elementwise float32 arithmetic on small windows of the picture.
"""

from __future__ import annotations

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
    "night": _Sky((0.02, 0.03, 0.12), (0.10, 0.13, 0.30), (0.74, 0.82, 1.0), 0.42, 0.40, 0.40, 0.35, 0.12),
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


def render(scene: Scene, *, size: int = 64) -> UInt8[np.ndarray, "size size 3"]:
    """Draw a scene as a square RGB picture of ``size`` pixels; the same scene gives the same picture.

    Raises:
        UsageError: When ``size`` is below 16.
    """
    if size < 16:
        raise UsageError(f"scenes cannot be drawn at {size} pixels", hint="Ask for a size of at least 16.")
    dice = Dice(scene.seed, "texture")
    sky = _SKIES[scene.sky]
    picture = np.empty((size, size, 3), np.float32)
    split = round(scene.camera.horizon * size)
    _draw_sky(picture[:split], scene, sky, dice, size)
    _draw_ground(picture[split:], scene, sky, dice, size)
    far_to_near = sorted(scene.objects, key=lambda thing: thing.ground)
    for thing in far_to_near:
        if thing.depth == "far":
            _draw_object(picture, thing, scene, sky)
    if scene.camera.soft:
        _defocus(picture)
    for thing in far_to_near:
        if thing.depth == "near":
            _draw_object(picture, thing, scene, sky)
    _expose(picture, scene, dice)
    return np.rint(np.clip(picture, 0.0, 1.0) * 255.0).astype(np.uint8)


def _draw_sky(picture: Picture, scene: Scene, sky: _Sky, dice: Dice, size: int) -> None:
    rows = picture.shape[0]
    y, x = _grid(0, rows, 0, size, size)
    horizon = rows / size
    fall = (y / horizon) ** 1.3
    picture[:] = _mix(sky.zenith, sky.horizon, np.broadcast_to(fall, (rows, size)))
    side = 0.16 if scene.light == "left" else 0.84
    side += dice.uniform(-0.05, 0.05)
    if scene.sky == "night":
        stars = dice.generator.random((rows, size), dtype=np.float32) > 1.0 - 40.0 / (size * size)
        picture[stars] = 0.75
        _blend(picture, _cover(np.hypot(x - side, y - 0.10) - 0.055, size), (0.93, 0.93, 0.85))
    elif scene.sky in ("day", "sunset"):
        height = 0.10 if scene.sky == "day" else horizon - 0.16
        distance = np.hypot(x - side, y - height)
        _blend(picture, 0.55 * np.exp(-((distance / 0.16) ** 2)), (1.0, 0.93, 0.70))
        _blend(picture, _cover(distance - 0.055, size), (1.0, 0.97, 0.80))
    for number in range(scene.clouds):
        white = (1.0, 1.0, 1.0) if scene.sky == "day" else (0.93, 0.62, 0.55)
        centre = (0.40 + 0.24 * number) if scene.light == "left" else (0.60 - 0.24 * number)
        centre, height = centre + dice.uniform(-0.05, 0.05), dice.uniform(0.07, 0.15)
        puffs = [np.hypot((x - centre - dx) / 1.6, y - height - dy) - r for dx, dy, r in _PUFFS]
        _blend(picture, 0.9 * _cover(np.minimum.reduce(puffs), size, soft=2.5), white)
    if scene.backdrop != "open":
        _draw_backdrop(picture, x, y, scene, sky, dice, size)


_PUFFS = ((0.0, 0.0, 0.045), (-0.06, 0.012, 0.032), (0.06, 0.012, 0.034))


def _draw_backdrop(picture: Picture, x: Plane, y: Plane, scene: Scene, sky: _Sky, dice: Dice, size: int) -> None:
    horizon = picture.shape[0] / size
    column = x[0]
    if scene.backdrop == "mountains":
        peaks = [(0.22 * i + dice.uniform(-0.05, 0.05), dice.uniform(0.13, 0.22)) for i in range(6)]
        tops = np.maximum.reduce([height - 0.9 * np.abs(column - at) for at, height in peaks])
    elif scene.backdrop == "hills":
        a, b = dice.uniform(0.0, 6.0), dice.uniform(0.0, 6.0)
        tops = 0.075 + 0.03 * np.sin(6.0 * column + a) + 0.02 * np.sin(11.0 * column + b)
    elif scene.backdrop == "forest":
        shift = dice.uniform(0.0, 1.0)
        teeth = np.abs((column * 13.0 + shift) % 1.0 - 0.5)
        tops = 0.14 - 0.12 * teeth + 0.02 * np.sin(9.0 * column + 6.0 * shift)
    else:
        blocks = dice.generator.random(11, dtype=np.float32) * 0.15 + 0.05
        tops = blocks[np.minimum((column * 11.0).astype(np.int64), 10)]
    shade = (sky.ambient + 0.4 * sky.diffuse) * np.asarray(sky.tint, np.float32)
    colour = np.asarray(_BACKDROPS[scene.backdrop], np.float32) * shade
    colour = colour + (np.asarray(sky.horizon, np.float32) - colour) * min(0.85, 0.2 + sky.haze)
    height = horizon - y
    cover = _cover(height - tops[None, :], size)
    _blend(picture, cover, colour)
    if scene.backdrop == "mountains":
        _blend(
            picture,
            cover * _cover(0.12 - height, size),
            (colour + 2.0 * np.asarray(sky.tint, np.float32) * (sky.ambient + 0.3)) / 3.0,
        )
    if scene.backdrop == "city":
        windows = ((x * 33.0) % 1.0 > 0.5) & ((y * 22.0) % 1.0 > 0.5) & (height < tops[None, :] - 0.02)
        lit = (1.0, 0.85, 0.45) if scene.sky == "night" else tuple(0.75 * colour)
        _blend(picture, 0.8 * windows.astype(np.float32), lit)


def _draw_ground(picture: Picture, scene: Scene, sky: _Sky, dice: Dice, size: int) -> None:
    rows = picture.shape[0]
    y, x = _grid(size - rows, size, 0, size, size)
    below = (y - (size - rows) / size) / (rows / size)  # 0 at the horizon, 1 at the lower edge
    away = 1.0 / (below + 0.12)  # distance on the ground plane
    across = (x - 0.5) * away
    speck = dice.generator.random((rows, size), dtype=np.float32) - 0.5
    near = 0.35 + 0.65 * below
    shift = dice.uniform(0.0, 1.0)
    value: Plane
    if scene.ground == "grass":
        value = 1.0 + 0.30 * speck * near + 0.06 * np.sin(across * 5.0 + 7.0 * shift) * np.sin(away * 4.0)
    elif scene.ground == "sand":
        value = 1.0 + 0.07 * np.sin(away * 9.0 + across * 2.0 + 7.0 * shift) * near + 0.07 * speck
    elif scene.ground == "snow":
        value = 0.97 + 0.04 * np.sin(across * 3.0 + 7.0 * shift) * np.sin(away * 2.0) + 0.03 * speck
    elif scene.ground == "water":
        value = 1.0 + (0.22 * np.sin(away * 16.0 + 1.5 * np.sin(across * 6.0 + 7.0 * shift)) + 0.05 * speck) * near
    elif scene.ground == "tiles":
        dark = (np.floor(across * 3.0 + shift) + np.floor(away * 1.7)) % 2.0
        value = 1.08 - 0.38 * dark + 0.04 * speck
    else:
        plank = across * 5.0 + shift
        seam = np.abs(plank % 1.0 - 0.5) > 0.44
        value = 1.0 + 0.16 * np.sin(np.floor(plank) * 2.4) - 0.4 * seam * near + 0.06 * speck
    light = (sky.ambient + 0.65 * sky.diffuse) * np.asarray(sky.tint, np.float32)
    picture[:] = value[..., None] * (np.asarray(_GROUNDS[scene.ground], np.float32) * light)
    if scene.ground == "water":
        _blend(picture, 0.35 * (1.0 - 0.6 * below) + 0.0 * x, sky.horizon)
    _blend(picture, min(1.0, 1.6 * sky.haze) * (1.0 - below) ** 2 + 0.0 * x, sky.horizon)


def _draw_object(picture: Picture, thing: SceneObject, scene: Scene, sky: _Sky) -> None:
    size = picture.shape[0]
    horizon = round(scene.camera.horizon * size) / size
    base = horizon + (1.0 - horizon) * thing.ground
    toward = 1.0 if scene.light == "left" else -1.0  # where shadows fall
    if scene.ground != "water":
        _draw_shadow(picture, thing, base, toward * sky.reach, sky.shadow)
    half = 0.65 * thing.height
    rows = _span(base - 1.06 * thing.height, base + 1.0 / size, size)
    columns = _span(thing.x - half, thing.x + half, size)
    window = picture[rows, columns]
    if scene.ground == "water":
        _draw_reflection(picture, thing, base, sky, toward)
    patch = _Patch(thing, window.shape[:2], rows.start, columns.start, base, size, sky, -toward)
    _SHAPES[thing.kind](patch)
    colour = patch.colour
    if thing.depth == "far":
        colour = colour + (np.asarray(sky.horizon, np.float32) - colour) * sky.haze
    window += patch.cover[..., None] * (colour - window)


def _draw_shadow(picture: Picture, thing: SceneObject, base: float, reach: float, strength: float) -> None:
    size = picture.shape[0]
    half = _FOOTPRINTS[thing.kind] * thing.height
    length = abs(reach) * thing.height
    centre = thing.x + 0.5 * reach * thing.height
    wide, flat = half + 0.5 * length + 0.01, 0.10 * thing.height + 0.012
    rows = _span(base - 2 * flat, base + 2 * flat, size)
    columns = _span(centre - 1.3 * wide, centre + 1.3 * wide, size)
    y, x = _grid(rows.start, rows.stop, columns.start, columns.stop, size)
    square = ((x - centre) / wide) ** 2 + ((y - base) / flat) ** 2
    picture[rows, columns] *= (1.0 - strength * np.clip(1.6 - 1.2 * square, 0.0, 1.0))[..., None]


def _draw_reflection(picture: Picture, thing: SceneObject, base: float, sky: _Sky, toward: float) -> None:
    size = picture.shape[0]
    height = 0.5 * thing.height
    rows = _span(base, base + height, size)
    half = 0.65 * thing.height
    columns = _span(thing.x - half, thing.x + half, size)
    window = picture[rows, columns]
    patch = _Patch(thing, window.shape[:2], rows.start, columns.start, base, size, sky, -toward)
    patch.v = -patch.v
    _SHAPES[thing.kind](patch)
    fade = 0.5 * np.clip(1.0 - patch.v / 0.55, 0.0, 1.0)
    window += (patch.cover * fade)[..., None] * (patch.colour * 0.8 - window)


def _expose(picture: Picture, scene: Scene, dice: Dice) -> None:
    size = picture.shape[0]
    y, x = _grid(0, size, 0, size, size)
    gain = {"dark": 0.82, "even": 1.0, "bright": 1.15}[scene.camera.exposure]
    picture *= (gain * (1.04 - 0.36 * ((x - 0.5) ** 2 + (y - 0.5) ** 2)))[..., None]
    strength = 0.08 if scene.camera.grainy else 0.02
    picture += strength * (dice.generator.random(picture.shape, dtype=np.float32) - 0.5)


class _Patch:
    """The window of a picture one object covers, in the object's own coordinates.

    ``u`` runs from left to right and ``v`` upwards from the ground, in units of the object's height.
    """

    def __init__(
        self,
        thing: SceneObject,
        shape: tuple[int, ...],
        top: int,
        left: int,
        base: float,
        size: int,
        sky: _Sky,
        light: float,
    ) -> None:
        y, x = _grid(top, top + shape[0], left, left + shape[1], size)
        flip = -1.0 if thing.mirrored else 1.0
        self.u = np.broadcast_to(flip * (x - np.float32(thing.x)) / np.float32(thing.height), shape)
        self.v = np.broadcast_to((np.float32(base) - y) / np.float32(thing.height), shape)
        self.pixel = 1.0 / (size * thing.height)
        self.material = thing.material
        self.paint_colour = np.asarray(_PAINT[thing.colour], np.float32)
        self.contrast = np.asarray((0.30, 0.30, 0.34) if thing.colour == "white" else (0.97, 0.97, 0.95), np.float32)
        self.sky = sky
        self.light = (0.58 * light * flip, 0.58, 0.57)
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
        cover = np.clip(0.5 - distance / self.pixel, 0.0, 1.0)
        nz = np.sqrt(np.clip(1.0 - np.square(nx) - np.square(ny), 0.0, 1.0))
        lx, ly, lz = self.light
        lambert = np.clip(nx * lx + ny * ly + nz * lz, 0.0, 1.0)
        sky = self.sky
        own = colour is None
        surface = self._surface() if own else np.asarray(colour, np.float32)
        shade = sky.ambient + sky.diffuse * lambert
        if own and self.material == "shiny":
            shade = shade * (0.72 + 0.4 * lambert)
        lit = (
            np.broadcast_to(
                np.asarray(shade, np.float32)[..., None] * np.asarray(sky.tint, np.float32), self.colour.shape
            )
            * surface
        )
        if own and self.material == "shiny":
            side = 0.52 if lx > 0 else -0.52
            glare = np.clip(side * nx + 0.42 * ny + 0.74 * nz, 0.0, 1.0) ** 24
            lit = lit + (0.9 * (sky.ambient + 0.3) * np.asarray(glare, np.float32))[..., None]
        self.colour += cover[..., None] * (lit - self.colour)
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
            return self.paint_colour
        return self.paint_colour + mask[..., None] * (self.contrast - self.paint_colour)


def _ball(p: _Patch) -> None:
    radius = 0.47
    x, y = p.u / radius, (p.v - radius) / radius
    p.fill((np.hypot(x, y) - 1.0) * radius, nx=x, ny=y)


def _cube(p: _Patch) -> None:
    u, v = p.u, p.v
    glow = 0.35 * (u + v - 0.4)
    p.fill(_convex(u, v, ((0.26, 0.0), (0.46, 0.2), (0.46, 0.92), (0.26, 0.72))), nx=0.92, ny=0.0)
    p.fill(_convex(u, v, ((-0.46, 0.72), (0.26, 0.72), (0.46, 0.92), (-0.26, 0.92))), nx=0.05, ny=0.85 + 0.1 * u)
    p.fill(
        _convex(u, v, ((-0.46, 0.0), (0.26, 0.0), (0.26, 0.72), (-0.46, 0.72))),
        nx=-0.35 + glow,
        ny=glow - 0.1,
    )


def _cone(p: _Patch) -> None:
    reach = 0.44 * (1.0 - p.v / 1.0)
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
    p.fill(body, nx=np.clip(p.u / half, -0.97, 0.97))
    p.fill(lid, nx=0.2, ny=0.95)


def _ring(p: _Patch) -> None:
    middle, tube = 0.34, 0.13
    x, y = p.u, p.v - 0.47
    radius = np.maximum(np.hypot(x, y), 1e-3)
    around = np.clip((radius - middle) / tube, -1.0, 1.0)
    p.fill(np.abs(radius - middle) - tube, nx=around * x / radius, ny=around * y / radius)


def _star(p: _Patch) -> None:
    outer, inner, fifth = 0.54, 0.24, 2.0 * np.pi / 5.0
    x, y = p.u, p.v - outer * 0.81
    radius, angle = np.hypot(x, y), np.arctan2(x, y)
    folded = (angle + 0.5 * fifth) % fifth - 0.5 * fifth
    a, b = radius * np.cos(folded), radius * np.abs(np.sin(folded))
    ix, iy = inner * np.cos(0.5 * fifth), inner * np.sin(0.5 * fifth)
    length = np.hypot(outer - ix, iy)
    distance = ((a - outer) * iy + b * (outer - ix)) / length
    facet = np.sign(folded) * 0.55
    p.fill(distance.astype(np.float32), nx=facet * np.cos(angle), ny=-facet * np.sin(angle) + 0.1)


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
    p.fill(_box(u, v - 0.27, 0.42, 0.27), nx=0.15 * u, ny=0.15 * v)
    p.fill(_convex(u, v, ((-0.54, 0.50), (0.54, 0.50), (0.0, 0.98))), _SLATE, nx=0.0, ny=0.5)
    p.fill(_box(u + 0.2, v - 0.16, 0.085, 0.16), _BARK)
    p.fill(_box(u - 0.17, v - 0.28, 0.11, 0.09), (1.6, 1.35, 0.7) if p.sky.ambient < 0.43 else _GLASS)


def _car(p: _Patch) -> None:
    u, v = p.u, p.v
    p.fill(_convex(u, v, ((-0.42, 0.32), (0.30, 0.32), (0.14, 0.58), (-0.30, 0.58))), nx=0.1, ny=0.4)
    p.fill(_convex(u, v, ((-0.34, 0.34), (0.22, 0.34), (0.10, 0.53), (-0.26, 0.53))), _GLASS, nx=0.1, ny=0.3)
    p.fill(_box(u, v - 0.24, 0.54, 0.09) - 0.04, nx=0.2 * u, ny=np.clip((v - 0.22) / 0.2, -0.8, 0.8))
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


def _grid(top: int, bottom: int, left: int, right: int, size: int) -> tuple[Plane, Plane]:
    """Pixel centres as shares of the side: y of shape (rows, 1) and x of shape (1, columns)."""
    y = (np.arange(top, bottom, dtype=np.float32) + 0.5) / size
    x = (np.arange(left, right, dtype=np.float32) + 0.5) / size
    return y[:, None], x[None, :]


def _span(low: float, high: float, size: int) -> slice:
    """The pixels that a stretch of the picture touches."""
    return slice(max(0, int(low * size)), min(size, int(high * size) + 1))


def _cover(distance: Plane, size: int, *, soft: float = 1.0) -> Plane:
    """Share of each pixel inside a shape, from the signed distance to its edge."""
    return np.clip(0.5 - distance * (size / soft), 0.0, 1.0)


def _mix(first: Colour, second: Colour, share: Plane) -> Picture:
    a, b = np.asarray(first, np.float32), np.asarray(second, np.float32)
    return a + share[..., None] * (b - a)


def _blend(picture: Picture, cover: Plane, colour: Colour | Float32[np.ndarray, "3"]) -> None:
    picture += cover[..., None] * (np.asarray(colour, np.float32) - picture)


def _box(u: Plane, v: Plane, half_width: float, half_height: float) -> Plane:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _convex(u: Plane, v: Plane, corners: tuple[tuple[float, float], ...]) -> Plane:
    """Signed distance bound of a convex polygon whose corners run counter-clockwise."""
    edges = []
    for (ax, ay), (bx, by) in zip(corners, (*corners[1:], corners[0]), strict=True):
        length = float(np.hypot(bx - ax, by - ay))
        edges.append((u - ax) * ((by - ay) / length) - (v - ay) * ((bx - ax) / length))
    return np.maximum.reduce(edges)


def _defocus(picture: Picture) -> None:
    """Blur far parts, the upper ones, with a (1, 2, 1)/4 filter along both axes; near ground stays sharp."""
    size = picture.shape[0]
    y, _ = _grid(0, size, 0, 1, size)
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = 0.25 * (padded[:-2] + padded[2:]) + 0.5 * padded[1:-1]
    blurred = 0.25 * (rows[:, :-2] + rows[:, 2:]) + 0.5 * rows[:, 1:-1]
    picture += np.clip((0.84 - y) / 0.14, 0.0, 1.0)[..., None] * (blurred - picture)
