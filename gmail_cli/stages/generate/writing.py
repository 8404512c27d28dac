"""Prompts that a language model writes, before anything is drawn: one log of them for each shard of the plan."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gmail_cli.artifacts import RowLog, Slot
from gmail_cli.profile.schema import Profile
from gmail_cli.stages.generate.planning import Plan, Record, device_of

if TYPE_CHECKING:
    from gmail_cli.components.rewriting import Rewriter, Wanted


class Prompts:
    """The prompts of a plan, in the slot of its artifact.

    Args:
        profile: With ``generate.rewrite``.
        plan: Its images.
    """

    def __init__(self, profile: Profile, plan: Plan) -> None:
        self._profile, self._plan = profile, plan

    @property
    def count(self) -> int:
        """How many there are to write, not counting twice those whose images lie in two shards."""
        return len(self._plan) if self._profile.generate.rewrite.per_image else self._plan.captions

    def log(self, slot: Slot, shard: range) -> RowLog:
        """What is written for a shard: rows ``{"at": place among those that it wants, "text"}``."""
        return slot.log(f"prompts/{shard.start:09d}")

    def wanted(self, rows: range) -> tuple[list[Wanted], list[int]]:
        """The prompts that some images want, each once, and which of them each image takes."""
        from gmail_cli.components.rewriting import Wanted

        own = self._profile.generate.rewrite.per_image
        places: dict[Wanted, int] = {}
        taken = [
            places.setdefault(Wanted(each.caption_id, each.caption, each.k if own else 0), len(places))
            for each in self._plan[rows.start : rows.stop]
        ]
        return list(places), taken

    def read(self, slot: Slot, shard: range) -> list[str | None]:
        """What is written for each image of a shard; None where the language model wrote nothing usable."""
        texts: dict[int, str | None] = {row["at"]: row["text"] for row in self.log(slot, shard).read()}
        return [texts[place] for place in self.wanted(shard)[1]]

    def write(
        self,
        slot: Slot,
        shards: Sequence[range],
        *,
        interrupted: Callable[[], bool],
        progress: Callable[[int, int], None] | None,
        images: tuple[int, int],
    ) -> Callable[[int, int], None] | None:
        """Write what is missing for shards, but for what another process is writing.

        The language model is loaded when there is something to write, and is gone afterwards.

        Args:
            slot: Of the artifact.
            shards: Those that are still to be drawn.
            interrupted: Whether to stop after a batch.
            progress: Called with (prompts and images done, of all).
            images: How many images are done, of how many.

        Returns:
            What to tell of the images that are drawn now: `progress`, with the prompts among what is done.

        Raises:
            KeyboardInterrupt: It was interrupted.
        """
        missing = [shard for shard in shards if not self.log(slot, shard).is_complete()]
        own = self._profile.generate.rewrite.per_image
        total = sum(len(shard) if own else self._plan.captions_in(shard) for shard in missing)
        done = 0
        rewriter: Rewriter | None = None
        for shard in missing:
            log = self.log(slot, shard)
            with log.claim() as mine:
                if not mine:
                    continue
                wanted, _ = self.wanted(shard)
                there = {row["at"] for row in log.read()}
                left = [place for place in range(len(wanted)) if place not in there]
                done += len(there)
                if left and rewriter is None:
                    rewriter = self.load()
                for batch in rewriter.write([wanted[place] for place in left]) if rewriter else ():
                    log.append({"at": left[row], "text": text} for row, text in batch)
                    done += len(batch)
                    if progress:
                        progress(images[0] + done, images[1] + total)
                    if interrupted():
                        raise KeyboardInterrupt(f"{done} of {total} prompts are there")
                log.complete()
        del rewriter
        free()
        return progress and (lambda drawn, planned: progress(drawn + done, planned + total))

    def seconds_each(self, batches: int) -> float:
        """What a prompt costs, from a few batches of the first ones, after one that is not counted."""
        generate = self._profile.generate
        size = generate.rewrite.batch_size
        images = range(min(len(self._plan), (1 + batches) * size * generate.per_caption))
        wanted = self.wanted(images)[0][: (1 + batches) * size]
        rewriter = self.load()
        list(rewriter.write(wanted[:size]))
        timed = wanted[size:] or wanted
        started = time.perf_counter()
        list(rewriter.write(timed))
        seconds = time.perf_counter() - started
        del rewriter
        free()
        return seconds / len(timed)

    def load(self) -> Rewriter:
        """The language model, ready to write."""
        from gmail_cli.components.rewriting import load_rewriter

        rewrite = self._profile.generate.rewrite
        return load_rewriter(
            rewrite.lm,
            revision=rewrite.revision,
            dtype=rewrite.dtype,
            device=device_of(self._profile),
            instruction=rewrite.instruction,
            max_tokens=rewrite.max_tokens,
            temperature=rewrite.temperature,
            batch_size=rewrite.batch_size,
            seed=self._profile.seed,
        )


def counted(records: Sequence[Record]) -> dict[str, int]:
    """``not_rewritten``: how many images were drawn from their captions because nothing usable was written; nothing
    where nothing was to be written."""
    written = [record["rewritten"] for record in records if "rewritten" in record]
    return {"not_rewritten": written.count(None)} if written else {}


def free() -> None:
    """Give back the memory of a model that nothing names any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
