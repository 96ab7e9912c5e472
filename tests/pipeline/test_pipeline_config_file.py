"""A wrong config says which file, line and key, and what was probably meant."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from pipeline.config_file import dump, load_config
from schemas.config.base import semantic_values
from schemas.config.gone import GONE
from schemas.docs import config_page
from schemas.errors import UserError
from stages.sources import own_split


def test_unknown_key_names_line_and_nearest_key(write_config):
    path = write_config("name: t\nlanguages: {seen: [en]}\nmodel: {policy: m}\nselect:\n  kep: 0.5\n")
    with pytest.raises(UserError, match=r"select\.kep.*config\.yaml:5.*'keep'"):
        load_config(path)


def test_unknown_key_inside_a_list_is_located(write_config):
    path = write_config(
        "name: t\nlanguages: {seen: [en]}\nmodel: {policy: m}\nprompts:\n  sources:\n    - path: a\n      fields: {promt: x}\n"
    )
    with pytest.raises(UserError, match=r"config\.yaml:7.*'prompt'"):
        load_config(path)


def test_keys_that_there_were_say_what_takes_their_place(write_config):
    """The config file of an old run has them all."""
    authored = [
        {"path": "a", "splits": {}, "on_policy": [], "fields": {"prompt": "p", "split": None, "label_error": None}},
        {"path": "b", "splits": {}},
    ]
    path = write_config(evaluate={"authored": authored}, nme="x")
    with pytest.raises(UserError) as raised:
        load_config(path)
    first, gone = str(raised.value).split(" There is no config key ")
    assert "did you mean 'name'" in first
    names, said = gone.split(" any more ")
    assert {name.strip("'") for name in names.split(", ")} == {
        "evaluate.authored.0.splits", "evaluate.authored.0.on_policy", "evaluate.authored.0.fields.split",
        "evaluate.authored.0.fields.label_error", "evaluate.authored.1.splits",
    }  # fmt: skip
    assert re.match(rf"\({re.escape(str(path))}:\d+, \d+, \d+, \d+, \d+\): .*delete them", said)
    with pytest.raises(UserError, match=r"'evaluate\.authored\.0\.fields\.chosen_score',.* any more"):
        load_config(write_config(evaluate={"authored": authored[1:]}), ["evaluate.authored.0.fields.chosen_score=x"])


def test_a_key_that_is_gone_is_none_that_there_is():
    there = {re.sub(r"\[\]", ".*", line.split("`")[1]) for line in config_page().splitlines() if line.startswith("| `")}
    assert "evaluate.authored.*.path" in there and not there & set(GONE)


def test_repeated_key_is_refused(write_config):
    with pytest.raises(UserError, match=r"'name' is given twice.*:2"):
        load_config(write_config("name: a\nname: b\n"))


@pytest.mark.parametrize("text", ["a: [1", "- 1\n", "!!python/object/apply:os.system ['true']\n"])
def test_broken_yaml_and_tags_are_one_paragraph(write_config, text):
    with pytest.raises(UserError, match=r"config\.yaml"):
        load_config(write_config(text))


_MINIMAL = "name: t\nlanguages: {seen: [en]}\nmodel: {policy: m}\nprompts: {sources: [{path: a.jsonl}]}\n"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{seen: [en]}", "[en, de]", r"languages: a section is wanted.*`languages: \{seen: \[en, de\]\}` \(.*:2\)"),
        ("{seen: [en]}", "en", r"`languages: \{seen: \[en\]\}`"),
        ("{policy: m}", "some/path", r"model: a section is wanted.*`model: \{policy: some/path\}`"),
        ("[{path: a.jsonl}]", "[a.jsonl]", r"prompts\.sources\.0: a section is wanted.*`\{path: a\.jsonl\}`"),
        ("path: a.jsonl", "path: a.jsonl, fields: [prompt]", r"sources\.0\.fields: a section is wanted, of keys and values \("),
        ("[{path: a.jsonl}]}", "[{path: a.jsonl}]}\ntrain:\n", r"train: this section is empty"),
        ("path: a.jsonl", "path: a.jsonl, limit: 1,000", r"sources\.0: 0 is no key .*a comma parts two keys, also that of 1,000"),
        ("name: t", "name: 2024-01-01", r"got 2024-01-01\): YAML reads a date here; put it in quotes"),
        ("name: t", "name: 7", r"got 7\): YAML reads a number here; put it in quotes"),
        ("name: t", "name: t\nseed: 010", r"YAML reads 010 as 8 \(octal\).*:2"),
        ("path: a.jsonl", "path: a.jsonl, limit: 1:30", r"YAML reads 1:30 as 90 \(to the base of 60\)"),
        ("name: t", "name: t\ntrain:\n\u00a0 method: lora", r"method' has U\+00A0.*no space to YAML.*:3.*plain spaces"),
        ("name: t", "name: t\nseed:\u00a05", r"not valid YAML.*Line 2 has U\+00A0"),
        ("path: a.jsonl", "path: my #1.jsonl", r"not valid YAML.*Line 4 ends at its ` #`.*in quotes"),
        ("a.jsonl", '"C:\\data"', r"not valid YAML.*put the text in single quotes"),
        ("name: t", "name: t\nbanner: a: b", r"not valid YAML.*colon and a space in quotes"),
        ("name: t", "name: t\ntrain:\n\tmethod: lora", r"not valid YAML.*spaces, not with tabs"),
    ],
)  # fmt: skip
def test_what_people_write_is_told_what_to_write(write_config, old, new, said):
    with pytest.raises(UserError, match=said):
        load_config(write_config(_MINIMAL.replace(old, new)))


def test_numbers_and_comments_that_are_what_they_look_like_are_read(write_config):
    text = _MINIMAL.replace("a.jsonl", "a.jsonl, limit: 1_000").replace("name: t", "name: '010' # mine\nseed: 0")
    config = load_config(write_config(text + "train: {learning_rate: 1e-5} # {a\n"), ["train.seed=0x10"])
    assert (config.name, config.seed, config.train.seed, config.prompts.sources[0].limit) == ("010", 0, 16, 1000)


@pytest.mark.parametrize(
    ("encoding", "said"), [("latin-1", r"config\.yaml:2\).*Save the file as UTF-8"), ("utf-16", "UTF-16: save")]
)
def test_a_config_in_another_encoding_is_told_which(write_config, encoding, said):
    path = write_config()
    path.write_text(_MINIMAL.replace("name: t", "name: t\nbanner: grün"), encoding=encoding)
    with pytest.raises(UserError, match=f"not UTF-8.*{said}"):
        load_config(path)


def test_missing_file_says_how_to_get_one(tmp_path):
    with pytest.raises(UserError, match="init"):
        load_config(tmp_path / "no.yaml")


def test_language_that_does_not_exist(write_config):
    with pytest.raises(UserError, match=r"xx.*BCP 47"):
        load_config(write_config(languages={"seen": ["xx"]}))


def test_wrong_type_names_key_and_value(write_config):
    with pytest.raises(UserError, match=r"select\.keep.*2"):
        load_config(write_config(select={"keep": 2}))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("select.keep=2", r"\(given as select.keep=2\)"),
        ("select.keep=true", r"a number is wanted, and no truth value \(got True\)"),
        ("conflict.language_weights={en: true}", r"language_weights: a number is wanted, and no truth value"),
        (
            "languages.seen=[no, de]",
            r"got False\): YAML reads no, yes, on and off so; put the word in quotes \(given as lang",
        ),
    ],
)
def test_a_wrong_override_is_not_blamed_on_a_line_of_the_file(write_config, override, said):
    with pytest.raises(UserError, match=said):
        load_config(write_config(), [override])


def test_overrides_reach_nested_keys_and_lists(write_config):
    config = load_config(
        write_config(), ["select.keep=0.25", "prompts.sources.0.limit=3", "generate.sampling.temperature=0"]
    )
    assert config.select.keep == 0.25
    assert config.prompts.sources[0].limit == 3
    assert config.generate.sampling.temperature == 0


@pytest.mark.parametrize("override", ["select.keep", "=1", "name.x=1", "prompts.sources.9=1"])
def test_malformed_overrides_are_refused(write_config, override):
    with pytest.raises(UserError, match="--set"):
        load_config(write_config(), [override])


def test_resolved_config_repeats_the_run(write_config, tmp_path):
    config = load_config(write_config(), ["select.keep=0.25"])
    again = tmp_path / "run.yaml"
    again.write_text(dump(config), encoding="utf-8")
    assert load_config(again) == config
    assert yaml.safe_load(dump(config))["select"]["keep"] == 0.25


def test_command_line_loads_nothing_heavy():
    code = (
        "import sys, pipeline.cli, pipeline.status;"
        "print([m for m in ('torch','transformers','vllm','trl','polars','pyarrow','datasets') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_keys_that_yaml_takes_for_truth_values_are_names(write_config):
    config = load_config(write_config(write_config().read_text() + "execution:\n  on: ray\n"))
    assert config.execution.on == "ray"
    assert load_config(write_config(dump(config))).execution.on == "ray"


@pytest.mark.parametrize("place", ["s3://bucket/runs", "gs:/bucket", "memory://x"])
def test_a_run_directory_in_an_object_store_is_refused_with_the_reason(write_config, place):
    with pytest.raises(UserError, match="renames no files"):
        load_config(write_config(run_dir=place))


def test_a_run_repeated_from_its_config_draws_the_same_splits(write_config):
    """A split that nobody gave must not come back as one that was given, nor two configs that differ in it have one fingerprint."""
    minimal = "name: t\nlanguages: {{seen: [en]}}\nmodel: {{policy: m}}\nprompts: {{sources: [{{path: a.jsonl{}}}]}}\n"
    plain, given = (load_config(write_config(minimal.format(more))) for more in ("", ", split: train"))
    for config, split in ((plain, None), (given, "train")):
        again = load_config(write_config(dump(config)))
        assert [own_split(one.prompts.sources[0]) for one in (config, again)] == [split, split]
    assert semantic_values(plain.prompts) != semantic_values(given.prompts)
