"""The small world ``tiny`` draws: endless captioned pictures of objects in landscapes, made with numpy alone.

    >>> scene = sample_scene("test", 7)
    >>> render(scene).shape
    (64, 64, 3)

A scene is a function of (world seed, split, index); the splits share no description and no caption text.
"""

from __future__ import annotations

import io

from gmail_cli.components.scenes.drawing import render
from gmail_cli.components.scenes.language import captions, long_caption, vocabulary
from gmail_cli.components.scenes.world import (
    CLASS_NAMES,
    COLOURS,
    SPLITS,
    Camera,
    Scene,
    SceneObject,
    attributes,
    sample_scene,
)

__all__ = [
    "CLASS_NAMES",
    "COLOURS",
    "SPLITS",
    "Camera",
    "Scene",
    "SceneObject",
    "attributes",
    "captions",
    "long_caption",
    "render",
    "sample_scene",
    "scene_bytes",
    "vocabulary",
]


def scene_bytes(split: str, index: int, *, seed: int = 0, size: int = 64) -> bytes:
    """The PNG file of a scene.

    Raises:
        UsageError: For an unknown split, a negative index or a size below 16.
    """
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(render(sample_scene(split, index, seed=seed), size=size)).save(file, format="PNG")
    return file.getvalue()
