"""Where a run's artifacts lie: opening, finding, listing and deleting them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from gmail_cli.artifacts import disk
from gmail_cli.artifacts.records import COMMANDS, MANIFEST, STAGES, Artifact, StageKey
from gmail_cli.artifacts.slot import Slot
from gmail_cli.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Workspace:
    """The folder all results live under.

    Attributes:
        root: ``runs`` by default.
        run: Name of the run: a folder below ``root``.
        tell: Called with a sentence for whoever waits: another process holds the wanted folder, features are reused.
        features: Where features are kept and looked for, and what is shared of an unfinished stage, when not here (the
            first process's, under ``torchrun``).
    """

    root: Path = Path("runs")
    run: str = "default"
    tell: Callable[[str], None] | None = None
    features: Workspace | None = None

    def __post_init__(self) -> None:
        if not self.run or self.run in {".", ".."} or "/" in self.run or "\\" in self.run or self.run.startswith("."):
            raise UsageError(f"run name {self.run!r} is not a plain folder name", hint="Use letters, digits, - and _.")

    def folder(self, stage: str) -> Path:
        """Where a stage's artifacts lie."""
        return self.root / self.run / stage

    def open(self, key: StageKey, *, shared: bool = False) -> Slot:
        """The slot for a key, to be used as a context manager (it holds the lock).

        Args:
            key: What to make.
            shared: Any number of processes may hold the slot together, each saving other checkpoints. One that opens
                it alone, to merge and commit them, waits until they have gone.
        """
        return Slot(self, key, tell=self.tell, shared=shared)

    def find(self, key: StageKey, *, any_run: bool = False) -> Artifact | None:
        """The complete artifact of a key, if there is one; with ``any_run`` also in the other runs of ``root``."""
        return self.get(key.stage, key.digest, any_run=any_run)

    def get(self, stage: str, digest: str, *, any_run: bool = False) -> Artifact | None:
        """The complete artifact with a digest, if there is one; with ``any_run`` also in the other runs of ``root``."""
        name = digest[:12]
        others = sorted(self.root.glob(f"*/{stage}/{name}")) if any_run else ()
        paths = [self.folder(stage) / name, *others]
        return next((Artifact.load(path) for path in paths if (path / MANIFEST).is_file()), None)

    def is_partial(self, key: StageKey) -> bool:
        """Whether an interrupted attempt at the key is there to resume."""
        return (self.folder(key.stage) / f"{key.digest[:12]}.partial").is_dir()

    def latest(self, stage: str, *, any_version: bool = False) -> Artifact | None:
        """The artifact a stage completed or reused last; see :meth:`Artifact.load`."""
        path = self.folder(stage) / "latest"
        return Artifact.load(path, any_version=any_version) if (path / MANIFEST).is_file() else None

    def artifacts(self) -> list[Artifact]:
        """Every complete artifact of the run, of whatever version, by stage and time."""
        found = [
            Artifact.load(path, any_version=True)
            for stage in STAGES
            for path in sorted(self.folder(stage).glob("*"))
            if path.name != "latest" and not path.name.endswith(".partial") and (path / MANIFEST).is_file()
        ]
        return sorted(found, key=lambda each: (STAGES.index(each.stage), each.manifest["created"]))

    def garbage(self) -> list[Path]:
        """Folders of the run that nothing needs and no living process writes: unfinished ones, and complete ones that
        neither ``latest`` (of a command) nor an input of something kept refers to, and that nothing kept has read, in
        this run or another of the same root."""
        return list(self._garbage())

    def collect_garbage(self) -> list[Path]:
        """Delete :meth:`garbage`.

        Returns:
            The folders deleted.
        """
        removed = []
        for path in self._garbage():
            shutil.rmtree(path)
            removed.append(path)
        return removed

    def _garbage(self) -> Iterator[Path]:
        """Each folder of :meth:`garbage`, with its lock held while the caller looks at it."""
        runs = [Workspace(self.root, path.name) for path in sorted(self.root.glob("[!.]*")) if path.is_dir()]
        artifacts = {artifact.digest: artifact for run in runs for artifact in run.artifacts()}
        wanted = [
            latest.digest for run in runs for stage in COMMANDS if (latest := run.latest(stage, any_version=True))
        ]
        kept: set[str] = set()
        while wanted:
            digest = wanted.pop()
            if digest in artifacts and digest not in kept:
                kept.add(digest)
                wanted += artifacts[digest].manifest["key"]["inputs"].values()
                wanted += artifacts[digest].manifest.get("read", ())
        unfinished = [path for stage in STAGES for path in sorted(self.folder(stage).glob("*.partial"))]
        for path in unfinished + [artifact.path for artifact in self.artifacts() if artifact.digest not in kept]:
            lock = disk.Lock(self.root / self.run / ".locks" / f"{path.parent.name}-{path.name[:12]}", None)
            if lock.try_acquire():
                try:
                    yield path
                finally:
                    lock.release()
