"""TIP: its losses against closed forms, what may see what, and that it learns tables from scans."""

import math

import pytest
import torch
from torch.nn import functional as F

from dymo_med.errors import ConfigError
from dymo_med.imputers import require_recovery
from dymo_med.imputers.tip import (
    TIP,
    choose_cells,
    contrastive_loss,
    hard_negatives,
    other_patients_cells,
)
from dymo_med.types import Batch, Column, ModalityMask, ModalitySpec

SPECS = (
    ModalitySpec("scan", "image", "s.png", (1, 12, 12), (), "zscore"),
    ModalitySpec(
        "labs",
        "table",
        "t.csv",
        (2,),
        columns=(
            Column("size", "continuous", "mm", mean=2.5, std=0.87),
            Column("large", "categorical", values=("no", "yes"), frequencies=(0.25, 0.75)),
        ),
    ),
    ModalitySpec(
        "place",
        "table",
        "p.csv",
        (1,),
        columns=(
            Column("third", "categorical", values=("a", "b", "c"), frequencies=(0.2, 0.5, 0.3)),
        ),
    ),
)
NAMES = tuple(s.name for s in SPECS)
SMALL = {"dim": 16, "heads": 2, "table_layers": 1, "layers": 1, "projection": 8, "width": 8}


def cohort(n, seed=0, *, patients=None):
    """A spot in a scan; the tables hold its size, whether it is large, and where it is."""
    g = torch.Generator().manual_seed(seed)
    size = 1 + 3 * torch.rand(n, generator=g)
    centre = 1 + 10 * torch.rand(2, n, 1, generator=g)
    axis = torch.arange(12.0)
    squared = ((axis - centre[0]) ** 2)[:, :, None] + ((axis - centre[1]) ** 2)[:, None]
    scan = (-squared / (2 * size[:, None, None] ** 2)).exp().unsqueeze(1)
    scan += 0.05 * torch.randn(n, 1, 12, 12, generator=g)
    values = {
        "scan": scan,
        "labs": torch.stack([size, (size > 2).float()], 1),
        "place": (centre[0] / 4).floor(),
    }
    ids = tuple(map(str, range(n)))
    available = torch.ones(n, 3, dtype=torch.bool)
    fields = {name: torch.ones(values[name].shape, dtype=torch.bool) for name in NAMES[1:]}
    labels = torch.zeros(n, dtype=torch.long)
    return Batch(ids, patients or ids, values, ModalityMask(NAMES, available), fields, labels)


def take_away(batch, *names):
    for name in names:
        batch.observed.available[:, NAMES.index(name)] = False
        batch.values[name].fill_(float("nan") if name == "scan" else 99.0)
        if name in batch.observed_fields:
            batch.observed_fields[name].fill_(False)
    return batch


def build(**options):
    torch.manual_seed(0)
    return TIP(SPECS, TIP.Options(**{**SMALL, **options}))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_contrastive_loss_of_two_pairs():
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    tables = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # Similarities: image 0 has 1 and 0.6; image 1 has 0 and 0.8; temperature 0.5 doubles them.
    image_0 = math.log(1 + math.exp(1.2 - 2))
    image_1 = math.log(1 + math.exp(0 - 1.6))
    table_0 = math.log(1 + math.exp(0 - 2))
    table_1 = math.log(1 + math.exp(1.2 - 1.6))
    expected = torch.tensor([(image_0 + table_0) / 2, (image_1 + table_1) / 2])
    strangers = ~torch.eye(2, dtype=torch.bool)
    torch.testing.assert_close(contrastive_loss(images, tables, strangers, 0.5), expected)


def test_another_visit_of_the_patient_is_no_wrong_partner():
    torch.manual_seed(0)
    images, tables = F.normalize(torch.randn(2, 3, 4), dim=2)
    patient = torch.tensor([0, 0, 1])
    strangers = patient[:, None] != patient
    loss = contrastive_loss(images, tables, strangers, 0.1)
    pair = ~torch.eye(2, dtype=torch.bool)
    first = contrastive_loss(images[[0, 2]], tables[[0, 2]], pair, 0.1)
    assert loss[0] == pytest.approx(float(first[0]))
    drawn = torch.stack(
        [hard_negatives(images @ tables.T, strangers, generator(s)) for s in range(9)]
    )
    assert bool((drawn[:, :2] == 2).all()) and bool((drawn[:, 2] < 2).all())


def test_negatives_are_drawn_by_similarity():
    similarity = torch.tensor([0.0, 3.0, 2.0, 1.0]).expand(4000, 4)
    strangers = torch.tensor([False, True, True, True]).expand(4000, 4)
    share = hard_negatives(similarity, strangers, generator()).bincount(minlength=4) / 4000
    weights = torch.tensor([0, math.exp(3), math.exp(2), math.exp(1)])
    torch.testing.assert_close(share, weights / weights.sum(), atol=0.03, rtol=0)
    # The floor of 0.0001 keeps every stranger possible.
    sure = torch.tensor([0.0, 60.0, 0.0, 0.0]).expand(40_000, 4)
    drawn = hard_negatives(sure, strangers[:1].expand(40_000, 4), generator())
    assert set(drawn.tolist()) == {1, 2, 3}


def test_choose_so_many_of_the_filled_cells():
    filled = torch.rand(50, 6, generator=generator()) < 0.6
    count = (filled.sum(1) * 0.5).ceil()
    chosen = choose_cells(filled, count, generator())
    assert torch.equal(chosen.sum(1), count.long())
    assert not bool((chosen & ~filled).any())
    assert chosen.any(0).all()


def test_replaced_cells_come_from_filled_cells_of_the_same_column():
    filled = torch.rand(200, 3, generator=generator(1)) < 0.5
    filled[:, 2] = False
    filled[7, 2] = True
    own = torch.arange(3.0) * 1000 + torch.arange(200.0)[:, None]
    values = own.where(filled, torch.nan)
    replaced = filled & (torch.rand(200, 3, generator=generator(2)) < 0.5)
    got = other_patients_cells(values, filled, replaced, generator())
    assert torch.equal(got[filled & ~replaced], values[filled & ~replaced])
    assert bool(got[replaced].isfinite().all())
    assert torch.equal((got[replaced] // 1000).long(), replaced.nonzero()[:, 1])
    changed = (got != values)[:, :2][replaced[:, :2]]
    assert 0.95 < float(changed.float().mean()) < 1
    assert torch.equal(got[7, 2], values[7, 2])  # nobody else has it


def test_pair_losses_of_an_indifferent_model():
    """Equal similarities and a fixed answer of the matching head: both losses by hand."""
    imputer = build()
    with torch.no_grad():
        for projection in (imputer.image_projection, imputer.table_projection):
            projection[-1].weight.zero_()
            projection[-1].bias.fill_(1.0)
        imputer.match.weight.zero_()
        imputer.match.bias.copy_(torch.tensor([0.0, math.log(3.0)]))  # "a pair" with 3/4
    batch = cohort(5)
    values, filled = imputer._cells(batch)
    strangers = ~torch.eye(5, dtype=torch.bool)
    loss = imputer.pair_losses(
        values, filled, *imputer.encode_images(batch), strangers, generator()
    )
    contrast = math.log(5)
    matching = -(math.log(3 / 4) + 2 * math.log(1 / 4)) / 3
    torch.testing.assert_close(loss, torch.full((5,), contrast + matching))


def test_reconstruction_starts_from_what_is_known_of_everybody():
    imputer = build(hidden=1.0)
    batch = take_away(cohort(40), "labs")
    loss = imputer.eval().loss(batch, generator())
    likely = torch.tensor([0.2, 0.5, 0.3])[batch.values["place"][:, 0].long()]
    torch.testing.assert_close(loss, -likely.log())

    batch = take_away(cohort(40), "place")
    size, large = batch.values["labs"].unbind(1)
    gauss = 0.5 * ((size - 2.5) / 0.87) ** 2 + 0.5 * math.log(2 * math.pi)
    expected = (gauss - torch.tensor([0.25, 0.75])[large.long()].log()) / 2  # the mean of two cells
    torch.testing.assert_close(imputer.loss(batch, generator()), expected)


def test_training_adds_contrast_and_matching_where_there_are_pairs():
    imputer = build()
    batch = cohort(8)
    batch.observed.available[0, 0] = False  # no scan
    batch.observed.available[1, 1:] = False  # no table
    batch.observed_fields["labs"][1] = False
    batch.observed_fields["place"][1] = False
    whole = imputer.train().loss(batch, generator())
    part = imputer.eval().loss(batch, generator())
    assert whole[0].item() == pytest.approx(part[0].item() / 3)
    assert part[1] == 0 and whole[1] == 0
    assert bool((whole[2:] > part[2:] / 3 + 0.5).all())


@pytest.mark.parametrize("absent", [("labs", "place"), ("scan",), ()])
def test_incomplete_batches_train(absent):
    """Scans alone give a zero that can be differentiated; tables alone, one record: some loss."""
    imputer = build().train()
    batch = take_away(cohort(1 if not absent else 6), *absent)
    loss = imputer.loss(batch, generator())
    loss.sum().backward()
    assert bool(loss.isfinite().all())
    assert bool((loss == 0).all()) == ("labs" in absent)
    grads = [p.grad for p in imputer.parameters() if p.grad is not None]
    assert grads and all(bool(g.isfinite().all()) for g in grads)


def test_visits_of_one_patient_only():
    imputer = build().train()
    batch = cohort(4, patients=("p",) * 4)
    expected = imputer.eval().loss(batch, generator()) / 3
    torch.testing.assert_close(imputer.train().loss(batch, generator()), expected)


def test_a_hidden_column_is_seen_by_no_other():
    imputer = build()
    batch = cohort(6)
    values, filled = imputer._cells(batch)
    shown = filled.clone()
    shown[:, 0] = False
    images = imputer.encode_images(batch)

    def states():
        with torch.no_grad():
            return imputer.fuse(imputer.encode_tables(values, shown), shown, *images)

    before = states()
    with torch.no_grad():
        imputer.encoders["labs"].blank.add_(3.0)
        imputer.encoders["labs"].column[0].add_(3.0)
    changed = (states() - before).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False, True, False, False]  # class token, size, large, third


def test_a_category_competes_within_its_column_only():
    imputer = build()
    with torch.no_grad():
        imputer.heads["labs"].bias.copy_(torch.tensor([0.0, 0.0, -9.0, -8.0]))
        imputer.heads["place"].bias.copy_(torch.tensor([5.0, 7.0, 6.0]))
    recovered = imputer.recover(take_away(cohort(3), "labs", "place")).values
    assert recovered["labs"][:, 1].tolist() == [1, 1, 1]
    assert recovered["place"][:, 0].tolist() == [1, 1, 1]


def test_tables_are_recovered_from_scans_and_cells_from_cells():
    torch.manual_seed(0)
    imputer = build(dim=32)
    train, rng = cohort(192), generator()
    optimizer = torch.optim.Adam(imputer.parameters(), 4e-3)
    for _ in range(14):
        for rows in torch.randperm(192, generator=rng).split(16):
            loss = imputer.loss(train.rows(rows), rng).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    truth = cohort(150, 1).values
    spread = (truth["labs"][:, 0] - truth["labs"][:, 0].mean()).abs().mean()
    most_frequent = (truth["place"] == truth["place"].mode(0).values).float().mean()

    recovery = imputer.recover(take_away(cohort(150, 1), "labs", "place"))
    error = (recovery.values["labs"] - truth["labs"])[:, 0].abs().mean()
    right = (recovery.values["place"] == truth["place"]).float().mean()
    assert recovery.recovered.any(0).tolist() == [False, True, True]
    assert float(error) < 0.5 * float(spread)
    assert float(right) > float(most_frequent) + 0.3

    blank = take_away(cohort(150, 1), "scan")
    blank.observed_fields["labs"][:, 1] = False
    recovery = imputer.recover(blank)
    right = (recovery.values["labs"] == truth["labs"]).float().mean(0)
    assert recovery.completed[:, 1].all() and not recovery.recovered.any()
    assert float(right[0]) == 1
    assert float(right[1]) > float(truth["labs"][:, 1].mean()) + 0.1


def test_what_it_declares():
    imputer = build()
    observed = torch.tensor([[True, False, False], [False, True, False]])
    assert imputer.recoverable(observed).tolist() == [[False, True, True]] * 2
    require_recovery(imputer, "tip")
    scans = (SPECS[0], ModalitySpec("other", "image", "o.png", (1, 12, 12), (), "zscore"))
    with pytest.raises(ConfigError, match=r"Imputer tip: it can recover none of scan, other\."):
        require_recovery(TIP(scans, TIP.Options(**SMALL)), "tip")


def test_a_cohort_of_tables_only():
    torch.manual_seed(0)
    imputer = TIP(SPECS[1:], TIP.Options(**SMALL)).train()
    require_recovery(imputer, "tip")
    full = cohort(5)
    mask = ModalityMask(NAMES[1:], full.observed.available[:, 1:])
    values = {name: full.values[name] for name in NAMES[1:]}
    batch = Batch(
        full.record_ids, full.patient_ids, values, mask, full.observed_fields, full.labels
    )
    imputer.loss(batch, generator()).sum().backward()
    mask.available[:, 1] = False
    full.observed_fields["place"].fill_(False)
    assert bool(imputer.recover(batch).recovered[:, 1].all())
