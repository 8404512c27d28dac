"""A prefix captioner that also reads captions found in a memory (IFCap, Lee et al. 2024).

What an embedding is nearest to among the training captions comes in twice: their embeddings are fused into the prefix
by cross-attention, and the words that several of them share stand in front of the caption as a sentence. Trained on
texts, a text looks for captions from where an image would stand: with noise (image-like retrieval), and never finds
itself.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from gmail_cli.components import parallel
from gmail_cli.components.arms import Arm
from gmail_cli.components.heads import (
    CONFIG_FILE,
    IGNORED,
    LM_FOLDER,
    WEIGHTS_FILE,
    Captioner,
    load_lm,
    load_weights,
    save_head,
)
from gmail_cli.components.loop import Job
from gmail_cli.components.pairs import Pairs
from gmail_cli.components.sitta import content_words
from gmail_cli.components.tasks import first_of_each
from gmail_cli.errors import InputError

CAPTIONS_FILE = "captions.json"
SENTENCE = "There are {} in image."
NOTHING = "something"
"""What the sentence names where no word is shared."""


class RetrievalCaptioner(Captioner):
    """A `Captioner` with a memory of captions.

    Attributes:
        captions: Texts of the memory.
        vectors: Their unit embeddings by f_r's text tower.
        fusion: Attention of an embedding to those of the captions found for it; starts by adding nothing.
    """

    vectors: Float[Tensor, "captions dim"]

    def __init__(
        self,
        dim: int,
        *,
        captions: Sequence[str],
        vectors: Float[Tensor, "captions dim"],
        retrieved: int = 5,
        filtered: int = 9,
        lm_revision: str = "",
        **options: Any,
    ) -> None:
        super().__init__(dim, **options)
        self.captions, self.lm_revision = tuple(captions), lm_revision
        self.retrieved, self.filtered = retrieved, filtered
        heads = max(heads for heads in (8, 4, 2, 1) if dim % heads == 0)
        self.fusion = nn.MultiheadAttention(dim, heads, batch_first=True)
        nn.init.zeros_(self.fusion.out_proj.weight)
        self.register_buffer("vectors", vectors)

    def retrieve(
        self, features: Float[Tensor, "batch dim"], *, count: int, but: Int[Tensor, " batch"] | None = None
    ) -> Int64[Tensor, "batch found"]:
        """Rows of the nearest captions of the memory, nearest first; never the row ``but``, where it is in the memory.

        There are fewer than ``count`` where the memory has no more.
        """
        likeness = functional.normalize(features.float(), dim=-1) @ self.vectors.T
        if but is not None:
            inside = (but < len(self.vectors)).nonzero().flatten()
            likeness[inside, but[inside]] = -torch.inf
        left = len(self.vectors) - (but is not None)
        return likeness.topk(min(count, left), dim=1).indices

    def prefix(
        self,
        features: Float[Tensor, "batch dim"],
        real: Bool[Tensor, " batch"],
        found: Int64[Tensor, "batch found"] | None = None,
    ) -> Float[Tensor, "batch prefix width"]:
        """Prefix embeddings, of the embedding fused with the captions ``found`` for it (None looks for them)."""
        unit = self.project(features, real)
        there = self.vectors[self.retrieve(unit, count=self.retrieved) if found is None else found]
        fused = unit + self.fusion(unit[:, None], there, there, need_weights=False)[0][:, 0]
        mapped = self.mapping(fused * self.dim**0.5)
        return mapped.unflatten(-1, (self.prefix_length, -1)) * self.scale

    def shared_words(self, features: Float[Tensor, "images dim"]) -> list[list[str]]:
        """For each image the words that stand out among its nearest captions, the most frequent first.

        A word stands out where it comes more often than the mean of all words by more than a standard deviation
        (IFCap's adaptive threshold).
        """
        return [
            standing_out([self.captions[row] for row in rows])
            for rows in self.retrieve(features, count=self.filtered).tolist()
        ]

    def sentences(self, words: Sequence[Sequence[str]]) -> list[list[int]]:
        """Tokens of the sentence that names these words."""
        texts = [SENTENCE.format(", ".join(own) or NOTHING) for own in words]
        rows: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return rows

    def config(self) -> dict[str, Any]:
        """What `load_retrieval_captioner` needs beside the weights and the captions."""
        own = {"head": "ifcap", "retrieved": self.retrieved, "filtered": self.filtered, "lm_revision": self.lm_revision}
        return {**super().config(), **own}


def standing_out(texts: Sequence[str]) -> list[str]:
    """The content words that come in more of the texts than the mean by more than a standard deviation."""
    counts = Counter(word for text in texts for word in content_words(text))
    if not counts:
        return []
    numbers = torch.tensor([*counts.values()], dtype=torch.float64)
    least = float(numbers.mean() + numbers.std(correction=0))
    return [word for word, count in counts.most_common() if count > least]


def ifcap_job(
    captioner: RetrievalCaptioner,
    pairs: Pairs,
    arm: Arm,
    *,
    caption_tokens: int,
    retrieval_noise: float = 0.0,
    word_drop: float = 0.4,
) -> Job:
    """Train mapping network and fusion (and the language model with ``tune_lm``).

    Args:
        captioner: Trained in place; row i of its memory is the text numbered i in ``pairs.text_ids``.
        pairs: The captions.
        arm: Embeddings of images, or of the captions themselves.
        caption_tokens: Longer captions are cut, keeping the end-of-text token.
        retrieval_noise: Standard deviation of the Gaussian noise with which captions are looked for.
        word_drop: Probability that the sentence leaves out a word of the caption.
    """
    device = captioner.vectors.device
    first = first_of_each(pairs.text_ids).tolist()
    table = captioner.tokenize([pairs.texts[row] for row in first], limit=caption_tokens)
    words = [content_words(pairs.texts[row]) for row in first]

    def loss(rows: Tensor, step: int) -> Tensor:
        features, real = arm.draw(rows)
        numbers, share = pairs.text_ids[rows], parallel.ranks().share(len(rows))
        noise = torch.randn(features.shape).to(features.device) if retrieval_noise else 0.0
        asked = features + retrieval_noise * noise
        named = [[word for word in words[number] if torch.rand(()) >= word_drop] for number in numbers.tolist()]
        answers = [row[row != IGNORED] for row in table[numbers]]
        found = captioner.retrieve(asked[share].to(device), count=captioner.retrieved, but=numbers[share].to(device))
        inputs, wanted = behind(captioner.sentences(named[share]), answers[share], context=captioner.context)
        prefix = captioner.prefix(features[share].to(device), real[share].to(device), found)
        mean = captioner.loss_behind(prefix, inputs.to(device), wanted.to(device))
        return parallel.add(mean * (sum(map(len, answers[share])) / sum(map(len, answers))))

    def export(folder: Path) -> None:
        save_retrieval_captioner(captioner, folder)

    return Job(module=captioner, loss=loss, rows=len(pairs), export=export)


def behind(
    sentences: Sequence[Sequence[int]], answers: Sequence[Int64[Tensor, " length"]], *, context: int
) -> tuple[Int64[Tensor, "batch length"], Int64[Tensor, "batch length"]]:
    """Each answer behind its sentence, padded with `IGNORED`; and the same with the sentence `IGNORED` too.

    A sentence that leaves the answer no room within ``context`` is cut.
    """
    kept = [torch.tensor(own[: max(context - len(answer), 0)]) for own, answer in zip(sentences, answers, strict=True)]
    rows = [torch.cat([own.long(), answer]) for own, answer in zip(kept, answers, strict=True)]
    inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    wanted = inputs.clone()
    for row, own in zip(wanted, kept, strict=True):
        row[: len(own)] = IGNORED
    return inputs, wanted


@torch.inference_mode()
def write_captions(
    captioner: RetrievalCaptioner,
    features: Float[Tensor, "images dim"],
    *,
    beams: int = 1,
    max_tokens: int = 32,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Captions of real images from their embeddings; images whose sentences are of one length are read together.

    Args:
        captioner: In eval mode.
        features: Embeddings of f_r, on the captioner's device.
        beams: 1 is greedy.
        max_tokens: Most tokens of a caption.
        batch_size: Images at once.
        progress: Called with (done, images).
    """
    texts, done = [""] * len(features), 0
    sentences = [row[: captioner.context - 1] for row in captioner.sentences(captioner.shared_words(features))]
    lengths = torch.tensor([len(row) for row in sentences])
    for length in lengths.unique().tolist():
        for rows in (lengths == length).nonzero().flatten().split(batch_size):
            batch = features[rows.to(features.device)]
            prefix = captioner.prefix(batch, torch.ones(len(batch), dtype=torch.bool, device=batch.device))
            told = torch.tensor([sentences[row] for row in rows.tolist()], device=batch.device)
            inputs = torch.cat([prefix, captioner.lm.get_input_embeddings()(told).to(prefix.dtype)], dim=1)
            written = captioner.write(inputs, beams=beams, max_tokens=max_tokens)
            for row, text in zip(rows.tolist(), written, strict=True):
                texts[row] = text
            done += len(rows)
            if progress:
                progress(done, len(features))
    return texts


def save_retrieval_captioner(captioner: RetrievalCaptioner, folder: Path) -> None:
    """Write it into an existing folder: config, weights, the captions of the memory, a tuned language model."""
    save_head(captioner, folder)
    (folder / CAPTIONS_FILE).write_text(json.dumps(captioner.captions, ensure_ascii=False), encoding="utf-8")


def load_retrieval_captioner(folder: Path) -> RetrievalCaptioner:
    """A captioner saved by `save_retrieval_captioner`.

    Raises:
        InputError: The folder holds none.
        SetupError: Its language model cannot be loaded.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if config.pop("head") != "ifcap":
            raise ValueError("its head is another one")
        captions = json.loads((folder / CAPTIONS_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
        vectors = tensors["vectors"]
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise InputError(f"{folder} holds no IFCap captioner: {error}", hint="Give a cell of task ifcap.") from error
    own, revision = folder / LM_FOLDER if config["tune_lm"] else config["lm"], config["lm_revision"]
    lm, tokenizer = load_lm(own, revision="" if config["tune_lm"] else revision)
    captioner = RetrievalCaptioner(
        config["dim"],
        captions=captions,
        vectors=torch.empty_like(vectors),
        retrieved=config["retrieved"],
        filtered=config["filtered"],
        lm_revision=revision,
        lm=lm,
        tokenizer=tokenizer,
        lm_name=config["lm"],
        prefix_length=config["prefix_length"],
        mapping=config["mapping"],
        tune_lm=config["tune_lm"],
    )
    captioner.scale = config.get("scale", captioner.scale)
    load_weights(captioner, folder)
    return captioner.eval()
