import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dymo_med.data.missingness import apply, parse_scenario
from dymo_med.errors import ConfigError


def filled_cells(record):
    return sum(
        int(v.observed_fields.sum())
        for v in record.modalities.values()
        if v.observed_fields is not None
    )


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("as-is", "as-is"),
        (" rate: 0.40", "rate:0.4"),
        ("rate:1", "rate:1"),
        ("drop:labs, t1", "drop:t1,labs"),
        ("drop:t1,t1", "drop:t1"),
        ("cells:0.3", "cells:0.3"),
    ],
)
def test_scenarios_have_one_spelling(cohort, text, canonical):
    scenario = parse_scenario(text, cohort.specs)
    assert str(scenario) == canonical
    assert parse_scenario(canonical, cohort.specs) == scenario


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not known"),
        ("asis", "Did you mean 'as-is'"),
        ("as-is:1", "not known"),
        ("rate", "share is wrong"),
        ("rate:", "share is wrong"),
        ("rate:40%", "share is wrong"),
        ("rate:1.5", "share is wrong"),
        ("rate:nan", "share is wrong"),
        ("cells:-0.1", "share is wrong"),
        ("drop:", "no modality ''"),
        ("drop:t1,lab", "Did you mean 'labs'"),
    ],
)
def test_wrong_scenarios_are_explained(cohort, text, message):
    with pytest.raises(ConfigError, match=message):
        parse_scenario(text, cohort.specs)


def test_cells_need_a_table(cohort):
    with pytest.raises(ConfigError, match="no table"):
        parse_scenario("cells:0.3", cohort.specs[:3])


def test_as_is_changes_nothing(cohort, records):
    scenario = parse_scenario("as-is", cohort.specs)
    assert all(apply(scenario, r, cohort.specs, 0) is r for r in records)


@settings(deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_rate_hides_exactly_its_share_and_never_all(cohort, records, share, seed):
    scenario = parse_scenario(f"rate:{share}", cohort.specs)
    for record in records:
        left = len(apply(scenario, record, cohort.specs, seed).modalities)
        observed = len(record.modalities)
        assert left == observed - min(round(scenario.share * observed), observed - 1)
        assert left >= 1


@settings(deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_cells_hides_exactly_its_share_of_cells(cohort, records, share, seed):
    scenario = parse_scenario(f"cells:{share}", cohort.specs)
    for record in records:
        changed = apply(scenario, record, cohort.specs, seed)
        cells = filled_cells(record)
        assert filled_cells(changed) == cells - round(scenario.share * cells)
        for name, value in changed.modalities.items():
            before = record.modalities[name]
            if value.observed_fields is None:
                assert value is before
            else:
                assert value.observed_fields.any()
                assert not (value.observed_fields & ~before.observed_fields).any()
                assert (value.values[~value.observed_fields] == 0).all()
                kept = value.observed_fields
                assert (value.values[kept] == before.values[kept]).all()
                assert value.source.facts["cells"].startswith(str(int(kept.sum())))


def test_a_patient_with_only_tables_keeps_a_cell(cohort, records):
    record = records[0].without(["t1", "t2", "photo"])
    changed = apply(parse_scenario("cells:1", cohort.specs), record, cohort.specs, 0)
    assert filled_cells(changed) == 1 and len(changed.modalities) == 1
    with_scan = apply(parse_scenario("cells:1", cohort.specs), records[0], cohort.specs, 0)
    assert set(with_scan.modalities) == {"t1", "t2", "photo"}


def test_drop_can_leave_nothing(cohort, records):
    everything = ",".join(s.name for s in cohort.specs)
    changed = apply(parse_scenario(f"drop:{everything}", cohort.specs), records[0], cohort.specs, 0)
    assert changed.modalities == {}
    changed = apply(parse_scenario("drop:t1,labs", cohort.specs), records[0], cohort.specs, 0)
    assert set(changed.modalities) == {"t2", "photo", "demographics"}


@pytest.mark.parametrize("text", ["rate:0.5", "cells:0.5"])
def test_the_choice_depends_on_seed_scenario_and_record_alone(cohort, records, text):
    scenario = parse_scenario(text, cohort.specs)

    def pattern(record, seed):
        changed = apply(scenario, record, cohort.specs, seed)
        return {
            k: None if v.observed_fields is None else tuple(v.observed_fields.tolist())
            for k, v in changed.modalities.items()
        }

    forwards = [pattern(r, 0) for r in records]
    backwards = [pattern(r, 0) for r in reversed(records)][::-1]
    assert forwards == backwards
    assert forwards != [pattern(r, 1) for r in records]
    full = [pattern(r, 0) for r in records if len(r.modalities) == 5]
    assert any(p != full[0] for p in full)  # patients differ


def test_the_record_is_not_changed(cohort, records):
    before = {k: v.values.clone() for k, v in records[0].modalities.items()}
    for text in ("rate:0.5", "cells:0.5", "drop:t1"):
        apply(parse_scenario(text, cohort.specs), records[0], cohort.specs, 0)
    assert all((records[0].modalities[k].values == v).all() for k, v in before.items())
