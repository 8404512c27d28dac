"""Every caption and image format, read into one ``Dataset``.

Formats: COCO captions JSON, Karpathy's ``dataset_*.json``, CSV and TSV, JSON Lines, Parquet, WebDataset tar,
plain text lines, image folders, and the built-in world of scenes.
"""

from __future__ import annotations

from gmail_cli.components.captions.reading import Format, Part, check_disjoint, read
from gmail_cli.components.captions.records import Caption, Dataset, Image, Kind
from gmail_cli.components.captions.sources import Encoded, ImageSource, inside

__all__ = [
    "Caption",
    "Dataset",
    "Encoded",
    "Format",
    "Image",
    "ImageSource",
    "Kind",
    "Part",
    "check_disjoint",
    "inside",
    "read",
]
