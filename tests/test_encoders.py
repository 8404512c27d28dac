"""Encoders: loading, saving, embedding, and the tuned tower."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from small_clips import RESNET, TEXT, TEXTS, VIT

from gmail_cli.components import clip_files, embedding, encoders, rotary
from gmail_cli.components.encoders import Clip
from gmail_cli.errors import InputError, SetupError, UsageError


@pytest.fixture(scope="module")
def vit() -> Clip:
    return clip_files.build_clip(VIT, name="vit")


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# -- loading and saving ------------------------------------------------------------------------------------------


def test_saved_model_loads_in_plain_open_clip_with_equal_outputs(vit: Clip, pixels: torch.Tensor, tmp_path: Path):
    clip_files.save_clip(vit, tmp_path)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    model.eval()
    with torch.no_grad():
        images = model.encode_image(pixels, normalize=True)
        texts = model.encode_text(tokenizer(TEXTS), normalize=True)
    torch.testing.assert_close(vit.encode_images(pixels), images, atol=1e-6, rtol=0)
    torch.testing.assert_close(vit.encode_texts(TEXTS), texts, atol=1e-6, rtol=0)
    assert transform is not None

    again = clip_files.load_clip(tmp_path)
    assert again.digest == vit.digest == clip_files.model_digest(tmp_path)
    assert torch.equal(again.encode_images(pixels), vit.encode_images(pixels))
    assert again.model.visual.transformer.resblocks[0].mlp.gelu.__class__.__name__ == "QuickGELU"


def test_digest_follows_content_not_file_layout(vit: Clip, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        clip_files.save_clip(vit, tmp_path / name)
    tensors = load_file(tmp_path / "b" / clip_files.WEIGHTS_FILE)
    save_file(tensors, tmp_path / "b" / clip_files.WEIGHTS_FILE, metadata={"made": "elsewhere"})
    assert clip_files.model_digest(tmp_path / "b") == clip_files.model_digest(tmp_path / "a")
    tensors["logit_scale"] = tensors["logit_scale"] + 1
    save_file(tensors, tmp_path / "b" / clip_files.WEIGHTS_FILE)
    assert clip_files.model_digest(tmp_path / "b") != clip_files.model_digest(tmp_path / "a")
    config = {**VIT, "model_cfg": {**VIT["model_cfg"], "quick_gelu": False}}
    (tmp_path / "c" / clip_files.CONFIG_FILE).write_text(json.dumps(config))
    assert clip_files.model_digest(tmp_path / "c") != clip_files.model_digest(tmp_path / "a")


def test_random_weights_follow_the_seed(vit: Clip):
    name = "visual.conv1.weight"
    same, other = (clip_files.build_clip(VIT, seed=seed) for seed in (0, 1))
    assert torch.equal(vit.model.get_parameter(name), same.model.get_parameter(name))
    assert not torch.equal(vit.model.get_parameter(name), other.model.get_parameter(name))
    assert vit.digest == same.digest != other.digest
    assert clip_files.model_digest("RN50", seed=1) != clip_files.model_digest("RN50", seed=2)


@pytest.mark.parametrize(
    ("ref", "named"),
    [
        ("ViT-B-17", "ViT-B-16"),
        ("ViT-B-16/opnai", "openai"),
        ("ViT-B-16-quickgelu/laion2b_s34b_b88k", "laion2b_s34b_b88k"),
    ],
)
def test_unknown_models_are_refused_with_the_nearest(ref: str, named: str):
    with pytest.raises(UsageError, match=named):
        clip_files.load_clip(ref)


def test_a_hub_model_needs_its_revision():
    for read in (clip_files.model_digest, clip_files.load_clip):
        with pytest.raises(UsageError, match=r"'hf-hub:some/clip' is a hub id without model\.revision"):
            read("hf-hub:some/clip")
    assert clip_files.model_digest("hf-hub:some/clip", revision="abc")


def test_disagreement_about_the_activation_is_refused():
    with pytest.raises(UsageError, match="QuickGELU"):
        clip_files.load_clip("roberta-ViT-B-32/laion2b_s12b_b32k")


def test_damaged_folders_are_named(vit: Clip, tmp_path: Path):
    with pytest.raises(InputError, match=clip_files.CONFIG_FILE):
        clip_files.load_clip(tmp_path)
    (tmp_path / clip_files.CONFIG_FILE).write_text(json.dumps(VIT))
    with pytest.raises(InputError, match="no weights"):
        clip_files.load_clip(tmp_path)
    clip_files.save_clip(vit, tmp_path)
    weights = tmp_path / clip_files.WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=str(tmp_path)):
        clip_files.load_clip(tmp_path)


def test_older_weights_are_read_but_nothing_in_them_is_run(vit: Clip, pixels: torch.Tensor, tmp_path: Path):
    folder, older = tmp_path / "clip", tmp_path / "clip" / "open_clip_pytorch_model.bin"
    folder.mkdir()
    clip_files.save_clip(vit, folder)
    (folder / clip_files.WEIGHTS_FILE).unlink()
    torch.save(vit.model.state_dict(), older)
    torch.testing.assert_close(clip_files.load_clip(folder).encode_images(pixels), vit.encode_images(pixels))

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({**vit.model.state_dict(), "logit_scale": Trap()}, older)
    with pytest.raises(InputError, match="something else than tensors"):
        clip_files.load_clip(folder)
    assert not (tmp_path / "sprung").exists()


def test_a_tokenizer_of_transformers_is_the_one_that_is_named(tmp_path: Path):
    from open_clip.tokenizer import HFTokenizer

    shutil.copytree(clip_files.SHIPPED["tiny"], tmp_path / "own", ignore=shutil.ignore_patterns("*.safetensors"))
    config = copy.deepcopy(VIT)
    options = {"hf_tokenizer_name": str(tmp_path / "own"), "tokenizer_kwargs": {"clean": "canonicalize"}}
    config["model_cfg"]["text_cfg"].update(options)
    expected = HFTokenizer(str(tmp_path / "own"), 32, clean="canonicalize")(["A red, ball!"])
    assert torch.equal(clip_files.build_clip(config).tokenize(["A red, ball!"]).ids, expected)
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "nobody/no-tokenizer"
    with pytest.raises(SetupError, match="nobody/no-tokenizer"):
        clip_files.build_clip(config)


def test_bf16_is_refused_where_it_is_slow(monkeypatch: pytest.MonkeyPatch):
    fast = torch.ops.mkldnn
    for supported in (True, False):
        monkeypatch.setattr(fast, "_is_mkldnn_bf16_supported", lambda supported=supported: supported)
        encoders.require_precision("embed.precision", "fp32", device=torch.device("cpu"))
        encoders.require_precision("embed.precision", "bf16", device=torch.device("cuda"))
    with pytest.raises(UsageError, match=r"embed\.precision = 'bf16'"):
        encoders.require_precision("embed.precision", "bf16", device=torch.device("cpu"))


@pytest.mark.parametrize("kind", ["vit", "resnet", "custom", "rotary", "timm"])
def test_rounded_towers_give_nearly_the_same_unit_vectors(kind: str, pixels: torch.Tensor):
    config = copy.deepcopy(RESNET if kind == "resnet" else VIT)
    if kind == "custom":
        config["model_cfg"]["custom_text"] = True
    if kind == "rotary":
        config["model_cfg"]["text_cfg"][rotary.KEY] = 10000.0
    if kind == "timm":
        config["model_cfg"]["vision_cfg"] = {"timm_model_name": "convnext_atto", "timm_pool": "avg", "image_size": 32}
    exact, clip = (clip_files.build_clip(config, precision=each) for each in ("fp32", "bf16"))
    assert encoders.rounded(exact).dtype == torch.float32
    assert encoders.rounded(clip).dtype == torch.bfloat16
    for encode, given in (("encode_images", pixels), ("encode_texts", TEXTS)):
        ours, theirs = getattr(clip, encode)(given), getattr(exact, encode)(given)
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() > 0
        torch.testing.assert_close(torch.linalg.vector_norm(ours, dim=1), torch.ones(len(ours)))
        assert (ours * theirs).sum(dim=1).min() > 0.995


# -- embedding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("custom", [False, True])
def test_trimmed_texts_equal_padded_ones(custom: bool):
    config = copy.deepcopy(VIT)
    config["model_cfg"]["custom_text"] = custom
    clip = clip_files.build_clip(config)
    tokens = clip.tokenize(TEXTS)
    with torch.no_grad():
        padded = clip.model.encode_text(tokens.ids, normalize=True)
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(clip.encode_texts([text])[0], padded[row], atol=1e-6, rtol=0)
    vectors, truncated = embedding.embed_texts(clip, TEXTS, batch_size=2)
    np.testing.assert_allclose(vectors, padded.numpy(), atol=1e-6)
    assert truncated.tolist() == tokens.truncated.tolist()
    assert tokens.truncated.tolist() == [False, False, False, True, False]  # row 2 fills all 32 positions exactly
    assert int(tokens.ids[2].argmax()) == clip.context_length - 1


def test_text_trimming_does_less_work(vit: Clip):
    lengths: list[int] = []
    handle = vit.model.ln_final.register_forward_hook(lambda _module, inputs, _out: lengths.append(inputs[0].shape[1]))
    try:
        embedding.embed_texts(vit, ["a cat", "x " * 80, "a dog"], batch_size=2)
    finally:
        handle.remove()
    assert lengths == [4, 32]


def test_texts_read_by_length_keep_their_order_and_cost_less(vit: Clip):
    ids = vit.tokenize([*TEXTS, *TEXTS[::-1]]).ids
    lengths: list[int] = []
    handle = vit.model.ln_final.register_forward_hook(lambda _module, inputs, _out: lengths.append(inputs[0].shape[1]))
    with torch.no_grad():
        by_length = encoders.text_features_by_length(vit.model, ids, bucket=2)
        handle.remove()
        torch.testing.assert_close(by_length, encoders.text_features(vit.model, ids), atol=1e-6, rtol=0)
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] == vit.context_length


def test_towers_that_see_all_positions_are_not_trimmed():
    config = copy.deepcopy(VIT)
    config["model_cfg"]["custom_text"] = True
    config["model_cfg"]["text_cfg"] |= {"no_causal_mask": True, "pool_type": "last"}
    clip = clip_files.build_clip(config)
    tokens = clip.tokenize(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_texts(TEXTS), clip.model.encode_text(tokens.ids, normalize=True))
        plain = clip.model.encode_text(tokens.ids)
        torch.testing.assert_close(encoders.text_features_by_length(clip.model, tokens.ids, bucket=2), plain)
    assert tokens.truncated.tolist() == [False, False, False, True, False]


def test_images_embed_in_order_as_unit_rows(vit: Clip):
    import io

    from PIL import Image

    def image_bytes(row: int) -> bytes:
        stream = io.BytesIO()
        Image.new("RGB", (40, 30), (row * 20, 255 - row * 20, 99)).save(stream, "PNG")
        return stream.getvalue()

    seen: list[tuple[int, int]] = []
    vectors = embedding.embed_images(vit, image_bytes, 7, batch_size=3, progress=lambda *at: seen.append(at))
    assert vectors.shape == (7, 16)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    single = embedding.embed_images(vit, lambda _row: image_bytes(5), 1)
    np.testing.assert_allclose(vectors[5], single[0], atol=1e-6)
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_the_tokenizer_of_another_model_is_named(tmp_path: Path):
    """open_clip's own has 49,408 tokens, the text tower here 600."""
    config = {**VIT, "model_cfg": {**VIT["model_cfg"], "text_cfg": {**TEXT, "vocab_size": 600}}}
    clip_files.save_clip(clip_files.build_clip(config), tmp_path)
    clip = clip_files.load_clip(tmp_path)
    with pytest.raises(InputError, match=r"gives token 49407 for 'a cat' .* its text tower knows 600 tokens"):
        clip.tokenize(["a cat"])


def test_a_coca_is_refused_by_name(tmp_path: Path):
    with pytest.raises(UsageError, match=r"coca_ViT-B-32 is a CoCa, which is not supported"):
        clip_files.load_clip("coca_ViT-B-32")
    config = {"model_cfg": {**VIT["model_cfg"], "multimodal_cfg": {}}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_model.safetensors").touch()
    with pytest.raises(UsageError, match="is a CoCa"):
        clip_files.load_clip(tmp_path)
