"""Dials of the simulator, and the exact answers that come with its patients."""

import csv
import hashlib
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import log_loss

from dymo_med import simulate
from dymo_med.cli import main
from dymo_med.data import simulate as simulator
from dymo_med.data.dials import SETTINGS, Dials, setting
from dymo_med.data.simulated_survival import SURVIVAL, SURVIVAL_LABELS, SURVIVAL_TRUTH
from dymo_med.data.truth import every_subset, read_truth
from dymo_med.errors import ConfigError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

# Of eight patients of seed 3, 16 voxels a side, made before there were dials.
BEFORE = "df620a4ceff6857178444cd1f8814559900181e3930f5896ca1569b7f916206d"


def digest(folder: Path) -> str:
    """Return the hash of all files but exact answers and survival, unpacked."""
    import gzip

    whole = hashlib.sha256()
    later = {"truth.csv", SURVIVAL, SURVIVAL_LABELS, SURVIVAL_TRUTH}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in later):
        content = file.read_bytes()
        if file.suffix == ".gz":  # as packed bytes depend on the version of zlib
            content = gzip.decompress(content)
        whole.update(file.relative_to(folder).as_posix().encode() + content)
    return whole.hexdigest()


def test_the_default_makes_the_same_files_as_before(tmp_path):
    assert digest(simulate(tmp_path / "c", 8, seed=3, size=16)) == BEFORE
    assert not (tmp_path / "c" / "dials.yaml").exists()


def test_hard_is_another_cohort_and_says_what_differs(tmp_path):
    folder = simulate(tmp_path / "c", 8, seed=3, size=16, dials=setting("hard"))
    assert digest(folder) != BEFORE
    again = setting("default", folder / "dials.yaml")
    assert again == SETTINGS["hard"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("label_noise: 0.7\n", "label_noise"),
        ("nois: [0.1, 0.2]\n", "unknown key"),
        ("foci: [5, 2]\n", "must not exceed"),
        ("noise: loud\n", "noise"),
    ],
)
def test_wrong_dials_are_errors_with_a_remedy(tmp_path, capsys, text, said):
    file = tmp_path / "dials.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        setting("hard", file)
    with pytest.raises(ConfigError, match=r"no such setting.*default or hard"):
        setting("hrad")


def test_an_unknown_setting_is_a_wrong_command(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(tmp_path / "c"), "--setting", "nightmare"])
    assert ended.value.code == 2 and not (tmp_path / "c").exists()


def drawn(dials: Dials, patients: int) -> tuple[np.ndarray, np.ndarray]:
    """Return labels `(n,)` and exact posteriors of all subsets `(n, 2^M)`; no scan is made."""
    rng = np.random.default_rng(0)
    everybody = [simulator.draw_evidence(rng, dials) for _ in range(patients)]
    posterior = np.array([simulator.subset_posteriors(e, dials) for e in everybody])
    return np.array([e.label for e in everybody]), posterior


@pytest.fixture(scope="module")
def noisy():
    return drawn(SETTINGS["hard"].model_copy(update={"label_noise": 0.1, "missing": 0.0}), 5000)


def test_posteriors_are_calibrated(noisy):
    labels, posterior = noisy
    subsets = every_subset(simulator.MODALITIES)
    for wanted in (("t1ce",), ("symptoms", "labs"), simulator.MODALITIES):
        p = posterior[:, subsets.index(tuple(wanted))]
        for low, high in ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.01)):
            some = (p >= low) & (p < high)
            if some.sum() < 60:
                continue
            error = (p[some] * (1 - p[some])).mean() ** 0.5 / some.sum() ** 0.5
            assert abs(labels[some].mean() - p[some].mean()) < 4 * error


def test_labels_that_may_be_wrong_bound_every_posterior(noisy):
    _, posterior = noisy
    assert posterior.min() >= 0.1 and posterior.max() <= 0.9
    assert np.allclose(posterior[:, 0], 0.5)


def test_more_modalities_never_know_less_on_average(noisy):
    labels, posterior = noisy
    subsets = every_subset(simulator.MODALITIES)
    chain = [tuple(simulator.MODALITIES[:k]) for k in range(len(simulator.MODALITIES) + 1)]
    losses = [log_loss(labels, posterior[:, subsets.index(s)]) for s in chain]
    assert all(b < a + 0.01 for a, b in pairwise(losses))
    assert losses[-1] < losses[0] - 0.1


def test_two_modalities_by_hand():
    """Without contradictions evidence adds up, and shared evidence counts once."""
    dials = Dials(contradictory=0.0, blank=0.0, missing=0.0)
    evidence = simulator.draw_evidence(np.random.default_rng(5), dials)
    ratios, found = evidence.log_likelihood_ratios, simulator.subset_posteriors(evidence, dials)
    subsets = every_subset(simulator.MODALITIES)
    for subset in (("t2", "flair"), ("t1", "labs")):
        seen = {p for name in subset for p in simulator.pieces([name], dials)}
        expected = 1 / (1 + np.exp(-sum(ratios[p] for p in seen)))
        assert found[subsets.index(subset)] == pytest.approx(expected)


def test_unlabelled_patients_are_of_the_training_split(tmp_path):
    dials = Dials(unlabelled=0.6)
    folder = simulate(tmp_path / "c", 24, seed=1, size=16, dials=dials)
    splits = {r["patient_id"]: r["split"] for r in rows(folder / "splits.csv")}
    blank = [r["patient_id"] for r in rows(folder / "labels.csv") if not r["grade"]]
    assert blank and {splits[p] for p in blank} == {"train"}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_exact_answers_stand_beside_an_evaluation(tmp_path):
    from exact import beside

    folder = simulate(tmp_path / "c", 12, seed=1, size=16)
    truth = read_truth(folder)
    labels = {r["record_id"]: r["grade"] for r in rows(folder / "labels.csv")}
    told = [
        {
            "scenario": "as-is",
            "method": method,
            "record_id": name,
            "patient_id": name,
            "label": labels[name],
            "prob_low": str(1 - p),
            "prob_high": str(p),
            "observed": "t1+t2+labs",
        }
        for name in truth.record_ids
        for method, p in (("exact", truth.of(name, ["t1", "t2", "labs"])), ("half", 0.5))
    ]
    exact, half = beside(told, truth)
    assert exact["method"] == "exact" and exact["kl"] == pytest.approx(0, abs=1e-6)
    assert half["kl"] > 0 and half["exact_log_loss"] == pytest.approx(exact["log_loss"], abs=1e-6)


def test_hidden_cells_are_no_evidence(tmp_path, monkeypatch, capsys):
    """The command: exact answers without the cells that a scenario hid, and without blank ones."""
    import exact

    dials = Dials(label_noise=0.1, blank=0.3, contradictory=0.2)
    cohort = simulate(tmp_path / "c", 8, seed=1, size=16, dials=dials)
    truth, recomputed = read_truth(cohort), exact.Recomputed(cohort)
    for subset in (["labs"], ["t1ce", "demographics"], list(simulator.MODALITIES)):
        for name in truth.record_ids:  # two ways to the same number
            assert recomputed.of(name, subset, frozenset()) == pytest.approx(
                truth.of(name, subset), rel=1e-4
            )
    columns = simulator.TABLES["labs"]
    everything = frozenset(columns)
    assert recomputed.of(truth.record_ids[0], ["labs"], everything) == pytest.approx(0.5)

    evaluation = tmp_path / "e"
    evaluation.mkdir()
    labels = {r["record_id"]: r["grade"] for r in rows(cohort / "labels.csv")}
    lines = ["scenario,record_id,patient_id,label,method,prob_low,prob_high,observed"]
    for name in truth.record_ids:
        lines.append(f"cells:0.9,{name},{name},{labels[name]},dymo,0.5,0.5,labs")
        lines.append(f"cells:0.9,{name},{name},{labels[name]},oracle,0.5,0.5,labs")
    (evaluation / "predictions.csv").write_text("\n".join(lines) + "\n")
    hidden = [f"cells:0.9,{n},labs,{c}" for n in truth.record_ids for c in columns]
    (evaluation / "hidden.csv").write_text(
        "\n".join(["scenario,record_id,modality,column", *hidden]) + "\n"
    )
    monkeypatch.setattr(sys, "argv", ["exact.py", str(evaluation), str(cohort)])
    exact.main()
    dymo, oracle = rows(evaluation / "exact.csv")
    assert float(dymo["kl"]) == pytest.approx(0, abs=1e-9)
    assert float(oracle["kl"]) > 0.001
    assert "| cells:0.9 | dymo | 8 |" in capsys.readouterr().out


def test_a_cohort_without_exact_answers_says_so(tmp_path):
    with pytest.raises(ConfigError, match="exact answers cannot be read"):
        read_truth(tmp_path)
    (tmp_path / "truth.csv").write_text("record_id,grade\na,low\n")
    with pytest.raises(ConfigError, match="holds no exact answers"):
        read_truth(tmp_path)


def test_bright_scans_saturate():
    """No gain turns bright voxels into negative ones."""
    lesion = simulator.Lesion(12, 5, 6, 0.5, 0.1)
    dials = Dials(gain_spread=1.0, bias_spread=1.0, site_gain=5.0)
    for seed in range(3):
        scans = simulator.render(lesion, np.random.default_rng(seed), 16, dials=dials, site=2)
        assert all(image.min() == 0 for image in scans.images.values())


def test_flair_after_contrast_shows_the_enhancement():
    dials = Dials(flair_after_contrast=True)
    assert "enhancement" in simulator.pieces(["flair"], dials)
    latents = dict.fromkeys(simulator.IMAGE_SEPARATION, 0.0) | {"size": 2.0}
    shown = []
    for z in (-2.0, -1.0, 0.0, 1.0, 2.0):  # brighter and brighter, nothing else changes
        lesion = simulator.Lesion.from_latents(latents | {"enhancement": z})
        scans = simulator.render(lesion, np.random.default_rng(0), 24, dials=dials)
        shown.append(scans.images["flair"][scans.lesion == 2].mean())
    assert all(b > 1.01 * a for a, b in pairwise(shown))
    assert shown[-1] > 1.2 * shown[0]


def test_foci_share_the_volume_of_one_ball():
    lesion = simulator.Lesion(16, 6, 1, 0.5, 0.1)
    volumes = [
        (
            simulator.render(lesion, np.random.default_rng(seed), 48, dials=Dials(foci=foci)).lesion
            >= 2
        ).sum()
        for seed in range(2)
        for foci in ((1, 1), (4, 4))
    ]
    one, four = np.mean(volumes[::2]), np.mean(volumes[1::2])
    assert four == pytest.approx(one, rel=0.35)


def test_oedema_stays_invisible_on_every_t1():
    """Otherwise the posteriors from T1 and T1ce would not be exact."""
    dials = Dials(tissue_spread=0.1, protocol_spread=0.2)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        sequences = simulator._sequences(rng, dials, 2)
        tissues = simulator._tissues(rng, dials, sequences)
        for name in ("t1", "t1ce"):
            white, oedema = (sequences[name].signal(tissues[t]) for t in ("white", "oedema"))
            assert oedema == pytest.approx(white)


def test_a_second_site_is_told(tmp_path):
    dials = Dials(second_site=0.5)
    folder = simulate(tmp_path / "c", 8, seed=1, size=16, dials=dials)
    sites = {r["record_id"]: r["site"] for r in rows(folder / "labels.csv")}
    assert set(sites.values()) == {"1", "2"}
    assert sites == {r["record_id"]: r["site"] for r in rows(folder / "truth.csv")}
    assert "site" in simulator.cohort_description(16, dials)["subgroups"]
