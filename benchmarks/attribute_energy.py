"""What alignment turns up and down: how far images differ by class, ground, ... through f_r and through f_g.

    python benchmarks/attribute_energy.py GENERATE ALIGN

GENERATE and ALIGN are artifacts of the profile ``tiny``, one image of each caption. For each attribute of the built-in
world its mean embeddings of 6,000 other scenes span a subspace. Over the captions that alignment held out, prints the
mean squared length in it of the generated images, through f_r and through f_g, as a multiple of that of their real
partners, and how well they agree with the partners there (cosine of all parts together).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from gmail_cli.components import scenes
from gmail_cli.components.clip_files import load_clip
from gmail_cli.components.embedding import embed_images
from gmail_cli.components.partners import held_out

FIRST, SCENES, FEWEST = 10_000, 6_000, 50
ATTRIBUTES = ("class", "position", "count", "colour", "ground", "sky")


def main() -> None:
    """A line for each attribute."""
    made, aligned = Path(sys.argv[1]), Path(sys.argv[2])
    rows = [json.loads(line) for line in (made / "records.jsonl").read_text().splitlines()]
    f_r, f_g = load_clip("tiny"), load_clip(aligned / "clip")
    held = np.array([held_out(row["owner"], share=0.25, seed=0) for row in rows])
    partners = [int(row["owner"].rpartition("-")[2]) for row in rows]
    embedded = {
        name: embed_images(clip, lambda row: (made / rows[row]["path"]).read_bytes(), len(rows))
        for name, clip in (("f_r", f_r), ("f_g", f_g))
    }
    embedded["partners"] = embed_images(f_r, lambda row: scenes.scene_bytes("train", partners[row]), len(rows))
    others = embed_images(f_r, lambda row: scenes.scene_bytes("train", FIRST + row), SCENES)
    facts = [scenes.attributes(scenes.sample_scene("train", FIRST + row)) for row in range(SCENES)]
    print("attribute\tlength f_r\tlength f_g\tagreement f_r\tagreement f_g")
    for attribute in ATTRIBUTES:
        values = np.array([fact[attribute] for fact in facts])
        means = [others[values == value].mean(axis=0) for value, n in Counter(values.tolist()).items() if n >= FEWEST]
        basis = np.linalg.svd(np.stack(means) - np.mean(means, axis=0), full_matrices=False)[2][: len(means) - 1]
        parts = {name: (each - each.mean(axis=0))[held] @ basis.T for name, each in embedded.items()}
        power = {name: float((part**2).sum()) for name, part in parts.items()}
        lengths = [power[name] / power["partners"] for name in ("f_r", "f_g")]
        agreement = [
            float((parts[name] * parts["partners"]).sum()) / (power[name] * power["partners"]) ** 0.5
            for name in ("f_r", "f_g")
        ]
        print(attribute, *(f"{number:.2f}" for number in (*lengths, *agreement)), sep="\t")


if __name__ == "__main__":
    main()
