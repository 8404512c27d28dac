"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: another number of threads moves the last bits of sums

import pytest
import small_pipelines
import torch

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real captions and photos that lies beside the checkout; CI must have it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        message = f"real data not found at {folder}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained Stable Diffusion: 16 px images, 32 tokens."""
    return small_pipelines.save("sd1", tmp_path_factory.mktemp("pipeline") / "sd1")


@pytest.fixture(scope="session")
def captions_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve image records of two captions each, as COCO writes them."""
    file = tmp_path_factory.mktemp("captions") / "coco.json"
    nouns = ["cat", "dog", "cow", "hen", "fox", "owl", "bee", "ant", "elk", "emu", "yak", "ape"]
    content = {
        "images": [{"id": row, "file_name": f"{row}.jpg"} for row in range(12)],
        "annotations": [
            {"id": 100 + 2 * row + turn, "image_id": row, "caption": f"{article} {noun} in a field"}
            for row, noun in enumerate(nouns)
            for turn, article in enumerate(("a", "one"))
        ],
    }
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Every test starts with one thread, like the processes it starts."""
    torch.set_num_threads(1)
