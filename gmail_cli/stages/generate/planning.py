"""What to make: the images a profile asks for, in their order, and the key of the artifact that holds them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from gmail_cli.artifacts import StageKey, canonical_json, digest_of_list, file_sha256, folder_digest
from gmail_cli.components import captions as reader
from gmail_cli.components import diffusion, pipelines
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import settings
from gmail_cli.profile.generation import Generate
from gmail_cli.profile.schema import Profile
from gmail_cli.profile.values import TEMPLATE_SETS
from gmail_cli.stages import sources

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int64

    from gmail_cli.components.captions import Caption, Dataset, Image

RECORDS = "records.jsonl"
PER_FOLDER = 1000
"""Images in one folder."""
_PIPELINE_ONLY = (
    *("per_caption", "lora_scale", "dtype", "scheduler", "steps", "guidance", "strength", "prompt_template"),
    *("rewrite", "negative_prompt", "height", "width", "batch_size", "format", "quality"),
    *("prompt_windows", "compile", "timestep_spacing"),
)
_BY_CONTENT = ("import_path", "model", "revision", "lora", "limit", "kinds", "captions_per_image", "mix")
"""Settings that enter a key through the content they choose: its inputs and models."""
AFTERWARDS = (
    *("score", "min_clip_score", "keep_best"),
    *("safety_checker", "safety_revision", "unsafe_label", "max_unsafe"),
)
"""Settings of what is done with images once they are there: each makes another artifact, from the one without it."""

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Planned:
    """One image to make: which caption it belongs to and what its file is called (without an extension)."""

    key: str
    stem: str
    caption_id: str
    caption: str
    owner: str
    label: str | None
    k: int


class Plan(Sequence[Planned]):
    """Every image of an artifact, in its final order: by image record, caption, k.

    Args:
        rows: A caption and its image for each caption, or for each image that is imported.
        per_caption: Images of each.
        by_image: Files are named by their image's id instead of their caption's.
    """

    def __init__(
        self, rows: Sequence[tuple[Caption | None, Image]], *, per_caption: int, by_image: bool = False
    ) -> None:
        self._rows = rows
        self.per_caption = per_caption
        self._by_image = by_image

    def __len__(self) -> int:
        """Number of images."""
        return len(self._rows) * self.per_caption

    @overload
    def __getitem__(self, index: int) -> Planned: ...

    @overload
    def __getitem__(self, index: slice) -> list[Planned]: ...

    def __getitem__(self, index: int | slice) -> Planned | list[Planned]:
        """One image, or those of a slice."""
        if isinstance(index, slice):
            return [self._at(row) for row in range(*index.indices(len(self)))]
        return self._at(range(len(self))[index])

    def _at(self, index: int) -> Planned:
        row, k = divmod(index, self.per_caption)
        caption, image = self._rows[row]
        key = file_key(image.id if caption is None or self._by_image else caption.id, k)
        stem = f"images/{(row * self.per_caption + k) // PER_FOLDER:03d}/{key}"
        caption_id, text = (caption.id, caption.text) if caption else ("", "")
        return Planned(key, stem, caption_id, text, image.id, image.label, k)

    def captions_in(self, images: range) -> int:
        """Number of captions that a run of images belongs to."""
        return (images.stop - 1) // self.per_caption - images.start // self.per_caption + 1

    @property
    def captions(self) -> int:
        """Number of captions."""
        return len({caption.id if caption else "" for caption, _ in self._rows})

    @property
    def owners(self) -> int:
        """Number of image records."""
        return len({image.id for _, image in self._rows})

    def digest(self) -> str:
        """SHA-256 over what each image is drawn from: caption id, caption, owner, label, k."""

        def items() -> Iterator[str]:
            for row in range(len(self._rows)):
                head = canonical_json(self.about(row))[:-1]
                yield ",".join([f"{head},{k}]" for k in range(self.per_caption)])

        return digest_of_list(items())

    def about(self, row: int) -> tuple[str, str, str, str | None]:
        """What the images of a caption have in common: caption id, caption, owner, label."""
        caption, image = self._rows[row]
        caption_id, text = (caption.id, caption.text) if caption else ("", "")
        return caption_id, text, image.id, image.label


class Part(Plan):
    """Some images of a plan, in its order, with the files that it gives them.

    Args:
        whole: The plan.
        rows: Which, ascending.
    """

    def __init__(self, whole: Plan, rows: Int64[np.ndarray, " chosen"]) -> None:
        self._whole = whole
        self._chosen = rows

    def __len__(self) -> int:
        """Number of images."""
        return len(self._chosen)

    def _at(self, index: int) -> Planned:
        return self._whole[int(self._chosen[index])]

    def captions_in(self, images: range) -> int:
        """As :meth:`Plan.captions_in`."""
        return len({each.caption_id for each in self[images.start : images.stop]})

    @property
    def captions(self) -> int:
        """Number of captions."""
        return len({self._whole.about(row)[0] for row, _ in self._places()})

    @property
    def owners(self) -> int:
        """Number of image records."""
        return len({self._whole.about(row)[2] for row, _ in self._places()})

    def digest(self) -> str:
        """As :meth:`Plan.digest`."""

        def items() -> Iterator[str]:
            last, head = -1, ""
            for row, k in self._places():
                if row != last:
                    last, head = row, canonical_json(self._whole.about(row))[:-1]
                yield f"{head},{k}]"

        return digest_of_list(items())

    def _places(self) -> Iterator[tuple[int, int]]:
        """Which caption of the whole plan each image belongs to, and its k."""
        for chosen in self._chosen:
            yield divmod(int(chosen), self._whole.per_caption)


def plan(profile: Profile) -> Plan:
    """The images `run` would make, in their order; raises what `plan_key` raises."""
    return planned_images(profile, read(profile))


def read(profile: Profile) -> Dataset:
    generate, data = profile.generate, profile.data
    if generate.source == "import":
        return reader.read(generate.import_path, limit=generate.limit or None, on_bad=data.on_bad, need_images=True)
    begins_real = any(each.strength > 0 for each in generators(generate).values())
    images = {"need_images": True} if begins_real else {"images": None}
    return sources.read({**sources.source(profile, part="train"), **images, "limit": limit_of(profile)})


def device_of(profile: Profile) -> str:
    """Where models are loaded to; torch gets the threads that the profile gives it."""
    import torch

    if profile.runtime.threads:
        torch.set_num_threads(profile.runtime.threads)
    if profile.runtime.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return profile.runtime.device


def generators(generate: Generate) -> dict[str, Generate]:
    """The settings of each generator of ``generate.mix`` by its name, or the only one there is."""
    return {each.name: generate.with_generator(each) for each in generate.mix} or {generate.name: generate}


def limit_of(profile: Profile) -> int | None:
    return min(filter(None, (profile.generate.limit, profile.data.train_limit)), default=None)


def planned_images(profile: Profile, dataset: Dataset) -> Plan:
    generate = profile.generate
    rows: list[tuple[Caption | None, Image]] = []
    for image in dataset.images:
        suitable = [each for each in dataset.captions_of(image.id) if each.kind in generate.kinds]
        if generate.source == "import":
            rows.append((suitable[0] if suitable else None, image))
        else:
            rows += [(caption, image) for caption in suitable[: generate.captions_per_image or None]]
    if not rows:
        raise InputError(
            f"{dataset.name} has no {' or '.join(generate.kinds)} caption", hint="set generate.kinds to others"
        )
    bare = next((image.id for _, image in rows if not image.label), None)
    templates = [template for each in generators(generate).values() for template in templates_of(each)]
    if any("{label}" in each for each in templates) and generate.source == "pipeline" and bare is not None:
        raise InputError(
            f"generate.prompt_template has {{label}} and image {bare!r} of {dataset.name} has no class",
            hint="Take {label} out of the template, or name captions whose images have classes.",
        )
    if generate.source == "import":
        return Plan(rows, per_caption=1, by_image=True)
    return Plan(rows, per_caption=generate.per_caption)


def file_key(identity: str, k: int) -> str:
    """A file name for image ``k`` of an id: the id where it is a plain, lower-case name, else made so, and a hash."""
    plain = re.sub(r"[^a-z0-9._-]", "_", identity.lower()).lstrip(".")[:80]
    if plain != identity:
        plain += "-" + hashlib.sha256(identity.encode()).hexdigest()[:12]
    return f"{plain}-{k}"


def key_of(profile: Profile, dataset: Dataset, plan: Plan) -> StageKey:
    generate = profile.generate
    chosen = {name: value for name, value in settings(generate).items() if name not in (*_BY_CONTENT, *AFTERWARDS)}
    captions = plan.digest()
    if generate.source == "import":
        for unused in _PIPELINE_ONLY:
            del chosen[unused]
        chosen["name"] = generate.name or "import"
        inputs = {"images": dataset.fingerprint, "captions": captions}
        return StageKey(stage="generate", settings=chosen, inputs=inputs)
    inputs = {"captions": captions}
    if generate.strength:
        inputs["partners"] = dataset.fingerprint
    else:
        del chosen["strength"]
    if len(generate.prompt_template) == 1:
        chosen["prompt_template"] = generate.prompt_template[0]
    if generate.format == "png":
        del chosen["quality"]
    if not generate.lora:
        del chosen["lora_scale"]
    if generate.rewrite.lm:
        del chosen["rewrite"]["lm"], chosen["rewrite"]["revision"]
    else:
        del chosen["rewrite"]
    if not generate.compile:
        del chosen["compile"]
    if generate.timestep_spacing == "default":
        del chosen["timestep_spacing"]
    if generate.prompt_windows == 1:
        del chosen["prompt_windows"]
    place, folder = pipelines.locate(generate.model)
    if folder is None and not generate.revision:
        raise UsageError(
            f"generate.model = {generate.model!r} is a hub id without generate.revision",
            hint="set generate.revision to a commit of the model's repository: the artifact then names its weights",
        )
    shown = generate.model if folder is None or generate.model == "tiny" else Path(place).resolve().name
    chosen["name"] = generate.name or shown
    return StageKey(
        stage="generate",
        settings=chosen,
        inputs=inputs,
        models=models_of(generate),
        seed=profile.seed,
    )


def models_of(generate: Generate) -> dict[str, str]:
    """What is drawn with: digests of weights, or a hub model and its revision."""
    place, folder = pipelines.locate(generate.model)
    models = {"generator": folder_digest(folder) if folder else f"{place}@{generate.revision}"}
    if generate.lora:
        models["lora"] = file_sha256(pipelines.locate_lora(generate.lora))
    if generate.rewrite.lm:
        rewrite = {"key": "generate.rewrite.lm", "revision_key": "generate.rewrite.revision"}
        models["rewrite"] = sources.lm_digest(generate.rewrite.lm, revision=generate.rewrite.revision, **rewrite)
    return models


def weights_of(generate: Generate) -> dict[str, str]:
    """Where the weights were that `models_of` gives the digests of, as the profile says it."""
    return {"generator": generate.model, **({"lora": generate.lora} if generate.lora else {})}


def drawn_by(settings: Record, models: Record) -> dict[str, tuple[Record, Record]]:
    """Name -> (settings, models) of each generator that an artifact's key tells of."""
    if "mix" not in settings:
        return {settings["name"]: (settings, models)}
    return {
        name: (own, {key.removeprefix(f"{name}/"): each for key, each in models.items() if key.startswith(f"{name}/")})
        for name, own in settings["mix"].items()
    }


class Jobs(Sequence[diffusion.Job]):
    """What the pipeline is told for each image of a plan.

    Args:
        plan: The images.
        templates: As `templates_of` gives them.
        written: For each image what a language model made of its caption, None where nothing; without it captions
            stay as they are.
    """

    def __init__(
        self, plan: Sequence[Planned], *, templates: Sequence[str], written: Sequence[str | None] | None = None
    ) -> None:
        self._plan = plan
        self._templates = templates
        self._written = written

    def __len__(self) -> int:
        return len(self._plan)

    @overload
    def __getitem__(self, index: int) -> diffusion.Job: ...

    @overload
    def __getitem__(self, index: slice) -> list[diffusion.Job]: ...

    def __getitem__(self, index: int | slice) -> diffusion.Job | list[diffusion.Job]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        planned = self._plan[index]
        written = self._written[index] if self._written else None
        told = prompt(self._templates, planned.caption, label=planned.label, k=planned.k, written=written)
        return diffusion.Job(planned.caption_id, told, planned.k, planned.owner)


def templates_of(generate: Generate) -> tuple[str, ...]:
    """Every template that ``generate.prompt_template`` stands for."""
    found: list[str] = []
    for each in generate.prompt_template:
        if each in TEMPLATE_SETS:
            from gmail_cli.components import prompts

            found += [template.replace("{}", "{label}") for template in prompts.templates([each])]
        else:
            found.append(each)
    return tuple(found)


def prompt(templates: Sequence[str], caption: str, *, label: str | None, k: int, written: str | None = None) -> str:
    """What the pipeline is told for image ``k``; what stands in a caption is not taken for a place to fill.

    Args:
        templates: The image takes one of them.
        caption: Stands for ``{original}``, and for ``{caption}`` unless something is written.
        label: Stands for ``{label}``.
        k: Which of the caption's images.
        written: What a language model made of the caption; stands for ``{caption}``.
    """
    template = templates[k % len(templates)]
    filled = {"{caption}": caption if written is None else written, "{original}": caption, "{label}": label or ""}
    return "".join(filled.get(part, part) for part in re.split(r"(\{(?:caption|original|label)\})", template))
