"""Stable Diffusion 2.1-base and SDXL at full size with random weights, in diffusers' format: speed needs no others.

    python benchmarks/full_size.py sd21-base|sdxl FOLDER
    python benchmarks/generate.py --model FOLDER --dtype float16 --format jpg --images 320 --steps 50 --batch-size 32

The configurations are those the models were published with. Weights are written in float16 (2.6 and 7 GB); the memory
needed is about as much. The tokenizer is CLIP's own, from the vocabulary that open_clip carries.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Write one."""
    kind, folder = sys.argv[1:]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    pipeline = {"sd21-base": stable_diffusion, "sdxl": stable_diffusion_xl}[kind]()
    pipeline.save_pretrained(folder)


def stable_diffusion() -> Any:
    """Stable Diffusion 2.1-base: 512 pixels."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=64, attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE, sample_size=768, scaling_factor=0.18215),
        text_encoder=CLIPTextModel(text(width=1024, layers=23, heads=16, projection=512)),
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    """SDXL 1.0 base: 1,024 pixels."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    second = text(width=1280, layers=32, heads=20, projection=1280)
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**VAE, sample_size=1024, scaling_factor=0.13025, force_upcast=False),
        text_encoder=CLIPTextModel(text(width=768, layers=12, heads=12, projection=768, activation="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
    )


VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def text(*, width: int, layers: int, heads: int, projection: int, activation: str = "gelu") -> Any:
    """Configuration of one of CLIP's text encoders."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=projection,
        hidden_act=activation,
    )


def tokenizer() -> Any:
    """CLIP's, as transformers has it."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    known = SimpleTokenizer()
    merges = [" ".join(pair) for pair, _ in sorted(known.bpe_ranks.items(), key=lambda each: each[1])]
    made = CLIPTokenizer(vocab=known.encoder, merges=[tuple(each.split(" ")) for each in merges], model_max_length=77)
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        return CLIPTokenizer.from_pretrained(Path(folder))


if __name__ == "__main__":
    main()
