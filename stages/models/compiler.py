"""What Triton, which TRL's loss and vLLM run on GPUs by, needs of this machine when it first runs a kernel. Imports no Triton."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

from schemas.errors import UserError

INSTALL = "Install gcc and Python's headers (Debian: apt-get install gcc python3-dev)."


def lacking() -> list[str]:
    """What is missing of a C compiler and the headers of this Python, in words."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return [*([] if found else ["C compiler"]), *([] if header.is_file() else [f"Python's headers ({header})"])]


def refuse_without_compiler(what: str) -> None:
    """Raise UserError where `what` could not compile its kernels for a GPU."""
    if missing := lacking():
        raise UserError(f"{what} compiles kernels for the GPU, and there is no {' and no '.join(missing)}", fix=INSTALL)
