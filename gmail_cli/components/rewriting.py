"""Captions rewritten as prompts by a local causal language model.

A generator that is told more than a short caption, or tells it in other words, draws more varied images: language
enhancement (He et al. 2023, section 3.2) and prompts that a language model writes.

What is written for a caption does not depend on what is written beside it. Every batch the network sees has the same
number of rows, a row is padded to a length that its own prompt determines, and each sampled text draws from a
`torch.Generator` of its own on the CPU: the rule of `diffusion`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from gmail_cli.components.conversations import rendered, turn_end
from gmail_cli.components.heads import generate, load_lm
from gmail_cli.errors import UsageError

LIKELIEST = 50
"""Tokens among which one is drawn at a temperature above 0."""
LENGTH_STEP = 32
"""Prompts are padded to a multiple of so many tokens, by one token at least: without any padding in a batch attention
takes another path, whose last bits are others."""
THOUGHT = ("<think>", "</think>")
"""Between these a model thinks aloud before it answers."""
PHRASE, REPEATS = 4, 3
"""A text that says the same so many words so many times runs in circles."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A prompt to write.

    Attributes:
        caption_id: Identity of the caption; part of the seed.
        caption: Its text.
        k: Which of the caption's images it is for, from 0; part of the seed.
    """

    caption_id: str
    caption: str
    k: int = 0


class Rewriter:
    """Writes prompts from captions.

    A tokenizer's chat template is used where it has one, and the whole answer is taken. Where it has none the model
    goes on from the instruction, and what it writes up to the end of the line is taken.

    Args:
        lm: transformers' causal language model, in eval mode.
        tokenizer: Its tokenizer.
        name: Of the model, for messages.
        instruction: What it is told; ``{}`` stands for the caption.
        max_tokens: Most tokens of a text.
        temperature: Logits are divided by it and one of the `LIKELIEST` is drawn; 0 takes the likeliest token.
        batch_size: Rows in every call of the model, padded when fewer remain.
        seed: Part of every text's seed.

    Raises:
        UsageError: Instruction and text do not fit what the model reads, or its chat template fails.
    """

    def __init__(
        self,
        lm: Any,
        tokenizer: Any,
        *,
        name: str,
        instruction: str,
        max_tokens: int,
        temperature: float = 0.0,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        self._lm, self._tokenizer, self._name = lm, tokenizer, name
        self._instruction, self._max_tokens, self._temperature = instruction, max_tokens, temperature
        self._batch_size, self._seed = batch_size, seed
        ends = getattr(lm.generation_config, "eos_token_id", None)
        known = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
        self._room = int(getattr(lm.config.get_text_config(), "max_position_embeddings", 2048)) - max_tokens
        asked = len(self._ask(""))
        if asked >= self._room:
            raise UsageError(
                f"generate.rewrite: the instruction has {asked} tokens and max_tokens = {max_tokens}, and {name} reads "
                f"{self._room + max_tokens} in all",
                hint="Set generate.rewrite.max_tokens lower, shorten the instruction, or take another language model.",
            )
        if tokenizer.chat_template and tokenizer.eos_token:
            known.append(tokenizer.convert_tokens_to_ids(turn_end(tokenizer)))
        self._stops = sorted({int(each) for each in known if each is not None})

    def write(self, wanted: Sequence[Wanted]) -> Iterator[list[tuple[int, str | None]]]:
        """Write prompts, batch by batch; those of like length together.

        Yields:
            (row of ``wanted``, text) of each prompt of a batch. None where the caption does not fit what the model
            reads, or the model wrote nothing that `usable` lets through.
        """
        alike: dict[int, list[tuple[int, list[int]]]] = {}
        unread: list[tuple[int, str | None]] = []
        for row, each in enumerate(wanted):
            ids = self._ask(each.caption)
            if len(ids) >= self._room:
                unread.append((row, None))
                continue
            length = min(LENGTH_STEP * (len(ids) // LENGTH_STEP + 1), self._room)
            alike.setdefault(length, []).append((row, ids))
        if unread:
            yield unread
        for length, rows in sorted(alike.items()):
            for start in range(0, len(rows), self._batch_size):
                batch = rows[start : start + self._batch_size]
                texts = self._batch([ids for _, ids in batch], [wanted[row] for row, _ in batch], length=length)
                yield [(row, text) for (row, _), text in zip(batch, texts, strict=True)]

    def _ask(self, caption: str) -> list[int]:
        """Ids of what the model is told, up to where its text begins."""
        chat = bool(self._tokenizer.chat_template)
        return list(self._tokenizer(self._told(caption), add_special_tokens=not chat)["input_ids"])

    def _told(self, caption: str) -> str:
        """What the model is told."""
        text = self._instruction.replace("{}", caption)
        if not self._tokenizer.chat_template:
            return text
        try:
            asked = rendered(self._tokenizer, [text], ask=True)
        except Exception as error:
            raise UsageError(f"the chat template of {self._name} fails: {error}") from error
        return asked

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[list[int]], wanted: Sequence[Wanted], *, length: int) -> list[str | None]:
        pad = self._stops[0] if self._stops else 0
        spare = self._batch_size - len(prompts)
        full = [*prompts, *[prompts[-1]] * spare]
        ids = torch.tensor([[pad] * (length - len(own)) + own for own in full], device=self._lm.device)
        seen = torch.tensor([[0] * (length - len(own)) + [1] * len(own) for own in full], device=self._lm.device)
        seeds = [_seed(each, seed=self._seed) for each in [*wanted, *[wanted[-1]] * spare]]
        written = generate(
            self._lm,
            input_ids=ids,
            attention_mask=seen,
            max_new_tokens=self._max_tokens,
            num_beams=1,
            logits_processor=[_Draw(seeds, temperature=self._temperature)] if self._temperature else [],
            eos_token_id=self._stops or None,
            pad_token_id=pad,
        )[: len(prompts), length:]
        rows = [list(itertools.takewhile(lambda token: token not in self._stops, row)) for row in written.tolist()]
        texts = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        ended = [len(row) < written.shape[1] for row in rows]
        chat = bool(self._tokenizer.chat_template)
        if chat and self._told("").rstrip().endswith(THOUGHT[0]):  # begun by the template
            texts = [THOUGHT[0] + text for text in texts]
        return [usable(text, chat=chat, ended=whole) for text, whole in zip(texts, ended, strict=True)]


class _Draw(LogitsProcessor):
    """Leaves one token of each row, drawn by the row's own generator: one number of it a token."""

    def __init__(self, seeds: Sequence[int], *, temperature: float) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = temperature

    def __call__(
        self, input_ids: Int[Tensor, "batch length"], scores: Float[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens"]:
        best, tokens = scores.topk(min(LIKELIEST, scores.shape[1]), dim=1)
        shares = (best.double().cpu() / self._temperature).softmax(dim=1).cumsum(dim=1)
        drawn = torch.stack([torch.rand(1, generator=each, dtype=torch.float64) for each in self._generators])
        place = (shares < drawn).sum(dim=1, keepdim=True).clamp(max=shares.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.gather(1, place.to(tokens.device)), 0.0)


def usable(text: str, *, chat: bool, ended: bool) -> str | None:
    """What a model wrote, as one line; None where it says nothing or runs in circles.

    Args:
        text: As it was decoded.
        chat: It is an answer: thoughts before it, a first line that only announces the rest and quotation marks
            around it are left out; thoughts that do not end are no answer. Otherwise only the first line counts.
        ended: The model came to an end by itself; if not, a sentence that was cut off is left out, where there is a
            whole one before it.
    """
    if chat and text.lstrip().startswith(THOUGHT[0]):
        text = text.partition(THOUGHT[1])[2]
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not chat:
        ended, lines = ended or len(lines) > 1, lines[:1]
    elif len(lines) > 1 and lines[0].endswith(":"):
        lines = lines[1:]
    told = " ".join(" ".join(lines).split())
    if not ended and (whole := re.match(r".*[.!?](?=\s)", told)):
        told = whole[0]
    if chat and len(told) > 1 and told[0] + told[-1] in ('""', "''", "“”"):
        told = told[1:-1].strip()
    words = re.findall(r"\w+", told.lower())
    phrases = Counter(tuple(words[at : at + PHRASE]) for at in range(len(words) - PHRASE + 1))
    circles = max(phrases.values(), default=0) >= REPEATS
    return None if circles or not any(map(str.isalpha, told)) else told


def load_rewriter(
    ref: str, *, revision: str = "", dtype: str = "float32", device: str = "cpu", **settings: Any
) -> Rewriter:
    """A language model, ready to write.

    Args:
        ref: ``tiny`` (shipped), a folder in transformers format, or a hub id.
        revision: Commit of a hub model.
        dtype: Name of a torch dtype.
        device: Name of a torch device.
        settings: Of `Rewriter`.

    Raises:
        SetupError: The model can be neither found nor fetched.
        UsageError: As `Rewriter`; or a dtype that does not suit the device.
    """
    if dtype == "float16" and torch.device(device).type == "cpu":
        raise UsageError("generate.rewrite.dtype = 'float16' does not run on a CPU", hint="Set it to 'float32'.")
    lm, tokenizer = load_lm(ref, revision=revision, dtype=getattr(torch, dtype), key="generate.rewrite.lm")
    return Rewriter(lm.to(device), tokenizer, name=ref, **settings)


def _seed(wanted: Wanted, *, seed: int) -> int:
    """The first 32 bits of SHA-256 over (seed, caption id, caption, k)."""
    identity = json.dumps(["rewrite", seed, wanted.caption_id, wanted.caption, wanted.k], ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:4], "big")
