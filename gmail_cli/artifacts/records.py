"""What names an artifact (its key) and what a complete one holds (its manifest)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gmail_cli.artifacts import disk
from gmail_cli.artifacts.digests import canonical_json, digest_of, file_sha256
from gmail_cli.errors import InputError

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = "gmail.manifest/1"
FEATURES = "features"
"""Not a command: what frozen towers make of image sets, kept for the stages that read it."""
VERSIONS: Mapping[str, int] = {
    FEATURES: 1,
    "generate": 5,
    "align": 5,
    "train": 4,
    "embed": 4,
    "index": 2,
    "eval": 6,
}
"""The stages in order, each with its own version: raised when the same settings would give other bytes, or bytes that
other stages read in another way."""
STAGES = tuple(VERSIONS)
COMMANDS = tuple(stage for stage in STAGES if stage != FEATURES)
JOURNAL = "files.jsonl"
_PACKAGES = (
    *("gmail-cli", "torch", "torchvision", "diffusers", "transformers", "open_clip_torch", "peft", "faiss-gpu"),
    *("faiss-cpu", "numpy", "scipy", "safetensors", "pyarrow", "pillow", "pycocotools"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageKey:
    """All that determines what a stage makes.

    Attributes:
        stage: One of ``STAGES``.
        settings: The validated profile section (and other settings the stage reads), JSON-able.
        inputs: Name -> digest of each artifact or dataset read.
        models: Name -> digest or revision of each model used.
        seed: The run's seed.
        version: Of the stage, from ``VERSIONS``.
    """

    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    models: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seed: int = 0
    version: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", VERSIONS[self.stage])

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the key (64 hex digits); its first 12 name the folder."""
        return digest_of(dataclasses.asdict(self))

    def to_json(self) -> dict[str, Any]:
        """The key as it stands in the manifest."""
        return json.loads(canonical_json(dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A complete stage folder."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path, *, any_version: bool = False) -> Artifact:
        """Read a complete artifact's manifest.

        Args:
            path: Its folder.
            any_version: Also take what another version of its stage made: to list or delete it, never to read on from.

        Raises:
            InputError: Not an artifact, unfinished, its manifest cannot be read, or another version of its stage made
                it.
        """
        path = Path(path)
        file = path / MANIFEST
        if not file.is_file():
            if path.name.endswith(".partial") or (path / JOURNAL).exists():
                hint = "Run the command that made it again: it resumes where it stopped."
                raise InputError(f"{path} is unfinished", hint=hint)
            hint = "Give a stage folder such as runs/tiny/align/latest."
            raise InputError(f"{path} is not an artifact: it has no {MANIFEST}", hint=hint)
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read: {error}", hint="Delete the folder and run again.") from error
        if not isinstance(manifest, dict) or manifest.get("schema") != MANIFEST_SCHEMA:
            raise InputError(f"{file} is not a {MANIFEST_SCHEMA} manifest", hint="Delete the folder and run again.")
        artifact = cls(path.resolve(), manifest)
        if not any_version:
            artifact.require_version()
        return artifact

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return str(self.manifest["key"]["stage"])

    @property
    def digest(self) -> str:
        """The key's digest (64 hex digits)."""
        return str(self.manifest["digest"])

    @property
    def content(self) -> str:
        """SHA-256 over the payload's names and hashes: equal for equal bytes, whenever and however made."""
        return str(self.manifest["content"])

    @property
    def summary(self) -> Mapping[str, Any]:
        """What the stage said of its result."""
        return self.manifest["summary"]

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """Name -> {sha256, size} of each payload file."""
        return self.manifest["files"]

    def require_version(self) -> None:
        """Refuse what another version of its stage made: its files may mean something else.

        Raises:
            InputError: Names both versions.
        """
        made, known = self.manifest["key"].get("version"), VERSIONS.get(self.stage)
        if made != known:
            raise InputError(
                f"{self.path} was made by version {made} of `gmail {self.stage}`, and this gmail has version {known}",
                hint=f"Run `gmail {self.stage}` again: it makes a new one beside it.",
            )

    def file(self, name: str) -> Path:
        """The path of a payload file.

        Raises:
            InputError: The manifest does not list it, or it is gone.
        """
        if name not in self.files:
            hint = f"It holds: {', '.join(sorted(self.files)[:8])}."
            raise InputError(f"{self.path} has no file {name!r}", hint=hint)
        path = self.path / name
        if not path.is_file():
            hint = "Run `gmail artifacts verify` on it, delete it and run its stage again."
            raise InputError(f"{path} is missing although the manifest lists it", hint=hint)
        return path

    def folder(self, name: str) -> Path:
        """The path of a payload folder (a model's, say).

        Raises:
            InputError: The manifest lists nothing under it.
        """
        if not any(file.startswith(name + "/") for file in self.files):
            raise InputError(f"{self.path} has no folder {name!r}")
        return self.path / name

    def read_json(self, name: str) -> Any:
        """A JSON payload file's content."""
        return json.loads(self.file(name).read_text(encoding="utf-8"))

    def read_jsonl(self, name: str) -> list[dict[str, Any]]:
        """A JSON Lines payload file's rows."""
        with self.file(name).open(encoding="utf-8") as stream:
            return [json.loads(line) for line in stream if line.strip()]

    def verify(self) -> list[str]:
        """What is wrong with the folder, a sentence each; empty when every byte is as written."""
        problems = []
        for name, entry in sorted(self.files.items()):
            path = self.path / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != entry["size"]:
                problems.append(f"{name} has {path.stat().st_size} bytes, the manifest says {entry['size']}")
            elif file_sha256(path) != entry["sha256"]:
                problems.append(f"{name} has other bytes than the manifest says")
        known = {*self.files, MANIFEST}
        problems += [f"{name} is not in the manifest" for name in sorted(disk.scan(self.path)) if name not in known]
        if content_digest(self.files) != self.content:
            problems.append(f"{MANIFEST} lists other hashes than its content digest says")
        if digest_of(self.manifest["key"]) != self.digest:
            problems.append(f"{MANIFEST} has another key than its digest says")
        return problems


def content_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 over the names and hashes of payload files."""
    return digest_of({name: entry["sha256"] for name, entry in files.items()})


@functools.lru_cache(maxsize=1)
def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can move a number."""
    from importlib import metadata

    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
