"""A SigLIP in open_clip format without its bias: the same towers, trained further by CLIP's loss.

python benchmarks/without_bias.py CLIP FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def main() -> None:
    """Copy the folder and take the bias out of config and weights."""
    clip, folder = Path(sys.argv[1]), Path(sys.argv[2])
    shutil.copytree(clip, folder)
    config = json.loads((folder / CONFIG).read_text())
    del config["model_cfg"]["init_logit_bias"]
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = load_file(folder / WEIGHTS)
    del tensors["logit_bias"]
    save_file(tensors, folder / WEIGHTS)


if __name__ == "__main__":
    main()
