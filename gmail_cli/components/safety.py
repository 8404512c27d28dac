"""How unsafe images are, by a model's word: Stable Diffusion's safety checker, or any image classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError

from gmail_cli.components import hub
from gmail_cli.components.images import decode
from gmail_cli.errors import InputError, SetupError, UsageError, import_failure

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 32
"""Images that a checker sees at once, always so many."""
_OWN = "StableDiffusionSafetyChecker"


@dataclass(frozen=True)
class SafetyChecker:
    """A model that looks at images, with its own preprocessing.

    Attributes:
        model: diffusers' ``StableDiffusionSafetyChecker``, or a transformers model for image classification.
        processor: transformers' image processor.
        unsafe: The class that means unsafe; None for diffusers' checker, which only says yes or no.
    """

    model: Any
    processor: Any
    unsafe: int | None

    def score(self, image_bytes: Callable[[int], bytes], rows: range, *, workers: int = 2) -> list[float]:
        """For each image a number from 0 to 1, to six decimals: the probability of the class that means unsafe, or of
        diffusers' checker 1 where it would black the image out and else 0.

        Args:
            image_bytes: Encoded bytes of image i; called from several threads.
            rows: Which images.
            workers: Threads that decode.

        Raises:
            InputError: An image cannot be decoded.
        """

        def pixels(row: int) -> Float[Tensor, "3 height width"]:
            image = decode(image_bytes(row), name=f"image {row}")
            seen: Float[Tensor, "1 3 height width"] = self.processor(images=image, return_tensors="pt").pixel_values
            return seen[0]

        def values() -> Iterator[float]:
            for start in range(0, len(rows), BATCH):
                batch = rows[start : start + BATCH]
                seen = list(pool.map(pixels, batch))
                full = torch.stack([*seen, *[seen[-1]] * (BATCH - len(seen))])
                yield from self._judge(full.to(self.model.device))[: len(batch)]

        with ThreadPoolExecutor(max(1, workers)) as pool:
            return [round(value, 6) for value in values()]

    @torch.no_grad()
    def _judge(self, pixels: Float[Tensor, "batch 3 height width"]) -> list[float]:
        if self.unsafe is None:
            _, found = self.model(clip_input=pixels, images=torch.zeros(len(pixels), 1))
            return [float(each) for each in found]
        logits = self.model(pixel_values=pixels).logits.float()
        several = self.model.config.problem_type == "multi_label_classification"
        shares: list[float] = (logits.sigmoid() if several else logits.softmax(1))[:, self.unsafe].tolist()
        return shares


def locate(ref: str) -> Path | None:
    """The folder that ``generate.safety_checker`` names; None for a hub id.

    Raises:
        InputError: It is neither.
    """
    folder = Path(ref).expanduser()
    if folder.is_dir():
        return folder
    if ref.startswith((".", "/", "~")) or ref.count("/") != 1:
        raise InputError(
            f"generate.safety_checker = {ref!r} does not exist",
            hint="name a folder in transformers format, or a hub id such as 'owner/name'",
        )
    return None


def load_checker(ref: str, *, revision: str = "", label: str = "", device: str | torch.device = "cpu") -> SafetyChecker:
    """Load a safety checker.

    Args:
        ref: A folder or hub id: ``StableDiffusionSafetyChecker``, a pipeline that holds it, or an image classifier.
        revision: Commit or tag of a hub id.
        label: Of a classifier, the name of the class that means unsafe.
        device: Where it computes.

    Raises:
        InputError: A folder without such a model, or without all of its weights.
        SetupError: A hub id that cannot be loaded here.
        UsageError: A label that the classifier does not have, or one for diffusers' checker.
    """
    import diffusers
    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):  # it would speak of blacked-out images
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    folder = locate(ref)
    try:
        weights = ("model.safetensors", "safety_checker/model.safetensors")
        place = folder or hub.fetch(ref, revision=revision, weights=weights)
        unsafe = _unsafe_class(place, label)
        kind = _diffusers_checker() if unsafe is None else transformers.AutoModelForImageClassification
        where = _inside(place, "safety_checker")
        model, told = kind.from_pretrained(where, use_safetensors=True, output_loading_info=True)
        processor = transformers.AutoImageProcessor.from_pretrained(_inside(place, "feature_extractor"))
        if told["missing_keys"]:
            raise ValueError(f"its weights lack {', '.join(sorted(told['missing_keys'])[:3])}")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if failure := import_failure(error):
            raise failure from error
        if folder:
            raise InputError(
                f"generate.safety_checker = {ref!r} is no safety checker or image classifier: "
                f"{(str(error).splitlines() or [type(error).__name__])[0]}",
                hint="name a folder with config.json, model.safetensors and preprocessor_config.json",
            ) from error
        reason, hint = hub.explain(error, ref, revision=revision)
        raise SetupError(f"generate.safety_checker = {ref!r} cannot be loaded: {reason}", hint=hint) from error
    return SafetyChecker(model.eval().to(device), processor, unsafe)


def _unsafe_class(folder: Path, label: str) -> int | None:
    """The class that a label names; None for Stable Diffusion's safety checker.

    Raises:
        OSError: There is no configuration in the folder, or one that cannot be read (or ValueError).
        UsageError: A label that the classifier does not have, or one for diffusers' checker.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(_inside(folder, "safety_checker"))
    if _OWN in (config.architectures or []):
        if label:
            raise UsageError(
                f"generate.unsafe_label = {label!r}: Stable Diffusion's safety checker has no classes",
                hint='set generate.unsafe_label to ""',
            )
        return None
    if label not in config.label2id:
        raise UsageError(
            f"generate.unsafe_label = {label!r} is no class of generate.safety_checker",
            hint=f"it has: {', '.join(map(repr, config.label2id))}",
        )
    return int(config.label2id[label])


def _inside(folder: Path, part: str) -> Path:
    """A part of a pipeline's folder; any other folder is all parts itself."""
    return folder / part if (folder / "model_index.json").is_file() else folder


def _diffusers_checker() -> Any:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    return StableDiffusionSafetyChecker
