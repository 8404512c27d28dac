"""Prompts longer than CLIP's text encoder reads: cut into windows, whose encodings stand one behind another.

A window is what the encoder reads at once, 77 tokens: its first token, up to 75 of the prompt, its last token, padding.
The denoiser attends to the hidden states of all windows, as in the community's long-prompt pipelines for Stable
Diffusion (diffusers' ``lpw_stable_diffusion``). A prompt of one window is encoded as diffusers encodes it.

How many windows a prompt has follows from the prompt, the settings and nothing else; a batch holds prompts of one
number of windows (`diffusion.Sampler`), so that no image depends on the length of its neighbours' prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gmail_cli.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SPLIT = (
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
    *("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
)
"""Pipelines whose denoiser attends to what CLIP makes of each token, and to no other text encoder."""
_ENDS = (".!?", ",;:")
"""Marks after which a prompt is cut, the best first; else it is cut between words."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A prompt in windows.

    Attributes:
        windows: Of each window the ids that each text encoder reads.
        truncated: Every text encoder reads only the beginning of it.
    """

    windows: tuple[tuple[list[int], ...], ...]
    truncated: bool


class Windows:
    """Encodes prompts for a pipeline, window by window.

    Args:
        pipeline: Stable Diffusion 1 or 2, or SDXL.
        most: Windows that a prompt may fill; what is longer is cut.
        negative_prompt: What guidance leads away from, cut like a prompt; None without guidance.

    Raises:
        UsageError: Another kind of pipeline.
    """

    def __init__(self, pipeline: Any, *, most: int, negative_prompt: str | None) -> None:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        there = [
            (getattr(pipeline, f"tokenizer{number}"), encoder)
            for number in ("", "_2", "_3")
            if (encoder := getattr(pipeline, f"text_encoder{number}", None)) is not None
        ]
        others = [type(each) for _, each in there if not isinstance(each, CLIPTextModel | CLIPTextModelWithProjection)]
        kind = type(pipeline).__name__
        if kind not in SPLIT or others:
            reads = f", whose {others[-1].__name__} reads long prompts as they are" if others else ""
            raise UsageError(
                f"generate.prompt_windows = {most}: prompts are split for the CLIP text encoders of Stable Diffusion "
                f"1, 2 and SDXL, not for this {kind}{reads}",
                hint="set generate.prompt_windows to 1",
            )
        self._encoders = there
        self._most = most
        self._pooled = "XL" in kind
        self._negative = negative_prompt
        self._zeros = not negative_prompt and bool(pipeline.config.get("force_zeros_for_empty_prompt"))
        self.cut = functools.lru_cache(maxsize=4096)(self._cut)
        self._least = 1 if negative_prompt is None else len(self.cut(negative_prompt).windows)

    def count(self, prompt: str) -> int:
        """Windows that a prompt is encoded in: its own, or as many as the negative prompt has."""
        return max(self._least, len(self.cut(prompt).windows))

    def encode(self, prompts: Sequence[str], *, batch_size: int) -> dict[str, dict[str, Float[Tensor, "..."]]]:
        """What each prompt is to the pipeline, by the names of its arguments.

        ``prompt_embeds``, [windows x tokens, dim]: hidden states of its `count` windows, one behind another, those
        beyond its own without text. SDXL's ``pooled_prompt_embeds``, [dim], is that of the first window.

        Args:
            prompts: What to encode.
            batch_size: Windows that a text encoder is given at once, always so many.
        """
        counts = [self.count(prompt) for prompt in prompts]
        rows = [row for prompt, count in zip(prompts, counts, strict=True) for row in self._rows(prompt, count)]
        hidden, pooled = self._hidden(rows, batch_size=batch_size)
        encoded: dict[str, dict[str, Float[Tensor, "..."]]] = {}
        at = 0
        for prompt, count in zip(prompts, counts, strict=True):
            encoded[prompt] = {"prompt_embeds": hidden[at : at + count].flatten(0, 1)}
            if pooled is not None:
                encoded[prompt]["pooled_prompt_embeds"] = pooled[at]
            at += count
        return encoded

    def encode_negative(self, *, batch_size: int) -> dict[str, Float[Tensor, "1 ..."]]:
        """What guidance leads away from, as `encode`, in as many windows as any prompt may have; the first are those of
        a shorter prompt."""
        hidden, pooled = self._hidden(self._rows(self._negative or "", self._most), batch_size=batch_size)
        negative = {"negative_prompt_embeds": hidden.flatten(0, 1)[None]}
        if pooled is not None:
            negative["negative_pooled_prompt_embeds"] = pooled[:1]
        return {name: each * 0 if self._zeros else each for name, each in negative.items()}

    def _rows(self, prompt: str, count: int) -> list[tuple[list[int], ...]]:
        """Windows of a prompt, and ones without text up to ``count``."""
        windows = self.cut(prompt).windows
        return [*windows, *self.cut("").windows * (count - len(windows))]

    def _cut(self, prompt: str) -> Cut:
        columns: list[list[list[int]]] = []
        truncated = []
        for tokenizer, _ in self._encoders:
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
            parts = cut(tokenizer.convert_ids_to_tokens(ids), room=tokenizer.model_max_length - 2, most=self._most)
            columns.append([_padded(tokenizer, ids[part.start : part.stop]) for part in parts])
            truncated.append(parts[-1].stop < len(ids))
        count = max(map(len, columns))
        for column, (tokenizer, _) in zip(columns, self._encoders, strict=True):  # another vocabulary may make fewer
            column += [_padded(tokenizer, [])] * (count - len(column))
        return Cut(tuple(zip(*columns, strict=True)), all(truncated))

    def _hidden(
        self, rows: Sequence[tuple[list[int], ...]], *, batch_size: int
    ) -> tuple[Float[Tensor, "rows tokens dim"], Float[Tensor, "rows pooled"] | None]:
        """Hidden states of windows, those of several text encoders side by side, and the last one's pooled output."""
        import torch

        sides, pooled = [], None
        for (_, encoder), column in zip(self._encoders, zip(*rows, strict=True), strict=True):
            full = [*column, *[column[-1]] * (-len(column) % batch_size)]
            ids = torch.tensor(full, device=encoder.device).split(batch_size)
            with torch.no_grad():
                read = [encoder(each, output_hidden_states=self._pooled) for each in ids]
            sides.append(torch.cat([each.hidden_states[-2] if self._pooled else each[0] for each in read])[: len(rows)])
            pooled = torch.cat([each[0] for each in read])[: len(rows)] if self._pooled else None
        return torch.cat(sides, dim=-1), pooled


def _padded(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """A window of so many ids of a prompt."""
    full = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return full + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(full))


def cut(tokens: Sequence[str], *, room: int, most: int) -> list[range]:
    """Where windows begin and end.

    A window is full unless a sentence, a clause or at least a word ends among its last tokens, 20 of 75: then it ends
    there, as long as the prompt still fits.

    Args:
        tokens: Of the prompt, as CLIP's tokenizer writes them.
        room: Tokens that fit a window.
        most: Windows; what is beyond them is left out.
    """
    parts: list[range] = []
    start = 0
    while len(tokens) - start > room and len(parts) < most - 1:
        least = max(start + room - 20 * room // 75, len(tokens) - (most - len(parts) - 1) * room)
        stop = _last_end(tokens, range(start + room, least - 1, -1)) or start + room
        parts.append(range(start, stop))
        start = stop
    return [*parts, range(start, min(start + room, len(tokens)))]


def _last_end(tokens: Sequence[str], stops: range) -> int:
    """The best of several places to end a window, the first of equals; 0 where a word goes on at each."""
    ends = [(stop, token.removesuffix("</w>")[-1:]) for stop in stops if (token := tokens[stop - 1]).endswith("</w>")]
    for marks in _ENDS:
        if found := [stop for stop, last in ends if last and last in marks]:
            return found[0]
    return ends[0][0] if ends else 0
