"""Laws that every registered comparator obeys; what each of them promises; recipe to bundle."""

import dataclasses
import itertools
import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from dymo_med.bundle import TABLES, checksums_of, load_bundle, save_bundle
from dymo_med.calibration import supported
from dymo_med.comparators import COMPARATORS
from dymo_med.comparators.base import narrowed, only
from dymo_med.config import Recipe, read_recipe
from dymo_med.data.batch import collate
from dymo_med.demo import shipped_bundle
from dymo_med.errors import BundleError, ConfigError, PatientDataError
from dymo_med.inference.compare import comparator_probabilities
from dymo_med.selection import SELECTORS
from dymo_med.tasks import PLAIN, Regression
from dymo_med.training.calibration import fit_temperature
from dymo_med.training.comparators import train_comparators
from dymo_med.training.loop import Log, MicroBatch
from dymo_med.training.losses import within
from dymo_med.training.objectives import augment
from dymo_med.training.train import train
from dymo_med.types import Scale
from tests.contracts.test_components import NAMES, SPECS, K, make_batch

SIZES = {"dim": 8, "heads": 2, "width": 4, "grid": 2}
SMALL = {
    "unimodal": SIZES,
    "concatenation": {**SIZES, "hidden": 16},
    "moddrop": {**SIZES, "hidden": 16, "rate": 0.4},
}
M = len(SPECS)


def build(name, seed=0):
    torch.manual_seed(seed)
    entry = COMPARATORS[name]
    return entry(SPECS, K, entry.Options(**SMALL[name])).double().eval()


def hollow(batch, number):
    """The batch with one number wherever nothing was observed."""
    values = {}
    for m, name in enumerate(NAMES):
        v = batch.values[name]
        keep = batch.observed.available[:, m].view(-1, *(1,) * (v.ndim - 1))
        if name in batch.observed_fields:
            keep = keep & batch.observed_fields[name]
        values[name] = torch.where(keep, v, torch.tensor(number, dtype=v.dtype))
    return dataclasses.replace(batch, values=values)


def loss_of_all_parts(comparator, batch, seed=0):
    losses = []
    for part in comparator.parts().values():
        data, _ = narrowed(batch, part.specs)
        losses.append(part.loss(data, torch.Generator().manual_seed(seed)).sum())
    return torch.stack(losses).sum()


@pytest.mark.parametrize("name", COMPARATORS)
class TestComparator:
    @pytest.mark.parametrize("number", [math.nan, 7.0])
    def test_what_stands_where_nothing_was_observed_changes_nothing(self, name, number):
        comparator, batch = build(name), make_batch()
        expected = comparator(batch)
        assert torch.equal(comparator(hollow(batch, number)), expected)
        assert bool(expected.isfinite().all())
        comparator.train()
        one, two = (loss_of_all_parts(comparator, b) for b in (batch, hollow(batch, number)))
        assert torch.equal(one, two)
        two.backward()
        grads = [p.grad for p in comparator.parameters() if p.grad is not None]
        assert all(bool(g.isfinite().all()) for g in grads)

    def test_what_was_observed_changes_something(self, name):
        comparator, batch = build(name), make_batch()
        moved = torch.zeros(len(batch), dtype=torch.bool)
        for modality_name in NAMES:
            values = {**batch.values, modality_name: batch.values[modality_name] * 0.5}
            if modality_name == "labs":
                values[modality_name] = 1 - batch.values[modality_name].clamp(0, 1)
            other = comparator(dataclasses.replace(batch, values=values))
            moved |= (other - comparator(batch)).abs().amax(1) > 1e-9
        assert bool(moved.all())

    def test_a_batch_of_one_equals_its_row_and_every_time_the_same(self, name):
        comparator, batch = build(name), make_batch()
        whole = comparator(batch)
        assert whole.shape == (len(batch), K)
        assert torch.equal(comparator(batch), whole)
        for i in range(len(batch)):
            alone = comparator(batch.rows(torch.tensor([i])))
            torch.testing.assert_close(alone[0], whole[i], atol=1e-10, rtol=0)

    def test_training_reaches_every_parameter(self, name):
        comparator = build(name).train()
        total = sum(loss_of_all_parts(comparator, make_batch(seed=s), s) for s in range(4))
        total.backward()
        without = [
            n for n, p in comparator.named_parameters() if p.grad is None or not bool(p.grad.any())
        ]
        # The learned token of a blank cell stands for it but is, on purpose, never evidence.
        assert [n for n in without if not n.endswith(".blank")] == []

    def test_a_record_without_label_teaches_nothing(self, name):
        comparator, batch = build(name), make_batch()
        batch.labels[2] = -1
        loss = comparator.loss(batch, torch.Generator().manual_seed(0))
        assert loss.shape == (len(batch),)
        assert loss[2] == 0 and bool((loss[torch.arange(len(batch)) != 2] > 0).all())

    def test_what_is_minimised_is_the_tasks_loss(self, name):
        batch = make_batch()
        for part in build(name).parts().values():
            data, _ = narrowed(batch, part.specs)
            asked = []

            def squares(logits, truth, asked=asked):
                asked.append(truth)
                return logits.square().sum(1) + 3

            loss = part.loss(data, torch.Generator().manual_seed(0), squares)
            assert loss.shape == (len(data),) and bool((loss > 3).all())
            assert torch.equal(asked[0], data.truth)

    def test_save_and_load_give_the_same_answer(self, name, tmp_path):
        comparator, batch = build(name), make_batch()
        comparator.finish(make_batch(20, seed=3), torch.ones(20))
        save_file(dict(comparator.state_dict()), tmp_path / "w.safetensors")
        other = build(name, seed=9)
        assert not torch.equal(comparator(batch), other(batch))
        other.load_state_dict(load_file(tmp_path / "w.safetensors"))
        assert torch.equal(comparator(batch), other(batch))

    def test_every_subset_of_modalities_is_answered(self, name):
        comparator, batch = build(name), make_batch(3)
        batch.observed.available[:] = True
        batch.observed_fields["labs"][:] = True
        batch.observed_fields["age"][:] = True
        subsets = torch.tensor(list(itertools.product([False, True], repeat=M))[1:])
        assert len(subsets) == 2**M - 1
        answers = comparator.under(batch, within(batch.observed.available, subsets))
        assert answers.shape == (2**M - 1, 3, K)
        assert bool(answers.isfinite().all())

    def test_many_subsets_at_once_are_each_answered_as_alone(self, name):
        comparator, batch = build(name), make_batch()
        comparator.finish(make_batch(20, seed=3), torch.ones(20))
        subsets = torch.rand(6, M, generator=torch.Generator().manual_seed(1)) < 0.5
        used = within(batch.observed.available, subsets)
        answers = comparator.under(batch, used)
        for s in range(6):
            torch.testing.assert_close(
                answers[s], comparator(only(batch, used[s])), atol=1e-10, rtol=0
            )

    def test_a_table_of_blanks_is_answered(self, name):
        comparator, batch = build(name), make_batch(2)
        batch.observed.available[:] = torch.tensor([n == "labs" for n in NAMES])
        for fields in batch.observed_fields.values():
            fields[:] = False
        assert bool(comparator(hollow(batch, math.nan)).isfinite().all())

    def test_what_stands_for_a_blank_cell_is_no_evidence(self, name):
        comparator, batch = build(name), make_batch()
        assert bool(batch.partly_filled().any())
        before = comparator(batch)
        with torch.no_grad():
            for parameter_name, parameter in comparator.named_parameters():
                if parameter_name.endswith(".blank"):
                    parameter += 1.0
        assert torch.equal(comparator(batch), before)

    def test_it_learns_a_toy_problem(self, name):
        def toy(n, seed):
            batch = make_batch(n, seed)
            age = 40.0 + 20 * batch.labels.double()[:, None]
            film = torch.full((n, 1, 16, 12), -1.0, dtype=torch.float64)
            film[:, :, :8] += batch.labels.double().view(-1, 1, 1, 1)  # where it is matters
            batch.observed.available[:, [0, 2, 4, 5]] = False  # noise to learn by heart
            batch.observed.available[:, [1, 3]] |= ~batch.observed.available[:, [3, 1]]
            batch.observed_fields["age"][:] = batch.observed.available[:, 3:4]
            return dataclasses.replace(batch, values={**batch.values, "age": age, "film": film})

        train_on, unseen = toy(48, 5), toy(30, 6)
        comparator = build(name).train()
        generator = torch.Generator().manual_seed(0)
        for part in comparator.parts().values():
            data, _ = narrowed(train_on, part.specs)
            optimizer = torch.optim.Adam(part.parameters(), lr=0.01)
            for _ in range(40):
                optimizer.zero_grad()
                part.loss(data, generator).mean().backward()
                optimizer.step()
        comparator.eval().finish(toy(30, 7), torch.ones(30))
        with torch.no_grad():
            log_loss = float(F.cross_entropy(comparator(unseen), unseen.labels))
        assert log_loss < 0.5 * math.log(K)


class TestUnimodal:
    def finished(self, losses):
        comparator = build("unimodal")
        comparator.log_loss.copy_(torch.tensor(losses))
        return comparator

    def test_the_best_that_a_patient_has_answers_alone(self):
        comparator = self.finished([0.9, 0.4, 0.7, 0.5, 0.6, 0.95])
        assert comparator.ranking() == ("film", "age", "side", "labs", "volume", "gait")
        batch = make_batch(20)
        answers = comparator(batch)
        for i in range(20):
            best = next(n for n in comparator.ranking() if n in batch.observed.of(i))
            alone, _ = narrowed(batch.rows(torch.tensor([i])), [SPECS[NAMES.index(best)]])
            expected = comparator.networks[best](alone)
            torch.testing.assert_close(answers[i : i + 1], expected, atol=1e-10, rtol=0)

    def test_ties_go_by_the_cohorts_order_and_the_unseen_come_last(self):
        inf = math.inf
        assert self.finished([inf, 0.5, inf, 0.5, 0.1, inf]).ranking() == (
            *("side", "film", "age"),
            *("volume", "labs", "gait"),
        )
        assert build("unimodal").ranking() == NAMES

    def test_ranks_are_log_losses_of_validation(self):
        comparator, batch = build("unimodal"), make_batch(30, seed=4)
        batch.observed.available[:, 1] = False
        batch.labels[::3] = -1
        weights = torch.rand(30)
        comparator.finish(batch, weights)
        assert comparator.log_loss[1] == math.inf
        data, rows = narrowed(batch, SPECS[3:4])
        known = data.labels >= 0
        with torch.no_grad():
            logits = comparator.networks["age"](data)[known]
        losses = F.cross_entropy(logits, data.labels[known], reduction="none")
        w = weights[rows[known]].double()
        assert float(comparator.log_loss[3]) == pytest.approx(float(losses @ w / w.sum()))

    def test_nothing_at_all_is_refused(self):
        batch = make_batch(3)
        batch.observed.available[1] = False
        with pytest.raises(ValueError, match="without any modality"):
            build("unimodal")(batch)


class TestModDrop:
    def test_it_drops_and_never_everything(self):
        comparator = build("moddrop")
        available = make_batch(400).observed.available
        generator = torch.Generator().manual_seed(0)
        kept = torch.stack([comparator.kept(available, generator) for _ in range(50)])
        assert not bool((kept & ~available).any())
        assert bool(kept.any(-1).all())
        several = available.sum(1) >= 4
        dropped = 1 - kept[:, several][:, available[several]].double().mean()
        # A little less than asked for: the last one stays.
        assert 0.36 < float(dropped) < 0.401
        single = available.sum(1) == 1
        assert torch.equal(kept[:, single].all(0), available[single])

    def test_what_stays_when_all_would_go_is_any_of_them(self):
        entry = COMPARATORS["moddrop"]
        comparator = entry(SPECS, K, entry.Options(**SIZES, rate=0.999))
        available = torch.tensor([[True, False, True, True, False, False]]).expand(6000, -1)
        kept = comparator.kept(available, torch.Generator().manual_seed(0)).double()
        assert bool((kept.sum(1) >= 1).all())
        assert kept.mean(0)[[0, 2, 3]].sub(1 / 3).abs().max() < 0.03

    def test_training_drops_and_answering_does_not(self):
        comparator, batch = build("moddrop"), make_batch()
        answers = F.cross_entropy(comparator(batch), batch.labels, reduction="none")
        losses = [comparator.loss(batch, torch.Generator().manual_seed(s)) for s in range(3)]
        assert not torch.equal(losses[0], answers) and not torch.equal(losses[0], losses[1])
        again = comparator.loss(batch, torch.Generator().manual_seed(0))
        assert torch.equal(losses[0], again)
        entry = COMPARATORS["moddrop"]
        torch.manual_seed(0)
        never = entry(SPECS, K, entry.Options(**{**SMALL["moddrop"], "rate": 0})).double()
        torch.testing.assert_close(never.loss(batch, torch.Generator()), answers)


def test_a_missing_modality_is_a_learned_vector():
    comparator, batch = build("concatenation"), make_batch()
    before = comparator(batch)
    with torch.no_grad():
        comparator.placeholder[1] += 1.0
    moved = (comparator(batch) - before).abs().amax(1) > 1e-9
    assert torch.equal(moved, ~batch.observed.available[:, 1])


def test_no_comparator_is_called_like_another_method():
    assert not {*COMPARATORS} & {*SELECTORS, "oracle"}


# --- Recipes --------------------------------------------------------------------------------------

RECIPE = """\
name: small
imputer: {name: template}
backbone: {name: transformer, dim: 16, heads: 2, layers: 1, projection: 4, width: 4, grid: 1}
backbone_training:
  epochs: 3
  batch_size: 8
  subsets: 3
  augmentation: {mirror_axes: [0], shift_voxels: 1, intensity: 0.1}
"""


def write(folder, comparators):
    path = folder / "recipe.yaml"
    path.write_text(RECIPE + comparators)
    return path


def problems(folder, comparators):
    with pytest.raises(ConfigError) as caught:
        read_recipe(write(folder, comparators), TABLES)
    return [str(problem) for problem in caught.value.problems]


def test_comparators_are_names_or_names_with_options(tmp_path):
    text = "comparators: [unimodal, {name: concatenation, dim: 32}, moddrop]\n"
    recipe = read_recipe(write(tmp_path, text), TABLES)
    assert [(c.name, c.options) for c in recipe.comparators] == [
        ("unimodal", {}),
        ("concatenation", {"dim": 32}),
        ("moddrop", {}),
    ]
    assert read_recipe(write(tmp_path, ""), TABLES).comparators == []


def test_what_is_wrong_with_comparators_names_the_line(tmp_path):
    text = """\
comparators:
  - unimodl
  - {name: concatenation, dmi: 32}
  - name: moddrop
    rate: 1.5
  - unimodal
  - {name: unimodal, dim: 33}
"""
    unknown, option, value, twice, heads = problems(tmp_path, text)
    assert "recipe.yaml:10" in unknown and "Did you mean 'unimodal'" in unknown
    assert "there is no comparator called 'unimodl'" in unknown
    assert "recipe.yaml:11" in option and "Did you mean 'dim'" in option
    assert "recipe.yaml:13" in value and "less than 1" in value
    assert "recipe.yaml:15" in twice and "comparator 'unimodal' is named twice" in twice
    assert "recipe.yaml:15" in heads and "multiple of heads" in heads


@pytest.mark.parametrize("text", ["comparators: unimodal\n", "comparators: [3]\n"])
def test_comparators_of_another_form(tmp_path, text):
    (problem,) = problems(tmp_path, text)
    assert "recipe.yaml:9 comparators" in problem


COLLATED = ("train", "validation", "calibration")


# --- The backbone's loss and score ---------------------------------------------------------------

SCALE = Scale(0.0, 4.0, (0.0, 2.0, 4.0))


@pytest.mark.parametrize("balance", [None, torch.tensor([0.2, 0.5, 2.3])])
@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("name", COMPARATORS)
def test_loss_and_score_are_the_backbones(tmp_path, name, scale, balance):
    """Of a regression the absolute error, with class weights a weighted loss."""
    data = {s: make_batch(12, i, torch.float32) for i, s in enumerate(COLLATED)}
    task = PLAIN if scale is None else Regression.of("y", scale)
    if scale is not None:
        values = torch.arange(12) % 3 * 2 + 0.5 - torch.arange(12) % 3 / 2
        shares = scale.shares(values)
        data = {s: dataclasses.replace(b, shares=shares) for s, b in data.items()}
    log, seen = Log(tmp_path / "log.csv"), []

    def run_stage(stage, objective, batch, weights, schedule, *, checkpoint):
        objective.eval()
        step = MicroBatch(batch, torch.ones(len(batch)), torch.Generator().manual_seed(3))
        part, again = objective.comparator, torch.Generator().manual_seed(3)
        batch = augment(batch, plan.backbone_training.augmentation, again)
        expected = part.loss(batch, again, lambda z, y: task.loss(z, y, balance)).mean()
        plain = part.loss(batch, torch.Generator().manual_seed(3)).mean()
        assert float(objective(step)) == pytest.approx(float(expected))
        seen.append(float((expected - plain).abs().detach()))
        with torch.no_grad():
            log.stages[stage] = [{"epoch": 0, **objective.validate()}]

    entry = {"name": name, **SMALL[name]}
    plan = Recipe.model_validate({**yaml.safe_load(RECIPE), "comparators": [entry]})
    ones, cpu = {s: torch.ones(12) for s in data}, torch.device("cpu")
    (found,) = train_comparators(
        *(plan, SPECS, K, data, ones, run_stage, log, tmp_path, cpu), task, balance
    ).values()
    assert (max(seen) > 1e-3) == (scale is not None or balance is not None)
    subsets = torch.tensor(list(itertools.product([False, True], repeat=M))[1:])
    held = data["validation"]
    used = within(held.observed.available, subsets)
    with torch.no_grad():
        p = found.network.under(held, used).double().softmax(-1)
    if scale is None:
        right = p[:, torch.arange(12), held.labels]
        assert found.validation["log_loss"] == pytest.approx(float(-right.log().mean()), abs=1e-5)
    else:
        error = (scale.value(p) - scale.value(held.shares.double())).abs().mean()
        assert found.validation == {"mae": pytest.approx(float(error), abs=1e-5)}


# --- Training and bundle --------------------------------------------------------------------------

COMPARED = f"""\
comparators:
  - {{name: unimodal, {str(SIZES)[1:-1].replace("'", "")}}}
  - {{name: moddrop, {str(SIZES)[1:-1].replace("'", "")}, hidden: 8}}
"""


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cohort_dir):
    folder = tmp_path_factory.mktemp("compared")
    recipe = write(folder, COMPARED)
    return recipe, cohort_dir, train(recipe, cohort_dir, folder / "run", device="cpu")


@pytest.fixture(scope="module")
def compared(trained):
    return load_bundle(trained[2], "cpu")


def test_a_resumed_run_ends_with_the_same_bits(trained, tmp_path):
    recipe, cohort, whole = trained

    def stop_in(stage, epoch):
        def stop(now, done, *_):
            if (now, done) == (stage, epoch):
                raise Interrupted

        return stop

    for stage, epoch in (("comparator unimodal t2", 3), ("comparator moddrop", 1)):
        with pytest.raises(Interrupted):
            train(
                *(recipe, cohort, tmp_path / "run"),
                resume=True,
                device="cpu",
                progress=stop_in(stage, epoch),
            )
    again = train(recipe, cohort, tmp_path / "run", device="cpu", resume=True)
    assert (again / "checksums.json").read_bytes() == (whole / "checksums.json").read_bytes()


def test_the_rest_of_the_bundle_is_as_without_comparators(trained, tmp_path):
    _, cohort, whole = trained
    plain = train(write(tmp_path, ""), cohort, tmp_path / "run", device="cpu")
    for file in ("imputer", "backbone", "statistics"):
        name = f"models/{file}.safetensors"
        assert (plain / name).read_bytes() == (whole / name).read_bytes()
    assert not (plain / "configs" / "comparators.json").exists()
    assert "Comparators" not in (plain / "docs" / "README.md").read_text(encoding="utf-8")
    assert load_bundle(plain, "cpu").comparators == {}


def test_a_bundle_holds_its_comparators(trained, compared, tmp_path):
    assert list(compared.comparators) == ["unimodal", "moddrop"]
    names = [spec.name for spec in compared.specs]
    unimodal, moddrop = compared.comparators.values()
    assert list(unimodal.best_epoch) == [f"comparator unimodal {name}" for name in names]
    assert list(moddrop.best_epoch) == ["comparator moddrop"]
    encoders = {"image_encoders": ["strided"], "table_encoder": "columns"}
    usual = {"hidden": 8, "column_layers": 1, "rate": 0.5}
    assert moddrop.options == {**SIZES, **encoders, **usual}
    assert bool(unimodal.network.log_loss.isfinite().all())
    for fitted in (unimodal, moddrop):
        assert 0.05 < fitted.temperature < 20.1
        assert 0 < fitted.validation["log_loss"] < 3 and 0 <= fitted.validation["auroc"] <= 1
        assert not any(p.requires_grad for p in fitted.network.parameters())
        assert not fitted.network.training
    card = (trained[2] / "docs" / "README.md").read_text(encoding="utf-8")
    assert f"| unimodal | {unimodal.validation['log_loss']:.3f} |" in card
    assert save_bundle(compared, tmp_path / "copy") == compared.bundle_id
    log = (trained[2].parent / "log.csv").read_text(encoding="utf-8").splitlines()
    assert len(log) == 1 + 3 * (1 + len(names) + 1)  # the template imputer is not trained


def test_probabilities_are_calibrated_and_each_records_own(compared, records):
    batch = collate(records, compared.specs)
    found = comparator_probabilities(compared, batch)
    assert list(found) == ["unimodal", "moddrop", *compared.references.fitted]
    for name, fitted in compared.comparators.items():
        p = found[name]
        assert p.dtype == torch.float64 and p.shape == (len(batch), 2)
        torch.testing.assert_close(p.sum(1), torch.ones(len(batch), dtype=torch.float64))
        raw = torch.softmax(fitted.network(batch).double() / fitted.temperature, dim=1)
        # As few patients limit them as the bundle's own answers.
        expected = supported(raw, compared.calibration.patients)
        assert torch.equal(p, expected)
        alone = comparator_probabilities(compared, batch.rows(torch.tensor([3])))
        torch.testing.assert_close(alone[name][0], p[3], atol=1e-6, rtol=0)
    batch.observed.available[1] = False
    with pytest.raises(PatientDataError, match=f"{batch.record_ids[1]}.*nothing to answer from"):
        comparator_probabilities(compared, batch)


def test_modalities_that_no_labelled_record_has(tmp_path):
    data = {s: make_batch(20, i, torch.float32) for i, s in enumerate(COLLATED)}
    for batch in data.values():
        batch.observed.available[:, 0] = True
    data["train"].observed.available[:, 4] = False
    data["validation"].observed.available[:, [1, 4]] = False
    log, seen = Log(tmp_path / "log.csv"), {}

    def run_stage(name, objective, batch, weights, schedule, *, checkpoint):
        assert float(weights.mean()) == pytest.approx(1)
        seen[name] = len(batch)
        log.stages[name] = [{"epoch": 0, **objective.eval().validate()}]

    plan = Recipe.model_validate({**yaml.safe_load(RECIPE), **yaml.safe_load(COMPARED)})
    ones = {s: torch.ones(20) for s in data}
    cpu = torch.device("cpu")
    found = train_comparators(plan, SPECS, K, data, ones, run_stage, log, tmp_path, cpu)
    available = data["train"].observed.available.sum(0).tolist()
    stages = {f"comparator unimodal {n}": k for n, k in zip(NAMES, available, strict=True) if k}
    assert seen == {**stages, "comparator moddrop": 20}
    assert found["unimodal"].network.ranking()[-2:] == ("film", "side")
    assert all(math.isfinite(f.temperature) for f in found.values())


def test_temperatures_are_those_of_the_validation_split(compared, records, cohort):
    held_back = [r for r in records if cohort.splits[r.patient_id] == "validation"]
    batch = collate([r for r in held_back if r.label is not None], compared.specs)
    subsets = torch.tensor(list(itertools.product([False, True], repeat=len(compared.specs)))[1:])
    used = within(batch.observed.available, subsets)
    labels, patients = batch.labels.repeat(len(used)), batch.patient_ids * len(used)
    for fitted in compared.comparators.values():
        logits = fitted.network.under(batch, used).flatten(0, 1)
        expected = fit_temperature(logits, labels, patients)
        assert fitted.temperature == pytest.approx(expected, rel=1e-3)


def test_the_shipped_bundle_has_none_and_keeps_its_id():
    bundle = load_bundle(shipped_bundle(), "cpu")
    assert bundle.comparators == {}
    sums = json.loads((shipped_bundle() / "checksums.json").read_text(encoding="utf-8"))
    assert not [name for name in sums if "comparators" in name]


def spoil_temperature(stored):
    stored["unimodal"]["temperature"] = 0


def spoil_temperature_beyond_reason(stored):
    stored["unimodal"]["temperature"] = 1e6


def spoil_sizes(stored):
    stored["moddrop"]["options"]["hidden"] = 9


def spoil_names(stored):
    stored["modrop"] = stored.pop("moddrop")


def leave_one_out(stored):
    del stored["moddrop"]


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_temperature,
        spoil_temperature_beyond_reason,
        spoil_sizes,
        spoil_names,
        leave_one_out,
        None,
    ],
)
def test_comparators_that_do_not_fit_are_a_bundle_error(trained, tmp_path, spoil):
    folder = shutil.copytree(trained[2], tmp_path / "bundle")
    config = folder / "configs" / "comparators.json"
    stored = json.loads(config.read_text(encoding="utf-8"))
    if spoil is None:
        config.unlink()
    else:
        spoil(stored)
        config.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(BundleError, match=r"comparators\.json"):  # a changed file
        load_bundle(folder, "cpu")
    (folder / "checksums.json").write_text(json.dumps(checksums_of(folder)), encoding="utf-8")
    with pytest.raises(BundleError, match=r"does not fit|tensors are not those|cannot be right"):
        load_bundle(folder, "cpu")


def test_the_provenance_has_them_as_the_recipe_does(compared):
    written = compared.provenance["recipe"]["comparators"]
    assert written == yaml.safe_load(COMPARED)["comparators"]
