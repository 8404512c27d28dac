"""The ``gmail score`` commands: thin, over :mod:`gmail_cli.stages.score`. They print a table, or one JSON object."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gmail_cli.cli_gate import Annotations, AnnotationsOption, BaselineOption, Gate, JunitOption, ToleranceOption
from gmail_cli.progress import Progress

if TYPE_CHECKING:
    from gmail_cli.stages.score import Scored

app = typer.Typer(
    help="Score what others made, from files alone: captions, embeddings, features.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


class Meteor(str, Enum):
    """When METEOR is computed."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
RealOption = Annotated[Path, typer.Option("--real", metavar="NPY", help="Real images, one row each.")]
GeneratedOption = Annotated[
    Path, typer.Option("--generated", metavar="NPY", help="Generated images, one row each, by the same encoder.")
]


@app.command()
def captions(
    references: Annotated[Path, typer.Option(metavar="JSON", help="Reference captions in COCO's format.")],
    results: Annotated[
        Path, typer.Option(metavar="JSON", help="COCO results: a list of image_id and caption, one per image.")
    ],
    meteor: Annotated[
        Meteor, typer.Option(help="METEOR needs Java and pycocoevalcap; auto leaves it out without.")
    ] = Meteor.AUTO,
    baseline: BaselineOption = None,
    tolerance: ToleranceOption = None,
    junit: JunitOption = None,
    annotations: AnnotationsOption = None,
    as_json: JsonOption = False,
) -> None:
    """BLEU, METEOR, ROUGE-L and CIDEr of one caption per image, as the COCO evaluation defines them."""
    from gmail_cli.stages import score

    held = _Held(baseline, tolerance, junit, annotations)
    held.show(score.captions(references, results=results, meteor=meteor.value), as_json=as_json)


@app.command()
def retrieval(
    images: Annotated[Path, typer.Option(metavar="NPY", help="Image embeddings, one row each.")],
    texts: Annotated[Path, typer.Option(metavar="NPY", help="Text embeddings, one row each.")],
    owners: Annotated[Path, typer.Option(metavar="NPY", help="Integers: for each text the row of its image.")],
    extra_positives: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="NPY",
            help="Integers [pairs, 2]: all right (text row, image row) pairs of some texts; once more: of some images.",
        ),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(metavar="NAME", help="Known protocol to hold the files to, such as coco-karpathy-5k.")
    ] = None,
    true_recall: Annotated[
        bool, typer.Option("--true-recall", help="Also the share of all right answers among the first k.")
    ] = False,
    baseline: BaselineOption = None,
    tolerance: ToleranceOption = None,
    junit: JunitOption = None,
    annotations: AnnotationsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Recall at 1, 5, 10 and ranks by cosine, both ways: exact, any hit counts, ties at their expectation."""
    from gmail_cli.stages import score

    held = _Held(baseline, tolerance, junit, annotations)
    with Progress() as progress:
        ticks = progress.task("retrieval")
        found = score.retrieval(
            images,
            texts=texts,
            owners=owners,
            extra_positives=extra_positives or (),
            protocol=protocol,
            true_recall=true_recall,
            progress=ticks,
        )
    held.show(found, as_json=as_json)


@app.command()
def clipscore(
    images: Annotated[Path, typer.Option(metavar="NPY", help="Image embeddings, one row each.")],
    captions: Annotated[Path, typer.Option(metavar="NPY", help="Embedding of the caption of each image.")],
    references: Annotated[
        Path | None, typer.Option(metavar="NPY", help="Embeddings of reference captions; adds RefCLIPScore.")
    ] = None,
    owners: Annotated[
        Path | None, typer.Option(metavar="NPY", help="Integers: for each reference the row of its image.")
    ] = None,
    baseline: BaselineOption = None,
    tolerance: ToleranceOption = None,
    junit: JunitOption = None,
    annotations: AnnotationsOption = None,
    as_json: JsonOption = False,
) -> None:
    """CLIPScore and RefCLIPScore of captions, from embeddings by one CLIP."""
    from gmail_cli.stages import score

    held = _Held(baseline, tolerance, junit, annotations)
    held.show(score.clipscore(images, captions=captions, references=references, owners=owners), as_json=as_json)


@app.command()
def qa(
    questions: Annotated[
        Path, typer.Option(metavar="PATH", help="ScienceQA's folder (problems.json), or Parquet files of MMMU.")
    ],
    predictions: Annotated[
        Path, typer.Option(metavar="FILE", help="JSON Lines of question_id and text, or a JSON object id: text.")
    ],
    split: Annotated[str, typer.Option(help="Split of ScienceQA.")] = "test",
    baseline: BaselineOption = None,
    tolerance: ToleranceOption = None,
    junit: JunitOption = None,
    annotations: AnnotationsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accuracy on ScienceQA or MMMU of what a model wrote, by each benchmark's rules for reading an answer."""
    from gmail_cli.stages import score

    held = _Held(baseline, tolerance, junit, annotations)
    held.show(score.questions(questions, predictions=predictions, split=split), as_json=as_json)


@app.command()
def classification(
    train: Annotated[Path, typer.Option(metavar="NPY", help="Features of training images, one row each.")],
    train_labels: Annotated[Path, typer.Option(metavar="NPY", help="Integers from 0: the class of each.")],
    test: Annotated[Path, typer.Option(metavar="NPY", help="Features of test images, by the same encoder.")],
    test_labels: Annotated[Path, typer.Option(metavar="NPY", help="Integers: the class of each.")],
    neighbours: Annotated[int, typer.Option(min=1, metavar="K", help="Votes of the nearest neighbours.")] = 20,
    strength: Annotated[
        float, typer.Option(min=1e-9, metavar="C", help="How closely the probe fits: scikit-learn's C.")
    ] = 1.0,
    baseline: BaselineOption = None,
    tolerance: ToleranceOption = None,
    junit: JunitOption = None,
    annotations: AnnotationsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accuracy of nearest neighbours, nearest class means and a linear probe on features of labelled images."""
    from gmail_cli.stages import score

    held = _Held(baseline, tolerance, junit, annotations)
    found = score.classification(
        train,
        train_labels=train_labels,
        test=test,
        test_labels=test_labels,
        neighbours=neighbours,
        strength=strength,
    )
    held.show(found, as_json=as_json)


@app.command()
def fidelity(
    real: RealOption,
    generated: GeneratedOption,
    neighbours: Annotated[
        int, typer.Option(min=1, metavar="K", help="k of precision, recall, density and coverage.")
    ] = 5,
    baseline: BaselineOption = None,
    tolerance: ToleranceOption = None,
    junit: JunitOption = None,
    annotations: AnnotationsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Frechet and kernel distance, precision, recall, density, coverage, Vendi score of a generated set."""
    from gmail_cli.stages import score

    held = _Held(baseline, tolerance, junit, annotations)
    with Progress() as progress:
        ticks = progress.task("neighbours")
        found = score.fidelity(real, generated=generated, neighbours=neighbours, progress=ticks)
    held.show(found, as_json=as_json)


@app.command()
def gap(
    real: RealOption,
    generated: GeneratedOption,
    baseline: BaselineOption = None,
    tolerance: ToleranceOption = None,
    junit: JunitOption = None,
    annotations: AnnotationsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Modality gap: paired and centroid cosine, distances, separability; equally long files are taken as pairs."""
    from gmail_cli.stages import score

    held = _Held(baseline, tolerance, junit, annotations)
    held.show(score.gap(real, generated=generated), as_json=as_json)


class _Held:
    """The result of one command: shown, and held against a baseline where one is named."""

    def __init__(
        self,
        baseline: Path | None,
        tolerance: list[str] | None,
        junit: Path | None,
        annotations: Annotations | None,
    ) -> None:
        from gmail_cli.stages import score

        self.gate = Gate.of(baseline, tolerance, junit, annotations)
        self.before = score.read_baseline(baseline) if baseline else {}
        if self.gate is not None:
            self.gate.check(self.before)

    def show(self, found: Scored, *, as_json: bool) -> None:
        """Print it, then judge it."""
        _show(found, as_json=as_json)
        if self.gate is None:
            return
        from gmail_cli.stages import score

        now = score.comparable_metrics(found, baseline=self.before, file=self.gate.baseline)
        hint = "Allow a fall with --tolerance METRIC=POINTS."
        suite = found.protocol.partition("/")[0].replace("score-", "gmail.score.")
        self.gate.hold(now, baseline=self.before, suite=suite, title=found.protocol, hint=hint)


def _show(found: Scored, *, as_json: bool) -> None:
    document = found.document()
    if as_json:
        typer.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))
        return
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found.n.items())
    typer.echo(f"{found.protocol}: {counts}")
    width = max(map(len, found.metrics))
    for name, value in found.metrics.items():
        bounds = "".join(f"  {_number(bound):>9}" for bound in found.intervals.get(name, ()))
        typer.echo(f"  {name:{width}}  {_number(value):>9}{bounds}")
    if found.intervals:
        bootstrap = document["bootstrap"]
        typer.echo(f"right: {bootstrap['confidence']:.0%} interval, {bootstrap['resamples']} resamples by image")
    for name, setting in found.settings.items():
        typer.echo(f"{name}: {setting if isinstance(setting, str) else json.dumps(setting)}")
    for name, why in found.left_out.items():
        typer.echo(f"{name} left out: {' '.join(why.split())}")
    for note in found.notes:
        typer.echo(f"note: {note}")


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 0.001 or not value else f"{value:.2e}"
