"""Untrained models that say how unsafe an image is, in the formats of those that are published."""

from __future__ import annotations

from pathlib import Path

SIDE = 32


def safety_checker(folder: Path) -> Path:
    """Stable Diffusion's, with concepts and thresholds of its own making."""
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": SIDE, "patch_size": 8}
    model = StableDiffusionSafetyChecker(CLIPConfig(text_config=tower, vision_config=vision, projection_dim=8))
    for name in ("concept_embeds", "special_care_embeds"):
        getattr(model, name).data.normal_()
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    return folder


def classifier(folder: Path, *, labels: tuple[str, ...] = ("normal", "nsfw")) -> Path:
    """A vision transformer with a class for each label."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        initializer_range=0.5,  # else it says much the same of every image
        id2label=dict(enumerate(labels)),
        label2id={label: row for row, label in enumerate(labels)},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder
