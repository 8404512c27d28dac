"""Captions without any training: a linear map from images to the tokens of a language model.

SITTA (Paischer et al. 2023): a closed-form map brings image embeddings to the input embeddings of a causal language
model; the tokens nearest to a mapped image, in several orders, prompt the frozen model, and of what it writes the
caption that CLIP finds closest to the image is taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from gmail_cli.components.arms import Arm
from gmail_cli.components.heads import CONFIG_FILE, WEIGHTS_FILE, generate, load_lm, start_of
from gmail_cli.components.loop import Job
from gmail_cli.components.pairs import Pairs
from gmail_cli.errors import InputError

Fit: TypeAlias = Literal["least-squares", "procrustes"]

PROMPT = "A picture of"
"""What follows the retrieved tokens."""
RIDGE = 1.0
"""Penalty of `least-squares` (scikit-learn's default, as in SITTA's code): vanishes beside thousands of captions."""
NEAREST = 50
"""Tokens among which those that read differently are looked for."""
_FUNCTION_WORDS = (
    "a about above after against all along an and another any are around as at away back be been before behind being "
    "below beneath beside between both but by can close down during each few for from front full had has have having "
    "he her here him his how i in inside into is it its just many may more most near next no not of off on one onto or "
    "other out outside over own per she side so some such than that the their them then there these they this those "
    "through to together top toward towards two under until up upon very was we were what when where which while who "
    "whose why will with within without you your"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""Words that say nothing of what is in a picture (SITTA leaves out spaCy's list of stop words)."""
_LEAST = 1e-6


class LinearMap(nn.Module):
    """Standardised image embeddings to the standardised input embeddings of a frozen language model.

    Attributes:
        weight: The map.
        mean: Of the image embeddings it was fitted to, by component.
        std: Their standard deviation.
        vocabulary: The language model's input embeddings, each component standardised over the vocabulary.
        about: What `load_linear_map` needs beside the tensors: ``lm``, ``lm_revision``, ``encoder`` (digest of f_r),
            ``tokens`` (retrieved for an image) and ``orders`` (in which they prompt).
    """

    def __init__(self, dim: int, *, lm: Any, tokenizer: Any, about: dict[str, Any]) -> None:
        super().__init__()
        self.lm, self.tokenizer, self.about = lm.requires_grad_(False).eval(), tokenizer, about
        embeddings = lm.get_input_embeddings().weight.detach().float()
        spread = embeddings.std(dim=0, correction=0).clamp(min=_LEAST)
        self.vocabulary = ((embeddings - embeddings.mean(dim=0)) / spread)[: len(tokenizer)]
        self.weight = nn.Parameter(torch.zeros(dim, embeddings.shape[1]))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch width"]:
        """Unit image embeddings to where their words lie in `vocabulary`."""
        return ((functional.normalize(features.float(), dim=-1) - self.mean) / self.std) @ self.weight

    @torch.no_grad()
    def fit(self, features: Float[Tensor, "captions dim"], texts: Sequence[str], *, how: Fit) -> float:
        """Fit the map to pairs of an image and each token of the words of its caption.

        Args:
            features: An image embedding for each caption.
            texts: The captions; function words are left out.
            how: ``least-squares``, or the nearest orthogonal map (``procrustes``).

        Returns:
            Share of the tokens' squared length that the map explains.

        Raises:
            InputError: No caption has a word to fit to.
        """
        unit = functional.normalize(features.float(), dim=-1)
        self.mean.copy_(unit.mean(dim=0))
        self.std.copy_(unit.std(dim=0, correction=0).clamp(min=_LEAST))
        ids = self.content_tokens(texts)
        counts = torch.tensor([len(row) for row in ids], dtype=torch.float64)
        if not bool(counts.sum()):
            raise InputError(
                f"none of {len(texts)} captions, such as {texts[0][:60]!r}, has a word but function words",
                hint="Give captions in English that name what is in the picture.",
            )
        x = ((unit - self.mean) / self.std).double().cpu()
        table = self.vocabulary.double().cpu()
        y = torch.stack([table[row].sum(dim=0) for row in ids])
        cross = x.T @ y
        if how == "procrustes":
            left, _, right = torch.linalg.svd(cross, full_matrices=False)
            weight = left @ right
        else:
            gram = x.T @ (counts[:, None] * x)
            weight = torch.linalg.solve(gram + RIDGE * torch.eye(len(gram), dtype=gram.dtype), cross)
        self.weight.copy_(weight)
        whole = sum(float(table[row].square().sum()) for row in ids)
        mapped = x @ weight
        rest = whole - 2 * float((mapped * y).sum()) + float((counts[:, None] * mapped.square()).sum())
        return 1 - rest / whole

    def content_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text's different words without function words, in the order they first come."""
        joined = [" ".join(content_words(text)) for text in texts]
        rows = self.tokenizer(joined, add_special_tokens=False)["input_ids"]
        return [[number for number in row if number != self.tokenizer.unk_token_id] for row in rows]

    @torch.inference_mode()
    def retrieve(self, features: Float[Tensor, "images dim"]) -> list[list[int]]:
        """For each image the ids of the nearest tokens by cosine, no two of which read alike, nearest first."""
        likeness = functional.normalize(self(features), dim=-1) @ functional.normalize(self.vocabulary, dim=-1).T
        likeness[:, self.tokenizer.all_special_ids] = -torch.inf
        nearest = likeness.topk(min(NEAREST, likeness.shape[1])).indices.tolist()
        found = []
        for row in nearest:
            different: dict[str, int] = {}
            for number in row:
                different.setdefault(self.tokenizer.decode([number]).strip().lower(), number)
            different.pop("", None)
            found.append([*different.values()][: self.about["tokens"]])
        return found


def content_words(text: str) -> list[str]:
    """A text's different words without function words, in the order they first come."""
    return [word for word in dict.fromkeys(re.findall(r"[^\W_]+", text.lower())) if word not in FUNCTION_WORDS]


def sitta_job(model: LinearMap, pairs: Pairs, arm: Arm, *, how: Fit, seed: int) -> Job:
    """Fit a map to an arm; nothing is left to train.

    Args:
        model: Fitted in place.
        pairs: The captions.
        arm: Image embeddings; one is drawn for each caption.
        how: See `LinearMap.fit`.
        seed: Of the draw.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features, _ = arm.draw(torch.arange(len(pairs)))
    explained = model.fit(features.to(model.weight.device), pairs.texts, how=how)
    return Job(
        module=model,
        loss=lambda rows, step: model.weight.sum(),
        rows=0,
        export=lambda folder: save_linear_map(model, folder),
        evaluate=lambda: {"explained": explained},
    )


@torch.inference_mode()
def write_captions(
    model: LinearMap,
    features: Float[Tensor, "images dim"],
    *,
    embed: Callable[[list[str]], Float[Tensor, "texts dim"]],
    beams: int = 1,
    max_tokens: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Captions of real images from their embeddings.

    Args:
        model: Fitted.
        features: Embeddings of f_r, on the model's device.
        embed: Unit embeddings of texts by the text tower that belongs to f_r; chooses among the captions that the
            orders of an image's tokens gave.
        beams: 1 is greedy, as in SITTA.
        max_tokens: Most tokens of a caption; it also ends with a sentence or a line.
        progress: Called with (done, images).
    """
    tokenizer, device = model.tokenizer, features.device
    start, tail = start_of(tokenizer), tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    marked = [tokenizer(PROMPT + mark, add_special_tokens=False)["input_ids"] for mark in (".", "\n")]
    stops = [tokenizer.eos_token_id, *(row[-1] for row in marked if row[:-1] == tail)]
    unit = functional.normalize(features.float(), dim=-1)
    texts = []
    for number, tokens in enumerate(model.retrieve(features)):
        prompts = torch.tensor([[*start, *order, *tail] for order in orders(tokens, count=model.about["orders"])]).to(
            device
        )
        room = int(getattr(model.lm.config, "max_position_embeddings", 1024)) - prompts.shape[1]
        if room < 1:
            raise InputError(
                f"a prompt of {prompts.shape[1]} tokens fills the language model {model.about['lm']}",
                hint="Train with a smaller --set train.retrieved_tokens.",
            )
        written = generate(
            model.lm,
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=min(max_tokens, room),
            num_beams=beams,
            eos_token_id=stops,
            pad_token_id=tokenizer.eos_token_id,
        )[:, prompts.shape[1] :]
        said = [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
        different = list(dict.fromkeys(said))
        best = int((embed(different).to(device) @ unit[number]).argmax()) if len(different) > 1 else 0
        texts.append(different[best])
        if progress:
            progress(len(texts), len(features))
    return texts


def orders(tokens: Sequence[int], *, count: int) -> list[list[int]]:
    """The tokens as they are, then shuffled, up to ``count`` different orders; the same for equal tokens."""
    drawn = torch.Generator().manual_seed(0)
    found = dict.fromkeys([tuple(tokens)])
    for _ in range(count - 1):
        found[tuple(tokens[place] for place in torch.randperm(len(tokens), generator=drawn).tolist())] = None
    return [list(order) for order in found]


def save_linear_map(model: LinearMap, folder: Path) -> None:
    """Write a map into an existing folder: ``head.json`` and ``head.safetensors``."""
    about = {"head": "sitta", "dim": len(model.weight), **model.about}
    (folder / CONFIG_FILE).write_text(json.dumps(about, indent=1, sort_keys=True), encoding="utf-8")
    tensors = {"weight": model.weight, "mean": model.mean, "std": model.std}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)


def load_linear_map(folder: Path) -> LinearMap:
    """A map saved by `save_linear_map`.

    Raises:
        InputError: The folder holds none, or the language model is another one.
        SetupError: Its language model cannot be loaded.
    """
    file = folder / CONFIG_FILE
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        kind, dim = about.pop("head"), about.pop("dim")
        if kind != "sitta":
            raise ValueError(f"it is of a {kind}")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{file} is no linear map: {error}", hint="Give a cell of task sitta.") from error
    lm, tokenizer = load_lm(about["lm"], revision=about["lm_revision"])
    model = LinearMap(dim, lm=lm, tokenizer=tokenizer, about=about)
    try:
        for name, tensor in load_file(folder / WEIGHTS_FILE).items():
            getattr(model, name).data.copy_(tensor)
    except (OSError, SafetensorError, RuntimeError, AttributeError) as error:
        raise InputError(f"{folder / WEIGHTS_FILE} does not fit: {error}", hint="Train the cell again.") from error
    return model.eval()
