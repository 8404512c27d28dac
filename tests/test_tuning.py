"""The tuned tower: LoRA through peft, merging, and leaving f_r alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from small_clips import RESNET, TEXT, TEXTS, VIT

from gmail_cli.components import clip_files, tuning
from gmail_cli.components.encoders import Clip
from gmail_cli.components.loop import trained_parameters
from gmail_cli.errors import InputError, UsageError


@pytest.fixture(scope="module")
def vit() -> Clip:
    return clip_files.build_clip(VIT, name="vit")


@pytest.fixture(scope="module")
def resnet() -> Clip:
    clip = clip_files.build_clip(RESNET, name="resnet")
    for name, parameter in clip.model.visual.named_parameters():
        if name.endswith("bn3.weight"):  # open_clip starts them at zero, which would hide what lies before
            parameter.data.fill_(1.0)
    return clip


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _tuned(tower: tuning.TunedTower, *, seed: int = 0) -> tuning.TunedTower:
    """Move every trained parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return tower


OPTIONS = [{}, {"decomposed": True}, {"rank_stabilised": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_adapter_round_trip(
    kind: str, options: dict[str, bool], pixels: torch.Tensor, tmp_path: Path, request: pytest.FixtureRequest
):
    clip: Clip = request.getfixturevalue(kind)
    real = clip.encode_images(pixels)
    tower = tuning.add_lora(clip, rank=2, alpha=4.0, **options)
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels), real, atol=1e-6, rtol=0)
        tuned = _tuned(tower)(pixels)
    assert (tuned - real).abs().max() > 1e-3
    assert torch.equal(clip.encode_images(pixels), real), "f_r moved"

    for name in ("adapter", "clip"):
        (tmp_path / name).mkdir()
    tuning.save_adapter(tower, tmp_path / "adapter", base=clip.name)
    with torch.no_grad():
        assert torch.equal(tuning.load_adapter(clip, tmp_path / "adapter")(pixels), tuned)

    merged = tuning.merge(clip, tower)
    torch.testing.assert_close(merged.encode_images(pixels), tuned, atol=1e-5, rtol=0)
    clip_files.save_clip(merged, tmp_path / "clip")
    plain = open_clip.create_model(f"local-dir:{tmp_path / 'clip'}").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain.encode_image(pixels, normalize=True), tuned, atol=1e-5, rtol=0)
    assert merged.digest == clip_files.model_digest(tmp_path / "clip") != clip.digest
    assert torch.equal(merged.encode_texts(TEXTS), clip.encode_texts(TEXTS))


@pytest.mark.parametrize("options", OPTIONS, ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_plain_peft_gives_the_same_embeddings(
    kind: str, options: dict[str, bool], pixels: torch.Tensor, tmp_path: Path, request: pytest.FixtureRequest
):
    from peft import PeftModel

    clip: Clip = request.getfixturevalue(kind)
    tower = _tuned(tuning.add_lora(clip, rank=2, **options))
    tuning.save_adapter(tower, tmp_path, base=clip.name)
    plain = PeftModel.from_pretrained(copy.deepcopy(clip.model.visual), str(tmp_path)).eval()
    with torch.no_grad():
        wrapped = torch.nn.functional.normalize(plain(pixels), dim=-1)
        folded = torch.nn.functional.normalize(plain.merge_and_unload()(pixels), dim=-1)
        torch.testing.assert_close(wrapped, tower(pixels), atol=1e-5, rtol=0)
        torch.testing.assert_close(folded, tower(pixels), atol=1e-5, rtol=0)


TIMM = {
    "vit_tiny_patch16_224": {"timm_pool": "map", "timm_proj": "none"},  # as SigLIP
    "eva02_tiny_patch14_224": {"timm_pool": "token", "timm_proj": "linear"},  # as EVA-CLIP
    "fastvit_t8": {"timm_pool": "avg", "timm_proj": None},  # as MobileCLIP
    "convnext_atto": {"timm_pool": "avg", "timm_proj": "mlp"},
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_towers(name: str, tmp_path: Path):
    """Plain peft, the folded model and the tower agree for towers of every family that open_clip takes from timm."""
    from peft import PeftModel

    options = TIMM[name]
    config = {
        "model_cfg": {
            "embed_dim": 192 if options["timm_proj"] == "none" else 16,
            "custom_text": True,
            "vision_cfg": {"image_size": 224, "timm_model_name": name, "timm_model_pretrained": False, **options},
            "text_cfg": TEXT,
        },
        "preprocess_cfg": {},
    }
    clip = clip_files.build_clip(config, name=name)
    for path, parameter in clip.model.visual.named_parameters():
        if path.endswith("gamma"):  # layer scales start near zero, which would hide what lies before
            parameter.data.fill_(1.0)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    tower = _tuned(tuning.add_lora(clip, rank=2))
    tuning.save_adapter(tower, tmp_path, base=name)
    plain = PeftModel.from_pretrained(copy.deepcopy(clip.model.visual), str(tmp_path)).eval()
    merged = tuning.merge(clip, tower)
    with torch.no_grad():
        tuned = tower(pixels)
        assert (tuned - clip.encode_images(pixels)).abs().max() > 1e-2
        torch.testing.assert_close(torch.nn.functional.normalize(plain(pixels), dim=-1), tuned, atol=1e-5, rtol=0)
        torch.testing.assert_close(merged.encode_images(pixels), tuned, atol=1e-5, rtol=0)


def test_adapter_bytes_repeat(vit: Clip, tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tuning.save_adapter(_tuned(tuning.add_lora(vit, rank=2, seed=3)), tmp_path / name, base="x")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_training_never_moves_a_frozen_weight(vit: Clip, pixels: torch.Tensor):
    tower = tuning.add_lora(vit, rank=2)
    before = {name: value.clone() for name, value in tower.visual.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in tower.parameters() if p.requires_grad], lr=0.1)
    start = tower(pixels)[:, 0].sum().item()
    for _ in range(5):
        optimizer.zero_grad()
        tower(pixels)[:, 0].sum().backward()
        optimizer.step()
    assert tower(pixels)[:, 0].sum().item() < start
    for name, value in tower.visual.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_trained_parameters_are_counted(vit: Clip):
    rank, width = 2, 32
    attention = rank * (width + 3 * width)
    mlp = 2 * rank * (width + 4 * width)
    assert trained_parameters(tuning.add_lora(vit, rank=rank)) == 2 * (attention + mlp)
    assert trained_parameters(tuning.unfreeze(vit)) == sum(p.numel() for p in vit.model.visual.parameters())


def test_rank_stabilised_updates_are_larger_by_the_root_of_the_rank(vit: Clip):
    """alpha / sqrt(r) against alpha / r: at rank 4 twice the update."""
    plain, stable = (_tuned(tuning.add_lora(vit, rank=4, rank_stabilised=on)) for on in (False, True))
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    base = vit.model.visual.get_parameter(name)
    torch.testing.assert_close(stable.adapted()[name] - base, 2 * (plain.adapted()[name] - base))


def test_dora_learns_the_lengths_of_rows(vit: Clip):
    """Whatever the update, a row of the weight has the learned length; nothing else changes it."""
    tower = _tuned(tuning.add_lora(vit, rank=2, decomposed=True))
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    layer = tower.adapter.base_model.model.get_submodule(name.removesuffix(".weight"))
    lengths = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(tower.adapted()[name].norm(dim=1), lengths)
    assert not any(".attn." in name for name in tower.adapted())


def test_dropout_hides_inputs_from_the_update_in_training_only(vit: Clip, pixels: torch.Tensor):
    tower = _tuned(tuning.add_lora(vit, rank=2, dropout=0.5))
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    update = tower.adapted()[name] - tower.visual.get_parameter(name)
    torch.manual_seed(0)
    dropped = tower.adapted(dropout=0.5)[name] - tower.visual.get_parameter(name)
    columns = dropped.abs().sum(0) > 0
    assert 0 < columns.sum() < len(columns)
    torch.testing.assert_close(dropped[:, columns], 2 * update[:, columns], atol=1e-5, rtol=1e-4)
    assert not torch.equal(tower(pixels), tower(pixels))
    with torch.no_grad():
        assert torch.equal(tower(pixels), tower(pixels))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_projection_tuning_moves_the_last_layer_only(kind: str, pixels: torch.Tensor, request: pytest.FixtureRequest):
    clip: Clip = request.getfixturevalue(kind)
    tower = _tuned(tuning.unfreeze_projection(clip))
    merged = tuning.merge(clip, tower)
    moved = {
        name
        for name, value in merged.model.visual.state_dict().items()
        if not torch.equal(value, clip.model.visual.state_dict()[name])
    }
    assert moved == ({"proj"} if kind == "vit" else {"attnpool.c_proj.weight", "attnpool.c_proj.bias"})
    assert (merged.encode_images(pixels) - clip.encode_images(pixels)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({"timm_pool": "avg", "timm_proj": "linear"}, "head.proj.weight"),
        ({"timm_pool": "avg", "timm_proj": None}, "trunk.head.fc."),  # as EVA-CLIP and MobileCLIP
        ({"timm_pool": "avg", "timm_proj": "none"}, None),  # as SigLIP
    ],
)
def test_the_projection_of_a_timm_tower(options: dict[str, Any], last: str | None):
    vision = {"image_size": 64, "timm_model_name": "convnext_atto", "timm_model_pretrained": False, **options}
    model_cfg = {"embed_dim": 320 if last is None else 16, "custom_text": True, "vision_cfg": vision, "text_cfg": TEXT}
    clip = clip_files.build_clip({"model_cfg": model_cfg, "preprocess_cfg": {}}, name="timm")
    if last is None:
        with pytest.raises(UsageError, match="timm has no projection"):
            tuning.unfreeze_projection(clip)
        return
    tower = tuning.unfreeze_projection(clip)
    trained = [name for name, each in tower.visual.named_parameters() if each.requires_grad]
    assert trained
    assert all(name.startswith(last) for name in trained)


def test_full_tuning_merges_and_leaves_f_r_alone(vit: Clip, pixels: torch.Tensor):
    real = vit.encode_images(pixels)
    tower = _tuned(tuning.unfreeze(vit))
    merged = tuning.merge(vit, tower)
    with torch.no_grad():
        torch.testing.assert_close(merged.encode_images(pixels), tower(pixels), atol=1e-6, rtol=0)
    assert (merged.encode_images(pixels) - real).abs().max() > 1e-3
    assert torch.equal(vit.encode_images(pixels), real)


def test_adapter_of_another_model_is_refused(vit: Clip, resnet: Clip, tmp_path: Path):
    tuning.save_adapter(tuning.add_lora(vit, rank=2), tmp_path, base=vit.name)
    with pytest.raises(InputError, match="no adapter for resnet"):
        tuning.load_adapter(resnet, tmp_path)
    with pytest.raises(InputError, match="no adapter for vit"):
        tuning.load_adapter(vit, tmp_path / "missing")


def test_unknown_lora_targets_are_refused(vit: Clip):
    with pytest.raises(UsageError, match=r"align\.lora_targets") as caught:
        tuning.add_lora(vit, targets=["nonsense"])
    assert "attn, c_fc, c_proj" in str(caught.value.hint)
    with pytest.raises(UsageError) as caught:
        tuning.add_lora(clip_files.build_clip(RESNET), targets=["nonsense"])
    assert "conv3, downsample.0" in str(caught.value.hint)


def test_chunks_hold_fewer_activations(vit: Clip, pixels: torch.Tensor):
    """What autograd keeps of the tower for the way back is one chunk's, and the gradients are those of the whole."""
    many = pixels.repeat(8, 1, 1, 1)
    kept, gradients = {}, {}
    for chunk in (0, 4):
        tower = _tuned(tuning.add_lora(vit))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            embedded = tower(many, chunk=chunk)
        kept[chunk] = sum(sizes)
        (embedded @ embedded.T).exp().sum().backward()
        gradients[chunk] = torch.cat([p.grad.flatten() for p in tower.parameters() if p.grad is not None])
    assert kept[4] < 0.2 * kept[0]
    torch.testing.assert_close(gradients[4], gradients[0], rtol=1e-4, atol=1e-5)
