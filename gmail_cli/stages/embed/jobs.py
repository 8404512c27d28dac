"""One table on its way: embedded shard by shard, each whole or absent, and then laid one after another."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gmail_cli.artifacts import Artifact, Checkpoints, Slot, digest_of, digest_of_each
from gmail_cli.errors import InputError
from gmail_cli.profile import settings
from gmail_cli.profile.schema import Profile

if TYPE_CHECKING:
    import numpy as np

    from gmail_cli.components.encoders import Clip
    from gmail_cli.components.tables import Flow

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One table to make.

    Attributes:
        name: Of the table.
        count: Its rows.
        row: What is known of row i; its ``text`` is embedded unless there are images.
        clip: Gives the encoder.
        space: Digest of the joint space the vectors live in.
        encoder: Digest of the encoder.
        content: What each row is embedded from: SHA-256 of the image's bytes, or the text.
        image_bytes: Encoded bytes of image i, for a table of images.
        flow: As in the table's header.
    """

    name: str
    count: int
    row: Callable[[int], Mapping[str, Any]]
    clip: Callable[[], Clip]
    space: str
    encoder: str
    content: Callable[[], Iterable[str | None]]
    image_bytes: Callable[[int], bytes] | None = None
    flow: Flow = "text"


class Job:
    """One table on its way: shards in the slot's scratch folder, then the table; or a copy of one in ``earlier``.

    Attributes:
        key: Equal for tables with equal vectors.
        found: The artifact and the name of the table that it is copied from.
    """

    def __init__(self, wanted: Wanted, slot: Slot, profile: Profile, earlier: Sequence[Artifact]) -> None:
        self.wanted, self._slot, self._profile = wanted, slot, profile
        rows = profile.embed.shard_rows
        how = settings(profile.embed)
        arithmetic = {name: how[name] for name in ("precision", "batch_size", "shard_rows", "dtype")}
        about = {
            "images": wanted.image_bytes is not None,
            "content": digest_of_each(wanted.content()),
            "encoder": wanted.encoder,
        }
        self.key = digest_of({**about, **arithmetic})
        self.found = next(
            (
                (artifact, name)
                for artifact in earlier
                for name, key in artifact.summary.get("table_keys", {}).items()
                if key == self.key
            ),
            None,
        )
        self.shards = [range(start, min(start + rows, wanted.count)) for start in range(0, wanted.count, rows)]

    def has(self, shard: range) -> bool:
        """Whether a shard (or the table) is done."""
        return self.merged or self.found is not None or self._shard(shard).exists()

    @property
    def merged(self) -> bool:
        """Whether the table is whole: its header is written last."""
        return self._slot.has(f"{self.wanted.name}/table.json")

    def fill(self, shards: Sequence[range], *, progress: Progress | None) -> None:
        """Embed shards, each saved as soon as it is there."""
        if not shards:
            return
        import torch

        from gmail_cli.components.tables import unit_rows

        wanted = self.wanted
        for shard, (vectors, truncated) in zip(shards, self._embed(shards, progress=progress), strict=True):
            rows = [wanted.row(row) for row in shard]
            dtype = self._profile.embed.dtype
            stored = unit_rows(vectors, rows=rows, name=wanted.name, dtype=dtype, first=shard.start)
            tensors = {"vectors": torch.from_numpy(stored)}
            if truncated is not None:
                tensors["truncated"] = torch.from_numpy(truncated)
            self._shard(shard).save(tensors)

    def _embed(
        self, shards: Sequence[range], *, progress: Progress | None
    ) -> Iterable[tuple[np.ndarray, np.ndarray | None]]:
        from gmail_cli.components import embedding

        wanted, size = self.wanted, self._profile.embed.batch_size
        clip = wanted.clip()
        if wanted.image_bytes is None:
            return embedding.text_shards(
                clip, lambda row: wanted.row(row)["text"], shards, batch_size=size, progress=progress
            )
        workers = self._profile.runtime.workers
        images = embedding.image_shards(
            clip, wanted.image_bytes, shards, batch_size=size, workers=workers, progress=progress
        )
        return ((vectors, None) for vectors in images)

    def merge(self) -> None:
        """Lay the shards one after another: the table's folder, its header last."""
        import numpy as np

        from gmail_cli.components.tables import Header

        wanted, slot, dtype = self.wanted, self._slot, self._profile.embed.dtype
        clip, texts = wanted.clip(), wanted.image_bytes is None
        cut: list[np.ndarray] = []

        def blocks() -> Iterator[np.ndarray]:
            if self.found is not None:
                folder = self.found[0].folder(self.found[1])
                vectors = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
                with (folder / "rows.jsonl").open("rb") as lines:
                    for shard in self.shards:
                        if texts:
                            cut.append(np.array([json.loads(next(lines))["truncated"] for _ in shard], dtype=bool))
                        yield np.asarray(vectors[shard.start : shard.stop])
                return
            for shard in self.shards:
                tensors = self._shard(shard).load()
                if tensors is None:
                    self._shard(shard).remove()
                    hint = "Run the same command again: only that shard is embedded again."
                    raise InputError(f"rows {shard.start} to {shard.stop - 1} of {wanted.name} are damaged", hint=hint)
                if texts:
                    cut.append(tensors["truncated"].numpy())
                yield tensors["vectors"].numpy()

        def rows() -> Iterator[Mapping[str, Any]]:
            for shard, truncated in zip(self.shards, cut, strict=True):
                for row, each in zip(shard, truncated.tolist(), strict=True):
                    yield {**wanted.row(row), "truncated": each}

        header = Header(
            name=wanted.name,
            modality="text" if texts else "image",
            flow=wanted.flow,
            dim=clip.dim,
            dtype=dtype,
            count=wanted.count,
            normalised=True,
            encoder=clip.name,
            encoder_digest=clip.digest,
            space=wanted.space,
            preprocess=clip.tokenizer_digest if texts else clip.preprocess.digest,
        )
        slot.write_npy_blocks(f"{wanted.name}/vectors.npy", blocks(), shape=(wanted.count, clip.dim), dtype=dtype)
        slot.write_jsonl(f"{wanted.name}/rows.jsonl", rows() if texts else map(wanted.row, range(wanted.count)))
        slot.write_json(f"{wanted.name}/table.json", asdict(header))
        for shard in self.shards:
            self._shard(shard).remove()

    def truncated_share(self) -> float:
        """Share of the texts that were cut to the context length."""
        with self._slot.path(f"{self.wanted.name}/rows.jsonl").open("rb") as lines:
            return sum(json.loads(line)["truncated"] for line in lines) / self.wanted.count

    def _shard(self, shard: range) -> Checkpoints:
        return self._slot.checkpoints(f"shards/{self.wanted.name}/{shard.start:012d}")
