"""Where the files that come with the package are."""

from __future__ import annotations

from pathlib import Path


def bundled_folders() -> list[Path]:
    """Return the folders of bundled weights and geometries: that of the wheel, and that of a source tree."""
    package = Path(__file__).resolve().parent
    return [folder for folder in (package / "weights", package.parent / "weights") if folder.is_dir()]
