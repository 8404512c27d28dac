"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
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


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """Give every test torch's first number of threads: another number moves the last bits of sums."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
