"""`[generate]`, with its generators (`[[generate.mix]]`) and the writer of its prompts (`[generate.rewrite]`)."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from gmail_cli.profile.values import (
    TEMPLATE_SETS,
    Count,
    Fraction,
    Limit,
    Listed,
    NonNegative,
    Number,
    Positive,
    Revision,
    Section,
    Templates,
)

Spacing = Literal["default", "leading", "linspace", "trailing"]
Scheduler = Literal[
    "default",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]


class Generator(Section):
    """One of several generators of a set, `[[generate.mix]]`; what it does not say is as in `[generate]`."""

    name: Annotated[str, Field(min_length=1)]
    """What each record of its images says under `generator`; no two may be called the same."""
    share: Positive = 1.0
    """Its part of the images, in proportion to the others'. Which generator draws an image depends on `seed`, the
    caption and k alone."""
    model: str | None = None
    """As `generate.model`."""
    revision: Revision | None = None
    """As `generate.revision`."""
    lora: str | None = None
    """As `generate.lora`."""
    lora_scale: NonNegative | None = None
    """As `generate.lora_scale`."""
    dtype: Number | None = None
    """As `generate.dtype`."""
    scheduler: Scheduler | None = None
    """As `generate.scheduler`."""
    timestep_spacing: Spacing | None = None
    """As `generate.timestep_spacing`."""
    steps: Count | None = None
    """As `generate.steps`."""
    guidance: NonNegative | None = None
    """As `generate.guidance`."""
    strength: Fraction | None = None
    """As `generate.strength`."""
    prompt_template: Templates | None = None
    """As `generate.prompt_template`."""
    negative_prompt: str | None = None
    """As `generate.negative_prompt`."""
    prompt_windows: Count | None = None
    """As `generate.prompt_windows`."""
    height: Annotated[int, Field(ge=0, multiple_of=8)] | None = None
    """As `generate.height`."""
    width: Annotated[int, Field(ge=0, multiple_of=8)] | None = None
    """As `generate.width`."""
    batch_size: Count | None = None
    """As `generate.batch_size`."""


class Rewrite(Section):
    """Prompts that a local language model writes from the captions, `[generate.rewrite]` (language enhancement)."""

    lm: str = ""
    """Causal language model that writes them: `tiny` (shipped), a folder in transformers format, or a hub id. Empty:
    captions stay as they are. The caption of each record stays in any case; what was written is beside it."""
    revision: Revision = ""
    """Commit of a hub model; required for one, so that the artifact says which weights wrote."""
    instruction: str = "Rewrite this caption of a photo as one detailed sentence about what can be seen: {}"
    """What it is told, `{}` standing for the caption: as a user's turn where its tokenizer has a chat template; else it
    goes on from there to the end of the line."""
    max_tokens: Count = 64
    """Most tokens it writes; a sentence that is cut off is left out. CLIP's text towers read 77 in all."""
    temperature: NonNegative = 0.0
    """0 takes the likeliest token each time; above, one of the 50 likeliest is drawn."""
    per_image: bool = False
    """Write a prompt for each of the k images of a caption, instead of one for all; needs `temperature` above 0."""
    batch_size: Count = 16
    """Prompts written at once. Part of the artifact's identity, as `generate.batch_size` is."""
    dtype: Number = "float32"
    """Number format of its weights; a CPU wants `float32`."""

    @model_validator(mode="after")
    def _fits_together(self) -> Rewrite:
        if self.instruction.count("{}") != 1:
            raise ValueError(f"instruction {self.instruction!r} must hold {{}} once, for the caption")
        if self.per_image and not self.temperature:
            raise ValueError("per_image has no effect at temperature = 0, where all prompts of a caption are equal")
        return self


class Generate(Section):
    """Images from captions (the paper: Stable Diffusion v2, 50 steps, one image per caption)."""

    source: Literal["pipeline", "import"] = "pipeline"
    """`pipeline` draws images with `model`; `import` takes finished ones from `import_path`, byte for byte."""
    import_path: str = ""
    """`import`: the images made elsewhere, with their captions: a folder, tar, Parquet or captions file."""
    name: str = ""
    """Name of the generator, written into every record. Empty: the model's name, or `import`."""
    limit: Limit = 0
    """Use the first N image records with all their captions; 0 uses all."""
    captions_per_image: Limit = 0
    """Use the first N captions of each image record; 0 uses all. (`import` records the first one.)"""
    kinds: Annotated[tuple[Literal["short", "long"], ...], Listed, Field(min_length=1)] = ("short",)
    """Kinds of captions to use."""
    per_caption: Count = 1
    """Images per caption: 20 image records of 5 captions give 500 images at `per_caption = 5`."""
    model: str = "tiny"
    """Text-to-image pipeline: `tiny` (shipped), a folder in diffusers format, or a hub id."""
    revision: Revision = ""
    """Commit of a hub model; required for one, so that the artifact says which weights drew it."""
    lora: str = ""
    """LoRA weights to add to `model`: a `.safetensors` file that `pipeline.save_lora_weights` wrote."""
    lora_scale: NonNegative = 1.0
    """Factor of their update."""
    mix: Annotated[tuple[Generator, ...], Listed] = ()
    """Several generators that share the images, a `[[generate.mix]]` table each: `name`, `share`, and what differs from
    `[generate]`. Empty: one generator, as `[generate]` says."""
    dtype: Number = "float32"
    """Number format of the pipeline; a CPU wants `float32`."""
    scheduler: Scheduler = "default"
    """Sampler: `default` keeps the pipeline's own; another must suit it."""
    timestep_spacing: Spacing = "default"
    """Where the sampler's steps lie: `trailing` begins with noise alone, as models distilled to few steps want it
    (SDXL-Lightning, Hyper-SD); `default` is what the model's own sampler says."""
    steps: Count = 50
    """Denoising steps."""
    guidance: NonNegative = 7.5
    """Classifier-free guidance scale; 1 or less turns guidance off, as turbo and LCM models want it."""
    strength: Fraction = 0.0
    """0 draws from noise alone. Above 0 an image begins as the real image that its caption describes, with that share
    of the noise on it (GenView): little leaves it much as it is, 1 covers it. Runs that share of `steps`."""
    prompt_template: Templates = ("{caption}",)
    """What the pipeline is told; `{caption}` stands for the caption, `{label}` for the class of its image. Of several
    the images of a caption take one after another: k = 0 the first. A set of open_clip can be named
    (`openai-imagenet`: CLIP's 80 templates of class names, `simple-imagenet`: 7). With `rewrite` `{caption}` is what
    was written and `{original}` the caption."""
    rewrite: Rewrite = Rewrite()
    """Have a language model write the prompts, see below."""
    negative_prompt: str = ""
    """What guidance leads away from; needs `guidance` above 1."""
    prompt_windows: Count = 1
    """Windows of CLIP's text encoder (75 tokens each) that a prompt may fill, for Stable Diffusion 1, 2 and SDXL: a
    longer one is split, where a sentence, clause or word ends, and cut after the last window. 1 cuts it after the
    first, as diffusers does. Pipelines that read prompts by T5 or Gemma want 1."""
    height: Annotated[int, Field(ge=0, multiple_of=8)] = 0
    """Pixels; 0 takes the pipeline's own. Set `width` too."""
    width: Annotated[int, Field(ge=0, multiple_of=8)] = 0
    """Pixels; 0 takes the pipeline's own. Set `height` too."""
    batch_size: Count = 8
    """Images drawn at once. Part of the artifact's identity: another batch size moves pixels in the last bits."""
    compile: bool = False
    """Compile the blocks that the denoiser repeats by `torch.compile` at the first batch, for sets that are large
    enough to make up for the minutes it takes. Part of the artifact's identity: it moves pixels in the last bits. Needs
    a C++ compiler (and Triton, on a GPU)."""
    format: Literal["png", "jpg", "webp"] = "png"
    """File format; `png` is lossless."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Quality of `jpg` and `webp`."""
    score: bool = False
    """Score each image by `model.clip`: `clip_score` to its caption, `twin_similarity` to the most alike image of its
    caption, `partner_similarity` to its real image, `copy_similarity` to the most alike real image (`copy_of`); and its
    `contrast` and `detail`. Fields of its record; and `report.html`."""
    min_clip_score: NonNegative = 0.0
    """Keep images with this CLIPScore (2.5 times the cosine with their caption) or more; 0 keeps all. Scores them."""
    keep_best: Limit = 0
    """Keep the N images of each caption with the highest CLIPScore; 0 keeps all. Scores them."""
    safety_checker: str = ""
    """Say how unsafe each image is (`unsafe`, 0 to 1), by Stable Diffusion's safety checker or an image classifier: a
    folder in transformers format or a hub id. Empty: none. Scores the images too."""
    safety_revision: Revision = ""
    """Commit of a hub `safety_checker`; required for one."""
    unsafe_label: str = ""
    """Class of the classifier that means unsafe, such as `nsfw`; empty for Stable Diffusion's safety checker."""
    max_unsafe: Fraction = 1.0
    """Keep images that are at most so unsafe; 1 keeps all."""

    @model_validator(mode="after")
    def _fits_together(self) -> Generate:
        for template in self.prompt_template:
            if "{caption}" not in template and "{label}" not in template and template not in TEMPLATE_SETS:
                sets = ", ".join(TEMPLATE_SETS)
                raise ValueError(f"prompt_template {template!r} lacks {{caption}} and {{label}} and is none of {sets}")
            if unknown := set(re.findall(r"\{\w*\}", template)) - {"{caption}", "{original}", "{label}"}:
                known = "{caption}, {original} and {label}"
                raise ValueError(f"prompt_template {template!r} has {min(unknown)}, which is none of {known}")
        if self.negative_prompt and self.guidance <= 1:
            raise ValueError(f"negative_prompt has no effect at guidance = {self.guidance}: raise it above 1")
        if not self.safety_checker and (self.unsafe_label or self.max_unsafe < 1):
            raise ValueError(
                f"max_unsafe = {self.max_unsafe} and unsafe_label = {self.unsafe_label!r} have no effect without "
                "safety_checker: name one"
            )
        if self.source == "pipeline" and self.keep_best > self.per_caption:
            raise ValueError(
                f"keep_best = {self.keep_best} of per_caption = {self.per_caption}: it must be at most that"
            )
        if bool(self.height) != bool(self.width):
            raise ValueError(f"height = {self.height} and width = {self.width}: set both or neither")
        if (self.source == "import") != bool(self.import_path):
            raise ValueError('source = "import" and import_path = "..." go together: set both or neither')
        if self.rewrite.lm and self.source == "import":
            raise ValueError('rewrite.lm writes prompts and source = "import" draws nothing: set one of them')
        if self.rewrite.lm and not any("{caption}" in template for template in self.prompt_template):
            raise ValueError("rewrite.lm has no effect: no prompt_template holds {caption}")
        if self.source == "import" and self.mix:
            raise ValueError('mix names generators and source = "import" draws nothing: set one of them')
        names = [each.name for each in self.mix]
        if len(set(names)) < len(names):
            raise ValueError(f"mix names a generator twice: {', '.join(names)}")
        for each in self.mix:
            self.with_generator(each)
        return self

    def with_generator(self, generator: Generator) -> Generate:
        """These settings for one generator of ``mix`` alone."""
        own = generator.model_dump(exclude={"share"}, exclude_none=True)
        return Generate.model_validate(self.model_dump() | own | {"mix": ()})
