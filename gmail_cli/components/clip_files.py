"""CLIP models as files: finding, building, loading and saving them, and the digest that tells one from another.

A local folder, a hub repository or a pretrained tag of open_clip becomes an :class:`~.encoders.Clip`, and a ``Clip`` a
folder that open_clip or transformers loads.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gmail_cli.components import hub, rotary, transformers_models
from gmail_cli.components.encoders import Clip, Precision
from gmail_cli.components.images import Preprocess
from gmail_cli.errors import InputError, SetupError, UsageError, import_failure

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
SHIPPED = {"tiny": Path(__file__).resolve().parents[1] / "weights" / "tiny" / "clip"}
_OTHER_WEIGHTS = (
    *("open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth"),
    *("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"),
)


@torch.random.fork_rng(devices=[])  # building a model draws random numbers, which the caller's must not depend on
def load_clip(
    ref: str | Path,
    *,
    revision: str = "",
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
    seed: int = 0,
) -> Clip:
    """Load a CLIP model.

    Args:
        ref: ``tiny`` (shipped), a folder in open_clip's or transformers' format, ``hf-hub:owner/name`` of either,
            ``ARCH/pretrained-tag`` such as ``ViT-B-16/openai`` (activation as the tag states), or ``ARCH`` alone:
            random weights, to be trained.
        revision: Commit of a hub repository; needed for ``hf-hub:``.
        device: Where to put it.
        precision: See :class:`Clip`.
        seed: Of random weights; unused otherwise.

    Raises:
        UsageError: Nothing of that name; ``hf-hub:`` without revision; a tag trained with another activation than the
            named architecture has.
        InputError: The folder lacks its config or weights, or they do not fit each other.
        SetupError: The hub cannot be reached and its cache lacks the model.
    """
    import open_clip

    source = _locate(ref)
    if source.kind == "folder":
        return _load_folder(source.folder, name=str(ref), device=device, precision=precision)
    if source.kind == "hub":
        digest = model_digest(ref, revision=revision)
        folder = _download(source.name, revision=revision)
        clip = _load_folder(folder, name=str(ref), device=device, precision=precision)
        return dataclasses.replace(clip, digest=digest)
    model_cfg = open_clip.get_model_config(source.name)
    config = {"model_cfg": model_cfg, "preprocess_cfg": {}}
    if source.kind == "architecture":
        clip = build_clip(config, seed=seed, name=str(ref), device=device, precision=precision)
        return dataclasses.replace(clip, digest=model_digest(ref, seed=seed))
    tag = open_clip.get_pretrained_cfg(source.name, source.tag)
    quick = bool(tag.get("quick_gelu", False))
    if model_cfg.get("quick_gelu", False) and not quick:
        hint = "Save it as an open_clip folder whose config states the activation, and give that folder."
        raise UsageError(f"model.clip = {ref!r}: weights and architecture disagree about QuickGELU", hint=hint)
    config["model_cfg"] = {**model_cfg, "quick_gelu": quick}
    config["preprocess_cfg"] = {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in tag}
    weights = _download_tag(tag, ref=str(ref), revision=revision)
    clip = build_clip(config, seed=seed, name=str(ref), device=device, precision=precision)
    try:
        with hub.tensors_alone(str(ref)):
            open_clip.load_checkpoint(clip.model, str(weights))
    except RuntimeError as error:
        raise InputError(f"the weights of {ref} do not fit: {error}") from error
    return dataclasses.replace(clip, digest=model_digest(ref, revision=revision))


def build_clip(
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    name: str = "custom",
    tokenizer: Any = None,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
) -> Clip:
    """A model with random weights from an ``open_clip_config.json`` mapping.

    Args:
        config: ``model_cfg`` (open_clip's architecture description) and ``preprocess_cfg``; a text tower may have
            rotary positions (``rotary.py``).
        seed: Of the random weights.
        name: What to call it.
        tokenizer: An open_clip tokenizer; CLIP's own 49,408-entry one when None.
        device: Where to put it.
        precision: See :class:`Clip`.

    Raises:
        UsageError: open_clip rejects the description.
        SetupError: It names a tokenizer or a text tower of a hub, which cannot be had.
    """
    import open_clip

    model_cfg = copy.deepcopy(dict(config["model_cfg"]))
    _refuse_coca(model_cfg, name=name)
    custom = model_cfg.pop("custom_text", False) or "hf_model_name" in model_cfg["text_cfg"]
    base = model_cfg["text_cfg"].pop(rotary.KEY, None)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = kind(**model_cfg)
        except (TypeError, ValueError, AssertionError) as error:
            raise UsageError(f"open_clip cannot build {name}: {error}", hint="Check model_cfg.") from error
        except OSError as error:
            raise _not_from_hub(f"the text tower of {name}", model_cfg["text_cfg"]["hf_model_name"], error) from error
    if base is not None:
        rotary.make_rotary(model, base=base, name=name)
    if tokenizer is None:
        tokenizer = _tokenizer(config["model_cfg"]["text_cfg"], name=name, context_length=model.context_length)
    return _clip(model, tokenizer, config, name=name, digest=None, device=device, precision=precision)


def _refuse_coca(model_cfg: Mapping[str, Any], *, name: str) -> None:
    """CoCa's image tower gives tokens beside the embedding, which nothing here reads.

    Raises:
        UsageError: It is one.
    """
    if "multimodal_cfg" in model_cfg:
        raise UsageError(f"{name} is a CoCa, which is not supported", hint="Take a CLIP or SigLIP as model.clip.")


def _tokenizer(text_cfg: Mapping[str, Any], *, name: str, context_length: int) -> Any:
    """The tokenizer that open_clip's description of a text tower asks for."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    options = text_cfg.get("tokenizer_kwargs") or {}
    source = text_cfg.get("hf_tokenizer_name")
    if not source:
        return SimpleTokenizer(context_length=context_length, **options)
    try:
        return HFTokenizer(source, context_length, tokenizer_mode=text_cfg.get("tokenizer_mode"), **options)
    except OSError as error:
        raise _not_from_hub(f"the tokenizer of {name}", source, error) from error


def _not_from_hub(what: str, repository: str, error: OSError) -> SetupError:
    reason, hint = hub.explain(error, repository, revision="")
    return SetupError(f"{what} ({repository}) cannot be loaded: {reason}", hint=hint)


def save_clip(clip: Clip, folder: Path) -> None:
    """Write ``clip`` as a folder that plain open_clip loads (``local-dir:``) with equal outputs.

    A text tower with rotary positions is written to the same files, and :func:`load_clip` alone loads it: open_clip
    stops at the unknown key of its config.

    Args:
        clip: What to save.
        folder: An existing folder; gets the config, the fp32 weights and the tokenizer's files. A model that came in
            transformers format is written for transformers' ``AutoModel.from_pretrained``.
    """
    from safetensors.torch import save_file

    if "transformers" in clip.config:
        transformers_models.save(clip.model, clip.tokenizer, clip.config, folder)
        return

    text = json.dumps(clip.config, indent=1, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in clip.model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    if hasattr(clip.tokenizer, "save_pretrained"):
        clip.tokenizer.save_pretrained(str(folder))


def model_digest(ref: str | Path, *, revision: str = "", seed: int = 0) -> str:
    """The digest ``load_clip`` would give, without loading the model.

    Local models are identified by content: SHA-256 over config and tensors, whatever the file's layout. Hub models
    and tags are identified by name and revision; random weights by architecture and seed.

    Raises:
        UsageError: Nothing of that name; ``hf-hub:`` without revision, which would be other weights tomorrow.
    """
    source = _locate(ref)
    if source.kind == "folder":
        stamp = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in _model_files(source.folder))
        return _folder_digest(source.folder, stamp)
    if source.kind == "architecture":
        return _sha256([_canonical({"architecture": source.name, "seed": seed})])
    if source.kind == "hub" and not revision:
        raise UsageError(
            f"model.clip = {str(ref)!r} is a hub id without model.revision",
            hint="Set model.revision to a commit of the model's repository: artifacts then name its weights.",
        )
    return _sha256([_canonical({"ref": str(ref), "revision": revision})])


def has_random_weights(ref: str | Path) -> bool:
    """Whether ``ref`` names an architecture alone, so that its weights are drawn, not learned."""
    return _locate(ref).kind == "architecture"


@dataclass(frozen=True)
class _Source:
    kind: Literal["folder", "hub", "tag", "architecture"]
    name: str = ""
    tag: str = ""
    folder: Path = Path()


def _locate(ref: str | Path) -> _Source:
    text = str(ref)
    if text in SHIPPED:
        return _Source("folder", folder=SHIPPED[text])
    if text.startswith("hf-hub:"):
        return _Source("hub", name=text.removeprefix("hf-hub:"))
    if Path(text).is_dir():
        return _Source("folder", folder=Path(text).resolve())
    import open_clip

    name, slash, tag = text.partition("/")
    if open_clip.get_model_config(name) is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        hint += "Give tiny, an open_clip folder, hf-hub:owner/name, or ARCH/pretrained-tag."
        raise UsageError(f"model.clip = {text!r} is no folder and no model open_clip knows", hint=hint)
    if not slash:
        return _Source("architecture", name=name)
    if not open_clip.get_pretrained_cfg(name, tag):
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UsageError(f"model.clip = {text!r}: {name} has no weights {tag!r}", hint=f"It has: {known}.")
    return _Source("tag", name=name, tag=tag)


def _model_files(folder: Path) -> tuple[Path, Path]:
    if transformers_models.is_transformers(folder):
        return folder / transformers_models.CONFIG_FILE, transformers_models.weights_file(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder} is no open_clip model: it has no {CONFIG_FILE}", hint="Check model.clip.")
    for name in (WEIGHTS_FILE, *_OTHER_WEIGHTS):
        if (folder / name).is_file():
            return folder / CONFIG_FILE, folder / name
    raise InputError(f"{folder} has no weights", hint=f"Put {WEIGHTS_FILE} beside {CONFIG_FILE}.")


def _load_folder(folder: Path, *, name: str, device: str | torch.device, precision: Precision) -> Clip:
    import open_clip
    from safetensors import SafetensorError

    config_file, _ = _model_files(folder)
    if transformers_models.is_transformers(folder):
        described = transformers_models.read_config(folder)
        model, tokenizer = transformers_models.load(folder, described)
        return _clip(
            model, tokenizer, described, name=name, digest=model_digest(folder), device=device, precision=precision
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        _refuse_coca(config["model_cfg"], name=name)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        with hub.tensors_alone(name):
            if rotary.KEY in config["model_cfg"]["text_cfg"]:
                model = build_clip(config, name=name, tokenizer=tokenizer).model
                open_clip.load_checkpoint(model, str(_model_files(folder)[1]))
            else:
                model = open_clip.create_model(f"local-dir:{folder}")
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        wrong = InputError(f"{folder} cannot be loaded by open_clip: {error}", hint="Check model.clip.")
        raise import_failure(error) or wrong from error
    digest = model_digest(folder)
    return _clip(model, tokenizer, config, name=name, digest=digest, device=device, precision=precision)


def _clip(
    model: Any,
    tokenizer: Any,
    config: Mapping[str, Any],
    *,
    name: str,
    digest: str | None,
    device: str | torch.device,
    precision: Precision,
) -> Clip:
    device = torch.device(device)
    model = model.eval().requires_grad_(False).to(device)
    given = config.get("preprocess_cfg", {})
    if "transformers" in config:
        preprocess = Preprocess(**given)
    else:
        preprocess = Preprocess.from_open_clip({**given, "size": model.visual.image_size})
    return Clip(
        model=model,
        tokenizer=tokenizer,
        preprocess=preprocess,
        config=config,
        name=name,
        digest=digest or tensors_digest(config, model.state_dict()),
        device=device,
        precision=precision,
    )


def _download(repository: str, *, revision: str) -> Path:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return hub.fetch(repository, revision=revision, weights=(WEIGHTS_FILE, *_OTHER_WEIGHTS))
    except (HfHubHTTPError, OSError) as error:
        reason, hint = hub.explain(error, repository, revision=revision)
        raise SetupError(f"hf-hub:{repository} cannot be loaded: {reason}", hint=hint) from error


def _download_tag(tag: Mapping[str, Any], *, ref: str, revision: str) -> Path:
    import open_clip
    from open_clip.pretrained import download_pretrained_from_hf

    repository, _, filename = str(tag.get("hf_hub", "")).rpartition("/")
    try:
        if repository:
            return Path(download_pretrained_from_hf(repository, filename=filename or None, revision=revision or None))
        return Path(open_clip.download_pretrained(dict(tag)))
    except (OSError, RuntimeError) as error:
        reason, hint = str(error), "Check the network, or fill the cache on a machine that has one."
        if repository:
            reason, hint = hub.explain(error, repository, revision=revision)
        raise SetupError(f"the weights of {ref} cannot be loaded: {reason}", hint=hint) from error


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _sha256(parts: Sequence[bytes] | Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


@functools.lru_cache(maxsize=32)
def _folder_digest(folder: Path, stamp: tuple[tuple[int, int], ...]) -> str:
    """Digest of a model folder; ``stamp`` (sizes and times) only tells an edited folder from the remembered one."""
    config_file, weights_file = _model_files(folder)
    try:
        if transformers_models.is_transformers(folder):
            config = transformers_models.read_config(folder)
        else:
            config = json.loads(config_file.read_text(encoding="utf-8"))
        if weights_file.suffix != ".safetensors":
            return _sha256([_canonical(config), weights_file.read_bytes()])
        return _sha256(_safetensors_parts(config, weights_file))
    except (ValueError, KeyError, struct.error) as error:
        raise InputError(f"{folder} is damaged: {error}", hint="Fetch or make the model again.") from error


def _safetensors_parts(config: Mapping[str, Any], file: Path) -> Iterator[bytes]:
    data = np.memmap(file, dtype=np.uint8, mode="r")
    (size,) = struct.unpack("<Q", data[:8].tobytes())
    header = json.loads(data[8 : 8 + size].tobytes())
    header.pop("__metadata__", None)
    yield _canonical(config)
    for name in sorted(header):
        start, stop = header[name]["data_offsets"]
        yield _canonical([name, header[name]["dtype"], header[name]["shape"]])
        yield data[8 + size + start : 8 + size + stop].tobytes()


def digest_in_memory(config: Mapping[str, Any], model: nn.Module) -> str:
    """The digest of a model in memory: what :func:`model_digest` gives for the folder it is saved to."""
    named = transformers_models.named_tensors(model) if "transformers" in config else model.state_dict()
    return tensors_digest(config, named)


def tensors_digest(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a config and named tensors, as a folder of them is identified."""
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}

    def parts() -> Iterator[bytes]:
        yield _canonical(config)
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            yield _canonical([name, kinds[tensor.dtype], list(tensor.shape)])
            yield tensor.reshape(-1).view(torch.uint8).numpy().tobytes()

    return _sha256(parts())
