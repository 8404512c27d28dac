"""Another photo set of the built-in world: other scenes, taken by another camera.

    python benchmarks/other_photos.py FOLDER [COUNT]

FOLDER gets COUNT (1,000) scenes of ``scenes:test`` that `tiny` does not test on, each with all its short captions in
``metadata.jsonl``. The camera has 96 pixels, of which it keeps the middle 84, and it is darker (gamma 1.3) and grainy
(standard deviation 6 of 255); files are JPEGs of quality 50. Prints the cosine, by the small CLIP, of each picture with
the same scene as `tiny` draws it.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from gmail_cli.components import scenes
from gmail_cli.components.clip_files import load_clip
from gmail_cli.components.embedding import embed_images

FIRST = 1_000
SIDE, KEPT, GAMMA, GRAIN, QUALITY = 96, 84, 1.3, 6.0, 50


def main() -> None:
    """Take the photographs."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1_000
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as file:
        for index in range(FIRST, FIRST + count):
            scene = scenes.sample_scene("test", index)
            name = f"{scene.scene_id}.jpg"
            (folder / name).write_bytes(photograph(scene, index))
            record = {"image_id": scene.scene_id, "file_name": name, "captions": scenes.captions(scene)}
            file.write(json.dumps(record) + "\n")
    clip = load_clip("tiny")
    names = sorted(folder.glob("*.jpg"))
    taken = embed_images(clip, lambda row: names[row].read_bytes(), len(names))
    drawn = embed_images(clip, lambda row: scenes.scene_bytes("test", FIRST + row), len(names))
    print(f"cosine with the scene as it is drawn\t{(taken * drawn).sum(axis=1).mean():.3f}")


def photograph(scene: scenes.Scene, index: int) -> bytes:
    """The JPEG file that the other camera makes of a scene."""
    picture = scenes.render(scene, size=SIDE).astype(np.float32) / 255
    edge = (SIDE - KEPT) // 2
    picture = 255 * picture[edge : edge + KEPT, edge : edge + KEPT] ** GAMMA
    picture += np.random.default_rng(index).normal(0, GRAIN, picture.shape)
    file = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).round().astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


if __name__ == "__main__":
    main()
