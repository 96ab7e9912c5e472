"""Names to models: what is there, what is whole, what is safe to load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import UserError
from stages.models import cache
from stages.models.resolve import resolve


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_the_digest_follows_content_and_not_place_or_time(folder: Path, store: Path, tmp_path: Path) -> None:
    digest = resolve(str(folder), cache=store).digest
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "README.md").write_text("notes")
    os.utime(copy / "config.json")
    assert resolve(str(copy), cache=store).digest == digest
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert resolve(str(copy), cache=store).digest != digest
    (folder / "vocab.txt").write_text("a")
    assert resolve(str(folder), cache=store).digest != digest


def test_unchanged_files_are_not_read_again(folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve(str(folder), cache=store)

    def never(*_: object) -> None:
        raise AssertionError("a file was hashed again")

    monkeypatch.setattr(cache, "sha256", never)
    begun = time.monotonic()
    assert resolve(str(folder), cache=store) == first
    assert time.monotonic() - begun < 1
    os.utime(folder / "config.json", (1, 1))
    with pytest.raises(AssertionError):
        resolve(str(folder), cache=store)


def test_a_damaged_hash_cache_is_only_slower(folder: Path, store: Path) -> None:
    digest = resolve(str(folder), cache=store).digest
    (store / "hashes.json").write_text('{"half')
    assert resolve(str(folder), cache=store).digest == digest


def test_resolving_imports_no_torch(folder: Path, store: Path) -> None:
    code = (
        "import sys, pathlib; from stages.models.resolve import resolve; "
        f"resolve({str(folder)!r}, cache=pathlib.Path({str(store)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-7])


def lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002.safetensors"}}')


def foreign(name: str):
    """Leave only a file of another kind of weights."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).touch()

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (pickled, "pickle weights"),
        (truncated, "damaged.*not fully covered"),
        (lfs_pointer, "damaged"),
        (no_tokenizer, "no tokenizer"),
        (bad_config, "config.json .*cannot be read"),
        (missing_shard, "lacks weight files: model-00002"),
        (foreign("model.gguf"), r"model\.gguf is GGUF"),
        (foreign("__0_0.distcp"), "a distributed checkpoint.*dcp_to_torch"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no .*safetensors"),
    ],
)
def test_an_unusable_folder_is_refused_with_the_reason(folder: Path, store: Path, damage, says: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=says) as caught:
        resolve(str(folder), cache=store)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "a b", "embedded:none", "a/b/c"])
def test_a_name_that_is_nothing_is_refused(name: str, store: Path) -> None:
    with pytest.raises(UserError, match=r"embedded"):
        resolve(name, cache=store)


def test_a_folder_that_may_not_be_looked_into_is_called_that(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.stat

    def stat(path, *args, **kwargs):
        if str(path).startswith(str(folder)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)  # root is denied nothing
    with pytest.raises(UserError, match="permission denied"):
        resolve(str(folder), cache=store)


def test_a_hub_id_that_cannot_be_fetched_says_so(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="could not be fetched"):
        resolve("nobody/nothing-here", cache=store)


def test_a_hub_snapshot_is_known_by_its_commit(
    folder: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, **options: object) -> str:
        assert "config.json" in options["allow_patterns"] and "preprocessor_config.json" in options["allow_patterns"]
        asked.append((name, options["revision"]))
        return str(tmp_path / "snapshots" / str(options["revision"]))

    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(folder, tmp_path / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    one, other = (resolve("some/model", revision=commit * 40, cache=store) for commit in "ab")
    assert asked == [("some/model", "a" * 40), ("some/model", "b" * 40)]
    assert one.digest != other.digest
    assert one == resolve("some/model", revision="a" * 40, cache=store)


def test_an_adapter_is_merged_once_into_its_base(folder: Path, store: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
    model.save_pretrained(tmp_path / "adapter")
    (folder / "processor_config.json").write_text("{}")
    found = resolve(str(tmp_path / "adapter"), cache=store)
    assert (found.path / "processor_config.json").exists()
    assert found.path is not None and found.name == str(tmp_path / "adapter")
    assert found.adapter == (tmp_path / "adapter", folder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        want, got = model(ids).logits, AutoModelForCausalLM.from_pretrained(found.path)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (got - base).abs().max() > 0.01
    made = (found.path / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(tmp_path / "adapter"), cache=store) == found
    assert (found.path / "model.safetensors").stat().st_mtime_ns == made


def test_an_adapter_without_its_base_names_the_base(store: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone"}')
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (adapter / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match=r"base model of the adapter.*/gone"):
        resolve(str(adapter), cache=store)


def adapter_folder(folder: Path, base: str, **config: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, **config}))
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return folder


def test_an_adapter_that_is_its_own_base_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names itself as its base model"):
        resolve(str(adapter_folder(tmp_path / "adapter", str(tmp_path / "adapter"))), cache=store)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"])
def test_adapters_that_cannot_be_merged_are_refused_by_name(
    store: Path, tmp_path: Path, folder: Path, kind: str
) -> None:
    with pytest.raises(UserError, match=f"is {kind}: it adds to every prompt"):
        resolve(str(adapter_folder(tmp_path / "adapter", str(folder), peft_type=kind)), cache=store)


@pytest.mark.parametrize("ranks", [{"r": 10_000_000}, {"r": 1, "rank_pattern": {"q_proj": 10_000_000}}])
def test_an_adapter_of_a_rank_that_none_of_its_tensors_has_is_refused_before_anything_is_made(
    store: Path, tmp_path: Path, folder: Path, ranks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT makes matrices of that rank first and compares shapes after."""
    monkeypatch.setattr("stages.models.merge.run_module", None)
    with pytest.raises(UserError, match=r"says r: 10,000,000, and no tensor"):
        resolve(str(adapter_folder(tmp_path / "adapter", str(folder), peft_type="LORA", **ranks)), cache=store)
