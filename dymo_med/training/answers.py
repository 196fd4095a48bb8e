"""What turns networks into answers: fitted on some patients, tried out on others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from dymo_med.backbones import FusionBackbone
from dymo_med.calibration import Calibration
from dymo_med.config import Recipe
from dymo_med.conformal import Conformal
from dymo_med.imputers import Imputer
from dymo_med.references import References, features_of
from dymo_med.selection import Selector
from dymo_med.tasks import PLAIN, OverClasses
from dymo_med.training.calibration import FEWEST, fit_temperature
from dymo_med.training.draw_checks import check_draws
from dymo_med.training.held_back import try_out
from dymo_med.training.loop import stream
from dymo_med.training.objectives import encode_all, record_weights, sampled_subsets, subset_logits
from dymo_med.training.performance import performance
from dymo_med.training.references import Held, weigh
from dymo_med.training.selectors import calibration_cases, choose, fit_all, held_out
from dymo_med.training.use import audit_use
from dymo_med.types import Batch, Choice, DrawCheck, Performance, SubsetStatistics, Use


@dataclass(frozen=True)
class Answering:
    """What turns networks into answers: fitted on some patients, tried out on others.

    Attributes:
        references: With what part of an answer is theirs.
        use: Which modalities answers rest on, by the patients they are fitted on.
        calibration: Of the probabilities: the temperature is fitted, the counts are tried out.
        selectors: Every one of the table, fitted.
        choice: Which is the default, and why; by the patients they are fitted on.
        conformal: From the others.
        performance: On the others.
        draw_check: Whether the imputer's draws are what they claim, by the patients they are
            fitted on.
    """

    references: References
    use: Use
    calibration: Calibration
    selectors: Mapping[str, Selector]
    choice: Choice
    conformal: Conformal
    performance: Performance
    draw_check: DrawCheck | None = None


def part(validation: Batch, calibration: Batch, seed: int) -> tuple[Batch, Batch]:
    """Return who answers are fitted on and who they are tried out on; nobody is in both.

    Of 60 calibration patients or more half, drawn by the seed, are fitted on, and the other half
    tried out. Fewer are all tried out, and validation patients are fitted on. Those chose the
    networks' epochs, which makes networks look surer of themselves than they should be; so they
    are second choice.

    Args:
        validation: Labelled validation records.
        calibration: Labelled calibration records.
        seed: Of the draw; it looks at ids alone.
    """
    patients = sorted(set(calibration.patient_ids))
    if len(patients) < 2 * FEWEST:
        return validation, calibration
    order = torch.randperm(len(patients), generator=stream(seed, "who answers are fitted on"))
    chosen = {patients[i] for i in order[: len(patients) // 2].tolist()}
    inside = torch.tensor([p in chosen for p in calibration.patient_ids])
    return (
        calibration.rows(inside.nonzero().squeeze(1)),
        calibration.rows((~inside).nonzero().squeeze(1)),
    )


@torch.no_grad()
def fit_answers(
    plan: Recipe,
    imputer: Imputer,
    backbone: FusionBackbone,
    statistics: SubsetStatistics,
    references: References,
    validation: Batch,
    fitting: Batch,
    held_back: Batch,
    device: torch.device,
    task: OverClasses = PLAIN,
) -> Answering:
    """Fit temperature, selectors and the choice among them, then try the result out on others.

    Args:
        plan: The recipe: its selector and its seed.
        imputer: Trained.
        backbone: Trained, in evaluation mode.
        statistics: Of the backbone, on training records.
        references: Fitted; how much of an answer is theirs is decided here.
        validation: Labelled validation records, on the CPU.
        fitting: Labelled records, on the CPU: everything is fitted on these (`part`).
        held_back: Labelled records of other patients, on the CPU: nothing is fitted on these, so
            sets and figures that rest on them hold for new patients.
        device: Where to compute.
        task: What is predicted.
    """
    temperature = 1.0
    if task.calibrated:
        logits, rows = subset_logits(
            encode_all(backbone, fitting, device),
            fitting.observed.available.to(device),
            sampled_subsets(len(backbone.specs), plan.seed),
        )
        rows = rows.cpu()
        temperature = fit_temperature(
            logits.cpu(),
            fitting.truth[rows],
            [fitting.patient_ids[i] for i in rows.tolist()],
        )
    held = [
        Held(
            batch,
            features_of(batch, backbone.specs),
            encode_all(backbone, batch, device),
            temperature,
        )
        for batch in ((fitting,) if fitting is validation else (validation, fitting))
    ]
    references = weigh(references, held, task, plan.seed)
    cases, patients = calibration_cases(
        imputer,
        backbone,
        fitting,
        record_weights(fitting),
        temperature,
        plan.seed,
        device,
        references,
    )
    asked = plan.selector
    selectors = fit_all(cases, statistics, {asked.name: asked.options} if asked else {})
    answers = held_out(selectors, cases, statistics, patients)
    choice = choose(answers, cases, patients, task)
    if asked is not None:
        choice = replace(choice, name=asked.name, why="The recipe asked for it.")
    calibration = Calibration(
        temperature,
        len(set(fitting.patient_ids)),
        len(set(held_back.patient_ids)) if task.calibrated else None,
    )
    calibration = task.recalibrated(
        *(calibration, answers[choice.name], cases.shares, cases.followed, cases.weights),
        patients,
    )
    tested = try_out(
        imputer,
        backbone,
        selectors,
        statistics,
        calibration,
        held_back,
        plan.seed,
        device,
        task,
        references,
    )
    return Answering(
        references,
        audit_use(held, references, task, plan.seed),
        tested.counted(calibration),
        selectors,
        choice,
        tested.conformal(),
        performance(tested, choice.name),
        check_draws(imputer, backbone, references, fitting, temperature, plan.seed, device),
    )
