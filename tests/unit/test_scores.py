"""Tables made of what was collected, without a model."""

import numpy as np
import pytest

from dymo_med.inference.scores import Collector, by_pattern, by_subgroup, metrics, parts
from dymo_med.metrics import holm

METHODS = ("observed_only", "trust_all", "gate", "oracle")


def batch(first, count, scenario="s", classes=("no", "yes+"), sets=True):
    """Rows and facts of some records, as a progress file has them."""
    rows, facts = [], {}
    for i in range(first, first + count):
        rng = np.random.default_rng(i)
        label = int(rng.integers(len(classes)))
        facts[f"r{i}"] = {
            "points_to": {"b": int(rng.integers(len(classes)))} if i % 2 else {},
            "set": [0, label] if sets else [],
            "calibrated_on": 40 if sets else 0,
            "subgroups": {"site": ("north", "unknown")[i % 2]},
        }
        for method in METHODS:
            logits = rng.normal(size=len(classes)) + 1.5 * np.eye(len(classes))[label]
            p = np.exp(logits) / np.exp(logits).sum()
            rows.append(
                {
                    "scenario": scenario,
                    "record_id": f"r{i}",
                    "patient_id": f"p{i // 2}",
                    "label": classes[label],
                    "method": method,
                    **{f"prob_{c}": float(x) for c, x in zip(classes, p, strict=True)},
                    "trusted": "b" if i % 4 == 1 and method == "gate" else "",
                    "rejected": "b" if i % 4 == 3 and method == "gate" else "",
                    "pattern": "a~" if i % 2 else "a+b",
                }
            )
    return rows, facts


def collected(*batches, scenario="s", classes=("no", "yes+")):
    collector = Collector(scenario, classes, ("a", "b"), "gate")
    for rows, facts in batches:
        collector.add(rows, facts)
    return collector.scores()


def test_pieces_add_up_to_the_whole():
    whole = collected(batch(0, 30))
    pieces = collected(batch(0, 7), ([], {}), batch(7, 23))
    assert whole.record_ids == pieces.record_ids and whole.patterns == pieces.patterns
    assert whole.subgroups == pieces.subgroups
    for name in ("labels", "candidates", "admitted", "points_to", "sets", "calibrated_on"):
        assert np.array_equal(getattr(whole, name), getattr(pieces, name)), name
    for method in METHODS:
        assert np.array_equal(whole.probabilities[method], pieces.probabilities[method])
    assert str(metrics([whole], 0, 0)) == str(metrics([pieces], 0, 0))


def test_what_is_collected_is_what_the_rows_say():
    scores = collected(batch(0, 8))
    assert set(scores.patterns) == {"a+b", "a"}  # completed or not, the table was observed
    assert scores.candidates[:, 0].sum() == 0
    assert scores.candidates[:, 1].tolist() == [i % 2 == 1 for i in range(8)]
    assert scores.admitted[:, 1].tolist() == [i % 4 == 1 for i in range(8)]
    assert ((scores.points_to[:, 1] >= 0) == scores.candidates[:, 1]).all()
    assert scores.sets is not None and scores.sets[:, 0].all()
    assert scores.sets[np.arange(8), scores.labels].all()
    assert scores.patients == 4 and len(scores) == 8
    assert len({id(p) for p in collected(batch(0, 8)).patterns}) == 2  # one copy of a text


def test_nothing_collected_gives_no_rows():
    empty = collected()
    assert len(empty) == 0 and empty.sets is None
    assert metrics([empty], 0, 0) == []
    assert list(by_pattern([empty], 0)) == list(by_subgroup([empty], 0)) == []


def test_without_calibration_there_are_no_sets():
    scores = collected(batch(0, 24, sets=False))
    assert scores.sets is None
    rows = [*metrics([scores], 0, 0), *by_pattern([scores], 0)]
    assert not [r for r in rows if r["metric"].startswith("set_")]


def test_p_values_of_a_metric_are_one_family_over_scenarios():
    some = [collected(batch(s, 40), scenario=f"s{s}") for s in (0, 100)]
    rows = metrics(some, 3, 0)
    assert {r["seen_in_training"] for r in rows} == {3}
    for metric in ("auroc", "auroc_delong", "brier"):
        family = [r for r in rows if r["metric"] == metric and r["p"] is not None]
        assert len(family) == 2 * 2  # of two scenarios two others; the oracle is none
        adjusted = pytest.approx(holm([r["p"] for r in family]))
        assert [r["p_holm"] for r in family] == adjusted
    assert {r["p_holm"] for r in rows if r["p"] is None} == {None}


def test_delong_is_of_two_classes_only():
    three = ("a", "b", "c")
    rows = metrics([collected(batch(0, 40, classes=three), classes=three)], 0, 0)
    assert not [r for r in rows if r["metric"] == "auroc_delong"]
    assert [r for r in rows if r["method"] == "gate - trust_all" and r["metric"] == "auroc"]


@pytest.mark.parametrize(("count", "intervals"), [(38, True), (34, False)])
def test_fewer_than_ten_patients_get_no_interval(count, intervals):
    # Patients have two records each, of different patterns: half the records are of each.
    scores = collected(batch(0, count // 2))
    assert (scores.patients >= 10) == intervals
    for table in (by_pattern([scores], 0), by_subgroup([scores], 0)):
        first = next(iter(table))
        assert np.isfinite(first["value"]) and np.isfinite(first["low"]) == (
            first["patients"] >= 10
        )
    assert {r["patients"] >= 10 for r in by_pattern([scores], 0)} == {True, False} or not intervals


def test_parts_come_commonest_first():
    scores = collected(batch(0, 9))
    found = [(name, len(part)) for name, part in parts(scores, scores.patterns)]
    assert found == [("a+b", 5), ("a", 4)]
    on = {r["calibrated_on"] for r in by_pattern([scores], 0) if r["metric"] == "set_size"}
    assert on == {40}


def test_methods_that_answer_alike_do_not_differ():
    """A resample in which two methods agree counts for both sides, whatever rounding says."""
    rows, facts = batch(0, 12)
    by_record = {r["record_id"]: r for r in rows if r["method"] == "gate"}
    for row in rows:
        for column in ("prob_no", "prob_yes+"):
            row[column] = by_record[row["record_id"]][column]
    for row in metrics([collected((rows, facts))], 0, 0):
        if " - " in row["method"] and row["p"] is not None and np.isfinite(row["p"]):
            assert row["p"] == 1.0 and row["value"] == pytest.approx(0.0, abs=1e-12)
