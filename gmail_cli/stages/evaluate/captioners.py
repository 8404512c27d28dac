"""Captions that trained models write of test images, answers that they give, and the CLIP that scores captions."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from gmail_cli.components import measure
from gmail_cli.components import scores as scoring
from gmail_cli.components.metrics.clipscore import PROMPT
from gmail_cli.components.questions import QuestionSet, read_questions
from gmail_cli.components.tables import Table
from gmail_cli.errors import GmailError, InputError, UsageError
from gmail_cli.profile import require_file
from gmail_cli.profile.schema import Profile
from gmail_cli.stages.evaluate.inputs import IMAGES, Inputs, Model

if TYPE_CHECKING:
    from gmail_cli.components import llava
    from gmail_cli.components.encoders import Clip


def write(given: Inputs, model: Model, rows: Sequence[int]) -> list[str]:
    """What a captioner (task ``clipcap``, ``ifcap``, ``sitta`` or ``llava``) says of these rows of the test images.

    Raises:
        InputError: It was trained on another encoder, or needs test images that are not at hand.
    """
    writers = {"clipcap": _clipcap, "ifcap": _ifcap, "sitta": _sitta, "llava": _llava}
    return writers[model.task](given, model, list(rows))


def _clipcap(given: Inputs, model: Model, rows: list[int]) -> list[str]:
    from gmail_cli.components import heads

    chosen = given.profile.eval
    captioner = heads.load_captioner(given.artifacts["train"].folder(model.folder))
    vectors = tensor(given.images(model).vectors[rows])
    return heads.generate_captions(captioner, vectors, beams=chosen.beams, max_tokens=chosen.caption_tokens)


def _ifcap(given: Inputs, model: Model, rows: list[int]) -> list[str]:
    from gmail_cli.components import ifcap

    chosen = given.profile.eval
    made = ifcap.load_retrieval_captioner(given.artifacts["train"].folder(model.folder))
    vectors = tensor(given.images(model).vectors[rows])
    return ifcap.write_captions(made, vectors, beams=chosen.beams, max_tokens=chosen.caption_tokens)


def _sitta(given: Inputs, model: Model, rows: list[int]) -> list[str]:
    from gmail_cli.components import sitta

    chosen = given.profile.eval
    made = sitta.load_linear_map(given.artifacts["train"].folder(model.folder))
    vectors, embed = tensor(given.images(model).vectors[rows]), given.encoder.encode_texts
    return sitta.write_captions(made, vectors, embed=embed, beams=chosen.beams, max_tokens=chosen.caption_tokens)


@functools.lru_cache(maxsize=1)
def _load_llava(given: Inputs, model: Model) -> llava.Llava:
    from gmail_cli.components import llava
    from gmail_cli.components.encoders import pick_device

    folder = given.artifacts["train"].folder(model.folder)
    return llava.load_llava(folder, device=pick_device(given.profile.runtime.device))


def _llava(given: Inputs, model: Model, rows: list[int]) -> list[str]:
    from gmail_cli.components import llava

    chosen, made, images = given.profile.eval, _load_llava(given, model), given.images(model)
    if made.about["visual"] == "pooled":
        tokens = tensor(images.vectors[rows])[:, None]
    else:
        tokens = _patches(given, [images.ids[row] for row in rows], grid=int(made.about["visual_grid"]))
    prompts = [llava.caption_prompt(made)] * len(rows)
    return llava.answer(made, prompts, tokens, beams=chosen.beams, max_tokens=chosen.caption_tokens)


@functools.lru_cache(maxsize=1)
def questions(profile: Profile) -> tuple[QuestionSet, ...]:
    """The questions that LLaVA models are asked; read once for the plan and the work.

    Raises:
        InputError: A file that cannot be read.
        UsageError: Two files of one benchmark.
    """
    chosen = profile.eval
    found = [
        read_questions(require_file(path, key="eval.questions"), split=chosen.question_split)
        for path in chosen.questions
    ]
    names = [asked.benchmark for asked in found]
    if len(set(names)) < len(names):
        raise UsageError(f"eval.questions = {list(chosen.questions)} names {names[0]} twice", hint="Give one of each.")
    return tuple(found)


def answers(given: Inputs, model: Model, asked: QuestionSet) -> dict[str, str]:
    """What a LLaVA-style model answers, by the question's id.

    Raises:
        InputError: It was trained on another encoder.
    """
    from gmail_cli.components import llava

    made = _load_llava(given, model)
    see = functools.partial(_see, given, made.about)
    return llava.answer_questions(made, asked, see=see, max_tokens=given.profile.eval.answer_tokens)


def _see(given: Inputs, about: Mapping[str, Any], images: Sequence[bytes]) -> Any:
    """Image tokens of images from elsewhere, through the encoder of the test images."""
    from gmail_cli.components import embedding

    workers = given.profile.runtime.workers
    if about["visual"] == "pooled":
        return tensor(embedding.embed_images(given.encoder, images.__getitem__, len(images), workers=workers))[:, None]
    grid = int(about["visual_grid"])
    return tensor(embedding.patch_tokens(given.encoder, images.__getitem__, len(images), grid=grid, workers=workers))


def _patches(given: Inputs, ids: list[str], *, grid: int) -> Any:
    """Patch tokens of test images, which the embeddings do not hold."""
    import torch

    from gmail_cli.components.embedding import patch_tokens

    if given.test is None or not given.test.has_images:
        hint = "Evaluate where the test images are, or train with --set train.visual=pooled."
        raise InputError("LLaVA's patch tokens need the test images, and they are not at hand", hint=hint)
    test, places = given.test, given.places
    return torch.from_numpy(
        patch_tokens(
            given.encoder,
            lambda i: test.image_bytes(places[ids[i]]),
            len(ids),
            grid=grid,
            workers=given.profile.runtime.workers,
        )
    )


def clip_scorer(given: Inputs) -> ClipScorer | None:
    """Scores captions by the CLIP that embedded the test images; None (and a note) where it is not at hand."""
    from gmail_cli.components import clip_files, encoders

    if not given.profile.eval.clip_score:
        return None
    model, seed = given.origins["model"], given.artifacts["embeddings"].manifest["key"]["seed"]
    name, chosen = model["clip"], {"revision": model["revision"], "seed": seed}
    images = given.tables[IMAGES]
    try:
        if clip_files.model_digest(name, **chosen) != images.header.encoder_digest:
            raise InputError(f"the test images did not go through {name} as it is now")
        device = encoders.pick_device(given.profile.runtime.device)
        clip = clip_files.load_clip(name, device=device, **chosen)
        if not clip.reads_texts:
            raise InputError(f"{name} has no text tower")
    except GmailError as error:
        given.note(f"CLIPScore left out: {error.message}.")
        return None
    return ClipScorer(clip, images, given.references(), batch_size=given.profile.embed.batch_size)


class ClipScorer:
    """CLIPScore and RefCLIPScore of captions of the test images; the references are embedded once."""

    def __init__(self, clip: Clip, images: Table, references: Mapping[str, Sequence[str]], *, batch_size: int) -> None:
        self._clip, self._batch_size = clip, batch_size
        self._names = [name for name in images.ids if name in references]
        rows = {name: row for row, name in enumerate(images.ids)}
        self._pictures = np.asarray(images.vectors[[rows[name] for name in self._names]], dtype=np.float32)
        self._truths = self._embed([text for name in self._names for text in references[name]])
        self._owners = np.repeat(np.arange(len(self._names)), [len(references[name]) for name in self._names])

    def scores(self, predictions: Mapping[str, str]) -> dict[str, scoring.Scores]:
        """The scores of one caption for each image that has references."""
        captions = self._embed([predictions[name] for name in self._names])
        return measure.clip_scores(self._pictures, captions=captions, references=self._truths, owners=self._owners)

    def _embed(self, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        from gmail_cli.components import embedding

        return embedding.embed_texts(self._clip, [PROMPT + text for text in texts], batch_size=self._batch_size)[0]


def tensor(vectors: Float[np.ndarray, "rows dim"]) -> Any:
    """The same as fp32 for torch."""
    import torch

    return torch.from_numpy(np.array(vectors, dtype=np.float32))
