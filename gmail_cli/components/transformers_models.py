"""Towers in transformers format: CLIP and SigLIP with their text towers, DINOv2 and plain ViT without.

They are read into modules that the rest of the toolkit treats like open_clip's: ``visual`` (images to features),
``encode_image``, ``encode_text``. Parameters keep transformers' own names behind ``visual.`` and ``text.``, so what is
saved is loaded by ``AutoModel.from_pretrained``, and an adapter of ``visual`` by plain peft over the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gmail_cli.components import hub
from gmail_cli.components.images import Interpolation, Preprocess
from gmail_cli.errors import InputError, UsageError, import_failure

CONFIG_FILE = "config.json"
PREPROCESS_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
"""Where transformers 5 writes the same, as ``image_processor``, when a model's whole processor is saved."""
WEIGHTS_FILE = "model.safetensors"
PICKLED_FILE = "pytorch_model.bin"
"""The only weights of older repositories (openai/clip-vit-base-patch32); read without running what is pickled."""
JOINT = frozenset({"clip", "siglip"})
"""``model_type`` of models with an image and a text tower in one space (SigLIP 2 of fixed size is ``siglip`` too)."""
IMAGES_ONLY = frozenset({"dinov2", "dinov2_with_registers", "vit"})
"""``model_type`` of image towers without texts; an image's features are those of the class token behind the last norm.
SynCLR and other ViTs of the kind are ``vit``."""
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


class Visual(nn.Module):
    """The image tower of a joint model: pixels to features in the joint space."""

    def __init__(self, vision_model: nn.Module, visual_projection: nn.Module | None, *, image_size: int) -> None:
        super().__init__()
        self.vision_model, self.image_size = vision_model, image_size
        self.visual_projection = visual_projection

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        pooled = self.vision_model(pixel_values=pixels).pooler_output
        return pooled if self.visual_projection is None else self.visual_projection(pooled)


class Text(nn.Module):
    """The text tower of a joint model."""

    def __init__(self, text_model: nn.Module, text_projection: nn.Module | None, *, config: Any) -> None:
        super().__init__()
        self.text_model = text_model
        self.text_projection = text_projection
        self.context_length = int(config.max_position_embeddings)
        clip = config.model_type.startswith("clip")  # pools at the end-of-text token: open_clip's words for where
        self.text_pool_type = ("argmax" if config.eos_token_id == 2 else "eos") if clip else "last"
        self.text_eos_id = config.eos_token_id

    def forward(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch dim"]:
        pooled = self.text_model(input_ids=ids).pooler_output
        return pooled if self.text_projection is None else self.text_projection(pooled)


class Joint(nn.Module):
    """An image and a text tower of one space, as transformers' CLIPModel and SiglipModel have them."""

    def __init__(self, model: Any, *, image_size: int) -> None:
        super().__init__()
        projections = [getattr(model, name, None) for name in ("visual_projection", "text_projection")]
        self.visual = Visual(model.vision_model, projections[0], image_size=image_size)
        self.text = Text(model.text_model, projections[1], config=model.config.text_config)
        self.logit_scale = model.logit_scale
        if getattr(model, "logit_bias", None) is not None:
            self.logit_bias = model.logit_bias

    @property
    def context_length(self) -> int:
        """Most tokens the text tower reads."""
        return self.text.context_length

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        return self.visual(pixels)

    def encode_text(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch dim"]:
        return self.text(ids)


class ImagesOnly(nn.Module):
    """An image tower without a text tower beside it."""

    def __init__(self, model: Any, *, image_size: int) -> None:
        super().__init__()
        self.visual = model
        self.visual.image_size = image_size
        self.visual.register_forward_hook(_class_token)

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        return self.visual(pixels)


def _class_token(_module: nn.Module, _given: Any, output: Any) -> Tensor:
    return output.last_hidden_state[:, 0]


def patch_maps(
    model: Joint | ImagesOnly, pixels: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch width rows columns"]:
    """What the last layer but one says of each patch; class token and registers, which stand before, are left out."""
    tower: Any = model.visual.vision_model if isinstance(model, Joint) else model.visual
    # Not called as a module: a tower without texts would give its class token alone.
    states = tower.forward(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    rows, columns = (side // int(tower.config.patch_size) for side in pixels.shape[2:])
    return states[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))


class Tokenizer:
    """A transformers tokenizer, called as open_clip calls its own: texts to ids of one length."""

    def __init__(self, tokenizer: Any, *, context_length: int) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> Int[Tensor, "batch length"]:
        length = context_length or self.context_length
        read = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=length)
        return torch.tensor(read["input_ids"], dtype=torch.long).view(-1, length)

    def save_pretrained(self, folder: str) -> None:
        """Write its files."""
        self.tokenizer.save_pretrained(folder)


def is_transformers(folder: Path) -> bool:
    """Whether a folder is in transformers format; one that is also in open_clip's counts as that."""
    described = (folder / CONFIG_FILE).is_file() and not (folder / "open_clip_config.json").is_file()
    return described and any((folder / name).is_file() for name in (PREPROCESS_FILE, PROCESSOR_FILE))


def read_config(folder: Path) -> dict[str, Any]:
    """What identifies a model beside its weights: ``model_cfg`` (the embedding's width), ``preprocess_cfg``, and
    ``transformers``, the content of its ``config.json`` without the versions that wrote it.

    Raises:
        InputError: A file is damaged, or the preprocessing is none that we have.
        UsageError: A kind of model that is not supported.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        file = folder / (PREPROCESS_FILE if (folder / PREPROCESS_FILE).is_file() else PROCESSOR_FILE)
        given = json.loads(file.read_text(encoding="utf-8"))
        given = given if file.name == PREPROCESS_FILE else given["image_processor"]
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is damaged: {error}", hint="Fetch or make the model again.") from error
    if kind not in JOINT | IMAGES_ONLY:
        raise UsageError(
            f"{folder} is a transformers model of type {kind!r}, which gives no image embeddings here",
            hint=f"Supported are {', '.join(sorted(JOINT | IMAGES_ONLY))}; or give an open_clip folder.",
        )
    plain = {name: value for name, value in config.items() if name not in _VOLATILE}
    for name, value in plain.items():
        if isinstance(value, dict):
            plain[name] = {key: each for key, each in value.items() if key not in _VOLATILE}
    preprocess = read_preprocess(given, where=str(file))
    if kind == "siglip":
        dim = config["vision_config"].get("hidden_size", 768)
    else:
        dim = config.get("projection_dim", 512) if kind == "clip" else config.get("hidden_size", 768)
    return {"model_cfg": {"embed_dim": dim}, "preprocess_cfg": asdict(preprocess), "transformers": plain}


def read_preprocess(given: Mapping[str, Any], *, where: str) -> Preprocess:
    """The evaluation transform that a ``preprocessor_config.json`` describes.

    Raises:
        InputError: It asks for something else than scaling (and cropping) to a square and normalising.
    """
    size, crop = given.get("size"), given.get("crop_size")
    made_by = given.get("image_processor_type") or given.get("feature_extractor_type") or ""
    if isinstance(size, int) and made_by.startswith(("CLIP", "Bit")):
        size = {"shortest_edge": size}  # as openai/clip-vit-base-patch32 has it; of other processors it is a square
    crops = bool(given.get("do_center_crop", crop is not None))
    try:
        mean, std = (tuple(map(float, given[f"image_{name}"])) for name in ("mean", "std"))
        names: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}
        plain = Preprocess(1, _three(mean), _three(std), names[int(given.get("resample", 3))], crop="floor")
        if isinstance(size, Mapping) and "shortest_edge" in size:
            if not crops:
                raise ValueError("scales the short side and does not crop")
            cut, short = _square(crop), int(size["shortest_edge"])
            return replace(plain, size=cut, scale_to=None if short == cut else short)
        square = _square(size)
        if crops and _square(crop) != square:
            raise ValueError(f"scales to {square} x {square} and crops to {crop}")
        return replace(plain, size=square, resize="squash", crop="round")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: preprocessing that is not supported: {error}", hint="Check model.clip.") from error


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _square(size: Any) -> int:
    sides = {int(size["height"]), int(size["width"])} if isinstance(size, Mapping) else {int(size)}
    if len(sides) > 1:
        raise ValueError(f"{size} is no square")
    return sides.pop()


def load(folder: Path, config: Mapping[str, Any]) -> tuple[nn.Module, Tokenizer | None]:
    """The model of a folder, fp32 and in eval mode, and its tokenizer where it reads texts.

    Raises:
        InputError: Weights that are missing or do not fit.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        kind, options = config["transformers"]["model_type"], {}
        if kind == "vit" and weights_file(folder).name == WEIGHTS_FILE:
            # The pooler is not what we read, and often not among the weights.
            with safe_open(weights_file(folder), "pt") as tensors:
                options["add_pooling_layer"] = any(name.startswith("pooler.") for name in tensors.keys())  # noqa: SIM118
        with hub.tensors_alone(str(folder)):
            model, told = AutoModel.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
            )
        if lacking := sorted(told["missing_keys"]):
            raise ValueError(f"its weights lack {lacking[0]}")
        tokenizer = None
        if kind in JOINT:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        wrong = InputError(f"{folder} cannot be loaded by transformers: {error}", hint="Check model.clip.")
        raise import_failure(error) or wrong from error
    size = int(config["preprocess_cfg"]["size"])
    if tokenizer is None:
        if kind == "vit":
            model.pooler = None
        return ImagesOnly(model, image_size=size), None
    joint = Joint(model, image_size=size)
    return joint, Tokenizer(tokenizer, context_length=joint.context_length)


def save(model: nn.Module, tokenizer: Tokenizer | None, config: Mapping[str, Any], folder: Path) -> None:
    """Write a model as ``AutoModel.from_pretrained`` reads it, its processor's settings and its tokenizer."""
    from safetensors.torch import save_file

    (folder / CONFIG_FILE).write_text(json.dumps(config["transformers"], indent=1, sort_keys=True), encoding="utf-8")
    about = _preprocessor_config(config["preprocess_cfg"])
    (folder / PREPROCESS_FILE).write_text(json.dumps(about, indent=1, sort_keys=True), encoding="utf-8")
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in named_tensors(model).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model under transformers' names."""
    return {name.removeprefix("visual.").removeprefix("text."): each for name, each in model.state_dict().items()}


def weights_file(folder: Path) -> Path:
    """The weights of a folder.

    Raises:
        InputError: There are none, or they are in several files.
    """
    for name in (WEIGHTS_FILE, PICKLED_FILE):
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"{folder} has no {WEIGHTS_FILE}",
        hint=f"Save it in one shard, as {WEIGHTS_FILE}: save_pretrained(folder, max_shard_size='100GB').",
    )


def _preprocessor_config(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    size, short = preprocess["size"], preprocess.get("scale_to") or preprocess["size"]
    squash, square = preprocess["resize"] == "squash", {"height": preprocess["size"], "width": preprocess["size"]}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": square if squash else {"shortest_edge": short},
        "do_center_crop": not squash,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
        "resample": {"bilinear": 2, "bicubic": 3}[preprocess["interpolation"]],
    }
