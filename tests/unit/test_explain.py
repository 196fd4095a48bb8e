import dataclasses
import itertools
from math import factorial

import pytest
import torch

from dymo_med.backbones import encode_versions
from dymo_med.inference.explain import (
    Subject,
    cell_ablation,
    exact_shapley,
    explain,
    image_saliency,
    modality_shapley,
)
from dymo_med.inference.predict import answer, predict_batch


def subject_of(bundle, answers, row=0):
    return Subject(
        bundle.backbone,
        answers.batch,
        answers.recovery,
        answers.own,
        row,
        temperature=bundle.temperature,
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
        return torch.softmax(output.logits / bundle.temperature, 1)[:, subject.chosen]

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
    filled = answers.batch.observed_fields["labs"][0].clone()
    values = {a.name: a.value for a in cell_ablation(subject, {"labs": filled})}
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


def test_saliency_is_complete_and_of_observed_images_only(bundle, records):
    record = next(r for r in records if len(r.modalities) == len(bundle.specs)).without(["t2"])
    trust_all = bundle.with_selector("trust_all")
    answers = answer(trust_all, [record])
    subject = subject_of(bundle, answers)
    observed = {
        n: answers.batch.observed_fields[n][0] if n in answers.batch.observed_fields else None
        for n in answers.batch.observed.of(0)
    }
    explanation = explain(subject, observed, seed=0)
    assert set(explanation.saliency.maps) == {"t1", "photo"}
    assert explanation.saliency.maps["t1"].shape == (16, 16, 16)
    assert explanation.saliency.maps["photo"].shape == (16, 16)
    fine = image_saliency(subject, ("t1", "photo"), steps=64)
    assert abs(fine.convergence) < 5e-3
    assert "t2" in {a.modality for a in explanation.attributions}


def test_a_background_voxel_has_no_saliency(bundle, records):
    answers = answer(bundle, records[:1])
    saliency = image_saliency(subject_of(bundle, answers), ("t1",))
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
