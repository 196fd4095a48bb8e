from dataclasses import replace

import pytest
import torch

from dymo_med.data.batch import collate


def test_missing_is_false_and_values_are_finite(cohort, records):
    batch = collate(records, cohort.specs)
    names = [s.name for s in cohort.specs]
    assert batch.observed.names == tuple(names)
    for i, record in enumerate(records):
        assert set(batch.observed.of(i)) == set(record.modalities)
        for spec in cohort.specs:
            value = record.modalities.get(spec.name)
            row = batch.values[spec.name][i]
            assert torch.equal(row, torch.zeros(spec.shape) if value is None else value.values)
            if spec.columns:
                filled = batch.observed_fields[spec.name][i]
                assert torch.equal(
                    filled,
                    torch.zeros(spec.shape, dtype=torch.bool)
                    if value is None
                    else value.observed_fields,
                )
    assert set(batch.observed_fields) == {"demographics", "labs"}
    assert not batch.observed.available.all()


def test_labels_and_ids(cohort, records):
    batch = collate(records, cohort.specs)
    assert len(batch) == 24
    assert batch.labels[-1] == -1 and set(batch.labels[:-1].tolist()) == {0, 1}
    assert batch.patient_ids[1] == "p000" and batch.record_ids[1] == "p000_v2"


def test_a_row_equals_a_batch_of_one(cohort, records):
    batch = collate(records, cohort.specs)
    row = batch.rows(torch.tensor([5]))
    one = collate(records[5:6], cohort.specs)
    for spec in cohort.specs:
        assert torch.equal(row.values[spec.name], one.values[spec.name])
    assert torch.equal(row.observed.available, one.observed.available)
    assert torch.equal(row.partly_filled(), one.partly_filled())


def test_what_a_blank_cell_holds_is_not_passed_on(cohort, records):
    record = records[0]
    labs = record.modalities["labs"]
    dirty = replace(
        labs,
        values=torch.full_like(labs.values, float("nan")),
        observed_fields=torch.zeros_like(labs.observed_fields),
    )
    changed = replace(record, modalities={**record.modalities, "labs": dirty})
    assert torch.equal(collate([changed], cohort.specs).values["labs"], torch.zeros(1, 3))


def test_wrong_input_is_refused(cohort, records):
    with pytest.raises(ValueError, match="at least one record"):
        collate([], cohort.specs)
    with pytest.raises(ValueError, match="must have shape"):
        collate(records, [replace(s, shape=(9,)) for s in cohort.specs])
