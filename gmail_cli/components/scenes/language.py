"""What can be said about a scene: five short captions and a long one, true in every word.

All wording lives in the tables below, so that ``vocabulary`` is complete by construction. Every short caption states
the ground, and the main object's kind, colour and place before any other object's: texts of different splits
therefore differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from gmail_cli.components.scenes.world import (
    COLOURS,
    DEPTHS,
    MATERIALS,
    PLACES,
    SIZES,
    Dice,
    Scene,
    SceneObject,
)

_KINDS = {
    "ball": ("ball", "sphere"),
    "cube": ("cube", "box"),
    "cone": ("cone",),
    "cylinder": ("cylinder", "drum"),
    "ring": ("ring", "hoop"),
    "star": ("star",),
    "mushroom": ("mushroom", "toadstool"),
    "tree": ("tree",),
    "house": ("house", "cottage"),
    "car": ("car", "automobile"),
}
_MATERIALS = {
    "matte": ("matte", "dull"),
    "shiny": ("shiny", "glossy"),
    "striped": ("striped",),
    "spotted": ("spotted", "dotted"),
}
_PLACES = {
    "left": ("on the left", "at the left"),
    "middle": ("in the middle", "in the centre"),
    "right": ("on the right", "at the right"),
}
_DEPTHS = {"near": ("close by", "up close"), "far": ("far away", "in the distance")}
_GROUNDS = {
    "grass": ("on grass", "on a green lawn"),
    "sand": ("on sand", "on a sandy beach"),
    "snow": ("on snow", "on snowy ground"),
    "water": ("on water", "on a calm lake"),
    "tiles": ("on a tiled floor", "on grey tiles"),
    "planks": ("on a wooden floor", "on brown planks"),
}
_SKIES = {
    "day": ("under a blue sky", "on a sunny day"),
    "sunset": ("at sunset", "in evening light"),
    "night": ("at night", "under a dark starry sky"),
    "overcast": ("under a grey sky", "on a cloudy day"),
    "fog": ("in fog", "on a misty day"),
}
_BEHIND = {
    "open": ("an empty horizon", "a bare horizon"),
    "mountains": ("mountains", "snowy peaks"),
    "hills": ("hills", "gentle hills"),
    "forest": ("a forest", "a row of firs"),
    "city": ("a city", "a skyline"),
}

# Short captions: {one} names the main object with its place, {all} every object, {two} at most two of them.
_COMPLETE = ("{all} {ground} {sky}",)
_SETTING_FIRST = ("{sky} {ground}, {all}", "{ground} {sky}, there is {all}", "a scene {ground} with {all}")
_LOOSE = ("a photo of {two} {ground}", "{two}, {ground}", "a picture taken {ground} showing {two}")
_RELATION = (
    "the {main} {place} {ground} is {relation} the {other} {other_place}",
    "{ground} the {main} {place} is {relation} the {other} {other_place}",
)
_ALONE = ("a lone {main} {place}, {depth}, {ground}", "nothing but the {main} {place} {ground}, {depth}")
_BACKDROP = ("{two} {ground} with {behind} behind", "{two} before {behind}, {ground} {sky}")
_RELATIONS = {
    "front": ("in front of", "nearer than"),
    "level": ("beside", "next to"),
}

# Long captions.
_INTRODUCTIONS = (
    "This photograph shows {number} {ground}.",
    "In this square picture one can see {number} {ground}.",
)
_NUMBERS = {1: "a single object", 2: "two objects", 3: "three objects"}
_THINGS = ("{place}, {depth}, there is {thing}.", "There is {thing} {place}, {depth}.")
_SURFACES = {
    "matte": ("Its {colour} surface is rough and gives back no highlight.",),
    "shiny": ("Its {colour} surface is polished, so that a highlight gleams on it.",),
    "striped": ("Slanting stripes cross its {colour} surface from one side to the other.",),
    "spotted": ("Rows of round dots cover its {colour} surface from top to bottom.",),
}
_LARGEST = ("Of them all, the {main} looks largest.", "The {main} takes up more room than anything else.")
_TOGETHER = {
    "front": ("The {main} is to the {side} of the {other} and nearer to the camera.",),
    "level": ("The {main} is to the {side} of the {other}, at about the same distance.",),
}
_EMPTY = {
    ("left",): "The left side is empty.",
    ("middle",): "The middle is empty.",
    ("right",): "The right side is empty.",
    ("left", "middle"): "Nothing stands on the left or in the middle.",
    ("left", "right"): "Nothing stands to either side of it.",
    ("middle", "right"): "Nothing stands in the middle or on the right.",
}
_GROUND_DETAILS = {
    "grass": "The grass is short and green, with blades that catch the light here and there.",
    "sand": "Soft ripples run through the yellow sand like small waves.",
    "snow": "The snow is smooth and almost white, with faint hollows in it.",
    "water": "Long waves run across the water, which takes its colour from the sky.",
    "tiles": "Light and dark square tiles form a checked pattern that narrows with distance.",
    "planks": "Long brown planks run away from the viewer and meet far off.",
}
_CLOUDS = {0: "without a single cloud", 1: "with one small cloud", 2: "with two small clouds"}
_SKY_DETAILS = {
    "day": "The sky is bright blue {clouds}.",
    "sunset": "The sky glows from violet to orange {clouds}.",
    "night": "The sky is almost black and sprinkled with stars.",
    "overcast": "A closed grey layer covers the whole sky.",
    "fog": "Pale fog fills the air and fades everything distant.",
}
_LIGHTS = {
    "day": "The sun shines from the {light}",
    "sunset": "A low sun stands on the {light}",
    "night": "The moon hangs on the {light}",
    "overcast": "The light is even and has no clear direction",
    "fog": "The light is pale and comes from all sides",
}
_SHADOWS = {
    "day": "and short shadows fall to the {away}.",
    "sunset": "and long shadows stretch to the {away}.",
    "night": "and dim shadows fall to the {away}.",
    "overcast": "and shadows are weak.",
    "fog": "and shadows can hardly be seen.",
}
_MIRRORED = "and the water mirrors what stands on it."
_BEHIND_DETAILS = {
    "open": "Behind all this the horizon is bare, a plain line without anything on it.",
    "mountains": "Along the horizon rises a chain of pointed mountains with white tops.",
    "hills": "Along the horizon low round hills roll from one side to the other.",
    "forest": "Along the horizon runs a dark forest of pointed firs.",
    "city": "Along the horizon stand the square towers of a city.",
}
_HORIZONS = {
    True: "The horizon is high, leaving much room for the ground.",
    False: "The horizon is low, leaving room for the sky.",
}
_EXPOSURES = {
    "dark": "The exposure is too dark",
    "even": "The exposure is well balanced",
    "bright": "The exposure is too bright",
}
_GRAINS = {True: "and strong grain covers the picture.", False: "and the picture is clean, without grain."}
_FOCUS = {True: "Far parts are out of focus.", False: "Near and far parts are equally sharp."}

_WORD = re.compile(r"[a-z]+")


def captions(scene: Scene) -> tuple[str, ...]:
    """Five different short captions of at most 40 words.

    The first states kind, colour, material, size, depth and place of every object, the ground and the sky; the others
    choose and may leave out a third object.
    """
    words = _Words(scene)
    main = scene.objects[0]
    plain = {"ground": words.say(_GROUNDS[scene.ground]), "sky": words.say(_SKIES[scene.sky])}
    complete = [words.thing(o, size=True, material=True, depth=True, canonical=True) for o in scene.objects]
    everything = [words.thing(o) for o in scene.objects]
    two = [words.thing(o, material=o is main) for o in scene.objects[:2]]
    first = _COMPLETE[0].format(all=_listed(complete), ground=_GROUNDS[scene.ground][0], sky=_SKIES[scene.sky][0])
    second = words.say(_SETTING_FIRST).format(all=_listed(everything), **plain)
    third = words.say(_LOOSE).format(two=_listed(two), **plain)
    if len(scene.objects) == 1:
        fourth = words.say(_ALONE).format(
            main=words.name(main),
            place=words.say(_PLACES[main.place]),
            depth=words.say(_DEPTHS[main.depth]),
            **plain,
        )
    else:
        other = scene.objects[1 + int(len(scene.objects) == 3 and words.dice.chance(0.5))]
        fourth = words.say(_RELATION).format(
            main=words.name(main),
            place=words.say(_PLACES[main.place]),
            relation=words.say(_RELATIONS[_relation(main, other)]),
            other=words.name(other),
            other_place=words.say(_PLACES[other.place]),
            **plain,
        )
    again = [words.thing(o, size=True) for o in scene.objects[:2]]
    fifth = words.say(_BACKDROP).format(two=_listed(again), behind=words.say(_BEHIND[scene.backdrop]), **plain)
    return tuple(_sentence(text) for text in (first, second, third, fourth, fifth))


def long_caption(scene: Scene) -> str:
    """About 100 to 160 words in whole sentences: objects and their relations, setting, light and camera.

    Objects come before or after the setting, so whoever reads only the first 77 tokens misses either.
    """
    words = _Words(scene)
    sentences = [
        words.say(_INTRODUCTIONS).format(number=_NUMBERS[len(scene.objects)], ground=words.say(_GROUNDS[scene.ground]))
    ]
    for block in words.dice.shuffled((_objects(scene, words), _setting(scene))):
        sentences += block
    camera = scene.camera
    sentences += [
        _HORIZONS[camera.high],
        f"{_EXPOSURES[camera.exposure]} {_GRAINS[camera.grainy]}",
        _FOCUS[camera.soft],
    ]
    return " ".join(sentences)


def vocabulary() -> list[str]:
    """Every lower-case word the captions can contain, sorted."""
    return sorted({word for text in _strings(_TABLES) for word in _WORD.findall(re.sub(r"\{\w+\}", " ", text.lower()))})


def _objects(scene: Scene, words: _Words) -> list[str]:
    main, *others = scene.objects
    sentences = []
    for thing in scene.objects:
        sentence = words.say(_THINGS).format(
            thing=words.described(thing, size=True, material=True),
            place=_PLACES[thing.place][0],
            depth=words.say(_DEPTHS[thing.depth]),
        )
        sentences.append(sentence[0].upper() + sentence[1:])
    if not others:
        sentences.append(words.say(_SURFACES[main.material]).format(colour=main.colour))
    else:
        sentences.append(words.say(_LARGEST).format(main=words.name(main)))
    for other in others:
        side = "left" if main.x < other.x else "right"
        template = words.say(_TOGETHER[_relation(main, other)])
        sentences.append(template.format(main=words.name(main), other=words.name(other), side=side))
    occupied = {thing.place for thing in scene.objects}
    empty = tuple(place for place in PLACES if place not in occupied)
    if empty:
        sentences.append(_EMPTY[empty])
    return sentences


def _setting(scene: Scene) -> list[str]:
    away = "right" if scene.light == "left" else "left"
    shadows = _MIRRORED if scene.ground == "water" else _SHADOWS[scene.sky]
    sentences = [
        _SKY_DETAILS[scene.sky].format(clouds=_CLOUDS[scene.clouds]),
        f"{_LIGHTS[scene.sky]} {shadows}".format(light=scene.light, away=away),
        _BEHIND_DETAILS[scene.backdrop],
    ]
    return sentences if len(scene.objects) == 3 else [*sentences, _GROUND_DETAILS[scene.ground]]


class _Words:
    """Chooses among wordings, the same way every time for one scene."""

    def __init__(self, scene: Scene) -> None:
        self.dice = Dice(scene.seed, "words")

    def say(self, options: tuple[str, ...]) -> str:
        return self.dice.pick(options)

    def name(self, thing: SceneObject) -> str:
        return f"{thing.colour} {self.say(_KINDS[thing.kind])}"

    def described(
        self, thing: SceneObject, *, size: bool = False, material: bool = False, canonical: bool = False
    ) -> str:
        parts = [thing.size] if size else []
        if material:
            parts.append(_MATERIALS[thing.material][0] if canonical else self.say(_MATERIALS[thing.material]))
        parts.append(f"{thing.colour} {thing.kind}" if canonical else self.name(thing))
        text = " ".join(parts)
        return f"an {text}" if text[0] in "aeiou" else f"a {text}"

    def thing(
        self,
        thing: SceneObject,
        *,
        size: bool = False,
        material: bool = False,
        depth: bool = False,
        canonical: bool = False,
    ) -> str:
        """``a shiny red ball on the left``"""
        text = self.described(thing, size=size, material=material, canonical=canonical)
        if depth:
            text = f"{text} {_DEPTHS[thing.depth][0]}"
        return f"{text} {_PLACES[thing.place][0] if canonical else self.say(_PLACES[thing.place])}"


def _relation(main: SceneObject, other: SceneObject) -> str:
    """Whether the main object is nearer than another or level with it; what looks largest is never behind."""
    return "level" if main.depth == other.depth else "front"


def _listed(things: list[str]) -> str:
    return ", ".join(things[:-1]) + " and " + things[-1] if len(things) > 1 else things[0]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


_TABLES: tuple[Any, ...] = (
    ("a", "an", "and"),
    *(COLOURS, MATERIALS, PLACES, DEPTHS, SIZES),
    *(_KINDS, _MATERIALS, _PLACES, _DEPTHS, _GROUNDS, _SKIES, _BEHIND),
    *(_COMPLETE, _SETTING_FIRST, _LOOSE, _RELATION, _ALONE, _BACKDROP, _RELATIONS),
    *(_INTRODUCTIONS, _NUMBERS, _THINGS, _SURFACES, _LARGEST, _TOGETHER, _EMPTY),
    *(_GROUND_DETAILS, _CLOUDS, _SKY_DETAILS, _LIGHTS, _SHADOWS, (_MIRRORED,), _BEHIND_DETAILS),
    *(_HORIZONS, _EXPOSURES, _GRAINS, _FOCUS),
)


def _strings(table: Any) -> Iterator[str]:
    if isinstance(table, str):
        yield table
        return
    for entry in table.values() if isinstance(table, Mapping) else table:
        yield from _strings(entry)
