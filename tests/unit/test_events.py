"""OMOP and MEDS: the events that were known at the index time, and never a later one."""

import shutil
from datetime import datetime

import pandas as pd
import pytest
import yaml

from dymo_med.data.cohort import read_cohort
from dymo_med.data.patient import read_patient, read_record
from dymo_med.errors import ConfigError, PatientDataError
from dymo_med.inference.check import check
from dymo_med.types import ModalitySpec

CONCEPTS = {
    "ldh": ["3016436", "LAB//LDH"],
    "crp": ["3020460", "LAB//CRP"],
    "diabetes": ["201820", "DX//E11"],
    "smoker": ["4144272", "SMOKER//never", "SMOKER//now"],
}
COLUMNS = {
    "age": {"type": "continuous", "unit": "years", "range": [0, 120], "person": "age"},
    "ldh": {"type": "continuous", "unit": "U/L", "range": [50, 2000], "pick": "latest"},
    "crp": {"type": "continuous", "unit": "mg/L", "range": [0, 500], "pick": "earliest"},
    "diabetes": {"type": "boolean", "unrecorded": "negative"},
    "smoker": {
        "type": "categorical",
        "values": ["never", "now"],
        "aliases": {"never": ["4222303", "SMOKER//never"], "now": ["4298794", "SMOKER//now"]},
    },
}
# person, code, day, time of day, value; the index time of 1 is the 10th of May 2024, 12:00.
EVENTS = [
    (1, "ldh", "2024-05-01", "08:00:00", 210.0),
    (1, "ldh", "2024-05-09", "08:00:00", 250.0),
    (1, "ldh", "2024-05-10", "12:00:01", 900.0),  # later: planted
    (1, "ldh", "2024-05-10", "", 910.0),  # of the day itself, who knows when: planted
    (1, "ldh", "2024-06-01", "08:00:00", 920.0),  # later: planted
    (1, "crp", "2022-01-01", "08:00:00", 80.0),
    (1, "crp", "2024-05-10", "12:00:00", 12.0),  # at that very moment
    (1, "diabetes", "2024-05-11", "", None),  # later: planted
    (1, "smoker", "2024-05-09", "", "now"),
    (1, "smoker", "2024-05-20", "", "never"),  # later: planted
    (2, "diabetes", "2020-02-02", "", None),
    (2, "ldh", "2024-05-10", "08:00:00", 333.0),  # the index time of 2 is that day, 00:00
    (3, "ldh", "2030-01-01", "08:00:00", 555.0),  # all of 3 is later
]
INDEX = "record_id,{},index_time\np1,1,2024-05-10T12:00:00\np2,2,2024-05-10\np3,3,2024-01-01\n"


def omop(folder, suffix):
    folder.mkdir(parents=True)
    person = pd.DataFrame(
        {
            "person_id": [1, 2, 3],
            "gender_concept_id": [8532, 8507, 0],
            "year_of_birth": [1960, 1980, 1990],
            "month_of_birth": [5, None, 1],
            "day_of_birth": [10, None, 1],
        }
    )
    rows = {"measurement": [], "observation": [], "condition_occurrence": []}
    for who, name, day, clock, value in EVENTS:
        code = int(CONCEPTS[name][0])
        base = {"person_id": who}
        instant = f"{day} {clock}" if clock else None
        if name == "diabetes":
            dates = {"condition_start_date": day, "condition_start_datetime": instant}
            rows["condition_occurrence"].append({**base, "condition_concept_id": code, **dates})
        elif name == "smoker":
            concept = {"never": 4222303, "now": 4298794}[value]
            dates = {"observation_date": day, "observation_datetime": instant}
            more = {"observation_concept_id": code, "value_as_concept_id": concept}
            rows["observation"].append({**base, **more, **dates})
        else:
            dates = {"measurement_date": day, "measurement_datetime": instant}
            more = {"measurement_concept_id": code, "value_as_number": value}
            unit = {"unit_source_value": {"ldh": "U/L", "crp": "mg/L"}[name]}
            rows["measurement"].append({**base, **more, **unit, **dates})
    for name, table in {"person": person, **{n: pd.DataFrame(r) for n, r in rows.items()}}.items():
        write(table, folder / f"{name}{suffix}")
    return folder


def write(table, path):
    table.to_csv(path, index=False) if path.suffix == ".csv" else table.to_parquet(path)


def meds(folder, suffix):
    rows = [(1, "1960-05-10", "MEDS_BIRTH", None), (2, "1980-07-01", "MEDS_BIRTH", None)]
    rows += [(3, "1990-01-01", "MEDS_BIRTH", None)]
    for who, name, day, clock, value in EVENTS:
        code = f"SMOKER//{value}" if name == "smoker" else CONCEPTS[name][1]
        number = value if isinstance(value, float) else None
        rows.append((who, f"{day} {clock}".strip(), code, number))
    table = pd.DataFrame(rows, columns=["subject_id", "time", "code", "numeric_value"])
    table["time"] = pd.to_datetime(table["time"], format="ISO8601").astype("datetime64[us]")
    table["numeric_value"] = table["numeric_value"].astype("float32")
    (folder / "data" / "train").mkdir(parents=True)
    for shard in (1, 2, 3):
        path = folder / "data" / "train" / f"{shard}.parquet"
        table[table.subject_id == shard].to_parquet(path)
    (folder / "metadata").mkdir()
    pd.DataFrame({"code": ["LAB//LDH"]}).to_parquet(folder / "metadata" / "codes.parquet")
    return folder


WRITERS = {"omop-csv": (omop, ".csv"), "omop-parquet": (omop, ".parquet"), "meds": (meds, "")}


def described(kind, **more):
    columns = {n: dict(c) for n, c in COLUMNS.items()}
    for name, codes in CONCEPTS.items():
        columns[name]["concepts"] = codes[:1] if kind == "omop" else codes[1:]
    return {"kind": "table", "format": kind, "columns": columns, **more}


def cohort_of(root, which, **more):
    writer, suffix = WRITERS[which]
    kind = writer.__name__
    writer(root / "ehr", suffix)
    (root / "index.csv").write_text(INDEX.format("person_id" if kind == "omop" else "subject_id"))
    entry = described(kind, shared="ehr", index="index.csv", **more)
    task = {"type": "classification", "target": "dead", "classes": ["alive", "dead"]}
    text = {"name": "events", "task": task, "modalities": {"ehr": entry}}
    (root / "cohort.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    labels = ["record_id,patient_id,dead", *(f"p{n},p{n},alive" for n in (1, 2, 3))]
    (root / "labels.csv").write_text("\n".join(labels))
    (root / "splits.csv").write_text("patient_id,split\np1,train\np2,train\np3,train\n")
    for n in (1, 2, 3):
        (root / "patients" / f"p{n}").mkdir(parents=True)
    return root


def values(record):
    found = record.modalities["ehr"]
    return [
        round(float(v), 2) if known else None
        for v, known in zip(found.values, found.observed_fields, strict=True)
    ]


@pytest.mark.parametrize("which", WRITERS)
def test_only_what_was_known_counts(tmp_path, which):
    cohort = read_cohort(cohort_of(tmp_path, which))
    read = {
        entry.record_id: read_record(entry, cohort.specs, require_something=False)
        for entry in cohort.records
    }
    # 64 years; the last LDH before noon; the first CRP; no diabetes yet; a smoker.
    assert values(read["p1"]) == [64.0, 250.0, 80.0, 0.0, 1.0]
    age = round((datetime(2024, 5, 10) - datetime(1980, 7, 1)).days / 365.25, 2)
    assert values(read["p2"]) == [age, None, None, 1.0, None]
    assert values(read["p3"])[1:] == [None, None, 0.0, None]


@pytest.mark.parametrize("which", WRITERS)
def test_the_answer_is_the_same_without_what_came_later(tmp_path, which):
    """What stands after the index time may as well not be there."""
    root = cohort_of(tmp_path / "all", which)
    cohort = read_cohort(root)
    with_later = [values(read_record(e, cohort.specs)) for e in cohort.records]
    cut = shutil.copytree(root, tmp_path / "cut")
    ends = {1: datetime(2024, 5, 10, 12), 2: datetime(2024, 5, 10), 3: datetime(2024, 1, 1)}
    for path in [p for p in (cut / "ehr").rglob("*.*") if p.is_file()]:
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
        who = next((c for c in ("person_id", "subject_id") if c in table), None)
        clock = next((c for c in table if c.endswith("date") or c == "time"), None)
        if who is None or clock is None:
            continue
        exact = table[clock.replace("date", "datetime")] if clock != "time" else table[clock]
        at = pd.to_datetime(exact).fillna(
            pd.to_datetime(table[clock]) + pd.Timedelta(hours=23, minutes=59)
        )
        kept = table[at <= table[who].map(ends)]
        write(kept, path)
    cohort = read_cohort(cut)
    assert [values(read_record(e, cohort.specs)) for e in cohort.records] == with_later


@pytest.mark.parametrize("which", WRITERS)
def test_a_window_leaves_out_what_is_old(tmp_path, which):
    cohort = read_cohort(cohort_of(tmp_path, which, within_days=30))
    read = {e.record_id: read_record(e, cohort.specs) for e in cohort.records}
    assert values(read["p1"])[2] == 12.0  # the CRP of 2022 is out
    assert values(read["p2"])[3] == 0.0  # and so is the diagnosis of 2020


@pytest.mark.parametrize("which", WRITERS)
def test_one_patient_with_tables_of_its_own(tmp_path, which):
    writer, suffix = WRITERS[which]
    patient = tmp_path / "p1"
    writer(patient / "ehr", suffix)
    (patient / "ehr" / "index.csv").write_text("person_id,index_time\n1,2024-05-10T12:00:00\n")
    root = cohort_of(tmp_path / "cohort", which, file="ehr")
    cohort = read_cohort(root)
    assert values(read_patient(patient, cohort.specs)) == [64.0, 250.0, 80.0, 0.0, 1.0]
    (patient / "ehr" / "index.csv").unlink()
    with pytest.raises(PatientDataError, match="nothing tells the index time"):
        read_patient(patient, cohort.specs)


def test_a_spec_keeps_its_rules(tmp_path):
    (spec,) = read_cohort(cohort_of(tmp_path, "omop-csv", within_days=30)).specs
    assert ModalitySpec.from_dict(spec.to_dict()) == spec


def test_check_reads_events(tmp_path):
    report = check(cohort_of(tmp_path, "omop-csv"))
    assert not [p for p in report.problems if "ehr" in str(p)], report.problems


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ({"pick": "error"}, "several events differ"),
        ({"concepts": ["3016436", "3020460"], "pick": "earliest"}, "unit"),
        ({"unit": "g/L"}, "unit"),
        ({"range": [50, 240]}, "range"),
    ],
)
def test_what_is_not_clear_is_an_error(tmp_path, column, said):
    root = cohort_of(tmp_path, "omop-csv")
    text = yaml.safe_load((root / "cohort.yaml").read_text())
    text["modalities"]["ehr"]["columns"]["ldh"] |= column
    (root / "cohort.yaml").write_text(yaml.safe_dump(text))
    cohort = read_cohort(root)
    with pytest.raises(PatientDataError, match=said) as caught:
        read_record(cohort.records[0], cohort.specs)
    assert "250" not in str(caught.value) and "900" not in str(caught.value)


def test_a_bounded_number_is_one(tmp_path):
    root = cohort_of(tmp_path, "omop-csv")
    path = root / "ehr" / "measurement.csv"
    table = pd.read_csv(path)
    table["operator_concept_id"] = 4171756
    table.to_csv(path, index=False)
    cohort = read_cohort(root)
    with pytest.raises(PatientDataError, match="limit"):
        read_record(cohort.records[0], cohort.specs)


def test_units_of_the_vocabulary_are_used(tmp_path):
    root = cohort_of(tmp_path, "omop-csv")
    path = root / "ehr" / "measurement.csv"
    table = pd.read_csv(path).drop(columns="unit_source_value")
    table["unit_concept_id"] = 8645.0
    table.to_csv(path, index=False)
    concept = pd.DataFrame(
        {"concept_id": [8645, 5], "concept_code": ["U/L", "x"], "vocabulary_id": ["UCUM", "SNOMED"]}
    )
    concept.to_csv(root / "ehr" / "CONCEPT.csv", index=False)
    text = yaml.safe_load((root / "cohort.yaml").read_text())
    text["modalities"]["ehr"]["columns"] = {
        "ldh": {**text["modalities"]["ehr"]["columns"]["ldh"], "units": ["ukat/L"]}
    }
    (root / "cohort.yaml").write_text(yaml.safe_dump(text))
    cohort = read_cohort(root)
    assert values(read_record(cohort.records[0], cohort.specs)) == [250.0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: (r / "index.csv").unlink(), "nothing tells the index time"),
        (lambda r: (r / "index.csv").write_text("record_id,index_time\n"), "header does not fit"),
        (
            lambda r: (r / "index.csv").write_text("record_id,person_id,index_time\np1,1,soon\n"),
            "line 2",
        ),
        (lambda r: (r / "ehr" / "person.csv").unlink(), "no table of persons"),
        (lambda r: (r / "ehr" / "measurement.csv").write_text("a,b\n1,2\n"), "lacks a column"),
        (lambda r: (r / "ehr" / "measurement.csv").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    ],
)
def test_what_is_wrong_is_told(tmp_path, change, said):
    root = cohort_of(tmp_path, "omop-csv")
    change(root)
    cohort = read_cohort(root)
    with pytest.raises(PatientDataError, match=said):
        read_record(cohort.records[0], cohort.specs)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"format": ""}, "need format"),
        ({"shared": "", "file": ""}, "folder of their tables"),
        ({"record_column": "x"}, "index tells"),
        ({"within_days": -1}, "greater than or equal"),
    ],
)
def test_entries_that_make_no_sense_are_refused(tmp_path, entry, said):
    root = cohort_of(tmp_path, "omop-csv")
    text = yaml.safe_load((root / "cohort.yaml").read_text())
    text["modalities"]["ehr"] |= entry
    (root / "cohort.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(ConfigError, match=said):
        read_cohort(root)
