import dataclasses
import itertools
from math import factorial

import pytest
import torch

from dymo_med.backbones import encode_versions
from dymo_med.inference.answer import answer
from dymo_med.inference.explain import (
    MOST_ERROR,
    Subject,
    cell_ablation,
    exact_shapley,
    explain,
    image_saliency,
    modality_shapley,
)
from dymo_med.inference.predict import predict_batch


def subject_of(bundle, answers, row=0):
    return Subject(
        bundle.backbone,
        answers.batch,
        answers.recovery,
        answers.own,
        row,
        calibration=bundle.calibration,
        base_rates=bundle.base_rates,
    )


def test_shapley_of_a_game_by_all_orders():
    generator = torch.Generator().manual_seed(0)
    worth = torch.rand(2**4, generator=generator, dtype=torch.float64)
    expected = torch.zeros(4, dtype=torch.float64)
    for order in itertools.permutations(range(4)):
        at = 0
        for player in order:
            expected[player] += worth[at | 1 << player] - worth[at]
            at |= 1 << player
    torch.testing.assert_close(exact_shapley(worth, 4), expected / factorial(4))


def test_nobody_plays_for_nothing():
    assert exact_shapley(torch.tensor([0.3]), 0).tolist() == []


def test_values_add_up_to_the_probability_minus_the_base_rate(bundle, records):
    for p in predict_batch(bundle, records[:10]):
        modalities = [a for a in p.attributions if not a.name]
        chosen = max(range(2), key=lambda k: p.probabilities[k])
        total = sum(a.value for a in modalities)
        assert total == pytest.approx(p.probabilities[chosen] - bundle.base_rates[chosen], abs=1e-6)
        assert {a.modality for a in modalities} == set(p.observed) | set(p.trusted)
        assert {a.modality for a in p.attributions if a.name} <= set(p.observed)
        assert {a.method for a in modalities} == {"shapley"}


def test_captum_finds_the_same_values(bundle, records):
    from captum.attr import ShapleyValues

    record = next(r for r in records if len(r.modalities) == len(bundle.specs)).without(["photo"])
    observed_only = bundle.with_selector("observed_only")
    answers = answer(observed_only, [record])
    subject = subject_of(bundle, answers)
    columns = answers.batch.observed.available[0].nonzero().squeeze(1)
    assert len(columns) == 4
    fuse = encode_versions(bundle.backbone, answers.batch)

    def forward(present):
        used = torch.zeros(len(present), len(bundle.specs), dtype=torch.bool)
        used[:, columns] = present > 0.5
        if not used.any():
            return torch.full((len(present),), subject.base_rate)
        output = fuse(torch.zeros(len(present), dtype=torch.int64), used, torch.zeros_like(used))
        return bundle.calibration.probabilities(output.logits)[:, subject.chosen].float()

    expected = ShapleyValues(forward).attribute(torch.ones(1, 4))
    values = [a.value for a in modality_shapley(subject)]
    assert values == pytest.approx(expected[0].tolist(), abs=1e-6)


def test_above_the_limit_orders_are_sampled_and_still_add_up(bundle, records, monkeypatch):
    answers = answer(bundle, records[:1])
    subject = subject_of(bundle, answers)
    exact = modality_shapley(subject)
    monkeypatch.setattr("dymo_med.inference.explain._MOST_EXACT", 2)
    sampled = modality_shapley(subject, seed=3)
    assert {a.method for a in sampled} == {"shapley_sampled"}
    assert sum(a.value for a in sampled) == pytest.approx(sum(a.value for a in exact), abs=1e-6)
    for a, b in zip(exact, sampled, strict=True):
        assert b.value == pytest.approx(a.value, abs=0.05)
    assert modality_shapley(subject, seed=3) == sampled


def test_a_blanked_cell_is_a_cell_that_was_never_filled(bundle, records):
    record = records[0]
    answers = answer(bundle, [record])
    subject = subject_of(bundle, answers)
    filled = {n: f[0].clone() for n, f in answers.batch.observed_fields.items()}
    found = cell_ablation(subject, filled)
    assert not any(a.recovered for a in found)
    values = {a.name: a.value for a in found if a.modality == "labs"}
    assert list(values) == ["ldh", "crp", "blood_group"]
    labs = record.modalities["labs"]
    blank = dataclasses.replace(labs, observed_fields=torch.tensor([False, True, True]))
    without = dataclasses.replace(record, modalities={**record.modalities, "labs": blank})
    observed_only = bundle.with_selector("observed_only")
    (p,) = predict_batch(observed_only, [without], explain=False)
    full = answers.probabilities["observed_only"][0, subject.chosen].item()
    expected = full - p.probabilities[subject.chosen]
    assert values["ldh"] == pytest.approx(expected, abs=1e-6)


def test_blanking_the_only_cell_removes_the_table(bundle, records):
    record = records[0]
    labs = record.modalities["labs"]
    single = dataclasses.replace(labs, observed_fields=torch.tensor([False, True, False]))
    alone = dataclasses.replace(record, modalities={"labs": single})
    observed_only = bundle.with_selector("observed_only")
    answers = answer(observed_only, [alone])
    subject = subject_of(bundle, answers)
    (cell,) = cell_ablation(subject, {"labs": torch.tensor([False, True, False])})
    (whole,) = modality_shapley(subject)
    # Nothing is left, so both are the distance to the base rate.
    assert cell.name == "crp" and cell.value == pytest.approx(whole.value, abs=1e-6)


def test_chunks_change_nothing(bundle, records, monkeypatch):
    answers = answer(bundle, records[:1])
    subject = subject_of(bundle, answers)
    cells = {n: f[0].clone() for n, f in answers.batch.observed_fields.items()}
    whole = (*modality_shapley(subject), *cell_ablation(subject, cells))
    monkeypatch.setattr("dymo_med.inference.explain._MOST_VALUES", 3000)
    parts = (*modality_shapley(subject), *cell_ablation(subject, cells))
    assert [a.value for a in parts] == pytest.approx([a.value for a in whole], abs=1e-6)


def test_small_steps_and_large_steps_of_ablation_agree(bundle, records):
    answers = answer(bundle, records[:1])
    subject = subject_of(bundle, answers)
    cells = {n: f[0].clone() for n, f in answers.batch.observed_fields.items()}
    one = cell_ablation(subject, cells, rows_at_once=1)
    many = cell_ablation(subject, cells)
    assert [a.value for a in one] == pytest.approx([a.value for a in many], abs=1e-6)


def explained(bundle, answers, row=0):
    subject = subject_of(bundle, answers, row)
    fields = answers.batch.observed_fields
    observed = {
        n: fields[n][row].clone() if n in fields else None for n in answers.batch.observed.of(row)
    }
    return subject, explain(subject, observed, seed=0)


def complete(bundle, records):
    return next(
        r
        for r in records
        if len(r.modalities) == len(bundle.specs)
        and all(v.observed_fields is None or v.observed_fields.all() for v in r.modalities.values())
    )


def test_saliency_adds_up_and_keeps_recovered_images_apart(bundle, records):
    record = complete(bundle, records).without(["t2"])
    answers = answer(bundle.with_selector("trust_all"), [record])
    subject, explanation = explained(bundle, answers)
    saliency = explanation.saliency
    assert set(saliency.maps) == {"t1", "photo"} and set(saliency.recovered) == {"t2"}
    assert saliency.maps["t1"].shape == saliency.recovered["t2"].shape == (16, 16, 16)
    assert saliency.maps["photo"].shape == (16, 16)
    assert abs(saliency.convergence) <= MOST_ERROR
    # What the maps of both kinds add up to, from scratch: the images against empty ones.
    present = torch.ones(1, len(subject.names), dtype=torch.bool)
    empty = {
        version: bundle.backbone.encode(version[0], torch.zeros_like(values))
        for version, (values, filled) in subject.versions.items()
        if filled is None
    }
    change = float(subject.probability(present) - subject.probability(present, empty))
    total = sum(float(m.sum()) for m in (*saliency.maps.values(), *saliency.recovered.values()))
    assert total - change == pytest.approx(saliency.convergence, abs=1e-5)


def test_points_are_added_until_the_sum_is_right(bundle, records, monkeypatch):
    answers = answer(bundle, [complete(bundle, records)])
    subject = subject_of(bundle, answers)
    images = tuple(v for v, (_, filled) in subject.versions.items() if filled is None)
    few = image_saliency(subject, images, steps=1, most=1)
    monkeypatch.setattr("dymo_med.inference.explain.MOST_ERROR", abs(few.convergence) / 20)
    more = image_saliency(subject, images, steps=1, most=128)
    assert few.points == 1 < more.points
    assert abs(more.convergence) <= abs(few.convergence) / 20


def test_memory_decides_how_many_points_at_once_and_nothing_else(bundle, records, monkeypatch):
    answers = answer(bundle, [complete(bundle, records)])
    subject = subject_of(bundle, answers)
    images = tuple(v for v, (_, filled) in subject.versions.items() if filled is None)
    sizes = []
    encode = type(bundle.backbone).encode

    def counted(self, name, values, fields=None, descriptors=None):
        sizes.append(len(values))
        return encode(self, name, values, fields, descriptors)

    monkeypatch.setattr(type(bundle.backbone), "encode", counted)
    whole = image_saliency(subject, images)
    assert max(sizes) > 1
    sizes.clear()
    monkeypatch.setattr("dymo_med.inference.explain._MEMORY_BYTES", 1)
    parts = image_saliency(subject, images)
    assert max(sizes[:-2]) <= 2  # the two ends of the path are asked together
    torch.testing.assert_close(parts.maps, whole.maps, atol=1e-6, rtol=1e-3)


def test_recovered_cells_are_explained_apart(bundle, records):
    record = complete(bundle, records)
    labs = record.modalities["labs"]
    partly = dataclasses.replace(labs, observed_fields=torch.tensor([True, False, True]))
    modalities = {**record.modalities, "labs": partly}
    without = dataclasses.replace(record, modalities=modalities).without(["demographics"])
    answers = answer(bundle.with_selector("trust_all"), [without])
    _, explanation = explained(bundle, answers)
    cells = {a.name: a.recovered for a in explanation.attributions if a.name}
    assert cells == {"age": True, "sex": True, "ldh": False, "crp": True, "blood_group": False}
    whole = {a.modality: a.recovered for a in explanation.attributions if not a.name}
    assert whole == {"t1": False, "t2": False, "photo": False, "demographics": True, "labs": False}


@pytest.mark.parametrize("name", ["observed_only", "dymo", "gate", "subset_average", "trust_all"])
def test_nothing_is_attributed_to_what_was_not_used(bundle, records, name):
    asked = bundle.with_selector(name)
    part = records[:8]
    answers = answer(asked, part)
    for row, record in enumerate(part):
        (p,) = predict_batch(asked, [record])
        used = set(p.observed) | set(p.trusted)
        if p.subsets:
            used |= {n for s in p.subsets for n in s.admitted}
        assert {a.modality for a in p.attributions} <= used
        _, explanation = explained(asked, answers, row)
        if explanation.saliency is not None:
            assert set(explanation.saliency.maps) <= set(p.observed)
            assert set(explanation.saliency.recovered) <= used - set(p.observed)


@pytest.mark.parametrize("name", ["dymo", "subset_average"])
def test_shapley_values_agree_with_brute_force(bundle, records, name):
    """All orders in which modalities join, each subset asked of the network from scratch."""
    record = complete(bundle, records).without(["t2", "demographics"])
    asked = bundle.with_selector(name)
    answers = answer(asked, [record])
    subject = subject_of(asked, answers)
    trace = answers.own
    subsets, weight = trace.admitted[:1], torch.ones(1, dtype=torch.float64)
    if trace.mixture is not None:
        subsets, weight = trace.mixture.admitted, trace.mixture.weight
    places = [trace.names.index(n) for n in subject.names]

    def worth(team):
        kept = torch.zeros(len(trace.names), dtype=torch.bool)
        kept[[places[i] for i in team]] = True
        total = 0.0
        for admitted, w in zip(subsets, weight.tolist(), strict=True):
            used = (trace.observed[0] | admitted) & kept
            if not used.any():
                total += w * subject.base_rate
                continue
            logits = answers.fuse(torch.zeros(1, dtype=torch.int64), used[None], admitted[None])
            p = asked.calibration.probabilities(logits.logits)
            total += w * float(p[0, subject.chosen])
        return total

    u = len(subject.names)
    known = {s: worth(s) for r in range(u + 1) for s in itertools.combinations(range(u), r)}
    expected = [0.0] * u
    for order in itertools.permutations(range(u)):
        for at, player in enumerate(order):
            before, after = tuple(sorted(order[:at])), tuple(sorted(order[: at + 1]))
            expected[player] += (known[after] - known[before]) / factorial(u)
    values = [a.value for a in modality_shapley(subject)]
    assert values == pytest.approx(expected, abs=1e-6)
    share = answers.probabilities[name][0, subject.chosen].item() - subject.base_rate
    assert sum(values) == pytest.approx(share, abs=1e-6)


def test_a_background_voxel_has_no_saliency(bundle, records):
    answers = answer(bundle, records[:1])
    saliency = image_saliency(subject_of(bundle, answers), (("t1", False),))
    background = records[0].modalities["t1"].values[0] == 0
    assert background.any()
    assert saliency.maps["t1"][background].abs().max() == 0


def test_explanations_leave_no_gradients_behind(bundle, records):
    predict_batch(bundle, records[:2])
    assert all(p.grad is None for p in bundle.backbone.parameters())


def test_rejected_modalities_change_nothing(bundle, records):
    """Noise in what was not used moves no attribution."""
    observed_only = bundle.with_selector("observed_only")
    record = next(r for r in records if len(r.modalities) == len(bundle.specs)).without(["t2"])
    answers = answer(observed_only, [record])
    noisy = dataclasses.replace(
        answers.recovery,
        values={**answers.recovery.values, "t2": torch.randn(1, 1, 16, 16, 16) * 100},
    )
    other = dataclasses.replace(answers, recovery=noisy)
    assert modality_shapley(subject_of(bundle, answers)) == modality_shapley(
        subject_of(bundle, other)
    )
