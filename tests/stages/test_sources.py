from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import tarfile
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.config.sources import PairFields, PairSource, PromptFields, PromptSource, Source
from schemas.errors import UserError
from stages.layout import missing_column
from stages.sources import BATCH_ROWS, columns_of, is_hub, local_files, prompt_batches, read_rows

ROWS = [{"prompt": f"question {i}", "language": "en", "n": i} for i in range(2500)]


def rows_of(source: Source, languages: tuple[str, ...] = ("en",), **columns: Any) -> list[dict[str, Any]]:
    columns = columns or {"required": ["prompt"]}
    return [row for batch in read_rows(source, languages, **columns) for row in batch.rows]


def write_jsonl(path: Path, rows: list[Any], start: bytes = b"") -> Path:
    path.write_bytes(start + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return path


def test_column_names_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\x80prompt,language\r\nhello,en\r\n")
    with pytest.raises(UserError, match=r"not UTF-8: a column name.*a\.csv"):
        list(read_rows(Source(path=str(tmp_path / "a.csv")), ["en"]))


def test_parquet_jsonl_and_csv_give_the_same_rows(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=700)
    (tmp_path / "a.csv").write_text("prompt,language,n\n" + "".join(f"{r['prompt']},en,{r['n']}\n" for r in ROWS))
    expected = [{"prompt": row["prompt"], "language": "en"} for row in ROWS]
    for ending in ("jsonl", "parquet", "csv"):
        found = rows_of(Source(path=str(tmp_path / f"a.{ending}")), required=["prompt"], optional=["language"])
        assert found == expected


def test_batches_carry_the_source_and_consecutive_row_numbers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    batches = list(read_rows(Source(path=str(path), language="en"), ["en"], ["prompt"]))
    assert [batch.start for batch in batches] == [1, BATCH_ROWS + 1, 2 * BATCH_ROWS + 1]
    assert {(batch.source, batch.language) for batch in batches} == {(str(path), "en")}


def test_limit_counts_per_file(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        write_jsonl(tmp_path / name, [{"prompt": f"{name} {i}"} for i in range(5)])
    found = rows_of(Source(path=str(tmp_path / "*.jsonl"), limit=2))
    assert [row["prompt"] for row in found] == ["a.jsonl 0", "a.jsonl 1", "b.jsonl 0", "b.jsonl 1"]


def test_a_placeholder_reads_a_file_per_language(tmp_path: Path) -> None:
    for code in ("en", "sw"):
        write_jsonl(tmp_path / f"{code}.jsonl", [{"prompt": code}])
    source = Source(path=str(tmp_path / "{language}.jsonl"))
    assert [(batch.language, batch.rows) for batch in read_rows(source, ["sw", "en"], ["prompt"])] == [
        ("sw", [{"prompt": "sw"}]),
        ("en", [{"prompt": "en"}]),
    ]
    with pytest.raises(UserError, match=r"no file .*de\.jsonl for language de"):
        read_rows(source, ["en", "de"], ["prompt"])


def test_package_files_fall_back_to_the_base_language_and_skip_what_is_not_shipped() -> None:
    files = local_files(Source(path="package:authored_pairs/{language}.jsonl"), ["zh-Hans", "fi", "de"])
    assert [(file.name, file.language) for file in files] == [
        ("package:authored_pairs/zh.jsonl", "zh-Hans"),
        ("package:authored_pairs/de.jsonl", "de"),
    ]


def test_byte_order_marks_blank_lines_quotes_and_newlines_are_handled(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "é"}], start=b"\xef\xbb\xbf")
    path.write_bytes(path.read_bytes() + b"\r\n\n" + b'{"prompt": "two"}')
    assert rows_of(Source(path=str(path))) == [{"prompt": "é"}, {"prompt": "two"}]
    table = tmp_path / "a.csv"
    table.write_bytes(b'\xef\xbb\xbfprompt,n\n"a, ""b""\nc",007\nNA,\n')
    assert rows_of(Source(path=str(table)), required=["prompt", "n"]) == [
        {"prompt": 'a, "b"\nc', "n": "007"},
        {"prompt": "NA", "n": None},
    ]


def test_a_wrong_column_name_lists_the_columns_and_suggests_one(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"promt": "x", "lang": "en"}])
    pq.write_table(pa.table({"promt": ["x"], "lang": ["en"]}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("promt,lang\nx,en\n")
    for ending in ("jsonl", "parquet", "csv"):
        with pytest.raises(UserError) as error:
            rows_of(Source(path=str(tmp_path / f"a.{ending}")))
        for part in ("'prompt'", "'promt', 'lang'", "Did you mean 'promt'", f"a.{ending}"):
            assert part in str(error.value)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_column_names_are_found_however_their_accents_are_stored(tmp_path: Path, name: str, form: str) -> None:
    column, wanted = normalize(form, "réponse"), normalize("NFD" if form == "NFC" else "NFC", "réponse")
    rows = [{column: f"text {n}", "id": str(n)} for n in range(1500)]
    if name == "a.csv":
        lines = [f"{column},id", *(f"{row[column]},{row['id']}" for row in rows)]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    elif name == "a.jsonl":
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    found = rows_of(Source(path=str(tmp_path / name)), required=[wanted])
    assert [row[wanted] for row in found] == [row[column] for row in rows]


def test_a_column_may_be_missing_from_some_rows_of_a_jsonl_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"language": "en"}, {"prompt": "x"}])
    assert rows_of(Source(path=str(path)), required=["prompt"]) == [{"prompt": None}, {"prompt": "x"}]


def _truncated_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()[:-200]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b"\n\n", "has no rows"),
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"prompt,language\n", "has no rows"),
        ("a.parquet", b"", "has no rows"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', r"broken JSON.*a\.jsonl:2"),
        ("a.jsonl", b'[\n{"prompt": "x"}]', r"broken JSON.*a\.jsonl:1.*array"),
        ("a.jsonl", b'"text"\n', r"a str, not a JSON object.*a\.jsonl:1"),
        ("a.jsonl", b"[" * 100_000, r"broken JSON: nested too deep.*a\.jsonl:1"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "\xff"}\n', r"not UTF-8: byte 13 of the line.*a\.jsonl:2"),
        ("a.jsonl", '{"prompt": "x"}'.encode("utf-16"), "looks like UTF-16"),
        ("a.csv", "prompt\nx\n".encode("utf-16"), "looks like UTF-16"),
        ("a.csv", "prompt,n\nx,1\n".encode("utf-16-le"), "looks like UTF-16"),
        ("a.csv", "prompt,n\nx,1\n".encode("utf-16-be"), "looks like UTF-16"),
        ("a.csv", b"prompt\n\xff\xfe\n", "not UTF-8"),
        ("a.csv", b"prompt,n\nx,1\ny\n", "broken CSV"),
        ("a.parquet", _truncated_parquet(), "cannot be read as Parquet"),
        ("a.parquet", b"rubbish", "cannot be read as Parquet"),
        ("a.txt", b"x", "format of .* is not known"),
    ],
)
def test_damaged_files_are_named_before_a_row_is_given(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        read_rows(Source(path=str(path)), ["en"], ["prompt"])
    assert name in str(error.value)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*none.jsonl"):
        read_rows(Source(path=str(tmp_path / "none.jsonl")), ["en"])
    with pytest.raises(UserError, match=r"no file matches .*none.*parquet"):
        read_rows(Source(path=str(tmp_path / "none*.parquet")), ["en"])
    with pytest.raises(UserError, match="is a folder"):
        read_rows(Source(path=str(tmp_path)), ["en"])
    with pytest.raises(UserError, match="package has no file"):
        read_rows(Source(path="package:prompts/none.jsonl"), ["en"])


def test_hub_ids_are_told_from_files(tmp_path: Path) -> None:
    for path in ("squad", "owner/name", "owner/name-{language}"):
        assert is_hub(Source(path=path))
    for path in (
        "owner/name.jsonl",
        "/abs/path",
        "./name",
        "a/b/c",
        "package:prompts/en.jsonl",
        "owner/*",
        str(tmp_path),
    ):
        assert not is_hub(Source(path=path))
    assert is_hub(Source(path="owner/name.jsonl", format="hub"))


def test_a_hub_dataset_is_streamed_through_datasets(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    messages = [[{"role": "user", "content": row["prompt"]}] for row in ROWS]
    pq.write_table(pa.table({"prompt": messages, "n": list(range(len(ROWS)))}), tmp_path / "train-0.parquet")
    batches = list(read_rows(Source(path=str(tmp_path), format="hub", limit=1500), ["en"], ["prompt"]))
    assert [batch.start for batch in batches] == [1, 1025]
    assert [row["prompt"] for batch in batches for row in batch.rows] == messages[:1500]
    with pytest.raises(UserError, match="no column 'question'"):
        list(read_rows(Source(path=str(tmp_path), format="hub"), ["en"], ["question"]))
    with pytest.raises(UserError, match=r"cannot be read.*validation"):
        list(read_rows(Source(path=str(tmp_path), format="hub", split="validation"), ["en"], ["prompt"]))


def test_a_dataset_with_a_script_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="script"):
        list(read_rows(Source(path=str(tmp_path / "evil.py"), format="hub"), ["en"], ["prompt"]))
    assert not (tmp_path / "ran").exists()


def test_a_hub_id_without_the_datasets_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"owner/name needs the `datasets` package.*pip install"):
        list(read_rows(Source(path="owner/name"), ["en"], ["prompt"]))


def test_default_column_names_may_be_absent_but_chosen_ones_may_not() -> None:
    assert columns_of(PromptFields(), ["language", "group_id"]) == (["prompt"], ["language", "group_id"])
    chosen = PromptFields(language="lang", group_id=None, split="split")
    assert columns_of(chosen, ["language", "group_id"]) == (["prompt", "lang", "split"], [])
    assert columns_of(PairFields(), ["prompt", "language", "group_id"])[0] == ["chosen", "rejected"]


@pytest.mark.parametrize("compression", ["gzip", "bz2", "xz", "zstd"])
def test_compression_is_known_by_content_whatever_the_name(tmp_path: Path, compression: str) -> None:
    plain = write_jsonl(tmp_path / "plain.jsonl", ROWS[:5]).read_bytes()
    packed = {
        "gzip": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zstd": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    }[compression](plain)
    for name in ("a.jsonl", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(packed)
        assert len(rows_of(Source(path=str(tmp_path / name)))) == 5
    table = b"prompt\tn\n" + b"".join(f"{row['prompt']}\t1\n".encode() for row in ROWS[:5])
    (tmp_path / "a.tsv.bz2").write_bytes(bz2.compress(table))
    assert len(rows_of(Source(path=str(tmp_path / "a.tsv.bz2")))) == 5


def test_damaged_compression_and_archives_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x"}\n' * 999)[:40])
    (tmp_path / "b.jsonl").write_bytes(b"PK\x03\x04rest")
    for name, says in (("a.jsonl.gz", "cannot be read"), ("b.jsonl", "ZIP archive.*Unpack")):
        with pytest.raises(UserError, match=says):
            rows_of(Source(path=str(tmp_path / name)))


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_the_delimiter_is_found_in_the_header_or_named(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'"the prompt, long"{delimiter}n\n"a{delimiter} b; c"{delimiter}1\n')
    columns: dict[str, Any] = {"required": ["the prompt, long"]}
    expected = [{"the prompt, long": f"a{delimiter} b; c"}]
    assert rows_of(Source(path=str(path)), **columns) == expected
    assert rows_of(Source(path=str(path), delimiter=delimiter), **columns) == expected


def test_json_arrays_and_arrow_files_are_read(tmp_path: Path) -> None:
    expected = [{"prompt": row["prompt"]} for row in ROWS]
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    write_jsonl(tmp_path / "lines.json", ROWS)
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, 700)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, 700)
    for name in ("a.json", "lines.json", "file.arrow", "stream.arrow"):
        assert rows_of(Source(path=str(tmp_path / name))) == expected


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b'[{"prompt": "x"}, {"prompt": ]', r"broken JSON.*a\.json, element 2"),
        ("a.json", b'[{"prompt": "x"}', "the array has no end"),
        ("a.json", b'[{"prompt": "x"} {"prompt": "y"}]', "no comma between"),
        ("a.json", b"[1]", "holds a int, not a JSON object.*element 1"),
        (
            "a.json",
            b'[["a", "b"], ["c", "d"]]',
            r"rows are lists, without the names of their columns.*element 1.*orient=\"records\"",
        ),
        (
            "a.jsonl",
            b'["a", [{"role": "user"}]]\n',
            r"rows are lists, without the names of their columns.*orient=\"records\"",
        ),
        ("a.jsonl", b'[{"prompt": "a"}]\n', r"holds a list, not a JSON object.*`format: json`"),
        (
            "a.jsonl",
            b'[{"role": "user", "content": "a"}]\n',
            r"holds a list of messages.*put the messages under a name",
        ),
        ("a.json", b'[{"prompt": "x"}]\n{"prompt": "y"}', r"more after the array.*a\.json:2"),
        ("a.json", b'[{"prompt": "x"}]]', r"more after the array.*a\.json:1"),
        ("a.json", b'[{"prompt": "x"}] [{"prompt": "y"}', "the array has no end"),
        ("a.json", b"[]", "has no rows"),
        ("a.jsonl", b'{"prompt": "x", "prompt": "y"}', r"key 'prompt' is there twice.*a\.jsonl:1"),
        ("a.jsonl", b'{"prompt": "x"} {"prompt": "y"}', "more than one value on the line"),
        ("a.csv", b"prompt,n,prompt\nx,1,y\n", "column 'prompt' is there 2 times"),
        ("a.arrow", b"ARROW1\0\0rest", "cannot be read as Arrow"),
    ],
)
def test_what_is_broken_or_said_twice_is_refused_by_name(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_rows(Source(path=str(tmp_path / name)), ["en"], ["prompt"])


@pytest.mark.parametrize("between", ["", "\n", " \r\n\n", "\n[]\n"])
def test_json_arrays_one_after_another_are_all_read(tmp_path: Path, between: str) -> None:
    (tmp_path / "a.json").write_text(between.join(json.dumps(ROWS[n : n + 2]) for n in (0, 2, 4)) + "\n")
    assert [row["prompt"] for row in rows_of(Source(path=str(tmp_path / "a.json")))] == [r["prompt"] for r in ROWS[:6]]


def test_numbers_and_dates_that_python_cannot_hold_are_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "x", "id": ' + b"1" * 5000 + b"}\n")
    assert rows_of(Source(path=str(tmp_path / "a.jsonl")), required=["prompt", "id"])[0]["id"] == "1" * 5000
    far = pa.array([2**62], pa.timestamp("us"))
    pq.write_table(
        pa.table({"prompt": ["x"], "when": far, "day": pa.array([2**31 - 1], pa.date32())}), tmp_path / "a.parquet"
    )
    (row,) = rows_of(Source(path=str(tmp_path / "a.parquet")), required=["prompt", "when", "day"])
    assert row["prompt"] == "x" and isinstance(row["when"], str) and isinstance(row["day"], str)


def test_keys_of_the_hub_are_refused_for_local_files(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
    with pytest.raises(UserError, match="`revision` is for Hugging Face datasets"):
        local_files(Source(path=str(path), revision="main"), ["en"])


@pytest.mark.parametrize(
    "data",
    [
        {"prompt": {"0": "a", "1": "b"}, "language": {"0": "en", "1": "de"}},
        {"prompt": ["a", "b"], "language": ["en", "de"]},
        {"version": "1.0", "data": [{"prompt": "a", "language": "en"}, {"prompt": "b", "language": "de"}]},
    ],
    ids=["pandas", "columns", "wrapped"],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_files_that_are_one_object_are_read_by_rows(tmp_path: Path, data: Any, indent: int | None) -> None:
    (tmp_path / "a.json").write_text(json.dumps(data, indent=indent))
    found = rows_of(Source(path=str(tmp_path / "a.json")), required=["prompt"], optional=["language"])
    assert found == [{"prompt": "a", "language": "en"}, {"prompt": "b", "language": "de"}]


def test_a_json_file_of_one_conversation_is_one_row(tmp_path: Path) -> None:
    row = {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}
    (tmp_path / "a.json").write_text(json.dumps(row, indent=1))
    assert rows_of(Source(path=str(tmp_path / "a.json")), required=["chosen", "rejected"]) == [row]


def test_excels_line_that_names_the_delimiter_is_no_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfsep=;\r\nprompt;n\r\n"a, b\nc";1\r\n\r\n')
    assert rows_of(Source(path=str(tmp_path / "a.csv")), required=["prompt", "n"]) == [{"prompt": "a, b\nc", "n": "1"}]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('prompt,n\n"a",1\n"say \\"hi\\" now",2\n', r"broken CSV.*a\.csv:3.*written twice"),
        ('prompt,n\n"a\nb",1\nc\n', r"broken CSV: 1 fields, and the header has 2.*a\.csv:4"),
        ('prompt,n\n"a,1\n', "broken CSV.*every quoted text ends in a quote"),
        ("prompt,n\na,1\nprompt,n\nb,2\n", r"header is there a second time.*a\.csv:3"),
    ],
    ids=["backslash", "width", "open", "joined"],
)
def test_broken_csv_is_refused_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=says):
        rows_of(Source(path=str(tmp_path / "a.csv")))


def test_a_cell_of_hundreds_of_kilobytes_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,n\n"' + "a b\n" * 100_000 + '",1\n')
    assert len(rows_of(Source(path=str(tmp_path / "a.csv")))[0]["prompt"]) == 400_000


def test_a_folder_is_refused_with_the_files_that_are_in_it(tmp_path: Path) -> None:
    (tmp_path / "data-00000-of-00001.arrow").touch()
    with pytest.raises(UserError, match=r"is a folder.*/\*\.arrow"):
        local_files(Source(path=str(tmp_path)), [])


def test_a_saved_dataset_dict_is_refused_with_the_files_one_level_down(tmp_path: Path) -> None:
    for name in ("dataset_dict.json", "train/dataset_info.json", "train/state.json", "train/data-00000-of-00001.arrow"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"is a folder.*/train/\*\.arrow"):
        local_files(Source(path=str(tmp_path)), [])


def _tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        member = tarfile.TarInfo("p.jsonl")
        member.size = 16
        archive.addfile(member, io.BytesIO(b'{"prompt": "x"}\n'))
    return sink.getvalue()


def _parquet(*names: str) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: ["x"] for name in names}), sink)
    return sink.getvalue().to_pybytes()


def _arrow() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"prompt": ["x"]})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
_SHEET = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)


@pytest.mark.parametrize(
    ("content", "names", "says"),
    [
        (_POINTER, ("p.jsonl", "p.json", "p.csv", "p.parquet", "p.arrow", "p.txt"), "pointer of Git LFS.*git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html>", ("p.jsonl", "p.json", "p.csv", "p.parquet"), "a page .*download the file again"),
        (b'<?xml version="1.0"?><Error>', ("p.jsonl", "p.csv"), "a page .HTML or XML"),
        (_parquet("prompt"), ("p.jsonl", "p.json", "p.csv", "p.arrow"), "the file is Parquet, .*`format: parquet`"),
        (_arrow(), ("p.jsonl", "p.csv", "p.parquet"), "the file is Arrow, .*`format: arrow`"),
        (b'{"prompt": "x"}\n', ("p.csv", "p.parquet", "p.arrow"), "the file is JSONL, .*`format: jsonl`"),
        (b'{"prompt": "x"}\n', ("p.txt",), "the file is JSONL, which its name does not say.*`format: jsonl`"),
        (b'[\n{"prompt": "x"}]', ("p.csv", "p.parquet"), "the file is JSON, .*`format: json`"),
        (b'{\n"prompt": "x"}', ("p.csv", "p.parquet"), "the file is JSON, .*`format: json`"),
        (b"id;prompt\n1;x\n", ("p.jsonl", "p.json", "p.parquet"), "looks like CSV, .*`format: csv`"),
        (b"id,question\n1,x\n", ("p.jsonl",), "looks like CSV, .*`format: csv`"),
        (_SHEET, ("p.csv", "p.jsonl", "p.xls"), "an Excel workbook .*as CSV"),
        (_tar(), ("p.jsonl", "p.csv", "p.tar"), "a TAR archive.*Unpack"),
        (gzip.compress(_tar()), ("p.jsonl.gz", "p.tar.gz", "p.tgz"), "a TAR archive.*Unpack"),
        (gzip.compress(_parquet("prompt")), ("p.parquet", "p.parquet.gz"), "all of the file is compressed.*Decompress"),
        (gzip.compress(_arrow()), ("p.arrow",), "all of the file is compressed.*Decompress"),
        (gzip.compress(gzip.compress(b"{}")), ("p.jsonl.gz",), "compressed twice"),
        (b"PK\x03\x04rest", ("p.parquet", "p.arrow", "p.csv"), "a ZIP archive.*Unpack"),
        (b"FEA1\0\0\0\0", ("p.feather",), "Feather of version 1"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_file_that_is_something_else_than_its_name_says_is_called_that(
    tmp_path: Path, content: bytes, names: tuple[str, ...], says: str
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=says) as error:
            read_rows(Source(path=str(tmp_path / name)), ["en"], ["prompt"])
        assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", b"Hello, you\nand, me\n", "format of .* is not known"),
        ("p.csv", b"[prompt],chosen\nx,y\n", "no column 'prompt'"),
        ("p.jsonl", b'{"prompt": "x"}\nprompt,chosen\n', r"broken JSON.*p\.jsonl:2"),
        ("p.parquet", _parquet("other"), "no column 'prompt'"),
    ],
)
def test_what_is_wrong_in_a_file_of_the_right_kind_is_still_said(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_rows(Source(path=str(tmp_path / name)), ["en"], ["prompt"])


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bz2", "xz"])
def test_compressed_data_that_is_cut_off_says_what_to_do(tmp_path: Path, compress: Any) -> None:
    path = tmp_path / "p.jsonl"
    write_jsonl(path, [{"prompt": f"{number * 7919:x}"} for number in range(20_000)])
    path.write_bytes(compress(path.read_bytes())[:-300])
    with pytest.raises(UserError, match=r"cannot be read.*p\.jsonl.*cut off or damaged: download"):
        rows_of(Source(path=str(path)))


@pytest.mark.parametrize("marks", [1, 2])
def test_byte_order_marks_of_joined_files_are_no_text(tmp_path: Path, marks: int) -> None:
    mark = b"\xef\xbb\xbf" * marks
    one, two = b'{"prompt": "a"}\n', b'{"prompt": "b"}\n'
    (tmp_path / "a.jsonl").write_bytes(mark + one + mark + two + mark)
    (tmp_path / "a.json").write_bytes(mark + b"[" + one + b"]\n" + mark + b"[" + two + b"]" + mark)
    (tmp_path / "a.csv").write_bytes(mark + b"prompt,n\na,1\nb,2\n")
    for name in ("a.jsonl", "a.json", "a.csv"):
        assert rows_of(Source(path=str(tmp_path / name))) == [{"prompt": "a"}, {"prompt": "b"}]
    (tmp_path / "a.csv").write_bytes(mark + b'"prompt",n\na,1\n' + mark + b'"prompt",n\nb,2\n')
    with pytest.raises(UserError, match=r"header is there a second time.*a\.csv:3"):
        rows_of(Source(path=str(tmp_path / "a.csv")))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n' + bytes(9), r"U\+0000 \(a NUL byte\) stands.*a\.jsonl:2.*cut off"),
        ("a.jsonl", b'{"prompt": "x"}' + bytes(9), r"after the value stands U\+0000.*a\.jsonl:1"),
        ("a.jsonl", '{"prompt": "x"}\n\u200b{"prompt": "y"}\n'.encode(), r"U\+200B \(ZERO WIDTH SPACE\).*a\.jsonl:2"),
        ("a.jsonl", '{"prompt":\u00a0"x"}\n'.encode(), r"U\+00A0 \(NO-BREAK SPACE\)"),
        ("a.csv", b"prompt,n\nx,1\n" + bytes(9), r"1 fields, and the header has 2.*U\+0000 .*a\.csv:3"),
    ],
)
def test_characters_that_nobody_sees_are_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        rows_of(Source(path=str(tmp_path / name)))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "mark"])
@pytest.mark.parametrize("blank", [b"\n\n", b"\r\n", b" \t\n", b",,\n;;\n", b"\r", b"\nsep=,\n", b"sep=,\r\n\n"])
def test_blank_lines_before_the_header_of_a_csv_are_none(tmp_path: Path, mark: bytes, blank: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(mark + blank + b'prompt,n\n"a\nb",1\nc,2\n')
    expected = [{"prompt": "a\nb", "n": "1"}, {"prompt": "c", "n": "2"}]
    assert rows_of(Source(path=str(path)), required=["prompt", "n"]) == expected
    path.write_bytes(mark + blank + b"prompt,n\na,1\nb\n")
    line = 3 + len(blank.replace(b"\r\n", b"\n").replace(b"\r", b"\n").splitlines())
    with pytest.raises(UserError, match=rf"broken CSV: 1 fields.*a\.csv:{line}"):
        rows_of(Source(path=str(path)))


@pytest.mark.parametrize(
    "first", ["# exported 2024", "My data,,", "My data", "source;2024", "\nAll pairs, of May", "sep=,\nPairs"]
)
def test_a_line_before_the_header_of_a_csv_is_named(tmp_path: Path, first: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"{first}\nprompt,chosen,rejected\na,b,c\n")
    with pytest.raises(UserError, match=r"is not the header: a later one names.*'prompt,chosen,rejected'.*Take out"):
        rows_of(Source(path=str(path)), required=["prompt", "chosen"])


def make_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / name, [{"prompt": name}])


@pytest.mark.parametrize(
    ("names", "example"),
    [
        (["test/a.arrow", "train/a.arrow", "dataset_dict.json"], "train/*.arrow"),
        (["data/test-00000.parquet", "data/train-00000.parquet"], "data/train*.parquet"),
        (["test.jsonl", "Train.jsonl", "README.md"], "Train*.jsonl"),
        (["test_a.csv", "validation_a.csv"], "validation*.csv"),
        (["trainees.jsonl", "tests.jsonl"], "*.jsonl"),
    ],
)
def test_examples_name_the_files_of_one_split_train_if_it_is_there(
    tmp_path: Path, names: list[str], example: str
) -> None:
    make_files(tmp_path, *names)
    with pytest.raises(UserError) as error:
        local_files(Source(path=str(tmp_path)), [])
    assert error.value.fix == f"Name the files in it, for example {tmp_path}/{example}."


@pytest.mark.parametrize(
    ("names", "pattern", "kinds"),
    [
        (["data/train.jsonl", "data/test.jsonl"], "data/*.jsonl", ("train", "test")),
        (["train-00000-of-00001.jsonl", "Test-00000-of-00001.jsonl"], "*.jsonl", ("train", "test")),
        (["saved/train/a.jsonl", "saved/validation/a.jsonl"], "saved/*/*.jsonl", ("train", "dev")),
        (["a/b/val_1.jsonl", "a/c/eval.x.jsonl", "a/c/test2.jsonl"], "a/**/*.jsonl", ("dev", "test")),
        (["train/en/val.jsonl", "train/en/train.jsonl"], "train/*/*.jsonl", ("train", "dev")),
        (["test/train-1.jsonl", "test/train-2.jsonl"], "test/*.jsonl", ()),
        (["data/test-1.jsonl", "data/test-2.jsonl"], "data/*.jsonl", ()),
        (["val.jsonl", "valid.jsonl", "dev.jsonl"], "*.jsonl", ()),
        (["trainees.jsonl", "testing.jsonl", "developers.jsonl"], "*.jsonl", ()),
        (["train/a.jsonl", "train/b.jsonl"], "train/[ab].jsonl", ()),
    ],
)
def test_files_of_several_splits_in_one_source_are_said_once(
    tmp_path: Path, names: list[str], pattern: str, kinds: tuple[str, ...]
) -> None:
    make_files(tmp_path, *names)

    def notes(source: Source) -> list[str]:
        return [note for batch in read_rows(source, ["en"], ["prompt"]) for note in batch.notes]

    path = str(tmp_path / pattern)
    found = notes(PromptSource(path=path))
    assert len(found) == bool(kinds)
    for kind in kinds:
        assert f"{kind} ({tmp_path}" in found[0] and (kind == "train" or f"`split: {kind}`" in found[0])
    assert ["all are read" in note for note in notes(Source(path=path))] == [True] * len(found)
    split = PromptFields(split="prompt")
    assert notes(PromptSource(path=path, split="train")) == notes(PromptSource(path=path, fields=split)) == []


def test_a_link_to_nothing_is_refused_by_name_and_in_a_glob(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jsonl", "real/c.jsonl")
    (tmp_path / "c.jsonl").symlink_to("real/c.jsonl")
    assert len(local_files(Source(path=f"{tmp_path}/*.jsonl"), [])) == 2
    (tmp_path / "b.jsonl").symlink_to("../gone/b.jsonl")
    for name in ("b.jsonl", "*.jsonl"):
        with pytest.raises(UserError, match=r"b\.jsonl is a link to \.\./gone/b\.jsonl, which is not there"):
            local_files(Source(path=f"{tmp_path}/{name}"), [])


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (
            "https://huggingface.co/datasets/a/b/resolve/main/x.parquet?download=true",
            "the id .*`path: a/b`, or download",
        ),
        ("https://huggingface.co/datasets/a/b", "`path: a/b`"),
        ("hf://datasets/a/b/*.parquet", "`path: a/b`"),
        ("https://example.org/x.jsonl?signature=abc", r"x\.jsonl is an address.*Download the file"),
        ("s3://bucket/*.parquet", "is an address.*Download"),
        ("GS://bucket/x.parquet", "is an address.*Download"),
        ("file:///data/my%20pairs.jsonl", "Write the path itself: /data/my pairs.jsonl"),
        ("data\\p.jsonl", r"no file data\\p\.jsonl.*with slashes: data/p\.jsonl"),
        ("data\\*.jsonl", "no file matches .*with slashes"),
        ("data\\p", "no file data.*with slashes"),
        ("C:\\data\\p.jsonl", "no file C:.*the path that the file has here"),
        ("\\\\server\\p.jsonl", "no file .*the path that the file has here"),
        ("{a,b}.jsonl", "Braces are not expanded: give a source for each"),
        ("data/{train,test}/*.jsonl", "Braces are not expanded"),
        ("{lang}/p.jsonl", "`{lang}` is not filled in: write `{language}`"),
        ("{language}/{split}", "`{split}` is not filled in"),
    ],
)
def test_paths_that_are_not_read_here_say_what_to_write(path: str, says: str) -> None:
    for format in ("auto", "hub") if "://" in path else ("auto",):
        with pytest.raises(UserError, match=says) as error:
            local_files(Source.model_validate({"path": path, "format": format}), ["en"])
        assert "signature" not in str(error.value)


def test_a_file_may_have_braces_and_backslashes_in_its_name(tmp_path: Path) -> None:
    make_files(tmp_path, "{a,b}\\c.jsonl")
    assert len(local_files(Source(path=f"{tmp_path}/{{a,b}}\\c.jsonl"), [])) == 1


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "arrow"])
def test_well_known_columns_that_are_not_read_are_said_once_a_file(tmp_path: Path, kind: str) -> None:
    names = ["prompt", "system_prompt", "winner_model_a", "input", "n", "split"]
    table = pa.table({name: ["x"] * 1100 for name in names})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    elif kind == "csv":
        path.write_text("".join(",".join(row) + "\n" for row in (names, *[["x"] * 6] * 1100)))
    else:
        write_jsonl(path, table.to_pylist())
    notes = [note for batch in read_rows(Source(path=str(path)), ["en"], ["prompt", "split"]) for note in batch.notes]
    assert len(notes) == 1 and notes[0].startswith("columns that are not read: system_prompt (`fields.system`")
    assert "winner_model_a (" in notes[0] and "input (" in notes[0] and "split" not in notes[0]


def test_an_empty_file_among_those_of_a_glob_is_left_out_and_said(tmp_path: Path) -> None:
    for name in ("a.jsonl", "c.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"a\.jsonl has no rows"):
        read_rows(Source(path=str(tmp_path / "*.jsonl")), ["en"], ["prompt"])
    write_jsonl(tmp_path / "b.jsonl", ROWS[:2])
    (batch,) = read_rows(Source(path=str(tmp_path / "*.jsonl")), ["en"], ["prompt"])
    assert len(batch.rows) == 2 and batch.notes == [
        f"left out, for they have no rows: {tmp_path / 'a.jsonl'}, {tmp_path / 'c.jsonl'}"
    ]


def test_rows_by_ids_may_lack_a_column_in_some(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"q1": {"prompt": "a", "chosen": "b"}, "q2": {"prompt": "c"}}))
    found = rows_of(Source(path=str(tmp_path / "a.json")), required=["prompt", "chosen"])
    assert found == [{"prompt": "a", "chosen": "b"}, {"prompt": "c", "chosen": None}]


def test_maps_of_arrow_are_objects(tmp_path: Path) -> None:
    message = pa.map_(pa.string(), pa.string())
    turns = [[[("role", "user"), ("content", "hi")]], None]
    table = pa.table(
        {
            "prompt": pa.array(turns, pa.list_(message)),
            "meta": pa.array([{"m": [("a", "b")]}] * 2, pa.struct([("m", message)])),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert rows_of(Source(path=str(tmp_path / "a.parquet")), required=["prompt", "meta"]) == [
        {"prompt": [{"role": "user", "content": "hi"}], "meta": {"m": {"a": "b"}}},
        {"prompt": None, "meta": {"m": {"a": "b"}}},
    ]


@pytest.mark.parametrize(
    "data",
    [
        {"columns": ["prompt", "chosen"], "index": [0, 1], "data": [["a", "b"], ["c", "d"]]},
        {"x7": {"prompt": "a", "chosen": "b"}, "x9": {"prompt": "c", "chosen": "d", "more": 1}},
        {"0": {"prompt": "a", "chosen": "b"}, "1": {"prompt": "c", "chosen": "d"}},
        {"prompt": {"x7": "a", "x9": "c"}, "chosen": {"x7": "b", "x9": "d"}},
    ],
    ids=["pandas-split", "by-id", "pandas-index", "columns-by-id"],
)
def test_json_objects_by_ids_and_of_cells_are_read_by_rows(tmp_path: Path, data: Any) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    batches = list(read_rows(Source(path=str(path)), ["en"], ["prompt", "chosen"]))
    assert [row for batch in batches for row in batch.rows] == [
        {"prompt": "a", "chosen": "b"},
        {"prompt": "c", "chosen": "d"},
    ]


def test_a_json_file_of_several_tables_is_refused_with_their_names(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}), encoding="utf-8")
    with pytest.raises(UserError, match="several tables: 'train', 'test'"):
        read_rows(Source(path=str(path)), ["en"], ["prompt"])


def test_a_page_of_the_dataset_viewer_is_refused_as_one(tmp_path: Path) -> None:
    rows = [{"row_idx": 0, "row": {"prompt": "a"}, "truncated_cells": []}]
    (tmp_path / "p.json").write_text(json.dumps({"features": [{"name": "prompt"}], "rows": rows, "partial": False}))
    with pytest.raises(UserError, match=r"page of the Hugging Face dataset viewer.*load_dataset"):
        read_rows(Source(path=str(tmp_path / "p.json")), ["en"], ["prompt"])


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([{"question": "b", "id": 2}] * 3, "column prompt: 3 of the first 9 rows do not have it, and have 'question'"),
        ([{"id": 2}] * 3, None),
        ([{"prompt": None, "question": "b"}] * 3, None),
        ([{"question": "b"}, {"id": 2}], None),
    ],
)
def test_rows_that_have_another_column_in_place_of_a_wanted_one_are_said(
    tmp_path: Path, others: list[dict[str, Any]], said: str | None
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "id": 1}] * 6 + others)
    for required, optional in ((["prompt"], ["language"]), (["id"], ["prompt"])):
        if required == ["prompt"] or all("id" in row for row in others):
            (batch,) = read_rows(Source(path=str(path)), ["en"], required, optional)
            assert [note.split(", which")[0] for note in batch.notes] == ([said] if said else [])


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ("prompt completion label", "'completion' is one answer a row (unpaired data"),
        ("prompt response helpfulness correctness", "'response' is one answer a row (unpaired data"),
        ("message_id parent_id text role rank", "messages of trees"),
        ("context response1 response2 overall_preference", "'response1' and 'response2' are two answers, and 'overall_preference'"),
        ("history human_ref_A human_ref_B score_A score_B", "and 'score_A', 'score_B' may say which is better"),
        ("prompt chosen_index response_0 response_1", "and 'chosen_index' may say which is better"),
        ("prompt response_a response_b", "always the better? `fields: {chosen: response_a, rejected: response_b}`"),
        ("text completion_a completion_b overall_pref", "'completion_b' are two answers, and 'overall_pref' may say which is better"),
        ("question_body answer1_body answer2_body score", "Where 'score' says which is better, write"),
        ("instruction response1 response2 annotator1", "and 'annotator1' may say which is better"),
        ("prompt answers", "`fields: {completions: answers,"),
        ("instruction input output", "If 'output' is a list of two answers"),
        ("input preferred_output non_preferred_output", "`fields: {prompt: input, chosen: preferred_output, rejected: non"),
        ("prompt Chosen Rejected", "Did you mean 'Chosen'?"),
        ("prompt response_chosen response_rejected", "Did you mean 'response_chosen'?"),
        ("prompt choosen rejected responses", "Did you mean 'choosen'?"),
        ("prompt preferred dispreferred", "Did you mean 'preferred'?"),
        ("context correctness role completion_tokens chosen_score", ""),
        ("text label", ""),
        ("question answer bad_answer", ""),
    ],
)  # fmt: skip
def test_preference_data_without_chosen_is_told_what_it_is_or_nothing_wrong(columns: str, says: str) -> None:
    fix = missing_column("a.jsonl", "chosen", columns.split()).fix
    assert says in fix and (bool(says) or fix == "Set the source's `fields` to the names of your columns.")


@pytest.mark.parametrize(
    ("column", "columns", "guess"),
    [
        ("prompt", ["prompt_id", "Prompt"], "Prompt"),
        ("prompt", ["prompt_id", "prompt_tokens"], None),
        ("prompt", ["user_prompt", "n"], "user_prompt"),
        ("prompt", ["system_prompt", "question"], "question"),
        ("score_chosen", ["chosen_score"], "chosen_score"),
        ("rejected", ["role", "correctness"], None),
    ],
)
def test_a_column_is_guessed_where_its_name_says_so(column: str, columns: list[str], guess: str | None) -> None:
    fix = missing_column("a.jsonl", column, columns).fix or ""
    assert (f"Did you mean {guess!r}?" in fix) if guess else "Did you mean" not in fix


def test_spaces_after_the_delimiters_of_a_csv_header_belong_to_no_cell(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt, chosen\n"a, b", "c, d"\n', encoding="utf-8")
    (batch,) = read_rows(Source(path=str(path)), ["en"], ["prompt", "chosen"])
    assert batch.rows == [{"prompt": "a, b", "chosen": "c, d"}]


def test_a_wrong_delimiter_is_named_as_the_likely_cause(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,chosen\na,b\n", encoding="utf-8")
    with pytest.raises(UserError, match="Is `delimiter` right"):
        read_rows(Source(path=str(path), delimiter=";"), ["en"], ["prompt", "chosen"])


@pytest.mark.parametrize("delimiter", ["\t", ",", ";", "|"])
def test_a_file_without_quoting_whose_quotes_swallow_rows_is_refused(tmp_path: Path, delimiter: str) -> None:
    rows = [("Hamlet?", "On the walls.", '"Who is there? I ask'), ("Macbeth?", "Witches.", "A banquet.")]
    rows += [("Othello?", "In Venice.", 'With these words: I know not"'), ("Lear?", "On the heath.", "At home.")]
    path = tmp_path / "p.csv"
    lines = [delimiter.join(row) + "\n" for row in [("prompt", "chosen", "rejected"), *rows]]
    path.write_text("".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"one row of 3 lines.*p\.csv:4.*without quoting"):
        rows_of(Source(path=str(path)))


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ('prompt\tn\nTable?\t"a\tb\nc\td"\nx\t"1\n2"\n', "a\tb\nc\td"),
        ('prompt\tn\nTable?\t"Of\na\tb\nc\td"\nx\t"\n2\n"\n', "Of\na\tb\nc\td"),
        ('"prompt"\t"n"\n"Table?"\t"Of\na\tb"\n', "Of\na\tb"),
        ('prompt,n\nList?,"Of\na, b\nc, d"\n', "Of\na, b\nc, d"),
        ('prompt,n\nTable?,"Of\na,b"\n"One, two","1"\n', "Of\na,b"),
    ],
    ids=["two-lines", "more-delimiters", "quoted-header", "prose", "quoted-elsewhere"],
)
def test_quoted_tables_of_as_many_columns_are_cells(tmp_path: Path, text: str, cell: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(text, encoding="utf-8")
    assert rows_of(Source(path=str(path)), required=["prompt", "n"])[0]["n"] == cell


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_files_that_begin_with_a_frame_to_skip_are_decompressed(tmp_path: Path, codec: str, frames: int) -> None:
    """As pzstd writes them."""
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    content = pa.Codec("lz4" if codec == "lz4" else codec).compress(b'{"prompt": "a"}\n', asbytes=True)
    (tmp_path / "a.jsonl").write_bytes((skipped + content) * frames)
    assert rows_of(Source(path=str(tmp_path / "a.jsonl"))) == [{"prompt": "a"}] * frames


def test_a_file_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"q\xe9.jsonl")).write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match="is no UTF-8"):
        list(read_rows(Source(path=str(tmp_path / "q*.jsonl")), ["en"], ["prompt"], []))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        *((name, "`fields.language` reads one") for name in (
            "lang", "Locale", "language_code", "Language", "target_language", "prompt_lang", "language_id", "lng", "iso", "promptLanguage", "ISO-639-1",
        )),
        *((name, "`fields.system` reads one") for name in ("sys", "persona", "sys_prompt")),
        *((name, "part of what is asked") for name in ("context", "initial_reason_steps")),
        *((name, "it may be part of what is asked") for name in (
            "options", "choices", "option_a", "choice1", "opb", "hypothesis", "starter_code", "passage", "chat_history", "conversation_history", "previousTurns", "documents", "source_text", "evidence",
        )),
        *((name, "which answer is better") for name in ("preference", "choice", "chosen_is_better")),
        *((name, "how sure a preference is") for name in ("tie", "status")),
        *((name, "`fields.rejected_score` reads one") for name in ("score_rejected", "rejected-rating", "Rejected_Scores")),
        ("videos", "not seen: a question about it"),
        ("preference_strength", "its sign may say which answer is better"),
        ("rejected_instruction", "a pair has one prompt here"),
    ],
)  # fmt: skip
def test_columns_that_say_something_are_named(tmp_path: Path, name: str, says: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "language": "en", name: "x"}])
    (batch,) = read_rows(Source(path=str(path)), ["en"], ["prompt"], ["language"])
    assert len(batch.notes) == 1 and f"not read: {name} ({says}" in batch.notes[0].replace("it says ", "").replace(
        "it may say ", ""
    )
    (batch,) = read_rows(Source(path=str(path)), ["en"], ["prompt", name], ["language"])
    assert batch.notes == []


@pytest.mark.parametrize(
    "name", ["programming_language", "language_model", "lang_score", "isolated", "person", "analysis"]
)
def test_columns_whose_names_only_sound_like_a_language_are_not_named(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "language": "en", name: "x"}])
    (batch,) = read_rows(Source(path=str(path)), ["en"], ["prompt"], ["language"])
    assert batch.notes == []


_SAYS_WHICH = (
    *("preferred", "vote", "verdict", "better", "preferred_response", "safer_response_id", "chosen_index"),
    *("bestResponse", "human_preference", "preference_label", "is_flipped", "order", "answer_order"),
    *(
        "rank",
        "ranking",
        "winning_side",
        "overall_pref",
        "pick",
        "selected_response",
        "gold_label",
        "annotator1",
        "comparison",
        "outcome",
    ),
)


@pytest.mark.parametrize("name", _SAYS_WHICH)
def test_what_may_say_which_answer_is_better_is_named_where_the_answers_names_do_not(tmp_path: Path, name: str) -> None:
    def notes(one: str, other: str, **fields: Any) -> list[str]:
        path = write_jsonl(tmp_path / "a.jsonl", [{"prompt_id": 1, "prompt": "a", one: "b", other: "c", name: 1}])
        source = PairSource.model_validate({"path": str(path), "fields": {"chosen": one, "rejected": other, **fields}})
        return [note for batch in read_rows(source, ["en"], ["prompt", one, other]) for note in batch.notes]

    for one, other in (("response_a", "response_b"), ("gpt", "llama")):
        (note,) = notes(one, other)
        assert f"not read: {name} (it may say which answer is better" in note and "docs/own-pairs.md" in note
    for one, other in (("chosen", "rejected"), ("chosenAnswer", "otherAnswer"), ("preferred_output", "other_output")):
        assert notes(one, other) == []


def test_where_no_name_says_which_answer_is_better_all_that_may_hold_it_are_named(tmp_path: Path) -> None:
    row = {"prompt_id": 1, "prompt": "a", "response_a": "b", "response_b": "c", "side": "b", "source": "x", "turns": 1}

    def notes(row: dict[str, Any], **fields: Any) -> list[str]:
        path = write_jsonl(tmp_path / "a.jsonl", [row])
        source = PairSource.model_validate(
            {"path": str(path), "fields": {"chosen": "response_a", "rejected": "response_b", **fields}}
        )
        return [
            note for batch in read_rows(source, ["en"], ["prompt", "response_a", "response_b"]) for note in batch.notes
        ]

    (note,) = notes(row)
    assert note.startswith(
        "nothing that is read says which of 'response_a' and 'response_b' is better: where 'side' does, write"
    )
    assert notes({name: cell for name, cell in row.items() if name != "side"}) == []
    assert notes(row, chosen_score="side") == []


@pytest.mark.parametrize(
    "columns", ["text role parent_id lang", "content role conv_id turn", "text from conversation_id"]
)
def test_rows_that_are_messages_of_conversations_are_no_prompts(tmp_path: Path, columns: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [dict.fromkeys(columns.split(), "a")])
    source = PromptSource.model_validate({"path": str(path), "fields": {"prompt": columns.split()[0]}})
    with pytest.raises(UserError, match="answers would be read as prompts"):
        list(prompt_batches(source, ["en"]))


@pytest.mark.parametrize(
    ("answers", "scores", "named"),
    [
        (("answer_0", "answer_1"), ("score_0", "score_1"), True),
        (("human_ref_A", "human_ref_B"), ("score_A", "score_B"), True),
        (("gpt4_answer", "llama_answer"), ("gpt4_rating", "llama_rating"), True),
        (("answer_0", "answer_1"), ("score_2", "score_3"), False),
        (("answer_0", "answer_1"), ("tokens_0", "tokens_1"), False),
        (("good_answer", "bad_answer"), ("good_score", "bad_score"), False),
    ],
)
def test_scores_of_the_two_answers_are_named(
    tmp_path: Path, answers: tuple[str, str], scores: tuple[str, str], named: bool
) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": "a", **dict.fromkeys(answers, "b"), **dict.fromkeys(scores, 1)}]
    )

    def notes(**more: str) -> str:
        fields = {"chosen": answers[0], "rejected": answers[1], **more}
        source = PairSource.model_validate({"path": str(path), "fields": fields})
        wanted = ["prompt", *fields.values()]
        return " ".join(note for batch in read_rows(source, ["en"], wanted) for note in batch.notes)

    expected = [f"{name} (it may say which answer is better: `fields.{side}_score`" for name, side in zip(scores, ("chosen", "rejected"), strict=True)]  # fmt: skip
    assert all((text in notes()) is named for text in expected)
    assert notes(chosen_score=scores[0], rejected_score=scores[1]) == ""
