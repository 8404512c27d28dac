"""Small generators trained from nothing: an autoencoder, a latent denoiser and a causal language model.

Each function returns a `Job` for the training loop, built from a plain configuration and exported in the format of the
library that loads it: diffusers for the autoencoder and the Stable Diffusion pipeline, transformers for the language
model. The shipped models under ``weights/tiny`` were made this way (``docs/weights.md``).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from gmail_cli.components.arms import Arm
from gmail_cli.components.loop import Job, seed_from
from gmail_cli.components.pairs import Pairs
from gmail_cli.components.tasks import quick_attention
from gmail_cli.components.tokenizer import save_tokenizer
from gmail_cli.errors import InputError, UsageError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase

SHIPPED_AUTOENCODERS = {"tiny": Path(__file__).resolve().parents[1] / "weights" / "tiny" / "pipeline" / "vae"}
LARGEST_FILE = "7MB"
"""Weights are saved in files of at most this size where the library can split them."""

# --- autoencoder ----------------------------------------------------------------------------------------------


def autoencoder_job(
    arm: Arm,
    *,
    rows: int,
    side: int,
    steps: int,
    seed: int,
    device: torch.device,
    channels: Sequence[int] = (16, 32, 64),
    latent_channels: int = 4,
    kl_weight: float = 1e-5,
    whole_share: float = 0.03,
) -> Job:
    """A convolutional variational autoencoder (Rombach et al. 2022); three levels code a quarter of the side.

    The loss is the mean absolute error plus ``kl_weight`` times the KL divergence per latent value. Crops of half
    the side, which cost a quarter, are seen until the last ``whole_share`` of the steps. Exporting measures
    ``scaling_factor``, the reciprocal of the latents' standard deviation over the first images.

    Args:
        arm: uint8 pixels (images, side, side, 3).
        rows: Number of captions whose images are drawn.
        side: Side of an image, pixels.
        steps: Steps in all.
        seed: Of the initial parameters.
        device: Where to train.
        channels: Of the levels, from the pixels down; each halves the side of the one before.
        latent_channels: Channels of the latents.
        kl_weight: Weight of the KL divergence.
        whole_share: Share of the steps, the last ones, that see whole images.
    """
    from diffusers import AutoencoderKL

    with _seeded("autoencoder", seed):
        model = AutoencoderKL(
            sample_size=side,
            block_out_channels=tuple(channels),
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=8,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    with torch.no_grad():
        model.encoder.conv_out.bias[latent_channels:] = -6.0  # log variance: start with little noise
    model = model.to(device, memory_format=torch.channels_last).train()

    def loss(drawn: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, _ = arm.draw(drawn)
        if step < (1 - whole_share) * steps:
            top, left = torch.randint(side // 2 + 1, (2,)).tolist()
            pixels = pixels[:, top : top + side // 2, left : left + side // 2]
        images = as_images(pixels, device=device)
        posterior = model.encode(images).latent_dist
        decoded = model.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        value = functional.l1_loss(decoded, images) + kl_weight * kl
        psnr = 10 * torch.log10(4 / functional.mse_loss(decoded.detach(), images))
        return value, {"psnr": psnr, "kl": kl.detach()}

    def export(folder: Path) -> None:
        latents = encode_latents(model, arm.views[0].values[:1024])
        model.register_to_config(scaling_factor=float(1 / latents.std()))
        copy.deepcopy(model).half().save_pretrained(folder, max_shard_size=LARGEST_FILE)

    return Job(module=model, loss=loss, rows=rows, export=export)


def as_images(
    pixels: UInt8[Tensor, "batch side side 3"], *, device: torch.device
) -> Float[Tensor, "batch 3 side side"]:
    """Pixels as floats in [-1, 1], channels first (and last in memory)."""
    return pixels.to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def autoencoder_folder(ref: str) -> Path:
    """The folder of ``tiny``, or the one that ``ref`` names.

    Raises:
        InputError: There is no autoencoder in it.
    """
    folder = SHIPPED_AUTOENCODERS.get(ref, Path(ref))
    if not (folder / "config.json").is_file():
        raise InputError(
            f"train.autoencoder = {ref!r}: {folder} holds no autoencoder in diffusers format",
            hint="Give tiny, or the cell of `gmail train --profile tiny-autoencoder`.",
        )
    return folder


def load_autoencoder(ref: str) -> Any:
    """An `AutoencoderKL` in single precision; see `autoencoder_folder`."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(autoencoder_folder(ref), local_files_only=True).eval()
    model.register_to_config(_name_or_path="")  # or the pipeline would record where it lay
    return model


@torch.inference_mode()
def encode_latents(
    model: Any, pixels: UInt8[Tensor, "images side side 3"]
) -> Float[Tensor, "images latent height width"]:
    """Mean latents of an autoencoder, not scaled, on the CPU."""
    device = next(model.parameters()).device
    return torch.cat(
        [model.encode(as_images(chunk, device=device)).latent_dist.mean.cpu() for chunk in pixels.split(128)]
    )


@torch.inference_mode()
def reconstruction_psnr(model: Any, pixels: UInt8[Tensor, "images side side 3"]) -> float:
    """Mean peak signal-to-noise ratio per image of decoded mean latents, dB."""
    device = next(model.parameters()).device
    ratios = []
    for chunk in pixels.split(128):
        images = as_images(chunk, device=device)
        decoded = model.decode(model.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        ratios.append(10 * torch.log10(4 / (decoded - images).square().mean(dim=(1, 2, 3))))
    return float(torch.cat(ratios).mean())


# --- text encoder and denoiser --------------------------------------------------------------------------------


def text_encoder_of(model: Any) -> CLIPTextModel:
    """The text tower of an open_clip ``CLIP`` as transformers' `CLIPTextModel`, which Stable Diffusion reads.

    Its last hidden states are those of the tower after the final norm; the projection is left out.

    Raises:
        UsageError: The tower is not the plain causal transformer that CLIP has.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    blocks = getattr(getattr(model, "transformer", None), "resblocks", None)
    if not blocks or not isinstance(blocks[0].mlp.gelu, nn.GELU) or model.text_pool_type != "argmax":
        raise UsageError(
            "the text tower of this CLIP cannot become a CLIPTextModel",
            hint="Take a CLIP with GELU, a causal text transformer and end-of-text pooling, such as tiny.",
        )
    end = model.vocab_size - 1
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.positional_embedding.shape[1],
            intermediate_size=blocks[0].mlp.c_fc.out_features,
            projection_dim=model.text_projection.shape[1],
            num_hidden_layers=len(blocks),
            num_attention_heads=blocks[0].attn.num_heads,
            max_position_embeddings=model.context_length,
            hidden_act="gelu",
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    state = {
        "embeddings.token_embedding.weight": model.token_embedding.weight,
        "embeddings.position_embedding.weight": model.positional_embedding,
        "final_layer_norm.weight": model.ln_final.weight,
        "final_layer_norm.bias": model.ln_final.bias,
    }
    for index, block in enumerate(blocks):
        place = f"encoder.layers.{index}"
        for name, weight, bias in zip(
            "qkv", block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True
        ):
            state |= {f"{place}.self_attn.{name}_proj.weight": weight, f"{place}.self_attn.{name}_proj.bias": bias}
        for name, module in {
            "layer_norm1": block.ln_1,
            "layer_norm2": block.ln_2,
            "self_attn.out_proj": block.attn.out_proj,
            "mlp.fc1": block.mlp.c_fc,
            "mlp.fc2": block.mlp.c_proj,
        }.items():
            state |= {f"{place}.{name}.weight": module.weight, f"{place}.{name}.bias": module.bias}
    encoder.load_state_dict({name: value.detach() for name, value in state.items()})
    return encoder.eval().requires_grad_(False)


def latent_diffusion_job(
    pairs: Pairs,
    latents: Arm,
    *,
    autoencoder: Any,
    text_encoder: CLIPTextModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    device: torch.device,
    channels: Sequence[int] = (32, 64, 128),
    caption_dropout: float = 0.1,
) -> Job:
    """A latent denoiser conditioned on captions, trained by flow matching; exports a Stable Diffusion pipeline.

    With data ``x``, noise ``e`` and a level ``s`` in (0, 1), the denoiser sees ``(1 - s) x + s e`` and the time
    ``1000 s`` and is trained to answer ``e - x`` (Lipman et al. 2023); ``s`` is logit-normal (Esser et al. 2024).
    This is what diffusers' solvers call ``flow_prediction``.

    The caption is read twice: token by token in attention beside the latents' own positions, and pooled, which scales
    and shifts every residual block. What is true of the whole picture (ground, sky) is learned from the latter within
    the first thousands of samples, what belongs to a place from the former.

    Args:
        pairs: The captions.
        latents: Latents (images, channels, height, width) of the images that show them, from `encode_latents`.
        autoencoder: The autoencoder that made them; stays frozen.
        text_encoder: Reads the captions; stays frozen.
        tokenizer: Of the text encoder.
        seed: Of the initial parameters.
        device: Where to train.
        channels: Of the denoiser's levels, from the latents' resolution down; each halves the side. Multiples of 32.
            The first level has convolutions only.
        caption_dropout: Share of captions replaced by the empty one, for classifier-free guidance.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnAddedKVProcessor

    encoder = text_encoder.to(device).eval().requires_grad_(False)
    decoder = autoencoder.to(device).eval().requires_grad_(False)
    depth, side = latents.views[0].values.shape[1:3]
    attending = len(channels) - 1
    with _seeded("denoiser", seed):
        model = UNet2DConditionModel(
            sample_size=side,
            in_channels=depth,
            out_channels=depth,
            block_out_channels=tuple(channels),
            down_block_types=("DownBlock2D", *("SimpleCrossAttnDownBlock2D",) * attending),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=(*("SimpleCrossAttnUpBlock2D",) * attending, "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=encoder.config.hidden_size,
            attention_head_dim=32,
            norm_num_groups=8,
            resnet_time_scale_shift="scale_shift",
            addition_embed_type="text",
            addition_embed_type_num_heads=4,
        )
    model.set_attn_processor(AttnAddedKVProcessor())  # matrix products and a softmax: quicker backwards on a CPU
    model = model.to(device, memory_format=torch.channels_last).train()
    texts = _token_table(tokenizer, pairs.texts, padding="max_length")
    empty = _token_table(tokenizer, [""], padding="max_length")

    def loss(rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        drawn, _ = latents.draw(rows)
        clean = drawn.float() * decoder.config.scaling_factor
        tokens = torch.where(torch.rand(len(rows), 1) < caption_dropout, empty, texts[rows])
        noise = torch.randn(clean.shape).to(device)
        level = torch.sigmoid(torch.randn(len(rows), 1, 1, 1)).to(device)
        noisy = torch.lerp(clean.to(device), noise, level).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), quick_attention(device):
            states = encoder(tokens.to(device)).last_hidden_state
        answer = model(noisy, 1000 * level.flatten(), states).sample
        return functional.mse_loss(answer, noise - clean.to(device)), {}

    def export(folder: Path) -> None:
        from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

        parts = {"vae": decoder, "unet": model, "text_encoder": encoder}
        pipeline = StableDiffusionPipeline(
            **{name: copy.deepcopy(part).half() for name, part in parts.items()},
            tokenizer=tokenizer,
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder, max_shard_size=LARGEST_FILE)
        _load_as_single_precision(folder / "text_encoder")
        _forget_place(folder / "vae")
        save_tokenizer(tokenizer, folder / "tokenizer")

    return Job(module=model, loss=loss, rows=len(pairs), export=export)


# --- language model -------------------------------------------------------------------------------------------


def causal_lm_job(pairs: Pairs, *, tokenizer: PreTrainedTokenizerBase, seed: int, device: torch.device) -> Job:
    """A causal language model over captions, GPT-2's architecture (Radford et al. 2019), 192 wide and 4 deep.

    A text is start, caption, end.

    Args:
        pairs: The captions.
        tokenizer: With start and end tokens; saved beside the model.
        seed: Of the initial parameters.
        device: Where to train.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if start is None or end is None:
        raise InputError("the tokenizer lacks a start or end token", hint="Take the tokenizer of a CLIP.")
    with _seeded("causal-lm", seed):
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=128,
                n_embd=192,
                n_layer=4,
                n_head=6,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=start,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
    model = model.to(device).train()
    texts = _token_table(tokenizer, pairs.texts)

    def loss(rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        with quick_attention(device):
            return next_token_loss(model, texts[rows].to(device), end=int(end)), {}

    def export(folder: Path) -> None:
        copy.deepcopy(model).half().save_pretrained(folder, max_shard_size=LARGEST_FILE)
        _load_as_single_precision(folder)
        save_tokenizer(tokenizer, folder)

    return Job(module=model, loss=loss, rows=len(pairs), export=export)


def next_token_loss(model: Any, tokens: Int[Tensor, "batch length"], *, end: int) -> Float[Tensor, ""]:
    """Mean cross-entropy of each token given those before it, up to and with the first ``end``."""
    ends = (tokens == end).int().argmax(dim=1, keepdim=True)
    tokens = tokens[:, : int(ends.max()) + 1]
    targets = tokens.masked_fill(torch.arange(tokens.shape[1], device=tokens.device) > ends, -100)
    logits = model(input_ids=tokens[:, :-1], attention_mask=torch.ones_like(tokens[:, :-1])).logits
    return functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)


# --- shared ---------------------------------------------------------------------------------------------------


@contextmanager
def _seeded(*parts: int | str) -> Iterator[None]:
    """Initial parameters as a function of ``parts``, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from("initial", *parts))
        yield


def _token_table(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, padding: str = "longest"
) -> Int[Tensor, "texts length"]:
    """Token ids, padded to the longest text (or to the context, ``max_length``) and cut to the context."""
    table: Tensor = tokenizer(list(texts), padding=padding, truncation=True, return_tensors="pt").input_ids
    return table


def _forget_place(folder: Path) -> None:
    """Take out of a diffusers config where its weights had been loaded from."""
    path = folder / "config.json"
    config = {
        key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key != "_name_or_path"
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _load_as_single_precision(folder: Path) -> None:
    """Let transformers load what is stored at half precision as single precision."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
