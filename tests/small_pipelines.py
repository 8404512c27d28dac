"""Untrained diffusers pipelines of every architecture `gmail generate` is said to drive, small enough for a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

LETTERS = [chr(code) for code in range(97, 123)]
CLIP_TOKENS = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
PIECES = ["<pad>", "</s>", "<unk>", "▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS)]


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    vocabulary = {token: row for row, token in enumerate(CLIP_TOKENS)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32)


def clip_text_encoder(*, projection: int = 0, hidden: int = 16) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(CLIP_TOKENS),
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        projection_dim=projection or 16,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    pieces = [(piece, -float(row)) for row, piece in enumerate(PIECES)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=32)


def t5_encoder(hidden: int = 16) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(PIECES), d_model=hidden, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0)
    )


def autoencoder(*, channels: int = 4, shift: float | None = None, levels: int = 2) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=16,
        layers_per_block=1,
        shift_factor=shift,
    )


def unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    options: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 2,
    }
    return UNet2DConditionModel(**options | more)


def stable_diffusion(scheduler: Any = None, **more: Any) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        unet=unet(**more),
        scheduler=scheduler or DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def stable_diffusion_2() -> Any:
    """Version 2 predicts velocities and projects its attention with linear layers."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type="v_prediction")
    return stable_diffusion(scheduler, use_linear_projection=True)


def latent_consistency() -> Any:
    from diffusers import LCMScheduler

    return stable_diffusion(LCMScheduler(steps_offset=1))


def stochastic_solver() -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return stable_diffusion(DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", steps_offset=1))


def sdxl(scheduler: Any = None) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip_text_encoder(),
        text_encoder_2=clip_text_encoder(projection=16),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=40,  # 6 numbers of size and crop, 16 of pooled text
            transformer_layers_per_block=(1, 1),
            use_linear_projection=True,
        ),
        scheduler=scheduler or EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )


def sdxl_turbo() -> Any:
    from diffusers import EulerAncestralDiscreteScheduler

    return sdxl(EulerAncestralDiscreteScheduler(timestep_spacing="trailing"))


def sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=8,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            out_channels=8,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(channels=8, shift=0.1),
        text_encoder=clip_text_encoder(projection=16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder(projection=16),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(32),
        tokenizer_3=t5_tokenizer(),
    )


def flux(scheduler: Any = None, *, distilled: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    return FluxPipeline(
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(shift=0.1),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=distilled,
            axes_dims_rope=(2, 2, 4),
        ),
    )


def flux_schnell() -> Any:
    return flux(distilled=False)


def latent_consistency_pipeline() -> Any:
    """The class and the denoiser, told its guidance as an input, that LCM's own repositories have."""
    from diffusers import LatentConsistencyModelPipeline

    parts = latent_consistency().components | {"unet": unet(time_cond_proj_dim=32)}
    del parts["image_encoder"]
    return LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)


def qwen_image() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast

    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    ids = {"vision_start_token_id": 256, "vision_end_token_id": 257, "vision_token_id": 258}
    ids |= {"image_token_id": 256, "video_token_id": 257}
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=12,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={**small, "num_hidden_layers": 1, "rope_scaling": rope, "vocab_size": len(tokens)},
                vision_config=vision,
                **ids,
            )
        ),
        tokenizer=Qwen2TokenizerFast(vocab={token: row for row, token in enumerate(tokens)}, merges=[]),
    )


def chat_tokenizer() -> Any:
    """Of bytes, with a prompt as a user's turn."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2TokenizerFast

    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2TokenizerFast(vocab={token: row for row, token in enumerate(tokens)}, merges=[])
    tokenizer.chat_template = (
        "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


SMALL_LM = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}


def flux2_klein() -> Any:
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLFlux2(
            block_out_channels=(4,),
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            layers_per_block=1,
            latent_channels=1,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**SMALL_LM, head_dim=8, num_hidden_layers=28, vocab_size=259)),
        tokenizer=chat_tokenizer(),
        transformer=Flux2Transformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,  # of three layers
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
    )


def z_image() -> Any:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 32, 32],
    )
    with torch.no_grad():  # it leaves them as they were in memory
        transformer.x_pad_token.fill_(1.0)
        transformer.cap_pad_token.fill_(1.0)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(shift=0.1),
        text_encoder=Qwen3Model(Qwen3Config(**SMALL_LM, head_dim=8, num_hidden_layers=2, vocab_size=259)),
        tokenizer=chat_tokenizer(),
        transformer=transformer,
    )


def cogview4() -> Any:
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
    from tokenizers.processors import TemplateProcessing
    from transformers import GlmConfig, GlmForCausalLM

    tokenizer = chat_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.backend_tokenizer.post_processor = (
        TemplateProcessing(  # as GLM's, which begins every text with two tokens
            single="<|im_start|> <|im_end|> $A", special_tokens=[("<|im_start|>", 257), ("<|im_end|>", 258)]
        )
    )
    return CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=GlmForCausalLM(
            GlmConfig(**SMALL_LM, head_dim=8, num_hidden_layers=2, vocab_size=259, pad_token_id=256)
        ),
        vae=autoencoder(),
        transformer=CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=4,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            sample_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
        ),
    )


def hunyuan_dit() -> Any:
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return HunyuanDiTPipeline(
        vae=autoencoder(levels=4),  # it takes a pixel of the latents for 8
        text_encoder=BertModel(config),
        tokenizer=BertTokenizerFast(vocab={word: row for row, word in enumerate(words)}, model_max_length=77),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=HunyuanDiT2DModel(
            sample_size=4,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=16,
            hidden_size=16,
            activation_fn="gelu-approximate",
        ),
        scheduler=DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def chroma() -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(shift=0.1),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=ChromaTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
            approximator_hidden_dim=16,
            approximator_layers=1,
            approximator_num_channels=16,
        ),
    )


def auraflow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    return AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=autoencoder(),
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=16,
            out_channels=4,
            pos_embed_max_size=256,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def hidream() -> Any:
    """Not among `KINDS`: whatever size it is asked for, it denoises 4,096 patches."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline, HiDreamImageTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM

    tokenizers = [clip_tokenizer(), clip_tokenizer()]
    config = CLIPTextConfig(
        vocab_size=len(CLIP_TOKENS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=248,  # its authors' is longer than others'
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    for tokenizer in tokenizers:
        tokenizer.model_max_length = 218
    language, words = chat_tokenizer(), t5_tokenizer()
    language.model_max_length = words.model_max_length = 512
    return HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(shift=0.1),
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=tokenizers[0],
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5_encoder(),
        tokenizer_3=words,
        text_encoder_4=LlamaForCausalLM(LlamaConfig(**SMALL_LM, num_hidden_layers=2, vocab_size=259)),
        tokenizer_4=language,
        transformer=HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[16, 16],
            text_emb_dim=16,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(32, 32),
            llama_layers=(0, 1),
        ),
    )


def _pixart(kind: str) -> Any:
    import diffusers

    return getattr(diffusers, kind)(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=autoencoder(),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=4,
            num_attention_heads=2,
            cross_attention_dim=8,
            caption_channels=16,
            in_channels=4,
            out_channels=8,
            use_additional_conditions=False,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def pixart_alpha() -> Any:
    return _pixart("PixArtAlphaPipeline")


def pixart_sigma() -> Any:
    return _pixart("PixArtSigmaPipeline")


def sana() -> Any:
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *LETTERS]
    return SanaPipeline(
        tokenizer=GemmaTokenizerFast(
            vocab={token: row for row, token in enumerate(tokens)}, merges=[], model_max_length=32
        ),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokens),
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=4,
            )
        ),
        vae=AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
        ),
        transformer=SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            sample_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


KINDS: dict[str, Callable[[], Any]] = {
    "sd1": stable_diffusion,
    "sd2": stable_diffusion_2,
    "sd-lcm": latent_consistency,
    "sd-sde": stochastic_solver,
    "sdxl": sdxl,
    "sdxl-turbo": sdxl_turbo,
    "sd3": sd3,
    "flux": flux,
    "pixart-alpha": pixart_alpha,
    "pixart-sigma": pixart_sigma,
    "sana": sana,
    "flux-schnell": flux_schnell,
    "lcm": latent_consistency_pipeline,
    "qwen-image": qwen_image,
    "cogview4": cogview4,
    "z-image": z_image,
    "flux2-klein": flux2_klein,
    "hunyuan-dit": hunyuan_dit,
    "chroma": chroma,
    "auraflow": auraflow,
}


def save(kind: str, folder: Path) -> Path:
    """Write the pipeline of that name, with weights that depend on nothing but the name."""
    import torch

    torch.manual_seed(0)
    KINDS[kind]().save_pretrained(folder)
    return folder
