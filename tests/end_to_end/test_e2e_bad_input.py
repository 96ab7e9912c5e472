"""Bad input ends in one clear paragraph, early, and never in a half-written table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


def refused(inline_command, path: Path, *expected: str) -> None:
    done = inline_command("run", str(path), check=False)
    assert done.exit_code == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for text in expected:
        assert text in done.stderr.replace("\n", " "), done.stderr


def tables(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "runs").rglob("part-*"))


def test_misspelt_key(write_tiny, inline_command, tmp_path):
    refused(inline_command, write_tiny(select__kep=0.3), "select.kep", "config.yaml:", "'keep'")


def test_missing_prompt_file(write_tiny, inline_command, tmp_path):
    refused(inline_command, write_tiny(prompts__sources=[{"path": "no/such.jsonl"}]), "no/such.jsonl")
    assert not tables(tmp_path)


def test_wrong_column_name(write_tiny, inline_command, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"promt": "Hello there", "language": "en"}) + "\n")
    refused(inline_command, write_tiny(prompts__sources=[{"path": str(file)}]), "p.jsonl", "prompt", "promt")
    assert not tables(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"prompt": "a b c", "language": "en"}\n{broken\n', b"\xff\xfe\x00bad"])
def test_broken_files(write_tiny, inline_command, tmp_path, content):
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    refused(inline_command, write_tiny(prompts__sources=[{"path": str(file)}]), "p.jsonl")
    assert not tables(tmp_path)


def test_unreadable_model(write_tiny, inline_command, tmp_path):
    empty = tmp_path / "model"
    empty.mkdir()
    refused(inline_command, write_tiny(model__policy=str(empty)), str(empty))
    refused(inline_command, write_tiny(model__policy=str(tmp_path / "gone")), "gone")
    assert not tables(tmp_path)


def test_pickled_weights_are_refused(write_tiny, inline_command, tmp_path, tiny_model):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(inline_command, write_tiny(model__policy=str(folder)), "safetensors")


def test_prompts_longer_than_the_context_are_dropped_with_a_reason(write_tiny, inline_command, tmp_path):
    file = tmp_path / "p.jsonl"
    rows = [
        {"prompt": f"Tell me about number {n} in one sentence." + " more" * (2000 if n == 0 else 0), "language": "en"}
        for n in range(8)
    ]
    file.write_text("\n".join(json.dumps(r) for r in rows))
    path = write_tiny(
        prompts__sources=[{"path": str(file)}],
        languages__seen=["en"],
        languages__unseen=[],
        prompts__near_duplicate_threshold=1.0,
    )
    inline_command("run", str(path), "--until", "generate")
    shown = inline_command("inspect", str(tmp_path / "runs/t"), "dropped/candidates").stdout
    assert "prompt_too_long" in shown and "1 of 1 rows" in shown


def test_a_tokenizer_without_a_chat_template_gets_a_default_said_aloud(
    write_tiny, inline_command, tmp_path, tiny_model
):
    folder = tmp_path / "bare"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    done = inline_command("run", str(write_tiny(model__policy=str(folder))), "--until", "generate")
    assert "chat template" in done.stderr
