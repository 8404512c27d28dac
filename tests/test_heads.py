"""Heads on embeddings: projections, the prefix captioner, the class probe; and the losses they are trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gmail_cli.components import heads
from gmail_cli.components.arms import Arm, Meeting, View
from gmail_cli.components.heads import (
    IGNORED,
    Captioner,
    DualProjection,
    Probe,
    classify,
    generate,
    generate_captions,
    load_captioner,
    load_lm,
    load_probe,
    save_head,
)
from gmail_cli.components.loop import Recipe, fit
from gmail_cli.components.pairs import Candidates, Pairs
from gmail_cli.components.tasks import (
    augmented,
    clipcap_job,
    contrastive_loss,
    image_text_loss,
    probe_job,
    sigmoid_loss,
)
from gmail_cli.components.tokenizer import save_tokenizer, train_tokenizer
from gmail_cli.errors import InputError, SetupError

TEXTS = ("! a red ball", "a blue cube on sand", "! two trees", "a house")


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of two layers with random weights, in transformers format."""
    folder = tmp_path_factory.mktemp("lm")
    tokenizer = train_tokenizer(TEXTS, entries=560)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_layer=2,
        n_embd=32,
        n_head=2,
        n_positions=48,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def test_texts_that_end_early_are_not_taken_for_padding(lm_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GPT-2 warns of padding without a mask; the tokens are those of a mask of ones all the same."""
    lm, tokenizer = load_lm(lm_folder)
    end = tokenizer.eos_token_id
    lm.config.pad_token_id = end
    asked = {"input_ids": torch.tensor([[end, 5], [7, end]]), "max_new_tokens": 4, "num_beams": 2, "pad_token_id": end}
    with caplog.at_level("WARNING", logger="transformers"):
        ours = generate(lm, attention_mask=torch.ones(2, 2, dtype=torch.long), **asked)
        assert not caplog.records
        theirs = lm.generate(attention_mask=torch.ones(2, 2, dtype=torch.long), do_sample=False, **asked)
    assert "attention_mask" in caplog.text
    assert torch.equal(ours, theirs)
    assert lm.config.pad_token_id == end


def pairs_of(texts: tuple[str, ...], *, labels: tuple[int, ...], names: tuple[str, ...]) -> Pairs:
    rows = Candidates.of([[row] for row in range(len(texts))])
    return Pairs(
        texts=texts,
        records=tuple(map(str, range(len(texts)))),
        owners=torch.arange(len(texts)),
        text_ids=torch.tensor([texts.index(text) for text in texts]),
        labels=torch.tensor(labels),
        class_names=names,
        real=rows,
        generated=rows,
    )


# -- projections -------------------------------------------------------------------------------------------------


def test_projections_start_as_the_identity_and_keep_the_flows_apart() -> None:
    projection, features = DualProjection(8), unit(6, 8)
    real = torch.tensor([True, False] * 3)
    torch.testing.assert_close(projection(features, real), features)
    with torch.no_grad():
        projection.real.linear.weight.add_(torch.randn(8, 8))
    mixed = projection(features, real)
    torch.testing.assert_close(mixed[~real], features[~real])
    torch.testing.assert_close(mixed[real], projection(features, torch.ones(6, dtype=torch.bool))[real])
    assert not torch.allclose(mixed[real], features[real])
    torch.testing.assert_close(mixed.norm(dim=1), torch.ones(6))


def test_the_real_projection_meets_the_generated_one() -> None:
    real = unit(400, 8)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q
    generated = functional.normalize(real @ turn + 0.1 * unit(400, 8, seed=2) + 0.3, dim=-1)
    projection = DualProjection(8)
    with torch.no_grad():
        projection.generated.linear.weight.copy_(0.2 * unit(8, 8, seed=3))
    before = (real * projection.generated(generated)).sum(1).mean()
    projection.meet(real, generated)
    held_out = unit(100, 8, seed=4)
    moved = projection.generated(functional.normalize(held_out @ turn + 0.3, dim=-1))
    after = (projection.real(held_out) * moved).sum(1).mean()
    assert before < 0.5
    assert after > 0.95


# -- probe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual", [False, True])
def test_a_probe_learns_from_one_flow_and_is_right_on_the_other(tmp_path: Path, *, dual: bool) -> None:
    centres = unit(3, 16)
    labels = tuple(i % 3 for i in range(90))
    real = functional.normalize(centres[list(labels)] + 0.3 * unit(90, 16, seed=1), dim=-1)
    generated = functional.normalize(real + 0.3 * unit(1, 16, seed=2), dim=-1)
    pairs = pairs_of(tuple(f"caption {i}" for i in range(90)), labels=labels, names=("ball", "cube", "cone"))
    assert pairs.real is not None
    arm = Arm((View(generated, pairs.real, real=False),))
    probe = Probe(16, pairs.class_names, dual=dual)
    meeting = Meeting.of(View(real, pairs.real, real=True), arm.views[0], pairs) if dual else None
    job = probe_job(probe, pairs, arm, meeting=meeting)
    curve = fit(probe, loss=job.loss, rows=job.rows, recipe=Recipe(steps=60, batch_size=32, lr=0.02))
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    job.export(tmp_path)
    shares = classify(load_probe(tmp_path), real)
    torch.testing.assert_close(shares.sum(1), torch.ones(90))
    assert (shares.argmax(1) == torch.tensor(labels)).float().mean() > 0.95
    if dual:
        moved = load_probe(tmp_path).project(real, torch.ones(90, dtype=torch.bool))
        target = load_probe(tmp_path).project(generated, torch.zeros(90, dtype=torch.bool))
        assert (moved * target).sum(1).mean() > (real * target).sum(1).mean()


def test_a_probe_needs_labels() -> None:
    pairs = pairs_of(("a ball", "a cube"), labels=(0, -1), names=("ball",))
    assert pairs.real is not None
    with pytest.raises(InputError, match="'a cube' has no class"):
        probe_job(Probe(4, ("ball",)), pairs, Arm((View(unit(2, 4), pairs.real, real=True),)), meeting=None)


# -- captioner ---------------------------------------------------------------------------------------------------


def test_gpt2_with_its_gelu_in_one_operation_computes_what_transformers_loads(lm_folder: Path) -> None:
    lm, tokenizer = load_lm(lm_folder)
    tokens = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(lm_folder).eval()
    assert type(lm.transformer.h[0].mlp.act) is torch.nn.GELU
    torch.testing.assert_close(lm(tokens).logits, plain(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("mapping", "tune_lm"), [("mlp", True), ("transformer", True), ("mlp", False)])
def test_a_captioner_learns_its_captions(lm_folder: Path, tmp_path: Path, *, mapping: str, tune_lm: bool) -> None:
    lm, tokenizer = load_lm(lm_folder)
    torch.manual_seed(0)
    captioner = Captioner(
        16,
        lm=lm,
        tokenizer=tokenizer,
        lm_name=str(lm_folder),
        prefix_length=4,
        mapping=mapping,
        tune_lm=tune_lm,
    )
    features, pairs = unit(4, 16), pairs_of(TEXTS, labels=(-1,) * 4, names=())
    assert pairs.real is not None
    arm = Arm((View(features, pairs.real, real=True),))
    job = clipcap_job(captioner, pairs, arm, meeting=None, caption_tokens=32)
    frozen = {name: value.clone() for name, value in lm.state_dict().items()}
    steps = 80 if tune_lm else 30
    curve = fit(captioner, loss=job.loss, rows=job.rows, recipe=Recipe(steps=steps, batch_size=4, lr=5e-3))
    assert curve[-1]["loss"] < (0.3 if tune_lm else 1.0) * curve[0]["loss"]
    job.export(tmp_path)
    loaded = load_captioner(tmp_path)
    captions = generate_captions(loaded, 3 * features, max_tokens=20)  # normalised at inference as in training
    assert captions == generate_captions(captioner.eval(), features, max_tokens=20)
    if tune_lm:
        assert captions == list(TEXTS)  # "!" and the end-of-text token among what was learned
        assert generate_captions(loaded, features, beams=3, max_tokens=20) == list(TEXTS)
        AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    else:
        assert all(torch.equal(value, frozen[name]) for name, value in lm.state_dict().items())
        assert not (tmp_path / "lm").exists()


def test_a_captioner_is_loaded_with_the_revision_of_its_language_model(
    lm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, tokenizer = load_lm(lm_folder)
    given = {"lm": lm, "tokenizer": tokenizer, "lm_name": str(lm_folder), "lm_revision": "0123abc"}
    save_head(Captioner(16, **given, prefix_length=4), tmp_path)
    asked: list[Any] = []

    def spied(ref: Any, *, revision: str = "") -> Any:
        asked.append((ref, revision))
        return load_lm(ref)

    monkeypatch.setattr(heads, "load_lm", spied)
    assert load_captioner(tmp_path).lm_revision == "0123abc"
    assert asked == [(str(lm_folder), "0123abc")]


COLOURS, THINGS = ("red", "blue", "green", "white", "black", "pink"), ("ball", "cube", "tree", "house")


def test_a_captioner_of_texts_reads_images_through_its_memory(tmp_path: Path) -> None:
    """Texts of two words each, and images that lie beside them, a constant step away, as CLIP's modalities do."""
    texts = tuple(f"a {colour} {thing}" for colour in COLOURS for thing in THINGS)
    drawn = torch.Generator().manual_seed(0)
    parts = [functional.normalize(torch.randn(count, 16, generator=drawn), dim=-1) for count in (6, 4, 1)]
    embedded = functional.normalize((parts[0][:, None] + parts[1][None]).flatten(0, 1), dim=-1)
    noise = 0.08 * torch.randn(96, 16, generator=drawn)
    images = functional.normalize(embedded.repeat(4, 1) + 0.5 * parts[2] + noise, dim=-1)
    tokenizer = train_tokenizer(texts, entries=560)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_embd=32, n_head=2, n_positions=48, **ends, **drops)
    )
    captioner = Captioner(16, lm=lm.eval(), tokenizer=tokenizer, lm_name="mini", prefix_length=4, tune_lm=True)
    pairs = pairs_of(texts, labels=(-1,) * 24, names=())
    assert pairs.real is not None
    arm = Arm((View(embedded, pairs.real, real=True),))
    job = clipcap_job(captioner, pairs, arm, meeting=None, caption_tokens=16)
    fit(captioner, loss=job.loss, rows=job.rows, recipe=Recipe(steps=150, batch_size=24, lr=5e-3))

    def right(model: Captioner) -> float:
        written = generate_captions(model, images, max_tokens=8)
        return sum(a == b for a, b in zip(written, texts * 4, strict=True)) / len(images)

    alone = right(captioner)
    captioner.memory = embedded
    assert right(captioner) > alone + 0.2
    job.export(tmp_path)
    assert right(load_captioner(tmp_path)) == right(captioner)


def test_noise_is_added_to_what_an_arm_draws() -> None:
    rows = Candidates.of([[row] for row in range(50)])
    arms = [Arm((View(torch.zeros(50, 400), rows, real=True),), noise=noise) for noise in (0.0, 0.3)]
    torch.manual_seed(0)
    clean, noisy = (arm.draw(torch.arange(50))[0] for arm in arms)
    assert not clean.any()
    assert noisy.std().item() == pytest.approx(0.3, rel=0.02)
    assert not torch.equal(noisy, arms[1].draw(torch.arange(50))[0])


def test_only_caption_tokens_are_supervised(lm_folder: Path) -> None:
    lm, tokenizer = load_lm(lm_folder)
    captioner = Captioner(16, lm=lm, tokenizer=tokenizer, lm_name="mini", prefix_length=4)
    table = captioner.tokenize(TEXTS)
    assert table.shape[0] == 4
    lengths = (table != IGNORED).sum(1)
    assert lengths.min() < lengths.max()
    for row, length in zip(table, lengths, strict=True):
        assert row[length - 1] == tokenizer.eos_token_id
        assert tokenizer.decode(row[: length - 1]).strip() in TEXTS
    cut = captioner.tokenize(TEXTS, limit=3)
    assert cut.shape == (4, 3)
    assert (cut[:, -1] == tokenizer.eos_token_id).all()
    assert captioner.tokenize(["a " * 200], limit=500).shape[1] == 44  # 48 positions less the prefix
    real = torch.ones(4, dtype=torch.bool)
    padded = functional.pad(table, (0, 3), value=IGNORED)
    torch.testing.assert_close(captioner(unit(4, 16), real, table), captioner(unit(4, 16), real, padded))
    with pytest.raises(AssertionError, match="no supervised token"):
        captioner(unit(4, 16), real, torch.full_like(table, IGNORED))


def test_damaged_heads_and_missing_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_probe(tmp_path)
    save_head(Probe(4, ("ball", "cube")), tmp_path)
    with pytest.raises(InputError, match="not the config of a captioner"):
        load_captioner(tmp_path)
    (tmp_path / "head.json").write_text('{"head": "probe", "dim": 5, "class_names": ["ball", "cube"], "dual": false}')
    with pytest.raises(InputError, match="does not fit"):
        load_probe(tmp_path)
    (tmp_path / "head.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="does not fit"):
        load_probe(tmp_path)
    with pytest.raises(SetupError, match="nowhere"):
        load_lm(tmp_path / "nowhere")


# -- losses and drawing ------------------------------------------------------------------------------------------


def test_the_contrastive_loss_is_clip_s_without_siblings() -> None:
    images, texts = unit(5, 8), unit(5, 8, seed=1)
    eye, nothing = torch.eye(5, dtype=torch.bool), torch.zeros(5, 5, dtype=torch.bool)
    value, _ = contrastive_loss(images, texts, scale=torch.tensor(10.0), positives=eye, excluded=nothing)
    logits, target = 10 * images @ texts.T, torch.arange(5)
    expected = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(value, expected)


def test_the_sigmoid_loss_is_open_clip_s_without_siblings() -> None:
    from open_clip.loss import SigLipLoss

    images, texts = unit(5, 8), unit(5, 8, seed=1)
    eye, nothing = torch.eye(5, dtype=torch.bool), torch.zeros(5, 5, dtype=torch.bool)
    scale, bias = torch.tensor(10.0), torch.tensor(-3.0)
    value, _ = sigmoid_loss(images, texts, scale=scale, bias=bias, positives=eye, excluded=nothing)
    torch.testing.assert_close(value, SigLipLoss()(images, texts, scale, bias))


def test_the_sigmoid_loss_judges_each_pair_on_its_own() -> None:
    """Two captions that read the same fit both images; a sibling is judged as neither."""
    images, texts = unit(3, 8), unit(3, 8, seed=1)
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    excluded = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)
    scale, bias = torch.tensor(4.0), torch.tensor(-1.0)
    value, _ = sigmoid_loss(images, texts, scale=scale, bias=bias, positives=same, excluded=excluded)
    chance = (4 * images @ texts.T - 1).sigmoid()
    expected = [
        chance[0, 0],
        chance[0, 1],
        chance[1, 0],
        chance[1, 1],
        1 - chance[1, 2],
        1 - chance[2, 1],
        chance[2, 2],
    ]
    torch.testing.assert_close(value, -torch.stack(expected).log().sum() / 3)


@pytest.mark.parametrize("biased", [False, True])
def test_a_model_is_trained_by_the_loss_that_it_was_made_for(biased: bool) -> None:
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.tensor([8.0]).log())
    if biased:
        model.logit_bias = nn.Parameter(torch.tensor([-2.0]))
    images, texts, eye = unit(4, 8), unit(4, 8, seed=1), torch.eye(4, dtype=torch.bool)
    given = {"positives": eye, "excluded": torch.zeros(4, 4, dtype=torch.bool)}
    value, told = image_text_loss(model, images, texts, **given)
    if biased:
        expected, _ = sigmoid_loss(images, texts, scale=torch.tensor(8.0), bias=torch.tensor(-2.0), **given)
    else:
        expected, _ = contrastive_loss(images, texts, scale=torch.tensor(8.0), **given)
    torch.testing.assert_close(value, expected)
    assert told["temperature"] == pytest.approx(1 / 8)
    value.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_identical_captions_are_positives_and_siblings_no_negatives() -> None:
    images, scale = unit(3, 8).requires_grad_(True), torch.tensor(5.0)
    texts = functional.normalize(images.detach()[[0, 0, 2]], dim=-1)  # captions 0 and 1 read the same
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    several, accuracy = contrastive_loss(images, texts, scale=scale, positives=same, excluded=nothing)
    shares = (5 * images @ texts.T).softmax(1)
    rows = [-(shares[0, :2].log().mean()), -(shares[1, :2].log().mean()), -shares[2, 2].log()]
    columns = (5 * texts @ images.T).softmax(1)
    rows += [-(columns[0, :2].log().mean()), -(columns[1, :2].log().mean()), -columns[2, 2].log()]
    torch.testing.assert_close(several, torch.stack(rows).mean())
    assert accuracy >= 2 / 3
    excluded = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    value, _ = contrastive_loss(images, texts, scale=scale, positives=torch.eye(3, dtype=torch.bool), excluded=excluded)
    expected = []
    for scores in (5 * images @ texts.T, 5 * texts @ images.T):
        expected += [-scores[0, [0, 2]].log_softmax(0)[0], -scores[1, [1, 2]].log_softmax(0)[0]]
        expected += [-scores[2].log_softmax(0)[2]]
    torch.testing.assert_close(value, torch.stack(expected).mean())
    (gradient,) = torch.autograd.grad(value, images)
    assert torch.isfinite(gradient).all()


def test_candidates_are_drawn_evenly_from_a_caption_s_own_images() -> None:
    shared = [4, 5, 6]
    candidates = Candidates.of([[0], shared, shared, [9, 2]])
    assert len(candidates.members) == 6
    rows = torch.arange(4).repeat(3000)
    drawn = candidates.draw(rows, generator=torch.Generator().manual_seed(0)).reshape(-1, 4)
    assert set(drawn[:, 0].tolist()) == {0}
    assert set(drawn[:, 3].tolist()) == {2, 9}
    for column in (1, 2):
        counts = torch.bincount(drawn[:, column], minlength=7)[4:]
        assert (counts / 3000 - 1 / 3).abs().max() < 0.04
    used, among = candidates.used()
    assert used.tolist() == [0, 2, 4, 5, 6, 9]
    again = among.draw(rows, generator=torch.Generator().manual_seed(0)).reshape(-1, 4)
    assert torch.equal(torch.from_numpy(used)[again], drawn)


def test_a_mixed_arm_shows_its_share() -> None:
    candidates = Candidates.of([[0]])
    views = (View(torch.ones(1, 2), candidates, real=True), View(torch.zeros(1, 2), candidates, real=False))
    torch.manual_seed(0)
    values, real = Arm(views, share=0.25).draw(torch.zeros(4000, dtype=torch.long))
    assert torch.equal(values[:, 0].bool(), real)
    assert abs(real.float().mean() - 0.25) < 0.03
    pixels = tuple(View(view.values.byte().expand(1, 2, 2, 2), candidates, real=view.real) for view in views)
    values, real = Arm(pixels, share=1.0).draw(torch.zeros(3, dtype=torch.long))
    assert values.dtype == torch.uint8
    assert values.all()
    assert real.all()


def test_augmentation_shifts_by_an_eighth_and_mirrors_only_when_asked() -> None:
    size = 16
    column = torch.arange(size, dtype=torch.uint8).view(1, 1, size, 1).expand(200, size, size, 3)
    assert augmented(column, "none") is column
    torch.manual_seed(0)
    shifted = augmented(column, "crop")
    offsets = shifted[:, 0, size // 2, 0].int() - size // 2
    assert set(offsets.tolist()) == {-2, -1, 0, 1, 2}
    assert (shifted[:, :, 1:].int() >= shifted[:, :, :-1].int()).all()
    mirrored = augmented(column, "crop-flip")
    falling = mirrored[:, 0, 0, 0] > mirrored[:, 0, -1, 0]
    assert 60 < int(falling.sum()) < 140
