"""``gmail eval``: every trained model on real test images, against its rivals, with intervals and a report.

All models are tested on the same real images through f_r. What a model did with each query is kept (``ranks/``,
``queries/``, ``predictions/``), so that any later question about the numbers can be answered from the artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gmail_cli.artifacts import Artifact, StageKey, Workspace, digest_of, file_sha256
from gmail_cli.components import gate, report
from gmail_cli.components import scores as scoring
from gmail_cli.components.metrics.intervals import Bootstrap
from gmail_cli.errors import InputError
from gmail_cli.profile import require_file, settings
from gmail_cli.profile.schema import Profile
from gmail_cli.stages.evaluate.captioners import questions
from gmail_cli.stages.evaluate.inputs import Inputs
from gmail_cli.stages.evaluate.models import Measured, extra_positives
from gmail_cli.stages.evaluate.shown import shown

RESULTS = "results.json"

Progress = Callable[[int, int], None]


def plan_key(
    profile: Profile,
    *,
    embeddings: str,
    train: str | None = None,
    aligned: str | None = None,
    generated: str | None = None,
    index: str | None = None,
) -> StageKey:
    """What `run` would make from the artifacts with these digests."""
    inputs = {"embeddings": embeddings, "train": train, "aligned": aligned, "generated": generated, "index": index}
    chosen = settings(profile.eval)
    if profile.eval.extra_positives:
        inputs["extra_positives"] = digest_of(extra_positives(profile))
    for asked in questions(profile):
        files = [require_file(str(file), key="eval.questions") for file in asked.files]
        inputs[asked.benchmark] = digest_of([file_sha256(file) for file in files])
    unasked = () if profile.eval.questions else ("question_split", "answer_tokens")
    for name in ("extra_positives", "questions", *unasked):
        del chosen[name]
    return StageKey(
        stage="eval",
        settings=chosen,
        inputs={name: digest for name, digest in inputs.items() if digest is not None},
        seed=profile.seed,
    )


def run(
    profile: Profile,
    workspace: Workspace,
    *,
    embeddings: Artifact,
    train: Artifact | None = None,
    aligned: Artifact | None = None,
    generated: Artifact | None = None,
    index: Artifact | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Measure every model there is, and write results and report.

    Args:
        profile: Sections used: ``eval``, ``data``, ``runtime``; and ``name``, ``seed``.
        workspace: Where the artifact goes.
        embeddings: Test images and texts, and what the trained models make of the texts.
        train: The trained models. Without it, CLIP is measured as it came.
        aligned: For the training curve of f_g.
        generated: For rows of real and generated images of one caption, and the check for leaks.
        index: For what the report says of the search index.
        progress: Called with (models done, models in all).

    Returns:
        The artifact: ``results.json`` (``gmail.results/1``), ``report.html``, ``report.md``, ``report.tex``,
        ``ranks/*.npy``, ``queries/*.parquet`` and ``predictions/*.json`` (captions; answers as ``gmail score qa`` reads
        them). Its summary has the ``verdict``.

    Raises:
        InputError: Tables that do not fit each other, or training data that hold test data.
        SetupError: METEOR is required and this machine lacks Java.
    """
    others = {"train": train, "aligned": aligned, "generated": generated, "index": index}
    there = {name: artifact for name, artifact in others.items() if artifact}
    key = plan_key(profile, embeddings=embeddings.digest, **{name: a.digest for name, a in there.items()})
    with workspace.open(key) as slot:
        if slot.done:
            return slot.artifact
        given = Inputs(profile, {"embeddings": embeddings, **there})
        given.check_leaks()
        measured = Measured(given, slot)
        models = list(measured.models())
        if profile.eval.questions and not any(model.task == "llava" for model in models):
            hint = "Train a cell of task llava, or leave eval.questions empty."
            raise InputError(f"eval.questions = {list(profile.eval.questions)}: no model here answers them", hint=hint)
        cells = []
        for done, model in enumerate(models):
            if progress:
                progress(done, len(models))
            cells.append(measured.measure(model))
            measured.keep(model, cells[-1])
        cells += measured.gap()
        if not any(cell.scores for cell in cells):
            raise InputError(
                f"{embeddings.path} holds nothing to measure: its images have neither captions nor labels"
                + "".join(f"\n  {note}" for note in given.notes),
                hint="Embed a set with captions or labels, or search it: gmail index, gmail search.",
            )
        results = scoring.results(
            cells,
            protocol=given.origins["protocol"],
            bootstrap=Bootstrap(draws=profile.eval.resamples, level=profile.eval.confidence),
            test_set=given.test_set_digest(),
            seed=profile.seed,
        )
        results |= {"cells": measured.kept, **({"zero_shot": measured.zero_shot} if measured.zero_shot else {})}
        slot.write_json(RESULTS, results)
        page = shown(measured, results)
        slot.write_text("report.html", report.html(page))
        slot.write_text("report.md", report.markdown(page))
        slot.write_text("report.tex", report.latex_tables(results))
        if progress:
            progress(len(models), len(models))
        headline = report.verdict(results).headline
        return slot.commit(
            summary={"verdict": headline, "protocol": results["protocol"], "metrics": results["metrics"]}
        )


def read_baseline(baseline: Path) -> dict[str, Any]:
    """The ``results.json`` of an earlier evaluation, or of its artifact's folder.

    Raises:
        InputError: It cannot be read, or is something else.
    """
    file = baseline / RESULTS if baseline.is_dir() else baseline
    return gate.read(file, schema=scoring.SCHEMA, hint="Give the results.json of an eval.")


def comparable_metrics(artifact: Artifact, *, baseline: Mapping[str, Any], file: Path) -> dict[str, float]:
    """The metrics of an evaluation, to hold against a baseline.

    Args:
        artifact: What ``run`` made.
        baseline: What ``read_baseline`` read from ``file``.
        file: For the message.

    Raises:
        InputError: The baseline was measured with another protocol or on another test set.
    """
    now = artifact.read_json(RESULTS)
    gate.require_same(now, baseline=baseline, file=file, keys=("protocol", "test_set"))
    return dict(now["metrics"])
