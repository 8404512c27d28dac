"""What a report shows, as plain records. The numbers of its tables come from ``results`` (``gmail.results/1``)."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Picture:
    """An encoded image, as small as it is shown.

    Attributes:
        data: JPEG or PNG bytes.
        label: A few words under it.
        marked: Whether it is the one to look for: the real photograph of a row, the right answer of a query.
    """

    data: bytes
    label: str = ""
    marked: bool = False

    @property
    def uri(self) -> str:
        """The image as a ``data:`` URI."""
        kind = "png" if self.data.startswith(b"\x89PNG") else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode('ascii')}"


@dataclass(frozen=True)
class PictureRow:
    """A text, a remark on it and the pictures that belong to it."""

    text: str
    pictures: tuple[Picture, ...]
    note: str = ""


@dataclass(frozen=True)
class CaptionExample:
    """One real image, what people wrote of it and what each arm's captioner wrote."""

    picture: Picture | None
    references: tuple[str, ...]
    predictions: tuple[tuple[str, str], ...]
    """(arm, text), in the order to show."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart; ``low`` and ``high`` are empty or an interval for every ``y``."""

    arm: str
    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Chart:
    """Curves over one pair of axes; ``log_x`` marks their own positions on a logarithmic axis."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    log_x: bool = False


@dataclass(frozen=True)
class Cloud:
    """Real and generated embeddings in the plane (paper, Fig. 3); both panels of a pair share their axes."""

    title: str
    note: str
    real: Float[np.ndarray, "n 2"]
    generated: Float[np.ndarray, "m 2"]


@dataclass(frozen=True)
class Breakdown:
    """One metric split by label.

    Attributes:
        title: What is measured, by what.
        labels: The labels, one a row.
        counts: How many test images carry each label.
        arms: Arm -> one value per label, a share or a caption score.
    """

    title: str
    labels: tuple[str, ...]
    counts: tuple[int, ...]
    arms: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class RunNote:
    """One evaluation of a page over several runs: its label, where it comes from, and its metrics by full name."""

    label: str
    origin: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Histogram:
    """How the values of one column are spread.

    Attributes:
        title: What is counted.
        note: How to read it.
        kept: A value for each image that was kept.
        rejected: A value for each image that was left out.
    """

    title: str
    note: str
    kept: Float[np.ndarray, " kept"]
    rejected: Float[np.ndarray, " rejected"]


@dataclass(frozen=True)
class GeneratedReport:
    """What the page on a set of generated images shows."""

    headline: str
    facts: tuple[tuple[str, str], ...]
    histograms: tuple[Histogram, ...]
    worst: tuple[tuple[str, str, tuple[PictureRow, ...]], ...]
    """(heading, how they were chosen, rows)."""
    provenance: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Report:
    """Everything a report shows. Sections without content are left out of the page. ``captions``: by task."""

    title: str
    results: Mapping[str, Any]
    recall_charts: tuple[Chart, ...] = ()
    training_charts: tuple[Chart, ...] = ()
    clouds: tuple[Cloud, ...] = ()
    by_class: tuple[Breakdown, ...] = ()
    by_attribute: tuple[Breakdown, ...] = ()
    pairs: tuple[PictureRow, ...] = ()
    best: tuple[PictureRow, ...] = ()
    worst: tuple[PictureRow, ...] = ()
    captions: tuple[tuple[str, tuple[CaptionExample, ...]], ...] = ()
    notes: tuple[str, ...] = ()
    provenance: tuple[tuple[str, str], ...] = field(default=())
