"""The shipped small models load through the plain libraries and do what their provenance says."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import gmail_cli
from gmail_cli.components.generative import next_token_loss, reconstruction_psnr
from gmail_cli.components.scenes import CLASS_NAMES, captions, long_caption, render, sample_scene

WEIGHTS = Path(gmail_cli.__file__).parent / "weights" / "tiny"
TEXTS = ["A red ball on the left.", "Zebra, quartz & Ünïcode 漢字!", "", "many words " * 60]
TEST_SCENES = 200


@pytest.fixture(scope="module")
def scenes():
    found = [sample_scene("test", row) for row in range(TEST_SCENES)]
    return np.stack([render(scene) for scene in found]), [captions(scene)[0] for scene in found]


@pytest.fixture(scope="module")
def clip():
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{WEIGHTS / 'clip'}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{WEIGHTS / 'clip'}")


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(WEIGHTS / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline, prompts: list[str], *, steps: int) -> np.ndarray:
    generators = [torch.Generator().manual_seed(row) for row in range(len(prompts))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array__ implementation")  # diffusers' solver with numpy 2
        return pipeline(
            prompts, num_inference_steps=steps, guidance_scale=2.5, generator=generators, output_type="np"
        ).images


def test_all_weights_are_small_and_come_with_their_provenance() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert max(path.stat().st_size for path in files) < 8e6
    for name in ("clip", "pipeline", "lm"):
        record = json.loads((WEIGHTS / name / "provenance.json").read_text(encoding="utf-8"))
        assert all(run["command"].startswith("gmail train --profile tiny-") for run in record["training"]), name
        assert record["metrics"], name
    for path in files:
        if path.suffix == ".json":
            assert "_name_or_path" not in path.read_text(encoding="utf-8"), path


def test_clip_finds_held_out_scenes_by_their_captions(clip, scenes) -> None:
    from PIL import Image

    model, preprocess, tokenizer = clip
    pixels, texts = scenes
    with torch.inference_mode():
        images = model.encode_image(torch.stack([preprocess(Image.fromarray(one)) for one in pixels]), normalize=True)
        words = model.encode_text(tokenizer(texts), normalize=True)
    scores = (words @ images.T).numpy()
    ranks = (scores > scores.diagonal()[:, None]).sum(axis=1)
    assert (ranks < 1).mean() > 0.85, "0.96 when it was shipped"
    assert (ranks < 5).mean() > 0.98


def test_clip_knows_the_classes_of_held_out_scenes(clip, scenes) -> None:
    from PIL import Image

    model, preprocess, tokenizer = clip
    with torch.inference_mode():
        pixels = torch.stack([preprocess(Image.fromarray(one)) for one in scenes[0]])
        images = model.encode_image(pixels, normalize=True)
        names = model.encode_text(tokenizer([f"a photo of a {name}." for name in CLASS_NAMES]), normalize=True)
    labels = torch.tensor([CLASS_NAMES.index(sample_scene("test", row).label) for row in range(TEST_SCENES)])
    assert ((images @ names.T).argmax(dim=1) == labels).float().mean() > 0.65, "0.785 of 1,000 when it was shipped"


def test_tokenizers_of_open_clip_pipeline_and_language_model_agree(clip, pipeline) -> None:
    from transformers import AutoTokenizer

    expected = clip[2](TEXTS)
    assert expected.shape == (4, 77)
    assert int(expected.max()) == clip[0].vocab_size - 1
    settings = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
    for tokenizer in (pipeline.tokenizer, AutoTokenizer.from_pretrained(WEIGHTS / "lm")):
        assert torch.equal(tokenizer(TEXTS, **settings).input_ids, expected)


def test_pipeline_reads_text_as_the_clip_does(clip, pipeline) -> None:
    model, _, tokenizer = clip
    ids = tokenizer(TEXTS)
    with torch.inference_mode():
        states = model.token_embedding(ids) + model.positional_embedding
        states = model.ln_final(model.transformer(states, attn_mask=model.attn_mask))
        torch.testing.assert_close(pipeline.text_encoder(ids).last_hidden_state, states, atol=1e-4, rtol=0)


def test_autoencoder_of_the_pipeline_restores_scenes(pipeline, scenes) -> None:
    assert reconstruction_psnr(pipeline.vae, torch.from_numpy(scenes[0][:40])) > 25


def test_pipeline_draws_what_the_caption_says_of_the_sky(pipeline) -> None:
    """Night is darker than sunset and less red, pair by pair (chance: half): the least that a caption should settle."""
    grounds = ("on sand", "on snow", "on grass", "on water", "on a tiled floor", "on a wooden floor")
    prompts = [f"A red ball on the left {ground} {sky}." for sky in ("at night", "at sunset") for ground in grounds * 2]
    drawn = draw(pipeline, prompts, steps=8)
    assert drawn.shape == (24, 64, 64, 3)
    skies = drawn[:, :20].mean(axis=(1, 2))
    for measure in (skies.mean(axis=1), skies[:, 0] - skies[:, 2]):
        night, sunset = measure[:12], measure[12:]
        assert (night[:, None] < sunset[None, :]).mean() > 0.75, "0.84 of the pairs by redness when it was shipped"


def test_language_model_predicts_captions_and_writes_one() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(WEIGHTS / "lm").eval()
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "lm")
    texts = [captions(sample_scene("test", row))[1] for row in range(20)]
    texts += [long_caption(sample_scene("test", row)) for row in range(5)]
    ids = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").input_ids
    with torch.inference_mode():
        assert float(next_token_loss(model, ids, end=tokenizer.eos_token_id).exp()) < 4
        start = torch.tensor([[tokenizer.bos_token_id]])
        written = model.generate(
            inputs_embeds=model.get_input_embeddings()(start),
            attention_mask=torch.ones_like(start),
            max_new_tokens=60,
            do_sample=False,
        )
    assert written[0, -1] == tokenizer.eos_token_id
    words = tokenizer.decode(written[0], skip_special_tokens=True).split()
    assert len(words) > 5
