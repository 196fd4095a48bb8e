"""What tables look like when they arrive: one line per case."""

import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from dymo_med import limits
from dymo_med.errors import PatientDataError
from dymo_med.modalities import Whose, modality
from dymo_med.modalities.table import Table, TableEntry
from dymo_med.types import ModalitySpec

COLUMNS = {
    "glucose": {
        "type": "continuous",
        "unit": "mg/dL",
        "units": ["mmol/L"],
        "molar_mass": "glucose",
        "range": [20, 600],
    },
    "ldh": {"type": "continuous", "unit": "U/L", "range": [50, 2000], "missing": [-999, "n/a"]},
    "crp": {"type": "continuous", "unit": "mg/L", "censored": "limit"},
    "hs": {"type": "continuous", "unit": "ng/L", "censored": "missing"},
    "sex": {
        "type": "categorical",
        "values": ["F", "M"],
        "aliases": {"F": ["female", 2], "M": ["male", 1]},
        "missing": ["?"],
    },
    "smoker": {"type": "boolean"},
    "age": {"type": "date", "header": "born", "until": "visit", "range": [0, 120]},
}
NAMES = list(COLUMNS)


def table(columns=None, **keys):
    entry = {"kind": "table", "file": "ehr.csv", "columns": columns or COLUMNS, **keys}
    return modality(Table.spec_from_entry("labs", TableEntry.model_validate(entry)))


PLAIN = table()


def read(kind, folder, content, name="ehr.csv", missing=(), whose=None):
    if isinstance(content, str):
        content = content.encode()
    (folder / name).write_bytes(content)
    value = kind.read(folder, "Patient p1", missing, whose)
    if value is None:
        return None
    filled = value.observed_fields.tolist()
    names = [column.name for column in kind.spec.columns]
    return {n: v for n, v, f in zip(names, value.values.tolist(), filled, strict=True) if f}


def refused(kind, folder, content, name="ehr.csv", **options):
    with pytest.raises(PatientDataError) as caught:
        read(kind, folder, content, name, **options)
    text = str(caught.value)
    assert all(p.where and p.what and (p.remedy or p.expected) for p in caught.value.problems)
    return text


PRESSURE = {"columns": {"p": {"type": "continuous", "unit": "mmHg"}, "sex": {"type": "boolean"}}}
NAMED = {
    "columns": {
        "gr\u00f6\u00dfe": {"type": "continuous"},
        "art": {"type": "categorical", "values": ["\u00fcber", "unter"]},
        "b": {"type": "boolean", "aliases": {"yes": ["Ja", "1"], "no": ["Nein"]}},
    }
}
CODES = {
    "columns": {
        "code": {"type": "categorical", "values": ["1", "2"], "missing": [-9]},
        "n": {"type": "continuous"},
    }
}

# Case: content, what is read (approximately), keys of the table.
GOOD = {
    "tabs": ("ldh\tsex\n300\tM\n", {"ldh": 300, "sex": 1}, {}),
    "semicolons": ("ldh;sex\n300;M\n", {"ldh": 300, "sex": 1}, {}),
    "semicolons, text with commas": ("ldh;note\n300;a, b\n", {"ldh": 300}, {}),
    "declared separator": ("a,ldh;sex\n1;M\n", {"sex": 1}, {"separator": ";"}),
    "decimal comma": ("ldh;crp\n300,5;1,25\n", {"ldh": 300.5, "crp": 1.25}, {"decimal": ","}),
    "decimal comma, quoted": ('ldh,crp\n"300,5",2\n', {"ldh": 300.5, "crp": 2}, {"decimal": ","}),
    "mark, semicolons, Excel": ("\ufeffldh;sex\r\n300;F\r\n", {"ldh": 300, "sex": 0}, {}),
    "UTF-16 with mark": ("ldh,sex\n300,F\n".encode("utf-16"), {"ldh": 300, "sex": 0}, {}),
    "old line ends": (b"ldh,sex\r300,F\r", {"ldh": 300, "sex": 0}, {}),
    "declared encoding": (
        "ldh,Größe\n300,1\n".encode("cp1252"),
        {"ldh": 300},
        {"encoding": "windows-1252"},
    ),
    "line end in a quoted cell": ('ldh,note\n300,"a\nb"\n', {"ldh": 300}, {}),
    "alias": ("sex\nfemale\n", {"sex": 0}, {}),
    "alias as number": ("sex\n1\n", {"sex": 1}, {}),
    "boolean": ("smoker\nTRUE\n", {"smoker": 1}, {}),
    "boolean as number": ("smoker\n0\n", {"smoker": 0}, {}),
    "declared code": ("ldh,crp\n-999,0\n", {"crp": 0}, {}),
    "declared code, written as decimal": ("ldh,crp\n-999.0,0\n", {"crp": 0}, {}),
    "declared word": ("ldh,crp\nn/a,0\n", {"crp": 0}, {}),
    "declared mark": ("sex,crp\n?,0\n", {"crp": 0}, {}),
    "limit": ("crp\n<5\n", {"crp": 5}, {}),
    "limit as BIDS has it": ("crp\n89+\n", {"crp": 89}, {}),
    "limit with space": ("crp\n>= 5.5\n", {"crp": 5.5}, {}),
    "limit is blank": ("hs,crp\n< 3,1\n", {"crp": 1}, {}),
    "unit in the header": ("glucose [mmol/L]\n5\n", {"glucose": 90.078}, {}),
    "own unit in the header": ("glucose [mg/dL]\n90\n", {"glucose": 90}, {}),
    "own unit, other spelling": ("ldh [U/l]\n90\n", {"ldh": 90}, {}),
    "unit beside": ("glucose,glucose_unit\n5,mmol/L\n", {"glucose": 90.078}, {}),
    "blank number with unit beside": ("glucose,glucose_unit,crp\n,,1\n", {"crp": 1}, {}),
    "age": ("born,visit\n1960-02-29,2024-02-29\n", {"age": 64.0}, {}),
    "age at a time": ("born,visit\n1960-01-01,2020-01-01T08:00:00\n", {"age": 60.0}, {}),
    "no date to count to": ("born,visit,crp\n1960-01-01,,1\n", {"crp": 1}, {}),
    "unit in round brackets": ("glucose (mmol/L)\n5\n", {"glucose": 90.078}, {}),
    "unit in brackets of full width": ("glucose（mmol/L）\n5\n", {"glucose": 90.078}, {}),
    "square brackets in round ones": ("p (mm[Hg])\n120\n", {"p": 120}, PRESSURE),
    "what a category's column has in brackets": ("sex (M/F)\nF\n", {"sex": 0}, {}),
    "mark of a byte order in a header": ("ldh,\ufeffsex\n300,F\n", {"ldh": 300, "sex": 0}, {}),
    "zero-width space": ("ldh\u200b,sex\n300,\u200bF\u00a0\n", {"ldh": 300, "sex": 0}, {}),
    "line end in a header": ('"glucose\n(mmol/L)"\n5\n', {"glucose": 90.078}, {}),
    "parts of a letter": ("gro\u0308\u00dfe\n180\n", {"gr\u00f6\u00dfe": 180}, NAMED),
    "parts of a category's letter": ("art\nu\u0308ber\n", {"art": 0}, NAMED),
    "category with a soft hyphen": ("art\nun\u00adter\n", {"art": 1}, NAMED),
    "boolean with decimals": ("smoker\n1.0\n", {"smoker": 1}, {}),
    "boolean with decimals, none": ("smoker\n0.00\n", {"smoker": 0}, {}),
    "boolean with a decimal comma": ("smoker;ldh\n1,0;\n", {"smoker": 1}, {"decimal": ","}),
    "boolean by a word of its own": ("b\nJa\n", {"b": 1}, NAMED),
    "code with decimals": ("code,ldh\n2.0,\n", {"code": 1}, CODES),
    "code with more decimals": ("code\n1.000\n", {"code": 0}, CODES),
    "code of an alias with decimals": ("sex\n1.0\n", {"sex": 1}, {}),
    "code that means blank, with decimals": ("code,n\n-9.0,1\n", {"n": 1}, CODES),
    "line that states the separator": ("sep=;\r\nldh;sex\r\n300;F\r\n", {"ldh": 300, "sex": 0}, {}),
    "stated comma": ("sep=,\nldh,sex\n300,F\n", {"ldh": 300, "sex": 0}, {}),
    "stated tab": ("SEP=\t\nldh\tsex\n300\tF\n", {"ldh": 300, "sex": 0}, {}),
    "stated bar, with mark": ("\ufeffsep=|\nldh|sex\n300|F\n", {"ldh": 300, "sex": 0}, {}),
    "stated and declared": ("sep=;\nldh;sex\n300;F\n", {"ldh": 300, "sex": 0}, {"separator": ";"}),
    "row of empty cells": ("ldh,sex\n300,F\n,\n,,,\n", {"ldh": 300, "sex": 0}, {}),
    "rows of empty cells before": (",\nldh,sex\n,\n300,F\n", {"ldh": 300, "sex": 0}, {}),
    "empty cells behind": ("ldh,sex\n300,F,,\n", {"ldh": 300, "sex": 0}, {}),
    "blank line before the end": ("ldh\n300\n\n  \n", {"ldh": 300}, {}),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_written_plainly_is_read(tmp_path, name):
    content, expected, keys = GOOD[name]
    assert read(table(**keys), tmp_path, content) == pytest.approx(expected, abs=1e-3)


NO_UNIT = {"columns": {"n": {"type": "continuous"}}}

# Case: content, words of the message, keys of the table.
BAD = {
    "bars": ("ldh|sex\n1|F\n", "not one of the declared columns", {}),
    "spaces": ("ldh sex\n1 F\n", "not one of the declared columns", {}),
    "another language": ("Alter,Geschlecht\n56,F\n", "Got Alter, Geschlecht", {}),
    "a slip in the header": ("albumine\n40\n", "Got albumine", {}),
    "no header": ("56,1960-01-01\n57,1961-01-01\n", "Got no names", {}),
    "another separator than declared": (
        "sep=;\nldh;sex\n1;F\n",
        "another separator",
        {"separator": "tab"},
    ),
    "no unit in round brackets": ("ldh (fasting)\n90\n", "not declared", {}),
    "code with another part": ("code\n1.5\n", "unknown category", CODES),
    "unclear separator": ("ldh,sex;crp\n1,2;3\n", "not clear what separates", {}),
    "undeclared decimal comma": ('ldh\n"300,5"\n', "decimal: ','", {}),
    "point where comma is declared": ("ldh;crp\n300.5;1\n", "decimal comma", {"decimal": ","}),
    "thousands": ('ldh\n"1,300.5"\n', "thousands separators", {}),
    "thousands, decimal comma": ("ldh;sex\n1.300,5;M\n", "thousands", {"decimal": ","}),
    "undeclared code": ("crp\n-999\n", "missing_values", {}),
    "undeclared n/a": ("crp\nn/a\n", "missing_values", {}),
    "undeclared NA in categories": ("sex\nNA\n", "missing_values", {}),
    "undeclared ?": ("ldh\n?\n", "missing_values", {}),
    "error of a spreadsheet": ("ldh\n#DIV/0!\n", "missing_values", {}),
    "limit": ("ldh\n<50\n", "censored: limit", {}),
    "limit as BIDS has it": ("ldh\n89+\n", "censored: limit", {}),
    "limit that is none": ("crp\n<five\n", "not a number", {}),
    "no unit where two are declared": ("glucose\n5\n", "does not say in which unit", {}),
    "unit that is not declared": ("ldh [ukat/L]\n5\n", "not declared", {}),
    "unit that is not known": ("glucose [furlong]\n5\n", "not declared", {}),
    "two units": ("glucose [mg/dL],glucose_unit\n90,mmol/L\n", "two units", {}),
    "unit of what has none": (
        "n [mg]\n5\n",
        "without unit",
        {"columns": {"n": {"type": "continuous"}}},
    ),
    "unit mixed up": ("glucose [mg/dL]\n5.5\n", "mmol/L: check the unit", {}),
    "unknown category": ("sex\nx\n", "F or M", {}),
    "no boolean": ("smoker\nsometimes\n", "no or yes", {}),
    "partial date": ("born,visit\n1960,2020-01-01\n", "not a date", {}),
    "day first": ("born,visit\n01.02.1960,2020-01-01\n", "format", {}),
    "no such day": ("born,visit\n1960-02-30,2020-01-01\n", "not a date", {}),
    "serial day": ("born,visit\n21946,2020-01-01\n", "not a date", {}),
    "born later": ("born,visit\n2020-01-02,2020-01-01\n", "lies after", {}),
    "too old": ("born,visit\n1860-01-01,2020-01-01\n", "outside", {}),
    "header twice": ("ldh,ldh\n1,2\n", "twice", {}),
    "header twice, with unit": ("ldh,ldh [U/L]\n1,2\n", "twice", {}),
    "too many cells": ("ldh,sex\n300,M,1\n", "one cell per header", {}),
    "too few cells": ("ldh,sex\n300\n", "one cell per header", {}),
    "rows of two patients": ("ldh\n100\n200\n", "record_column", {}),
    "mixed encodings": (b"ldh,a\n300,\xc3\xa4\xe4\n", "line 2", {}),
    "another encoding": ("ldh,Größe\n300,1\n".encode("cp1252"), "encoding: windows-1252", {}),
    "UTF-8 in a declared encoding": (
        "ldh,Größe\n300,1\n".encode(),
        "is in UTF-8",
        {"encoding": "windows-1252"},
    ),
    "mark against the declaration": (
        "\ufeffldh\n300\n".encode(),
        "byte-order mark",
        {"encoding": "windows-1252"},
    ),
    "UTF-16 without mark": ("ldh\n300\n".encode("utf-16-le"), "NUL", {}),
    "half a UTF-16 letter": ("ldh\n300\n".encode("utf-16")[:-1], "cannot be read as text", {}),
    "NUL": (b"ldh\n3\x0000\n", "NUL bytes", {}),
    "huge cell": ("ldh\n" + "3" * 200_000, "not valid CSV", {}),
    "huge header": (",".join(f"c{i}" for i in range(20_001)) + ",ldh\n", "too many columns", {}),
    "huge number": ("crp\n" + "9" * 400 + "\n", "outside", {}),
    "open quote": ('ldh,sex\n"300,M\n', "not valid CSV", {}),
    "letters of another script": ("crp\n１٢\n", "not a number", {}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_is_refused_with_a_remedy(tmp_path, name):
    content, words, keys = BAD[name]
    message = refused(table(**keys), tmp_path, content)
    assert words in message and "Patient p1: ehr.csv" in message


JSON = {
    "number": ('{"ldh": 300.5}', {"ldh": 300.5}),
    "number under a decimal comma": ('{"ldh": 300.5}', {"ldh": 300.5}),
    "text": ('{"ldh": " 300 "}', {"ldh": 300}),
    "value with unit": ('{"glucose": {"value": 5, "unit": "mmol/L"}}', {"glucose": 90.078}),
    "boolean": ('{"smoker": false}', {"smoker": 0}),
    "code made a decimal": ('{"sex": 2.0}', {"sex": 0}),
    "null": ('{"ldh": null, "crp": 1}', {"crp": 1}),
    "list of one": ('[{"crp": 1}]', {"crp": 1}),
    "list with an empty one": ('[{"crp": 1}, {}, {"crp": null}]', {"crp": 1}),
    "unit in the name": ('{"glucose (mmol/L)": 5}', {"glucose": 90.078}),
    "unseen character in the name": ('{"ldh\u200b": 300}', {"ldh": 300}),
    "boolean made a decimal": ('{"smoker": 1.0}', {"smoker": 1}),
    "undeclared list": ('{"crp": 1, "all": [1, 2]}', {"crp": 1}),
}


@pytest.mark.parametrize("name", JSON)
def test_json(tmp_path, name):
    content, expected = JSON[name]
    kind = table(decimal=",") if "comma" in name else PLAIN
    assert read(kind, tmp_path, content, "ehr.json") == pytest.approx(expected, abs=1e-3)


BAD_JSON = {
    "cut": ('{"ldh": 3', "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "list in a cell": ('{"ldh": [300]}', "a list or an object"),
    "object in a cell": ('{"glucose": {"value": [1]}}', "a list or an object"),
    "text": ('"ldh"', "one row"),
    "two": ('[{"ldh": 100}, {"ldh": 200}]', "one row"),
    "none": ("[]", "one row"),
    "name twice": ('{"ldh": 100, "ldh": 200}', "twice"),
    "name twice but for what nobody sees": ('{"ldh": 100, "ldh\u200b": 200}', "twice"),
    "name twice but for a unit": ('{"ldh": 100, "ldh [U/L]": 200}', "twice"),
    "nested": ('{"patient": {"ldh": 100}}', "Got patient"),
    "other names": ('{"LD": 100}', "not one of the declared columns"),
    "NaN": ('{"ldh": NaN}', "finite"),
    "surrogate": ('{"sex": "\\ud800"}', "unknown category"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json(tmp_path, name):
    content, words = BAD_JSON[name]
    message = refused(PLAIN, tmp_path, content, "ehr.json")
    assert words in message
    message.encode()


def as_parquet(folder, columns):
    path = folder / "made.parquet"
    parquet.write_table(pa.table(columns), path)
    return path.read_bytes()


PARQUET = {
    "float": ({"ldh": [300.5]}, {"ldh": 300.5}),
    "integer": ({"ldh": [300]}, {"ldh": 300}),
    "small float": ({"ldh": pa.array([300.1], pa.float32())}, {"ldh": 300.1}),
    "decimal": ({"ldh": pa.array(["300.25"]).cast(pa.decimal128(8, 2))}, {"ldh": 300.25}),
    "null": ({"ldh": [None], "crp": [1.0]}, {"crp": 1}),
    "all null": ({"ldh": pa.nulls(1), "crp": [1.0]}, {"crp": 1}),
    "text": ({"ldh": ["300"], "sex": [" M "]}, {"ldh": 300, "sex": 1}),
    "dictionary": ({"sex": pa.array(["M"]).dictionary_encode()}, {"sex": 1}),
    "boolean": ({"smoker": [True]}, {"smoker": 1}),
    "code made a decimal": ({"sex": [2.0]}, {"sex": 0}),
    "unit in the name": ({"glucose [mmol/L]": [5.0]}, {"glucose": 90.078}),
    "unit in round brackets": ({"glucose (mmol/L)": [5.0]}, {"glucose": 90.078}),
    "unseen character in the name": ({"ldh\u200b": [300]}, {"ldh": 300}),
    "row of nulls": ({"ldh": [300, None]}, {"ldh": 300}),
    "boolean made a decimal": ({"smoker": [1.0]}, {"smoker": 1}),
    "unit beside": ({"glucose": [5.0], "glucose_unit": ["mmol/L"]}, {"glucose": 90.078}),
    "undeclared bytes": ({"crp": [1.0], "pickle": [b"\x80\x04."]}, {"crp": 1}),
}


@pytest.mark.parametrize("name", PARQUET)
def test_parquet(tmp_path, name):
    columns, expected = PARQUET[name]
    made = as_parquet(tmp_path, columns)
    got = read(PLAIN, tmp_path, made, "ehr.parquet")
    assert got == pytest.approx(expected, abs=1e-3)


def test_dates_of_parquet(tmp_path):
    days = pa.array([0], pa.date32()), pa.array([86400 * 7305], pa.timestamp("s"))
    made = as_parquet(tmp_path, {"born": days[0], "visit": days[1]})
    assert read(PLAIN, tmp_path, made, "ehr.parquet") == pytest.approx({"age": 20.0})


BAD_PARQUET = {
    "two rows": ({"ldh": [100.0, 200.0]}, "one row"),
    "bytes": ({"ldh": [b"300"]}, "something else"),
    "list": ({"ldh": [[300.0]]}, "something else"),
    "struct": ({"ldh": [{"value": 300.0}]}, "something else"),
    "NaN": ({"ldh": [float("nan")]}, "finite"),
    "out of range": ({"ldh": [5.0]}, "outside"),
    "other names": ({"AGE_AT_SCAN": [56.0]}, "Got AGE_AT_SCAN"),
    "capitals": ({"LDH": [56.0]}, "capital letters"),
}


@pytest.mark.parametrize("name", BAD_PARQUET)
def test_bad_parquet(tmp_path, name):
    columns, words = BAD_PARQUET[name]
    made = as_parquet(tmp_path, columns)
    assert words in refused(PLAIN, tmp_path, made, "ehr.parquet")


def test_two_forms_of_one_table_are_an_error(tmp_path):
    read(PLAIN, tmp_path, "ldh\n300\n")
    assert "two files" in refused(PLAIN, tmp_path, "ldh\t1\n300\t1\n", "ehr.tsv")


def test_a_folder_in_place_of_the_table(tmp_path):
    (tmp_path / "ehr.csv").mkdir()
    with pytest.raises(PatientDataError, match="not a plain file"):
        PLAIN.read(tmp_path, "Patient p1")


# -- rows of several records -----------------------------------------------------------------------

MANY = "visit_id,mrn,ldh\nv1,p1,100\nv2,p1,200\nv3,p2,300\n"
BY_RECORD = table({"ldh": COLUMNS["ldh"]}, record_column="visit_id")
BY_PATIENT = table({"ldh": COLUMNS["ldh"]}, patient_column="mrn")


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_the_row_of_the_record_is_taken(tmp_path, suffix):
    content = MANY
    if suffix != "csv":
        names, *rows = [line.split(",") for line in MANY.split()]
        records = [dict(zip(names, row, strict=True)) for row in rows]
        content = json.dumps(records)
        if suffix == "parquet":
            content = as_parquet(tmp_path, {n: [r[n] for r in records] for n in names})
    name = f"ehr.{suffix}"
    assert read(BY_RECORD, tmp_path, content, name, whose=Whose("v2", "p1")) == {"ldh": 200}
    assert read(BY_PATIENT, tmp_path, content, name, whose=Whose("v3", "p2")) == {"ldh": 300}


OF_OTHERS = {
    "only others": (BY_RECORD, MANY, Whose("v9", "p1"), "rows of other records only"),
    "one row of another": (BY_RECORD, "visit_id,ldh\nv1,1\n", Whose("v2"), "another patient's"),
    "two rows": (BY_PATIENT, MANY, Whose("v1", "p1"), "2 rows of this record"),
    "no column": (BY_RECORD, "ldh\n100\n200\n", Whose("v1"), "a column visit_id"),
    "row of nobody": (BY_RECORD, "visit_id,ldh\nv1,100\n,200\n", Whose("v1"), "whose it is"),
    "uneven row": (BY_RECORD, "visit_id,ldh\nv1,100,1\nv2,200\n", Whose("v1"), "one cell per"),
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_rows_of_others_are_never_taken(tmp_path, name):
    kind, content, whose, words = OF_OTHERS[name]
    assert words in refused(kind, tmp_path, content, whose=whose)


def test_one_row_without_the_column_is_the_patients(tmp_path):
    assert read(BY_RECORD, tmp_path, "ldh\n100\n", whose=Whose("v1")) == {"ldh": 100}


def test_a_shared_table_serves_every_record(tmp_path):
    kind = table({"ldh": COLUMNS["ldh"]}, shared="all.csv", file="", record_column="visit_id")
    (tmp_path / "all.csv").write_text(MANY)
    got = {}
    for record in ("v1", "v2", "v9"):
        folder = tmp_path / record
        folder.mkdir()
        value = kind.read(folder, record, (), Whose(record, None, tmp_path))
        got[record] = value and (value.values.tolist(), value.source.file, value.source.sha256)
    assert got["v9"] is None
    assert got["v1"][:2] == ([100], "all.csv") and got["v2"][:2] == ([200], "all.csv")
    assert got["v1"][2] != got["v2"][2]  # the hash is the row's
    assert kind.read(tmp_path / "v1", "v1", (), Whose("v1")) is None
    assert read(kind, tmp_path / "v1", "ldh\n50\n", "all.csv", whose=Whose("v1")) == {"ldh": 50}
    with pytest.raises(PatientDataError, match="two files"):
        kind.read(tmp_path / "v1", "v1", (), Whose("v1", None, tmp_path))


def test_a_changed_shared_table_is_read_again(tmp_path):
    assert read(BY_RECORD, tmp_path, MANY, whose=Whose("v1")) == {"ldh": 100}
    changed = MANY.replace("100", "1100")
    assert read(BY_RECORD, tmp_path, changed, whose=Whose("v1")) == {"ldh": 1100}


# -- bytes -----------------------------------------------------------------------------------------

SMALL = settings(max_examples=60, deadline=None)
TEXT = st.text(
    st.sampled_from("ldhsexborn,;\t\n\r\"'[]{}:0123456789.-<>\x00\ufeffä /"), max_size=60
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "parquet"])
def test_no_bytes_cause_anything_but_our_errors(folder, suffix):
    path = folder / suffix
    path.mkdir()
    whole = as_parquet(path, {"ldh": [300.5], "sex": ["M"]})
    cut = st.tuples(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=4))
    damaged = cut.map(lambda c: whole[: c[0]] + c[1] + whole[c[0] + len(c[1]) :])
    content = st.one_of(st.binary(max_size=80), TEXT.map(str.encode), damaged)

    @SMALL
    @given(content, st.sampled_from([PLAIN, BY_RECORD]))
    def attempt(content, kind):
        try:
            read(kind, path, content, f"ehr.{suffix}", whose=Whose("v1"))
        except PatientDataError as error:
            str(error).encode()

    attempt()


def test_rules_survive_the_bundle():
    spec = table(decimal=",", encoding="windows-1252", shared="a.csv", record_column="v").spec
    again = ModalitySpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec and hash(again) == hash(spec)
    assert spec.columns[4].rules.aliases[0] == ("female", "F")


def test_a_spec_without_rules_says_nothing_of_them():
    spec = table({"ldh": {"type": "continuous"}}).spec
    assert "rules" not in spec.to_dict() and "rules" not in spec.to_dict()["columns"][0]


WRONG = {
    "unknown unit": ({"unit": "mg/dL", "units": ["furlong"]}, "not known"),
    "other quantity": ({"unit": "mg/dL", "units": ["mmHg"]}, "same quantity"),
    "no molar mass": ({"unit": "mg/dL", "units": ["mmol/L"]}, "molar mass is needed"),
    "unknown substance": ({"unit": "g/L", "molar_mass": "water"}, "glucose"),
    "no weight": ({"unit": "g/L", "molar_mass": 0}, "positive"),
    "units without unit": ({"units": ["mmol/L"]}, "declare unit too"),
    "date without end": ({"type": "date"}, "needs until"),
    "date in grams": ({"type": "date", "until": "v", "unit": "g"}, "years"),
    "end of a number": ({"until": "v"}, "type date"),
    "alias of nothing": (
        {"type": "categorical", "values": ["a", "b"], "aliases": {"c": ["d"]}},
        "no category",
    ),
    "alias of two": (
        {"type": "categorical", "values": ["a", "b"], "aliases": {"a": ["x"], "b": ["x"]}},
        "one category",
    ),
    "boolean with a word for both": (
        {"type": "boolean", "aliases": {"yes": ["0"]}},
        "a word stands for one category",
    ),
    "boolean with a third": ({"type": "boolean", "aliases": {"maybe": ["x"]}}, "no category"),
    "categories that look the same": (
        {"type": "categorical", "values": ["a", "b"], "aliases": {"a": ["b\u200b"]}},
        "a word stands for one category",
    ),
    "boolean with values": ({"type": "boolean", "values": ["n", "j"]}, "no or yes"),
    "yes as blank": ({"missing": [True]}, "quote them"),
    "limits of categories": (
        {"type": "categorical", "values": ["a", "b"], "censored": "limit"},
        "continuous",
    ),
    "no LOINC code": ({"loinc": "glucose"}, "LOINC"),
    "LOINC in a CSV": ({"loinc": "2345-7"}, "format: fhir"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_declarations_are_refused(name):
    column, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        table({"x": {"type": "continuous", **column}})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"encoding": "rot13"}, "encoding must be"),
        ({"shared": "../all.csv", "record_column": "v"}, "inside"),
        ({"shared": "all.csv"}, "needs record_column"),
        ({"separator": "|"}, "separator"),
        ({"statuses": ["final"]}, "format: fhir"),
    ],
)
def test_wrong_files_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        table(**keys)


def test_names_of_columns_are_those_of_the_cohort():
    assert [column.name for column in PLAIN.spec.columns] == NAMES


# Case: limit and what it is set to, name of the file, what it holds.
LARGE = {
    "bytes": ("MAX_TABLE_BYTES", 20, "ehr.csv", "ldh\n" + "1" * 30),
    "cells": ("MAX_CELLS", 20, "ehr.csv", "ldh,sex\n" + "300,F\n" * 11),
    "cells of one line": ("MAX_CELLS", 20, "ehr.csv", "ldh" + "," * 30 + "\n1"),
    "values": ("MAX_JSON_PARTS", 20, "ehr.json", "[" + "[]," * 15 + "1]"),
    "names of their own": (
        "MAX_CELLS",
        20,
        "ehr.json",
        json.dumps([{f"a{k}": 1} for k in range(6)]),
    ),
    "rows of Parquet": ("MAX_CELLS", 20, "ehr.parquet", {"ldh": [300.0] * 30}),
    "one text of Parquet": ("MAX_CELL_CHARACTERS", 20, "ehr.parquet", {"sex": ["F" * 30]}),
    "a text many times": ("MAX_UNPACKED_BYTES", 4000, "ehr.parquet", {"sex": ["F" * 99] * 30}),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_too_large_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, name):
    limit, value, file, content = LARGE[name]
    if isinstance(content, dict):
        content = as_parquet(tmp_path, content)
    monkeypatch.setattr(limits, limit, value)
    message = refused(PLAIN, tmp_path, content, file)
    assert "too many" in message or "larger than what is read" in message
