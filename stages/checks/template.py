"""A chat template is a program of others: it renders its first conversations in a process of its own, with limits on time and memory.

`{{ 10 ** 10 ** 10 }}`, loops in loops and texts that double themselves end that process, not the run's. What a template does only with some
text is the worker's: the driver ends one that hangs.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from schemas.config.model import TextConfig
from schemas.errors import UserError
from schemas.ids import content_id
from stages.contract import ModelRef
from stages.models.cache import cache_folder
from stages.models.process import with_this_code
from stages.text.render import Renderer, load_tokenizer

CPU_SECONDS = 20
MEMORY_BYTES = 1 << 30
"""More than the tokenizer took. A conversation of two messages takes a millisecond and kilobytes."""
_WALL_SECONDS = 300.0
"""On a machine with much else to do."""
_OUT_OF_MEMORY = 3
_FILES = ("*token*.json", "*template*")


def check_template(model: ModelRef, text: TextConfig, trust_remote_code: bool, cpu_seconds: int = CPU_SECONDS) -> None:
    """Raise UserError for a template that does not end, or wants more memory than any needs. What else is wrong with it is said by
    `Renderer`. One that was found to end is not tried again: a file in the cache says so."""
    if model.path is None:
        return
    passed = cache_folder() / "templates" / _content(model, text)
    if passed.exists():
        return
    given = {
        "name": model.name,
        "folder": str(model.path),
        "text": text.model_dump(mode="json"),
        "trust": trust_remote_code,
        "cpu_seconds": cpu_seconds,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "stages.checks.template"],
            input=json.dumps(given),
            text=True,
            env=with_this_code(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refused(f"takes longer than {_WALL_SECONDS:g} s") from None
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise _refused(f"takes longer than {cpu_seconds} s")
    if done.returncode in (_OUT_OF_MEMORY, -signal.SIGABRT, -signal.SIGSEGV):
        raise _refused(f"takes more than {MEMORY_BYTES >> 30} GiB of memory")
    with suppress(OSError):  # a cache that cannot be written: it is tried again by the next run
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()


def _content(model: ModelRef, text: TextConfig) -> str:
    """Of all files that a template may stand in, whatever weights are beside them."""
    assert model.path is not None
    files = sorted({path for pattern in _FILES for path in model.path.glob(pattern)})
    files += [Path(text.chat_template)] if text.chat_template is not None else []
    hashes = []
    for path in files:
        with suppress(OSError):  # `Renderer` says so
            hashes.append(hashlib.sha256(path.read_bytes()).hexdigest())
    return content_id("chat template", hashes, text.chat_template_kwargs)


def _refused(what: str) -> UserError:
    return UserError(
        f"The chat template cannot be used: a conversation of two messages {what}",
        where="text.chat_template",
        fix="It is a program, and this one loops or grows without end: give another, or another model.",
    )


def _main() -> int:
    given = json.load(sys.stdin)
    model = ModelRef(given["name"], Path(given["folder"]), "")
    try:
        tokenizer = load_tokenizer(model, given["trust"])
        tokenizer("a")  # what it allocates once
        _limit(given["cpu_seconds"])
        Renderer(tokenizer, TextConfig.model_validate(given["text"]))
    except UserError as error:
        return _OUT_OF_MEMORY if isinstance(error.__cause__, MemoryError) else 0
    except MemoryError:
        return _OUT_OF_MEMORY
    return 0


def _limit(cpu_seconds: int) -> None:
    """From here on."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    memory = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime) + cpu_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, soft + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    sys.exit(_main())
