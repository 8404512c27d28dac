"""The eval stage on small real artifacts of every kind."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gmail_cli.artifacts import Artifact, StageKey, Workspace, file_sha256
from gmail_cli.components import captions, heads, measure, scores
from gmail_cli.components.tables import Flow, Modality, Table
from gmail_cli.components.tokenizer import train_tokenizer
from gmail_cli.errors import InputError, SetupError
from gmail_cli.profile import build
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import embed, evaluate, sources
from gmail_cli.stages.evaluate.inputs import Inputs

SPACE = "5" * 64
DIM = 16
COUNT = 24
ARMS = {"none": 1.3, "real": 0.25, "generated-naive": 0.8, "generated-aligned": 0.4}
"""Arm -> noise on its texts: how badly it retrieves."""


def table(name: str, vectors: np.ndarray, rows: list[dict[str, object]], modality: Modality, flow: Flow) -> Table:
    return Table.build(
        vectors,
        rows=rows,
        name=name,
        modality=modality,
        flow=flow,
        encoder="tiny",
        encoder_digest=SPACE,
        space=SPACE,
        preprocess="p",
    )


def write(slot: object, each: Table) -> None:
    files = each.files()
    slot.write_npy(f"{each.header.name}/vectors.npy", files["vectors.npy"])  # type: ignore[attr-defined]
    slot.write_jsonl(f"{each.header.name}/rows.jsonl", files["rows.jsonl"])  # type: ignore[attr-defined]
    slot.write_json(f"{each.header.name}/table.json", files["table.json"])  # type: ignore[attr-defined]


class World:
    """A test set of scenes, and artifacts whose models retrieve it more or less well."""

    def __init__(self, root: Path) -> None:
        self.workspace = Workspace(root / "runs", "test")
        self.test = captions.read("scenes:test", limit=COUNT)
        self.train = captions.read("scenes:train", limit=8)
        rng = np.random.default_rng(0)
        self.images = rng.standard_normal((COUNT, DIM)).astype(np.float32)
        self.images /= np.linalg.norm(self.images, axis=1, keepdims=True)
        self.cells = [
            {"task": "clip-text", "arm": arm, "seed": seed, "dual_projection": False}
            for arm in ARMS
            for seed in ((0,) if arm == "none" else (0, 1))
        ]

    def profile(self, **chosen: object) -> Profile:
        data = {"train_limit": 8, "test_limit": COUNT, "protocol": "scenes-24/1"}
        return build(
            {"name": "small", "data": data, "eval": {"resamples": 200, "examples": 2, "meteor": "off", **chosen}}
        )

    def texts(self, name: str, noise: float, seed: int) -> Table:
        rows = [
            {"id": each.id, "owner": each.owner, "text": each.text, "kind": each.kind} for each in self.test.captions
        ]
        owners = np.array([[image.id for image in self.test.images].index(each.owner) for each in self.test.captions])
        noisy = (
            self.images[owners] + noise / DIM**0.5 * np.random.default_rng(seed).standard_normal((len(rows), DIM)) * 2
        )
        return table(name, noisy, rows, "text", "text")

    def prompts(self, name: str) -> Table:
        labels = np.array([image.label for image in self.test.images])
        names = sorted(set(labels))
        means = np.stack([self.images[labels == label].mean(axis=0) for label in names])
        return table(name, means, [{"id": label, "label": label} for label in names], "text", "text")

    def embeddings(
        self,
        *,
        plain: bool = False,
        profile: Profile | None = None,
        flow: Flow = "real",
        real_encoder: str = "original",
    ) -> Artifact:
        rows = [{"id": image.id, "label": image.label} for image in self.test.images]
        tables = [table("test-images", self.images, rows, "image", flow), self.texts("test-texts", ARMS["none"], 9)]
        if not plain:
            for cell in self.cells:
                name = cell_name(cell)
                tables.append(self.texts(f"test-texts@{name}", ARMS[str(cell["arm"])], int(str(cell["seed"])) + 1))
                tables.append(self.prompts(f"test-classes@{name}"))
            shift = np.zeros(DIM)
            shift[0] = 2
            pairs = [{"id": f"p{row}", "owner": image.id} for row, image in enumerate(self.test.images)]
            tables.append(table("gap-real", self.images, pairs, "image", "real"))
            tables.append(table("gap-generated-naive", self.images + shift, pairs, "image", "real"))
            tables.append(table("gap-generated-aligned", self.images + 0.1 * shift, pairs, "image", "generated"))
        origins = sources.origins(profile or self.profile())
        chosen = {"plain": plain, "origins": origins, "flow": flow, "real_encoder": real_encoder}
        key = StageKey(stage="embed", settings=chosen)
        with self.workspace.open(key) as slot:
            for each in tables if not slot.done else ():
                write(slot, each)
            return slot.artifact if slot.done else slot.commit(summary={"origins": origins})

    def generated(self, *, leak: bool = False) -> Artifact:
        source = self.test if leak else self.train
        records = []
        with self.workspace.open(StageKey(stage="generate", settings={"leak": leak})) as slot:
            if slot.done:
                return slot.artifact
            for number, caption in enumerate(source.captions[:12]):
                stream = io.BytesIO()
                Image.new("RGB", (64, 64), (number * 20, 90, 120)).save(stream, "PNG")
                path = slot.write_bytes(f"images/000/{number}.png", stream.getvalue())
                records.append(
                    {
                        "key": str(number),
                        "caption_id": caption.id,
                        "caption": caption.text,
                        "owner": caption.owner,
                        "label": None,
                        "k": 0,
                        "seed": number,
                        "sha256": file_sha256(path),
                        "path": f"images/000/{number}.png",
                        "width": 64,
                        "height": 64,
                    }
                )
            slot.write_jsonl("records.jsonl", records)
            return slot.commit(summary={})

    def trained(self) -> Artifact:
        """Text towers (only their rows are read), probes and a captioner."""
        labels = sorted({str(image.label) for image in self.test.images})
        cells = [dict(cell) for cell in self.cells]
        cells += [
            {"task": "linear-probe", "arm": arm, "seed": 0, "dual_projection": False}
            for arm in ("generated-naive", "generated-aligned")
        ]
        cells += [{"task": "clipcap", "arm": "real", "seed": 0, "dual_projection": dual} for dual in (False, True)]
        with self.workspace.open(StageKey(stage="train", settings={})) as slot:
            if slot.done:
                return slot.artifact
            for cell in cells:
                cell |= {"name": cell_name(cell), "folder": cell_name(cell), "image_encoder": "f_r"}
                curve = [{"step": step, "loss": 1 / (step + 1)} for step in range(5)] if cell["arm"] != "none" else []
                if cell["task"] == "linear-probe":
                    probe = heads.Probe(DIM, labels)
                    torch.manual_seed(len(str(cell["arm"])))
                    torch.nn.init.normal_(probe.linear.weight)
                    slot.write_folder(cell_name(cell), lambda folder, probe=probe: heads.save_head(probe, folder))
                if cell["task"] == "clipcap":
                    slot.write_folder(cell_name(cell), lambda folder, cell=cell: self._captioner(cell, folder))
                slot.write_jsonl(f"{cell_name(cell)}/metrics.jsonl", curve)
            slot.write_json("cells.json", cells)
            return slot.commit(summary={})

    def _captioner(self, cell: dict[str, object], folder: Path) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        tokenizer = train_tokenizer([each.text for each in self.train.captions], entries=600)
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=64,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        captioner = heads.Captioner(
            DIM,
            lm=GPT2LMHeadModel(config).eval(),
            tokenizer=tokenizer,
            lm_name="small",
            prefix_length=2,
            tune_lm=True,
            dual=bool(cell["dual_projection"]),
        )
        heads.save_head(captioner, folder)

    def aligned(self) -> Artifact:
        with self.workspace.open(StageKey(stage="align", settings={})) as slot:
            if slot.done:
                return slot.artifact
            slot.write_jsonl("metrics.jsonl", [{"step": step, "loss": 3 - step / 9} for step in range(9)])
            return slot.commit(summary={})

    def evaluate(self, profile: Profile | None = None, **other: Artifact) -> Artifact:
        given = {"embeddings": self.embeddings(), "train": self.trained(), "aligned": self.aligned()}
        return evaluate.run(
            profile or self.profile(), self.workspace, **{**given, "generated": self.generated(), **other}
        )


def cell_name(cell: dict[str, object]) -> str:
    return f"{cell['task']}.{cell['arm']}.seed{cell['seed']}" + "+dual" * bool(cell["dual_projection"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def made(world: World) -> Artifact:
    return world.evaluate()


# -- image features ------------------------------------------------------------------------------------------------


def test_features_of_each_image_tower_classify_the_test_images(world: World) -> None:
    """k-NN and nearest mean against plain loops, for f_r and for a trained image tower; never with test labels."""
    rng = np.random.default_rng(4)
    labels = [str(image.label) for image in world.test.images]
    names = sorted(set(labels))
    original, trained = rng.standard_normal((2, len(names), DIM))
    learnt = [names[row % len(names)] for row in range(6 * len(names))]
    train_rows = [{"id": f"t{row}", "label": label} for row, label in enumerate(learnt)]
    test_rows = [{"id": image.id, "label": image.label} for image in world.test.images]

    def noisy(of: list[str], directions: np.ndarray, noise: float) -> np.ndarray:
        clean = directions[[names.index(label) for label in of]]
        return clean + noise * rng.standard_normal(clean.shape)

    name = "clip.real.seed0"
    tables = [
        table("test-images", noisy(labels, original, 1.2), test_rows, "image", "real"),
        world.texts("test-texts", 1.3, 9),
    ]
    tables.append(table("train-images", noisy(learnt, original, 1.2), train_rows, "image", "real"))
    tables.append(table(f"test-images@{name}", noisy(labels, trained, 0.1), test_rows, "image", "real"))
    tables.append(table(f"train-images@{name}", noisy(learnt, trained, 0.1), train_rows, "image", "real"))
    tables.append(world.texts(f"test-texts@{name}", 0.3, 2))
    with world.workspace.open(StageKey(stage="embed", settings={"features": True})) as slot:
        for each in tables:
            write(slot, each)
        embeddings = slot.commit(summary={"origins": sources.origins(world.profile())})
    with world.workspace.open(StageKey(stage="train", settings={"own": True})) as slot:
        cell = {"task": "clip", "arm": "real", "seed": 0, "dual_projection": False, "image_encoder": "own"}
        slot.write_json("cells.json", [{**cell, "name": name, "folder": name}])
        slot.write_jsonl(f"{name}/metrics.jsonl", [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}])
        own = slot.commit(summary={})
    made = evaluate.run(world.profile(neighbours=5), world.workspace, embeddings=embeddings, train=own)
    results = made.read_json("results.json")
    rows = {(row["arm"], row["seed"], row["metric"]): row for row in results["rows"] if row["task"] == "features"}
    for arm, seed, test, train in (("none", None, *tables[:3:2]), ("real", 0, *tables[3:5])):
        cosines = test.vectors @ train.vectors.T
        right = []
        for row, label in enumerate(labels):
            votes = [learnt[at] for at in np.argsort(-cosines[row])[:5]]
            most = max(votes.count(each) for each in names)
            best = [each for each in names if votes.count(each) == most]
            right.append((label in best) / len(best))
        assert rows[arm, seed, "nearest_neighbour_top_1_accuracy"]["value"] == pytest.approx(np.mean(right))
        means = [train.vectors[[each == name for each in learnt]].mean(axis=0) for name in names]
        nearest = [names[np.argmin([np.linalg.norm(v - mean) for mean in means])] for v in test.vectors]
        assert rows[arm, seed, "nearest_mean_top_1_accuracy"]["value"] == pytest.approx(
            np.mean([one == other for one, other in zip(nearest, labels, strict=True)])
        )
        probe = rows[arm, seed, "linear_probe_top_1_accuracy"]
        assert probe["low"] <= probe["value"] <= probe["high"]
    assert rows["real", 0, "linear_probe_top_1_accuracy"]["value"] == 1
    assert rows["none", None, "linear_probe_top_1_accuracy"]["value"] < 1
    cells = [cell for cell in results["cells"] if cell["task"] == "features"]
    assert [cell["queries"] for cell in cells] == [
        "queries/features.none.parquet",
        "queries/features.clip.real.seed0.parquet",
    ]
    assert "Image features" in (made.path / "report.md").read_text(encoding="utf-8")
    # the probe of the trained tower must not meet the features of another encoder
    other = replace(tables[2].header, encoder_digest="6" * 64)
    with pytest.raises(InputError, match="made by different encoders"):
        measure.table_features(replace(tables[2], header=other), test=tables[0], neighbours=5, strength=1.0)


def test_a_training_image_in_the_test_set_stops_the_evaluation_of_features(world: World) -> None:
    leaky = world.profile().model_copy(
        update={"data": world.profile().data.model_copy(update={"train": "scenes:test"})}
    )
    rows = [{"id": image.id, "label": image.label} for image in world.test.images]
    with world.workspace.open(StageKey(stage="embed", settings={"leak": True})) as slot:
        for name in ("test-images", "train-images"):
            write(slot, table(name, world.images, rows, "image", "real"))
        embeddings = slot.commit(summary={"origins": sources.origins(leaky)})
    with pytest.raises(InputError, match=r"of the test set .* are also in the training set"):
        evaluate.run(leaky, world.workspace, embeddings=embeddings)


# -- the stage ---------------------------------------------------------------------------------------------------


def test_every_model_is_measured(made: Artifact) -> None:
    results = made.read_json("results.json")
    found = results["metrics"]
    assert results["schema"] == "gmail.results/1"
    assert results["protocol"] == "scenes-24/1"
    order = [
        found[f"clip-text.{arm}.text_to_image_recall_at_1"]
        for arm in ("none", "generated-naive", "generated-aligned", "real")
    ]
    assert order == sorted(order)
    assert len(set(order)) == 4
    assert (
        found["clip-text.real.long_text_to_image_recall_at_1"] > found["clip-text.none.long_text_to_image_recall_at_1"]
    )
    assert found["clip-text.real.zero_shot_top_1_accuracy"] > 0.5
    assert {"linear-probe.generated-aligned.probe_top_1_accuracy", "clipcap.real+dual.cider"} <= set(found)
    assert {"clipcap.real.bleu_4", "clipcap.real.rouge_l"} <= set(found)
    assert found["gap.generated-aligned.paired_cosine"] > found["gap.generated-naive.paired_cosine"]
    for name in ("centroid_distance", "covariance_distance", "maximum_mean_discrepancy", "neighbour_separability"):
        assert found[f"gap.generated-aligned.{name}"] < found[f"gap.generated-naive.{name}"]
    for name in ("precision", "recall", "coverage"):
        assert found[f"gap.generated-naive.{name}"] <= found[f"gap.generated-aligned.{name}"] <= 1
    assert found["gap.generated-naive.density"] < found["gap.generated-aligned.density"]
    assert 1 < found["gap.generated-naive.vendi_score"] < found["gap.generated-aligned.vendi_score"] <= DIM
    rows = [row for row in results["rows"] if row["metric"] == "text_to_image_recall_at_1" and row["arm"] == "real"]
    assert [row["seed"] for row in rows] == [0, 1]
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    assert all(row["n"] == 5 * COUNT for row in rows)


def test_the_difference_to_naive_is_the_difference_of_the_means(made: Artifact) -> None:
    results = made.read_json("results.json")
    row = next(
        row
        for row in results["comparisons"]
        if row["metric"] == "text_to_image_recall_at_1" and row["baseline"] == "generated-naive"
    )
    found = results["metrics"]
    means = [found[f"clip-text.{arm}.text_to_image_recall_at_1"] for arm in ("generated-aligned", "generated-naive")]
    assert row["difference"] == pytest.approx(means[0] - means[1])
    assert len(row["by_seed"]) == 2


def test_ranks_and_predictions_are_kept(made: Artifact, world: World) -> None:
    from gmail_cli.components.metrics.retrieval import Ranks

    kept = np.load(made.file("ranks/clip-text.real.seed1.short.text_to_image.npy"), allow_pickle=False)
    again = Ranks.from_array(kept, candidates=COUNT).hits(1).mean()
    rows = made.read_json("results.json")["rows"]
    row = next(
        row for row in rows if (row["arm"], row["seed"], row["metric"]) == ("real", 1, "text_to_image_recall_at_1")
    )
    assert again == pytest.approx(row["value"])
    predictions = made.read_json("predictions/clipcap.real.seed0.json")
    assert list(predictions) == [image.id for image in world.test.images] or set(predictions) == {
        image.id for image in world.test.images
    }


def test_the_report_is_whole(made: Artifact) -> None:
    page = made.file("report.html").read_text(encoding="utf-8")
    for title in (
        "The arms",
        "The gap between real and generated",
        "Recall at k",
        "By class",
        "By attribute",
        "colour: ",
        "The generated images as a set",
        "Retrievals",
        "Captions",
    ):
        assert title in page
    assert "Real images and what was generated for them" in page
    assert "Training" in page
    assert "Image-to-Text" in made.file("report.tex").read_text(encoding="utf-8")
    assert len(page) < 3_000_000
    assert made.summary["verdict"] in made.file("report.md").read_text(encoding="utf-8").replace("\\", "")


def test_the_same_evaluation_is_reused_and_another_level_is_not(made: Artifact, world: World) -> None:
    assert world.evaluate().path == made.path
    wide = world.evaluate(world.profile(confidence=0.6, recall_at=[1, 3], true_recall=True, examples=0))
    assert wide.path != made.path
    rows = {
        (row["task"], row["arm"], row["seed"], row["dual_projection"], row["metric"]): row
        for row in wide.read_json("results.json")["rows"]
    }
    for row in made.read_json("results.json")["rows"]:
        other = rows.get((row["task"], row["arm"], row["seed"], row["dual_projection"], row["metric"]))
        if other and row["low"] is not None:
            assert other["high"] - other["low"] <= row["high"] - row["low"] + 1e-9
    names = {metric.rpartition(".")[2] for metric in wide.read_json("results.json")["metrics"]}
    assert {"text_to_image_recall_at_3", "text_to_image_true_recall_at_3"} <= names
    assert "text_to_image_recall_at_5" not in names
    assert "Retrievals" not in wide.file("report.html").read_text(encoding="utf-8")


def test_embeddings_alone_give_retrieval(world: World) -> None:
    made = evaluate.run(world.profile(), world.workspace, embeddings=world.embeddings(plain=True))
    found = made.read_json("results.json")
    assert {name.rpartition(".")[0] for name in found["metrics"]} == {"clip.none"}
    assert found["comparisons"] == []
    assert made.summary["verdict"].startswith("Text→image R@1 is")


def test_embeddings_of_other_images_are_measured_without_pictures(world: World) -> None:
    profile = build({"data": {"test": "no-such-file.json"}, "eval": {"resamples": 100}})
    made = evaluate.run(profile, world.workspace, embeddings=world.embeddings(plain=True, profile=profile))
    assert "No pictures" in made.file("report.html").read_text(encoding="utf-8")
    assert made.read_json("results.json")["protocol"] == "no-such-file.json/unversioned"


def test_meteor_without_java_is_left_out_or_fails(
    world: World, made: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    without = world.evaluate(world.profile(meteor="auto"))
    assert "METEOR needs Java" in without.file("report.md").read_text(encoding="utf-8")
    assert without.read_json("results.json")["metrics"] == made.read_json("results.json")["metrics"]
    with pytest.raises(SetupError, match=r"eval\.meteor = 'on'"):
        world.evaluate(world.profile(meteor="on"))


def test_a_folder_of_labelled_images_without_captions_is_classified(tmp_path: Path) -> None:
    for label, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / "set" / label).mkdir(parents=True)
        for number in range(4):
            shade = tuple(max(0, value - 9 * number) for value in colour)
            Image.new("RGB", (64, 64), shade).save(tmp_path / "set" / label / f"{number}.png")
    profile = build({"data": {"test": str(tmp_path / "set")}, "eval": {"resamples": 100}})
    workspace = Workspace(tmp_path / "run")
    found = evaluate.run(profile, workspace, embeddings=embed.run(profile, workspace)).read_json("results.json")
    assert {row["metric"] for row in found["rows"]} == {"zero_shot_top_1_accuracy", "zero_shot_mean_per_class_accuracy"}
    assert {row["n"] for row in found["rows"]} == {8}
    assert found["zero_shot"]["classes"] == 2
    (tmp_path / "flat").mkdir()
    for file in (tmp_path / "set" / "red").iterdir():
        file.rename(tmp_path / "flat" / file.name)
    profile = build({"data": {"test": str(tmp_path / "flat")}})
    with pytest.raises(InputError, match="nothing to measure: its images have neither captions nor labels"):
        evaluate.run(profile, workspace, embeddings=embed.run(profile, workspace))


def test_captions_that_name_classes_are_not_retrieved(world: World) -> None:
    rows = [
        {"id": str(row), "owner": image.id, "text": "a car", "kind": "short"}
        for row, image in enumerate(world.test.images)
    ]
    texts = table("test-texts", world.images, rows, "text", "text")
    assert measure.names_classes(texts)
    assert not measure.names_classes(world.texts("test-texts", 1.0, 0))


def test_generating_from_test_captions_is_a_leak(world: World) -> None:
    with pytest.raises(InputError, match="test captions were generated from, first 'test-"):
        world.evaluate(generated=world.generated(leak=True))


def test_training_on_test_images_is_a_leak(world: World) -> None:
    profile = build({"data": {"train": "scenes:test", "train_limit": 4, "test_limit": COUNT}})
    with pytest.raises(InputError, match="4 images of the test set"):
        world.evaluate(profile, embeddings=world.embeddings(profile=profile))


@pytest.mark.parametrize(("shared", "rule", "stops"), [(1, "auto", False), (1, "fail", True), (60, "auto", True)])
def test_shared_captions_stop_or_are_counted(world: World, tmp_path: Path, shared: int, rule: str, stops: bool) -> None:
    file = tmp_path / "train.txt"
    texts = list(dict.fromkeys(caption.text for caption in world.test.captions))[:shared]
    file.write_text("\n".join([*texts, "another text"]), encoding="utf-8")
    values = world.profile(shared_captions=rule, examples=0).model_dump()
    values["data"] |= {"train": str(file), "train_limit": 0}
    changed = build(values)
    inputs = {"embeddings": world.embeddings(profile=changed), "generated": world.generated()}
    work = Inputs(changed, inputs)
    if stops:
        with pytest.raises(InputError, match=r"captions? of the test set"):
            work.check_leaks()
    else:
        work.check_leaks()
        assert work.notes[0].startswith("1 of 144 test captions are also training captions")


def test_extra_positives_have_metrics_of_their_own(world: World, made: Artifact, tmp_path: Path) -> None:
    file, reverse = tmp_path / "extra.json", tmp_path / "reverse.json"
    texts, images = world.test.captions_of_kind("short"), world.test.images
    every = [image.id for image in images]
    file.write_text(json.dumps({**{text.id: every for text in texts[:12]}, "unknown": ["x"]}))
    reverse.write_text(json.dumps({texts[0].owner: [text.id for text in texts if text.owner == texts[0].owner]}))
    more = world.evaluate(world.profile(extra_positives=[str(file), str(reverse)], examples=0))
    before, after = (each.read_json("results.json")["metrics"] for each in (made, more))
    for arm in ARMS:
        assert (
            after[f"clip-text.{arm}.text_to_image_recall_at_1"] == before[f"clip-text.{arm}.text_to_image_recall_at_1"]
        )
        assert after[f"clip-text.{arm}.text_to_image_extended_map_at_r"] == 1
        assert 0 <= after[f"clip-text.{arm}.image_to_text_extended_r_precision"] <= 1
    moved = file.rename(tmp_path / "moved.json")
    again = world.evaluate(world.profile(extra_positives=[str(moved), str(reverse)], examples=0))
    assert again.path == more.path
    for content, problem in (
        ({"unknown": [every[0]]}, "none of the 1 captions with extra positives is among"),
        ({texts[0].id: ["x"]}, f"1 right answers are not among the images here, first 'x' of '{texts[0].id}'"),
        ({texts[0].id: [every[-1]]}, "the lists of 1 of 1 captions are without their own images"),
        ({texts[0].id: "x"}, "is 'x', not a list of ids"),
        ([], "holds no object of extra right answers"),
    ):
        moved.write_text(json.dumps(content))
        with pytest.raises(InputError, match=problem):
            world.evaluate(world.profile(extra_positives=[str(moved)], examples=0))


def test_baselines_that_do_not_fit_are_refused(made: Artifact, tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    now = made.read_json("results.json")
    assert evaluate.comparable_metrics(made, baseline=evaluate.read_baseline(made.path), file=file) == now["metrics"]
    for content, problem in (
        ({**now, "protocol": "other/2"}, "protocol 'other/2'"),
        ({**now, "test_set": "0" * 64}, "with test_set '000"),
    ):
        file.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(InputError, match=problem):
            evaluate.comparable_metrics(made, baseline=evaluate.read_baseline(file), file=file)


def test_what_each_model_did_with_each_query_is_kept(made: Artifact) -> None:
    import pyarrow.parquet as pq

    results = made.read_json("results.json")
    assert {row["preprocess"] for row in results["rows"]} == {"p"}
    values = {
        (row["task"], row["arm"], row["seed"], row["dual_projection"], row["metric"]): row["value"]
        for row in results["rows"]
    }
    checked = 0
    for cell in results["cells"]:
        for name, kept in scores.from_parquet(pq.read_table(made.file(cell["queries"]))).items():
            key = (cell["task"], cell["arm"], cell["seed"], cell["dual_projection"], name)
            assert kept.value == pytest.approx(values[key], abs=1e-12)
            checked += 1
    assert checked > 60
    assert any(cell["task"] == "clipcap" for cell in results["cells"])


def test_a_text_of_no_test_image_is_refused() -> None:
    images = table("test-images", np.eye(2, dtype=np.float32), [{"id": "a"}, {"id": "b"}], "image", "real")
    texts = table(
        "test-texts",
        np.eye(2, dtype=np.float32),
        [{"id": "1", "owner": "a"}, {"id": "2", "owner": "c"}],
        "text",
        "text",
    )
    with pytest.raises(InputError, match="text '2' belongs to image 'c'"):
        measure.retrieval(images, texts=texts, ks=(1,))


def test_test_images_through_f_g_are_refused_unless_told(world: World) -> None:
    given = {"embeddings": world.embeddings(plain=True, flow="generated")}
    with pytest.raises(InputError, match="went through f_g") as refused:
        evaluate.run(world.profile(), world.workspace, **given)
    assert "--flow real" in refused.value.hint
    allowed = evaluate.run(world.profile(allow_generated_flow=True), world.workspace, **given)
    tuned = world.embeddings(plain=True, flow="generated", real_encoder="tuned")
    told = evaluate.run(world.profile(), world.workspace, embeddings=tuned)
    assert allowed.summary["metrics"] == told.summary["metrics"] != {}


def test_headers_survive_as_the_stage_wrote_them(world: World) -> None:
    found = world.embeddings()
    assert json.loads(found.file("test-images/table.json").read_text()) == asdict(
        Table.load(found.folder("test-images")).header
    )
