"""What this machine has, and what each shipped profile would need here."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata, util
from pathlib import Path

from gmail_cli import profile as profiles
from gmail_cli import shipped
from gmail_cli.artifacts import package_versions
from gmail_cli.profile.schema import Profile

_SHIPPED = Path(__file__).parent / "weights" / "tiny"


def examine(workspace: Path) -> dict[str, dict[str, str]]:
    """Versions, devices, the faiss build, the hub cache, disk, Java, and the needs of each shipped profile.

    Args:
        workspace: The folder whose disk results would go to.
    """
    return {
        "versions": dict(package_versions()),
        "devices": _devices(),
        "search": _faiss(),
        "storage": _storage(workspace),
        "programs": {"java": shutil.which("java") or "absent: METEOR is left out of caption metrics"},
        "profiles": {name: _needs(profiles.load(path)) for name, path in shipped.profiles().items()},
    }


def _devices() -> dict[str, str]:
    import torch

    found = {"cpu": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads"}
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    return found


def _faiss() -> dict[str, str]:
    import faiss

    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    return {"faiss": f"{faiss.__version__} ({faiss.get_compile_options().strip()})", "faiss GPUs": str(gpus)}


def _storage(workspace: Path) -> dict[str, str]:
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    there = next(path for path in (workspace.resolve(), *workspace.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free / 2**30
    cache = Path(HF_HUB_CACHE)
    models = sorted(path.name for path in cache.glob("models--*")) if cache.is_dir() else []
    place = f"{workspace.resolve()}{'' if there.is_dir() else ' is a file, not a folder'}"
    return {
        "workspace": f"{place}: {free:.0f} GiB free",
        "hub cache": f"{cache}: {len(models)} model(s){', offline' if HF_HUB_OFFLINE else ''}",
        "shipped weights": f"{sum(f.stat().st_size for f in _SHIPPED.rglob('*') if f.is_file()) / 2**20:.1f} MiB",
    }


def _needs(profile: Profile) -> str:
    missing = [
        f"{key} = {ref} ({'a folder that is not here' if ref.count('/') > 1 else 'hub; not in the cache'})"
        for key, ref, revision in _models(profile)
        if not _is_here(ref, revision)
    ]
    for key in ("train", "test"):
        source = getattr(profile.data, key)
        if not source.startswith("scenes:") and not Path(source).exists() and not any(Path().glob(source)):
            missing.append(f"data.{key} = {source}")
    return "ready" if not missing else "needs " + "; ".join(missing)


def _models(profile: Profile) -> list[tuple[str, str, str]]:
    found = []
    if {"align", "train", "embed"} & {*profile.stages}:
        found.append(("model.clip", profile.model.clip, profile.model.revision))
    if "generate" in profile.stages and profile.generate.source == "pipeline":
        mixed = [profile.generate.with_generator(each) for each in profile.generate.mix]
        found += [("generate.model", each.model, each.revision) for each in mixed or [profile.generate]]
        if profile.generate.rewrite.lm:
            rewrite = profile.generate.rewrite
            found.append(("generate.rewrite.lm", rewrite.lm, rewrite.revision))
    if "generate" in profile.stages and profile.generate.safety_checker:
        found.append(("generate.safety_checker", profile.generate.safety_checker, profile.generate.safety_revision))
    return found


def _is_here(ref: str, revision: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    if ref == "tiny" or Path(ref).exists():
        return True
    if ref.startswith("hf-hub:") or (ref.count("/") == 1 and "hf-hub" not in ref):
        name = ref.removeprefix("hf-hub:")
        files = ("model_index.json", "open_clip_config.json", "config.json")
        return any(isinstance(try_to_load_from_cache(name, file, revision=revision or None), str) for file in files)
    return "/" not in ref and util.find_spec("open_clip") is not None and ref in _architectures()


def _architectures() -> set[str]:
    files = metadata.files("open_clip_torch") or []
    return {Path(str(file)).stem for file in files if "model_configs" in str(file)}
