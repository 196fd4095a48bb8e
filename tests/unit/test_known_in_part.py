"""Classes that are known in part: losses and weights of what is fitted on censored patients."""

import pytest
import torch
from torch.nn import functional as F

from dymo_med.selection import Cases
from dymo_med.survival import TimeBins
from dymo_med.tasks import PLAIN, class_loss
from dymo_med.training.calibration import fit_temperature
from dymo_med.training.objectives import of_known_class, record_weights
from dymo_med.training.selectors import choose
from dymo_med.types import Batch, ModalityMask

BINS = TimeBins((1.0, 2.0), "years")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(labels, shares=None, followed=None, patients=None):
    n = len(labels)
    mask = ModalityMask(("x",), torch.ones(n, 1, dtype=torch.bool))
    ids = tuple(f"r{i}" for i in range(n))
    values = {"x": torch.zeros(n, 1)}
    return Batch(ids, patients or ids, values, mask, {}, torch.tensor(labels), shares, followed)


def test_what_is_known_for_certain_is_a_class():
    """Shares of one class each give every figure that labels give."""
    logits, labels = random(40, 3), random(40, 3, seed=1).argmax(1)
    sure = F.one_hot(labels, 3).float()
    assert torch.allclose(class_loss(logits, labels), class_loss(logits, sure))
    who = [f"p{i % 25}" for i in range(40)]
    assert fit_temperature(logits, sure, who) == pytest.approx(fit_temperature(logits, labels, who))
    one = torch.ones(40)
    score = PLAIN.figures(logits, labels, one)["score"]
    assert PLAIN.figures(logits, sure, one) == {"score": pytest.approx(score)}
    p = logits.double().softmax(1)
    assert torch.allclose(PLAIN.error(p, labels, None), PLAIN.error(p, labels, sure))


def test_censored_patients_ask_for_what_comes_later():
    fits = BINS.fits(torch.tensor([0.0, 1.0, 1.5, 2.0]), torch.zeros(4, dtype=torch.bool))
    logits = random(4, 3)
    p = logits.softmax(1)
    later = torch.stack([torch.ones(()), p[1, 1:].sum(), p[2, 1] / 2 + p[2, 2], p[3, 2]])
    assert torch.allclose(class_loss(logits, fits), -later.log(), atol=1e-6)


def test_a_temperature_is_found_under_censoring():
    """Logits three times too sure: T near 3, from events and censored patients together."""
    generator = torch.Generator().manual_seed(2)
    z = random(3000, 3, seed=3) * 1.5
    label = torch.multinomial(z.softmax(1), 1, generator=generator).squeeze(1)
    times = label + torch.rand(3000, generator=generator) + 1e-3
    end = 3 * torch.rand(3000, generator=generator)
    fits = BINS.fits(torch.minimum(times, end), times <= end)
    assert fit_temperature(3 * z, fits, range(3000)) == pytest.approx(3, abs=0.25)


def test_who_is_of_known_class_stands_for_the_others():
    followed = torch.tensor([[0.5, 1, 1.0], [0.7, 0, 0.0], [3.0, 0, 2.0], [3.0, 0, 2.0]]).double()
    fits = BINS.fits(followed[:, 0], followed[:, 1] > 0)
    whole = batch([0, -1, 2, 2], fits, followed, ("a", "b", "c", "c"))
    assert whole.known.tolist() == [True] * 4
    part, weights = of_known_class(whole)
    assert part.labels.tolist() == [0, 2, 2]
    assert weights.tolist() == pytest.approx([1.0, 1.0, 1.0])  # 1, and twice half of 2
    plain = batch([0, -1, 1])
    part, weights = of_known_class(plain)
    assert part.labels.tolist() == [0, 1]
    assert torch.equal(weights, record_weights(part))


def cases(labels, shares, stands_for, n):
    followed = None if stands_for is None else torch.stack([*torch.zeros(2, n), stands_for], 1)
    mask = ModalityMask(("x",), torch.ones(n, 1, dtype=torch.bool))
    none = torch.zeros(n, 1, dtype=torch.bool)
    return Cases(None, mask, none, labels, torch.ones(n), 1.0, shares, followed)


def test_cases_of_known_class_weigh_as_much_as_all():
    labels = torch.tensor([0, -1, 2, -1])
    found = cases(labels, None, torch.tensor([1.0, 0, 3.0, 0]), 4)
    kept = found.of_known_class()
    assert kept.labels.tolist() == [0, 2]
    assert kept.weights.tolist() == pytest.approx([1.0, 3.0])
    assert cases(labels, None, None, 4).of_known_class().labels.tolist() == labels.tolist()


def test_the_choice_goes_by_the_likelihood_of_what_is_known():
    """Of two selectors one knows what censored patients tell; only its loss says so."""
    n = 60
    fits = BINS.fits(torch.full((n,), 1.9), torch.zeros(n, dtype=torch.bool))
    late, early = torch.tensor([0.1, 0.1, 0.8]).log(), torch.tensor([0.6, 0.2, 0.2]).log()
    answers = {
        "observed_only": early.double().expand(n, 3) + 0.01 * random(n, 1).double(),
        "dymo": late.double().expand(n, 3),
    }
    found = choose(
        answers, cases(torch.full((n,), -1), fits, torch.zeros(n), n), [str(i) for i in range(n)]
    )
    assert found.name == "dymo"
    assert "accurate" not in found.why
    assert found.results["dymo"]["log_loss"] == pytest.approx(0.2, abs=0.05)
