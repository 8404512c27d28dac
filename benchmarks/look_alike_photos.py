"""For each Stable Diffusion image of CIFAKE, a real photograph that looks like it to f_r: its content without its
modality.

    python benchmarks/look_alike_photos.py CLIP DATA FILE [same]

CLIP is what `gmail run cifake-clip` trained, DATA the folder of CIFAKE's Parquet files. FILE gets a Parquet file for
``generate.import_path``: keys, classes and captions of the first 20,000 generated images, each with the most alike
photograph (cosine by CLIP), of whatever class or, with ``same``, of the caption's, among those that are neither in the
training nor in the test set of `cifake`; a photograph may stand for several images. Prints how alike they are, and how
many are of the class that the caption names.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gmail_cli.components import captions, search
from gmail_cli.components.clip_files import load_clip
from gmail_cli.components.embedding import embed_images
from gmail_cli.stages.sources import SPLIT_SEED

HOLDOUT, TRAINING, COUNT = 0.1, 20_000, 20_000
"""As in profiles/cifake.toml."""


def main() -> None:
    """Choose and write the photographs."""
    clip, data, file = load_clip(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    generated = captions.read(f"{data}/generated-*.parquet", limit=COUNT)
    real = captions.read(f"{data}/real-*.parquet", holdout=("train", HOLDOUT, SPLIT_SEED))
    drawn = embed_images(clip, generated.image_bytes, COUNT)
    pool = np.arange(TRAINING, len(real))
    photographs = embed_images(clip, lambda row: real.image_bytes(TRAINING + row), len(pool))
    named = np.array([image.label for image in generated.images])
    shown = np.array([image.label for image in real.images])[pool]
    chosen = np.empty(COUNT, dtype=np.int64)
    for label in np.unique(named) if "same" in sys.argv[4:] else [None]:
        asked = np.flatnonzero((named == label) | (label is None))
        among = np.flatnonzero((shown == label) | (label is None))
        chosen[asked] = among[search.exact(photographs[among], drawn[asked], k=1).ids[:, 0]]
    rows = [
        {
            "key": image.id,
            "class": image.label,
            "caption": generated.captions_of(image.id)[0].text,
            "image": {"bytes": real.image_bytes(int(pool[place])), "path": f"{image.id}.jpg"},
        }
        for image, place in zip(generated.images, chosen, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=500)
    alike = (photographs[chosen] * drawn).sum(axis=1).mean()
    print(f"{len(np.unique(chosen))} photographs for {COUNT} images, cosine {alike:.3f}")
    print(f"{(shown[chosen] == named).mean():.1%} are of the class that the caption names")


if __name__ == "__main__":
    main()
