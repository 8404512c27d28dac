"""Where the shipped profiles are. Imports nothing heavy: shell completion asks at every press of Tab."""

from __future__ import annotations

from pathlib import Path


def profile_folder() -> Path:
    """The folder of shipped profiles: in the wheel, or at the top of a checkout."""
    inside = Path(__file__).parent / "profiles"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[1] / "profiles"


def profiles() -> dict[str, Path]:
    """Name -> file of each shipped profile."""
    return {path.stem: path for path in sorted(profile_folder().glob("*.toml"))}
