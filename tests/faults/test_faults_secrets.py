"""A canary in every place where a secret can stand reaches no file of a run and no terminal."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config_file import load_config
from schemas.errors import UserError
from schemas.secrets import holds_credentials, less_secrets, without_secrets
from tests.faults.inline import fake_stages

CANARY = "c4n4ry-5ecret-value"
WHERE = {
    "engine.base_url": {"engine": {"kind": "openai", "base_url": f"http://user:{CANARY}@localhost:1/v1"}},
    "engine.base_url's user": {"engine": {"kind": "openai", "base_url": f"http://{CANARY}@localhost:1/v1"}},
    "engine.base_url's query": {"engine": {"kind": "openai", "base_url": f"http://localhost:1/v1?api_key={CANARY}"}},
    "judge.engine.base_url": {
        "judge": {"engine": {"kind": "openai", "base_url": f"http://user:{CANARY}@localhost:1/v1"}}
    },
    "an engine of a judge of a panel": {
        "judge": {"panel": {"a": {"engine": {"kind": "openai", "base_url": f"http://h/v1?token={CANARY}"}}}}
    },
    "model.judge": {"model": {"policy": "x", "judge": f"https://oauth2:{CANARY}@hub/model"}},
    "card": {"card": {"model_license": f"https://u:{CANARY}@host"}},
    "an object store": {"prompts": {"sources": [{"path": f"s3://AKIA:{CANARY}@bucket/x.jsonl"}]}},
    "prompts.sources": {"prompts": {"sources": [{"path": f"https://u:{CANARY}@host/x.jsonl"}]}},
    "model.policy": {"model": {"policy": f"https://oauth2:{CANARY}@hub/model"}},
    "banner": {"banner": f"see https://u:{CANARY}@host"},
    "text.chat_template_kwargs": {"text": {"chat_template_kwargs": {"url": f"https://u:{CANARY}@host"}}},
    "run_dir": {"run_dir": f"https://u:{CANARY}@host/runs"},
}


@pytest.mark.parametrize("place", WHERE)
def test_a_config_with_credentials_is_refused_without_repeating_them(fake, place):
    values = yaml.safe_load(fake.path.read_text()) | WHERE[place]
    fake.path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as caught:
        load_config(fake.path)
    assert CANARY not in str(caught.value)
    with pytest.raises(UserError) as caught:
        load_config(fake.path, [f"no.such={WHERE[place]}"])
    assert CANARY not in str(caught.value)


def test_no_file_of_a_run_holds_a_secret_of_the_environment(fake, tmp_path, monkeypatch, capfd):
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "SERVER_PASSWORD", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"{CANARY}-{name.lower()}")
    monkeypatch.setenv("OF_THE_SERVER", f"{CANARY}-named-by-the-config")  # its name says nothing
    monkeypatch.setenv("OF_THE_JUDGE", f"{CANARY}-in-the-address")
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{CANARY}-proxy@proxy:3128")
    real = fake_stages.Squares.run

    def talkative(self, ctx, shards):
        ctx.progress.note(f"asking http://user:{CANARY}@host/v1?token={CANARY} with Bearer {CANARY}")
        ctx.progress.note(
            f"the key is {CANARY}-openai_api_key, or {CANARY}-named-by-the-config, or {CANARY}-in-the-address"
        )
        ctx.progress.note(f"the proxy refuses user:{CANARY}-proxy")
        yield from real(self, ctx, shards)
        raise UserError(f"refused: Incorrect API key {CANARY}-hf_token", where=f"https://u:{CANARY}@host")

    monkeypatch.setattr(fake_stages.Squares, "run", talkative)
    with pytest.raises(UserError) as caught:
        fake(
            "engine.kind=openai",
            "engine.base_url=http://$USER:$SERVER_PASSWORD@localhost:1/v1",
            "engine.api_key_env=OF_THE_SERVER",
            "judge.engine.kind=openai",
            "judge.engine.base_url=http://$USER:${OF_THE_JUDGE}@localhost:2/v1",
        )
    assert CANARY not in str(caught.value)
    files = [path for path in fake.folder.rglob("*") if path.is_file()]
    assert any(path.name == "events.jsonl" for path in files) and any(path.name == "run.yaml" for path in files)
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    assert CANARY not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "out", [f"s3://AKIA:{CANARY}@bucket/x", f"https://u:{CANARY}@host/x", f"gs://b/x?token={CANARY}"]
)
def test_an_export_repeats_no_credentials_of_its_target(fake, tmp_path, out):
    fake()
    done = CliRunner().invoke(app, ["export", str(fake.root), "--out", out])
    assert done.exit_code == 1 and CANARY not in done.output, done.output
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pw@host:8000/v1", "http://host:8000/v1"),
        ("https://tok@host", "https://host"),
        ("a http://u:p@h/x and ftp://v:q@i/y", "a http://h/x and ftp://i/y"),
        ("http://h/v1?api_key=abc&x=1", "http://h/v1?api_key=***&x=1"),
        ("http://h/?X-Amz-Signature=abc", "http://h/?X-Amz-Signature=***"),
        ("Authorization: Bearer abcdefgh12345", "Authorization: Bearer ***"),
        ("a basic understanding of Bearer bonds", "a basic understanding of Bearer bonds"),
        ("mail a@b.c, pair p@1", "mail a@b.c, pair p@1"),
        ("value-of-the-key!", "***!"),
    ],
)
def test_what_is_taken_out_and_what_stays(text, shown):
    assert without_secrets(text, {"MY_KEY": "value-of-the-key", "PATH": "mail", "SHORT_KEY": "pair"}) == shown


def test_what_becomes_json_is_masked_before_it_is_json(monkeypatch):
    monkeypatch.setenv("A_TOKEN", 'quo"te\\päss')
    given = {"say": ['see "https://h/x?token=abc"', 'is quo"te\\päss'], "n": 1}
    shown = json.loads(json.dumps(less_secrets(given)))
    assert shown == {"say": ['see "https://h/x?token=***"', "is ***"], "n": 1}


def test_an_error_masks_what_it_then_cuts(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "value-of-the-token")
    for length in range(1470, 1510):
        text = str(UserError("x" * length + " https://bob:supersecretpw@host value-of-the-token"))
        assert "super" not in text and "value-of" not in text


def test_variables_are_no_credentials():
    assert not holds_credentials("http://$USER:${PASSWORD}@host/v1")
    assert holds_credentials("http://$USER:real@host/v1")
