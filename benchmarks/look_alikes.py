"""For each generated image of the built-in world, a real scene that looks like it: the generator's mistakes without its
brush.

    python benchmarks/look_alikes.py GENERATE FOLDER [N]

GENERATE is a generate artifact of the profile ``tiny``, one image of each caption. FOLDER gets a real scene for each of
its images, under the caption and the id of the image that it stands for; ``generate.source=import`` reads it. Of the N
(10) scenes most alike by the small CLIP, among 10,000 that no caption describes, it is the one whose cosine with the
caption is closest to that of the generated image. Prints the mean cosines of the generated images, their stand-ins and
the real images that the captions describe, and the mean CLIPScore of each.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np

from gmail_cli.components import scenes, search
from gmail_cli.components.clip_files import load_clip
from gmail_cli.components.embedding import embed_images, embed_texts
from gmail_cli.components.metrics.clipscore import clip_score

FIRST, POOL = 10_000, 10_000


def main() -> None:
    """Choose and write the scenes."""
    artifact, folder = Path(sys.argv[1]), Path(sys.argv[2])
    among = int(sys.argv[3]) if len(sys.argv) > 3 else 10
    folder.mkdir(parents=True)
    rows = [json.loads(line) for line in (artifact / "records.jsonl").read_text().splitlines()]
    clip = load_clip("tiny")
    drawn = embed_images(clip, lambda row: (artifact / rows[row]["path"]).read_bytes(), len(rows))
    described = embed_images(clip, lambda row: scene(int(rows[row]["owner"].rpartition("-")[2])), len(rows))
    pool = embed_images(clip, lambda row: scene(FIRST + row), POOL)
    texts, _ = embed_texts(clip, [row["caption"] for row in rows])
    alike = search.exact(pool, drawn, k=among).ids
    agreement = (pool[alike] * texts[:, None]).sum(axis=-1) - (drawn * texts).sum(axis=-1)[:, None]
    chosen = alike[np.arange(len(rows)), np.abs(agreement).argmin(axis=1)]
    with (folder / "metadata.jsonl").open("w") as file:
        for row, place in zip(rows, chosen.tolist(), strict=True):
            name = f"{row['owner']}.png"
            (folder / name).write_bytes(scene(FIRST + place))
            record = {"image_id": row["owner"], "file_name": name, "caption": row["caption"], "label": row["label"]}
            file.write(json.dumps(record) + "\n")
    kinds = {"generated": drawn, "stand-in": pool[chosen], "real": described}
    for left, right in itertools.combinations(kinds, 2):
        print(f"cosine\t{left}, {right}\t{(kinds[left] * kinds[right]).sum(axis=1).mean():.3f}")
    for name, images in kinds.items():
        print(f"CLIPScore\t{name}\t{clip_score(images, captions=texts).mean():.3f}")


def scene(index: int) -> bytes:
    """PNG of a training scene."""
    return scenes.scene_bytes("train", index)


if __name__ == "__main__":
    main()
