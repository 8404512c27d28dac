"""A LLaVA-style model: a frozen image tower, a two-layer projector and a causal language model with LoRA.

Liu et al. 2023 (two stages) and 2024 (the projector of two layers). First the projector alone learns from captions;
then projector and LoRA of the language model learn from conversations. With dual projection each flow has a projector
of its own (paper, "Dual projection"); inference on real images uses the real one.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from gmail_cli.components import compilation, parallel
from gmail_cli.components.arms import Arm, Meeting, View
from gmail_cli.components.conversations import (
    IGNORED,
    IMAGE,
    IMAGE_ID,
    Chat,
    Conversation,
    owner_of,
    refuse,
    shown,
)
from gmail_cli.components.heads import embedding_scale, generate, load_lm, ridge_to
from gmail_cli.components.loop import Job, Recipe, batch_indices, seed_from
from gmail_cli.components.pairs import Pairs
from gmail_cli.components.questions import QuestionSet
from gmail_cli.components.tasks import quick_attention
from gmail_cli.components.tuning import load_peft, save_peft
from gmail_cli.errors import InputError

CONFIG_FILE = "llava.json"
WEIGHTS_FILE = "projector.safetensors"
ADAPTER_FOLDER = "adapter"
MEANS_AT_ONCE = 512
"""Images whose tokens are averaged together, for dual projection."""


class Projector(nn.Module):
    """Two linear layers with a GELU between them (Liu et al. 2024, "mlp2x_gelu").

    The outputs start at the size of the language model's token embeddings.
    """

    def __init__(self, dim: int, width: int, *, scale: Float[Tensor, ""]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(dim, width), nn.Linear(width, width)
        self.register_buffer("scale", scale)

    def forward(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens width"]:
        return self.last(functional.gelu(self.first(tokens))) * self.scale


def normalised(tokens: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """Tokens with a root mean square of one, whatever tower they come from."""
    return functional.rms_norm(tokens.float(), tokens.shape[-1:], eps=1e-6)


class Llava(nn.Module):
    """Image tokens, projected, among the token embeddings of a language model.

    Args:
        dim: Width of an image token.
        lm: transformers' causal language model.
        tokenizer: Its tokenizer.
        about: What else a reader of the saved model has to know: ``lm``, ``lm_revision``, ``image_tokens``, ``visual``,
            ``visual_grid``, ``encoder`` (digest of f_r), ``prompt``, ``instructed``.
        dual: A projector for each flow.
        lora_rank: Rank of the language model's update; 0 leaves it as it is.
        lora_alpha: The update is scaled by ``lora_alpha / lora_rank``.
    """

    def __init__(
        self,
        dim: int,
        *,
        lm: Any,
        tokenizer: Any,
        about: dict[str, Any],
        dual: bool = False,
        lora_rank: int = 0,
        lora_alpha: float = 0.0,
    ) -> None:
        super().__init__()
        embeddings = lm.get_input_embeddings()
        scale = embedding_scale(lm)
        self.dim, self.about, self.tokenizer = dim, about, tokenizer
        self.real = Projector(dim, embeddings.embedding_dim, scale=scale)
        self.generated = copy.deepcopy(self.real) if dual else None
        self.lm = lm.requires_grad_(False)
        self.adapted = lora_rank > 0
        if self.adapted:
            self.lm = _with_lora(lm, rank=lora_rank, alpha=lora_alpha)

    @property
    def context(self) -> int:
        """Most tokens the language model reads."""
        return int(getattr(self.lm.config, "max_position_embeddings", 2048))

    def chat(self, *, limit: int) -> Chat:
        """How the language model is spoken to, in at most ``limit`` tokens."""
        return Chat(
            self.tokenizer,
            name=self.about["lm"],
            image_tokens=self.about["image_tokens"],
            limit=min(limit, self.context),
        )

    def project(
        self, tokens: Float[Tensor, "batch tokens dim"], real: Bool[Tensor, " batch"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Image tokens as the language model reads them, through the projector of their flow."""
        tokens = normalised(tokens)
        if self.generated is None or bool(real.all()):
            return self.real(tokens)
        if not bool(real.any()):
            return self.generated(tokens)
        return torch.where(real[:, None, None], self.real(tokens), self.generated(tokens))

    def embed(
        self,
        ids: Int[Tensor, "batch length"],
        tokens: Float[Tensor, "images tokens dim"],
        real: Bool[Tensor, " images"],
    ) -> Float[Tensor, "batch length width"]:
        """Token embeddings with the projected image tokens in their places, row by row."""
        embedded = self.lm.get_input_embeddings()(ids.clamp(min=0))
        places = ids == IMAGE_ID
        if not bool(places.any()):
            return embedded
        projected = self.project(tokens, real).to(embedded.dtype)
        return embedded.masked_scatter(places[..., None], projected)

    def forward(
        self,
        ids: Int[Tensor, "batch length"],
        labels: Int[Tensor, "batch length"],
        tokens: Float[Tensor, "images tokens dim"],
        real: Bool[Tensor, " images"],
        lengths: Int[Tensor, " batch"],
        *,
        adapted: bool = True,
    ) -> Tensor:
        """Mean cross-entropy over the supervised tokens.

        Args:
            ids: Token ids, `IMAGE_ID` where an image token goes; padded at the end.
            labels: The same ids where they are supervised, else `IGNORED`.
            tokens: Of the images, in the order of the rows that have one.
            real: Their flow.
            lengths: Of the rows, without padding.
            adapted: Whether the language model's update takes part.
        """
        told = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().flatten()
        assert len(told), "no supervised token in the batch"
        ids = compilation.lengthened(ids, model=self.lm, value=0, most=self.context)
        seen = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        plain = self.lm.disable_adapter() if self.adapted and not adapted else contextlib.nullcontext()
        with plain, quick_attention(ids.device):
            logits = self.lm(
                inputs_embeds=self.embed(ids, tokens, real),
                attention_mask=seen.long(),
                logits_to_keep=told,
                use_cache=False,
            ).logits
        return functional.cross_entropy(
            logits.flatten(0, 1).float(), labels[:, told + 1].flatten(), ignore_index=IGNORED
        )

    def config(self) -> dict[str, Any]:
        """What `load_llava` needs beside the weights."""
        return {
            "head": "llava",
            "dim": self.dim,
            "dual": self.generated is not None,
            "adapted": self.adapted,
            **self.about,
        }


def _with_lora(lm: Any, *, rank: int, alpha: float) -> Any:
    """LoRA on every linear layer of a language model but its output layer."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    transposed = any(isinstance(module, Conv1D) for module in lm.modules())
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", fan_in_fan_out=transposed, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that goes out of use
        return get_peft_model(lm, config)


# -- training ----------------------------------------------------------------------------------------------------


class _Rows:
    """Sequences of token ids and labels, kept flat and padded a batch at a time.

    Attributes:
        told: How many tokens of each are supervised.
    """

    def __init__(self, sequences: Sequence[tuple[list[int], list[int]]], *, pad: int) -> None:
        lengths = [len(ids) for ids, _ in sequences]
        self.stops = np.cumsum([0, *lengths])
        self.flat = torch.tensor(
            [[i for ids, _ in sequences for i in ids], [i for _, labels in sequences for i in labels]],
            dtype=torch.int32,
        )
        self.pad = pad
        self.told = np.array([sum(label != IGNORED for label in labels) for _, labels in sequences])

    def __len__(self) -> int:
        return len(self.stops) - 1

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, labels and lengths of some rows."""
        lengths = torch.tensor([int(self.stops[row + 1] - self.stops[row]) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), self.pad)
        labels = torch.full_like(ids, IGNORED)
        for place, row in enumerate(rows):
            start, stop = int(self.stops[row]), int(self.stops[row + 1])
            ids[place, : stop - start], labels[place, : stop - start] = self.flat[:, start:stop].long()
        return ids, labels, lengths


def llava_job(
    model: Llava,
    pairs: Pairs,
    arm: Arm,
    *,
    real: Arm | None,
    conversations: Sequence[Conversation],
    recipe: Recipe,
    caption_tokens: int,
    conversation_tokens: int,
) -> Job:
    """Train projector and language model: captions up to step ``recipe.restart``, conversations after it.

    Args:
        model: Trained in place.
        pairs: The captions.
        arm: Image tokens (images, tokens, dim), or embeddings (images, dim), each of which is one token.
        real: Those of real images, for dual projection where the arm shows none.
        conversations: Their images are those of ``pairs``' records (see `covered`).
        recipe: How the loop will train; ``restart`` steps make the first stage.
        caption_tokens: Longer captions are cut.
        conversation_tokens: Longer conversations are cut, image tokens included.

    Raises:
        InputError: A sequence without a supervised token.
    """
    chat = model.chat(limit=conversation_tokens)
    stages: list[_Rows] = []
    if recipe.restart:
        stages.append(_Rows([chat.caption(text, limit=caption_tokens) for text in pairs.texts], pad=chat.end))
    if recipe.restart < recipe.steps:
        stages.append(_Rows([chat.tokens(each) for each in conversations], pad=chat.end))
    of_record: dict[str, list[int]] = {}
    for row, record in enumerate(pairs.records):
        of_record.setdefault(record, []).append(row)
    seen_with = [None if each.image is None else of_record[each.image] for each in conversations]
    _train_projectors(model, arm)

    def rows(step: int) -> np.ndarray:
        first = step < recipe.restart
        count, done = (len(stages[0]), 0) if first else (len(stages[-1]), recipe.restart)
        seed = seed_from("captions" if first else "conversations", recipe.seed)
        return batch_indices(count, recipe.batch_size, seed=seed, step=step - done)

    def loss(indices: Tensor, step: int) -> Tensor:
        first, chosen = step < recipe.restart, indices.tolist()
        share = parallel.ranks().share(len(chosen))
        stage = stages[0 if first else -1]
        ids, labels, lengths = stage.batch(chosen[share])
        weight = int(stage.told[chosen[share]].sum()) / int(stage.told[chosen].sum())
        captions, seen = indices, share
        if not first:
            choices = [seen_with[row] for row in chosen]
            draws = torch.rand(len(choices), dtype=torch.float64).tolist()
            captions = torch.tensor(
                [found[int(draw * len(found))] for found, draw in zip(choices, draws, strict=True) if found],
                dtype=torch.long,
            )
            seen = slice(*(sum(found is not None for found in choices[:stop]) for stop in (share.start, share.stop)))
        tokens, flow = arm.draw(captions) if len(captions) else (torch.empty(0, 1, model.dim), torch.ones(0).bool())
        tokens = tokens[:, None] if tokens.ndim == 2 else tokens
        device = model.real.first.weight.device
        moved = [each.to(device) for each in (ids, labels, tokens[seen], flow[seen], lengths)]
        return parallel.add(model(*moved, adapted=not first) * weight)

    def export(folder: Path) -> None:
        if model.generated is not None and True not in arm.flows:
            assert real is not None, "an arm without real images needs real ones to meet"
            meet(model, real, arm, pairs)
        save_llava(model, folder)

    return Job(module=model, loss=loss, rows=rows, export=export)


def _train_projectors(model: Llava, arm: Arm) -> None:
    """With dual projection, only the projectors of the flows that the arm shows are trained."""
    if model.generated is not None:
        model.real.requires_grad_(True in arm.flows)
        model.generated.requires_grad_(False in arm.flows)


@torch.no_grad()
def meet(model: Llava, real: Arm, generated: Arm, pairs: Pairs) -> None:
    """Make the real projector of a model that saw generated images only.

    It is the trained projector of generated images behind a linear map that brings real images to generated ones: ridge
    regression, towards the identity, of the mean tokens of one real and one generated image of every caption. The map
    is folded into the first layer.
    """
    assert model.generated is not None, "only for dual projection"
    device = model.real.first.weight.device
    means = [_means(arm.views[0], device=device) for arm in (real, generated)]
    found = Meeting.of(means[0], means[1], pairs)
    weight, bias = ridge_to(found.real.to(device), found.generated.to(device))
    first = model.generated.first
    model.real.load_state_dict(model.generated.state_dict())
    model.real.first.weight.add_(first.weight @ weight)
    model.real.first.bias.add_(first.weight @ bias)


def _means(view: View, *, device: torch.device) -> View:
    """The mean of each image's tokens as a projector reads them."""
    parts = []
    for start in range(0, len(view.values), MEANS_AT_ONCE):
        tokens = normalised(view.values[start : start + MEANS_AT_ONCE].to(device))
        parts.append(tokens if tokens.ndim == 2 else tokens.mean(dim=1))
    return View(torch.cat(parts), view.candidates, real=view.real)


def covered(
    conversations: Sequence[Conversation], pairs: Pairs, *, on_bad: Literal["fail", "skip"]
) -> tuple[Conversation, ...]:
    """The conversations, each with the id of its image record in place of a file name.

    Raises:
        InputError: Some speak of images that are not trained on, and ``on_bad`` is ``fail``; or none is left.
    """
    known = set(pairs.records)
    found, bad = [], []
    for each in conversations:
        owner = None if each.image is None else owner_of(each.image, known=known)
        if each.image is not None and owner is None:
            bad.append(f"{each.id}: image {each.image!r} is none of the {len(known):,} that are trained on")
        else:
            found.append(replace(each, image=owner))
    refuse(bad, what="conversations", on_bad=on_bad)
    if not found:
        raise InputError("no conversation is about an image that is trained on", hint="Check train.conversations.")
    return tuple(found)


def captions_as_conversations(pairs: Pairs, *, prompt: str) -> tuple[Conversation, ...]:
    """For each caption the conversation in which it answers ``prompt``."""
    return tuple(
        Conversation(id=text[:60], image=record, turns=(shown(prompt), text))
        for text, record in zip(pairs.texts, pairs.records, strict=True)
    )


# -- answers -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def answer(
    model: Llava,
    prompts: Sequence[Sequence[int]],
    tokens: Float[Tensor, "images tokens dim"],
    *,
    beams: int = 1,
    max_tokens: int = 32,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """What the model writes after each prompt up to the end of its turn, by greedy or beam search.

    Args:
        model: In eval mode.
        prompts: Token ids (`Chat.question`, `Chat.image`).
        tokens: Image tokens of real images through f_r, for the prompts that have an image, in order.
        beams: 1 is greedy.
        max_tokens: Most tokens of an answer.
        batch_size: Prompts at once.
        progress: Called with (done, prompts).
    """
    device, end = model.real.first.weight.device, int(model.tokenizer.eos_token_id)
    ends = getattr(model.lm.generation_config, "eos_token_id", None) or []
    stops = sorted({end, model.chat(limit=model.context).turn_end, *([ends] if isinstance(ends, int) else ends)})
    texts: list[str] = []
    used = 0
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        length = max(map(len, rows))
        ids = torch.tensor([[end] * (length - len(row)) + list(row) for row in rows], device=device)
        seen = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
        images = sum(IMAGE_ID in row for row in rows)
        batch = tokens[used : used + images].to(device)
        used += images
        written = generate(
            model.lm,
            inputs_embeds=model.embed(ids, batch, torch.ones(images, dtype=torch.bool, device=device)),
            attention_mask=seen,
            max_new_tokens=max(1, min(max_tokens, model.context - length)),
            num_beams=beams,
            eos_token_id=stops,
            pad_token_id=end,
        )
        said = [list(itertools.takewhile(lambda token: token not in stops, row)) for row in written.tolist()]
        texts += [text.strip() for text in model.tokenizer.batch_decode(said, skip_special_tokens=True)]
        if progress:
            progress(len(texts), len(prompts))
    return texts


def answer_questions(
    model: Llava,
    asked: QuestionSet,
    *,
    see: Callable[[Sequence[bytes]], Float[Tensor, "images tokens dim"]],
    max_tokens: int = 64,
    batch_size: int = 32,
) -> dict[str, str]:
    """What the model writes for each question, greedily, by the question's id; nothing where none is put to it.

    Args:
        model: In eval mode.
        asked: The questions; see `QuestionSet.prompt` for what is asked.
        see: Image tokens of encoded images, as the model learned to see real ones.
        max_tokens: Most tokens of an answer.
        batch_size: Questions at once.

    Raises:
        InputError: A question without text, one that is longer than the language model reads, an image that cannot
            be read, or a model that learned no conversations.
    """
    if not model.about["instructed"]:
        hint = "Train it with train.pretrain_share below 1."
        raise InputError("a LLaVA model that learned captions alone cannot be asked", hint=hint)
    chat = model.chat(limit=model.context)
    prompts: dict[str, list[int]] = {}
    for question in asked.questions:
        text = asked.prompt(question)
        if text is None:
            continue
        text = text.replace(IMAGE, "").strip()
        ids = chat.question([text if question.image is None else shown(text)])
        if len(ids) >= model.context:
            raise InputError(
                f"question {question.id} has {len(ids)} tokens, and {model.about['lm']} reads {model.context}",
                hint="Take a language model with a longer context, or fewer image tokens (train.visual_grid).",
            )
        prompts[question.id] = ids
    put = [question for question in asked.questions if question.id in prompts]
    found = dict.fromkeys((question.id for question in asked.questions), "")
    for start in range(0, len(put), batch_size):
        some = put[start : start + batch_size]
        images = [question.image() for question in some if question.image is not None]
        tokens = see(images) if images else torch.empty(0, 1, model.dim)
        texts = answer(model, [prompts[each.id] for each in some], tokens, max_tokens=max_tokens, batch_size=batch_size)
        found |= {question.id: text for question, text in zip(some, texts, strict=True)}
    return found


def caption_prompt(model: Llava) -> list[int]:
    """The prompt that asks for a caption, as the model learned to be asked."""
    chat = model.chat(limit=model.context)
    if not model.about["instructed"]:
        return chat.image()
    return chat.question([shown(model.about["prompt"])])


# -- files -------------------------------------------------------------------------------------------------------


def save_llava(model: Llava, folder: Path) -> None:
    """Write projectors and adapter into an existing folder; ``adapter/`` loads in plain peft."""
    (folder / CONFIG_FILE).write_text(json.dumps(model.config(), indent=1, sort_keys=True), encoding="utf-8")
    tensors = {name: t.detach().cpu() for name, t in model.state_dict().items() if not name.startswith("lm.")}
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    if model.adapted:
        (folder / ADAPTER_FOLDER).mkdir()
        save_peft(model.lm, folder / ADAPTER_FOLDER, base=model.about["lm"])


def load_llava(folder: Path, *, device: str | torch.device = "cpu") -> Llava:
    """A model saved by `save_llava`, in eval mode.

    Raises:
        InputError: The folder holds none, or not one of this language model.
        SetupError: Its language model cannot be loaded.
    """
    hint = "Give a cell of task llava of a train artifact."
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
        about = {name: value for name, value in config.items() if name not in ("head", "dim", "dual", "adapted")}
        lm, tokenizer = load_lm(about["lm"], revision=about["lm_revision"])
        model = Llava(config["dim"], lm=lm, tokenizer=tokenizer, about=about, dual=config["dual"])
        missing = model.load_state_dict(tensors, strict=False)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} holds no LLaVA model: {error}", hint=hint) from error
    absent = [name for name in missing.missing_keys if not name.startswith("lm.")]
    if absent or missing.unexpected_keys:
        raise InputError(f"{folder / WEIGHTS_FILE} does not fit at {[*absent, *missing.unexpected_keys][0]}", hint=hint)
    if config["adapted"]:
        model.lm, model.adapted = load_peft(lm, folder / ADAPTER_FOLDER, name=about["lm"], hint=hint), True
    return model.to(device).eval()
