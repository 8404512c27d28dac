"""Heads on image embeddings: the two projections, the prefix captioner and the class probe (paper, Algorithm 1).

A head reads unit embeddings of either flow. With dual projection each flow has its own small map in front of the
head; inference on real images uses the real one.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from gmail_cli.components import compilation, hub
from gmail_cli.errors import InputError, SetupError, UsageError, import_failure

Mapping: TypeAlias = Literal["mlp", "transformer"]

SHIPPED_LMS = {"tiny": Path(__file__).resolve().parents[1] / "weights" / "tiny" / "lm"}
WEIGHTS_FILE = "head.safetensors"
CONFIG_FILE = "head.json"
LM_FOLDER = "lm"
IGNORED = -100
LEAST_CAPTION = 2
"""Tokens that a language model has to have room for behind the prefix: a word and the end of the text."""
MEMORY_TEMPERATURE = 1 / 150
"""Of the weights in `remembered` (DeCap's)."""
RIDGE = 0.1
"""Ridge penalty of `DualProjection.meet`, as a share of the mean variance of the features."""


# -- dual projection ---------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A linear map that starts as the identity: unit vectors in, ``normalise(x + W x + b)`` out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        return functional.normalize(features + self.linear(features), dim=-1)


class DualProjection(nn.Module):
    """Two projections between the encoders and a head, one for each flow (paper, Algorithm 1 and Table 9).

    The paper does not say how the projection of real images is trained when the head sees generated images only.
    Here it is fitted afterwards, in closed form, so that it brings f_r(x_r) to where the trained projection of
    generated images brings f_g(x_g), over the pairs that the alignment was trained on.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.generated = Residual(dim)
        self.real = Residual(dim)

    def forward(self, features: Float[Tensor, "batch dim"], real: Bool[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        if bool(real.all()):
            return self.real(features)
        if not bool(real.any()):
            return self.generated(features)
        return torch.where(real[:, None], self.real(features), self.generated(features))

    @torch.no_grad()
    def meet(self, real: Float[Tensor, "pairs dim"], generated: Float[Tensor, "pairs dim"]) -> None:
        """Fit the real projection to paired embeddings by ridge regression towards the identity."""
        weight, bias = ridge_to(real, self.generated(generated))
        self.real.linear.weight.copy_(weight)
        self.real.linear.bias.copy_(bias)


def ridge_to(
    points: Float[Tensor, "pairs dim"], target: Float[Tensor, "pairs dim"]
) -> tuple[Float[Tensor, "dim dim"], Float[Tensor, " dim"]]:
    """W and b of the map ``x + W x + b`` that brings points to their targets: ridge regression towards the identity."""
    centre, aim = points.mean(0), target.mean(0)
    x, y = (points - centre).double(), (target - aim).double()
    gram = x.T @ x
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram + penalty, x.T @ (y - x)).T.to(points.dtype)
    return weight, aim - centre - weight @ centre


class Head(nn.Module):
    """What every head shares: unit features, and the projection of their flow."""

    def __init__(self, dim: int, *, dual: bool) -> None:
        super().__init__()
        self.dim = dim
        self.projection = DualProjection(dim) if dual else None

    def project(self, features: Float[Tensor, "batch dim"], real: Bool[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """Normalised features of either flow, in training and at inference alike."""
        unit = functional.normalize(features.float(), dim=-1)
        return unit if self.projection is None else self.projection(unit, real)


# -- class probe -------------------------------------------------------------------------------------------------


class Probe(Head):
    """A linear classifier on embeddings.

    Unit embeddings are scaled by the square root of their width, so that their components are of order one.
    """

    def __init__(self, dim: int, class_names: Sequence[str], *, dual: bool = False) -> None:
        super().__init__(dim, dual=dual)
        self.class_names = tuple(class_names)
        self.linear = nn.Linear(dim, len(self.class_names))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(
        self, features: Float[Tensor, "batch dim"], real: Bool[Tensor, " batch"]
    ) -> Float[Tensor, "batch classes"]:
        return self.linear(self.project(features, real) * self.dim**0.5)

    def config(self) -> dict[str, Any]:
        """What `load_probe` needs beside the weights."""
        return {
            "head": "probe",
            "dim": self.dim,
            "class_names": list(self.class_names),
            "dual": self.projection is not None,
        }


def load_probe(folder: Path) -> Probe:
    """A probe saved by `save_head`.

    Raises:
        InputError: The folder holds none.
    """
    config = _read_config(folder, "probe")
    probe = Probe(config["dim"], config["class_names"], dual=config["dual"])
    load_weights(probe, folder)
    return probe.eval()


@torch.inference_mode()
def classify(probe: Probe, features: Float[Tensor, "images dim"]) -> Float[Tensor, "images classes"]:
    """Class probabilities of real images from their embeddings."""
    everywhere = torch.ones(len(features), dtype=torch.bool, device=features.device)
    return probe(features, everywhere).softmax(dim=-1)


# -- prefix captioner --------------------------------------------------------------------------------------------


class Captioner(Head):
    """A mapping network turns an embedding into prefix embeddings of a causal language model (ClipCap).

    Attributes:
        mapping: Embedding -> ``prefix_length`` prefix embeddings.
        lm: transformers' causal language model.
        tokenizer: Its tokenizer.
        memory: Text embeddings (see `remembered`) that an image is seen through at inference, or None.
    """

    memory: Float[Tensor, "texts dim"] | None = None

    def __init__(
        self,
        dim: int,
        *,
        lm: Any,
        tokenizer: Any,
        lm_name: str,
        lm_revision: str = "",
        prefix_length: int = 8,
        mapping: Mapping = "mlp",
        tune_lm: bool = False,
        dual: bool = False,
    ) -> None:
        super().__init__(dim, dual=dual)
        width = lm.get_input_embeddings().embedding_dim
        self.prefix_length, self.kind, self.tune_lm = prefix_length, mapping, tune_lm
        self.lm_name, self.lm_revision = lm_name, lm_revision
        build = {"mlp": _mlp, "transformer": _Translator}[mapping]
        self.mapping = build(dim, width, prefix_length)
        self.lm = lm.requires_grad_(tune_lm)
        self.tokenizer, self.start = tokenizer, start_of(tokenizer)
        self.scale = float(embedding_scale(lm))
        if tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer of {lm_name} has no end-of-text token", hint="Choose another train.lm.")
        if self.context < LEAST_CAPTION:
            raise UsageError(
                f"train.prefix_length = {prefix_length} leaves no room for a caption: {lm_name} reads "
                f"{self.context + prefix_length} tokens",
                hint="Set it lower, or choose another train.lm.",
            )

    @property
    def context(self) -> int:
        """Most caption tokens, the end-of-text token included, that fit behind the prefix."""
        return int(getattr(self.lm.config, "max_position_embeddings", 1024)) - self.prefix_length - len(self.start)

    def begun(self, inputs: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch longer width"]:
        """Input embeddings behind that of the start token, where the language model wants one (`start_of`)."""
        start = torch.tensor(self.start, dtype=torch.long, device=inputs.device).expand(len(inputs), -1)
        return torch.cat([self.lm.get_input_embeddings()(start).to(inputs.dtype), inputs], dim=1)

    def prefix(
        self, features: Float[Tensor, "batch dim"], real: Bool[Tensor, " batch"]
    ) -> Float[Tensor, "batch prefix width"]:
        """Prefix embeddings, of the size of the language model's token embeddings."""
        mapped = self.mapping(self.project(features, real) * self.dim**0.5)
        return mapped.unflatten(-1, (self.prefix_length, -1)) * self.scale

    def tokenize(self, texts: Sequence[str], *, limit: int = 64) -> Int[Tensor, "texts length"]:
        """Caption tokens with the end-of-text token; padded with `IGNORED`, cut to ``limit`` before that token."""
        limit = min(limit, self.context)
        rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        rows = [[*row[: limit - 1], self.tokenizer.eos_token_id] for row in rows]
        table = torch.full((len(rows), max(map(len, rows))), IGNORED)
        for i, row in enumerate(rows):
            table[i, : len(row)] = torch.tensor(row)
        return table

    def forward(
        self,
        features: Float[Tensor, "batch dim"],
        real: Bool[Tensor, " batch"],
        tokens: Int[Tensor, "batch length"],
    ) -> Tensor:
        """Mean cross-entropy over the caption tokens, the end-of-text token among them."""
        return self.loss_behind(self.prefix(features, real), tokens, tokens)

    def loss_behind(
        self,
        prefix: Float[Tensor, "batch prefix width"],
        tokens: Int[Tensor, "batch length"],
        wanted: Int[Tensor, "batch length"],
    ) -> Tensor:
        """Mean cross-entropy over the ``wanted`` ones of the tokens that follow a prefix; the others are `IGNORED`."""
        assert bool((wanted != IGNORED).any()), "no supervised token in the batch"
        tokens, wanted = (
            compilation.lengthened(each, model=self.lm, value=IGNORED, most=self.context) for each in (tokens, wanted)
        )
        there = tokens != IGNORED
        embedded = self.lm.get_input_embeddings()(tokens.clamp(min=0))
        prefix = self.begun(prefix)
        seen = torch.cat([there.new_ones(prefix.shape[:2]), there], dim=1)
        inputs = torch.cat([prefix, embedded.to(prefix.dtype)], dim=1)
        logits = self.lm(inputs_embeds=inputs, attention_mask=seen.long(), use_cache=False).logits
        predicted = logits[:, prefix.shape[1] - 1 : -1]
        return functional.cross_entropy(predicted.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED)

    def write(self, inputs: Float[Tensor, "batch length width"], *, beams: int, max_tokens: int) -> list[str]:
        """What the language model says after these input embeddings, by greedy (``beams`` 1) or beam search."""
        end, room = self.tokenizer.eos_token_id, self.context + self.prefix_length - inputs.shape[1]
        inputs = self.begun(inputs)
        tokens = generate(
            self.lm,
            inputs_embeds=inputs,
            attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device),
            max_new_tokens=min(max_tokens, room),
            num_beams=beams,
            eos_token_id=end,
            pad_token_id=end,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def config(self) -> dict[str, Any]:
        """What `load_captioner` needs beside the weights."""
        return {
            "head": "captioner",
            "dim": self.dim,
            "prefix_length": self.prefix_length,
            "mapping": self.kind,
            "tune_lm": self.tune_lm,
            "lm": LM_FOLDER if self.tune_lm else self.lm_name,
            "lm_revision": "" if self.tune_lm else self.lm_revision,
            "dual": self.projection is not None,
            **({"scale": self.scale} if self.tune_lm else {}),  # that of the embeddings before they were trained
        }


def remembered(
    features: Float[Tensor, "images dim"], memory: Float[Tensor, "texts dim"]
) -> Float[Tensor, "images dim"]:
    """Each image as the average of text embeddings, weighted by a softmax of its similarity to them (DeCap, Li et al.
    2023): it comes to lie where a captioner trained on texts has been."""
    unit, memory = functional.normalize(features.float(), dim=-1), memory.to(features.device)
    return (unit @ memory.T / MEMORY_TEMPERATURE).softmax(dim=-1) @ memory


def _mlp(dim: int, width: int, length: int) -> nn.Module:
    hidden = width * length // 2
    return nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, width * length))


class _Translator(nn.Module):
    """ClipCap's transformer mapping: embedding tokens and learned queries through a small encoder."""

    def __init__(self, dim: int, width: int, length: int, *, layers: int = 2) -> None:
        super().__init__()
        heads = max(heads for heads in (8, 4, 2, 1) if width % heads == 0)
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.length = length
        self.inputs = nn.Linear(dim, width * length)
        self.queries = nn.Parameter(torch.randn(length, width) * width**-0.5)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch flat"]:
        tokens = self.inputs(features).unflatten(-1, (self.length, -1))
        queries = self.queries.expand(len(features), -1, -1)
        return self.encoder(torch.cat([tokens, queries], dim=1))[:, self.length :].flatten(1)


@torch.random.fork_rng(devices=[])  # building a model draws random numbers, which the caller's must not depend on
def load_lm(
    ref: str | Path,
    *,
    revision: str = "",
    dtype: torch.dtype = torch.float32,
    key: str = "train.lm",
    empty: bool = False,
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Of its settings for writing only the tokens that begin, end and pad a text are kept: a ``repetition_penalty``, as
    some are published with, would count the words it is told and the padding too.

    Args:
        ref: ``tiny`` (shipped), a folder in transformers format, or a hub id.
        revision: Commit of a hub model.
        dtype: Of its weights.
        key: The profile key that names it, for messages.
        empty: Read no weights; they are on torch's ``meta`` device, to be filled from elsewhere.

    Raises:
        InputError: Its weights hold something else than tensors.
        SetupError: The model can be neither found nor fetched, or a library that it needs cannot be imported.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    place = str(SHIPPED_LMS.get(str(ref), ref))
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision or None)
        if empty:
            config = AutoConfig.from_pretrained(place, revision=revision or None)
            with torch.device("meta"):
                lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            with hub.tensors_alone(str(ref)):
                lm = AutoModelForCausalLM.from_pretrained(place, revision=revision or None, dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if failure := import_failure(error):
            raise failure from error
        reason = textwrap.shorten(str(error), 300)
        hint = f"Give tiny, a folder in transformers format, or a hub id with {key}."
        if revision:
            reason, hint = hub.explain(error, place, revision=revision)
        raise SetupError(f"the language model {ref!s} cannot be loaded: {reason}", hint=hint) from error
    _fuse_gelu(lm)
    written = lm.generation_config
    lm.generation_config = GenerationConfig(
        bos_token_id=written.bos_token_id, eos_token_id=written.eos_token_id, pad_token_id=written.pad_token_id
    )
    return lm.eval(), tokenizer


def _fuse_gelu(lm: nn.Module) -> None:
    """GPT-2's GELU is the tanh approximation spelt out in eight operations; torch has it as one."""
    from transformers.activations import NewGELUActivation

    for module in lm.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def generate(lm: Any, **options: Any) -> Int64[Tensor, "batch length"]:
    """What transformers' ``generate`` writes, greedily or by beam search, as ``options`` say.

    It drops an attention mask that hides nothing, and GPT-2 then takes a text that has ended for padding and warns,
    unless its config names no token to pad with. The one in ``options`` is used either way.
    """
    config = lm.config
    pad, config.pad_token_id = getattr(config, "pad_token_id", None), None
    try:
        return lm.generate(do_sample=False, **options)
    finally:
        config.pad_token_id = pad


def start_of(tokenizer: Any) -> list[int]:
    """The start token, where a tokenizer puts it before a text by itself and nothing behind it.

    Llama, Mistral and Gemma are lost without it; GPT-2, Qwen and SmolLM2 know none, and CLIP's tokenizer (of `tiny`)
    closes a text too, which is no beginning.
    """
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if ids[0] == tokenizer.bos_token_id and ids[-1] != tokenizer.eos_token_id else []


def embedding_scale(lm: Any) -> Float[Tensor, ""]:
    """Standard deviation of a language model's token embeddings as its layers read them.

    Gemma multiplies its table by the square root of its width on the way, so the table alone does not tell.
    """
    table = lm.get_input_embeddings()
    some = torch.arange(min(len(table.weight), 1024), device=table.weight.device)
    with torch.no_grad():
        factor = table(some).float().norm() / table.weight[some].float().norm()
        return table.weight.float().std() * factor


def load_captioner(folder: Path) -> Captioner:
    """A captioner saved by `save_head`.

    Raises:
        InputError: The folder holds none.
        SetupError: Its language model cannot be loaded.
    """
    config = _read_config(folder, "captioner")
    lm, tokenizer = load_lm(folder / LM_FOLDER if config["tune_lm"] else config["lm"], revision=config["lm_revision"])
    captioner = Captioner(
        config["dim"],
        lm=lm,
        tokenizer=tokenizer,
        lm_name=config["lm"],
        lm_revision=config["lm_revision"],
        prefix_length=config["prefix_length"],
        mapping=config["mapping"],
        tune_lm=config["tune_lm"],
        dual=config["dual"],
    )
    captioner.scale = config.get("scale", captioner.scale)
    load_weights(captioner, folder)
    return captioner.eval()


@torch.inference_mode()
def generate_captions(
    captioner: Captioner,
    features: Float[Tensor, "images dim"],
    *,
    beams: int = 1,
    max_tokens: int = 32,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Captions of real images from their embeddings, by greedy or beam search.

    Args:
        captioner: In eval mode.
        features: Embeddings of f_r, on the captioner's device.
        beams: 1 is greedy.
        max_tokens: Most tokens of a caption.
        batch_size: Images at once.
        progress: Called with (done, images).
    """
    texts: list[str] = []
    for start in range(0, len(features), batch_size):
        batch = features[start : start + batch_size]
        if captioner.memory is not None:
            batch = remembered(batch, captioner.memory)
        prefix = captioner.prefix(batch, torch.ones(len(batch), dtype=torch.bool, device=batch.device))
        texts += captioner.write(prefix, beams=beams, max_tokens=max_tokens)
        if progress:
            progress(len(texts), len(features))
    return texts


# -- files -------------------------------------------------------------------------------------------------------


def save_head(head: Probe | Captioner, folder: Path) -> None:
    """Write a head into an existing folder: its config, its weights, and its language model when that was tuned."""
    (folder / CONFIG_FILE).write_text(json.dumps(head.config(), indent=1, sort_keys=True), encoding="utf-8")
    tensors = {name: t.detach().cpu() for name, t in head.state_dict().items() if not name.startswith("lm.")}
    if isinstance(head, Captioner) and head.memory is not None:
        tensors["memory"] = head.memory.detach().cpu()
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    if isinstance(head, Captioner) and head.tune_lm:
        head.lm.save_pretrained(folder / LM_FOLDER)
        head.tokenizer.save_pretrained(folder / LM_FOLDER)


def _read_config(folder: Path, kind: str) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}", hint="Give a cell of a train artifact.") from error
    if not isinstance(config, dict) or config.get("head") != kind:
        raise InputError(f"{file} is not the config of a {kind}", hint="Give a cell of another task.")
    return config


def load_weights(head: Probe | Captioner, folder: Path) -> None:
    """Read what `save_head` wrote into a head of the same shape.

    Raises:
        InputError: The file is missing, damaged, or another head's.
    """
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
        if isinstance(head, Captioner):
            head.memory = tensors.pop("memory", None)
        missing = head.load_state_dict(tensors, strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{folder / WEIGHTS_FILE} does not fit: {error}", hint="Train the cell again.") from error
    absent = [name for name in missing.missing_keys if not name.startswith("lm.")]
    if absent or missing.unexpected_keys:
        raise InputError(f"{folder / WEIGHTS_FILE} does not fit at {[*absent, *missing.unexpected_keys][0]}")
