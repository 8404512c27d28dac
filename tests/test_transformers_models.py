"""Models in transformers format: embeddings, tuning, export, and a tower without texts through align and train."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from test_align import IMAGES, _fake_generation, _shifted
from test_heads import pairs_of
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from gmail_cli import profile as profiles
from gmail_cli.artifacts import Artifact, Workspace
from gmail_cli.components import captions as reader
from gmail_cli.components import clip_files, tuning
from gmail_cli.components.arms import Arm, View
from gmail_cli.components.loop import Recipe, fit
from gmail_cli.components.tasks import clip_text_job
from gmail_cli.errors import InputError, UsageError
from gmail_cli.stages import align, embed, evaluate, train

BLOCKS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**BLOCKS, "image_size": 32, "patch_size": 8}
KINDS = ["clip", "siglip", "dinov2", "vit"]
JOINT = ["clip", "siglip"]
PROCESSOR = "preprocessor_config.json"
TEXTS = ["a red ball", "two trees and a house " * 30, ""]


def _write(kind: str, folder: Path) -> Path:
    """A model of two layers with random weights, as its library saves it."""
    tokenizer = AutoTokenizer.from_pretrained(clip_files.SHIPPED["tiny"])
    text = {**BLOCKS, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model: Any
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "clip":
            model = CLIPModel(CLIPConfig(text_config={**text, **ends}, vision_config=VISION, projection_dim=16))
            processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
        elif kind == "siglip":
            model = SiglipModel(SiglipConfig(text_config={**text, **ends}, vision_config=VISION))
            processor = SiglipImageProcessor(size={"height": 32, "width": 32})
        elif kind == "dinov2":
            model = Dinov2Model(Dinov2Config(**{**VISION, "mlp_ratio": 2, "image_size": 48}))
            processor = BitImageProcessor(size={"shortest_edge": 36}, crop_size=32)
        else:
            model = ViTModel(ViTConfig(**VISION))
            processor = ViTImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if kind in JOINT:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: _write(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@torch.no_grad()
def _plain(model: Any, kind: str, pixels: torch.Tensor) -> torch.Tensor:
    """Unit embeddings as a user of transformers computes them."""
    if kind in JOINT:
        features = model.get_image_features(pixel_values=pixels).pooler_output
    else:
        features = model(pixel_values=pixels).last_hidden_state[:, 0]
    return torch.nn.functional.normalize(features, dim=-1)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_images_embed_as_transformers_embeds_them(kind: str, folders: dict[str, Path], pixels: torch.Tensor):
    clip, plain = clip_files.load_clip(folders[kind]), AutoModel.from_pretrained(folders[kind]).eval()
    wanted = _plain(plain, kind, pixels)
    torch.testing.assert_close(clip.encode_images(pixels), wanted, atol=1e-5, rtol=0)
    assert wanted.shape[1] == clip.dim
    photo = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    image = Image.fromarray(photo).resize((61, 90), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    ours = clip.preprocess(stream.getvalue())
    theirs = AutoImageProcessor.from_pretrained(folders[kind])(image, return_tensors="pt").pixel_values[0]
    assert np.abs(ours - theirs.numpy()).max() < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_patch_tokens_are_those_of_the_last_layer_but_one(kind: str, folders: dict[str, Path]):
    clip, plain = clip_files.load_clip(folders[kind]), AutoModel.from_pretrained(folders[kind]).eval()
    shown = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), "uint8")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (clip.preprocess.mean, clip.preprocess.std))
    tower = plain.vision_model if kind in JOINT else plain
    with torch.no_grad():
        states = tower((torch.from_numpy(shown) / 255 - mean) / std, output_hidden_states=True).hidden_states
    assert len(states) == 3
    tokens = clip.encode_patches(shown)
    torch.testing.assert_close(tokens, states[1][:, 0 if kind == "siglip" else 1 :], atol=1e-5, rtol=0)
    quarters = tokens.unflatten(1, (4, 4))[:, :2, 2:].flatten(1, 2).mean(dim=1)
    torch.testing.assert_close(clip.encode_patches(shown, grid=2)[:, 1], quarters)


@pytest.mark.parametrize("kind", JOINT)
def test_texts_embed_as_transformers_embeds_them(kind: str, folders: dict[str, Path]):
    clip, plain = clip_files.load_clip(folders[kind]), AutoModel.from_pretrained(folders[kind]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    read = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(plain.get_text_features(read.input_ids).pooler_output, dim=-1)
    torch.testing.assert_close(clip.encode_texts(TEXTS), wanted, atol=1e-5, rtol=0)
    assert clip.tokenize(TEXTS).truncated.tolist() == [False, True, False]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # what plain peft asks transformers
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_merged_and_loaded_elsewhere(
    kind: str, folders: dict[str, Path], pixels: torch.Tensor, tmp_path: Path
):
    clip = clip_files.load_clip(folders[kind])
    before = clip.encode_images(pixels)
    tower = tuning.add_lora(clip, rank=2)
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        tuned = tower(pixels)
    assert (tuned - before).abs().max() > 1e-3
    (tmp_path / "merged").mkdir()
    (tmp_path / "adapter").mkdir()
    merged = tuning.merge(clip, tower)
    clip_files.save_clip(merged, tmp_path / "merged")
    tuning.save_adapter(tower, tmp_path / "adapter", base=kind)
    torch.testing.assert_close(clip.encode_images(pixels), before, atol=0, rtol=0)
    torch.testing.assert_close(merged.encode_images(pixels), tuned, atol=1e-5, rtol=0)
    assert clip_files.model_digest(tmp_path / "merged") == merged.digest != clip.digest

    plain = AutoModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(_plain(plain, kind, pixels), tuned, atol=1e-5, rtol=0)
    again = clip_files.load_clip(tmp_path / "merged")
    assert again.preprocess == clip.preprocess
    base = AutoModel.from_pretrained(folders[kind]).eval()
    wrapped = PeftModel.from_pretrained(base, tmp_path / "adapter").base_model.model
    torch.testing.assert_close(_plain(wrapped, kind, pixels), tuned, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(tuning.load_adapter(clip, tmp_path / "adapter")(pixels), tuned, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_the_blocks_is_tuned(kind: str, folders: dict[str, Path], pixels: torch.Tensor):
    """One step, and the update of each is no longer nothing."""
    tower = tuning.add_lora(clip_files.load_clip(folders[kind]), rank=2)
    updates = {name: each for name, each in tower.named_parameters() if "lora_B" in name}
    layers = [name for name, each in tower.visual.named_modules() if isinstance(each, torch.nn.Linear)]
    assert len(updates) == sum("layer" in name for name in layers) == 12
    (tower(pixels) * torch.arange(float(len(pixels)))[:, None]).sum().backward()
    assert not [name for name, each in updates.items() if each.grad is None or not bool(each.grad.any())]


def test_projection_alone(folders: dict[str, Path]):
    tower = tuning.unfreeze_projection(clip_files.load_clip(folders["clip"]))
    assert [name for name, each in tower.named_parameters() if each.requires_grad] == [
        "visual.visual_projection.weight"
    ]
    with pytest.raises(UsageError, match="has no projection"):
        tuning.unfreeze_projection(clip_files.load_clip(folders["dinov2"]))


def test_the_text_tower_of_siglip_is_trained(folders: dict[str, Path]):
    """By its own loss, bias included. Its inverse temperature is a vector of one number; what is logged is a number."""
    clip = clip_files.load_clip(folders["siglip"])
    pairs = pairs_of(("a red ball", "a tree on snow"), labels=(-1, -1), names=())
    assert pairs.real is not None
    images = torch.nn.functional.normalize(torch.randn(2, clip.dim, generator=torch.Generator().manual_seed(3)), dim=1)
    job = clip_text_job(clip, pairs, Arm((View(images, pairs.real, real=True),)))
    [row] = fit(job.module, loss=job.loss, rows=job.rows, recipe=Recipe(steps=2, batch_size=2, lr=1e-3))
    assert row["temperature"] == pytest.approx(1, abs=0.01)
    assert not torch.equal(job.module.logit_bias, clip.model.logit_bias)


def test_a_tower_without_texts_is_aligned_and_probed(folders: dict[str, Path], tmp_path: Path):
    """The SynCLR row: DINOv2 aligned with Eq. 1, a probe on top; tasks with texts refuse."""
    workspace = Workspace(tmp_path, "r")
    scenes = reader.read("scenes:train", limit=IMAGES, scene_size=32)
    rows, images = [], []
    for row, image in enumerate(scenes.images):
        caption = scenes.captions_of(image.id)[0]
        about = {"caption_id": caption.id, "caption": caption.text, "owner": image.id}
        rows.append({**about, "label": image.label})
        images.append(_shifted(scenes.image_bytes(row), seed=row))
    generated = _fake_generation(workspace, rows, images, "labelled")
    values = {
        "data": {
            "train": "scenes:train",
            "train_limit": IMAGES,
            "scene_size": 32,
            "test": "scenes:test",
            "test_limit": 8,
        },
        "model": {"clip": str(folders["dinov2"])},
        "align": {"steps": 20, "batch_size": 8, "lr": 3e-3, "validation": 0.25},
        "train": {
            "tasks": ["linear-probe", "llava"],
            "arms": ["real", "generated-aligned"],
            "steps": 10,
            "batch_size": 8,
        },
        "runtime": {"device": "cpu", "threads": 1},
    }
    profile = profiles.build(values)
    aligned = align.run(profile, workspace, generated=generated)
    curve = aligned.read_jsonl("metrics.jsonl")
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert "reads no captions, and there are too few held-out images of each class" in aligned.summary["verdict"]
    inputs: dict[str, Artifact] = {"generated": generated, "aligned": aligned}
    cells = train.run(profile, workspace, **inputs).read_json("cells.json")
    assert [(cell["task"], cell["arm"]) for cell in cells] == [
        (task, arm) for task in ("linear-probe", "llava") for arm in ("real", "generated-aligned")
    ]
    inputs["train"] = train.run(profile, workspace, **inputs)
    tables = embed.run(profile, workspace, **inputs)
    assert set(tables.summary["tables"]) == {"test-images", "gap-real", "gap-generated-naive", "gap-generated-aligned"}
    found = evaluate.run(profile, workspace, embeddings=tables, train=inputs.pop("train")).summary["metrics"]
    assert {"linear-probe.real.probe_top_1_accuracy", "llava.real.cider", "llava.generated-aligned.cider"} <= set(found)
    values["train"] = {"tasks": ["clip-text"], "arms": ["real"]}
    with pytest.raises(UsageError, match="has no text tower"):
        train.run(profiles.build(values), workspace, **inputs)
    values["align"] = {"objective": "text"}
    with pytest.raises(UsageError, match="has no text tower"):
        align.run(profiles.build(values), workspace, generated=generated)


def test_other_models_are_refused_by_name(folders: dict[str, Path], tmp_path: Path):
    (tmp_path / "bert").mkdir()
    BertConfig().save_pretrained(tmp_path / "bert")
    processor = (folders["vit"] / "preprocessor_config.json").read_text()
    (tmp_path / "bert" / "preprocessor_config.json").write_text(processor)
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        clip_files.load_clip(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").write_bytes((folders["vit"] / "model.safetensors").read_bytes())
    with pytest.raises(UsageError, match="of type 'bert'"):
        clip_files.load_clip(tmp_path / "bert")
    odd = {**json.loads(processor), "size": {"height": 32, "width": 40}}
    target = _write("vit", tmp_path / "odd")
    (target / "preprocessor_config.json").write_text(json.dumps(odd))
    with pytest.raises(InputError, match="is no square"):
        clip_files.load_clip(target)


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_old_and_new_files_of_a_repository_read_alike(kind: str, folders: dict[str, Path], tmp_path: Path):
    """As openai/clip-vit-base-patch32 (pickled weights, a size in one number) and as transformers 5 saves one."""
    plain = clip_files.load_clip(folders[kind])
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        shutil.copytree(folders[kind], folder)
    about = json.loads((old / "preprocessor_config.json").read_text())
    about |= {"feature_extractor_type": about.pop("image_processor_type").replace("ImageProcessor", "FeatureExtractor")}
    (old / "preprocessor_config.json").write_text(json.dumps({**about, "size": 36, "crop_size": 32}))
    torch.save(AutoModel.from_pretrained(old).state_dict(), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    found = clip_files.load_clip(old)
    assert (found.preprocess.resize, found.preprocess.scale_to, found.preprocess.size) == ("shortest", 36, 32)
    shown = torch.rand(2, 3, 32, 32)
    assert torch.equal(found.encode_images(shown), plain.encode_images(shown))
    whole = {"processor_class": "CLIPProcessor", "image_processor": json.loads((new / PROCESSOR).read_text())}
    (new / "processor_config.json").write_text(json.dumps(whole))
    (new / PROCESSOR).unlink()
    assert clip_files.load_clip(new).digest == plain.digest
    (old / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        clip_files.load_clip(old)
