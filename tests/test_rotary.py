"""Rotary positions: the rotation, the attention, towers that have them."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from small_clips import VIT
from torch import nn
from torch.nn import functional

from gmail_cli.components import clip_files, longtext, rotary
from gmail_cli.components.arms import Arm, View
from gmail_cli.components.loop import Recipe, fit
from gmail_cli.components.pairs import Candidates, Pairs
from gmail_cli.errors import UsageError


def test_a_rotation_multiplies_by_a_complex_number_of_length_one():
    values = torch.randn(2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = rotary.rotate(values, base=100.0)
    pairs = values.numpy()[..., 0::2] + 1j * values.numpy()[..., 1::2]
    turned = pairs * np.exp(1j * np.arange(7)[:, None] * 100.0 ** (-np.arange(0, 6, 2) / 6))
    np.testing.assert_allclose(found[..., 0::2].numpy(), turned.real, atol=1e-12)
    np.testing.assert_allclose(found[..., 1::2].numpy(), turned.imag, atol=1e-12)
    assert torch.autograd.gradcheck(rotary.rotate, (values.requires_grad_(),))


def test_products_depend_on_the_distance_alone():
    query, key = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turned = [rotary.rotate(each.expand(30, 8)) for each in (query, key)]
    products = turned[0] @ turned[1].T
    for distance in (0, 3, 11):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.isclose(products[0, 3], products[3, 0])


def test_attention_against_one_written_out():
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(12, 3, batch_first=True).double()
    nn.init.normal_(plain.in_proj_bias)
    ours = rotary.RotaryAttention(plain, base=50.0)
    assert set(ours.state_dict()) == set(plain.state_dict())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)
    found, _ = ours(x, x, x, need_weights=False, attn_mask=mask)
    wanted = torch.zeros_like(x)
    q, k, v = (x @ plain.in_proj_weight.T + plain.in_proj_bias).split(12, dim=-1)
    for row in range(2):
        for head in range(3):
            own = slice(4 * head, 4 * head + 4)
            turned = [rotary.rotate(each[row, :, own], base=50.0) for each in (q, k)]
            for at in range(5):
                shares = (turned[1][: at + 1] @ turned[0][at] / 2).softmax(0)
                wanted[row, at, own] = shares @ v[row, : at + 1, own]
    torch.testing.assert_close(found, wanted @ plain.out_proj.weight.T + plain.out_proj.bias)


def test_a_rotary_tower_is_saved_and_loaded_and_plain_open_clip_stops_at_it(tmp_path: Path):
    clip = clip_files.build_clip(VIT)
    longer = longtext.lengthened(clip, length=100, positions="rotary")
    assert longer.context_length == 100
    model = longer.model
    assert model.positional_embedding.shape == (100, 32)
    assert not model.positional_embedding.any()
    for name, tensor in clip.model.state_dict().items():
        if name not in {"positional_embedding", "attn_mask"}:
            assert torch.equal(tensor, model.state_dict()[name]), name
    texts = ["dog bites man", "man bites dog", "x " * 80 + "end", "x " * 80 + "bend"]
    embedded = longer.encode_texts(texts)
    assert torch.cdist(embedded, embedded)[~torch.eye(4, dtype=torch.bool)].min() > 1e-4
    with torch.inference_mode():
        theirs = model.encode_text(longer.tokenize(texts).ids, normalize=True)
    torch.testing.assert_close(embedded, theirs)
    clip_files.save_clip(longer, tmp_path)
    again = clip_files.load_clip(tmp_path)
    torch.testing.assert_close(again.encode_texts(texts), embedded, atol=0, rtol=0)
    assert again.digest == clip_files.model_digest(tmp_path) == longer.digest
    with pytest.raises(TypeError, match="rotary_base"):
        open_clip.create_model(f"local-dir:{tmp_path}")


def test_towers_that_cannot_be_rotary():
    odd = copy.deepcopy(VIT)
    odd["model_cfg"]["text_cfg"] |= {"width": 30, "heads": 2}
    with pytest.raises(UsageError, match="heads of width 15"):
        longtext.lengthened(clip_files.build_clip(odd), length=100, positions="rotary")
    model = clip_files.build_clip(VIT).model
    model.transformer.resblocks = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(UsageError, match="no learned positions to replace"):
        rotary.make_rotary(model, base=rotary.BASE, name="small")


def test_a_rotary_tower_learns_from_the_old_one_and_then_from_long_captions():
    clip = clip_files.build_clip(VIT, seed=1)
    texts = tuple(
        f"{'red' if i % 2 else 'blue'} {' and '.join('abcdefgh'[: 2 + i % 5])} thing number {i}" for i in range(24)
    )
    rows = Candidates.of([[row] for row in range(24)])
    count = torch.arange(24)
    pairs = Pairs(
        texts=texts,
        records=texts,
        owners=count,
        text_ids=count,
        labels=torch.full((24,), -1),
        class_names=(),
        real=rows,
        generated=None,
    )
    images = functional.normalize(torch.randn(24, clip.dim, generator=torch.Generator().manual_seed(2)), dim=-1)
    longer = longtext.lengthened(clip, length=64, positions="rotary")
    job = longtext.long_clip_job(
        longer, pairs, Arm((View(images, rows, True),)), shorts=None, teacher=clip, distilled=30
    )
    recipe = Recipe(steps=60, batch_size=12, lr=3e-3, restart=30, restart_lr=3e-3)
    curve = fit(job.module, loss=job.loss, rows=job.rows, recipe=recipe)
    losses = [row["loss"] for row in curve]
    assert losses[2] < 0.5 * losses[0] < 0.5
    assert losses[3] > 1 > losses[2]  # the contrast over twelve rows begins
    assert losses[5] < losses[3]
    assert not job.module.positional_embedding.any()
    assert not torch.equal(
        job.module.transformer.resblocks[0].attn.in_proj_weight,
        longer.model.transformer.resblocks[0].attn.in_proj_weight,
    )
    for name, tensor in job.module.visual.state_dict().items():
        assert torch.equal(tensor, clip.model.visual.state_dict()[name])
