"""Text-to-image sampling in which an image depends on its caption, never on its batch.

``image = f(generator, revision, caption, k, seed, settings)``: each (caption, k) owns one `torch.Generator` on the CPU,
seeded from a hash; the initial noise and the noise of stochastic schedulers come from it; and every batch the network
sees is full, so that a row is the same bytes whatever its neighbours, its order or its shard.

Any diffusers text-to-image pipeline is driven through its own ``__call__``. Those in `ENCODED` encode each caption once
and reuse the encoding for every k; others are given the captions as text and encode them with each batch.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from gmail_cli.components.pipelines import first_line
from gmail_cli.components.windows import Windows
from gmail_cli.errors import SetupError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Bool, Float, UInt8
    from PIL import Image
    from torch import Tensor

ATTEMPTS = 4
"""How often a blank image is drawn before the run stops."""
REACH = 8
"""How many batches ahead prompts of as many windows are looked for; so many batches of finished images may wait."""
_PLAIN = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = (*_PLAIN, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_MASKED = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
ENCODED = {
    "StableDiffusionPipeline": _PLAIN,
    "StableDiffusionXLPipeline": _POOLED,
    "StableDiffusion3Pipeline": _POOLED,
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds", ""),
    "PixArtAlphaPipeline": _MASKED,
    "PixArtSigmaPipeline": _MASKED,
    "SanaPipeline": _MASKED,
    "StableDiffusionImg2ImgPipeline": _PLAIN,
    "StableDiffusionXLImg2ImgPipeline": _POOLED,
    "StableDiffusion3Img2ImgPipeline": _POOLED,
    "FluxImg2ImgPipeline": ("prompt_embeds", "pooled_prompt_embeds", ""),
}
"""Pipelines whose text encodings are reused, and the arguments that take what their ``encode_prompt`` returns, in order
(an empty name: nothing takes it)."""
_FIXED = (
    *("LatentConsistencyModelPipeline", "ChromaPipeline", "HunyuanDiTPipeline", "AuraFlowPipeline"),
    *("HiDreamImagePipeline", "CogView3PlusPipeline", "Flux2Pipeline", "Flux2KleinPipeline"),
)
"""More pipelines that pad every prompt to one length. Others may pad to the longest of a batch, which moves the last
bits of the shorter ones; they are given prompts of one number of tokens."""
_TRIED = (
    *(*ENCODED, "LatentConsistencyModelPipeline", "QwenImagePipeline", "CogView4Pipeline", "ZImagePipeline"),
    *("ChromaPipeline", "HunyuanDiTPipeline", "AuraFlowPipeline", "Flux2KleinPipeline"),
)
"""Pipelines that tests draw with. The first batch of another is drawn twice, to see that no row changes another."""
_CHATS = ("Flux2Pipeline", "Flux2KleinPipeline", "ZImagePipeline")
"""Pipelines whose text encoder reads a prompt as a user's turn of a chat."""
_READ = {"HunyuanDiTPipeline": 256}
"""Tokens of a prompt that the last text encoder is given where this is no setting of the pipeline's."""
_BEFORE = ("", " ", "\n", "> ")
"""What may stand before a prompt when a pipeline encodes it, as far as it changes how tokenizers cut the prompt."""


_ILL_SIZED = re.compile(r"[Ss]izes? of tensors?|invalid for input of size")
"""How torch says that rows and columns do not go up in those of a network."""


class BatchTooLargeError(SetupError):
    """A batch that does not fit the memory of the GPU, or without one that of the process."""


@dataclass(frozen=True, slots=True)
class Job:
    """One image to draw.

    Attributes:
        caption_id: Identity of the caption; part of the seed.
        prompt: The text given to the generator; part of the seed.
        k: Which of the caption's images this is, from 0; part of the seed.
        owner: The real image that the caption describes, where drawing begins with it.
    """

    caption_id: str
    prompt: str
    k: int
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How images are drawn.

    Attributes:
        steps: Denoising steps.
        guidance: Classifier-free guidance scale; at 1 or below the negative prompt is not evaluated.
        negative_prompt: What guidance leads away from.
        height: Pixels; 0 for the pipeline's own.
        width: Pixels; 0 for the pipeline's own.
        batch_size: Rows in every call of the pipeline, padded when fewer remain.
        strength: Share of the noise that is laid on a real image to begin with; 0 begins with noise alone.
        prompt_windows: Windows of the text encoder's length that a prompt may fill, see `windows`; 1 cuts longer ones.
        seed: Part of every image's seed.
    """

    steps: int
    guidance: float
    negative_prompt: str = ""
    height: int = 0
    width: int = 0
    batch_size: int = 8
    strength: float = 0.0
    prompt_windows: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Drawn:
    """A finished image.

    Attributes:
        job: What was asked for.
        pixels: uint8 array, [height, width, 3], RGB.
        seed: The seed of its generator: ``torch.Generator().manual_seed(seed)`` repeats its noise.
        attempt: 0, or how many blank images were thrown away before this one.
        truncated: Whether the prompt is longer than every text encoder of the pipeline reads, in all its windows.
    """

    job: Job
    pixels: UInt8[np.ndarray, "height width 3"]
    seed: int
    attempt: int
    truncated: bool


def derived_seed(job: Job, *, seed: int, attempt: int = 0) -> int:
    """The seed of one image: the first 32 bits of SHA-256 over (seed, caption id, text, k, attempt).

    32 bits, because torch's CPU generator ignores the higher ones.
    """
    identity = json.dumps([seed, job.caption_id, job.prompt, job.k, attempt], ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:4], "big")


class Sampler:
    """Draws images from one pipeline in batches of one shape.

    Args:
        pipeline: What `load_pipeline` returned.
        sampling: How to draw.
        begins: Encoded bytes of the real image of a job's ``owner``, for a ``strength`` above 0.
    """

    def __init__(self, pipeline: Any, *, sampling: Sampling, begins: Callable[[str], bytes] | None = None) -> None:
        self.pipeline = pipeline
        self.sampling = sampling
        self._begins = begins
        self._encodings: _Encodings | None = None
        self.reuses_encodings = type(pipeline).__name__ in ENCODED
        self.accepted = inspect.signature(pipeline.__call__).parameters
        kind = type(pipeline).__name__
        needed = ("prompt", "generator", "num_inference_steps", "output_type")
        if lacks := [name for name in needed if name not in self.accepted]:
            raise UsageError(
                f"generate.model: a {kind} does not draw from text alone, it takes no {lacks[0]}",
                hint="take another model",
            )
        scales = [name for name in ("true_cfg_scale", "guidance_scale") if name in self.accepted]
        if not scales:
            raise UsageError(
                f"generate.model: a {kind} takes no guidance scale, so it cannot be told generate.guidance",
                hint="take another model",
            )
        # FLUX reads its scale as an input, beside that of a negative prompt; Qwen-Image has only the latter
        self.guidance_name = scales[-1] if kind.startswith("Flux") else scales[0]
        guides = "negative_prompt" in self.accepted and self.guidance_name == scales[0]
        if sampling.negative_prompt and not guides:
            raise UsageError(
                f"generate.negative_prompt: {kind} takes no negative prompt",
                hint="set generate.negative_prompt to an empty string",
            )
        # FLUX and SD3 give a sampler that adds noise no generator; on a GPU only drawing again shows it
        tried = kind in _TRIED and not pipeline.scheduler.config.get("stochastic_sampling")
        self._proved = {False, True} if tried else set[bool]()
        self.windows: Windows | None = None
        if sampling.prompt_windows > 1:
            negative = sampling.negative_prompt if sampling.guidance > 1 else None
            self.windows = Windows(pipeline, most=sampling.prompt_windows, negative_prompt=negative)

    def draw(
        self, jobs: Sequence[Job], *, first: int = 0, start: int = 0, stop: int | None = None
    ) -> Iterator[list[Drawn]]:
        """Draw ``jobs`` batch by batch, and give the images in order.

        Batches are made up from job ``first`` on, whatever ``start``, so that a run that starts again shows the network
        the very batches that the first run would have shown it.

        Args:
            jobs: What to draw; a caption's k side by side lets its encoding be reused.
            first: Where batches begin.
            start: Where the images begin that do not exist yet.
            stop: Where to end; None draws all.

        Yields:
            New images that are next in order, after each batch that makes some ready.

        Raises:
            SetupError: An image that stays blank or not-a-number through `ATTEMPTS` seeds.
            BatchTooLargeError: The batch does not fit the memory, not even a second time with the allocator emptied.
            UsageError: Steps or sizes that the pipeline refuses.
        """
        if self._encodings is None or self._encodings.jobs is not jobs:
            self._encodings = _Encodings(self, jobs)
        encode = self._encodings
        stop = len(jobs) if stop is None else min(stop, len(jobs))
        waiting: dict[int, Drawn] = {}
        for rows in self._batches(jobs, range(first, stop)):
            if rows[-1] < start:
                continue
            batch = [jobs[row] for row in rows]
            encode.look_ahead(rows[0])
            truncated = self._truncated([job.prompt for job in batch])
            drawn = [
                Drawn(job, pixels, derived_seed(job, seed=self.sampling.seed, attempt=attempt), attempt, cut)
                for job, (pixels, attempt), cut in zip(batch, self._batch(batch, encode), truncated, strict=True)
            ]
            waiting |= zip(rows, drawn, strict=True)
            ready = [waiting.pop(row) for row in takewhile(waiting.__contains__, range(start, stop))]
            start += len(ready)
            if ready:
                yield ready

    @property
    def text_length(self) -> int:
        """Tokens that T5 or Gemma reads of a prompt; 0 where the pipeline has no setting for it."""
        if "max_sequence_length" not in self.accepted:
            return _READ.get(type(self.pipeline).__name__, 0)
        flux = type(self.pipeline).__name__ in ("FluxPipeline", "FluxImg2ImgPipeline")
        if flux and not self.pipeline.transformer.config.guidance_embeds:
            return 256  # FLUX.1 schnell, which its authors' own code gives so many
        return self.accepted["max_sequence_length"].default or 0

    def _alike(self, prompt: str) -> Hashable:
        """What the prompts of one batch must have in common: the number of windows, or of tokens."""
        if self.windows:
            return self.windows.count(prompt)
        if type(self.pipeline).__name__ in (*ENCODED, *_FIXED):
            return 0
        read = [_tokens(each) for name, each in self.pipeline.components.items() if "tokenizer" in name and each]
        return tuple(len(tokenizer(before + prompt).input_ids) for tokenizer in read for before in _BEFORE)

    def _batches(self, jobs: Sequence[Job], rows: range) -> Iterator[list[int]]:
        """Which rows are drawn together: the first that is left and the next that are `_alike`."""
        size, left, ahead = self.sampling.batch_size, list[int](), rows.start
        kinds: dict[str, Hashable] = {}
        while left or ahead < rows.stop:
            edge = min((left[0] if left else ahead) + REACH * size, rows.stop)
            left += range(ahead, edge)
            ahead = max(ahead, edge)
            prompts = [jobs[row].prompt for row in left]
            kinds = {each: kinds[each] if each in kinds else self._alike(each) for each in dict.fromkeys(prompts)}
            batch = [row for row, each in zip(left, prompts, strict=True) if kinds[each] == kinds[prompts[0]]][:size]
            yield batch
            left = [row for row in left if row not in batch]

    def _batch(self, batch: Sequence[Job], encode: _Encodings) -> list[tuple[Any, int]]:
        """Pixels and attempt of every job of one batch; blank rows are drawn again in a batch of the same shape."""
        attempts = [0] * len(batch)
        images, good = self._sample(batch, attempts=attempts, encode=encode)
        for attempt in range(1, ATTEMPTS):
            blank = [row for row in range(len(batch)) if not good[row]]
            if not blank:
                break
            for row in blank:
                attempts[row] = attempt
            again, again_good = self._sample(batch, attempts=attempts, encode=encode)
            images[blank], good[blank] = again[blank], again_good[blank]
        if not good.all():
            job = batch[int(good.argmin())]
            raise SetupError(
                f"{type(self.pipeline).__name__} drew a blank image {ATTEMPTS} times for caption "
                f"{job.caption_id!r}: {job.prompt!r}",
                hint="half precision often overflows: set generate.dtype to 'float32' or 'bfloat16'",
            )
        return list(zip(images, attempts, strict=True))

    def _sample(
        self, batch: Sequence[Job], *, attempts: Sequence[int], encode: _Encodings
    ) -> tuple[UInt8[np.ndarray, "rows height width 3"], Bool[np.ndarray, " rows"]]:
        """One call of the pipeline: pixels of each row, and whether the row is finite and not of one colour."""
        import torch

        sampling, kind = self.sampling, type(self.pipeline).__name__
        rows = _full([*zip(batch, attempts, strict=True)], sampling.batch_size)
        before = torch.get_rng_state()
        images = self._call_in_memory(rows, encode)
        if not torch.equal(before, torch.get_rng_state()):
            raise UsageError(
                f"{kind} with {type(self.pipeline.scheduler).__name__} draws noise that does "
                "not come from an image's own seed: its images could not be repeated",
                hint="set generate.scheduler to another; of a model in a folder, take stochastic_sampling out of its "
                "scheduler's configuration",
            )
        if sampling.height and images.shape[2:] != (sampling.height, sampling.width):
            height, width = images.shape[2:]
            raise UsageError(
                f"{kind} draws height = {height}, width = {width} where generate.height = {sampling.height} and "
                f"generate.width = {sampling.width} are asked for",
                hint="set generate.height and generate.width to those, or both to 0 for the model's own",
            )
        self._require_own(rows, images, encode)
        output = images[: len(batch)]
        finite = output.isfinite().flatten(1).all(1)
        pixels = output.float().nan_to_num(0).clamp(0, 1).mul(255).round().to(torch.uint8)
        spread = (pixels.amax((2, 3)) - pixels.amin((2, 3))).amax(1)
        good = finite & (spread > 2)
        return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy(), good.cpu().numpy()

    def _require_own(
        self, rows: Sequence[tuple[Job, int]], images: Float[Tensor, "rows 3 height width"], encode: _Encodings
    ) -> None:
        """Check that the last row of a batch is the same again: in the first batch, and the first of several prompts.

        Raises:
            UsageError: It is not.
        """
        mixed = len({job.prompt for job, _ in rows}) > 1
        if mixed in self._proved:
            return
        again = self._call_in_memory([rows[-1]] * len(rows), encode)
        if not again[0].equal(images[-1]) and not again.isnan().any():
            others = " or beside others" if len(rows) > 1 else ""
            raise UsageError(
                f"{type(self.pipeline).__name__} draws an image otherwise when it is drawn again{others}: its images "
                "could not be repeated",
                hint="set generate.batch_size to 1" if len(rows) > 1 else "take another model or scheduler",
            )
        self._proved |= {mixed, False}

    def _call_in_memory(
        self, rows: Sequence[tuple[Job, int]], encode: _Encodings
    ) -> Float[Tensor, "rows 3 height width"]:
        """`_call`, once more where the memory is full.

        Raises:
            BatchTooLargeError: It is full again.
        """
        import torch

        try:
            return self._call(rows, encode)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        gc.collect()  # what earlier batches left behind: the same rows, so the same bytes
        torch.cuda.empty_cache()
        try:
            return self._call(rows, encode)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            size = self.sampling.batch_size
            smaller = (
                f"--set generate.batch_size={size // 2} makes another artifact, whose images differ in the last "
                "bits; gmail generate --dry-run --warm-up 1 finds a size that fits"
            )
            raise BatchTooLargeError(
                f"a batch of {size} images does not fit the memory: {first_line(error)}",
                hint=smaller if size > 1 else "free memory, or set a smaller generate.height and generate.width",
            ) from error

    def _call(self, rows: Sequence[tuple[Job, int]], encode: _Encodings) -> Float[Tensor, "rows 3 height width"]:
        """One call of the pipeline for (job, attempt) in each row, each with a generator of its own."""
        import torch

        sampling = self.sampling
        given = encode([job.prompt for job, _ in rows]) | self._size()
        if sampling.strength:
            given |= {"image": [self._beginning(job) for job, _ in rows], "strength": sampling.strength}
        try:
            drawn = self.pipeline(
                **given,
                num_inference_steps=sampling.steps,
                **{self.guidance_name: sampling.guidance},
                generator=[
                    torch.Generator().manual_seed(derived_seed(job, seed=sampling.seed, attempt=attempt))
                    for job, attempt in rows
                ],
                output_type="pt",
            )
        except (ValueError, RuntimeError) as error:
            tried = type(self.pipeline).__name__ in _TRIED
            sized = bool(sampling.height or not tried)
            if isinstance(error, RuntimeError) and not (sized and _ILL_SIZED.search(str(error))):
                raise
            raise UsageError(
                f"{type(self.pipeline).__name__} with {type(self.pipeline.scheduler).__name__} cannot draw with "
                f"steps = {sampling.steps}, height = {sampling.height}, width = {sampling.width}: {first_line(error)}",
                hint="set others in [generate]; some schedulers need at least 4 steps"
                + ("" if tried else ", and some pipelines generate.batch_size = 1"),
            ) from error
        except (TypeError, AttributeError, IndexError, KeyError) as error:
            if type(self.pipeline).__name__ in _TRIED:
                raise
            raise UsageError(
                f"generate.model: a {type(self.pipeline).__name__} cannot be driven as other pipelines are: "
                f"{first_line(error)}",
                hint="take another model, or leave out generate.negative_prompt",
            ) from error
        if not hasattr(drawn, "images"):
            raise UsageError(f"{type(self.pipeline).__name__} does not draw images", hint="take another model")
        return drawn.images

    def _size(self) -> dict[str, Any]:
        """Arguments that ask for images of just the size that is wanted."""
        height, width = self.sampling.height, self.sampling.width
        if "use_resolution_binning" not in self.accepted:
            return {"height": height, "width": width} if height and "height" in self.accepted else {}
        # PixArt and Sana draw at the nearest size they were trained on and scale; Sana's own size is not its model's
        units = self.pipeline.transformer.config.get("sample_size")
        own = units * self.pipeline.vae_scale_factor if units else None  # PRX knows it by itself
        return {"height": height or own, "width": width or own, "use_resolution_binning": False}

    def _beginning(self, job: Job) -> Image.Image:
        """The real image of a job, its middle cut to the shape that is drawn and scaled to it."""
        from PIL import Image, ImageOps

        from gmail_cli.components.images import decode

        assert self._begins is not None, "nobody said where images begin"
        height, width = self.sampling.height, self.sampling.width
        if not height:
            network = getattr(self.pipeline, "unet", None) or self.pipeline.transformer
            units = network.config.get("sample_size") or self.pipeline.default_sample_size
            height = width = units * self.pipeline.vae_scale_factor
        real = decode(self._begins(job.owner), name=f"the real image {job.owner!r}")
        return ImageOps.fit(real, (width, height), method=Image.Resampling.BICUBIC)

    def _truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Whether each prompt is cut by every tokenizer of the pipeline."""
        if self.windows:
            return [self.windows.cut(prompt).truncated for prompt in prompts]
        there = [number for number in ("", "_2", "_3", "_4") if hasattr(self.pipeline, f"tokenizer{number}")]
        reading = []
        for number in there:
            tokenizer = getattr(self.pipeline, f"tokenizer{number}")
            # a tokenizer whose encoder was left out, as SD3's T5 often is, reads nothing
            if tokenizer is None or getattr(self.pipeline, f"text_encoder{number}", None) is None:
                continue
            tokenizer = _tokens(tokenizer)
            limit = min(tokenizer.model_max_length, 1 << 20)
            if self.text_length:  # the last tokenizer, T5's or a language model's, is not asked for its own
                limit = self.text_length if number == there[-1] else min(limit, self.text_length)
            reading.append((tokenizer, limit - self._told_before(tokenizer)))
        lengths = [
            [len(ids) > limit for ids in tokenizer(list(prompts), truncation=True, max_length=limit + 1).input_ids]
            for tokenizer, limit in reading
        ]
        return [bool(cut) and all(cut) for cut in zip(*lengths, strict=True)] or [False] * len(prompts)

    def _told_before(self, tokenizer: Any) -> int:
        """Tokens that stand before a prompt where it is a turn of a chat."""
        if type(self.pipeline).__name__ not in _CHATS:
            return 0
        system = getattr(self.pipeline, "system_message", None)
        turns = [{"role": "system", "content": system}] if system else []
        chat = tokenizer.apply_chat_template([*turns, {"role": "user", "content": "PROMPT"}], tokenize=False)
        return len(tokenizer(chat.rpartition("PROMPT")[0], add_special_tokens=False).input_ids)


class _Encodings:
    """Keyword arguments that give prompts to a pipeline; where the pipeline allows it, encoded once per caption.

    Captions are encoded as they come up, as many at once as a batch has rows, and kept while they are in use.
    """

    def __init__(self, sampler: Sampler, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self._sampler = sampler
        self._first = 0
        self._kept: dict[str, dict[str, Float[Tensor, "..."]]] = {}
        self._negative: dict[str, Float[Tensor, "1 ..."]] = {}

    def look_ahead(self, first: int) -> None:
        """Say that the batch which begins with job ``first`` is drawn next."""
        self._first = first

    def __call__(self, prompts: Sequence[str]) -> dict[str, Any]:
        import torch

        sampling = self._sampler.sampling
        if not self._sampler.reuses_encodings:
            given: dict[str, Any] = {"prompt": list(prompts)}
            # Qwen-Image does not guide without; its authors take one blank for none
            negative = sampling.negative_prompt or (" " if self._sampler.guidance_name == "true_cfg_scale" else "")
            if sampling.guidance > 1 and negative:
                given["negative_prompt"] = [negative] * len(prompts)
            if "max_sequence_length" in self._sampler.accepted and self._sampler.text_length:
                given["max_sequence_length"] = self._sampler.text_length
            if "clean_caption" in self._sampler.accepted:  # a rewriting that depends on the packages installed
                given["clean_caption"] = False
            return given
        missing = {prompt: None for prompt in prompts if prompt not in self._kept}
        if missing:
            kept = {prompt: self._kept[prompt] for prompt in prompts if prompt in self._kept}
            for row in range(self._first, min(self._first + self._reach, len(self.jobs))):
                if len(missing) == sampling.batch_size:
                    break
                if self.jobs[row].prompt not in kept:
                    missing[self.jobs[row].prompt] = None
            self._kept = kept | self._block(list(missing))
        names = self._kept[prompts[0]]
        encoded: dict[str, Any] = {name: torch.stack([self._kept[each][name] for each in prompts]) for name in names}
        for name, negative in self._negative.items():
            own = negative[:, : encoded[name.removeprefix("negative_")].shape[1]]  # windows as these prompts have
            encoded[name] = own.expand(len(prompts), *own.shape[1:])
        if self._negative:
            encoded["negative_prompt"] = None  # an empty text, in some pipelines, where it is not said
        return encoded

    @property
    def _reach(self) -> int:
        """How many jobs ahead captions are looked for: all that fill one block, up to 64 images of each."""
        return 64 * self._sampler.sampling.batch_size

    def _block(self, prompts: Sequence[str]) -> dict[str, dict[str, Float[Tensor, "..."]]]:
        """What captions are to the pipeline; with the first, also what guidance leads away from."""
        import torch

        pipeline, sampling = self._sampler.pipeline, self._sampler.sampling
        accepted = inspect.signature(pipeline.encode_prompt).parameters
        size = sampling.batch_size
        windows = self._sampler.windows
        if windows:
            if sampling.guidance > 1 and not self._negative:
                self._negative = windows.encode_negative(batch_size=size)
            return windows.encode(prompts, batch_size=size)
        given = {
            "prompt": _full(list(prompts), size),
            "device": pipeline._execution_device,
            "num_images_per_prompt": 1,
            **{name: None for name in ("prompt_2", "prompt_3") if name in accepted},
        }
        if "max_sequence_length" in accepted:
            given["max_sequence_length"] = self._sampler.text_length
        if "complex_human_instruction" in accepted:
            given["complex_human_instruction"] = self._sampler.accepted["complex_human_instruction"].default
        if "do_classifier_free_guidance" in accepted:
            given["do_classifier_free_guidance"] = sampling.guidance > 1 and not self._negative
            if sampling.negative_prompt:
                given["negative_prompt"] = [sampling.negative_prompt] * size
        with torch.no_grad():
            returned = pipeline.encode_prompt(**given)
        named = {
            name: each
            for name, each in zip(ENCODED[type(pipeline).__name__], returned, strict=True)
            if name and each is not None
        }
        if given.get("do_classifier_free_guidance"):
            self._negative = {name: each[:1] for name, each in named.items() if name.startswith("negative_")}
        own = {name: each for name, each in named.items() if not name.startswith("negative_")}
        return {prompt: {name: each[row] for name, each in own.items()} for row, prompt in enumerate(prompts)}


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether the GPU's memory is full, or the CPU's: torch has no class of its own for that, and oneDNN's convolutions
    only say that something could not be created."""
    import torch

    told = ("DefaultCPUAllocator", "could not create a primitive", "could not create a memory")
    return isinstance(error, torch.OutOfMemoryError) or any(each in str(error) for each in told)


def _tokens(tokenizer: Any) -> Any:
    """The tokenizer of a processor for texts and images, or one that is by itself."""
    return tokenizer.tokenizer if hasattr(tokenizer, "image_processor") else tokenizer


def _full(rows: list[Any], size: int) -> list[Any]:
    """``rows`` padded to ``size`` by repeating the last one."""
    return rows + [rows[-1]] * (size - len(rows))
