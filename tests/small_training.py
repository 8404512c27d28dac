"""Models, scenes and the artifacts of the stages before training, small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gmail_cli.artifacts import Artifact, StageKey, Workspace
from gmail_cli.components import captions, scenes
from gmail_cli.components.clip_files import build_clip, load_clip, save_clip
from gmail_cli.components.tokenizer import save_tokenizer, train_tokenizer
from gmail_cli.profile import build
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import train

SIDE, IMAGES = 32, 30


def clip_config(vocabulary: int) -> dict[str, Any]:
    vision = {"image_size": SIDE, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 77, "vocab_size": vocabulary, "width": 32, "heads": 2, "layers": 2}
    text["hf_tokenizer_name"] = "tokenizer"
    model = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    return {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}


class World:
    """Models, scenes and the artifacts of the stages before, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workspace = Workspace(folder / "runs", "mini")

    def make(self) -> World:
        """Write everything; a process that only trains finds it written."""
        from open_clip.tokenizer import HFTokenizer

        texts = [text for i in range(IMAGES) for text in scenes.captions(scenes.sample_scene("train", i))]
        tokenizer = train_tokenizer(texts, entries=700)
        for name in ("vocabulary", "clip", "lm"):
            (self.folder / name).mkdir()
        save_tokenizer(tokenizer, self.folder / "vocabulary")
        save_tokenizer(tokenizer, self.folder / "lm")
        torch.manual_seed(1)
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        lm = GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_embd=32, n_head=2, n_positions=80, **ends)
        GPT2LMHeadModel(lm).save_pretrained(self.folder / "lm")
        reader = HFTokenizer(str(self.folder / "vocabulary"), 77)
        clip = build_clip(clip_config(len(tokenizer)), seed=2, tokenizer=reader)
        save_clip(clip, self.folder / "clip")
        (self.folder / "architecture.json").write_text(json.dumps(clip_config(700)))
        self._make_generated()
        self._make_aligned()
        return self

    def _make_generated(self) -> None:
        """Two "generated" images of each scene's first two captions: other scenes' brighter cousins."""
        data = captions.read("scenes:train", limit=IMAGES, scene_size=SIDE)
        with self.workspace.open(StageKey(stage="generate", settings={})) as slot:
            rows = [
                self._generate(slot, caption, image, k)
                for image in data.images
                for caption in data.captions_of(image.id)[:2]
                for k in range(2)
            ]
            slot.write_jsonl("records.jsonl", rows)
            slot.commit(summary={})

    def _generate(self, slot: Any, caption: Any, image: Any, k: int) -> dict[str, Any]:
        import hashlib

        index = int(image.id.rsplit("-", 1)[-1]) if image.id.rsplit("-", 1)[-1].isdigit() else k
        content = scenes.scene_bytes("train", index, seed=k + 1, size=SIDE)
        key = f"{caption.id.replace('/', '-')}-{k}"
        slot.write_bytes(f"images/000/{key}.png", content)
        return {
            "key": key,
            "caption_id": caption.id,
            "caption": caption.text,
            "owner": image.id,
            "label": image.label,
            "k": k,
            "seed": k,
            "sha256": hashlib.sha256(content).hexdigest(),
            "path": f"images/000/{key}.png",
            "width": SIDE,
            "height": SIDE,
        }

    def _make_aligned(self, workspace: Workspace | None = None, *, by: float = 1.1) -> Artifact:
        clip = load_clip(self.folder / "clip")
        with torch.no_grad():
            for parameter in clip.model.visual.parameters():
                parameter.mul_(by)
        models = {"clip": clip.digest}
        with (workspace or self.workspace).open(StageKey(stage="align", settings={"by": by}, models=models)) as slot:
            slot.write_folder("clip", lambda folder: save_clip(clip, folder))
            return slot.commit(summary={})

    def profile(self, **settings: Any) -> Profile:
        values = {"steps": 40, "batch_size": 16, "lr": 3e-3, "lm": str(self.folder / "lm"), **settings}
        return build(
            {
                "data": {"train": "scenes:train", "train_limit": IMAGES, "scene_size": SIDE},
                "model": {"clip": str(self.folder / "clip")},
                "train": values,
                "runtime": {"device": "cpu", "checkpoint_seconds": 0.0},
            }
        )

    def inputs(self) -> dict[str, Artifact]:
        generated, aligned = self.workspace.latest("generate"), self.workspace.latest("align")
        assert generated is not None
        assert aligned is not None
        return {"generated": generated, "aligned": aligned}

    def train(self, workspace: Workspace | None = None, **settings: Any) -> Artifact:
        return train.run(self.profile(**settings), workspace or self.workspace, **self.inputs())
