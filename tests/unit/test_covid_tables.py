"""The real table: as one row per visit, and as the one file that came."""

import shutil

import pytest
import torch
import yaml

from dymo_med.data.cohort import read_cohort
from dymo_med.data.patient import read_record
from tests.conftest import shared_data
from tests.unit.test_docs import ROOT

pytestmark = pytest.mark.shared


def test_the_table_as_it_came_reads_as_the_prepared_rows(tmp_path):
    source = shared_data("covid-cxr")
    described = yaml.safe_load((ROOT / "cohorts/covid-cxr/cohort.yaml").read_text())
    tables = {k: m for k, m in described["modalities"].items() if m["kind"] == "table"}
    own = {**described, "modalities": tables, "subgroups": {}}
    columns = [name for table in tables.values() for name in table["columns"]]
    lines = (source / "ehr.csv").read_text(encoding="utf-8-sig").splitlines()
    header = lines[0].split(",")
    rows = {
        line.split(",")[0]: dict(zip(header, line.split(","), strict=True)) for line in lines[1:]
    }
    for visit, row in rows.items():
        folder = tmp_path / "patients" / visit
        folder.mkdir(parents=True)
        (folder / "ehr.csv").write_text(
            ",".join(columns) + "\n" + ",".join(row[c] for c in columns) + "\n"
        )
    labels = [f"{v},{r['patient_id']}," for v, r in rows.items()]
    (tmp_path / "labels.csv").write_text(
        "\n".join(["record_id,patient_id,icu_or_death", *labels]) + "\n"
    )
    patients = dict.fromkeys(r["patient_id"] for r in rows.values())
    (tmp_path / "splits.csv").write_text(
        "\n".join(["patient_id,split", *(f"{p},test" for p in patients)]) + "\n"
    )
    (tmp_path / "cohort.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
    apart = read_cohort(tmp_path)
    apart = [read_record(e, apart.specs, require_something=False) for e in apart.records]
    for folder in (tmp_path / "patients").iterdir():
        (folder / "ehr.csv").unlink()
    shutil.copy(source / "ehr.csv", tmp_path)
    shared = {"shared": "ehr.csv", "record_column": "visit_id", "patient_column": "patient_id"}
    (tmp_path / "cohort.yaml").write_text(
        yaml.safe_dump({**own, "tables": shared}, sort_keys=False)
    )
    together = read_cohort(tmp_path)
    together = [read_record(e, together.specs, require_something=False) for e in together.records]
    assert len(apart) == len(together) == 401
    filled = 0
    for one, other in zip(apart, together, strict=True):
        assert list(one.modalities) == list(other.modalities)
        for name, value in one.modalities.items():
            assert torch.equal(value.values, other.modalities[name].values)
            filled += int(value.observed_fields.sum())
    # As the dictionary of the collection counts them, column by column.
    assert filled == 199 + 389 + 7 + 120 + 120 + 43 + 45 + 128 + 87 + 47 + 27 + 91 + 84 + 70
