from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dymo_med.data import missingness
from dymo_med.data.missingness import (
    HIDDEN_COLUMNS,
    apply,
    expanded,
    hidden,
    hidden_share,
    parse_scenario,
    planned,
)
from dymo_med.errors import ConfigError
from dymo_med.files import write_csv
from dymo_med.modalities import modality
from dymo_med.types import Column, ModalitySpec, ModalityValue, PatientRecord, Source

CELLWISE = ("mcar", "mar", "mnar")


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
        ("columns:.50", "columns:0.5"),
        ("mcar:0.3", "mcar:0.3"),
        ("mean-rate:.10", "mean-rate:0.1"),
        ("batch-rate:0.7", "batch-rate:0.7"),
        ("keep: labs + t1", "keep:t1+labs"),
        ("keep:labs,t1", "keep:t1+labs"),
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
        ("columns", "share is wrong"),
        ("mnar:2", "share is wrong"),
        ("colums:0.3", "Did you mean 'columns'"),
        ("columns-most:0.3", "holds no importances of table columns.*Train it again"),
        ("columns-least:0.3", "holds no importances"),
        ("mar:0.3", "neither percentiles nor frequencies"),
        ("mnar:0.3", "neither percentiles nor frequencies"),
        ("replay:", "no file is named"),
        ("replay:#rate:0.4", "no file is named"),
        ("replay:absent.csv", "absent.csv cannot be read. Expected a CSV file"),
        ("replay:absent.csv#rate:0.4", "absent.csv cannot be read"),
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


@pytest.mark.parametrize("text", ["rate:0.5", "cells:0.5", "mcar:0.5"])
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
    for text in ("rate:0.5", "cells:0.5", "drop:t1", "columns:0.5", "mcar:0.5"):
        apply(parse_scenario(text, cohort.specs), records[0], cohort.specs, 0)
    assert all((records[0].modalities[k].values == v).all() for k, v in before.items())


# --- Columns and mechanisms, on tables whose training patients are known --------------------------


def draw(rng, n):
    """Values of two tables: skewed, categorical, with ties, and depending on each other."""
    x = rng.lognormal(size=n)
    first = np.stack([x, rng.choice(3, n, p=[0.6, 0.3, 0.1]), x + rng.normal(size=n)], 1)
    second = np.stack([rng.integers(40, 60, n), rng.normal(size=n), rng.choice(2, n)], 1)
    return {"a": torch.from_numpy(first).float(), "b": torch.from_numpy(second).float()}


@pytest.fixture(scope="module")
def fitted():
    number, category = ("continuous", {}), ("categorical", {"values": ("p", "q", "r")})
    kinds = {"a": (number, category, number), "b": (number, number, category)}
    importance = iter([0.1, 0.3, 0.05, 0.25, 0.1, 0.2])
    values = draw(np.random.default_rng(0), 2000)
    specs = [ModalitySpec("scan", "image", "s.png", (1, 2, 2), intensity="none")]
    for name, columns in kinds.items():
        spec = ModalitySpec(
            name,
            "table",
            "t.csv",
            (3,),
            columns=tuple(Column(f"{name}{i}", t, **o) for i, (t, o) in enumerate(columns)),
        )
        spec = modality(spec).fit(values[name], None)
        specs.append(
            replace(
                spec, columns=tuple(replace(c, importance=next(importance)) for c in spec.columns)
            )
        )
    return tuple(specs)


def table(cells, filled=None):
    filled = torch.ones(3, dtype=torch.bool) if filled is None else torch.tensor(filled)
    return ModalityValue(
        torch.as_tensor(cells).float().where(filled, torch.zeros(())), Source("t.csv", ""), filled
    )


def patients(n, seed=1, scan=True):
    values = draw(np.random.default_rng(seed), n)
    image = {"scan": ModalityValue(torch.zeros(1, 2, 2), Source("s.png", ""))} if scan else {}
    return [
        PatientRecord(f"r{i}", f"p{i}", {**image, **{k: table(v[i]) for k, v in values.items()}})
        for i in range(n)
    ]


def lost(record, changed, specs):
    """Names of the columns that were taken, whole tables spelt out."""
    names = set()
    for row in hidden(record, changed, specs, "x"):
        spec = next(s for s in specs if s.name == row["modality"])
        names |= {row["column"]} if row["column"] else {c.name for c in spec.columns}
    return names


@settings(deadline=None, max_examples=30)
@given(share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_columns_are_the_same_for_everyone(fitted, share, seed):
    scenario = parse_scenario(f"columns:{share}", fitted)
    taken = {
        frozenset(lost(r, apply(scenario, r, fitted, seed), fitted)) for r in patients(5, seed)
    }
    assert len(taken) == 1 and len(taken.pop()) == round(scenario.share * 6)


def test_columns_differ_between_seeds(fitted):
    (record,) = patients(1)
    scenario = parse_scenario("columns:0.5", fitted)
    found = {frozenset(lost(record, apply(scenario, record, fitted, s), fitted)) for s in range(40)}
    assert len(found) > 5


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("columns-most:0.5", {"a1", "b0", "b2"}),
        ("columns-least:0.5", {"a0", "a2", "b1"}),
        ("columns-most:1", {"a0", "a1", "a2", "b0", "b1", "b2"}),
        ("columns-least:0", set()),
    ],
)
def test_most_and_least_informative_columns(fitted, text, names):
    scenario = parse_scenario(text, fitted)
    for record in patients(3):
        assert lost(record, apply(scenario, record, fitted, 5), fitted) == names


def test_one_unfitted_importance_is_enough_to_refuse(fitted):
    columns = (replace(fitted[1].columns[0], importance=None), *fitted[1].columns[1:])
    with pytest.raises(ConfigError, match="holds no importances"):
        parse_scenario("columns-most:0.5", (replace(fitted[1], columns=columns), fitted[2]))


def test_mar_needs_another_column(fitted):
    alone = replace(fitted[1], columns=fitted[1].columns[:1])
    with pytest.raises(ConfigError, match="no other column"):
        parse_scenario("mar:0.5", (alone,))


@pytest.mark.parametrize("kind", ["cells", "columns", "columns-most", "columns-least", *CELLWISE])
def test_a_record_of_tables_alone_never_loses_everything(fitted, kind):
    scenario = parse_scenario(f"{kind}:1", fitted)
    for seed in range(5):
        for record in patients(5, seed, scan=False):
            changed = apply(scenario, record, fitted, seed)
            assert filled_cells(changed) == 1 or kind == "mar"
            assert len(changed.modalities) >= 1


@settings(deadline=None, max_examples=20)
@given(rate=st.floats(0, 1))
def test_the_mean_probability_over_ranks_is_the_rate(rate):
    edges = np.linspace(0, 1, 201)
    parts = [missingness._probability(rate, (a, b)) for a, b in pairwise(edges)]
    assert np.mean(parts) == pytest.approx(rate, abs=1e-9)
    points = [missingness._probability(rate, (r, r)) for r in (edges[1:] + edges[:-1]) / 2]
    assert np.mean(points) == pytest.approx(rate, abs=1e-3)
    assert (np.diff(points) >= 0).all()
    if 1e-3 < rate < 0.999:
        odds = np.log(points) - np.log1p(-np.array(points))
        assert odds[-1] - odds[0] == pytest.approx(6 * 0.995, abs=1e-6)
    assert missingness._probability(rate, None) == rate


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.7])
def test_the_rate_holds_in_training_patients_for_every_column(fitted, rate):
    values = draw(np.random.default_rng(0), 2000)
    for spec in fitted[1:]:
        for i, column in enumerate(spec.columns):
            found = [
                missingness._probability(rate, missingness._ranks(v, column))
                for v in values[spec.name][:, i].tolist()
            ]
            assert np.mean(found) == pytest.approx(rate, abs=0.006), column.name


@pytest.mark.parametrize("kind", CELLWISE)
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.6, 1.0])
def test_the_expected_share_is_blanked(fitted, kind, rate):
    scenario = parse_scenario(f"{kind}:{rate}", fitted)
    taken = [lost(r, apply(scenario, r, fitted, 3), fitted) for r in patients(1000)]
    kept = [n for n in ("a0", "a1", "a2", "b0", "b1", "b2") if not any(n in t for t in taken)]
    assert len(kept) == (6 if rate == 0 else 1 if kind == "mar" else 0)
    share = np.mean([len(t) / (6 - len(kept)) for t in taken]) if rate else 0.0
    # Cells of a record go together in `mar`: its sampling error is that of whole records.
    assert share == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / 1000))


def with_cell(record, name, index, value):
    cells = record.modalities[name].values.clone()
    cells[index] = value
    return replace(record, modalities={**record.modalities, name: table(cells)})


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 30), other=st.integers(31, 60), value=st.floats(-3, 3))
def test_mar_depends_on_the_driver_and_on_nothing_else(fitted, seed, other, value):
    scenario = parse_scenario("mar:0.5", fitted)
    drivers = missingness._drivers(missingness._columns(fitted), seed, scenario.text)
    (driver,) = set(drivers.values())
    (record,), (stranger,) = patients(1, seed), patients(1, other)
    key, index = driver
    same = with_cell(stranger, key, index, float(record.modalities[key].values[index]))
    taken = lost(record, apply(scenario, record, fitted, seed), fitted)
    assert taken == lost(same, apply(scenario, same, fitted, seed), fitted)
    assert f"{key}{index}" not in taken
    if fitted[1 if key == "a" else 2].columns[index].type == "continuous":
        before = with_cell(record, key, index, value)
        after = with_cell(record, key, index, value + 1)
        assert lost(before, apply(scenario, before, fitted, seed), fitted) <= lost(
            after, apply(scenario, after, fitted, seed), fitted
        )


def test_mar_follows_the_driver(fitted):
    scenario = parse_scenario("mar:0.5", fitted)
    seed = next(
        s
        for s in range(100)
        if set(missingness._drivers(missingness._columns(fitted), s, "mar:0.5").values())
        == {("b", 1)}
    )
    low, high = [], []
    for record in patients(400):
        number = len(lost(record, apply(scenario, record, fitted, seed), fitted)) / 5
        (low if record.modalities["b"].values[1] < 0 else high).append(number)
    assert np.mean(low) < 0.3 < 0.7 < np.mean(high)


def test_without_its_driver_a_cell_goes_at_random(fitted):
    scenario = parse_scenario("mar:0.3", fitted)
    drivers = missingness._drivers(missingness._columns(fitted), 0, scenario.text)
    (key, index) = next(iter(drivers.values()))
    filled = [i != index for i in range(3)]
    shares = []
    for record in patients(600):
        record = replace(
            record,
            modalities={**record.modalities, key: table(record.modalities[key].values, filled)},
        )
        shares.append(len(lost(record, apply(scenario, record, fitted, 0), fitted)) / 5)
    # Draws of a record's cells are independent now.
    assert np.mean(shares) == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / 3000))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    cell=st.sampled_from([("a", 0), ("a", 2), ("b", 0), ("b", 1)]),
    value=st.floats(-3, 60),
)
def test_mnar_depends_on_the_cell_itself_and_on_nothing_else(fitted, seed, cell, value):
    scenario = parse_scenario("mnar:0.4", fitted)
    name, index = cell
    (record,), own = patients(1, seed), f"{name}{index}"
    before = with_cell(record, name, index, value)
    after = with_cell(record, name, index, value + 1)
    first = lost(before, apply(scenario, before, fitted, seed), fitted)
    second = lost(after, apply(scenario, after, fitted, seed), fitted)
    assert first - {own} == second - {own}
    assert (own in first) <= (own in second)


def test_mnar_takes_high_values_and_late_categories(fitted):
    scenario = parse_scenario("mnar:0.5", fitted)
    records = patients(600)
    for name, spec in (("a", fitted[1]), ("b", fitted[2])):
        for index, column in enumerate(spec.columns):
            values = np.array([float(r.modalities[name].values[index]) for r in records])
            gone = np.array(
                [column.name in lost(r, apply(scenario, r, fitted, 0), fitted) for r in records]
            )
            assert values[gone].mean() > values[~gone].mean(), column.name


@pytest.mark.parametrize("kind", ["columns", *CELLWISE])
def test_order_and_company_do_not_matter(fitted, kind):
    scenario = parse_scenario(f"{kind}:0.5", fitted)
    records = patients(30)

    def taken(some, seed=0):
        return {r.record_id: lost(r, apply(scenario, r, fitted, seed), fitted) for r in some}

    whole = taken(records)
    assert taken(reversed(records)) == whole
    assert taken(records[::3]) == {k: v for k, v in whole.items() if int(k[1:]) % 3 == 0}
    assert taken(records, seed=1) != whole


# --- Replay ---------------------------------------------------------------------------------------


def same_record(a, b):
    return list(a.modalities) == list(b.modalities) and all(
        torch.equal(v.values, b.modalities[k].values)
        and v.source == b.modalities[k].source
        and (v.observed_fields is None) == (b.modalities[k].observed_fields is None)
        and (
            v.observed_fields is None
            or torch.equal(v.observed_fields, b.modalities[k].observed_fields)
        )
        for k, v in a.modalities.items()
    )


TEXTS = ("rate:0.6", "drop:scan,b", "cells:0.5", "columns:0.5", "columns-most:0.5", "mar:0.5")


@settings(deadline=None, max_examples=20)
@given(text=st.sampled_from([*TEXTS, "mcar:0.8", "mnar:0.9"]), seed=st.integers(0, 99))
def test_a_replay_takes_the_same_bit_for_bit(fitted, tmp_path_factory, text, seed):
    records = patients(12, seed)
    scenario = parse_scenario(text, fitted)
    changed = [apply(scenario, r, fitted, seed) for r in records]
    rows = [
        row for r, c in zip(records, changed, strict=True) for row in hidden(r, c, fitted, scenario)
    ]
    file = tmp_path_factory.mktemp("replay") / "taken #1.csv"
    write_csv(file, HIDDEN_COLUMNS, rows)
    again = parse_scenario(f"replay:{file}", fitted)
    assert str(again) == f"replay:{text}" and again.kind == "replay"
    for record, expected in zip(records, changed, strict=True):
        # Another seed: the file alone says what goes.
        assert same_record(apply(again, record, fitted, seed + 1), expected)
    write_csv(file, HIDDEN_COLUMNS, [{**row, "scenario": again.text} for row in rows])
    assert parse_scenario(f"replay:{file}", fitted) == again


def write_rows(file, *rows, header="scenario,record_id,modality,column"):
    file.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return file


def test_a_record_whose_name_looks_like_a_formula_is_replayed(fitted, tmp_path):
    row = {"scenario": "cells:0.5", "record_id": "=1+1", "modality": "b", "column": ""}
    write_csv(tmp_path / "h.csv", HIDDEN_COLUMNS, [row])
    assert ",'=1+1," in (tmp_path / "h.csv").read_text()
    assert list(parse_scenario(f"replay:{tmp_path / 'h.csv'}", fitted).taken) == ["=1+1"]


def test_one_of_several_scenarios_is_chosen(fitted, tmp_path):
    file = write_rows(tmp_path / "h.csv", "rate:0.4,r0,b,", "mcar:0.3,r0,a,a1", "mcar:0.3,r1,a,a0")
    records = patients(3)
    scenario = parse_scenario(f" replay: {file}#mcar:0.3", fitted)
    assert str(scenario) == "replay:mcar:0.3"
    taken = [lost(r, apply(scenario, r, fitted, 0), fitted) for r in records]
    assert taken == [{"a1"}, {"a0"}, set()]
    assert apply(scenario, records[2], fitted, 0) is records[2]
    with pytest.raises(ConfigError, match=r"no scenario is chosen. Expected one of rate:0.4, mcar"):
        parse_scenario(f"replay:{file}", fitted)
    with pytest.raises(ConfigError, match=r"no scenario 'mcar:0.2'.*#SCENARIO"):
        parse_scenario(f"replay:{file}#mcar:0.2", fitted)


def test_two_files_of_one_scenario_are_two_replays(fitted, tmp_path):
    first = write_rows(tmp_path / "1.csv", "mcar:0.3,r0,a,a1")
    second = write_rows(tmp_path / "2.csv", "mcar:0.3,r0,a,a0")
    one, two = (parse_scenario(f"replay:{f}", fitted) for f in (first, second))
    assert one.text == two.text and one != two and hash(one) != hash(two)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["mcar:0.3,r0,c,"], "no modality 'c'"),
        (["mcar:0.3,r0,a,a11"], "modality 'a' has no column 'a11'.*Did you mean 'a1'"),
        (["mcar:0.3,r0,scan,x"], "modality 'scan' has no column 'x'.*Leave the column blank"),
        (["mcar:0.3,r0,a"], "line 2, has another number of cells. Expected 4. Got 3"),
        ([], "no scenario is chosen. Expected at least one row"),
        (['mcar:0.3,r0,a,"a1'], "cannot be read"),
    ],
)
def test_wrong_files_are_explained(fitted, tmp_path, rows, message):
    file = write_rows(tmp_path / "h.csv", *rows)
    with pytest.raises(ConfigError, match=message):
        parse_scenario(f"replay:{file}", fitted)


def test_another_header_is_refused(fitted, tmp_path):
    file = write_rows(tmp_path / "h.csv", header="record,modality")
    with pytest.raises(ConfigError, match=r"header of h.csv is wrong. Expected scenario,record_id"):
        parse_scenario(f"replay:{file}", fitted)
    # Order and spreadsheets' byte order mark do not matter.
    file.write_text("modality,column,record_id,scenario\nb,,r0,rate:0.4\n", encoding="utf-8-sig")
    assert parse_scenario(f"replay:{file}", fitted).text == "replay:rate:0.4"


# --- Rates of modalities --------------------------------------------------------------------------

WAYS = tuple(ModalitySpec(n, "tokens", f"{n}.npy", (2, 2)) for n in ("text", "audio", "vision"))


def speakers(count, without=()):
    value = ModalityValue(torch.zeros(2, 2), Source("x", "0"))
    there = {s.name: value for s in WAYS if s.name not in without}
    return [PatientRecord(f"u{i:03d}", f"u{i:03d}", there) for i in range(count)]


def left(scenario, records, seed=3):
    ready = planned(scenario, [r.record_id for r in records], WAYS, seed)
    return [tuple(apply(ready, r, WAYS, seed).modalities) for r in records]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.6, 0.7, 1.0])
def test_mean_rate_is_right_on_average_and_leaves_one(share):
    found = left(parse_scenario(f"mean-rate:{share}", WAYS), speakers(3000))
    counts = np.array([len(names) for names in found])
    assert counts.min() >= 1
    assert 1 - counts.mean() / 3 == pytest.approx(min(share, 2 / 3), abs=0.01)
    assert counts.max() - counts.min() <= 1
    # Every modality is hidden as often as the others.
    kept = [sum(s.name in names for names in found) / 3000 for s in WAYS]
    assert max(kept) - min(kept) < 0.05


def test_mean_rate_does_not_depend_on_the_other_records():
    scenario = parse_scenario("mean-rate:0.4", WAYS)
    whole = left(scenario, speakers(40))
    assert left(scenario, speakers(40)[17:18]) == whole[17:18]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_batch_rate_comes_near_in_every_batch(share):
    found = left(parse_scenario(f"batch-rate:{share}", WAYS), speakers(300))
    for start in (0, 128):
        counts = [len(names) for names in found[start : start + 128]]
        assert min(counts) >= 1
        assert sum(counts) / (3 * 128) == pytest.approx(1 - share, abs=0.0051)
    assert len(set(found)) == 7


def test_batch_rate_cannot_hide_more_than_all_but_one():
    found = left(parse_scenario("batch-rate:0.7", WAYS), speakers(300))
    assert {len(names) for names in found} == {1}
    assert min(found.count((s.name,)) for s in WAYS) > 70
    scenario = parse_scenario("batch-rate:0.7", WAYS)
    assert hidden_share(scenario, 3) == pytest.approx(2 / 3)


def test_batch_rate_depends_on_the_batch_and_is_repeated_by_replay(tmp_path):
    scenario, records = parse_scenario("batch-rate:0.4", WAYS), speakers(60)
    found = left(scenario, records)
    assert found == left(scenario, records) != left(scenario, records, seed=4)
    assert left(scenario, records[:30]) != found[:30]
    ready = planned(scenario, [r.record_id for r in records], WAYS, 3)
    rows = [row for r in records for row in hidden(r, apply(ready, r, WAYS, 3), WAYS, ready)]
    write_csv(tmp_path / "h.csv", HIDDEN_COLUMNS, rows)
    again = parse_scenario(f"replay:{tmp_path / 'h.csv'}", WAYS)
    assert [tuple(apply(again, r, WAYS, 9).modalities) for r in records] == found


def test_batch_rate_leaves_something_of_incomplete_records():
    scenario, records = parse_scenario("batch-rate:0.7", WAYS), speakers(90, without=("text",))
    assert set(left(scenario, records)) == {("audio",), ("vision",)}


def test_patterns_are_kept_for_everyone():
    assert expanded(["as-is", " keep: * "], WAYS) == [
        *("as-is", "keep:text", "keep:audio", "keep:vision"),
        *("keep:text+audio", "keep:text+vision", "keep:audio+vision"),
    ]
    scenario = parse_scenario("keep:vision+text", WAYS)
    assert set(left(scenario, speakers(5))) == {("text", "vision")}
    assert left(parse_scenario("keep:text", WAYS), speakers(2, without=("text",))) == [(), ()]
    with pytest.raises(ConfigError, match="no modality 'smell'"):
        parse_scenario("keep:text+smell", WAYS)
    many = [replace(WAYS[0], name=f"m{i}") for i in range(7)]
    with pytest.raises(ConfigError, match="too many patterns"):
        expanded(["keep:*"], many)
