"""The command that makes the shipped models, in two steps of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gmail_cli.weights import build


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_all_models_are_trained_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip
    from diffusers import DiffusionPipeline
    from transformers import AutoModelForCausalLM

    for name, count in (("TEST_SCENES", 20), ("PROBE_SCENES", 40), ("DRAWN", 4)):
        monkeypatch.setattr(build, name, count)
    small = ["train.steps=2", "train.batch_size=4", "data.train_limit=40", "runtime.threads=1"]
    records = build.build(tmp_path / "made", tmp_path / "runs", overrides=small)

    made = tmp_path / "made"
    open_clip.create_model(f"local-dir:{made / 'clip'}")
    assert DiffusionPipeline.from_pretrained(made / "pipeline").unet.config.cross_attention_dim == 128
    AutoModelForCausalLM.from_pretrained(made / "lm")
    vocabularies = [
        json.loads((made / folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        for folder in ("clip", "lm", "pipeline/tokenizer")
    ]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]

    assert {*records} == {"clip", "lm", "pipeline"}
    for name, record in records.items():
        assert json.loads((made / name / "provenance.json").read_text(encoding="utf-8")) == record
        for run in record["training"]:
            assert run["samples"] == 8
            assert run["device"] == "cpu"
    commands = [run["command"] for record in records.values() for run in record["training"]]
    assert commands == [f"gmail train --profile tiny-{name}" for name in ("clip", "lm", "autoencoder", "diffusion")]
    assert records["clip"]["metrics"]["scenes"] == 20
    assert {*records["pipeline"]["metrics"]["generated"]["agreement"]} == set(build.FACTS)

    from safetensors.torch import load_file

    kinds = {tensor.dtype for tensor in load_file(made / "clip" / "open_clip_model.safetensors").values()}
    assert kinds == {torch.float16, torch.int64}
