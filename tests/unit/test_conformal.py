import numpy as np
import pytest

from dymo_med.conformal import COVERAGE, Conformal


def simulated(n, seed, patterns=("a", "b", "a+b", "c")):
    """Answers of a model that is right to a different degree in each pattern."""
    rng = np.random.default_rng(seed)
    pattern = rng.choice(patterns, n)
    skill = np.array([{"a": 0.3, "b": 0.8, "a+b": 1.5}.get(p, 0.0) for p in pattern])
    label = rng.integers(0, 3, n)
    logits = rng.normal(size=(n, 3))
    logits[np.arange(n), label] += skill
    p = np.exp(2 * logits)  # far too sure of itself
    return p / p.sum(1, keepdims=True), label, pattern


def conformal(p, label, pattern):
    return Conformal(tuple(pattern), {"m": tuple(1 - p[np.arange(len(p)), label])})


@pytest.mark.parametrize("seed", range(3))
def test_every_pattern_is_covered_at_the_stated_rate(seed):
    fitted = conformal(*simulated(2000, seed))
    p, label, pattern = simulated(20_000, seed + 10)
    found = fitted.sets("m", p, list(pattern))
    covered = found.members[np.arange(len(p)), label]
    for name in ("a", "b", "a+b", "c"):
        inside = pattern == name
        calibrated = (np.array(fitted.patterns) == name).sum()
        assert (found.calibrated_on[inside] == calibrated).all()
        assert {g for g, i in zip(found.group, inside, strict=True) if i} == {"pattern"}
        # The coverage of one calibration sample scatters as a beta distribution does.
        error = 4 * (COVERAGE * (1 - COVERAGE) / calibrated) ** 0.5
        assert abs(covered[inside].mean() - COVERAGE) < error + 0.02
    # Sets are larger where the model knows less.
    size = {n: found.members[pattern == n].sum(1).mean() for n in ("a", "b", "a+b")}
    assert size["a"] > size["b"] + 0.1 > size["a+b"] + 0.2


def test_few_of_a_pattern_are_compared_with_others_who_lack_as_much():
    p, label, pattern = simulated(400, 1)
    keep = (pattern != "c") | (np.cumsum(pattern == "c") <= 5)
    fitted = conformal(p[keep], label[keep], pattern[keep])
    found = fitted.sets("m", p[:4], ["c", "d", "a+b", "a+b+c+d"])
    single = sum("+" not in x for x in fitted.patterns)
    assert found.group == ("count", "count", "pattern", "all")
    assert found.calibrated_on.tolist()[:2] == [single, single]
    assert found.calibrated_on[3] == len(fitted.patterns)


def test_a_set_follows_the_definition():
    """With n scores a class stays unless fewer than 10 % of n + 1 are at least as strange."""
    scores = np.arange(1, 40) / 40
    fitted = Conformal(("a",) * 39, {"m": tuple(scores)})
    p = np.array([[0.90, 0.06, 0.04], [0.55, 0.40, 0.05]])
    found = fitted.sets("m", p, ["a", "a"])
    expected = [[(1 + (scores >= 1 - x).sum()) / 40 >= 0.1 for x in row] for row in p]
    expected[0][0] = expected[1][0] = True
    assert found.members.tolist() == expected


def test_a_row_does_not_depend_on_the_others():
    fitted = conformal(*simulated(300, 2))
    p, _, pattern = simulated(50, 3)
    together = fitted.sets("m", p, list(pattern))
    for i in range(50):
        alone = fitted.sets("m", p[i : i + 1], [str(pattern[i])])
        assert alone.members[0].tolist() == together.members[i].tolist()
        assert alone.group[0] == together.group[i]


def test_nothing_to_compare_with_rules_nothing_out():
    found = Conformal((), {"m": ()}).sets("m", np.array([[0.99, 0.01]]), ["a"])
    assert found.members.all() and found.calibrated_on.tolist() == [0]


def test_the_answer_is_always_in():
    fitted = Conformal(("a",) * 30, {"m": (0.01,) * 30})
    found = fitted.sets("m", np.array([[0.5, 0.3, 0.2]]), ["a"])
    assert found.members.tolist() == [[True, False, False]]
