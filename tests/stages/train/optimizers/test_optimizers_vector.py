"""The task vector: built as a stream, refused by name, the same wherever it is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from optimizer_bench import Bench, run, same
from safetensors.torch import load_file, save_file

from schemas.errors import UserError
from stages.train.optimizers import Merge, TaskVector, build_task_vector, stream
from stages.train.optimizers.build_vector import TrainedParameter


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], files: int = 1) -> Path:
    folder.mkdir(parents=True)
    names = sorted(tensors)
    for index in range(files):
        part = {name: tensors[name].contiguous() for name in names[index::files]}
        save_file(part, folder / f"model-{index + 1:05}-of-{files:05}.safetensors")
    return folder


def pair(tmp_path: Path, dtype: torch.dtype = torch.bfloat16, files: int = 3) -> tuple[Path, Path, Bench]:
    """An SFT checkpoint in several files and its base in one."""
    bench = Bench(30)
    base = {name: value.to(dtype) for name, value in bench.start.items()}
    sft = {name: (base[name].float() + bench.tau[name]).to(dtype) for name in base}
    return checkpoint(tmp_path / "sft", sft, files), checkpoint(tmp_path / "base", base), bench


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


@pytest.mark.parametrize("slice_size", [1 << 24, 100, 1])
def test_it_is_the_difference_of_two_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slice_size: int
) -> None:
    monkeypatch.setattr(stream, "SLICE", slice_size)
    sft, base, _ = pair(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        out = tmp_path / f"{dtype}.safetensors"
        build_task_vector(sft, base, out, dtype=dtype)
        later, earlier, built = read(sft), read(base), load_file(out)
        assert same(built, {name: (later[name].float() - earlier[name].float()).to(dtype) for name in later})
    assert sorted(p.name for p in tmp_path.glob("*.tmp")) == []


def test_building_needs_memory_for_slices_not_for_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read at once never exceeds a slice of whole rows, and the slices are the model."""
    monkeypatch.setattr(stream, "SLICE", 4 * 24)
    sft, _, _ = pair(tmp_path)
    opened = stream.Checkpoint(sft, "sft")
    sizes = [part.numel() for n in opened.names() for part in opened.slices(n)]
    assert max(sizes) == 4 * 24 and sum(sizes) == sum(t.numel() for t in read(sft).values())


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    sft, base, bench = pair(tmp_path)
    build_task_vector(sft, base, tmp_path / "a.safetensors")
    build_task_vector(sft, base, tmp_path / "b.safetensors")
    other = checkpoint(tmp_path / "other", {n: t + 1 for n, t in bench.start.items()})
    build_task_vector(sft, other, tmp_path / "c.safetensors")
    a, b, c = (TaskVector.open(tmp_path / f"{n}.safetensors").fingerprint for n in "abc")
    assert a == b != c
    save_file({"w": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match="not a task vector"):
        TaskVector.open(tmp_path / "plain.safetensors")


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layer.weight"] = tensors.pop("layer.weight")


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["embed.weight"] = tensors["embed.weight"][:-1]


def _quantise(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm"] = tensors["norm"].to(torch.int8)


def _break(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layer.bias"] = torch.full((24,), float("nan"), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop, r"layer\.weight.*model\.layer\.weight"),
        (_reshape, r"embed\.weight has shape \[39, 24\].*\[40, 24\]"),
        (_quantise, "norm is stored as I8"),
        (_break, r"layer\.bias is not finite"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_naming_the_tensor(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    sft, base, _ = pair(tmp_path)
    tensors = read(base)
    change(tensors)
    broken = checkpoint(tmp_path / "broken", tensors)
    with pytest.raises(UserError, match=said):
        build_task_vector(sft, broken, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_zero_task_vector_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    sft, _, _ = pair(tmp_path)
    with pytest.raises(UserError, match="zero"):
        build_task_vector(sft, sft, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("out.*"))


def test_tied_weights_are_found_under_either_name_and_refused_when_they_differ(tmp_path: Path) -> None:
    embed, head = torch.randn(5, 3), torch.randn(5, 3)
    wanted = {"embed.weight": TrainedParameter((5, 3), ("lm_head.weight",))}
    sft = checkpoint(tmp_path / "sft", {"embed.weight": embed})
    base = checkpoint(tmp_path / "base", {"lm_head.weight": head})
    build_task_vector(sft, base, tmp_path / "out.safetensors", parameters=wanted, dtype=torch.float32)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["embed.weight"], embed - head)
    untied = checkpoint(tmp_path / "untied", {"embed.weight": embed, "lm_head.weight": head})
    with pytest.raises(UserError, match=r"embed\.weight is tied to lm_head\.weight"):
        build_task_vector(sft, untied, tmp_path / "no.safetensors", parameters=wanted)
    doubled = checkpoint(tmp_path / "doubled", {"embed.weight": head, "lm_head.weight": head.clone()})
    build_task_vector(sft, doubled, tmp_path / "yes.safetensors", parameters=wanted)


@pytest.mark.parametrize(
    "merge",
    [
        Merge("ondare", 0.1, 0.5),
        Merge("ondare", 0.1, 0.5, "released"),
        Merge("onties", 0.1, 0.2),
        Merge("onties", 0.1, 0.2, "released", rescale=True),
        Merge("anchor", 0.1),
    ],
    ids=str,
)
def test_where_it_is_kept_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: Merge) -> None:
    monkeypatch.setattr("stages.train.optimizers.bucket.BUCKET", 700)
    sft, base, _ = pair(tmp_path)
    path = tmp_path / "tau.safetensors"
    build_task_vector(sft, base, path)
    results = []
    for keep in ("device", "cpu", "disk"):
        bench = Bench(31)
        weights = bench.weights()
        vector = TaskVector.open(path, keep)  # type: ignore[arg-type]
        run(bench.merged(weights, merge, vector, weight_decay=0.1), weights, bench.gradients(4))
        results.append(weights)
    assert all(same(results[0], other) for other in results[1:])
    assert [file.name for file in tmp_path.glob("tau*")] == [path.name], "a trimmed copy was left"
