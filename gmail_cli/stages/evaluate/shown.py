"""What the report of an evaluation shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from gmail_cli.components import measure, report
from gmail_cli.components.report import gallery
from gmail_cli.stages import sources
from gmail_cli.stages.evaluate.inputs import IMAGES, TEXTS, Inputs
from gmail_cli.stages.evaluate.models import BROKEN_DOWN, GAP_ARMS, GAP_REAL, Measured

EXAMPLE_ARMS = ("generated-aligned", "real", "generated-naive", "none")
"""Whose retrievals the report shows: the first there is."""


def shown(measured: Measured, results: Mapping[str, Any]) -> report.Report:
    """Everything the report shows of ``results``, and of what the models did."""
    given, seen = measured.given, measured.seen
    chosen = given.profile.eval
    gap = [given.tables.get(name) for name in (GAP_REAL, *(f"gap-{arm}" for arm in GAP_ARMS))]
    vectors = [
        np.asarray(table.vectors[measure.gap_rows(table)], dtype=np.float32) for table in gap if table is not None
    ]
    best, worst = _retrievals(measured)
    return report.Report(
        title=f"GMAIL on {given.profile.name}",
        results=results,
        recall_charts=gallery.recall_charts(seen.ranks, most=max(chosen.recall_at)) if seen.ranks else (),
        training_charts=tuple(_curves(given)),
        clouds=gallery.clouds(vectors[0], naive=vectors[1], aligned=vectors[2]) if len(vectors) == 3 else (),
        by_class=tuple(_by_class(measured)),
        by_attribute=tuple(_by_attribute(measured)),
        pairs=_pairs(given),
        best=best,
        worst=worst,
        captions=tuple(_captions(measured)) if chosen.examples else (),
        notes=tuple(given.notes),
        provenance=tuple(_provenance(measured)),
    )


def _retrievals(measured: Measured) -> tuple[tuple[report.PictureRow, ...], tuple[report.PictureRow, ...]]:
    given, retrievals = measured.given, measured.seen.retrievals
    arm = next((arm for arm in EXAMPLE_ARMS if arm in retrievals), None)
    if arm is None or given.test is None:
        return (), ()
    model, found = retrievals[arm]
    images, texts = given.images(model), given.table(TEXTS, model)
    assert texts is not None, "it has been measured"
    rows = found.rows["short"][found.ranks["short"].text_to_image.query]
    return gallery.retrievals(
        np.asarray(images.vectors, dtype=np.float32),
        texts=np.asarray(texts.vectors[rows], dtype=np.float32),
        image_ids=images.ids,
        captions=[texts.rows[row]["text"] for row in rows],
        ranks=found.ranks["short"].text_to_image,
        thumbnails=given.thumbnail,
        note=f"{model.task}, {model.arm}" + (f", seed {model.seed}" if model.seed is not None else ""),
        count=given.profile.eval.examples,
    )


def _captions(measured: Measured) -> Iterator[tuple[str, tuple[report.CaptionExample, ...]]]:
    """For each captioning task the same test images, with what every arm says of them."""
    given = measured.given
    for task, predictions in measured.seen.predictions.items():
        examples = gallery.caption_examples(
            list(next(iter(predictions.values()))),
            references=given.references(),
            predictions=predictions,
            thumbnails=given.thumbnail,
            count=given.profile.eval.examples,
        )
        yield report.task_title(task), examples


def _broken_down(measured: Measured) -> Iterator[tuple[str, dict[str, Float[np.ndarray, " images"]]]]:
    """A title for each metric to break down, and what each arm reached on each test image, averaged over seeds."""
    for metric in BROKEN_DOWN:
        for (task, name), by_arm in measured.seen.by_image.items():
            if name == metric:
                title = f"{report.task_title(task)}: {report.metric_label(metric)}"
                yield title, {arm: np.mean(found, axis=0) for arm, found in by_arm.items()}


def _by_class(measured: Measured) -> Iterator[report.Breakdown]:
    labels = [row.get("label") for row in measured.given.tables[IMAGES].rows]
    for title, values in _broken_down(measured) if None not in labels else ():
        if found := gallery.breakdown(title, labels=list(map(str, labels)), values=values):
            yield found


def _by_attribute(measured: Measured) -> Iterator[report.Breakdown]:
    given = measured.given
    if given.test is None:
        return
    attributes = [dict(given.test.images[given.places[name]].attributes) for name in given.tables[IMAGES].ids]
    for title, values in _broken_down(measured):
        if found := gallery.attribute_breakdown(title, attributes=attributes, values=values):
            yield found


def _pairs(given: Inputs) -> tuple[report.PictureRow, ...]:
    if given.generated is None or not given.profile.eval.examples:
        return ()
    training = sources.read(given.origins["train"])
    chosen = given.profile.eval
    return gallery.pairs(given.generated, real=training, count=chosen.examples, side=chosen.thumbnail)


def _curves(given: Inputs) -> Iterator[report.Chart]:
    if "aligned" in given.artifacts:
        curve = given.artifacts["aligned"].read_jsonl("metrics.jsonl")
        if chart := gallery.training_chart("Alignment: f_g", {"generated-aligned": curve}):
            yield chart
    by_task: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in given.artifacts["train"].read_json("cells.json") if "train" in given.artifacts else []:
        if not row["dual_projection"]:
            curves = by_task.setdefault(row["task"], {})
            if row["arm"] not in curves:
                curves[row["arm"]] = given.artifacts["train"].read_jsonl(f"{row['folder']}/metrics.jsonl")
    for task, curves in by_task.items():
        if chart := gallery.training_chart(f"{report.task_title(task)}, first seed", curves):
            yield chart


def _provenance(measured: Measured) -> Iterator[tuple[str, str]]:
    given = measured.given
    yield "profile", given.profile.name
    yield "protocol", given.origins["protocol"]
    yield "evaluation", measured.slot.key.digest
    for name, artifact in given.artifacts.items():
        manifest = artifact.manifest
        made = f"made {manifest['created']} in {manifest['seconds']:.0f} s"
        yield (
            f"{name} ({artifact.stage})",
            f"{artifact.digest[:12]}, {made}, {manifest['machine']}, {manifest['device']}",
        )
    if "index" in given.artifacts:
        for name, entry in given.artifacts["index"].read_json("index.json")["tables"].items():
            yield f"index of {name}", f"{entry['kind']}, recall@10 {entry['recall_at_10']:.4f} against exact search"
    yield "seed", str(given.profile.seed)
    images = given.tables[IMAGES].header
    yield (
        "image encoder",
        f"{images.encoder}, {images.encoder_digest[:12]}, {images.dim} dimensions, {images.dtype}",
    )
    versions = given.artifacts["embeddings"].manifest["versions"]
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
