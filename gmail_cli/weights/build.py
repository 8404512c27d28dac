"""Make the shipped small models from nothing and measure them: ``python -m gmail_cli.weights.build FOLDER``.

Runs the profiles ``tiny-clip``, ``tiny-lm``, ``tiny-autoencoder`` and ``tiny-diffusion`` in a workspace (what is
complete there is reused, what was interrupted goes on), then writes ``clip/``, ``lm/`` and ``pipeline/`` at half
precision into FOLDER, each with a ``provenance.json``: commands, settings, seed, time, machine, versions, and what the
model reaches on held-out scenes. ``docs/weights.md`` tells what came of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8

from gmail_cli import plan, profile
from gmail_cli.artifacts import Artifact, Workspace
from gmail_cli.components import diffusion, generative, pipelines, scenes
from gmail_cli.components.clip_files import WEIGHTS_FILE, load_clip
from gmail_cli.components.embedding import embed_texts
from gmail_cli.components.encoders import Clip
from gmail_cli.components.metrics import classification, retrieval

TEST_SCENES = 1000
PROBE_SCENES = 6000
"""Training scenes that the attribute probes are fitted on."""
DRAWN = 500
"""Pictures drawn to measure the generator."""
STEPS, GUIDANCE = 8, 2.5
Probes: TypeAlias = Mapping[str, tuple[list[str], np.ndarray]]
"""Fact -> its answers, and a linear map from an embedding (and 1) to a score for each."""
FACTS = ("ground", "sky", "colour", "class", "position", "count")


def build(folder: Path, workspace: Path, *, overrides: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Train what is missing in ``workspace``, write the models into ``folder``, and return their provenance.

    Args:
        folder: Gets ``clip/``, ``lm/`` and ``pipeline/``; what is there under these names is replaced.
        workspace: Where the training runs are kept.
        overrides: ``--set`` texts for all four profiles, such as ``train.steps=2`` for a rehearsal.
    """
    clip = _train(workspace, "tiny-clip", overrides)
    clip_folder = clip.folder("clip.real.seed0") / "clip"
    lm = _train(workspace, "tiny-lm", [f"model.clip={clip_folder}", *overrides])
    autoencoder = _train(workspace, "tiny-autoencoder", overrides)
    vae = autoencoder.folder("autoencoder.real.seed0")
    given = [f"model.clip={clip_folder}", f"train.autoencoder={vae}"]
    denoiser = _train(workspace, "tiny-diffusion", [*given, *overrides])
    for name, source in (
        ("clip", clip_folder),
        ("lm", lm.folder("causal-lm.real.seed0")),
        ("pipeline", denoiser.folder("latent-diffusion.real.seed0")),
    ):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("metrics.jsonl", "cell.json"))
    _halve(folder / "clip" / WEIGHTS_FILE)
    found = load_clip(folder / "clip")
    probes = fit_probes(found)
    records = {
        "clip": _record([clip], measure_clip(found, probes)),
        "lm": _record([lm], measure_language_model(folder / "lm")),
        "pipeline": _record([autoencoder, denoiser], measure_pipeline(folder / "pipeline", found, probes)),
    }
    for name, record in records.items():
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (folder / name / "provenance.json").write_text(text, encoding="utf-8")
    return records


def _train(workspace: Path, name: str, overrides: Sequence[str]) -> Artifact:
    loaded = profile.load(name, overrides=overrides)

    def progress(stage: str) -> Any:
        def show(done: int, total: int) -> None:
            print(f"\r{name}: {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

        return show

    return plan.execute(loaded, Workspace(workspace, name), stages=loaded.stages, progress=progress)["train"]


def _halve(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    held = {name: each.half() if each.is_floating_point() else each for name, each in load_file(file).items()}
    save_file(held, file)


def _record(made: Sequence[Artifact], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What stands beside a model: how each part was trained, and what the whole reaches."""
    runs = []
    for artifact in made:
        key, cell = artifact.manifest["key"], artifact.read_json("cells.json")[0]
        settings = {name: key["settings"][name] for name in ("steps", "batch_size", "lr", "weight_decay", "warmup")}
        runs.append(
            {
                "command": f"gmail train --profile {_PROFILES[cell['task']]}",
                **settings,
                "samples": settings["steps"] * settings["batch_size"],
                "captions": cell["captions"],
                "seed": key["seed"],
                "minutes": round(artifact.manifest["seconds"] / 60, 1),
                "device": artifact.manifest["device"],
                "digest": artifact.digest,
            }
        )
    return {
        "training": runs,
        "metrics": dict(metrics),
        "data": "scenes:train, scene seed 0; measured on scenes:test",
        "precision": "trained in float32, stored in float16",
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": made[-1].manifest["versions"],
        "details": "docs/weights.md",
    }


_PROFILES = {
    "clip": "tiny-clip",
    "causal-lm": "tiny-lm",
    "autoencoder": "tiny-autoencoder",
    "latent-diffusion": "tiny-diffusion",
}


# -- measuring ---------------------------------------------------------------------------------------------------


def _scenes(split: str, count: int) -> tuple[list[scenes.Scene], UInt8[np.ndarray, "count side side 3"]]:
    found = [scenes.sample_scene(split, row) for row in range(count)]
    return found, np.stack([scenes.render(scene) for scene in found])


def _embed(clip: Clip, pixels: UInt8[np.ndarray, "count side side 3"]) -> Float[np.ndarray, "count dim"]:
    """Embeddings of pictures of the size that the image tower reads."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (clip.preprocess.mean, clip.preprocess.std))
    parts = torch.from_numpy(pixels).permute(0, 3, 1, 2).split(256)
    return torch.cat([clip.encode_images((part.float() / 255 - mean) / std) for part in parts]).cpu().numpy()


def _recalls(images: Float[np.ndarray, "n dim"], texts: Float[np.ndarray, "n dim"]) -> dict[str, float]:
    """Recalls with one caption for each image."""
    ranks = retrieval.retrieval_ranks(images, texts=texts, owners=np.arange(len(images)))
    return {name: round(value, 4) for name, value in retrieval.retrieval_metrics(ranks).items() if "recall" in name}


def fit_probes(clip: Clip) -> Probes:
    """A linear least-squares probe for each fact on embeddings of training scenes: fact -> (answers, weights)."""
    found, pixels = _scenes("train", PROBE_SCENES)
    x = np.c_[_embed(clip, pixels), np.ones(len(found))].astype(np.float64)
    probes: dict[str, tuple[list[str], np.ndarray]] = {}
    for fact in FACTS:
        told = [scenes.attributes(scene)[fact] for scene in found]
        answers = sorted(set(told))
        one_hot = (np.array(told)[:, None] == answers).astype(np.float64)
        probes[fact] = answers, np.linalg.solve(x.T @ x + 1e-2 * np.eye(x.shape[1]), x.T @ one_hot)
    return probes


def _agreement(probes: Probes, embedded: Float[np.ndarray, "n dim"], shown: Sequence[scenes.Scene]) -> dict[str, float]:
    """Share of pictures of which each probe reads what their scene says."""
    x = np.c_[embedded, np.ones(len(embedded))]
    shares = {}
    for fact, (answers, weights) in probes.items():
        read = np.array(answers)[(x @ weights).argmax(axis=1)]
        shares[fact] = round(float(np.mean(read == [scenes.attributes(scene)[fact] for scene in shown])), 4)
    return shares


def measure_clip(clip: Clip, probes: Probes) -> dict[str, Any]:
    """Retrieval over held-out scenes with their first captions, zero-shot classes, and what probes read."""
    found, pixels = _scenes("test", TEST_SCENES)
    images = _embed(clip, pixels)
    prompts = embed_texts(clip, [f"a photo of a {name}." for name in scenes.CLASS_NAMES])[0]
    labels = np.array([scenes.CLASS_NAMES.index(scene.label) for scene in found])
    zero_shot = classification.classify(images @ prompts.T, labels=labels).correct().mean()
    return {
        "scenes": len(found),
        **_recalls(images, embed_texts(clip, [scenes.captions(scene)[0] for scene in found])[0]),
        "zero_shot_accuracy": round(float(zero_shot), 4),
        "probe_accuracy": _agreement(probes, images, found),
    }


@torch.inference_mode()
def measure_language_model(folder: Path) -> dict[str, Any]:
    """Perplexity per token over the first two captions of each held-out scene."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = [text for row in range(TEST_SCENES) for text in scenes.captions(scenes.sample_scene("test", row))[:2]]
    ids = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").input_ids
    losses, weights = [], []
    for chunk in ids.split(100):
        weights.append(int((chunk != tokenizer.eos_token_id).sum()))
        losses.append(float(generative.next_token_loss(model, chunk, end=tokenizer.eos_token_id)) * weights[-1])
    return {"captions": len(texts), "perplexity": round(float(np.exp(sum(losses) / sum(weights))), 3)}


def measure_pipeline(folder: Path, clip: Clip, probes: Probes) -> dict[str, Any]:
    """How well the autoencoder restores scenes, and how far pictures follow the captions they were drawn from."""
    found, pixels = _scenes("test", DRAWN)
    pipeline = pipelines.load_pipeline(str(folder))
    texts = [scenes.captions(scene)[0] for scene in found]
    jobs = [diffusion.Job(scene.scene_id, text, 0) for scene, text in zip(found, texts, strict=True)]
    sampler = diffusion.Sampler(pipeline, sampling=diffusion.Sampling(steps=STEPS, guidance=GUIDANCE, batch_size=50))
    drawn = _embed(clip, np.stack([each.pixels for batch in sampler.draw(jobs) for each in batch]))
    real = _embed(clip, pixels)
    words = embed_texts(clip, texts)[0]
    return {
        "autoencoder_psnr_db": round(generative.reconstruction_psnr(pipeline.vae, torch.from_numpy(pixels)), 2),
        "pictures": len(found),
        "sampling": f"{STEPS} steps, guidance {GUIDANCE}",
        "generated": {**_recalls(drawn, words), "agreement": _agreement(probes, drawn, found)},
        "real": {**_recalls(real, words), "agreement": _agreement(probes, real, found)},
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m gmail_cli.weights.build", description="Make the shipped models.")
    parser.add_argument("folder", type=Path, help="gets clip/, lm/ and pipeline/")
    parser.add_argument("--workspace", type=Path, default=Path("runs"), help="where the training runs are kept")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    given = parser.parse_args()
    print(json.dumps(build(given.folder, given.workspace, overrides=given.overrides), indent=1))


if __name__ == "__main__":
    main()
