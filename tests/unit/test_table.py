import csv
import json

import pytest
import torch
from torch.nn import functional as F

from dymo_med.errors import PatientDataError
from dymo_med.modalities import modality
from dymo_med.modalities.table import Table, TableEntry
from dymo_med.types import ModalitySpec

ENTRY = {
    "kind": "table",
    "file": "ehr.csv",
    "columns": {
        "ldh": {"type": "continuous", "unit": "U/L", "range": [50, 2000]},
        "sex": {"type": "categorical", "values": ["F", "M"]},
        "crp": {"type": "continuous"},
        "group": {"type": "categorical", "values": ["A", "B", "0"]},
    },
}
SPEC = Table.spec_from_entry("labs", TableEntry.model_validate(ENTRY))


def read(folder, text, name="ehr.csv", **options):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return modality(SPEC).read(folder, "Patient p017", **options)


def problems(folder, text, name="ehr.csv", **options):
    with pytest.raises(PatientDataError) as caught:
        read(folder, text, name, **options)
    return caught.value.problems


def test_a_header_in_other_capitals_is_an_error_not_a_blank(tmp_path):
    [problem] = problems(tmp_path, "LDH,sex\n312.5,M\n")
    assert "column LDH" in problem.where and problem.expected == "ldh"
    assert read(tmp_path, "LDH,ldh,sex\n1,312.5,M\n").values[0] == 312.5


def test_a_row_is_read_in_natural_units(tmp_path):
    value = read(tmp_path, "group,ldh,sex,other\nB, 312.5 ,M,x\n")
    assert value.values.tolist() == [312.5, 1, 0, 1]
    assert value.observed_fields.tolist() == [True, True, False, True]
    assert value.source.file == "ehr.csv" and len(value.source.sha256) == 64
    assert value.source.facts == {"cells": "3 of 4 filled"}


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfldh,sex\r\n100,F\r\n",  # byte order mark, as Excel writes it
        b"ldh,sex\n100,F",
        b'"ldh","sex"\n"100","F"\n\n',
        b"ldh,sex\n1e2,F\n",
        b"ldh,sex\n+100.,F\n",
    ],
)
def test_ways_to_write_the_same_row(tmp_path, text):
    assert read(tmp_path, text).values.tolist() == [100, 0, 0, 0]


def test_zero_is_a_measurement_and_blank_is_not(tmp_path):
    value = read(tmp_path, "crp,ldh\n0,\n")
    assert value.observed_fields.tolist() == [False, False, True, False]


def test_all_blank_or_no_file_is_missing(tmp_path):
    assert modality(SPEC).read(tmp_path, "Patient x") is None
    assert read(tmp_path, "ldh,sex\n,\n") is None
    assert read(tmp_path, "ldh,sex\nn/a, NA \n", missing_values=("n/a", "NA")) is None


@pytest.mark.parametrize(
    "text",
    ['{"ldh": 100, "sex": "F", "crp": null}', '[{"ldh": "100", "sex": " F ", "crp": ""}]'],
)
def test_json(tmp_path, text):
    value = read(tmp_path, text, "ehr.json")
    assert value.values.tolist() == [100, 0, 0, 0]
    assert value.observed_fields.tolist() == [True, True, False, False]


def test_a_json_number_can_name_a_category(tmp_path):
    assert read(tmp_path, '{"group": 0}', "ehr.json").values[3] == 2


def test_two_files_are_ambiguous(tmp_path):
    read(tmp_path, "ldh\n100\n")
    [problem] = problems(tmp_path, '{"ldh": 100}', "ehr.json")
    assert "two files" in problem.what


CELLS = {
    "unknown category": ("sex\nfemale-ish-secret\n", "column sex", "unknown category", "F or M"),
    "wrong case": ("sex\nm\n", "column sex", "unknown category", "F or M"),
    "decimal comma": ('ldh\n"312,5"\n', "column ldh", "not a number", "50 to 2000 U/L"),
    "unit in the cell": ("ldh\n312 U/L\n", "column ldh", "not a number", "50 to 2000 U/L"),
    "underscore": ("ldh\n1_000\n", "column ldh", "not a number", "50 to 2000 U/L"),
    "censored": ("crp\n<5\n", "column crp", "not a number", "a number"),
    "nan": ("ldh\nNaN\n", "column ldh", "finite", "50 to 2000 U/L"),
    "inf": ("crp\n-inf\n", "column crp", "finite", "a number"),
    "overflow": ("crp\n1e300\n", "column crp", "outside", "a number"),
    "below": ("ldh\n49.9\n", "column ldh", "outside the declared range", "50 to 2000 U/L"),
    "above": ("ldh\n987654\n", "column ldh", "outside the declared range", "50 to 2000 U/L"),
}


@pytest.mark.parametrize("name", CELLS)
def test_a_wrong_cell_is_located_but_never_shown(tmp_path, name):
    text, column, what, expected = CELLS[name]
    [problem] = problems(tmp_path, text)
    assert problem.where == f"Patient p017: ehr.csv, line 2, {column}"
    assert what in problem.what and expected in problem.expected and problem.remedy
    cell = text.split("\n")[1].strip('"')
    if len(cell) > 2:
        assert cell not in str(problem)


def test_json_constants_are_not_numbers(tmp_path):
    [problem] = problems(tmp_path, '{"ldh": NaN}', "ehr.json")
    assert problem.where.endswith("ehr.json, column ldh") and "finite" in problem.what
    [problem] = problems(tmp_path, '{"crp": true}', "ehr.json")
    assert "not a number" in problem.what


def test_every_wrong_cell_at_once(tmp_path):
    found = problems(tmp_path, "ldh,sex,crp\n1,x,y\n")
    assert [p.where.rsplit(" ", 1)[1] for p in found] == ["ldh", "sex", "crp"]


FILES = {
    "two rows": ("ldh\n100\n200\n", "one row"),
    "no row": ("ldh\n", "one row"),
    "empty": ("", "one row"),
    "double header": ("ldh,ldh\n100,200\n", "header occurs twice"),
    "more cells": ("ldh,sex\n100,F,3\n", "one cell per header"),
    "fewer cells": ("ldh,sex\n100\n", "one cell per header"),
    "other columns with semicolons": ("a;b\n100;F\n", "not one of the declared columns"),
    "other columns": ("height\n180\n", "not one of the declared columns"),
    "open quote": ('ldh,sex\n100,"F\n', "not valid CSV"),
    "not text": (b"ldh\n\xff\xfe100", "cannot be read as text"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file(tmp_path, name):
    text, what = FILES[name]
    found = problems(tmp_path, text)
    assert what in found[0].what
    assert found[0].where.startswith("Patient p017: ehr.csv")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "3", '[{"ldh": 1}, {"ldh": 2}]', '{"ldh": 1, "ldh": 2}', '{"ldh": [1]}'],
)
def test_a_wrong_json_file(tmp_path, text):
    assert problems(tmp_path, text, "ehr.json")


# -- fit, likelihood, mean -------------------------------------------------------------------------


def fitted():
    values = torch.tensor(
        [[100.0, 0, 1, 0], [300, 1, 1, 0], [500, 1, 1, 1], [9999, 1, 7, 2]], dtype=torch.float32
    )
    filled = torch.ones(4, 4, dtype=torch.bool)
    filled[3] = False
    return modality(modality(SPEC).fit(values, filled))


def test_percentiles_hide_the_lowest_and_highest_patient():
    values = torch.arange(100.0, 200.0)[:, None].expand(100, 4).clone()
    values[:, [1, 3]] = 0
    ldh = modality(SPEC).fit(values, torch.ones(100, 4, dtype=torch.bool)).columns[0]
    assert len(ldh.percentiles) == 101
    assert ldh.percentiles[50] == pytest.approx(149.5)
    assert ldh.percentiles[0] == ldh.percentiles[1] > 100
    assert ldh.percentiles[100] == ldh.percentiles[99] < 199


def test_fit_uses_filled_cells_only():
    ldh, sex, crp, group = fitted().spec.columns
    assert ldh.mean == pytest.approx(300) and ldh.std == pytest.approx(163.299, abs=1e-2)
    assert ldh.percentiles == ()  # too few cells to hide single patients
    assert (crp.mean, crp.std) == (1, 1)  # one distinct value
    assert sex.frequencies == pytest.approx((2 / 5, 3 / 5))
    assert group.frequencies == pytest.approx((3 / 6, 2 / 6, 1 / 6))
    assert sex.mean is None and ldh.frequencies == ()
    assert ModalitySpec.from_dict(json.loads(json.dumps(fitted().spec.to_dict()))) == fitted().spec


def test_fit_of_a_column_nobody_has():
    spec = modality(SPEC).fit(torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.bool))
    assert (spec.columns[0].mean, spec.columns[0].std) == (1025, 1)
    assert spec.columns[1].frequencies == (0.5, 0.5)
    assert spec.columns[0].percentiles == ()
    assert not any(column.known for column in spec.columns)
    assert ModalitySpec.from_dict(spec.to_dict()) == spec


def test_a_column_nobody_had_is_not_read_and_not_written(tmp_path):
    filled = torch.tensor([[True, True, False, False]] * 3)
    spec = modality(SPEC).fit(torch.zeros(3, 4), filled)
    kind = modality(spec)
    (tmp_path / "ehr.csv").write_text("ldh,crp\n300,5\n")
    value = kind.read(tmp_path, "Patient p1")
    assert value.observed_fields.tolist() == [True, False, False, False]
    assert value.warnings == ("crp is not used, since no training record had it",)
    (tmp_path / "ehr.csv").write_text("ldh,crp\n,5\n")
    assert kind.read(tmp_path, "Patient p1") is None
    rows = list(csv.DictReader(kind.write(tmp_path, torch.ones(4), None, None).open()))
    assert [row["value"] for row in rows] == ["1", "M", "", ""]
    assert [row["source"] for row in rows] == ["recovered", "recovered", "not known", "not known"]


def test_likelihood_counts_filled_cells_only():
    kind = fitted()
    parameters = torch.randn(3, 2 + 2 + 2 + 3, dtype=torch.float64)
    values = torch.tensor([[250.0, 1, 2, 2]] * 3, dtype=torch.float64)
    filled = torch.tensor([[True] * 4, [True, False, False, True], [False] * 4])
    got = kind.log_likelihood(parameters, values, filled)
    ldh = kind.spec.columns[0]
    terms = [
        torch.distributions.Normal(parameters[:, 0], parameters[:, 1].clamp(-3, 2).exp()).log_prob(
            (values[:, 0] - ldh.mean) / ldh.std
        ),
        -F.cross_entropy(parameters[:, 2:4], torch.tensor([1, 1, 1]), reduction="none"),
        torch.distributions.Normal(parameters[:, 4], parameters[:, 5].clamp(-3, 2).exp()).log_prob(
            values[:, 2] - 1
        ),
        -F.cross_entropy(parameters[:, 6:], torch.tensor([2, 2, 2]), reduction="none"),
    ]
    expected = (torch.stack(terms, 1) * filled).sum(1)
    assert torch.allclose(got, expected, atol=1e-10)
    assert got[2] == 0
    assert torch.equal(got[:1], kind.log_likelihood(parameters[:1], values[:1], None))


def test_noise_in_blank_cells_changes_nothing():
    kind = fitted()
    parameters = torch.randn(2, 9, requires_grad=True)
    filled = torch.tensor([[True, False, False, True]] * 2)
    clean = torch.tensor([[250.0, 0, 0, 1]] * 2)
    noisy = clean.clone()
    noisy[:, 1:3] = torch.tensor([float("nan"), float("inf")])
    a = kind.log_likelihood(parameters, clean, filled)
    b = kind.log_likelihood(parameters, noisy, filled)
    assert torch.equal(a, b)
    b.sum().backward()
    assert torch.isfinite(parameters.grad).all()


def test_spread_is_bounded():
    kind = fitted()
    values = torch.tensor([[300.0, 0, 1, 0]])
    narrow = torch.zeros(1, 9)
    narrow[:, 1] = narrow[:, 5] = -50
    assert kind.log_likelihood(narrow, values, None).item() < 8


def test_mean_is_in_natural_units_range_and_own_categories():
    kind = fitted()
    parameters = torch.tensor([[-100.0, 0, 0, 1, 2, 0, 0, 5, 1], [0.5, 0, 9, 1, -1, 0, 3, 0, 1]])
    mean = kind.mean(parameters)
    assert mean.tolist() == [
        [50, 1, 3, 1],
        [pytest.approx(300 + 0.5 * kind.spec.columns[0].std), 0, 0, 0],
    ]


def test_draws_follow_the_likelihood():
    kind = fitted()
    ldh = kind.spec.columns[0]
    one = torch.tensor([[0.2, -1.5, 0.0, 1.0, -9.0, 0.0, 0.5, 0.0, -1.0]], dtype=torch.float64)
    n = 20_000
    drawn = kind.draw(one.expand(n, -1), torch.Generator().manual_seed(0))
    standard = (drawn[:, 0] - ldh.mean) / ldh.std
    assert float(standard.mean()) == pytest.approx(0.2, abs=5 * 0.2231 / n**0.5)
    assert float(standard.std()) == pytest.approx(0.2231, rel=0.03)  # e^-1.5
    for column, logits in ((1, one[0, 2:4]), (3, one[0, 6:])):
        shares = torch.bincount(drawn[:, column].long(), minlength=len(logits)) / n
        torch.testing.assert_close(shares, logits.softmax(0).float(), atol=0.02, rtol=0)
    assert float(kind.draw(one - 40, torch.Generator())[0, 0]) == 50  # never below `range`


def test_networks_fit():
    kind = fitted()
    values = torch.tensor([[250.0, 1, 2, 2]] * 3)
    tokens = kind.encoder(8, {"heads": 2})(values, torch.ones(3, 4, dtype=torch.bool))
    assert tokens.values.shape == (3, 4, 8)
    assert kind.decoder(5, {})(torch.rand(3, 5)).shape == (3, 9)


# -- write and entry -------------------------------------------------------------------------------


def test_a_recovered_table_says_what_was_measured(tmp_path):
    kind = modality(SPEC)
    filled = torch.tensor([True, False, False, True])
    path = kind.write(tmp_path, torch.tensor([312.5, 1, 0.25, 2]), filled, None)
    assert path.name == "labs_synthetic.csv"
    assert list(csv.DictReader(path.open())) == [
        {"column": "ldh", "value": "312.5", "unit": "U/L", "source": "observed"},
        {"column": "sex", "value": "M", "unit": "", "source": "recovered"},
        {"column": "crp", "value": "0.25", "unit": "", "source": "recovered"},
        {"column": "group", "value": "0", "unit": "", "source": "observed"},
    ]
    text = kind.write(tmp_path, torch.zeros(4), None, None).read_text(encoding="utf-8")
    assert "observed" not in text and text.count("recovered") == 4


WRONG = {
    "yaml booleans": ({"type": "categorical", "values": [True, False]}, "quote the categories"),
    "numbers": ({"type": "categorical", "values": [0, 1]}, "quote them"),
    "one value": ({"type": "categorical", "values": ["a"]}, "two distinct"),
    "same value": ({"type": "categorical", "values": ["a", "a"]}, "two distinct"),
    "empty value": ({"type": "categorical", "values": ["a", ""]}, "non-empty"),
    "spaces": ({"type": "categorical", "values": ["a ", "b"]}, "spaces"),
    "no values": ({"type": "categorical"}, "needs values"),
    "range of categories": (
        {"type": "categorical", "values": ["a", "b"], "range": [0, 1]},
        "no range",
    ),
    "values of numbers": ({"type": "continuous", "values": ["a", "b"]}, "no values"),
    "range upside down": ({"type": "continuous", "range": [2, 1]}, "lowest, highest"),
    "short range": ({"type": "continuous", "range": [2]}, "at least 2"),
    "endless range": ({"type": "continuous", "range": [0, float("inf")]}, "finite"),
    "unknown type": ({"type": "ordinal"}, "continuous"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_columns_are_refused(name):
    column, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        TableEntry.model_validate({**ENTRY, "columns": {"x": column}})


@pytest.mark.parametrize(
    "change", [{"file": "ehr.xlsx"}, {"file": "../ehr.csv"}, {"columns": {}}, {"file": ""}]
)
def test_wrong_tables_are_refused(change):
    with pytest.raises(ValueError):
        TableEntry.model_validate({**ENTRY, **change})
