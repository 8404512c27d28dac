"""Nearest-neighbour search over unit vectors with FAISS.

The metric is the inner product, which equals the cosine because every vector must have length 1; vectors of
other lengths are refused, for they would rank by length as well as by direction. Up to ``FLAT_LIMIT`` vectors
exact search is both faster and simpler than any approximate index. Above it, approximate ones are built, searched
harder until their recall, measured against exact search, reaches a target, and compared. That measurement wants
*text* queries: they lie outside the image distribution, and an index tuned on image queries looks better than it is.

Task metrics never come from an approximate index; see :mod:`gmail_cli.components.metrics`.
"""

from __future__ import annotations

from gmail_cli.components.search.choosing import (
    FLAT_LIMIT,
    MIB,
    Candidate,
    Limits,
    Made,
    build,
    candidates_table,
    measure_recall,
)
from gmail_cli.components.search.disk import Shards
from gmail_cli.components.search.disk import edit as edit_on_disk
from gmail_cli.components.search.indexes import (
    Hits,
    VectorIndex,
    check_unit,
    edit,
    exact,
    load,
    recall_of_each,
)
from gmail_cli.components.search.kinds import DISK_KINDS, KINDS, Kind, predicted_bytes
from gmail_cli.components.search.rows import Rows

__all__ = [
    "DISK_KINDS",
    "FLAT_LIMIT",
    "KINDS",
    "MIB",
    "Candidate",
    "Hits",
    "Kind",
    "Limits",
    "Made",
    "Rows",
    "Shards",
    "VectorIndex",
    "build",
    "candidates_table",
    "check_unit",
    "edit",
    "edit_on_disk",
    "exact",
    "load",
    "measure_recall",
    "predicted_bytes",
    "recall_of_each",
]
