"""f_g while it is tuned: a trainable copy of f_r's image tower (paper, section 3.2).

:class:`TunedTower` trains a low-rank update (LoRA, through peft) or every weight; :func:`merge` folds it back into a
plain open_clip model. f_r itself is never touched.

LoRA is computed as ``W + scale * B A`` on the weights, not by peft's wrapped layers, because peft 0.21's
``MultiheadAttention`` adds and subtracts the update around every forward pass (the frozen weights drift by 1e-7 and a
resumed run would end in other bytes) and applies that of its ``out_proj`` twice. The adapter leaves that one alone,
so what is saved behaves the same in plain peft, with and without that defect.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gmail_cli.components.clip_files import digest_in_memory
from gmail_cli.components.encoders import Clip
from gmail_cli.components.transformers_models import Visual
from gmail_cli.errors import InputError, UsageError, import_failure

if TYPE_CHECKING:
    from peft import PeftModel


class TunedTower(nn.Module):
    """A trainable copy of an image tower: f_g while it is being tuned.

    Always in eval mode: no dropout, and batch normalisation keeps f_r's statistics, so an update depends on nothing
    but the batch. Without an adapter every weight is trained.
    """

    def __init__(self, visual: nn.Module, adapter: PeftModel | None = None, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.visual = visual
        self.adapter = adapter
        self.dropout = dropout
        self.eval()

    def adapted(self, *, dropout: float = 0.0) -> dict[str, Tensor]:
        """Name -> ``W + scale * B A`` of each weight the adapter changes; empty without one.

        With DoRA that sum's rows are brought to the learned lengths; as in peft, no gradient goes through their norms.

        Args:
            dropout: Share of the inputs (columns of A) that the update does not see, drawn from torch's generator.
        """
        if self.adapter is None:
            return {}
        from peft.tuners.lora import LoraLayer

        weights = {}
        for path, layer in self.adapter.base_model.model.named_modules():
            if isinstance(layer, LoraLayer):
                fused = isinstance(layer.get_base_layer(), nn.MultiheadAttention)
                name = path.replace(".base_layer", "") + (".in_proj_weight" if fused else ".weight")
                update = layer.get_delta_weight("default")
                if dropout:
                    kept = torch.rand(update.shape[1], device=update.device) >= dropout
                    update = update * (kept / (1 - dropout)).view(1, -1, *[1] * (update.ndim - 2))
                weight = self.visual.get_parameter(name) + update
                if layer.use_dora.get("default"):
                    lengths = layer.lora_magnitude_vector["default"].weight.view(-1, *[1] * (weight.ndim - 1))
                    norms = torch.linalg.vector_norm(weight.detach().flatten(1), dim=1)
                    weight = lengths / norms.view_as(lengths) * weight
                weights[name] = weight
        return weights

    def forward(self, pixels: Float[Tensor, "batch 3 height width"], *, chunk: int = 0) -> Float[Tensor, "batch dim"]:
        """Unit embeddings, differentiable; with dropout wherever gradients are wanted.

        Args:
            pixels: Of the whole batch.
            chunk: Embed so many images at a time, and hold the activations of no more than these: they are computed
                again when gradients go back through them (GradCache, Gao et al. 2021). Loss and gradients are those
                of the whole batch up to rounding. 0 embeds all at once.
        """
        weights = self.adapted(dropout=self.dropout if torch.is_grad_enabled() else 0.0)

        def embed(part: Tensor) -> Tensor:
            return torch.func.functional_call(self.visual, weights, (part,))

        if not 0 < chunk < len(pixels):
            features = embed(pixels)
        else:
            features = torch.cat(
                [checkpoint(embed, part, use_reentrant=False, preserve_rng_state=False) for part in pixels.split(chunk)]
            )
        return nn.functional.normalize(features.float(), dim=-1)


def lora_targets(visual: nn.Module) -> tuple[str, ...]:
    """The modules of an image tower that LoRA tunes by default.

    Vision transformers: the whole ``attn`` (peft reaches a fused ``nn.MultiheadAttention`` in no other way) and both
    layers of the MLP. Residual networks: every convolution; not the attention pool, whose weights are read without
    calling the modules, so that plain peft would ignore an adapter there. timm towers (SigLIP, EVA, MobileCLIP,
    ConvNeXt, ...): every linear layer and ungrouped convolution of the trunk but its head, by full path; likewise not
    those whose weights are read without a call (queries, keys and values of EVA). Towers in transformers format: every
    linear layer of the blocks, by full path, so that plain peft tunes the same ones in a model with a text tower.
    """
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, ModifiedResNet):
        return ("conv1", "conv2", "conv3", "downsample.0")
    if isinstance(visual, VisionTransformer):
        return ("attn", "c_fc", "c_proj")
    return _called(
        visual, within=r"trunk\.(?!head|classifier)" if isinstance(visual, TimmModel) else r"(.*\.)?layers?\."
    )


def _called(visual: nn.Module, *, within: str) -> tuple[str, ...]:
    """The linear layers and ungrouped convolutions that a forward pass calls, of those whose path begins so."""
    found: dict[str, None] = {}

    def watch(path: str) -> Callable[..., None]:
        return lambda *_: found.setdefault(path)

    hooks = [
        module.register_forward_pre_hook(watch(path))
        for path, module in visual.named_modules()
        if (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
        and re.match(within, path)
    ]
    sample = next(visual.parameters())
    size = visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    with torch.inference_mode():
        visual(torch.zeros(1, 3, height, width, device=sample.device, dtype=sample.dtype))
    for hook in hooks:
        hook.remove()
    return tuple(found)


def add_lora(
    clip: Clip,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    targets: Sequence[str] = (),
    dropout: float = 0.0,
    rank_stabilised: bool = False,
    decomposed: bool = False,
    seed: int = 0,
) -> TunedTower:
    """A copy of ``clip``'s image tower that trains a low-rank update of its weights (Hu et al. 2022).

    Args:
        clip: f_r; stays as it is.
        rank: Rank of each update (the paper: 4).
        alpha: The update is scaled by ``alpha / rank``.
        targets: Names of modules to tune, as peft matches them; empty takes :func:`lora_targets`.
        dropout: Share of each module's inputs that the update does not see in a training step, one draw for all
            positions and images of the batch (peft's own dropout cannot reach fused attention).
        rank_stabilised: Scale by ``alpha / sqrt(rank)`` (rsLoRA, Kalajdzievski 2023).
        decomposed: Learn the lengths of the weights' rows apart (DoRA, Liu et al. 2024).
        seed: Of the initial A; B starts at zero, so f_g starts as f_r.

    Raises:
        UsageError: peft cannot tune such modules, or the tower has none of that name.
    """
    from peft import LoraConfig, get_peft_model

    chosen = targets or lora_targets(clip.model.visual)
    if decomposed and not targets:
        chosen = [name for name in chosen if name != "attn"]  # peft has no DoRA for a fused nn.MultiheadAttention
    targets = sorted(chosen)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets, use_rslora=rank_stabilised, use_dora=decomposed
    )
    visual = copy.deepcopy(clip.model.visual).requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with _peft():
                adapter = get_peft_model(_shell(visual), config)
        except (ValueError, TypeError) as error:
            own = dict.fromkeys(re.findall(r"[^.]+(?:\.\d+)?$", name)[0] for name in lora_targets(clip.model.visual))
            hint = f"Name modules of the image tower; left empty it takes {', '.join(own)}."
            raise UsageError(f"align.lora_targets = {targets}: {error}", hint=hint) from error
    fused = {path for path, module in visual.named_modules() if isinstance(module, nn.MultiheadAttention)}
    for name, parameter in adapter.named_parameters():
        owner, out_proj, _ = name.replace(".base_layer", "").partition(".out_proj.")
        if out_proj and owner.removeprefix("base_model.model.") in fused:
            parameter.requires_grad_(False)
    return TunedTower(visual, adapter, dropout=dropout)


def unfreeze(clip: Clip) -> TunedTower:
    """A copy of ``clip``'s image tower that trains every weight (the paper's Table 11, "full")."""
    return TunedTower(copy.deepcopy(clip.model.visual).requires_grad_(True))


def unfreeze_projection(clip: Clip) -> TunedTower:
    """A copy of ``clip``'s image tower that trains its last layer only: the map into the joint space.

    Raises:
        UsageError: The tower has none that we know.
    """
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel

    visual = copy.deepcopy(clip.model.visual).requires_grad_(False)
    last = (
        "attnpool.c_proj."
        if isinstance(visual, ModifiedResNet)
        else _timm_projection(visual)
        if isinstance(visual, TimmModel)
        else "visual_projection."
        if isinstance(visual, Visual)
        else "proj"
    )
    found = [parameter for name, parameter in visual.named_parameters() if name.startswith(last)]
    if not found:
        raise UsageError(
            f"align.method = 'projection': the image tower of {clip.name} has no projection", hint="Use lora or full."
        )
    for parameter in found:
        parameter.requires_grad_(True)
    return TunedTower(visual)


def _timm_projection(visual: Any) -> str:
    """Where names of the projection's parameters begin: open_clip's own behind the trunk, or else timm's classifier,
    which EVA-CLIP, MobileCLIP and others have for it."""
    if any(True for _ in visual.head.parameters()):
        return "head."
    classifier = visual.trunk.get_classifier()
    return next((f"{name}." for name, module in visual.named_modules() if module is classifier), "head.")


def save_adapter(tower: TunedTower, folder: Path, *, base: str) -> None:
    """Write the adapter as plain peft loads it: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        tower: Made by :func:`add_lora`.
        folder: An existing folder.
        base: Name of f_r, kept for the reader.
    """
    assert tower.adapter is not None, "a fully tuned tower has no adapter"
    save_peft(tower.adapter, folder, base=base)


def save_peft(adapter: PeftModel, folder: Path, *, base: str) -> None:
    """Write an adapter of any model as plain peft loads it, in the same bytes whenever it is written."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = adapter.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    text = json.dumps(plain, indent=1, sort_keys=True)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    tensors = get_peft_model_state_dict(adapter, save_embedding_layers=False)
    save_file(
        {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )


def load_adapter(clip: Clip, folder: Path) -> TunedTower:
    """The tower of an adapter saved by :func:`save_adapter` (or plain peft) over ``clip``.

    Raises:
        InputError: No adapter there, or not one of this model.
    """
    visual = copy.deepcopy(clip.model.visual).requires_grad_(False)
    hint = "Give the adapter folder of an align artifact made from the same model."
    return TunedTower(visual, load_peft(_shell(visual), folder, name=clip.name, hint=hint))


def load_peft(model: nn.Module, folder: Path, *, name: str, hint: str) -> PeftModel:
    """The adapter in ``folder`` over ``model``, which is called ``name``.

    Raises:
        InputError: No adapter there, or not one of this model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        with _peft():
            warnings.simplefilter("error", UserWarning)  # peft only warns of weights it misses
            return PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, UserWarning, SafetensorError) as error:
        wrong = InputError(f"{folder} holds no adapter for {name}: {error}", hint=hint)
        raise import_failure(error) or wrong from error


@contextlib.contextmanager
def _peft() -> Iterator[None]:
    """peft 0.21 asks transformers 5 for an attribute that is going to be renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def _shell(visual: nn.Module) -> nn.Module:
    """A second module structure over the same weights: peft rewrites the structure it is given."""
    shared = {id(tensor): tensor for tensor in (*visual.parameters(), *visual.buffers())}
    return copy.deepcopy(visual, shared)


def merge(clip: Clip, tower: TunedTower, *, name: str = "") -> Clip:
    """A plain model with the tuned tower's weights folded in: f_g beside f_r's text tower, where there is one."""
    model = copy.deepcopy(clip.model)
    with torch.no_grad():
        model.visual.load_state_dict({**tower.visual.state_dict(), **tower.adapted()})
    model.requires_grad_(False)
    digest = digest_in_memory(clip.config, model)
    return dataclasses.replace(clip, model=model, name=name or clip.name, digest=digest)
