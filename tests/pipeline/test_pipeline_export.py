"""What is exported is what is loaded: with the real `datasets` and one cache for everything."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pipeline import export
from pipeline.config_file import dump, load_config
from pipeline.dataset_card import Contents, dataset_card
from pipeline.export_folder import MARK, push
from schemas.errors import UserError
from schemas.manifests import StageManifest, Tally
from tests.pipeline.hub_server import hub_server


@pytest.fixture
def exported(write_config, curate):
    """Export pairs of these numbers into a folder; returns the folder."""
    config = load_config(write_config())

    def make(out: Path, numbers: range, name: str = "t") -> Path:
        mine = config.model_copy(update={"name": name})
        curate(mine, numbers)
        return export.export_dataset(mine, out, None, None, False)

    return make


def test_two_exports_are_never_taken_for_one_another(exported, tmp_path):
    """Two runs, the same folder again, a renamed folder, and the Parquet builder by path; one cache for all."""
    load_dataset = pytest.importorskip("datasets").load_dataset

    cache = str(tmp_path / "cache")

    def loaded(folder: Path) -> list[str]:
        rows = load_dataset(str(folder), split="train", cache_dir=cache)
        by_path = load_dataset("parquet", data_files=str(folder / "data/*.parquet"), split="train", cache_dir=cache)
        assert rows["pair_id"][:] == by_path["pair_id"][:]
        return list(rows["pair_id"][:])

    one = exported(tmp_path / "a/export", range(3), "one")
    assert loaded(one) == ["p0", "p1", "p2"]
    two = exported(tmp_path / "b/export", range(5, 7), "one")
    assert loaded(two) == ["p5", "p6"]
    again = exported(tmp_path / "a/export", range(7, 10), "one")
    assert loaded(again) == ["p7", "p8", "p9"]
    assert loaded(two) == ["p5", "p6"]
    (tmp_path / "c").mkdir()
    renamed = again.rename(tmp_path / "c/export")
    first = exported(tmp_path / "a/export", range(3), "one")
    assert loaded(renamed) == ["p7", "p8", "p9"] and loaded(first) == ["p0", "p1", "p2"]


def test_the_card_counts_what_is_loaded_and_says_how_it_was_made(exported, tmp_path):
    load_dataset_builder = pytest.importorskip("datasets").load_dataset_builder

    out = exported(tmp_path / "out", range(4))
    builder = load_dataset_builder(str(out), cache_dir=str(tmp_path / "cache"))
    assert builder.info.splits["train"].num_examples == 4
    assert builder.info.download_size == sum(path.stat().st_size for path in (out / "data").iterdir())
    _, header, body = (out / "README.md").read_text().split("---\n", 2)
    meta = yaml.safe_load(header)
    assert meta["size_categories"] == ["n<1K"] and meta["task_categories"] == ["text-generation"]
    assert meta["language"] == ["en"] and "license" not in meta
    assert "| select | 13 pairs | 4 | below_cut 9 |" in body
    assert "Self-judged" in body and "\\" not in body


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        ({"model": {"policy": "a/b", "judge": "big/judge"}}, "Rated by a model, big/judge", "Self-judged"),
        ({"pairs": {"sources": [{"path": "org/prefs"}]}, "prompts": {}}, "the source's word", "Self-judged"),
        ({"select": {"by": "margin"}}, "a baseline", "agreement of a pair's"),
        ({"conflict": {"target": "dev"}}, "of trusted pairs (the dev split", "of the other languages"),
        ({"conflict": {"score": "others"}}, "of the other languages", "trusted"),
        ({"conflict": {"language_weights": {"de": 2}}}, "Languages weigh de 2 in it, the others 1.", "trusted"),
        ({}, "agreement of a pair's", "no likelier"),
        ({"card": {"dataset_license": "cc-by-4.0"}}, "license: cc-by-4.0", "license: apache"),
    ],
)
def test_the_card_says_the_truth_about_labels_selection_and_licence(write_config, changes, said, unsaid):
    config = load_config(write_config(**changes))
    card = dataset_card(config, 0, Contents("data/x", {"en": 2}, 1, 1), [])
    assert said in card and unsaid not in card


@pytest.mark.parametrize("by", ["conflict", "random"])
def test_the_card_counts_what_the_gate_held_back_whatever_selects(write_config, by):
    config = load_config(write_config(select={"by": by}))
    tally = Tally(unit="pair", language="en", rows_in=9, kept=3, dropped={"off_topic": 4, "below_cut": 2})
    made = StageManifest(stage="select", round=0, fingerprint="f", content="c", files=[], tallies=[tally])
    card = dataset_card(config, 0, Contents("data/x", {"en": 3}, 1, 1), [made])
    assert "4 pairs were left out before: the prompt makes an answer of it no likelier" in card


@pytest.mark.parametrize(("unit", "kept", "said"), [("row", 240, True), ("row", 183, False), ("prompt", 240, False)])
def test_the_card_counts_what_is_held_out_of_imported_pairs(write_config, unit, kept, said):
    tallies = {
        "pairs": Tally(unit=unit, language="en", rows_in=kept, kept=kept),
        "gradients": Tally(unit="pair", language="en", rows_in=183, kept=183),
    }
    made = [
        StageManifest(stage=stage, round=0, fingerprint="f", content="c", files=[], tallies=[tally])
        for stage, tally in tallies.items()
    ]
    card = dataset_card(load_config(write_config()), 0, Contents("data/x", {"en": 3}, 1, 1), made)
    assert ("Held out for evaluation after the stage pairs: 57 pairs." in card) == said
    assert said or "Held out" not in card


def test_the_hubs_own_classes_read_both_cards_and_lose_nothing(write_config, exported, tmp_path):
    """DatasetCard and ModelCard check headers as far as they do without the hub: its classes, its model-index."""
    hub = pytest.importorskip("huggingface_hub")
    config = load_config(
        write_config(card={"dataset_license": "cc-by-4.0"}, languages={"seen": ["zh-Hans", "en", "yue"]})
    )
    counts = {"en": 2, "zh-Hans": 1, "yue": 1, "und": 2}
    text = dataset_card(config, 0, Contents("data/train-*-abc.parquet", counts, 10, 20), [])
    card = hub.DatasetCard(text)
    assert card.data.license == "cc-by-4.0" and card.data.language == ["en", "yue", "zh"]
    assert card.data.task_categories == ["text-generation"] and card.data.size_categories == ["n<1K"]
    assert card.data.multilinguality == ["multilingual"] and card.data.annotations_creators == ["machine-generated"]
    assert yaml.safe_load(str(card).split("---\n")[1]) == yaml.safe_load(text.split("---\n")[1])
    assert "No licence was given" not in text
    alone = hub.DatasetCard.load(exported(tmp_path / "out", range(2)) / "README.md")
    assert alone.data.license is None and "No licence was given" in alone.text
    assert alone.data.multilinguality == ["monolingual"] and alone.text.count("\\") == 0


@pytest.mark.parametrize(
    ("rows", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**6, "1M<n<10M"), (10**8, "n>10M")],
)
def test_sizes_are_the_hubs_categories(write_config, rows, category):
    card = dataset_card(load_config(write_config()), 0, Contents("data/x", {"en": rows}, 1, 1), [])
    assert yaml.safe_load(card.split("---\n")[1])["size_categories"] == [category]


def test_pairs_of_other_settings_are_not_exported(tmp_path):
    from tests.faults.inline import FakeRun, fake_pipeline

    with fake_pipeline():
        fake = FakeRun(tmp_path, {})
        fake()
        changed = load_config(fake.path, ["select.keep=0.7"])
        (fake.root / "run.yaml").write_text(dump(changed))
        with pytest.raises(UserError, match=re.escape("select.keep: 0.5 -> 0.7")):
            export.export_dataset(changed, tmp_path / "out", None, None, False)
        assert not (tmp_path / "out").exists()


def test_pushing_again_removes_the_parts_of_before_and_nothing_else(exported, tmp_path, monkeypatch):
    """The real client against a server that answers like the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub_server() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        hub.files = {"data/train-00000-of-00001-old.parquet": b"old", "figure.png": b"theirs", ".gitattributes": b""}
        out = exported(tmp_path / "out", range(2))
        push(out, "me/mine", "dataset", True, ["data/*"])
        assert hub.repos["dataset", "me/mine"]["visibility"] == "private"
        sent = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert MARK in sent and sent.pop(MARK)
        assert hub.files == {**sent, "figure.png": b"theirs", ".gitattributes": b""}
        hub.refuse = True
        with pytest.raises(UserError, match=r"Pushing to me/mine failed: .*403"):
            push(out, "me/mine", "dataset", True, ["data/*"])


def test_a_file_that_was_changed_since_is_not_overwritten(exported, tmp_path):
    out = exported(tmp_path / "out", range(2))
    (out / "README.md").write_text("my own words")
    with pytest.raises(UserError, match="changed since it was exported"):
        exported(tmp_path / "out", range(3))
    assert (out / "README.md").read_text() == "my own words"


def test_the_folder_one_is_in_is_not_replaced(exported, tmp_path, monkeypatch):
    (tmp_path / "here/inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/inner")
    for out in (Path(), tmp_path / "here", Path("..")):
        with pytest.raises(UserError, match="you are in it"):
            exported(out, range(1))
    assert exported(Path("new"), range(1)).is_dir()
