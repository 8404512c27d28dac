"""The small world: reproducible, disjoint between splits, and described truthfully."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gmail_cli.components import scenes
from gmail_cli.components.scenes import Scene, SceneObject
from gmail_cli.errors import UsageError

WORD = re.compile(r"[a-z]+")
SYNONYMS = {
    "sphere": "ball",
    "box": "cube",
    "drum": "cylinder",
    "hoop": "ring",
    "toadstool": "mushroom",
    "cottage": "house",
    "automobile": "car",
    "centre": "middle",
    "glossy": "shiny",
    "dull": "matte",
    "dotted": "spotted",
}
GROUND_WORDS = {
    "grass": ("on grass", "lawn"),
    "sand": ("on sand", "beach"),
    "snow": ("on snow",),
    "water": ("on water", "lake"),
    "tiles": ("tile",),
    "planks": ("wooden floor", "planks"),
}
SKY_WORDS = {
    "day": ("blue sky", "sunny"),
    "sunset": ("sunset", "evening light"),
    "night": ("night", "starry"),
    "overcast": ("grey sky", "cloudy day"),
    "fog": ("fog", "misty"),
}
OBJECT = re.compile(
    rf"(?P<colour>{'|'.join(scenes.COLOURS)}) (?P<kind>{'|'.join(scenes.CLASS_NAMES)})\b"
    r".*?\b(?P<place>left|middle|right)\b"
)

# Means over 16 x 16 pixels of the first test scene.
GOLDEN_BLOCKS = [
    [117.16, 123.32, 144.55, 144.25],
    [106.3, 124.68, 130.12, 126.95],
    [109.3, 130.52, 125.4, 131.07],
    [121.4, 125.31, 95.44, 107.29],
]

many_scenes = st.builds(
    scenes.sample_scene,
    st.sampled_from(scenes.SPLITS),
    st.integers(0, 10**9),
    seed=st.integers(0, 2**64),
)


def canonical(text: str) -> str:
    return WORD.sub(lambda word: SYNONYMS.get(word[0], word[0]), text.lower())


def grounds_named(text: str) -> set[str]:
    return {ground for ground, words in GROUND_WORDS.items() if any(word in text for word in words)}


def skies_named(text: str) -> set[str]:
    return {sky for sky, words in SKY_WORDS.items() if any(word in text for word in words)}


def facts(thing: SceneObject) -> tuple[str, str, str]:
    return thing.colour, thing.kind, thing.place


def key(scene: Scene) -> tuple[str, ...]:
    return (*facts(scene.objects[0]), scene.ground)


@given(scene=many_scenes, size=st.integers(16, 96))
@settings(max_examples=50, deadline=None)
def test_any_scene_renders(scene: Scene, size: int) -> None:
    picture = scenes.render(scene, size=size)
    assert picture.shape == (size, size, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 4  # there is something to see


@given(scene=many_scenes)
@settings(max_examples=50, deadline=None)
def test_short_captions_are_five_and_true(scene: Scene) -> None:
    texts = scenes.captions(scene)
    assert len(set(texts)) == 5
    truth = [facts(thing) for thing in scene.objects]
    for text in texts:
        plain = canonical(text)
        said = [(m["colour"], m["kind"], m["place"]) for m in OBJECT.finditer(plain)]
        assert said[0] == truth[0], text
        assert set(said) <= set(truth), text
        assert len(said) == len(set(said)) >= min(2, len(truth)), text
        assert grounds_named(plain) == {scene.ground}, text
        assert skies_named(plain) <= {scene.sky}, text
        assert 6 <= len(text.split()) <= 40
    first = canonical(texts[0])
    assert [(m["colour"], m["kind"], m["place"]) for m in OBJECT.finditer(first)] == truth
    assert skies_named(first) == {scene.sky}
    for thing in scene.objects:
        distance = "close by" if thing.depth == "near" else "far away"
        assert f"{thing.size} {thing.material} {thing.colour} {thing.kind} {distance}" in first


@given(scene=many_scenes)
@settings(max_examples=50, deadline=None)
def test_relations_between_objects_are_true(scene: Scene) -> None:
    if len(scene.objects) == 1:
        return
    main = scene.objects[0]
    plain = canonical(scenes.captions(scene)[3])
    found = re.search(r"is (in front of|nearer than|beside|next to) the (\w+ \w+)", plain)
    assert found is not None
    other = next(thing for thing in scene.objects if f"{thing.colour} {thing.kind}" == found[2])
    assert main.depth == "near" or other.depth == "far"
    level = main.depth == other.depth
    assert found[1] in ({"beside", "next to"} if level else {"in front of", "nearer than"})
    long = canonical(scenes.long_caption(scene))
    said = re.findall(rf"the {main.colour} {main.kind} is to the (left|right) of the (\w+ \w+)", long)
    order = {place: number for number, place in enumerate(("left", "middle", "right"))}
    assert {name: side for side, name in said} == {
        f"{thing.colour} {thing.kind}": "left" if order[main.place] < order[thing.place] else "right"
        for thing in scene.objects[1:]
    }


@given(scene=many_scenes)
@settings(max_examples=50, deadline=None)
def test_long_caption_is_long_and_true(scene: Scene) -> None:
    text = canonical(scenes.long_caption(scene))
    assert 95 <= len(text.split()) <= 170
    for thing in scene.objects:
        assert f"{thing.size} {thing.material} {thing.colour} {thing.kind}" in text
    assert set(re.findall(rf"(?:{'|'.join(scenes.COLOURS)}) (?:{'|'.join(scenes.CLASS_NAMES)})\b", text)) == {
        f"{thing.colour} {thing.kind}" for thing in scene.objects
    }
    assert grounds_named(text.split(".")[0]) == {scene.ground}
    for word in ("mountains", "hills", "forest", "city"):
        assert (word in text) == (scene.backdrop == word)
    assert ("out of focus" in text) == scene.camera.soft
    assert ("strong grain" in text) == scene.camera.grainy
    assert ("too dark" in text) == (scene.camera.exposure == "dark")
    if scene.sky in ("day", "sunset", "night"):
        assert re.search(rf"(sun|moon)[a-z ]*\b{scene.light}\b", text)


def test_long_captions_lose_facts_at_77_words() -> None:
    texts = [scenes.long_caption(scenes.sample_scene("test", index)) for index in range(300)]
    assert len(set(texts)) == 300
    assert len({" ".join(text.split()[77:]) for text in texts}) > 250


@given(scene=many_scenes)
@settings(max_examples=50, deadline=None)
def test_vocabulary_covers_every_caption(scene: Scene) -> None:
    words = set(scenes.vocabulary())
    for text in (*scenes.captions(scene), scenes.long_caption(scene)):
        assert set(WORD.findall(text.lower())) <= words


def test_vocabulary_is_small_and_used() -> None:
    words = scenes.vocabulary()
    assert words == sorted(set(words))
    assert len(words) < 400
    used: set[str] = set()
    for index in range(500):
        scene = scenes.sample_scene("train", index)
        for text in (*scenes.captions(scene), scenes.long_caption(scene)):
            used |= set(WORD.findall(text.lower()))
    assert set(words) == used


def test_splits_share_neither_description_nor_text() -> None:
    drawn = {split: [scenes.sample_scene(split, i) for i in range(500)] for split in scenes.SPLITS}
    keys = {split: {key(scene) for scene in drawn[split]} for split in drawn}
    texts = {
        split: {text for scene in drawn[split] for text in (*scenes.captions(scene), scenes.long_caption(scene))}
        for split in drawn
    }
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not keys[one] & keys[other]
        assert not texts[one] & texts[other]


def test_worlds_of_different_seeds_split_alike() -> None:
    """Training on one seed and testing on another must not leak either."""
    train = {key(scenes.sample_scene("train", i, seed=1)) for i in range(600)}
    test = {key(scenes.sample_scene("test", i, seed=2)) for i in range(600)}
    assert not train & test


def test_attributes_are_balanced_and_match_the_scene() -> None:
    drawn = [scenes.sample_scene("test", index) for index in range(600)]
    for scene in drawn:
        named = scenes.attributes(scene)
        assert named["class"] == scene.label == scene.objects[0].kind
        assert named["count"] == str(len(scene.objects))
        assert named["position"] == scene.objects[0].place
    labels = Counter(scene.label for scene in drawn)
    assert set(labels) == set(scenes.CLASS_NAMES)
    assert min(labels.values()) > 35


@given(scene=many_scenes)
@settings(max_examples=50, deadline=None)
def test_main_object_looks_largest_and_places_are_kept(scene: Scene) -> None:
    main, *others = scene.objects
    assert all(main.height > other.height for other in others)
    assert len({thing.place for thing in scene.objects}) == len(scene.objects)
    for thing in scene.objects:
        assert {"left": thing.x < 0.4, "middle": 0.4 < thing.x < 0.6, "right": thing.x > 0.6}[thing.place]


def test_main_object_covers_the_most_pixels() -> None:
    """The label, and the long caption's "looks largest", hold in the picture."""

    def covered(scene: Scene, things: tuple[SceneObject, ...]) -> int:
        pictures = [scenes.render(replace(scene, objects=some)).astype(int) for some in (things, ())]
        return int((np.abs(pictures[0] - pictures[1]).max(axis=2) > 15).sum())

    for index in range(60):
        scene = scenes.sample_scene("val", index)
        camera = replace(scene.camera, grainy=False, soft=False, exposure="even")
        scene = replace(scene, sky="overcast", ground="sand", camera=camera)
        main, *others = (covered(scene, (replace(thing, colour="blue"),)) for thing in scene.objects)
        assert all(main > other for other in others), scene.scene_id


@pytest.mark.parametrize("kind", scenes.CLASS_NAMES)
@pytest.mark.parametrize("material", ["matte", "shiny", "striped", "spotted"])
def test_colour_is_seen_where_the_object_stands(kind: str, material: str) -> None:
    """By daylight, a red object is red and a blue one blue, whatever its kind and material."""
    scene = scenes.sample_scene("train", 0)
    camera = replace(scene.camera, exposure="even", grainy=False, soft=False)
    thing = replace(scene.objects[0], kind=kind, material=material, x=0.5, height=0.44, ground=0.8, depth="near")
    seen = {}
    for colour in ("red", "blue"):
        plain = replace(scene, sky="day", ground="snow", camera=camera, objects=(replace(thing, colour=colour),))
        seen[colour] = scenes.render(plain).astype(float)
    changed = np.abs(seen["red"] - seen["blue"]).sum(axis=2) > 60
    assert changed.sum() > 60
    assert seen["red"][changed][:, 0].mean() > seen["red"][changed][:, 2].mean() + 25
    assert seen["blue"][changed][:, 2].mean() > seen["blue"][changed][:, 0].mean() + 25


@pytest.mark.parametrize("kind", scenes.CLASS_NAMES)
@pytest.mark.parametrize("light", ["left", "right"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_shiny_objects_carry_a_highlight(kind: str, light: str, mirrored: bool) -> None:
    scene = scenes.sample_scene("train", 0)
    camera = replace(scene.camera, exposure="even", grainy=False, soft=False)
    thing = replace(
        scene.objects[0],
        kind=kind,
        colour="blue",
        mirrored=mirrored,
        x=0.5,
        height=0.44,
        ground=0.8,
        depth="near",
    )
    matte, shiny = (
        scenes.render(
            replace(
                scene,
                sky="day",
                ground="sand",
                light=light,
                camera=camera,
                objects=(replace(thing, material=material),),
            )
        ).astype(int)
        for material in ("matte", "shiny")
    )
    assert ((shiny - matte)[..., :2].min(axis=2) > 50).sum() >= 4  # blue itself saturates


def test_kinds_look_different() -> None:
    scene = scenes.sample_scene("train", 0)
    thing = replace(scene.objects[0], x=0.5, height=0.44, ground=0.8, depth="near")
    pictures = [
        scenes.render(replace(scene, objects=(replace(thing, kind=kind),))).astype(float) for kind in scenes.CLASS_NAMES
    ]
    for number, one in enumerate(pictures):
        for other in pictures[:number]:
            assert (np.abs(one - other).max(axis=2) > 40).sum() > 80


def test_bytes_are_png_of_the_render_and_equal_in_another_process() -> None:
    here = scenes.scene_bytes("val", 12, seed=3)
    scene = scenes.sample_scene("val", 12, seed=3)
    assert scene.scene_id == "val-000012"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(here))), scenes.render(scene))
    program = (
        "import hashlib; from gmail_cli.components import scenes; "
        "print(hashlib.sha256(scenes.scene_bytes('val', 12, seed=3)).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == hashlib.sha256(here).hexdigest()


def test_a_scene_does_not_depend_on_its_neighbours_but_on_seed_split_and_index() -> None:
    alone = scenes.sample_scene("train", 40)
    for index in range(40):
        scenes.render(scenes.sample_scene("train", index))
    assert scenes.sample_scene("train", 40) == alone
    others = [
        scenes.sample_scene("train", 41),
        scenes.sample_scene("train", 40, seed=1),
        scenes.sample_scene("val", 40),
    ]
    assert len({alone.seed, *(other.seed for other in others)}) == 4


def test_golden_scenes() -> None:
    """Shipped weights were trained on this world: facts, words and pixels must not drift."""
    digest = hashlib.sha256()
    for split in scenes.SPLITS:
        for index in range(50):
            scene = scenes.sample_scene(split, index)
            digest.update("\n".join((*scenes.captions(scene), scenes.long_caption(scene))).encode())
    assert digest.hexdigest() == "e0c22a5bfb187846b988373b56ec70a52ff24026be7eb36252effa192ee87e50"
    blocks = scenes.render(scenes.sample_scene("test", 0)).reshape(4, 16, 4, 16, 3).mean(axis=(1, 3, 4))
    np.testing.assert_allclose(blocks, GOLDEN_BLOCKS, atol=0.5)


def test_bad_requests_say_what_is_allowed() -> None:
    with pytest.raises(UsageError, match=r"'dev'(.|\n)*train, val, test"):
        scenes.sample_scene("dev", 0)
    with pytest.raises(UsageError, match="-1"):
        scenes.sample_scene("train", -1)
    with pytest.raises(UsageError, match="at 8 pixels"):
        scenes.render(scenes.sample_scene("train", 0), size=8)
