"""Several generators that share the images of one set.

Which generator draws an image depends on the seed, the caption and k. Each generator's images are an artifact of their
own, drawn like any other, one generator after another; the mixture takes them over in the order of the plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from gmail_cli.artifacts import Artifact, StageKey, Waiting, Workspace, canonical_json
from gmail_cli.profile.schema import Profile
from gmail_cli.stages.generate.choosing import adopt_all
from gmail_cli.stages.generate.drawing import Progress, Work
from gmail_cli.stages.generate.planning import RECORDS, Part, Plan, Record, generators, planned_images, read, weights_of
from gmail_cli.stages.generate.writing import counted


class Mixture:
    """What a profile with ``generate.mix`` asks for, and the making of it: the work of each of its generators."""

    def __init__(self, profile: Profile) -> None:
        import numpy as np

        dataset = read(profile)
        self.plan = planned_images(profile, dataset)
        alone = generators(profile.generate)
        edges = np.cumsum([each.share for each in profile.generate.mix])
        places = np.fromiter(_places(self.plan, seed=profile.seed), float, count=len(self.plan))
        self._chosen = np.searchsorted(edges / edges[-1], places, side="right")
        self.works = {
            name: Work(
                profile.model_copy(update={"generate": generate}),
                dataset=dataset,
                plan=Part(self.plan, np.flatnonzero(self._chosen == number)),
            )
            for number, (name, generate) in enumerate(alone.items())
            if (self._chosen == number).any()
        }
        self._names = list(alone)
        shares = {each.name: each.share for each in profile.generate.mix}
        self.key = StageKey(
            stage="generate",
            settings={
                "source": "pipeline",
                "name": profile.generate.name or "mix",
                "mix": {name: {**work.key.settings, "share": shares[name]} for name, work in self.works.items()},
            },
            inputs={
                "captions": self.plan.digest(),
                **{f"images of {name}": work.key.digest for name, work in self.works.items()},
            },
            models={
                f"{name}/{kind}": digest
                for name, work in self.works.items()
                for kind, digest in work.key.models.items()
            },
            seed=profile.seed,
        )

    def make(self, workspace: Workspace, *, progress: Progress | None) -> Artifact:
        """Draw the images of each generator, and put them together."""
        made: dict[str, Artifact] = {}
        before, left = 0, len(self.plan)
        for name, work in self.works.items() if workspace.find(self.key) is None else ():
            left -= len(work.plan)
            own = _Own(progress, before, left, count=len(work.plan))
            made[name] = work.make(workspace, progress=progress and own)
            work.unload()
            before += own.count
        return self._merge(workspace, made)

    def make_part(
        self, workspace: Workspace, *, part: tuple[int, int], progress: Progress | None
    ) -> Artifact | Waiting:
        """Draw one part of the images of each generator; whoever finds all there puts them together."""
        made: dict[str, Artifact] = {}
        done = shards = 0
        for name, work in self.works.items():
            found = work.make_part(workspace, part=part, progress=progress)
            work.unload()
            shards += len(work.shards)
            done += found.done if isinstance(found, Waiting) else len(work.shards)
            if not isinstance(found, Waiting):
                made[name] = found
        return Waiting(self.key, done, shards) if done < shards else self._merge(workspace, made)

    def _merge(self, workspace: Workspace, made: dict[str, Artifact]) -> Artifact:
        with workspace.open(self.key) as slot:
            if slot.done:
                return slot.artifact
            records: dict[str, list[Record]] = {}
            for name, artifact in made.items():
                records[name] = artifact.read_jsonl(RECORDS)
                adopt_all(slot, artifact, records[name])
            turns = {name: iter(each) for name, each in records.items()}
            slot.write_jsonl(RECORDS, (next(turns[self._names[number]]) for number in self._chosen.tolist()))
            every = [record for each in records.values() for record in each]
            summary = {
                "images": len(self.plan),
                "captions": self.plan.captions,
                "owners": self.plan.owners,
                "truncated_share": sum(record["truncated"] for record in every) / len(every),
                "redrawn": sum(record["attempt"] > 0 for record in every),
                **counted(every),
                "generator": self.key.settings["name"],
                "generators": {name: len(each) for name, each in records.items()},
                "weights": {
                    f"{name}/{kind}": place
                    for name, work in self.works.items()
                    for kind, place in weights_of(work.profile.generate).items()
                },
            }
            devices = sorted({str(artifact.manifest["device"]) for artifact in made.values()})
            return slot.commit(summary=summary, device=", ".join(devices))


@dataclass
class _Own:
    """Progress of one generator: of what it counts, its images or also its prompts, ``before`` are done already, and
    ``left`` images come after ``count`` of its own."""

    whole: Progress | None
    before: int
    left: int
    count: int

    def __call__(self, done: int, total: int) -> None:
        self.count = total
        if self.whole:
            self.whole(self.before + done, self.before + total + self.left)


def _places(plan: Plan, *, seed: int) -> Iterator[float]:
    """Where each image falls among the shares, in [0, 1): 53 bits of SHA-256 over (seed, caption id, caption, k)."""
    for row in range(len(plan) // plan.per_caption):
        caption_id, caption, *_ = plan.about(row)
        head = canonical_json(["mix", seed, caption_id, caption])[:-1]
        for k in range(plan.per_caption):
            digest = hashlib.sha256(f"{head},{k}]".encode()).digest()
            yield (int.from_bytes(digest[:8], "big") >> 11) / 2**53
