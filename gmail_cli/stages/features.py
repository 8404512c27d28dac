"""What frozen towers make of image sets, computed once for all stages and runs that read it.

An encoder that is not trained gives an image one embedding, whichever stage asks. So those of f_r (and, once it is
aligned, of f_g) are kept under a key that names the tower's content, its arithmetic and the images' bytes, and nothing
else: every line of a sweep, ``align`` and ``train``, other runs of the same folder and all processes of ``torchrun``
read one file. The rows are always embedded in the same batches, so they are the same bytes whoever computed them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gmail_cli.artifacts import FEATURES, Artifact, Slot, StageKey, Workspace, digest_of_each
from gmail_cli.errors import InputError

if TYPE_CHECKING:
    import numpy as np

VECTORS = "vectors.npy"
CHUNK = 2048
"""Images embedded between two points to resume from; whole batches of 256."""

Embed = Callable[[int, int], "np.ndarray"]
"""``embed(start, stop)``: unit float32 embeddings of the images from ``start`` up to ``stop``, in order."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """One encoder's embeddings of a list of images.

    Attributes:
        images: SHA-256 of each image's bytes.
        what: What they are, in words: ``real images``.
        encoder: Its name, for messages.
        encoder_digest: Of its content.
        precision: Of its arithmetic.
    """

    images: tuple[str, ...]
    what: str
    encoder: str
    encoder_digest: str
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"features {self.key.digest[:12]} ({len(self.images):,} {self.what} through {self.encoder})"

    @functools.cached_property
    def key(self) -> StageKey:
        """What identifies them."""
        return StageKey(
            stage=FEATURES,
            settings={"precision": self.precision},
            inputs={"images": digest_of_each(self.images)},
            models={"encoder": self.encoder_digest},
        )


def find(wanted: Features, workspace: Workspace) -> Artifact | None:
    """The features, if they are complete in the workspace's run or another one beside it."""
    return (workspace.features or workspace).find(wanted.key, any_run=True)


def load(
    wanted: Features,
    workspace: Workspace,
    slot: Slot,
    *,
    embed: Embed,
    device: str,
    shared: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The embeddings, from disk or computed and kept.

    Args:
        wanted: Which.
        workspace: Where the stage works that asks.
        slot: What the stage makes; notes that it has read them.
        embed: Computes rows; called with ``CHUNK`` rows at a time, and not at all where they are there.
        device: Where it computes, in words, for the manifest.
        shared: All processes of ``torchrun`` ask together: each computes its share, and one writes.
        progress: Called with (images embedded, images in all).

    Returns:
        Float32 unit rows, one for each image, mapped from the file; writing to them changes a copy.

    Raises:
        InputError: The file was damaged.
    """
    import numpy as np

    from gmail_cli.components import parallel

    space = workspace.features or workspace
    artifact = find(wanted, workspace)
    tell = workspace.tell or (lambda _: None)
    tell(f"reusing {wanted}" if artifact else f"computing {wanted}")
    if shared:
        if artifact is None:
            with space.open(wanted.key, shared=True) as part:
                world = parallel.ranks()
                _fill(wanted, part, embed=embed, part=(world.rank, world.count), progress=progress)
        parallel.barrier()
    if artifact is None:
        with space.open(wanted.key) as whole:
            _fill(wanted, whole, embed=embed, part=(0, 1), progress=progress)
            artifact = whole.artifact if whole.done else _merge(wanted, whole, device=device)
    slot.note_read(artifact)
    path = artifact.file(VECTORS)
    try:
        if path.stat().st_size != artifact.files[VECTORS]["size"]:
            raise ValueError(f"{path.stat().st_size} bytes, the manifest says {artifact.files[VECTORS]['size']}")
        return np.asarray(np.load(path, mmap_mode="c" if wanted.images else None, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}", hint=f"Delete {artifact.path} and run again.") from error


def _shards(wanted: Features) -> list[range]:
    count = len(wanted.images)  # of no images there is one shard, which says how wide a row would be
    return [range(start, min(start + CHUNK, count)) for start in range(0, max(count, 1), CHUNK)]


def _fill(
    wanted: Features,
    slot: Slot,
    *,
    embed: Embed,
    part: tuple[int, int],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Compute every n-th shard that is not there; each is on disk when the next one begins."""
    import torch

    if slot.done:
        return
    number, parts = part
    for shard in _shards(wanted)[number::parts]:
        kept = slot.checkpoints(f"{shard.start:012d}")
        if not kept.exists():
            kept.save({"vectors": torch.from_numpy(embed(shard.start, shard.stop))})
        if progress:
            progress(shard.stop, len(wanted.images))


def _merge(wanted: Features, slot: Slot, *, device: str) -> Artifact:
    """Lay the shards one after another."""
    import numpy as np

    def block(shard: range) -> np.ndarray:
        tensors = slot.checkpoints(f"{shard.start:012d}").load()
        if tensors is None:
            slot.checkpoints(f"{shard.start:012d}").remove()
            hint = "Run the same command again: only that shard is embedded again."
            raise InputError(f"rows {shard.start} to {shard.stop - 1} of {wanted} are damaged", hint=hint)
        return tensors["vectors"].numpy()

    shards = _shards(wanted)
    dim = block(shards[0]).shape[1]
    blocks = (block(shard).astype(np.float32, copy=False) for shard in shards)
    slot.write_npy_blocks(VECTORS, blocks, shape=(len(wanted.images), dim), dtype="float32")
    about = {"images": len(wanted.images), "dim": dim, "what": wanted.what, "encoder": wanted.encoder}
    return slot.commit(summary=about, device=device)
