"""The linear map from images to tokens, on made-up embeddings and a real language model of two layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from gmail_cli.components import sitta
from gmail_cli.components.tokenizer import save_tokenizer, train_tokenizer
from gmail_cli.errors import InputError

COLOURS, THINGS = ("red", "blue", "green", "black"), ("ball", "cube", "tree", "house", "boat")
TEXTS = tuple(f"A {colour} {thing} is on the {colour} one." for colour in COLOURS for thing in THINGS)
DIM = 24


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    tokenizer = train_tokenizer(TEXTS, entries=600)
    save_tokenizer(tokenizer, folder)
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=2, n_embd=48, n_head=2, n_positions=40, initializer_range=0.5, **ends
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def linear_map(folder: Path, *, tokens: int = 2, orders: int = 2) -> sitta.LinearMap:
    lm, tokenizer = sitta.load_lm(folder)
    about = {"lm": str(folder), "lm_revision": "", "encoder": "0" * 64, "tokens": tokens, "orders": orders}
    return sitta.LinearMap(DIM, lm=lm, tokenizer=tokenizer, about=about)


def images(noise: float = 0.0) -> torch.Tensor:
    """An image is the sum of what shows its colour and what shows its thing."""
    drawn = torch.Generator().manual_seed(3)
    colours, things = (torch.randn(len(words), DIM, generator=drawn) for words in (COLOURS, THINGS))
    whole = (colours[:, None] + things[None]).flatten(0, 1)
    return whole + noise * torch.randn(whole.shape, generator=drawn)


def test_the_words_of_a_caption_without_function_words(lm_folder: Path):
    model = linear_map(lm_folder)
    (ids,) = model.content_tokens(["A red ball is on the Red, RED house."])
    assert model.tokenizer.decode(ids).split() == ["red", "ball", "house"]


@pytest.mark.parametrize("how", ["least-squares", "procrustes"])
def test_the_map_is_the_closed_form_of_its_pairs(lm_folder: Path, how: str):
    """Against numpy on one row for each (image, token) pair, as SITTA writes them out."""
    model = linear_map(lm_folder)
    drawn = np.random.default_rng(0)
    texts = [" ".join(drawn.choice([*"bcdefghjklmnopqrstuvwxyz0123456789"], size=count)) for count in [2, 3, 5] * 20]
    features = torch.from_numpy(drawn.normal(size=(len(texts), DIM)))
    explained = model.fit(features, texts, how=how)
    unit = features.numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    x = (unit - unit.mean(0)) / unit.std(0)
    table = model.lm.get_input_embeddings().weight.detach().double().numpy()
    table = (table - table.mean(0)) / table.std(0)
    pairs = [(row, number) for row, ids in enumerate(model.content_tokens(texts)) for number in ids]
    source, target = x[[row for row, _ in pairs]], table[[number for _, number in pairs]]
    if how == "procrustes":
        left, _, right = np.linalg.svd(source.T @ target, full_matrices=False)
        wanted = left @ right
        np.testing.assert_allclose(wanted @ wanted.T, np.eye(DIM), atol=1e-9)
    else:
        wanted = np.linalg.solve(source.T @ source + np.eye(DIM), source.T @ target)
    np.testing.assert_allclose(model.weight.detach().numpy(), wanted, atol=2e-4)
    rest = np.square(target - source @ wanted).sum() / np.square(target).sum()
    assert explained == pytest.approx(1 - rest, abs=1e-4)


def test_images_find_their_words_and_the_caption_that_fits_is_taken(lm_folder: Path, tmp_path: Path):
    model = linear_map(lm_folder, orders=6)
    assert model.fit(images(), TEXTS, how="least-squares") > 0.3
    shown = images(noise=0.1)
    found = [set(model.tokenizer.decode(ids).split()) for ids in model.retrieve(shown)]
    wanted = [{colour, thing} for colour in COLOURS for thing in THINGS]
    assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= 18
    said: list[list[str]] = []

    def embed(texts: list[str]) -> torch.Tensor:
        """The last one fits every image best."""
        said.append(texts)
        fits = functional.normalize(shown[len(said) - 1], dim=0)
        return torch.stack([-fits] * (len(texts) - 1) + [fits])

    written = sitta.write_captions(model, shown[:3], embed=embed, max_tokens=6)
    assert written == [texts[-1] for texts in said]
    assert all(1 < len(texts) <= 2 for texts in said)  # two tokens have two orders
    sitta.save_linear_map(model, tmp_path)
    again = sitta.load_linear_map(tmp_path)
    torch.testing.assert_close(again(shown), model(shown))
    assert again.about == model.about
    (tmp_path / "head.json").write_text('{"head": "probe", "dim": 3}')
    with pytest.raises(InputError, match=r"no linear map: it is of a probe"):
        sitta.load_linear_map(tmp_path)


def test_captions_of_function_words_are_refused(lm_folder: Path):
    with pytest.raises(InputError, match=r"none of 2 captions, such as 'on the other', has a word"):
        linear_map(lm_folder).fit(images()[:2], ["on the other", "one of them"], how="least-squares")


def test_orders_are_different_and_begin_with_the_nearest_first():
    assert sitta.orders([1, 2], count=40) == [[1, 2], [2, 1]]
    many = sitta.orders([5, 6, 7, 8], count=10)
    assert many[0] == [5, 6, 7, 8]
    assert len({tuple(order) for order in many}) == len(many) > 5
    assert all(sorted(order) == [5, 6, 7, 8] for order in many)
