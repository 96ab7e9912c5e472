"""Which GPUs this process may use, known without loading CUDA."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence

from schemas.errors import UserError

_SMI_SECONDS = 60
_UUID = re.compile(r"\(UUID: (\S+)\)")
_MIG = "MIG-"


def given_gpus() -> list[str] | None:
    """Ids in CUDA_VISIBLE_DEVICES; None where it is not set. A worker's are set by whoever started it."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return None
    return [device.strip() for device in chosen.split(",") if device.strip() not in ("", "-1")]


def visible_gpus() -> list[str]:
    """Ids of the GPUs this process may use, as CUDA_VISIBLE_DEVICES takes them: their numbers or, where MIG cuts one of them, UUIDs of the
    parts and of whole ones."""
    given = given_gpus()
    if given is not None:
        return given
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"nvidia-smi does not answer in {_SMI_SECONDS} s",
            fix="The driver hangs: look at the system's log, or name the GPUs in CUDA_VISIBLE_DEVICES.",
        ) from None
    return _ids(listed.stdout.splitlines())


def are_parts(gpus: Sequence[str]) -> bool:
    """Whether one of them is a part that MIG cut: CUDA shows a process one part, however many it is given."""
    return any(gpu.startswith(_MIG) for gpu in gpus)


def _ids(listed: Sequence[str]) -> list[str]:
    """Of the lines of `nvidia-smi -L`: a line a GPU, indented lines for its parts."""
    found: list[list[str]] = []  # of each GPU: itself, then its parts
    for line in listed:
        if line.startswith("GPU "):
            found.append([])
        if found and (uuid := _UUID.search(line)) is not None:
            found[-1].append(uuid[1])
    if not are_parts([uuid for ids in found for uuid in ids]):
        return [str(number) for number in range(len(found))]
    return [uuid for ids in found for uuid in (ids[1:] or ids)]
