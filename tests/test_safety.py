"""Safety checkers on stored images: what each says, which images are kept, checkers that cannot be loaded."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_checkers
import small_pipelines
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gmail_cli.artifacts import Workspace
from gmail_cli.components import pipelines, quality, safety
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import build
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import generate
from gmail_cli.stages.generate import exporting

IMAGES = 40
"""More than a checker sees at once."""


def photo(seed: int) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).resize((48, 40), Image.Resampling.BICUBIC).save(stream, "JPEG")
    return stream.getvalue()


PHOTOS = [photo(seed) for seed in range(IMAGES)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkers and a pipeline."""
    root = tmp_path_factory.mktemp("models")
    small_checkers.classifier(root / "classifier")
    small_checkers.safety_checker(root / "checker")
    small_pipelines.save("sd1", root / "sd1")
    weights = load_file(root / "checker" / "model.safetensors")
    cosines = torch.tensor([_cosines(root / "checker", weights["concept_embeds"], data) for data in PHOTOS])
    weights["concept_embeds_weights"] = cosines.quantile(0.97, dim=0)  # some images are above one of 17 thresholds
    save_file(weights, root / "checker" / "model.safetensors", metadata={"format": "pt"})
    return root


@torch.no_grad()
def _cosines(folder: Path, concepts: torch.Tensor, data: bytes) -> list[float]:
    """Of an image with each concept, by the parts of the model."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    model = StableDiffusionSafetyChecker.from_pretrained(folder)
    processor = CLIPImageProcessor.from_pretrained(folder)
    seen = processor(Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="pt").pixel_values
    embedded = model.visual_projection(model.vision_model(seen)[1])
    return torch.cosine_similarity(embedded, concepts).tolist()


def scores(folder: Path, *, label: str = "", rows: range = range(IMAGES)) -> list[float]:
    return safety.load_checker(str(folder), label=label).score(PHOTOS.__getitem__, rows, workers=2)


def test_the_safety_checker_says_yes_or_no_as_its_thresholds_do(folder: Path, tmp_path: Path) -> None:
    found = scores(folder / "checker")
    weights = load_file(folder / "checker" / "model.safetensors")
    margins = [
        np.max(
            np.array(_cosines(folder / "checker", weights["concept_embeds"], data))
            - weights["concept_embeds_weights"].numpy()
        )
        for data in PHOTOS
    ]
    sure = [at for at, margin in enumerate(margins) if abs(margin) > 1e-3]  # it rounds to three places
    assert len(sure) > IMAGES / 2
    assert [found[at] for at in sure] == [float(margins[at] > 0) for at in sure]
    assert set(found) == {0.0, 1.0}
    assert scores(folder / "checker", rows=range(35, 37)) == found[35:37], "whatever is beside an image"

    published = {  # as transformers 4 wrote it
        name.replace("vision_model.", "vision_model.vision_model.", 1): value for name, value in weights.items()
    }
    inside = tmp_path / "pipeline"  # and where: beside the other parts of a pipeline
    (inside / "feature_extractor").mkdir(parents=True)
    (inside / "safety_checker").mkdir()
    (inside / "model_index.json").write_text("{}")
    save_file(published, inside / "safety_checker" / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folder / "checker" / "config.json", inside / "safety_checker")
    shutil.copy(folder / "checker" / "preprocessor_config.json", inside / "feature_extractor")
    assert scores(inside) == found


def test_a_classifier_says_how_likely_the_label_is(folder: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    found = scores(folder / "classifier", label="nsfw")
    asked = pipeline("image-classification", model=str(folder / "classifier"))
    for value, data in zip(found, PHOTOS, strict=True):
        (told,) = (row["score"] for row in asked(Image.open(io.BytesIO(data))) if row["label"] == "nsfw")
        assert value == pytest.approx(told, abs=1e-5)
    assert max(found) - min(found) > 0.1
    assert scores(folder / "classifier", label="normal") == pytest.approx([1 - value for value in found], abs=2e-6)
    assert scores(folder / "classifier", label="nsfw", rows=range(3, 4)) == found[3:4]
    several = tmp_path / "several"
    shutil.copytree(folder / "classifier", several)
    config = json.loads((several / "config.json").read_text())
    (several / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    both = [scores(several, label=label) for label in ("normal", "nsfw")]
    assert max(abs(one + other - 1) for one, other in zip(*both, strict=True)) > 0.01, "each label by itself"


def test_what_is_no_checker_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unsafe_label = 'porn' is no class of") as refused:
        scores(folder / "classifier", label="porn")
    assert refused.value.hint == "it has: 'normal', 'nsfw'"
    with pytest.raises(UsageError, match="unsafe_label = 'nsfw': Stable Diffusion's safety checker has no classes"):
        scores(folder / "checker", label="nsfw")
    with pytest.raises(InputError, match="is no safety checker or image classifier"):
        scores(tmp_path)
    headless = tmp_path / "headless"
    shutil.copytree(folder / "classifier", headless)
    weights = load_file(headless / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"its weights lack classifier\.weight"):
        scores(headless, label="nsfw")
    (headless / "model.safetensors").rename(headless / "pytorch_model.bin")
    with pytest.raises(InputError, match="headless"):
        scores(headless, label="nsfw")
    with pytest.raises(InputError, match=r"safety_checker = '\./none' does not exist"):
        safety.locate("./none")
    for wrong in ({"max_unsafe": 0.5}, {"unsafe_label": "nsfw"}):
        with pytest.raises(UsageError, match=f"{next(iter(wrong))}.*no effect without safety_checker"):
            build({"generate": wrong})


def profile_for(folder: Path, **changed: Any) -> Profile:
    chosen = {"model": str(folder / "sd1"), "steps": 1, "guidance": 2.0, "batch_size": 4, "per_caption": 2}
    chosen |= {"safety_checker": str(folder / "classifier"), "unsafe_label": "nsfw"}
    return build({"data": {"train": "scenes:train", "train_limit": 4}, "generate": chosen | changed})


def test_unsafe_images_are_counted_and_left_out_without_drawing_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path / "runs")
    plain = generate.run(profile_for(folder, safety_checker="", unsafe_label=""), workspace)
    monkeypatch.setattr(pipelines, "load_pipeline", None)
    scored_only = generate.run(profile_for(folder, safety_checker="", unsafe_label="", score=True), workspace)
    checked = generate.run(profile_for(folder), workspace)
    assert generate.plan_key(profile_for(folder)).digest == checked.digest
    rows = checked.read_jsonl("records.jsonl")
    assert [{name: value for name, value in row.items() if name != "unsafe"} for row in rows] == scored_only.read_jsonl(
        "records.jsonl"
    )
    contents = [plain.file(row["path"]).read_bytes() for row in rows]
    checker = safety.load_checker(str(folder / "classifier"), label="nsfw")
    assert [row["unsafe"] for row in rows] == checker.score(contents.__getitem__, range(len(rows)))
    values = sorted(row["unsafe"] for row in rows)
    assert checked.summary["unsafe"]["mean"] == pytest.approx(np.mean(values), abs=1e-6)
    assert "Unsafe" in checked.file("report.html").read_text()
    assert "Unsafe" not in scored_only.file("report.html").read_text()

    line = values[len(values) // 2]
    safe = generate.run(profile_for(folder, max_unsafe=line), workspace)
    kept, rejected = safe.read_jsonl("records.jsonl"), safe.read_jsonl("rejected.jsonl")
    assert kept == [row for row in rows if row["unsafe"] <= line]
    assert 0 < len(kept) < len(rows)
    assert {row["reason"] for row in rejected} == {f"unsafe above {line:g}"}
    assert safe.summary["rejected"] == len(rows) - len(kept) == len(rejected)
    assert safe.summary["unsafe"]["p95"] <= line
    best = generate.run(profile_for(folder, max_unsafe=line, keep_best=1), workspace).read_jsonl("records.jsonl")
    assert best == [
        max((row for row in kept if row["caption_id"] == each), key=lambda row: row["clip_score"])
        for each in dict.fromkeys(row["caption_id"] for row in kept)
    ], "the best of those that are safe"
    with pytest.raises(InputError, match=rf"all {len(rows)} images are more unsafe than 0; the lowest value is"):
        generate.run(profile_for(folder, max_unsafe=0.0), workspace)
    exporting.export(safe, str(tmp_path / "out"))
    assert pq.read_table(tmp_path / "out" / "images.parquet")["unsafe"].to_pylist() == [row["unsafe"] for row in kept]


def test_what_checks_is_part_of_the_key(folder: Path) -> None:
    checker = {"safety_checker": str(folder / "checker"), "unsafe_label": ""}
    hub = {"safety_checker": "some/model", "safety_revision": "abc"}
    variants = ({}, {"unsafe_label": "normal"}, {"max_unsafe": 0.5}, checker, hub, {**hub, "safety_revision": "abd"})
    keys = [generate.plan_key(profile_for(folder, **each)) for each in variants]
    assert len({key.digest for key in keys}) == len(variants)
    assert keys[4].models["safety_checker"] == "some/model@abc"
    with pytest.raises(UsageError, match=r"some/model' is a hub id without generate\.safety_revision"):
        generate.plan_key(profile_for(folder, safety_checker="some/model"))


def test_a_checker_that_does_not_fit_is_named_before_anything_is_drawn(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines, "load_pipeline", None)
    workspace = Workspace(tmp_path)
    for wrong, problem in (
        ({"unsafe_label": "porn"}, "no class of"),
        ({"safety_checker": "some/model"}, "without generate"),
    ):
        for part in ((1, 1), (1, 2)):
            with pytest.raises(UsageError, match=problem):
                generate.run_part(profile_for(folder, **wrong), workspace, part=part)
        with pytest.raises(UsageError, match=problem):
            generate.run(profile_for(folder, **wrong), workspace)


def test_reasons_name_what_is_unsafe_before_what_fits_badly() -> None:
    rows = [
        {"caption_id": "c", "caption": "a", "k": k, "clip_score": s, "unsafe": u}
        for k, s, u in ((0, 0.9, 0.8), (1, 0.1, 0.8), (2, 0.5, 0.5), (3, 0.4, 0.1))
    ]
    assert quality.choose(rows, minimum=0.2, best=1, most_unsafe=0.5) == [
        *["unsafe above 0.5"] * 2,
        "",
        "not among the 1 best of its caption",
    ]
