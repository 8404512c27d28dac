"""``gmail compare``: evaluations of several runs side by side, from what each model did with each query."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gmail_cli.artifacts import MANIFEST, Artifact, Workspace
from gmail_cli.components import comparison, scores
from gmail_cli.components.comparison import Evaluation
from gmail_cli.components.metrics.intervals import USUAL, Bootstrap
from gmail_cli.components.scores import Cell
from gmail_cli.errors import InputError

_RESULTS = "results.json"


def run(
    runs: Sequence[str], *, root: Path, metrics: Sequence[str] = (), bootstrap: Bootstrap = USUAL
) -> dict[str, Any]:
    """Compare the evaluations that ``runs`` name.

    Args:
        runs: Each ``[LABEL=]RUN``: an eval artifact, a run's folder, or the name of a run below ``root`` (its latest
            evaluation), whatever else is called so where it was typed. Those that share a label are one system's
            seeds. Without a label, the run's name.
        root: Where runs are kept.
        metrics: As :func:`gmail_cli.components.comparison.compare`.
        bootstrap: Draws and level of the intervals.

    Returns:
        A ``gmail.compare/1`` document.

    Raises:
        InputError: A run has no evaluation, one is named twice, or they do not fit each other.
        UsageError: An unknown metric.
    """
    found = _read(runs, root)
    return comparison.compare([each for _, each in found], metrics=metrics, bootstrap=bootstrap)


def scale(
    runs: Sequence[str], *, root: Path, metrics: Sequence[str] = (), bootstrap: Bootstrap = USUAL
) -> dict[str, Any]:
    """The same evaluations against the number of captions that each was trained on (paper, Table 7).

    Args:
        runs: As for :func:`run`; at least two sizes.
        root: As for :func:`run`.
        metrics: As for :func:`run`.
        bootstrap: As for :func:`run`.

    Returns:
        A ``gmail.scaling/1`` document (:func:`gmail_cli.components.scaling.scaling`).

    Raises:
        InputError: As for :func:`run`; also where the models of a run are gone, or all were trained on as much.
        UsageError: An unknown metric.
    """
    from gmail_cli.components.scaling import scaling

    found = [(_captions(artifact), each) for artifact, each in _read(runs, root)]
    return scaling(found, metrics=metrics, bootstrap=bootstrap)


def report(
    runs: Sequence[str], *, root: Path, metrics: Sequence[str] = (), bootstrap: Bootstrap = USUAL
) -> dict[str, str]:
    """Evaluations side by side, to read and to print.

    Args:
        runs: As for :func:`run`.
        root: As for :func:`run`.
        metrics: As for :func:`run`.
        bootstrap: As for :func:`run`.

    Returns:
        File name -> content: ``report.html``, with curves over the number of captions where the runs were trained on
        different numbers of them, and the tables as ``report.md`` and ``report.tex``.

    Raises:
        InputError: As for :func:`run`.
        UsageError: An unknown metric.
    """
    from gmail_cli.components.report import RunNote, runs_page
    from gmail_cli.components.scaling import scaling

    found = _read(runs, root)
    document = comparison.compare([each for _, each in found], metrics=metrics, bootstrap=bootstrap)
    curves = None
    with contextlib.suppress(InputError):  # models that are gone, one size, or no model at every size
        sizes = [(_captions(artifact), each) for artifact, each in found]
        curves = scaling(sizes, metrics=metrics, bootstrap=bootstrap)
    notes = [
        RunNote(each.label, _origin(artifact), artifact.read_json(_RESULTS)["metrics"]) for artifact, each in found
    ]
    return {
        "report.html": runs_page(document, scaling=curves, notes=notes),
        "report.md": comparison.markdown(document) + "\n",
        "report.tex": comparison.latex(document) + "\n",
    }


def _origin(artifact: Artifact) -> str:
    manifest = artifact.manifest
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    about = f"{artifact.path}, {artifact.digest[:12]}, seed {manifest['key']['seed']}, made {manifest['created']}"
    return f"{about}, {manifest['machine']}; {versions}"


def _captions(artifact: Artifact) -> int:
    """How many captions the models of an evaluation were trained on."""
    digest = artifact.manifest["key"]["inputs"].get("train", "")
    folder = artifact.path.parents[1] / "train" / digest[:12]
    if not digest or not folder.is_dir():
        hint = "Evaluate a run whose train artifact is still beside it."
        raise InputError(f"{artifact.path} does not say how many captions its models were trained on", hint=hint)
    return int(Artifact.load(folder).summary["captions"])


def _named(runs: Sequence[str], root: Path) -> list[tuple[str, Artifact]]:
    """The label (empty where none is given) and the evaluation of each."""
    found: list[tuple[str, Artifact]] = []
    for text in runs:
        label, equals, ref = text.partition("=")
        if not equals or "/" in label or not label:
            label, ref = "", text
        artifact = _evaluation(ref, root)
        if any(artifact.path == other.path for _, other in found):
            raise InputError(f"{ref} names {artifact.path}, which is compared already", hint="Name each once.")
        found.append((label, artifact))
    return found


def _evaluation(ref: str, root: Path) -> Artifact:
    """The latest evaluation of a run of that name, or the one that a path leads to.

    Raises:
        InputError: There is none, or a run and a folder here are both called so.
    """
    path = Path(ref)
    here = path / "eval" / "latest" if (path / "eval" / "latest").is_dir() else path
    named = path.name == ref and not ref.startswith(".")
    latest = Workspace(root, ref).latest("eval") if named else None
    if latest is not None:
        other = Artifact.load(here, any_version=True) if (here / MANIFEST).is_file() else latest
        if other.stage == "eval" and other.digest != latest.digest:
            raise InputError(
                f"{ref!r} is a run in {root} and a folder here, with different evaluations",
                hint=f"Write {root / ref} or ./{ref}.",
            )
        return latest
    if named and not (here / MANIFEST).is_file() and not ref.endswith(".partial"):
        there = ", ".join(sorted(each.parents[1].name for each in root.glob("*/eval/latest"))) or "none"
        raise InputError(f"no evaluation of {ref!r} in {root}", hint=f"Runs that have one: {there}.")
    artifact = Artifact.load(here)
    if artifact.stage != "eval":
        raise InputError(f"{ref} was made by `gmail {artifact.stage}`", hint="Name an evaluation (gmail eval).")
    return artifact


def _read(runs: Sequence[str], root: Path) -> list[tuple[Artifact, Evaluation]]:
    """The evaluation that each names, and what is in it; without a label it bears the name of its run."""
    named = _named(runs, root)
    names = [label or artifact.path.parent.parent.name for label, artifact in named]
    return [
        (
            artifact,
            _evaluation_of(artifact, label or (name if names.count(name) == 1 else f"{name}/{artifact.digest[:6]}")),
        )
        for name, (label, artifact) in zip(names, named, strict=True)
    ]


def _evaluation_of(artifact: Artifact, label: str) -> Evaluation:
    import pyarrow.parquet as pq

    results = artifact.read_json(_RESULTS)
    cells = [
        Cell(
            task=row["task"],
            arm=row["arm"],
            seed=row["seed"],
            dual_projection=row["dual_projection"],
            scores=scores.from_parquet(pq.read_table(artifact.file(row["queries"]), partitioning=None)),
        )
        for row in results["cells"]
    ]
    return Evaluation(
        label=label,
        path=str(artifact.path),
        protocol=results["protocol"],
        test_set=results["test_set"],
        seed=results["seed"],
        cells=cells,
    )
