"""Where a diffusers text-to-image pipeline lies, and how it is loaded: its scheduler, LoRA weights, the one beside it
that begins with an image."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gmail_cli.components import hub
from gmail_cli.errors import InputError, SetupError, UsageError, import_failure

SHIPPED = Path(__file__).resolve().parent.parent / "weights" / "tiny" / "pipeline"
_DISTILLED = ("LCMScheduler", "TCDScheduler")
"""Schedulers of distilled models: they take the place of those that diffusers calls compatible with one another, though
not on its lists."""
_DOWN = re.compile(r"\.lora_A\.|[._]lora\.down\.|\.lora_linear_layer\.down\.")
"""The names of LoRA weights, one for each module."""
_VARIANTS = ("fp16", "bf16")
"""Names that files of weights carry before their ending where a repository has a lighter set of them, or no other."""
_WEIGHTLESS = ("`safetensors` weights", "no file named", "no such modeling files")
"""How diffusers says that weights are not there."""


def load_pipeline(
    model: str,
    *,
    revision: str = "",
    scheduler: str = "default",
    timestep_spacing: str = "default",
    dtype: str = "float32",
    device: str = "cpu",
    lora: str = "",
    lora_scale: float = 1.0,
    image_to_image: bool = False,
    compiled: bool = False,
) -> Any:
    """Load a diffusers text-to-image pipeline, ready to sample.

    Args:
        model: ``"tiny"`` (shipped), a folder in diffusers format, or a hub id.
        revision: Commit or tag of a hub id.
        scheduler: ``"default"``, or the name of a diffusers scheduler that suits the pipeline's own.
        timestep_spacing: ``"default"``, or where that scheduler's steps lie: ``leading``, ``linspace``, ``trailing``.
        dtype: Name of a torch dtype.
        device: Name of a torch device.
        lora: A ``.safetensors`` file of LoRA weights in diffusers' format, added into the weights; empty for none.
        lora_scale: Factor of their update.
        image_to_image: Give the pipeline of the same family that begins with an image.
        compiled: Compile the blocks of its denoiser, when they are first called.

    Raises:
        InputError: A folder that is not a pipeline; LoRA weights that are missing or not made for it.
        SetupError: A hub id that cannot be loaded here, a pipeline that diffusers lacks; no compiler.
        UsageError: A scheduler that does not suit the pipeline, a dtype that does not suit the device, a family
            that cannot begin with an image, or one that cannot begin without.
    """
    import diffusers
    import torch
    import transformers

    from gmail_cli.components import compilation

    if dtype == "float16" and torch.device(device).type == "cpu":
        raise UsageError("generate.dtype = 'float16' does not run on a CPU", hint="set generate.dtype to 'float32'")
    if compiled:
        compilation.require_compiler("generate.compile", device=device)
    # truncated captions are counted, not logged one by one, and the caller shows its own progress
    for logger in (diffusers.utils.logging, transformers.utils.logging):
        logger.set_verbosity(logging.CRITICAL)  # errors that matter are raised
        logger.disable_progress_bar()
    place, folder = locate(model)
    options: dict[str, Any] = {} if folder else {"revision": revision or None}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # how diffusers calls its hub
            config = diffusers.DiffusionPipeline.load_config(place, **options)
            _require_class(config, model=model)
            options |= {name: None for name, kind in config.items() if kind == [None, None]}  # as SD3's T5 often is
            if "safety_checker" in config:
                options |= {"safety_checker": None, "requires_safety_checker": False}
            pipeline = _load(place, dtype=getattr(torch, dtype), use_safetensors=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if failure := import_failure(error):
            raise failure from error
        if folder:
            raise InputError(
                f"generate.model = {model!r} is not a complete diffusers pipeline: {first_line(error)}",
                hint="save it again with pipeline.save_pretrained(folder, safe_serialization=True): .bin files are "
                "pickles, which are not read",
            ) from error
        if _weightless(error):
            raise SetupError(
                f"generate.model = {model!r} lacks weights in .safetensors files for a part of the pipeline",
                hint="take another repository or revision of the model; .bin files are pickles, which are not read",
            ) from error
        reason, hint = hub.explain(error, model, revision=revision)
        raise SetupError(f"generate.model = {model!r} cannot be loaded: {reason}", hint=hint) from error
    if scheduler != "default":
        pipeline.scheduler = _scheduler(pipeline.scheduler, scheduler)
    if timestep_spacing != "default":
        pipeline.scheduler = _spaced(pipeline.scheduler, timestep_spacing)
    if lora:
        _add_lora(pipeline, lora, scale=lora_scale)
    pipeline = _image_to_image(pipeline) if image_to_image else _text_to_image(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline = pipeline.to(device)
    if compiled:
        compilation.compile_blocks(getattr(pipeline, "unet", None) or pipeline.transformer)
    return pipeline


def _require_class(config: dict[str, Any], *, model: str) -> None:
    """Check that diffusers has the pipeline that a ``model_index.json`` names.

    Raises:
        SetupError: It has not, it has not without another package, or the pipeline is code that comes with the model.
    """
    import diffusers

    kind = config.get("_class_name")
    if not isinstance(kind, str):
        raise SetupError(
            f"generate.model = {model!r} draws by code of its own ({kind}), which is not run",
            hint="take a model that one of diffusers' own pipelines draws with",
        )
    if not hasattr(diffusers, kind):
        raise SetupError(
            f"generate.model = {model!r} is a {kind}, which diffusers {diffusers.__version__} does not have",
            hint="install a diffusers that has it, or take another model",
        )
    if getattr(diffusers, kind).__module__.startswith("diffusers.utils.dummy"):
        needed = [name for name in getattr(diffusers, kind)._backends if not find_spec(name)]
        raise SetupError(
            f"generate.model = {model!r} is a {kind}, for which diffusers needs {' and '.join(needed)}",
            hint=f"pip install {' '.join(needed)}",
        )


def _load(place: str, *, variants: tuple[str, ...] = _VARIANTS, **options: Any) -> Any:
    """The pipeline with its plain weights or, where it has none, with those of the first variant that it has.

    Raises:
        OSError, ValueError, ImportError, RuntimeError: As diffusers has it; without any weights, of the plain ones.
    """
    import diffusers

    try:
        return diffusers.DiffusionPipeline.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        if not variants or not _weightless(error):
            raise
        try:
            return _load(place, variants=variants[1:], **options | {"variant": variants[0]})
        except (OSError, ValueError) as other:
            raise (error if _weightless(other) else other) from None


def _weightless(error: Exception) -> bool:
    return any(each in str(error) for each in _WEIGHTLESS)


def _text_to_image(pipeline: Any) -> Any:
    """The pipeline, which begins with noise alone.

    Raises:
        UsageError: It needs an image.
    """
    from diffusers.pipelines import auto_pipeline

    kind = type(pipeline)
    drawing = auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()
    others = (auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING)
    if kind not in drawing and any(kind in each.values() for each in others):
        raise UsageError(
            f"generate.model: its model_index.json names {kind.__name__}, which needs an image to begin with",
            hint="take a model that draws from text alone; if its weights do, name the pipeline for that in the file",
        )
    return pipeline


def _image_to_image(pipeline: Any) -> Any:
    """The pipeline that begins with an image, of the same family and parts.

    Raises:
        UsageError: Diffusers has none.
    """
    import diffusers

    try:
        return diffusers.AutoPipelineForImage2Image.from_pipe(pipeline)
    except ValueError as error:
        raise UsageError(
            f"generate.strength: diffusers has no pipeline beside {type(pipeline).__name__} that begins with an image",
            hint="Set generate.strength to 0, or take Stable Diffusion 1, 2, 3, SDXL or FLUX.",
        ) from error


def _add_lora(pipeline: Any, file: str, *, scale: float) -> None:
    """Add LoRA weights into those of the pipeline.

    Raises:
        InputError: The file is missing, or holds nothing that fits the pipeline.
        UsageError: Diffusers knows no LoRA for this kind of pipeline.
    """
    path = locate_lora(file)
    kind = type(pipeline).__name__
    if not hasattr(pipeline, "load_lora_weights"):
        raise UsageError(f"generate.lora: diffusers loads no LoRA into a {kind}", hint='set generate.lora to ""')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _noted(pipeline) as named:
                pipeline.load_lora_weights(str(path.parent), weight_name=path.name, use_safetensors=True)
            parts = pipeline.get_list_adapters()
            adapted = sum(_adapted(getattr(pipeline, part)) for part in parts)
            if adapted and adapted >= len(named):
                pipeline.fuse_lora(components=list(parts), lora_scale=scale)
                pipeline.unload_lora_weights()
                return
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError, SafetensorError) as error:
        reason = first_line(error) or "its shapes are not those of this model"
    else:
        reason = f"of the {len(named)} modules that it changes the pipeline has {adapted}"
    raise InputError(
        f"generate.lora = {file!r} does not fit this {kind}: {reason}",
        hint="name LoRA weights that were trained on this model, in diffusers' or kohya's format",
    )


@contextlib.contextmanager
def _noted(pipeline: Any) -> Iterator[set[str]]:
    """The names of the LoRA weights that diffusers reads meanwhile, by its own names of them."""
    read_file, names = pipeline.lora_state_dict, set[str]()

    def read(*args: Any, **options: Any) -> Any:
        given = read_file(*args, **options)
        names.update(name for name in (given[0] if isinstance(given, tuple) else given) if _DOWN.search(name))
        return given

    pipeline.lora_state_dict = read
    try:
        yield names
    finally:
        del pipeline.lora_state_dict


def _adapted(network: Any) -> int:
    """How many modules of a network have LoRA weights."""
    return sum(bool(len(getattr(module, "lora_A", ()))) for module in network.modules())


def locate_lora(file: str) -> Path:
    """The file of LoRA weights.

    Raises:
        InputError: It is not there, or not a ``.safetensors`` file.
    """
    path = Path(file).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        raise InputError(
            f"generate.lora = {file!r} is not a .safetensors file that is there",
            hint="name the file that pipeline.save_lora_weights wrote (pytorch_lora_weights.safetensors)",
        )
    return path


def locate(model: str) -> tuple[str, Path | None]:
    """What diffusers loads for ``model``, and the folder it lies in (None for a hub id).

    Raises:
        InputError: A folder without ``model_index.json``, or a path that does not exist.
        SetupError: ``"tiny"`` without the shipped weights.
    """
    if model == "tiny":
        if not (SHIPPED / "model_index.json").is_file():
            raise SetupError("the shipped generator 'tiny' is missing from this installation", hint="install it again")
        return str(SHIPPED), SHIPPED
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise InputError(
                f"generate.model = {model!r} is a folder without model_index.json",
                hint="name the folder that pipeline.save_pretrained wrote",
            )
        return str(folder), folder
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(
            f"generate.model = {model!r} does not exist",
            hint="name a folder in diffusers format, a hub id such as 'owner/name', or 'tiny'",
        )
    return model, None


def _scheduler(own: Any, name: str) -> Any:
    """Another scheduler with the configuration of the pipeline's own.

    Raises:
        UsageError: One that diffusers does not call compatible with the pipeline's own.
    """
    import diffusers

    allowed = {kind.__name__ for kind in own.compatibles} | {type(own).__name__}
    if not allowed.isdisjoint(("DDIMScheduler", *_DISTILLED)):  # flow matching has no room for them
        allowed |= set(_DISTILLED)
    if name not in allowed:
        raise UsageError(
            f"generate.scheduler = {name!r} does not suit this pipeline, made for {type(own).__name__}",
            hint=f"use 'default' or one of: {', '.join(sorted(allowed))}",
        )
    return getattr(diffusers, name).from_config(own.config)


def _spaced(scheduler: Any, spacing: str) -> Any:
    """The scheduler with its steps elsewhere.

    Raises:
        UsageError: One whose steps have one place only.
    """
    if "timestep_spacing" not in scheduler.config:
        raise UsageError(
            f"generate.timestep_spacing = {spacing!r}: a {type(scheduler).__name__} has no such setting",
            hint="set generate.timestep_spacing to 'default', or generate.scheduler to another",
        )
    return type(scheduler).from_config(scheduler.config, timestep_spacing=spacing)


def first_line(error: Exception) -> str:
    """What an error says, without the lines that follow."""
    return str(error).strip().split("\n", maxsplit=1)[0]
