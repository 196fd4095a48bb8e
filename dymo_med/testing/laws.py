"""What each kind of component must do, whatever else it does."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from safetensors.torch import load, save
from torch import Tensor

from dymo_med.backbones import BACKBONES, encode_versions
from dymo_med.errors import PatientDataError, Problem
from dymo_med.imputers import IMPUTERS
from dymo_med.selection import Cases, Selector, fit_statistics
from dymo_med.selection.base import Part
from dymo_med.tasks import OverClasses, task_from
from dymo_med.testing.made_up import NAMES, SPECS, WITHOUT_STAGE, K, make_batch, noisy
from dymo_med.types import (
    Batch,
    Fuse,
    FusionOutput,
    ModalityMask,
    ModalitySpec,
    SelectionTrace,
    SubsetStatistics,
)

Options: TypeAlias = Mapping[str, Any]
Setting: TypeAlias = tuple[Fuse, ModalityMask, Tensor, SubsetStatistics]


def check_imputer(kind: Any, options: Options | None = None) -> None:
    """Check that an imputer obeys the laws of imputers.

    Args:
        kind: The class.
        options: Its options, small ones; everything else as it is by default.

    Raises:
        AssertionError: Naming the law that it breaks.
    """
    for name, law in IMPUTER_LAWS.items():
        with _named(kind, name):
            law(kind, options or {})


def check_backbone(kind: Any, options: Options | None = None) -> None:
    """Check that a backbone obeys the laws of backbones.

    Args:
        kind: The class.
        options: As of `check_imputer`.

    Raises:
        AssertionError: Naming the law that it breaks.
    """
    for name, law in BACKBONE_LAWS.items():
        with _named(kind, name):
            law(kind, options or {})


def check_selector(kind: Any, options: Options | None = None) -> None:
    """Check that a selector obeys the laws of selectors.

    Args:
        kind: The class.
        options: As of `check_imputer`.

    Raises:
        AssertionError: Naming the law that it breaks.
    """
    setting = selector_setting()
    selector = fitted_selector(kind, setting, options or {})
    for name, law in SELECTOR_LAWS.items():
        with _named(kind, name):
            law(selector, setting)


def check_task(task: OverClasses, cell: str, nonsense: str) -> None:
    """Check that a task obeys the laws of tasks whose networks answer with K probabilities.

    Args:
        task: A task with one column.
        cell: A cell of it that says something.
        nonsense: One that cannot be.

    Raises:
        AssertionError: Naming the law that it breaks.
    """
    for name, law in TASK_LAWS.items():
        with _named(type(task), name):
            law(task, cell, nonsense)


@contextmanager
def _named(kind: type, law: str) -> Iterator[None]:
    """Say which law is broken."""
    try:
        yield
    except Exception as error:
        text = f"{kind.__name__} breaks a law: {law.replace('_', ' ')} ({error})"
        raise AssertionError(text) from error


@contextmanager
def _refused(kind: type[Exception], match: str) -> Iterator[None]:
    """Check that something is refused, and with which words."""
    try:
        yield
    except kind as error:
        assert re.search(match, str(error)), f"refused with other words: {error}"
    else:
        raise AssertionError(f"not refused with {kind.__name__}")


def _imputer(
    kind: Any, options: Options, seed: int = 0, specs: tuple[ModalitySpec, ...] = SPECS
) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        imputer = kind(specs, kind.Options(**options)).double().eval()
        imputer.start_from(make_batch(30, seed=100 + seed))
    return imputer


def _backbone(
    kind: Any, options: Options, seed: int = 0, specs: tuple[ModalitySpec, ...] = SPECS
) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(specs, K, kind.Options(**options)).double().eval()


def _outputs(backbone: Any, batch: Batch, used: Tensor | None = None) -> FusionOutput:
    used = batch.observed.available if used is None else used
    return encode_versions(backbone, batch)(torch.arange(len(batch)), used, torch.zeros_like(used))


_SMALL = {"dim": 8, "width": 4, "grid": 2}


def selector_setting() -> Setting:
    """Return a toy backbone's view of a batch: fuse, mask, candidates, statistics."""
    imputer = _imputer(IMPUTERS["mopoe"], {**_SMALL, "latent": 6, "hidden": 8})
    sizes = {**_SMALL, "dim": 16, "heads": 2, "layers": 1, "projection": 6}
    backbone = _backbone(BACKBONES["transformer"], sizes)
    train = make_batch(60, seed=3)
    with torch.no_grad():
        statistics = fit_statistics(
            encode_versions(backbone, train),
            train.observed.available,
            train.labels,
            torch.ones(60, dtype=torch.float64),
            K,
            backbone.distance,
        )
        batch = make_batch(12, seed=4)
        recovery = imputer.recover(batch)
        fuse = encode_versions(backbone, batch, recovery)
    return fuse, batch.observed, recovery.candidates, statistics


def fitted_selector(kind: Any, setting: Setting, options: Options | None = None) -> Selector:
    """Return a selector, fitted to made-up labels where it needs a fit.

    Args:
        kind: The class.
        setting: Of `selector_setting`.
        options: Its options.
    """
    fuse, observed, candidates, statistics = setting
    found: Selector = kind(kind.Options(**(options or {})))
    if found.needs_fit:
        labels = torch.arange(len(candidates)) % K
        cases = Cases(fuse, observed, candidates, labels, torch.ones(len(candidates)), 1.3)
        with torch.no_grad():
            found.fit(cases, statistics)
    return found


def _select(selector: Selector, setting: Setting, rows: Tensor | None = None) -> SelectionTrace:
    fuse, observed, candidates, statistics = setting
    if rows is not None:
        fuse = Part(fuse, rows)
        observed = ModalityMask(observed.names, observed.available[rows])
        candidates = candidates[rows]
    with torch.no_grad():
        return selector.select(fuse, observed, candidates, statistics)


def _imputer_observed_values_pass_bit_for_bit(kind: Any, options: Options) -> None:
    batch = make_batch()
    recovery = _imputer(kind, options).recover(batch)
    for m, modality_name in enumerate(NAMES):
        for i in range(len(batch)):
            got, given = recovery.values[modality_name][i], batch.values[modality_name][i]
            if modality_name in batch.observed_fields:
                cells = batch.observed_fields[modality_name][i]
                assert torch.equal(got[cells], given[cells])
            elif batch.observed.available[i, m]:
                assert torch.equal(got, given)


def _imputer_noise_where_nothing_was_observed_changes_nothing(kind: Any, options: Options) -> None:
    batch = make_batch()
    imputer = _imputer(kind, options)
    one, two = imputer.recover(batch), imputer.recover(noisy(batch))
    for m, modality_name in enumerate(NAMES):
        shown = one.observed.available[:, m]
        if modality_name in batch.observed_fields:
            # A blank cell of a table that is there says nothing, unless it is completed.
            shown = batch.observed_fields[modality_name]
        proposed = one.candidates[:, m]
        shown = shown | proposed.view(-1, *(1,) * (shown.ndim - 1))
        assert torch.equal(one.values[modality_name][shown], two.values[modality_name][shown])


def _imputer_everything_recoverable_is_proposed_and_finite(kind: Any, options: Options) -> None:
    batch = make_batch()
    imputer = _imputer(kind, options)
    recovery = imputer.recover(batch)
    can = imputer.recoverable(batch.observed.available)
    assert torch.equal(recovery.recovered, ~batch.observed.available & can)
    assert torch.equal(recovery.completed, batch.partly_filled() & can)
    assert all(bool(v.isfinite().all()) for v in recovery.values.values())
    assert bool(recovery.recovered.any())
    # Some leave tables alone.
    tables = torch.tensor([spec.kind == "table" for spec in SPECS])
    fills = imputer.recoverable(torch.ones(1, len(SPECS), dtype=torch.bool))[0] & tables
    assert bool(recovery.completed.any()) == bool(fills.any())


def _imputer_a_batch_of_one_equals_its_row(kind: Any, options: Options) -> None:
    batch = make_batch()
    imputer = _imputer(kind, options)
    whole = imputer.recover(batch)
    shown = whole.observed.available | whole.recovered
    for i in range(len(batch)):
        alone = imputer.recover(batch.rows(torch.tensor([i])))
        assert torch.equal(alone.recovered[0], whole.recovered[i])
        for m, modality_name in enumerate(NAMES):
            if not shown[i, m]:
                continue
            torch.testing.assert_close(
                alone.values[modality_name][0],
                whole.values[modality_name][i],
                atol=1e-10,
                rtol=0,
            )


def _imputer_same_seed_same_draws(kind: Any, options: Options) -> None:
    imputer = _imputer(kind, options)
    if not imputer.probabilistic:
        return
    one = imputer.recover(make_batch(), draws=2, seed=5).draws
    two = imputer.recover(make_batch(), draws=2, seed=5).draws
    other = imputer.recover(make_batch(), draws=2, seed=6).draws
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)
    for name, drawn in one.items():
        assert not torch.equal(drawn[0], drawn[1]), name


def _imputer_save_and_load_give_the_same_recovery(kind: Any, options: Options) -> None:
    imputer = _imputer(kind, options)
    stored = save(dict(imputer.state_dict()))
    other = _imputer(kind, options, seed=9)
    other.load_state_dict(load(stored))
    one, two = imputer.recover(make_batch()), other.recover(make_batch())
    assert all(torch.equal(one.values[n], two.values[n]) for n in NAMES)


def _imputer_nothing_observed_is_refused(kind: Any, options: Options) -> None:
    batch = make_batch()
    batch.observed.available[2] = False
    with _refused(PatientDataError, match=r"r2.*nothing can be recovered"):
        _imputer(kind, options).recover(batch)


def _imputer_a_training_step_reaches_every_parameter(kind: Any, options: Options) -> None:
    imputer = _imputer(kind, options).train()
    if next(imputer.parameters(), None) is None:
        with _refused(TypeError, match="no trainable parameters"):
            imputer.loss(make_batch(), torch.Generator())
        return
    loss = torch.zeros((), dtype=torch.float64)
    for seed in range(4):
        loss = loss + imputer.loss(make_batch(seed=seed), torch.Generator().manual_seed(seed)).sum()
    loss.backward()
    without = [n for n, p in imputer.named_parameters() if p.grad is None]
    assert not without


def _backbone_noise_where_nothing_was_observed_changes_nothing(kind: Any, options: Options) -> None:
    backbone = _backbone(kind, options)
    one, two = (_outputs(backbone, b) for b in (make_batch(), noisy(make_batch())))
    assert torch.equal(one.logits, two.logits)
    assert torch.equal(one.embedding, two.embedding)


def _backbone_unused_modalities_change_nothing(kind: Any, options: Options) -> None:
    backbone = _backbone(kind, options)
    batch = make_batch()
    used = batch.observed.available.clone()
    used[:, 1] &= ~used[:, 0]
    values = dict(batch.values)
    change = (batch.observed.available & ~used)[:, 1].view(-1, 1, 1, 1)
    assert change.any()
    values["film"] = torch.where(change, values["film"] + 3, values["film"])
    other = dataclasses.replace(batch, values=values)
    one, two = _outputs(backbone, batch, used), _outputs(backbone, other, used)
    torch.testing.assert_close(one.logits, two.logits, atol=1e-12, rtol=0)


def _backbone_used_modalities_do_change_something(kind: Any, options: Options) -> None:
    backbone = _backbone(kind, options)
    batch = make_batch()
    for m, modality_name in enumerate(NAMES):
        values = dict(batch.values)
        values[modality_name] = (
            1 - values[modality_name].clamp(0, 1)
            if modality_name == "labs"
            else values[modality_name] * -1.5
        )
        changed = _outputs(backbone, dataclasses.replace(batch, values=values)).logits
        has = batch.observed.available[:, m]
        moved = (changed - _outputs(backbone, batch).logits).abs().amax(1) > 1e-9
        assert torch.equal(moved, has)


def _backbone_a_batch_of_one_equals_its_row(kind: Any, options: Options) -> None:
    backbone = _backbone(kind, options)
    batch = make_batch()
    whole = _outputs(backbone, batch)
    for i in range(len(batch)):
        alone = _outputs(backbone, batch.rows(torch.tensor([i])))
        torch.testing.assert_close(alone.logits[0], whole.logits[i], atol=1e-10, rtol=0)
        torch.testing.assert_close(alone.embedding[0], whole.embedding[i], atol=1e-10, rtol=0)


def _backbone_tokens_of_all_modalities_stand_side_by_side(kind: Any, options: Options) -> None:
    backbone = _backbone(kind, options)
    batch, owner = make_batch(), backbone.token_modality
    assert owner.dtype == torch.int64
    assert owner.unique_consecutive().tolist() == list(range(len(SPECS)))
    for m, spec in enumerate(SPECS):
        fields = batch.observed_fields.get(spec.name)
        tokens = backbone.encode(spec.name, batch.values[spec.name], fields)
        assert tokens.values.shape[:2] == tokens.available.shape
        assert tokens.available.shape == (len(batch), int((owner == m).sum()))


def _backbone_a_part_of_the_tokens_is_refused(kind: Any, options: Options) -> None:
    backbone = _backbone(kind, options)
    fuse = encode_versions(backbone, make_batch())
    some = backbone.token_modality != 1
    for tokens, available in (
        (fuse.observed[:, some], fuse.observed_available[:, some]),
        (fuse.observed, fuse.observed_available[:, some]),
        (fuse.observed[0], fuse.observed_available[0]),
    ):
        with _refused(ValueError, match="takes the tokens of all modalities"):
            backbone.fuse(tokens, available)


def _backbone_any_set_of_tokens_is_fused_and_the_others_change_nothing(
    kind: Any, options: Options
) -> None:
    backbone = _backbone(kind, options)
    fuse = encode_versions(backbone, make_batch(40))
    draw = torch.rand(fuse.observed_available.shape, generator=torch.Generator().manual_seed(2))
    available = fuse.observed_available & (draw < 0.4)  # of some modalities a part is left
    available[:, 0] |= ~available.any(1)
    noise = torch.randn(fuse.observed.shape, dtype=torch.float64) * 100
    one = backbone.fuse(fuse.observed, available)
    two = backbone.fuse(torch.where(available[..., None], fuse.observed, noise), available)
    assert bool(one.logits.isfinite().all()) and bool(one.embedding.isfinite().all())
    torch.testing.assert_close(two.logits, one.logits, atol=1e-12, rtol=0)
    torch.testing.assert_close(two.embedding, one.embedding, atol=1e-12, rtol=0)


def _backbone_every_parameter_gets_a_gradient(kind: Any, options: Options) -> None:
    backbone = _backbone(kind, options).train()
    total = torch.zeros((), dtype=torch.float64)
    for seed in range(4):
        batch = make_batch(seed=seed)
        out = _outputs(backbone, batch)
        total = total + out.logits.square().sum() + (out.embedding * 1.3).sum()
        own = backbone.own_loss(
            batch, 1.0, lambda logits: logits.square().sum(1), torch.Generator().manual_seed(0)
        )
        if own is not None:
            total = total + own.sum()
    total.backward()
    without = [
        n for n, p in backbone.named_parameters() if p.grad is None or not bool(p.grad.any())
    ]
    # The learned token of a blank cell stands for it but is, on purpose, never evidence.
    assert [n for n in without if not n.endswith(".blank")] == []


def _backbone_specific_modules_serve_one_modality_and_the_rest_serves_all(
    kind: Any, options: Options
) -> None:
    backbone = _backbone(kind, options)
    if backbone.recovers:
        return
    batch = make_batch()
    reached = []
    for m in range(len(SPECS)):
        alone = torch.zeros_like(batch.observed.available)
        alone[:, m] = True
        mask = dataclasses.replace(batch.observed, available=batch.observed.available & alone)
        rows = mask.available[:, m].nonzero().squeeze(1)
        out = _outputs(backbone, dataclasses.replace(batch, observed=mask).rows(rows))
        gradients = torch.autograd.grad(
            out.logits.square().sum() + out.embedding.square().sum(),
            list(backbone.parameters()),
            allow_unused=True,
        )
        reached.append([g is not None and bool(g.any()) for g in gradients])
    times = torch.tensor(reached).sum(0).tolist()
    specific = {id(p) for module in backbone.specific_modules() for p in module.parameters()}
    for (key, p), n in zip(backbone.named_parameters(), times, strict=True):
        if not key.endswith(".blank"):
            assert (n == 1) if id(p) in specific else (n > 1), key


def _backbone_save_and_load_give_the_same_answer(kind: Any, options: Options) -> None:
    backbone = _backbone(kind, options)
    stored = save(dict(backbone.state_dict()))
    other = _backbone(kind, options, seed=9)
    other.load_state_dict(load(stored))
    assert torch.equal(
        _outputs(backbone, make_batch()).logits, _outputs(other, make_batch()).logits
    )


def _selector_used_contains_observed_and_only_candidates_are_added(
    selector: Selector, setting: Setting
) -> None:
    trace = _select(selector, setting)
    assert bool((trace.used >= trace.observed).all())
    assert torch.equal(trace.used, trace.observed | trace.admitted)
    assert not bool((trace.admitted & ~trace.candidates).any())
    assert torch.equal(trace.rejected, trace.candidates & ~trace.admitted)


def _selector_arguments_are_not_changed(selector: Selector, setting: Setting) -> None:
    _, observed, candidates, statistics = setting
    before = observed.available.clone(), candidates.clone(), statistics.prototypes.clone()
    _select(selector, setting)
    after = observed.available, candidates, statistics.prototypes
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _selector_no_candidates_gives_the_observed_prediction(
    selector: Selector, setting: Setting
) -> None:
    fuse, observed, candidates, statistics = setting
    trace = _select(selector, (fuse, observed, torch.zeros_like(candidates), statistics))
    rows = torch.arange(len(candidates))
    with torch.no_grad():
        plain = fuse(rows, observed.available, torch.zeros_like(candidates))
    assert torch.equal(trace.output.logits, plain.logits)
    assert torch.equal(trace.used, observed.available)


def _selector_output_is_the_fusion_of_what_was_used(selector: Selector, setting: Setting) -> None:
    trace = _select(selector, setting)
    if trace.mixture is not None:
        return
    with torch.no_grad():
        again = setting[0](torch.arange(len(trace.used)), trace.used, trace.admitted)
    torch.testing.assert_close(trace.output.logits, again.logits, atol=1e-10, rtol=0)


def _selector_an_average_is_that_of_its_subsets(selector: Selector, setting: Setting) -> None:
    trace = _select(selector, setting)
    if trace.mixture is None:
        return
    rows, admitted, weight = trace.mixture.rows, trace.mixture.admitted, trace.mixture.weight
    assert bool((weight >= 0).all()) and bool((rows.diff() >= 0).all())
    assert not bool((admitted & ~trace.candidates[rows]).any())
    with torch.no_grad():
        parts = setting[0](rows, trace.observed[rows] | admitted, admitted).logits
    temperature = selector.state()["temperature"]
    share = torch.softmax(parts / temperature, -1) * weight[:, None]
    mean = torch.zeros(len(trace.used), K, dtype=torch.float64).index_add(0, rows, share)
    torch.testing.assert_close(mean.sum(1), torch.ones(len(mean), dtype=torch.float64))
    answer = torch.softmax(trace.output.logits / temperature, -1)
    torch.testing.assert_close(answer, mean, atol=1e-10, rtol=0)
    trust = torch.zeros(trace.used.shape, dtype=torch.float64)
    trust.index_add_(0, rows, admitted * weight[:, None])
    assert torch.equal(trace.admitted, trust > 0.5)
    shown = ~trace.trust[0].isnan()
    assert torch.equal(shown, trace.candidates)
    torch.testing.assert_close(trace.trust[0][shown], trust[shown])


def _selector_what_was_fitted_survives_json(selector: Selector, setting: Setting) -> None:
    again = type(selector)(selector.options)
    if selector.needs_fit:
        with _refused(ValueError, match="must be fitted"):
            _select(again, setting)
    again.load_state(json.loads(json.dumps(selector.state(), allow_nan=False)))
    one, two = _select(selector, setting), _select(again, setting)
    assert torch.equal(one.used, two.used)
    assert torch.equal(one.output.logits, two.output.logits)


def _selector_fitting_again_gives_the_same_bits(selector: Selector, setting: Setting) -> None:
    if not selector.needs_fit:
        assert selector.state() == {}
        return
    fuse, observed, candidates, statistics = setting
    labels = torch.arange(len(candidates)) % K
    again = type(selector)(selector.options)
    cases = Cases(fuse, observed, candidates, labels, torch.ones(len(candidates)), 1.3)
    with torch.no_grad():
        again.fit(cases, statistics)
    assert again.state() == selector.state()


def _selector_permuting_patients_permutes_the_answer(selector: Selector, setting: Setting) -> None:
    rows = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    whole, permuted = _select(selector, setting), _select(selector, setting, rows)
    assert torch.equal(permuted.used, whole.used[rows])
    torch.testing.assert_close(
        permuted.output.logits, whole.output.logits[rows], atol=1e-10, rtol=0
    )


def _selector_a_batch_of_one_equals_its_row(selector: Selector, setting: Setting) -> None:
    whole = _select(selector, setting)
    for i in range(12):
        alone = _select(selector, setting, torch.tensor([i]))
        assert torch.equal(alone.used[0], whole.used[i])


def _selector_nothing_observed_is_refused(selector: Selector, setting: Setting) -> None:
    fuse, observed, candidates, statistics = setting
    available = observed.available.clone()
    available[0] = False
    with _refused(ValueError, match="at least one observed"):
        _select(selector, (fuse, ModalityMask(observed.names, available), candidates, statistics))


def _imputer_a_column_that_no_training_record_had_is_never_recovered(
    kind: Any, options: Options
) -> None:
    batch = make_batch()
    batch.observed_fields["labs"][:, 2] = False
    recovery = _imputer(kind, options, specs=WITHOUT_STAGE).recover(batch, draws=3, seed=1)
    labs = NAMES.index("labs")
    assert bool((recovery.values["labs"][recovery.candidates[:, labs], 2] == 0).all())
    whole = batch.observed_fields["labs"][:, :2].all(1) & batch.observed.available[:, labs]
    assert bool(whole.any()) and not bool(recovery.completed[whole, labs].any())
    if recovery.draws is not None and "labs" in recovery.draws:
        assert bool((recovery.draws["labs"][:, recovery.candidates[:, labs], 2] == 0).all())


def _backbone_a_column_that_no_training_record_had_changes_nothing(
    kind: Any, options: Options
) -> None:
    batch = make_batch()
    other = dataclasses.replace(
        batch, values={**batch.values, "labs": batch.values["labs"].clone()}
    )
    other.values["labs"][:, 2] = 2 - other.values["labs"][:, 2]
    backbone = _backbone(kind, options, specs=WITHOUT_STAGE)
    with torch.no_grad():
        first, second = (backbone.encode("labs", b.values["labs"]) for b in (batch, other))
    assert torch.equal(first.values, second.values)


def _task_survives_json(task: OverClasses, cell: str, nonsense: str) -> None:
    assert task_from(json.loads(json.dumps(task.to_dict()))) == task


def _task_cells_are_read_or_refused(task: OverClasses, cell: str, nonsense: str) -> None:
    (column,) = task.columns
    assert task.read({column: ""}, {""}, "labels.csv:2") is None
    found = task.read({column: cell}, {""}, "labels.csv:2")
    assert found is not None and not isinstance(found, Problem)
    wrong = task.read({column: nonsense}, {""}, "labels.csv:2")
    assert isinstance(wrong, Problem) and wrong.remedy and nonsense not in str(wrong)


def _task_accepts_itself(task: OverClasses, cell: str, nonsense: str) -> None:
    assert task.accepts(task) is None


def _truth(task: OverClasses) -> tuple[Tensor, Tensor | None]:
    labels = torch.arange(12) % len(task.classes)
    if task.scale is None:
        return labels, None
    return labels, torch.nn.functional.one_hot(labels, len(task.classes)).float()


def _task_losses_are_least_at_the_truth(task: OverClasses, cell: str, nonsense: str) -> None:
    labels, shares = _truth(task)
    truth = labels if shares is None else shares
    right = 9.0 * torch.nn.functional.one_hot(labels, len(task.classes)).float()
    for at in (right, right.flip(1)):
        assert task.loss(at, truth).shape == task.judged(at, labels, shares).shape == (12,)
    assert bool((task.loss(right, truth) <= task.loss(-right, truth)).all())
    one = torch.ones(12)
    assert task.figures(right, truth, one)["score"] > task.figures(-right, truth, one)["score"]


def _task_truth_is_least_strange_where_it_is_sure(
    task: OverClasses, cell: str, nonsense: str
) -> None:
    labels, shares = _truth(task)
    sure = torch.nn.functional.one_hot(labels, len(task.classes)).double()
    for strange in task.nonconformity(sure, labels, shares).values():
        assert strange.shape == (12,) and bool((strange.abs() < 1e-9).all())


def _task_columns_are_those_that_it_names(task: OverClasses, cell: str, nonsense: str) -> None:
    even = torch.full((len(task.classes),), 1 / len(task.classes), dtype=torch.float64)
    assert tuple(task.answer_row(even)) == task.answer_columns
    told = task.value_of({"m": even}, "m", "", None)
    assert tuple(task.own_row(told)) == task.own_columns


def _laws(prefix: str) -> dict[str, Any]:
    """Return the laws of one kind of component, by name."""
    return {n.removeprefix(prefix): law for n, law in globals().items() if n.startswith(prefix)}


IMPUTER_LAWS: Mapping[str, Callable[[Any, Options], None]] = _laws("_imputer_")
BACKBONE_LAWS: Mapping[str, Callable[[Any, Options], None]] = _laws("_backbone_")
SELECTOR_LAWS: Mapping[str, Callable[[Selector, Setting], None]] = _laws("_selector_")
TASK_LAWS: Mapping[str, Callable[[OverClasses, str, str], None]] = _laws("_task_")
