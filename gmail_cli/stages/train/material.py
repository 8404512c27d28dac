"""What tasks are built from: the profile, captions, images and the embeddings of frozen towers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gmail_cli.artifacts import Artifact, Slot, Workspace
from gmail_cli.errors import UsageError
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import features as frozen
from gmail_cli.stages import sources
from gmail_cli.stages.features import Features

if TYPE_CHECKING:
    import numpy as np
    import torch

    from gmail_cli.components.arms import Material, ViewName
    from gmail_cli.components.captions import Dataset

CHUNK = 2048
"""Images decoded between two points to resume from."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a task is built from: the profile, the data and encoders, and where to compute."""

    profile: Profile
    material: Material
    device: torch.device
    scratch: Callable[[str], Path]


def device_of(profile: Profile) -> torch.device:
    """The device to train on; torch takes as many threads as the profile says."""
    import torch

    from gmail_cli.components.compilation import require_compiler
    from gmail_cli.components.encoders import pick_device, require_precision

    if profile.runtime.threads:
        torch.set_num_threads(profile.runtime.threads)
    device = pick_device(profile.runtime.device)
    require_precision("train.precision", profile.train.precision, device=device)
    if profile.train.compile:
        require_compiler("train.compile", device=device)
        if profile.runtime.sharding != "none":
            raise UsageError(
                f"train.compile = true does not go with runtime.sharding = {profile.runtime.sharding!r}",
                hint="Set one of them to its default; processes that hold whole models compile them.",
            )
    return device


def material_of(
    profile: Profile,
    workspace: Workspace | None,
    slot: Slot | None,
    *,
    device: torch.device,
    generated: Artifact | None,
    aligned: Artifact | None,
) -> Material:
    """What is trained on; without a workspace and a slot only to ask which images it has."""
    from gmail_cli.components.arms import Material
    from gmail_cli.components.clip_files import load_clip
    from gmail_cli.components.encoders import Clip, describe_device
    from gmail_cli.components.images import GeneratedSet

    def f_g() -> Clip:
        assert aligned is not None, "plan_key has checked it"
        return load_clip(aligned.folder("clip"), device=device)

    def kept_features(view: ViewName, identities: Sequence[str], embed: frozen.Embed) -> np.ndarray:
        assert workspace is not None
        assert slot is not None
        wanted = features_of(profile, view, identities, aligned=aligned)
        return frozen.load(wanted, workspace, slot, embed=embed, device=describe_device(device))

    def kept_pixels(
        name: str, shape: tuple[int, ...], dtype: str, fill: Callable[[int, int], np.ndarray]
    ) -> np.ndarray:
        assert workspace is not None
        assert slot is not None
        first = workspace.features.open(slot.key) if workspace.features else slot
        return cached(first, name, shape, dtype, fill)

    return Material(
        read(profile),
        generated=GeneratedSet.load(generated.path) if generated else None,
        kinds=profile.train.kinds,
        f_r=lambda: load_clip(profile.model.clip, revision=profile.model.revision, device=device, seed=profile.seed),
        f_g=f_g,
        mix_ratio=profile.train.mix_ratio,
        device=device,
        workers=profile.runtime.workers,
        cache=kept_pixels,
        features=kept_features,
    )


def features_of(profile: Profile, view: ViewName, images: Sequence[str], *, aligned: Artifact | None) -> Features:
    """What names the embeddings of the images that a view shows."""
    from gmail_cli.components.clip_files import model_digest

    name, what = profile.model.clip, "real images" if view == "real" else "generated images"
    if view != "aligned":
        digest = model_digest(name, revision=profile.model.revision, seed=profile.seed)
    else:
        assert aligned is not None, "plan_key has checked it"
        name, digest = f"f_g of align/{aligned.digest[:12]}", model_digest(aligned.folder("clip"))
    return Features(images=tuple(images), what=what, encoder=name, encoder_digest=digest)


def cached(
    slot: Slot, name: str, shape: tuple[int, ...], dtype: str, fill: Callable[[int, int], np.ndarray]
) -> np.ndarray:
    """An array computed in chunks of rows, in the slot's scratch; continues where an interrupted run stopped."""
    import numpy as np
    import torch

    path, marker = slot.scratch(f"{name}.npy"), slot.checkpoints(f"{name}.done")
    held = marker.load()
    done = int(held["rows"]) if held and path.exists() else 0
    array = np.lib.format.open_memmap(path, mode="r+" if done else "w+", dtype=dtype, shape=shape)
    for start in range(done, shape[0], CHUNK):
        stop = min(start + CHUNK, shape[0])
        array[start:stop] = fill(start, stop)
        array.flush()
        marker.save({"rows": torch.tensor(stop)})
    return np.load(path, mmap_mode="c", allow_pickle=False)


@functools.lru_cache(maxsize=1)
def read(profile: Profile) -> Dataset:
    """The training set; read once for the plan and the work."""
    return sources.read(sources.source(profile, part="train"))
