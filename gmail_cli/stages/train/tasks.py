"""Every task that ``gmail train`` knows: how a cell of it is built, and which settings matter to it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile.schema import ArmName, Profile, TaskName
from gmail_cli.shipped import profile_folder
from gmail_cli.stages.train.material import Inputs

if TYPE_CHECKING:
    import numpy as np

    from gmail_cli.components.arms import Arm
    from gmail_cli.components.loop import Job, Recipe

WHOLE_SHARE = 0.75
"""Share of the steps after which ``clip`` sees all patches, where it drops some before."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to train."""

    task: TaskName
    arm: ArmName
    seed: int
    dual_projection: bool = False

    @property
    def name(self) -> str:
        """``<task>.<arm>.seed<k>``, with ``+dual`` appended for dual projection; also the cell's folder."""
        return f"{self.task}.{self.arm}.seed{self.seed}" + "+dual" * self.dual_projection


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the stage has to know of a task.

    Attributes:
        build: Prepares a cell for the training loop.
        arms: Arms it can be trained on.
        dual: Whether it has a head that dual projection applies to.
        image_encoder: What embeds images for the result: ``f_r``, or the model it trained itself.
        needs_clip: Whether it starts from ``model.clip``.
        fitted: Whether it is fitted in closed form when it is built, without steps.
        settings: Keys of ``train`` that matter to it and to those tasks alone that list them too; a key that no task
            lists matters to every cell.
        shared: Whether the processes of ``torchrun`` compute each step together.
    """

    build: Callable[[Inputs, Cell], Job]
    arms: frozenset[str]
    dual: bool = False
    image_encoder: Literal["f_r", "own"] = "f_r"
    needs_clip: bool = True
    fitted: bool = False
    settings: frozenset[str] = frozenset()
    shared: bool = False


def _clip_text(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components.tasks import clip_text_job

    arm = None if cell.arm == "none" else inputs.material.embedded(cell.arm)
    return clip_text_job(inputs.material.clip, inputs.material.pairs, arm)


def _long_clip(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components import longtext

    train, material = inputs.profile.train, inputs.material
    if train.kinds != ("long",):
        raise UsageError(
            f"train.kinds = {list(train.kinds)}: long-clip trains on long captions",
            hint='Use --set train.kinds=["long"]; the short ones come in by themselves (train.short_texts).',
        )
    shorts = None
    if train.short_weight:
        captions: dict[str, list[str]] = {}
        for caption in material.dataset.captions_of_kind("short"):
            captions.setdefault(caption.owner, []).append(caption.text)
        shorts = longtext.short_texts(
            material.pairs, owners=material.pairs.records, captions=captions, choice=train.short_texts
        )
    rotary = train.positions == "rotary" and cell.arm != "none"
    clip = longtext.lengthened(
        material.clip,
        length=train.context_length,
        keep=train.keep_positions,
        positions="rotary" if rotary else "stretched",
    )
    return longtext.long_clip_job(
        clip,
        material.pairs,
        None if cell.arm == "none" else material.embedded(cell.arm),
        shorts=shorts,
        short_weight=train.short_weight,
        components=train.coarse_components,
        teacher=material.clip if rotary else None,
        distilled=recipe_of(cell, inputs.profile).restart,
    )


def _clip(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components.clip_files import build_clip
    from gmail_cli.components.loop import seed_from
    from gmail_cli.components.tasks import clip_job

    train = inputs.profile.train
    if not train.architecture and train.vocabulary:
        raise UsageError(
            f"train.vocabulary = {train.vocabulary} replaces the tokenizer of {inputs.profile.model.clip}",
            hint="Set train.architecture to train from random weights, or train.vocabulary to 0.",
        )
    if train.architecture:
        config = architecture(train.architecture)
        tokenizer = None
        if train.vocabulary:
            tokenizer, config = _learned_tokenizer(inputs, config)
        seed = seed_from("clip", inputs.profile.seed, cell.seed)
        clip = build_clip(config, seed=seed, name=cell.name, tokenizer=tokenizer, device=inputs.device)
    else:
        clip = inputs.material.clip
    return clip_job(
        clip,
        inputs.material.pairs,
        inputs.material.pixels(cell.arm, clip.preprocess),
        augment=train.augment,
        patch_dropout=train.patch_dropout,
        whole_from=round(WHOLE_SHARE * train.steps),
        class_weight=train.class_weight,
    )


def _learned_tokenizer(inputs: Inputs, config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """An open_clip tokenizer learned from the captions, and the config with its vocabulary."""
    from open_clip.tokenizer import HFTokenizer

    from gmail_cli.components.tokenizer import save_tokenizer, train_tokenizer

    folder = inputs.scratch("tokenizer/vocab.json").parent
    learned = train_tokenizer(sorted(set(inputs.material.pairs.texts)), entries=inputs.profile.train.vocabulary)
    save_tokenizer(learned, folder)
    text = {**config["model_cfg"]["text_cfg"], "vocab_size": len(learned), "hf_tokenizer_name": "tokenizer"}
    tokenizer = HFTokenizer(str(folder), text.get("context_length", 77))
    return tokenizer, {**config, "model_cfg": {**config["model_cfg"], "text_cfg": text}}


def _clipcap(inputs: Inputs, cell: Cell) -> Job:
    import torch

    from gmail_cli.components.heads import Captioner, load_lm
    from gmail_cli.components.loop import seed_from
    from gmail_cli.components.tasks import clipcap_job

    train = inputs.profile.train
    lm, tokenizer = load_lm(train.lm, revision=train.lm_revision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from("clipcap", inputs.profile.seed, cell.seed))
        captioner = Captioner(
            inputs.material.clip.dim,
            lm=lm,
            tokenizer=tokenizer,
            lm_name=train.lm,
            lm_revision=train.lm_revision,
            prefix_length=train.prefix_length,
            mapping=train.mapping,
            tune_lm=train.tune_lm,
            dual=cell.dual_projection,
        )
    arm = inputs.material.embedded(cell.arm)
    if cell.arm == "texts":
        captioner.memory = arm.views[0].values[: train.text_memory] if train.text_memory else None
        arm = replace(arm, noise=train.text_noise)
    return clipcap_job(
        captioner.to(inputs.device),
        inputs.material.pairs,
        arm,
        meeting=inputs.material.meeting(cell.arm) if cell.dual_projection else None,
        caption_tokens=train.caption_tokens,
    )


def _ifcap(inputs: Inputs, cell: Cell) -> Job:
    import torch

    from gmail_cli.components import ifcap
    from gmail_cli.components.heads import load_lm
    from gmail_cli.components.loop import seed_from

    train, material = inputs.profile.train, inputs.material
    lm, tokenizer = load_lm(train.lm, revision=train.lm_revision)
    captions = list(dict.fromkeys(material.pairs.texts))[: train.caption_memory or None]
    if len(captions) < 2:
        raise UsageError(f"train.caption_memory leaves {len(captions)} caption to retrieve from", hint="Keep more.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from("ifcap", inputs.profile.seed, cell.seed))
        captioner = ifcap.RetrievalCaptioner(
            material.clip.dim,
            captions=captions,
            vectors=material.embedded("texts").views[0].values[: len(captions)].clone(),
            retrieved=train.retrieved_captions,
            filtered=train.filtered_captions,
            lm_revision=train.lm_revision,
            lm=lm,
            tokenizer=tokenizer,
            lm_name=train.lm,
            prefix_length=train.prefix_length,
            mapping=train.mapping,
            tune_lm=train.tune_lm,
        )
    arm, texts = material.embedded(cell.arm), cell.arm == "texts"
    return ifcap.ifcap_job(
        captioner.to(inputs.device),
        material.pairs,
        replace(arm, noise=train.text_noise) if texts else arm,
        caption_tokens=train.caption_tokens,
        retrieval_noise=train.retrieval_noise if texts else 0.0,
        word_drop=train.word_drop,
    )


def _sitta(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components import sitta
    from gmail_cli.components.heads import load_lm
    from gmail_cli.components.loop import seed_from

    train, material = inputs.profile.train, inputs.material
    lm, tokenizer = load_lm(train.lm, revision=train.lm_revision)
    about = {
        "lm": train.lm,
        "lm_revision": train.lm_revision,
        "encoder": material.clip.digest,
        "tokens": train.retrieved_tokens,
        "orders": train.token_orders,
    }
    model = sitta.LinearMap(material.clip.dim, lm=lm, tokenizer=tokenizer, about=about).to(inputs.device)
    seed = seed_from("sitta", inputs.profile.seed, cell.seed)
    return sitta.sitta_job(model, material.pairs, material.embedded(cell.arm), how=train.linear_map, seed=seed)


def _llava(inputs: Inputs, cell: Cell) -> Job:
    import torch

    from gmail_cli.components import llava, parallel
    from gmail_cli.components.conversations import read_conversations
    from gmail_cli.components.heads import load_lm
    from gmail_cli.components.loop import seed_from

    profile, train, material = inputs.profile, inputs.profile.train, inputs.material
    if train.conversations:
        read, _ = read_conversations(Path(train.conversations), on_bad=profile.data.on_bad)
        conversations = llava.covered(read, material.pairs, on_bad=profile.data.on_bad)
    else:
        conversations = llava.captions_as_conversations(material.pairs, prompt=train.prompt)

    def shown(arm: ArmName) -> Arm:
        return material.embedded(arm) if train.visual == "pooled" else material.patches(arm, grid=train.visual_grid)

    arm, recipe = shown(cell.arm), recipe_of(cell, profile)
    values = arm.views[0].values
    about = {
        "lm": train.lm,
        "lm_revision": train.lm_revision,
        "image_tokens": values.shape[1] if values.ndim == 3 else 1,
        "visual": train.visual,
        "visual_grid": train.visual_grid,
        "encoder": material.clip.digest,
        "prompt": train.prompt,
        "instructed": recipe.restart < recipe.steps,
    }
    sharded = profile.runtime.sharding == "full"
    lm, tokenizer = load_lm(
        train.lm,
        revision=train.lm_revision,
        dtype=torch.bfloat16 if train.precision == "bf16" else torch.float32,
        empty=sharded and parallel.ranks().rank > 0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from("llava", profile.seed, cell.seed))
        model = llava.Llava(
            values.shape[-1],
            lm=lm,
            tokenizer=tokenizer,
            about=about,
            dual=cell.dual_projection,
            lora_rank=train.lora_rank if about["instructed"] else 0,
            lora_alpha=train.lora_alpha,
        )
    job = llava.llava_job(
        (model if sharded else model.to(inputs.device)).eval(),
        material.pairs,
        arm,
        real=shown("real") if cell.dual_projection else None,
        conversations=conversations,
        recipe=recipe,
        caption_tokens=train.caption_tokens,
        conversation_tokens=train.conversation_tokens,
    )
    if not sharded:
        return job
    return replace(job, share=functools.partial(parallel.shard, model, model.lm, device=inputs.device))


def _linear_probe(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components.heads import Probe, save_head
    from gmail_cli.components.loop import Job, batch_indices, seed_from
    from gmail_cli.components.tasks import few_shots, probe_job, zero_shot_probe

    if cell.arm == "none":
        zero_shot = zero_shot_probe(inputs.material.clip, inputs.material.pairs)
        return Job(
            module=zero_shot,
            loss=lambda rows, step: zero_shot.linear.weight.sum(),
            rows=0,
            export=lambda folder: save_head(zero_shot, folder),
        )
    probe = Probe(inputs.material.clip.dim, inputs.material.pairs.class_names, dual=cell.dual_projection).to(
        inputs.device
    )
    meeting = inputs.material.meeting(cell.arm) if cell.dual_projection else None
    pairs, train, rows = inputs.material.pairs, inputs.profile.train, None
    if train.shots:
        few = few_shots(pairs, train.shots, seed=seed_from("shots", inputs.profile.seed, cell.seed))
        seed = recipe_of(cell, inputs.profile).seed

        def rows(step: int) -> np.ndarray:
            return few[batch_indices(len(few), train.batch_size, seed=seed, step=step)]

    return probe_job(probe, pairs, inputs.material.embedded(cell.arm), meeting=meeting, rows=rows)


def _autoencoder(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components.generative import autoencoder_job
    from gmail_cli.components.loop import seed_from

    train = inputs.profile.train
    return autoencoder_job(
        _squares(inputs, cell),
        rows=len(inputs.material.pairs),
        side=train.image_size,
        steps=train.steps,
        seed=seed_from(inputs.profile.seed, cell.seed),
        device=inputs.device,
    )


def _latent_diffusion(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components.generative import (
        encode_latents,
        latent_diffusion_job,
        load_autoencoder,
        text_encoder_of,
    )
    from gmail_cli.components.loop import seed_from

    autoencoder = load_autoencoder(inputs.profile.train.autoencoder).to(inputs.device)
    clip, arm = inputs.material.clip, _squares(inputs, cell)
    views = tuple(replace(view, values=encode_latents(autoencoder, view.values)) for view in arm.views)
    return latent_diffusion_job(
        inputs.material.pairs,
        replace(arm, views=views),
        autoencoder=autoencoder,
        text_encoder=text_encoder_of(clip.model),
        tokenizer=_hf_tokenizer(inputs, cell),
        seed=seed_from(inputs.profile.seed, cell.seed),
        device=inputs.device,
    )


def _causal_lm(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components.generative import causal_lm_job
    from gmail_cli.components.loop import seed_from

    return causal_lm_job(
        inputs.material.pairs,
        tokenizer=_hf_tokenizer(inputs, cell),
        seed=seed_from(inputs.profile.seed, cell.seed),
        device=inputs.device,
    )


def _squares(inputs: Inputs, cell: Cell) -> Arm:
    """The images of a cell's arm at ``train.image_size``."""
    from gmail_cli.components.images import Preprocess

    return inputs.material.pixels(cell.arm, Preprocess(size=inputs.profile.train.image_size))


def _hf_tokenizer(inputs: Inputs, cell: Cell) -> Any:
    """The transformers tokenizer of ``model.clip``."""
    tokenizer = getattr(inputs.material.clip.tokenizer, "tokenizer", None)
    if tokenizer is None:
        raise UsageError(
            f"model.clip = {inputs.profile.model.clip!r} has no transformers tokenizer, which {cell.task} saves",
            hint="Take a CLIP with its own tokenizer files, such as tiny.",
        )
    return tokenizer


_EMBEDDED = frozenset({"real", "generated-naive", "generated-aligned", "mixed"})
_PIXELS = frozenset({"real", "generated-naive", "mixed"})
SETTINGS_OF_CELLS = ("tasks", "arms", "seeds", "dual_projection")
"""Keys of ``train`` that say which cells there are."""
SETTINGS_OF_ARMS: Mapping[ArmName, frozenset[str]] = {
    "mixed": frozenset({"mix_ratio"}),
    "texts": frozenset({"text_noise", "text_memory", "retrieval_noise"}),
}
"""Keys of ``train`` that matter to one arm alone."""
_OF_LM = frozenset({"lm", "lm_revision"})
_OF_CAPTIONER = _OF_LM | {"compile", "caption_tokens", "tune_lm", "prefix_length", "mapping", "text_noise"}

TASKS: Mapping[TaskName, Task] = {
    "clip-text": Task(build=_clip_text, arms=_EMBEDDED | {"none"}, shared=True, settings=frozenset({"compile"})),
    "long-clip": Task(
        build=_long_clip,
        arms=_EMBEDDED | {"none"},
        shared=True,
        settings=frozenset(
            {"context_length", "keep_positions", "short_weight", "short_texts", "coarse_components"}
            | {"positions", "distil_share", "compile"},
        ),
    ),
    "clip": Task(
        build=_clip,
        arms=_PIXELS,
        image_encoder="own",
        shared=True,
        settings=frozenset({"architecture", "vocabulary", "augment", "patch_dropout", "class_weight", "compile"}),
    ),
    "clipcap": Task(
        build=_clipcap,
        arms=_EMBEDDED | {"texts"},
        dual=True,
        shared=True,
        settings=_OF_CAPTIONER | {"text_memory"},
    ),
    "ifcap": Task(
        build=_ifcap,
        arms=_EMBEDDED | {"texts"},
        shared=True,
        settings=_OF_CAPTIONER
        | {"caption_memory", "retrieved_captions", "retrieval_noise", "filtered_captions", "word_drop"},
    ),
    "sitta": Task(
        build=_sitta,
        arms=_EMBEDDED,
        fitted=True,
        settings=_OF_LM | {"linear_map", "retrieved_tokens", "token_orders"},
    ),
    "llava": Task(
        build=_llava,
        arms=_EMBEDDED,
        dual=True,
        shared=True,
        settings=_OF_LM
        | {"visual", "visual_grid", "pretrain_share", "conversations", "prompt", "conversation_tokens"}
        | {"caption_tokens", "instruct_lr", "lora_rank", "lora_alpha", "compile"},
    ),
    "linear-probe": Task(build=_linear_probe, arms=_EMBEDDED | {"none"}, dual=True, settings=frozenset({"shots"})),
    "autoencoder": Task(build=_autoencoder, arms=_PIXELS, needs_clip=False, settings=frozenset({"image_size"})),
    "latent-diffusion": Task(build=_latent_diffusion, arms=_PIXELS, settings=frozenset({"image_size", "autoencoder"})),
    "causal-lm": Task(build=_causal_lm, arms=frozenset({"real"})),
}


def recipe_of(cell: Cell, profile: Profile) -> Recipe:
    """How a cell is trained."""
    from gmail_cli.components.loop import Recipe, seed_from

    train = profile.train
    first, second, in_two = train.steps, train.lr, False
    if cell.task == "llava":
        first, second, in_two = round(train.pretrain_share * train.steps), train.instruct_lr or train.lr, True
    elif cell.task == "long-clip" and train.positions == "rotary":
        first, in_two = round(train.distil_share * train.steps), True
    return Recipe(
        steps=train.steps,
        batch_size=train.batch_size,
        lr=train.lr if first else second,
        restart=first if in_two else 0,
        restart_lr=second,
        weight_decay=train.weight_decay,
        schedule=train.schedule,
        cycles=train.cycles,
        warmup=train.warmup,
        clip_norm=train.clip_norm or None,
        ema=train.ema or None,
        seed=seed_from("train", profile.seed, cell.seed),
    )


def steps_of(cell: Cell, profile: Profile) -> int:
    """Optimiser steps of a cell."""
    return 0 if cell.arm == "none" or TASKS[cell.task].fitted else profile.train.steps


def reads_aligned(cell: Cell) -> bool:
    """Whether a cell needs f_g."""
    return cell.arm == "generated-aligned" or (cell.arm == "mixed" and "generated-aligned" in TASKS[cell.task].arms)


def architecture(ref: str) -> dict[str, Any]:
    """The open_clip config that ``train.architecture`` names."""
    if ref.endswith(".json"):
        path = Path(ref) if Path(ref).is_file() else profile_folder() / ref
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"train.architecture = {ref!r} cannot be read: {error}") from error
        if not isinstance(config, dict) or "model_cfg" not in config:
            raise InputError(f"{ref} has no model_cfg", hint="Write it like an open_clip_config.json.")
        return {"preprocess_cfg": {}, **config}
    import open_clip

    found = open_clip.get_model_config(ref)
    if found is None:
        raise UsageError(
            f"train.architecture = {ref!r} is no model that open_clip knows",
            hint="Give the path of a JSON file, or a name such as ViT-B-32.",
        )
    return {"model_cfg": found, "preprocess_cfg": {}}
