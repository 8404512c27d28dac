"""Prompts: template sets by name and from files, names for classes that are numbers or ids."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import open_clip
import pytest
from PIL import Image as Picture

from gmail_cli.components import prompts
from gmail_cli.components.captions import Dataset, Image
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import build
from gmail_cli.profile.values import TEMPLATE_SETS
from gmail_cli.stages import sources


def dataset(*labels: str | None) -> Dataset:
    images = tuple(Image(f"i{row}", label) for row, label in enumerate(labels))
    return Dataset("set", images, (), tuple(sorted({label for label in labels if label})), (None,) * len(labels))


def test_named_sets_are_open_clips() -> None:
    assert tuple(prompts.NAMED) == TEMPLATE_SETS
    found = prompts.templates(["openai-imagenet", "a {}."])
    assert [each.replace("{}", "dog") for each in found[:-1]] == [f("dog") for f in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert found[-1] == "a {}."
    assert len(prompts.templates(["simple-imagenet"])) == 7


def test_templates_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("a photo of a {c}.\n\nart of {}\n")
    assert prompts.templates([str(file)]) == ("a photo of a {}.", "art of {}")
    file.write_text("a photo\n")
    with pytest.raises(InputError, match="'a photo' must hold"):
        prompts.templates([str(file)])
    file.write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        prompts.templates([str(file)])
    with pytest.raises(InputError, match=r"none.txt: No such file"):
        prompts.templates(["none.txt"])
    with pytest.raises(UsageError, match="'imagenet' is no template"):
        prompts.templates(["imagenet"])


def test_numbers_name_lines_and_other_labels_go_in_order(tmp_path: Path) -> None:
    file = tmp_path / "classnames.txt"
    file.write_text("cat\nsmall dog\ncat\n")
    found = prompts.name_classes(dataset("2", "0", "2"), str(file))
    assert (found.class_names, found.class_texts) == (("0", "1", "2"), ("cat", "small dog", "cat"))
    assert [row["text"] for row in prompts.rows(found, ["a {}."])] == ["a cat.", "a small dog.", "a cat."]
    assert [row["label"] for row in prompts.rows(found, ["a {}.", "the {}"])] == ["0", "0", "1", "1", "2", "2"]
    assert found.fingerprint != dataset("2", "0", "2").fingerprint
    found = prompts.name_classes(dataset("n02", "n09", "n01"), str(file))
    assert dict(zip(found.class_names, found.class_texts, strict=True)) == {
        "n01": "cat",
        "n02": "small dog",
        "n09": "cat",
    }
    found = prompts.name_classes(dataset("00", "02"), str(file))
    assert found.class_names == ("00", "1", "02")
    for labels, problem in (
        (("3", "0"), "has label 3; .* names 3 classes, from 0"),
        (("n01", "n02"), "has 2 classes, .* names 3"),
        ((None,), "has no labels to name"),
        (("01", "2", "002"), "writes its labels in several ways"),
    ):
        with pytest.raises(InputError, match=problem):
            prompts.name_classes(dataset(*labels), str(file))


def test_imagenet_names_go_to_sorted_wordnet_ids() -> None:
    labels = [f"n{row:08d}" for row in range(1000)]
    found = prompts.name_classes(dataset(*labels), "openai-imagenet")
    assert (found.class_texts[0], found.class_texts[281]) == ("tench", "tabby cat")
    assert len(set(found.class_names)) == 1000, "two names stand there twice; their classes stay apart"


def test_a_set_in_clip_benchmarks_layout(tmp_path: Path) -> None:
    """``classnames.txt``, ``zeroshot_classification_templates.txt`` and ``test/0.tar`` of images and ``.cls``."""
    (tmp_path / "classnames.txt").write_text("airplane\nzebra\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a centered photo of a {c}.\n")
    (tmp_path / "test").mkdir()
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as archive:
        for row, label in enumerate((1, 0, 1)):
            stream = io.BytesIO()
            Picture.new("RGB", (8, 8), (row * 90, 0, 0)).save(stream, "WEBP")
            for suffix, data in (("webp", stream.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"s{row:07d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    (tmp_path / "test" / "nshards.txt").write_text("1")
    template = str(tmp_path / "zeroshot_classification_templates.txt")
    profile = build(
        {
            "data": {"test": str(tmp_path / "test"), "class_names": str(tmp_path / "classnames.txt")},
            "embed": {"templates": [template]},
        }
    )
    found = sources.read(sources.source(profile, part="test"))
    assert [image.label for image in found.images] == ["1", "0", "1"]
    assert found.has_images
    assert [row["text"] for row in prompts.rows(found, profile.embed.templates)] == [
        "a centered photo of a airplane.",
        "a centered photo of a zebra.",
    ]
    assert "class_names" not in sources.source(profile, part="train")
