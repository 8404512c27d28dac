"""`gmail embed` beside the bare forward pass of its model, and its memory at two sizes.

    python benchmarks/embed.py --captions CAPTIONS --images FOLDER [--model ViT-B-32] [--precision fp32]

Images: the whole stage (reading, decoding, scaling, vectors and rows on disk, the manifest) against the image tower
alone on pixels that are ready. Photographs smaller than --size are enlarged and stored as JPEG first. Texts: the whole
stage against the text tower alone on ids that are padded to its full context. Loading the model is left out, weights
are random. Stage and bare model take turns; on a CPU the ratio is also given in CPU seconds, which other work on the
machine enters less. Memory: the peak above what the process holds when the captions have been read, for a small model
with vectors of 512 numbers.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gmail_cli.artifacts import Workspace
from gmail_cli.components import captions, clip_files, encoders
from gmail_cli.components.images import batches
from gmail_cli.components.pixels import normalised
from gmail_cli.profile import build
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import embed

ON_GPU = torch.cuda.is_available()
SMALL = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds and CPU seconds of ``work``."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - clock, time.process_time() - cpu


def profile_for(source: Path, options: argparse.Namespace, **data: Any) -> Profile:
    chosen = {"batch_size": options.batch_size, "precision": options.precision, "shard_rows": options.shard_rows}
    runtime = {"workers": options.workers, "threads": options.threads}
    return build({"data": {"test": str(source), **data}, "embed": chosen, "runtime": runtime})


def stage(profile: Profile, clip: encoders.Clip) -> None:
    clip_files.load_clip = lambda *_args, **_options: clip
    with tempfile.TemporaryDirectory() as root:
        embed.run(profile, Workspace(Path(root)))


def compare(ours: Callable[[], object], bare: Callable[[], object], *, counts: tuple[int, int], repeat: int) -> None:
    """Print the rates of both, taken in turns, and how the first compares with the second.

    Args:
        ours: The stage.
        bare: The model alone.
        counts: Items that each of them takes.
        repeat: Turns.
    """
    turns = [(measured(ours), measured(bare)) for _ in range(repeat)]
    for place, clock in enumerate(("wall clock", "CPU time")):
        rates = [[count / turn[side][place] for turn in turns] for side, count in enumerate(counts)]
        ratios = [own / other for own, other in zip(*rates, strict=True)]
        own, other = map(statistics.median, rates)
        print(
            f"  {clock}: {own:.1f}/s, bare {other:.1f}/s, ratio {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )


def photographs(options: argparse.Namespace, folder: Path) -> None:
    """JPEG files of at least --size, as they come or enlarged."""
    wanted = [int(side) for side in options.size.split("x")]
    files = sorted(Path(options.images).rglob("*.jpg"))[: options.images_count]
    for number in range(options.images_count):
        data = files[number % len(files)].read_bytes()
        image = Image.open(io.BytesIO(data))
        if image.width < wanted[0] or image.height < wanted[1]:
            stream = io.BytesIO()
            image.convert("RGB").resize(wanted, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
            data = stream.getvalue()
        (folder / f"{number:06d}.jpg").write_bytes(data)


def image_side(clip: encoders.Clip, options: argparse.Namespace, folder: Path) -> None:
    photographs(options, folder)
    size = statistics.mean(file.stat().st_size for file in folder.glob("*.jpg"))
    print(f"{options.images_count} JPEG files of {size / 1000:.0f} kB", flush=True)
    dataset = captions.read(folder)
    read = batches(
        dataset.image_bytes,
        [range(len(dataset))],
        preprocess=clip.preprocess,
        batch_size=options.batch_size,
        workers=options.workers,
    )
    ready = [
        normalised(torch.from_numpy(each).to(clip.device), preprocess=clip.preprocess).to(clip.dtype) for each in read
    ]

    def bare() -> None:
        with torch.inference_mode():
            for pixels in ready:
                clip.model.encode_image(pixels)

    whole = partial(stage, profile_for(folder, options), clip)
    compare(whole, bare, counts=(len(dataset), len(dataset)), repeat=options.repeat)


def text_side(clip: encoders.Clip, options: argparse.Namespace, folder: Path) -> None:
    texts = [caption.text for caption in captions.read(options.captions).captions]
    texts = texts[:: max(1, len(texts) // options.texts)][: options.texts]
    file = folder / "texts.txt"
    file.write_text("".join(" ".join(text.split()) + "\n" for text in texts))
    padded = clip.tokenizer(texts[: len(texts) // 4])  # slow: a quarter of them is enough

    def bare() -> None:
        with torch.inference_mode():
            for ids in padded.split(options.batch_size):
                clip.model.encode_text(ids.to(clip.device))

    lengths = clip.lengths(padded).float().mean().item()
    print(f"{len(texts)} captions of {lengths:.1f} tokens, padded to {clip.context_length}", flush=True)
    whole = partial(stage, profile_for(file, options), clip)
    compare(whole, bare, counts=(len(texts), len(padded)), repeat=options.repeat)


def memory(field: str) -> float:
    """A field of /proc/self/status in MB: VmRSS now, VmHWM the peak since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak(options: argparse.Namespace) -> None:
    """Print the peak of embedding the captions, repeated to --rows, in MB above what is held before."""
    texts = [" ".join(caption.text.split()) for caption in captions.read(options.captions).captions]
    clip = clip_files.build_clip({"model_cfg": SMALL, "preprocess_cfg": {}})
    with tempfile.TemporaryDirectory() as root:
        file = Path(root, "texts.txt")
        file.write_text("".join(f"{texts[row % len(texts)]}\n" for row in range(options.rows)))
        stage(profile_for(file, options, test_limit=1000), clip)  # whatever is loaded on first use
        profile = profile_for(file, options)
        dataset = embed._read(profile)
        embed._read = lambda profile: dataset
        dataset.fingerprint  # noqa: B018 (kept by the data set)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        stage(profile, clip)
        print(json.dumps([options.rows, memory("VmHWM") - before, options.rows * clip.dim * 4 / 2**20]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", required=True, help="a captions file; COCO's captions_val2017.json")
    parser.add_argument("--images", help="a folder of photographs")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--size", default="640x480")
    for name, default in (("images-count", 256), ("texts", 1024), ("batch-size", 64), ("shard-rows", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("workers", 2), ("threads", 2), ("repeat", 3), ("rows", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--skip", nargs="*", choices=("images", "texts", "memory"), default=())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.rows:
        peak(options)
        return
    clip = encoders.rounded(
        clip_files.load_clip(options.model, device="cuda" if ON_GPU else "cpu", precision=options.precision)
    )
    print(f"{options.model}, {options.precision}, {clip.device}, torch {torch.__version__}, {options.threads} threads")
    with tempfile.TemporaryDirectory() as root:
        for name, side in (("images", image_side), ("texts", text_side)):
            if name not in options.skip:
                folder = Path(root, name)
                folder.mkdir()
                side(clip, options, folder)
    for rows in (20_000, 160_000) if "memory" not in options.skip else ():
        command = [sys.executable, __file__, *sys.argv[1:], "--rows", str(rows)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        count, peak_mb, vectors_mb = json.loads(found.splitlines()[-1])
        print(f"memory, {count} texts: {peak_mb:.0f} MB above the data set; their vectors are {vectors_mb:.0f} MB")


if __name__ == "__main__":
    main()
