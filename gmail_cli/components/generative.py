"""The small models this package ships, trained from nothing on captioned pictures.

A CLIP, a Stable Diffusion pipeline (autoencoder, text encoder, denoiser) and a causal language model, each built
from a plain configuration and saved in the format of the library that loads it: open_clip, diffusers and
transformers. Every function returns a `GenerativeTask`: what to train, its loss, and how to save the result.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from gmail_cli.components.loop import seed_from
from gmail_cli.components.tokenizer import CONTEXT_LENGTH, save_tokenizer
from gmail_cli.errors import InputError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

Progress = Callable[[int, int], None]
Metrics = dict[str, float]
Pixels = UInt8[np.ndarray, "rows side side 3"]

CLIP_MEAN = CLIP_STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Captioned pictures in memory.

    Attributes:
        pixels: uint8, N square RGB pictures.
        captions: For each picture its short captions, the same number for all.
        long_captions: For each picture one long caption.
    """

    pixels: Pixels
    captions: Sequence[Sequence[str]]
    long_captions: Sequence[str]

    def __post_init__(self) -> None:
        counts = {len(texts) for texts in self.captions}
        if not len(self.pixels) == len(self.captions) == len(self.long_captions) or len(counts) != 1:
            raise InputError(
                f"{len(self.pixels)} pictures, {len(self.captions)} lists of {sorted(counts)} captions and "
                f"{len(self.long_captions)} long captions do not fit together",
                hint="Give every picture the same number of short captions and one long caption.",
            )

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def side(self) -> int:
        """Side of a picture, pixels."""
        return int(self.pixels.shape[1])

    def batch(self, rows: Int[Tensor, "batch"], *, device: torch.device) -> Float[Tensor, "batch 3 side side"]:
        """Pictures as floats in [-1, 1]."""
        pixels = torch.from_numpy(self.pixels[rows.numpy()]).to(device)
        return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


@dataclass(frozen=True, kw_only=True)
class GenerativeTask:
    """Something for `gmail_cli.components.loop.fit` to train.

    Attributes:
        module: Owns what is trained, and nothing else that asks for gradients.
        loss: ``loss(rows, step)`` as the loop wants it.
        rows: Number of training rows.
        export: Writes the trained model into a folder.
        evaluate: Measures the trained model on held-out pictures.
    """

    module: nn.Module
    loss: Callable[[Tensor, int], tuple[Tensor, dict[str, Tensor]]]
    rows: int
    export: Callable[[Path], None]
    evaluate: Callable[[Pictures], Metrics]


# --- CLIP -----------------------------------------------------------------------------------------------------


def clip_config(*, side: int, vocabulary: int) -> dict[str, Any]:
    """The open_clip configuration of the small CLIP: ViT 128 x 6 on 8-pixel patches, text transformer 192 x 3."""
    return {
        "model_cfg": {
            "embed_dim": 192,
            "vision_cfg": {
                "image_size": side,
                "patch_size": 8,
                "width": 128,
                "layers": 6,
                "head_width": 32,
                "pos_embed_type": "sin_cos_2d",
                "pool_type": "avg",
            },
            "text_cfg": {
                "context_length": CONTEXT_LENGTH,
                "vocab_size": vocabulary,
                "hf_tokenizer_name": "tokenizer",
                "width": 192,
                "heads": 6,
                "layers": 3,
            },
        },
        "preprocess_cfg": {
            "mean": list(CLIP_MEAN),
            "std": list(CLIP_STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def clip_task(
    pictures: Pictures,
    *,
    tokenizer: CLIPTokenizer,
    steps: int,
    seed: int = 0,
    device: str = "cpu",
    patch_dropout: float = 0.5,
    whole_share: float = 0.25,
    long_every: int = 8,
) -> GenerativeTask:
    """Contrastive training of a small CLIP (Radford et al. 2021) on pictures and their captions.

    Args:
        pictures: What to train on; any of a picture's short captions is drawn each time.
        tokenizer: From `gmail_cli.components.tokenizer.train_tokenizer`.
        steps: Steps in all, for ``whole_share``.
        seed: Of the initial parameters.
        device: Where to train.
        patch_dropout: Share of patches left out while training (Li et al. 2023, FLIP).
        whole_share: Share of the steps, the last ones, that see all patches.
        long_every: Every so many steps the long captions are used, truncated to the context.
    """
    from open_clip.model import CLIP
    from open_clip.transformer import PatchDropout

    config = clip_config(side=pictures.side, vocabulary=len(tokenizer))
    with _seeded("clip", seed):
        model = CLIP(**config["model_cfg"], output_dict=False)
    model = model.to(device).train()
    dropout = model.visual.patch_dropout = PatchDropout(patch_dropout)
    short = _token_table(tokenizer, [text for texts in pictures.captions for text in texts])
    long = _token_table(tokenizer, pictures.long_captions)
    per_picture = len(pictures.captions[0])

    def loss(rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        dropout.prob = patch_dropout if step < (1 - whole_share) * steps else 0.0
        if step % long_every == long_every - 1:
            tokens = long[rows]
        else:
            tokens = short[rows * per_picture + torch.randint(per_picture, rows.shape)]
        with _plain_attention():
            images = functional.normalize(model.visual(pictures.batch(rows, device=_device(model))), dim=-1)
            texts = functional.normalize(encode_tokens(model, tokens.to(_device(model))), dim=-1)
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100.0))
        logits = model.logit_scale.exp() * images @ texts.T
        target = torch.arange(len(rows), device=logits.device)
        value = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
        return value, {"accuracy": (logits.argmax(dim=1) == target).float().mean()}

    def export(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _save_half(model.state_dict(), folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_tokenizer(tokenizer, folder)

    def evaluate(held_out: Pictures) -> Metrics:
        return clip_recall(model, tokenizer, held_out)

    return GenerativeTask(module=model, loss=loss, rows=len(pictures), export=export, evaluate=evaluate)


def encode_tokens(model: Any, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch dim"]:
    """Text embeddings of an open_clip CLIP, cut at the batch's longest text (causal attention: nothing changes)."""
    ends = tokens.argmax(dim=1)
    length = int(ends.max()) + 1
    states = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    states = model.ln_final(model.transformer(states, attn_mask=model.attn_mask[:length, :length]))
    pooled: Tensor = states[torch.arange(len(tokens), device=tokens.device), ends] @ model.text_projection
    return pooled


@torch.inference_mode()
def clip_recall(model: Any, tokenizer: CLIPTokenizer, held_out: Pictures) -> Metrics:
    """Text-to-image and image-to-text recall at 1, 5 and 10 with each picture's first caption, in [0, 1]."""
    training = model.training
    model.eval()
    device = _device(model)
    tokens = _token_table(tokenizer, [texts[0] for texts in held_out.captions]).to(device)
    images, texts = [], []
    for start in range(0, len(held_out), 256):
        rows = torch.arange(start, min(start + 256, len(held_out)))
        images.append(functional.normalize(model.visual(held_out.batch(rows, device=device)), dim=-1))
        texts.append(functional.normalize(encode_tokens(model, tokens[rows]), dim=-1))
    model.train(training)
    scores = torch.cat(texts) @ torch.cat(images).T
    found: Metrics = {}
    for name, matrix in (("text_to_image", scores), ("image_to_text", scores.T)):
        rivals = (matrix > matrix.diagonal()[:, None]).sum(dim=1)
        found |= {f"{name}_recall_at_{k}": float((rivals < k).float().mean()) for k in (1, 5, 10)}
    return found


# --- autoencoder ----------------------------------------------------------------------------------------------


def autoencoder_task(
    pictures: Pictures,
    *,
    seed: int = 0,
    device: str = "cpu",
    steps: int,
    channels: Sequence[int] = (16, 32, 64),
    latent_channels: int = 4,
    whole_share: float = 0.15,
    kl_weight: float = 1e-5,
) -> GenerativeTask:
    """A convolutional variational autoencoder, four latent channels at a quarter of the side (Rombach et al. 2022).

    The loss is the mean absolute error plus ``kl_weight`` times the KL divergence per latent value. Exporting
    measures ``scaling_factor``, the reciprocal of the latents' standard deviation, on the training pictures.
    """
    from diffusers import AutoencoderKL

    blocks = len(channels)
    with _seeded("autoencoder", seed):
        model = AutoencoderKL(
            sample_size=pictures.side,
            block_out_channels=tuple(channels),
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
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

    def loss(rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        batch = pictures.batch(rows, device=_device(model))
        if step < (1 - whole_share) * steps:
            half = pictures.side // 2
            top, left = torch.randint(half + 1, (2,)).tolist()
            batch = batch[:, :, top : top + half, left : left + half]
        batch = batch.contiguous(memory_format=torch.channels_last)
        posterior = model.encode(batch).latent_dist
        decoded = model.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        value = functional.l1_loss(decoded, batch) + kl_weight * kl
        squared = functional.mse_loss(decoded.detach(), batch)
        return value, {"psnr": 10 * torch.log10(4 / squared), "kl": kl}

    def export(folder: Path) -> None:
        latents = encode_latents(model, pictures, rows=range(min(len(pictures), 1024)))
        model.register_to_config(scaling_factor=float(1 / latents.std()))
        copy.deepcopy(model).half().save_pretrained(folder)

    def evaluate(held_out: Pictures) -> Metrics:
        return {"psnr_db": reconstruction_psnr(model, held_out)}

    return GenerativeTask(module=model, loss=loss, rows=len(pictures), export=export, evaluate=evaluate)


@torch.inference_mode()
def encode_latents(
    model: Any, pictures: Pictures, *, rows: Sequence[int], progress: Progress | None = None
) -> Float[Tensor, "rows 4 height width"]:
    """Mean latents (unscaled) of some pictures."""
    found = []
    for start in range(0, len(rows), 128):
        batch = pictures.batch(torch.as_tensor(rows[start : start + 128]), device=_device(model))
        found.append(model.encode(batch.contiguous(memory_format=torch.channels_last)).latent_dist.mean.cpu())
        if progress:
            progress(min(start + 128, len(rows)), len(rows))
    return torch.cat(found)


@torch.inference_mode()
def reconstruction_psnr(model: Any, pictures: Pictures) -> float:
    """Mean peak signal-to-noise ratio per picture of decoded mean latents, dB."""
    ratios = []
    for start in range(0, len(pictures), 128):
        rows = torch.arange(start, min(start + 128, len(pictures)))
        batch = pictures.batch(rows, device=_device(model)).contiguous(memory_format=torch.channels_last)
        decoded = model.decode(model.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
        ratios.append(10 * torch.log10(4 / (decoded - batch).square().mean(dim=(1, 2, 3))))
    return float(torch.cat(ratios).mean())


# --- text encoder and denoiser --------------------------------------------------------------------------------


def text_encoder_of(model: Any) -> CLIPTextModel:
    """The text tower of an open_clip CLIP as transformers' `CLIPTextModel`, which Stable Diffusion reads.

    Its last hidden states are those of the tower after the final norm; the projection is left out.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    blocks = model.transformer.resblocks
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
        parts = dict(zip("qkv", block.attn.in_proj_weight.chunk(3), strict=True))
        biases = dict(zip("qkv", block.attn.in_proj_bias.chunk(3), strict=True))
        modules = {"layer_norm1": block.ln_1, "layer_norm2": block.ln_2, "self_attn.out_proj": block.attn.out_proj}
        modules |= {"mlp.fc1": block.mlp.c_fc, "mlp.fc2": block.mlp.c_proj}
        for name in "qkv":
            state[f"encoder.layers.{index}.self_attn.{name}_proj.weight"] = parts[name]
            state[f"encoder.layers.{index}.self_attn.{name}_proj.bias"] = biases[name]
        for name, module in modules.items():
            state[f"encoder.layers.{index}.{name}.weight"] = module.weight
            state[f"encoder.layers.{index}.{name}.bias"] = module.bias
    with torch.no_grad():
        encoder.load_state_dict({name: value.detach() for name, value in state.items()})
    return encoder.eval().requires_grad_(False)


def denoiser_task(
    pictures: Pictures,
    *,
    latents: Float[Tensor, "rows 4 height width"],
    clip: Path,
    autoencoder: Path,
    seed: int = 0,
    device: str = "cpu",
    channels: Sequence[int] = (32, 96, 128),
    caption_dropout: float = 0.1,
) -> GenerativeTask:
    """A latent denoiser conditioned on captions, trained by flow matching; exports a Stable Diffusion pipeline.

    With data ``x``, noise ``e`` and a level ``s`` in (0, 1), the denoiser sees ``(1 - s) x + s e`` and the time
    ``1000 s`` and is trained to answer ``e - x`` (Lipman et al. 2023); ``s`` is logit-normal (Esser et al. 2024).
    This is what diffusers' solvers call ``flow_prediction``.

    Args:
        pictures: Their captions condition; any short caption of a picture is drawn each time.
        latents: From `encode_latents`, one row per picture.
        clip: Folder of the CLIP whose text tower conditions; it stays frozen.
        autoencoder: Folder of the autoencoder that made ``latents``.
        seed: Of the initial parameters.
        device: Where to train.
        channels: Channels of the denoiser at the latents' resolution, its half, its quarter.
        caption_dropout: Share of captions replaced by the empty one, for classifier-free guidance.
    """
    import open_clip
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(clip)
    encoder = text_encoder_of(open_clip.create_model(f"local-dir:{clip}")).to(device)
    decoder = AutoencoderKL.from_pretrained(autoencoder).to(device).eval().requires_grad_(False)
    levels = len(channels)
    with _seeded("denoiser", seed):
        model = UNet2DConditionModel(
            sample_size=latents.shape[-1],
            in_channels=latents.shape[1],
            out_channels=latents.shape[1],
            block_out_channels=tuple(channels),
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * (levels - 1)),
            up_block_types=(*("CrossAttnUpBlock2D",) * (levels - 1), "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=encoder.config.hidden_size,
            attention_head_dim=4,
            norm_num_groups=16,
        )
    model.set_attn_processor(AttnProcessor())
    model = model.to(device, memory_format=torch.channels_last).train()
    data = latents * decoder.config.scaling_factor
    captions = _token_table(
        tokenizer, [text for texts in pictures.captions for text in texts], padding="max_length"
    )
    empty = _token_table(tokenizer, [""], padding="max_length")
    per_picture = len(pictures.captions[0])

    def loss(rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = captions[rows * per_picture + torch.randint(per_picture, rows.shape)]
        tokens = torch.where(torch.rand(len(rows), 1) < caption_dropout, empty, tokens)
        clean = data[rows].to(device)
        noise = torch.randn(clean.shape).to(device)
        level = torch.sigmoid(torch.randn(len(rows), 1, 1, 1)).to(device)
        noisy = torch.lerp(clean, noise, level).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), _plain_attention():
            states = encoder(tokens.to(device)).last_hidden_state
        answer = model(noisy, 1000 * level.flatten(), states).sample
        return functional.mse_loss(answer, noise - clean), {}

    def pipeline() -> Any:
        from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, steps_offset=1
        )
        made = StableDiffusionPipeline(
            vae=decoder,
            text_encoder=encoder,
            tokenizer=tokenizer,
            unet=model,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        made.set_progress_bar_config(disable=True)
        return made

    def export(folder: Path) -> None:
        whole = pipeline()
        kept = {name: getattr(whole, name) for name in ("vae", "unet", "text_encoder")}
        whole.register_modules(**{name: copy.deepcopy(module).half() for name, module in kept.items()})
        whole.save_pretrained(folder, max_shard_size="7MB")
        _load_as_single_precision(folder / "text_encoder")
        save_tokenizer(tokenizer, folder / "tokenizer")

    def evaluate(held_out: Pictures) -> Metrics:
        return generated_recall(pipeline(), held_out, clip=clip)

    return GenerativeTask(module=model, loss=loss, rows=len(data), export=export, evaluate=evaluate)


def generated_recall(
    pipeline: Any, held_out: Pictures, *, clip: Path, steps: int = 10, guidance: float = 2.5
) -> Metrics:
    """Recall of a CLIP on pictures generated from each held-out picture's first caption."""
    import open_clip
    from transformers import AutoTokenizer

    drawn = []
    for start in range(0, len(held_out), 50):
        prompts = [texts[0] for texts in held_out.captions[start : start + 50]]
        generators = [torch.Generator().manual_seed(start + offset) for offset in range(len(prompts))]
        arrays = pipeline(
            prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np"
        ).images
        drawn.append((arrays * 255).round().astype(np.uint8))
    made = Pictures(
        pixels=np.concatenate(drawn), captions=held_out.captions, long_captions=held_out.long_captions
    )
    model = open_clip.create_model(f"local-dir:{clip}")
    found = clip_recall(model, AutoTokenizer.from_pretrained(clip), made)
    return {f"generated_{name}": value for name, value in found.items()}


# --- language model -------------------------------------------------------------------------------------------


def language_model_task(
    pictures: Pictures,
    *,
    tokenizer: CLIPTokenizer,
    seed: int = 0,
    device: str = "cpu",
    long_every: int = 8,
) -> GenerativeTask:
    """A causal language model over captions, GPT-2's architecture (Radford et al. 2019), 192 wide and 4 deep.

    A text is start, caption, end; every ``long_every``-th step uses the long captions.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    with _seeded("language-model", seed):
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
    short = _token_table(tokenizer, [text for texts in pictures.captions for text in texts])
    long = _token_table(tokenizer, pictures.long_captions)
    per_picture = len(pictures.captions[0])

    def loss(rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step % long_every == long_every - 1:
            tokens = long[rows]
        else:
            tokens = short[rows * per_picture + torch.randint(per_picture, rows.shape)]
        with _plain_attention():
            return _next_token_loss(model, tokens.to(_device(model))), {}

    def export(folder: Path) -> None:
        copy.deepcopy(model).half().save_pretrained(folder)
        _load_as_single_precision(folder)
        save_tokenizer(tokenizer, folder)

    def evaluate(held_out: Pictures) -> Metrics:
        table = _token_table(tokenizer, [texts[0] for texts in held_out.captions]).to(_device(model))
        with torch.inference_mode():
            return {"perplexity": float(_next_token_loss(model.eval(), table).exp())}

    return GenerativeTask(module=model, loss=loss, rows=len(pictures), export=export, evaluate=evaluate)


def _next_token_loss(model: Any, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of each token given those before it, up to and with the first end of text."""
    ends = tokens.argmax(dim=1, keepdim=True)
    length = int(ends.max()) + 1
    tokens = tokens[:, :length]
    targets = tokens.masked_fill(torch.arange(length, device=tokens.device) > ends, -100)
    logits = model(tokens[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)


# --- shared ---------------------------------------------------------------------------------------------------


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@contextmanager
def _seeded(*parts: int | str) -> Iterator[None]:
    """Initial parameters as a function of ``parts``, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from("initial", *parts))
        yield


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Matrix products and a softmax: on a CPU several times faster backwards than the fused kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.MATH]):
        yield


def _token_table(
    tokenizer: CLIPTokenizer, texts: Sequence[str], *, padding: str = "longest"
) -> Int[Tensor, "texts length"]:
    """Token ids, padded to the longest text (or to the context, ``max_length``) and truncated to the context."""
    ids = tokenizer(
        list(texts), padding=padding, truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt"
    ).input_ids
    table: Tensor = ids
    return table


def _save_half(state: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().half().contiguous() for name, value in state.items()}, path)


def _load_as_single_precision(folder: Path) -> None:
    """Let transformers load what is stored at half precision as single precision."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
