"""Autoencoder, denoiser and language model: what is trained, and that the libraries load what is exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gmail_cli.components import captions, generative
from gmail_cli.components.arms import Arm, View
from gmail_cli.components.clip_files import build_clip
from gmail_cli.components.loop import Job, Recipe, fit
from gmail_cli.components.pairs import Pairs, pair
from gmail_cli.components.scenes import render, sample_scene
from gmail_cli.components.tokenizer import CONTEXT_LENGTH, END, START, save_tokenizer, train_tokenizer
from gmail_cli.errors import InputError, UsageError

CPU = torch.device("cpu")
TEXT = {"context_length": CONTEXT_LENGTH, "width": 32, "heads": 2, "layers": 2}
CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": TEXT,
    },
    "preprocess_cfg": {},
}


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return pair(captions.read("scenes:train", limit=6))


@pytest.fixture(scope="module")
def arm(pairs: Pairs) -> Arm:
    pixels = np.stack([render(sample_scene("train", row), size=32) for row in range(6)])
    assert pairs.real is not None
    return Arm((View(torch.from_numpy(pixels), pairs.real, real=True),))


@pytest.fixture(scope="module")
def tokenizer(pairs: Pairs):
    return train_tokenizer(pairs.texts, entries=600)


def clip_model(tokenizer, **text: object):
    model = {**CONFIG["model_cfg"], "text_cfg": {**TEXT, "vocab_size": len(tokenizer), **text}}
    return build_clip({**CONFIG, "model_cfg": model}, seed=0, name="small", device=CPU).model


def trained(job: Job, *, steps: int, lr: float = 2e-3) -> list[dict[str, float]]:
    recipe = Recipe(steps=steps, batch_size=6, lr=lr, log_every=1, seed=0)
    return fit(job.module, loss=job.loss, rows=job.rows, recipe=recipe)


# --- tokenizer ------------------------------------------------------------------------------------------------


def test_end_of_text_has_the_highest_id_and_any_text_has_an_encoding(tokenizer, pairs: Pairs) -> None:
    assert len(tokenizer) <= 600
    assert tokenizer.convert_tokens_to_ids([START, END]) == [len(tokenizer) - 2, len(tokenizer) - 1]
    for text in ("Ünïcode 漢字 🙂", "it's 42!", "", pairs.texts[0]):
        ids = tokenizer(text).input_ids
        assert ids[0] == len(tokenizer) - 2
        assert ids[-1] == len(tokenizer) - 1
        assert ids.count(ids[-1]) == 1, "no unknown token, which would read as end of text"
        spaceless = tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "")
        assert spaceless == text.lower().replace(" ", "")


def test_saved_tokenizer_gives_the_same_ids_to_open_clip_and_transformers(tokenizer, pairs: Pairs, tmp_path) -> None:
    from open_clip.tokenizer import HFTokenizer
    from transformers import AutoTokenizer, CLIPTokenizer

    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "from_files").mkdir()
    texts = [*pairs.texts[:4], "zebra, quartz!", "long " * 100]
    settings = {"padding": "max_length", "max_length": CONTEXT_LENGTH, "truncation": True, "return_tensors": "pt"}
    expected = AutoTokenizer.from_pretrained(tmp_path)(texts, **settings).input_ids
    assert torch.equal(HFTokenizer(str(tmp_path), CONTEXT_LENGTH)(texts), expected)
    parts = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert torch.equal(parts(texts, **settings).input_ids, expected)


def test_tokenizer_needs_room_for_merges() -> None:
    with pytest.raises(UsageError, match="514"):
        train_tokenizer(["a"], entries=514)


# --- autoencoder ----------------------------------------------------------------------------------------------


def autoencoder(arm: Arm, *, steps: int, seed: int = 0) -> Job:
    return generative.autoencoder_job(
        arm, rows=30, side=32, steps=steps, seed=seed, device=CPU, channels=(8, 16, 16), whole_share=0.5
    )


def test_autoencoder_learns_and_its_export_scales_latents_to_unit_variance(arm: Arm, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    pixels = arm.views[0].values
    job = autoencoder(arm, steps=20)
    before = generative.reconstruction_psnr(job.module, pixels)
    trained(job, steps=20, lr=5e-3)
    assert generative.reconstruction_psnr(job.module.eval(), pixels) > before + 0.8
    job.export(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert next(loaded.parameters()).dtype == torch.float32
    latents = generative.encode_latents(loaded, pixels)
    assert latents.shape == (6, 4, 8, 8)
    assert float(latents.std()) * loaded.config.scaling_factor == pytest.approx(1, rel=1e-2)


def test_autoencoder_sees_crops_first_and_whole_images_last(arm: Arm, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []
    plain = generative.as_images

    def spy(pixels: Tensor, *, device: torch.device) -> Tensor:
        sides.append(pixels.shape[1])
        return plain(pixels, device=device)

    monkeypatch.setattr(generative, "as_images", spy)
    trained(autoencoder(arm, steps=4), steps=4)
    assert sides == [16, 16, 32, 32]


def test_initial_parameters_depend_on_the_seed_alone(arm: Arm) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (autoencoder(arm, steps=1, seed=seed).module.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.conv_in.weight"], other["encoder.conv_in.weight"])


def test_a_folder_without_an_autoencoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.autoencoder"):
        generative.load_autoencoder(str(tmp_path))


# --- text encoder and denoiser --------------------------------------------------------------------------------


def test_text_encoder_gives_the_states_of_the_text_tower(tokenizer, pairs: Pairs) -> None:
    model = clip_model(tokenizer)
    torch.nn.init.normal_(model.transformer.resblocks[0].attn.in_proj_bias)
    ids = tokenizer(list(pairs.texts[:3]), padding="max_length", return_tensors="pt").input_ids
    with torch.inference_mode():
        states = model.token_embedding(ids) + model.positional_embedding
        states = model.ln_final(model.transformer(states, attn_mask=model.attn_mask))
        encoded = generative.text_encoder_of(model)(ids)
        pooled = encoded.pooler_output @ model.text_projection
        torch.testing.assert_close(encoded.last_hidden_state, states, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pooled, model.encode_text(ids), atol=1e-5, rtol=1e-5)


def test_a_text_tower_that_pools_otherwise_is_refused(tokenizer) -> None:
    with pytest.raises(UsageError, match="CLIPTextModel"):
        generative.text_encoder_of(clip_model(tokenizer, pool_type="last"))


def denoiser(pairs: Pairs, arm: Arm, tokenizer) -> Job:
    coder = autoencoder(arm, steps=1).module.eval()
    latents = View(generative.encode_latents(coder, arm.views[0].values), arm.views[0].candidates, real=True)
    return generative.latent_diffusion_job(
        pairs,
        Arm((latents,)),
        autoencoder=coder,
        text_encoder=generative.text_encoder_of(clip_model(tokenizer)),
        tokenizer=tokenizer,
        seed=0,
        device=CPU,
        channels=(16, 32),
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_denoiser_learns_and_its_export_is_a_pipeline(pairs: Pairs, arm: Arm, tokenizer, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    job = denoiser(pairs, arm, tokenizer)
    losses = [row["loss"] for row in trained(job, steps=30)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    job.export(tmp_path)
    assert not [path for path in tmp_path.rglob("*.safetensors") if path.stat().st_size > 8e6]
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    drawn = pipeline("a red ball", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0))
    assert drawn.images.shape == (1, 32, 32, 3)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_the_solver_reads_time_and_answer_as_the_loss_defines_them(pairs: Pairs, arm: Arm, tokenizer, tmp_path) -> None:
    """A denoiser that always answers e - x takes the noise e to the data x, whatever the number of steps."""
    from diffusers import DPMSolverMultistepScheduler

    denoiser(pairs, arm, tokenizer).export(tmp_path)
    scheduler = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "scheduler")
    data, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for steps in (1, 4, 10):
        scheduler.set_timesteps(steps)
        sample = noise * scheduler.init_noise_sigma
        for index, time in enumerate(scheduler.timesteps):
            level = float(scheduler.sigmas[index])
            assert float(time) == pytest.approx(1000 * level, abs=1)
            torch.testing.assert_close(sample, torch.lerp(data, noise, level), atol=1e-2, rtol=0)
            sample = scheduler.step(noise - data, time, sample).prev_sample
        torch.testing.assert_close(sample, data, atol=1e-2, rtol=0)


# --- language model -------------------------------------------------------------------------------------------


def test_language_model_learns_and_loads_with_transformers(pairs: Pairs, tokenizer, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    job = generative.causal_lm_job(pairs, tokenizer=tokenizer, seed=0, device=CPU)
    losses = [row["loss"] for row in trained(job, steps=12)]
    assert losses[-1] < losses[0] - 1
    job.export(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert next(loaded.parameters()).dtype == torch.float32
    assert loaded.config.eos_token_id == tokenizer.eos_token_id


def test_next_token_loss_counts_the_first_end_and_nothing_after(tokenizer) -> None:
    class Even(torch.nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
            logits = torch.zeros(*input_ids.shape, 4)
            logits[..., 3] = torch.arange(input_ids.shape[1]).float()
            return type("Out", (), {"logits": logits})

    tokens = torch.tensor([[2, 0, 3, 3, 3], [2, 3, 3, 3, 3]])
    # Row 0 answers 0 at logits (0,0,0,0), 3 at (0,0,0,1); row 1 answers 3 at (0,0,0,0); nothing after that counts.
    expected = np.mean([np.log(4), np.log(3 + np.e) - 1, np.log(4)])
    assert float(generative.next_token_loss(Even(), tokens, end=3)) == pytest.approx(expected, rel=1e-6)
