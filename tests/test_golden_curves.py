"""Loss curves of the shipped models as they were when they were written down: a change of objective, schedule, order of
the data or preprocessing moves them by far more than another machine's last bits do."""

from __future__ import annotations

from pathlib import Path

import pytest

from gmail_cli import profile as profiles
from gmail_cli.artifacts import Workspace
from gmail_cli.stages import align, generate, train

GOLDEN = {
    "align": [0.34969, 0.28025, 0.12185, 0.05095],
    "clip-text, generated-aligned": [0.04059, 0.00198, 0.00097, 0.0009],
    "clipcap, generated-aligned": [1.8925, 1.21808, 0.94326, 0.85743],
    "clipcap, real": [1.8896, 1.23297, 0.99938, 0.90971],
    "linear-probe, generated-aligned": [2.28716, 2.20739, 2.12944, 2.10159],
    "linear-probe, real": [2.27878, 2.16057, 2.05376, 2.01051],
}
"""Mean loss of each ten steps."""


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_curves_are_those_written_down(tmp_path: Path) -> None:
    overrides = [
        *("data.train_limit=24", "generate.steps=2", "generate.captions_per_image=1"),
        *("align.steps=40", "align.batch_size=8", "align.validation=0", "train.steps=40", "train.batch_size=8"),
        'train.tasks=["clip-text", "clipcap", "linear-probe"]',
        'train.arms=["generated-aligned", "real"]',
        *("runtime.threads=1", "runtime.device=cpu"),
    ]
    profile = profiles.load("tiny", overrides=overrides)
    workspace = Workspace(tmp_path)
    images = generate.run(profile, workspace)
    aligned = align.run(profile, workspace, generated=images)
    trained = train.run(profile, workspace, generated=images, aligned=aligned)
    found = {"align": [row["loss"] for row in aligned.read_jsonl("metrics.jsonl")]}
    for cell in trained.read_json("cells.json"):
        found[f"{cell['task']}, {cell['arm']}"] = [
            row["loss"] for row in trained.read_jsonl(f"{cell['folder']}/metrics.jsonl")
        ]
    for name, curve in GOLDEN.items():
        assert found[name] == pytest.approx(curve, rel=1e-2, abs=1e-3), name
