"""The simulated cohort: physics, evidence, files."""

from __future__ import annotations

import csv
import hashlib
import math
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from scipy.stats import norm

from dymo_med.data.dials import Dials
from dymo_med.data.simulate import (
    DEFAULT,
    GROUPS,
    IMAGE_SEPARATION,
    MODALITIES,
    SEQUENCES,
    TABLES,
    TISSUES,
    Evidence,
    Finding,
    Lesion,
    Measurement,
    assign_splits,
    cohort_description,
    draw_evidence,
    grid_affine,
    interval_log_likelihood_ratio,
    pieces,
    posterior_high,
    render,
    simulate,
)
from dymo_med.errors import ConfigError

SIZE = 24


def hashes(root: Path) -> dict[str, str]:
    """Return the hash of every file below `root` by its relative path."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small cohort."""
    return simulate(tmp_path_factory.mktemp("simulate") / "cohort", 12, seed=3, size=SIZE)


@pytest.fixture(scope="module")
def drawn() -> list[Evidence]:
    """Return the evidence of 4000 patients."""
    generator = np.random.default_rng(0)
    dials = Dials(missing=0.3)
    return [draw_evidence(generator, dials) for _ in range(4000)]


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the share of (positive, negative) pairs that are in order."""
    ranks = scores.argsort().argsort() + 1
    n = positive.sum()
    return (ranks[positive].sum() - n * (n + 1) / 2) / (n * (~positive).sum())


class TestPhysics:
    """Signal equations and contrast agent."""

    @pytest.mark.parametrize(
        ("sequence", "tissue", "expected"),
        [
            # 0.70 (1 - 2 exp(-594/832) + exp(-600/832)) exp(-12/79.6)
            ("t1", "white", 0.70 * (1 - 2 * 0.489701 + 0.486182) * 0.860060),
            # 1.00 (1 - 2 exp(-4452.5/4163) + exp(-4500/4163)) exp(-95/2000)
            ("t2", "csf", 1.00 * (1 - 2 * 0.343169 + 0.339276) * 0.953610),
            # 0.83 (1 - 2 exp(-2420/1331) + 2 exp(-8940/1331) - exp(-9000/1331)) exp(-120/110)
            ("flair", "grey", 0.83 * (1 - 2 * 0.162331 + 2 * 0.001210 - 0.001157) * 0.335902),
        ],
    )
    def test_signal_by_hand(self, sequence: str, tissue: str, expected: float) -> None:
        """The equations give what a calculator gives."""
        assert SEQUENCES[sequence].signal(TISSUES[tissue]) == pytest.approx(expected, rel=1e-4)

    def test_contrast_between_tissues(self) -> None:
        """Each sequence ranks the tissues as in the clinic."""
        s = {q: {t: SEQUENCES[q].signal(TISSUES[t]) for t in TISSUES} for q in SEQUENCES}
        assert s["t1"]["white"] > s["t1"]["grey"] > s["t1"]["csf"]
        assert s["t2"]["csf"] > s["t2"]["oedema"] > s["t2"]["grey"] > s["t2"]["white"]
        assert s["flair"]["csf"] < 0.01 * s["flair"]["white"]
        assert s["flair"]["oedema"] > 1.4 * s["flair"]["grey"]

    def test_oedema_is_invisible_on_t1(self) -> None:
        """The truth that T1 and T1ce carry no evidence about oedema rests on this."""
        white, oedema = (SEQUENCES["t1"].signal(TISSUES[t]) for t in ("white", "oedema"))
        assert oedema == pytest.approx(white, rel=2e-4)

    def test_contrast_agent(self) -> None:
        """1/T1' = 1/1600 + 4.5e-3 * 0.5 per ms; the rim gets brighter on T1ce."""
        rim = TISSUES["rim"].with_contrast(0.5)
        assert rim.t1_ms == pytest.approx(1 / (1 / 1600 + 0.00225))
        assert rim.t2_ms == pytest.approx(1 / (1 / 140 + 0.00275))
        assert SEQUENCES["t1ce"].signal(rim) > 2 * SEQUENCES["t1ce"].signal(TISSUES["rim"])

    def test_scans_show_the_latents(self) -> None:
        """With the same anatomy and noise, one latent changes the sequences that depict it."""

        def scans(**latents: float):
            lesion = Lesion.from_latents({**dict.fromkeys(IMAGE_SEPARATION, 0.0), **latents})
            return render(lesion, np.random.default_rng(5), SIZE)

        base = scans()
        for latent, shown_on in {
            "enhancement": {"t1ce"},
            "oedema": {"t2", "flair"},
            "necrosis": set(SEQUENCES),
        }.items():
            other = scans(**{latent: 1.5})
            for name in SEQUENCES:
                # Rounding to whole numbers, and the oedema's last digit of proton density.
                change = np.abs(other.images[name].astype(int) - base.images[name]).max()
                assert (change > 20) == (name in shown_on), (latent, name, change)

    def test_lesion_is_nested(self) -> None:
        """Core in rim in oedema, in the brain, of about the volume that the radius says."""
        lesion = Lesion(
            radius_mm=16, core_mm=9, oedema_mm=10, oedema_fraction=0.8, contrast_millimolar=0.3
        )
        scans = render(lesion, np.random.default_rng(1), 48)
        labels = scans.lesion
        voxels = np.argwhere(labels > 0) @ scans.affine[:3, :3].T + scans.affine[:3, 3]
        distance_mm = np.linalg.norm(voxels - scans.centre_mm, axis=1)
        kind = labels[labels > 0]
        means = [distance_mm[kind == label].mean() for label in (3, 2, 1)]
        assert means == sorted(means)
        assert distance_mm.max() < 1.6 * (16 + 10)
        assert (scans.images["t1"][labels > 0] > 0).all()
        volume_ml = (labels >= 2).sum() * 4**3 / 1000
        assert volume_ml == pytest.approx(4 / 3 * math.pi * 1.6**3, rel=0.25)

    def test_degraded_scan_is_noisier(self) -> None:
        """Four times the noise in that scan and in no other."""
        lesion = Lesion(12, 5, 6, 0.5, 0.1)
        clean, noisy = (
            render(lesion, np.random.default_rng(2), SIZE, degraded) for degraded in ("", "flair")
        )
        assert np.array_equal(clean.images["t2"], noisy.images["t2"])
        assert noisy.images["flair"].std() > clean.images["flair"].std()

    @pytest.mark.parametrize("size", [33, 48])
    def test_grid(self, size: int) -> None:
        """The brain is inside the field of view at any size, where the affine says it is."""
        affine = grid_affine(size)
        middle = affine[:3, 3] + (192 / size) * (size - 1) / 2
        np.testing.assert_allclose(middle, (0, -18, 8))
        image = render(Lesion(12, 5, 6, 0.5, 0.1), np.random.default_rng(0), size).images["t1"]
        assert image.shape == (size,) * 3
        assert all((np.take(image, [0, -1], axis=axis) == 0).all() for axis in range(3))
        litres = (image > 0).sum() * (192 / size) ** 3 / 1e6
        assert 1.2 < litres < 2.0


class TestEvidence:
    """Latents, recorded cells and exact posteriors."""

    @pytest.mark.parametrize("name", [*IMAGE_SEPARATION, "age_years", "seizures", "sex"])
    def test_latents_separate_as_stated(self, drawn: list[Evidence], name: str) -> None:
        """AUROC of a latent is Phi(|d| / sqrt 2), where nothing contradicts."""
        (group,) = (g for g, names in GROUPS.items() if name in names)
        kept = [e for e in drawn if e.contradictory != group]
        column = TABLES[group][name] if group in TABLES else None
        separation = column.separation if column else IMAGE_SEPARATION[name]
        latents = np.array([e.latents[name] for e in kept])
        high = np.array([e.grade == 1 for e in kept])
        assert auroc(latents, high) == pytest.approx(norm.cdf(separation / math.sqrt(2)), abs=0.025)

    def test_shares(self, drawn: list[Evidence]) -> None:
        """Grade, contradiction, blanks and missing modalities come as often as stated."""
        high = np.array([e.grade == 1 for e in drawn])
        assert high.mean() == pytest.approx(0.5, abs=0.03)
        contradictory = Counter(e.contradictory for e in drawn)
        assert 1 - contradictory[""] / 4000 == pytest.approx(DEFAULT.contradictory, abs=0.015)
        assert set(contradictory) == {"", *GROUPS}
        cells = sum(len(columns) for columns in TABLES.values())
        blanks = sum(len(e.blank) for e in drawn) / (4000 * cells)
        assert blanks == pytest.approx(DEFAULT.blank, abs=0.01)
        lacking = np.array([bool(e.missing) for e in drawn])
        assert lacking.mean() == pytest.approx(0.3, abs=0.03)
        assert {len(e.missing) for e in drawn} == {0, 1, 2}
        assert lacking[high].mean() == pytest.approx(lacking[~high].mean(), abs=0.05)

    def test_posterior_by_enumeration(self, drawn: list[Evidence]) -> None:
        """Bayes' rule over both grades and the five ways to contradict gives the same number."""
        for evidence in drawn[:40]:
            for observed in (pieces(MODALITIES), evidence.observed(), pieces(["t2", "labs"])):
                joint = {}
                for grade in (0, 1):
                    scenarios = {"": 1 - DEFAULT.contradictory}
                    scenarios |= dict.fromkeys(GROUPS, DEFAULT.contradictory / len(GROUPS))
                    joint[grade] = sum(
                        share * self.likelihood(evidence, observed, grade, contradictory)
                        for contradictory, share in scenarios.items()
                    )
                expected = joint[1] / (joint[0] + joint[1])
                found = posterior_high(evidence.log_likelihood_ratios, observed)
                assert found == pytest.approx(expected, rel=1e-6)

    def likelihood(
        self, evidence: Evidence, observed: tuple[str, ...], grade: int, contradictory: str
    ) -> float:
        """Return the density of what is observed, each piece by itself."""
        result = 1.0
        for group, names in GROUPS.items():
            sign = (grade - 0.5) * (-1 if group == contradictory else 1)
            for name in names:
                if name not in observed:
                    continue
                latent = evidence.latents[name]
                if group == "scans":
                    result *= norm.pdf(latent, IMAGE_SEPARATION[name] * sign)
                else:
                    column = TABLES[group][name]
                    _, lower, upper = column.record(latent)
                    mean = column.separation * sign
                    result *= norm.cdf(upper, mean) - norm.cdf(lower, mean)
        return result

    def test_posterior_is_calibrated(self, drawn: list[Evidence]) -> None:
        """Among patients given 20-40 %, about 30 % have high grade, and so on."""
        posterior = np.array([posterior_high(e.log_likelihood_ratios, e.observed()) for e in drawn])
        high = np.array([e.grade == 1 for e in drawn])
        for low_end in (0.0, 0.2, 0.4, 0.6, 0.8):
            inside = (posterior >= low_end) & (posterior < low_end + 0.2)
            assert high[inside].mean() == pytest.approx(posterior[inside].mean(), abs=0.06)

    def test_posterior_never_sure(self) -> None:
        """Any group may contradict, so one group alone cannot make the grade certain."""
        ratios = {"enhancement": 50.0}
        assert posterior_high(ratios, ["enhancement"]) == pytest.approx(0.98)

    def test_recorded_text(self) -> None:
        """Rounding and the ends of the range widen the interval of latents behind a cell."""
        age = Measurement("years", (18, 95), 1, 55, 10, 1.0)
        assert age.record(0.52) == ("60", pytest.approx(0.45), pytest.approx(0.55))
        assert age.record(9.0) == ("95", pytest.approx(3.95), math.inf)
        crp = Measurement("mg/L", (0.2, 200), 0.1, 4.0, 0.9, 0.4, logarithmic=True)
        text, lower, upper = crp.record(1.0)
        assert text == "9.8"
        assert lower < 1.0 < upper
        assert Finding(("no", "yes"), 0.2, 0.5).record(0.3) == ("yes", 0.2, math.inf)

    def test_interval_ratio(self) -> None:
        """d z in a narrow interval, the ratio of tails at a threshold, finite far out."""
        assert interval_log_likelihood_ratio(0.999, 1.001, 0.7) == pytest.approx(0.7, abs=1e-5)
        above = math.log(norm.sf(0.2 - 0.25) / norm.sf(0.2 + 0.25))
        assert interval_log_likelihood_ratio(0.2, math.inf, 0.5) == pytest.approx(above)
        assert interval_log_likelihood_ratio(9.0, math.inf, 1.0) == pytest.approx(9.1, abs=0.1)
        assert interval_log_likelihood_ratio(-math.inf, -9.0, 1.0) == pytest.approx(-9.1, abs=0.1)


class TestFiles:
    """What is on disk."""

    def test_layout(self, cohort: Path) -> None:
        """A patient directory holds only what a hospital holds, and the lesion outlined."""
        assert {p.name for p in cohort.iterdir()} == {
            "cohort-segmentation.yaml",
            "cohort-survival.yaml",
            "cohort.yaml",
            "labels.csv",
            "patients",
            "splits.csv",
            "survival-truth.csv",
            "survival.csv",
            "truth",
            "truth.csv",
        }
        assert [p.name for p in cohort.parent.iterdir()] == ["cohort"]
        for row in rows(cohort / "truth.csv"):
            expected = {f"{s}.nii.gz" for s in SEQUENCES if s not in row["missing"].split()}
            found = {p.name for p in (cohort / "patients" / row["record_id"]).iterdir()}
            assert found == expected | {"ehr.csv", "seg.nii.gz"}
            lesion = nib.load(cohort / "truth" / row["record_id"] / "lesion.nii.gz")
            mask = nib.load(cohort / "patients" / row["record_id"] / "seg.nii.gz")
            assert np.array_equal(mask.affine, lesion.affine)
            labels = np.asarray(lesion.dataobj)  # 1 oedema, 2 rim, 3 core
            assert np.array_equal(np.asarray(mask.dataobj), np.choose(labels, [0, 2, 4, 1]))

    def test_description(self, cohort: Path) -> None:
        """`cohort.yaml` reads back as it was meant."""
        description = yaml.safe_load((cohort / "cohort.yaml").read_text(encoding="utf-8"))
        assert description == cohort_description(SIZE)
        assert list(description["modalities"]) == list(MODALITIES)
        assert description["modalities"]["flair"]["spacing_mm"] == [8.0, 8.0, 8.0]

    def test_images(self, cohort: Path) -> None:
        """Shape, type, affine and units are those of the description."""
        image = nib.load(cohort / "truth" / "s3-p0000" / "lesion.nii.gz")
        assert image.shape == (SIZE,) * 3
        path = next((cohort / "patients").rglob("t1.nii.gz"))
        image = nib.load(path)
        assert image.get_data_dtype() == np.int16
        assert image.header.get_zooms() == (8, 8, 8)
        assert image.header.get_xyzt_units()[0] == "mm"
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        np.testing.assert_allclose(image.affine, grid_affine(SIZE))
        np.testing.assert_allclose(image.header.get_qform(), image.affine, atol=1e-4)

    def test_tables(self, cohort: Path) -> None:
        """Cells are blank where the truth says so, and otherwise in range or a known category."""
        columns = {name: c for table in TABLES.values() for name, c in table.items()}
        for truth in rows(cohort / "truth.csv"):
            (row,) = rows(cohort / "patients" / truth["record_id"] / "ehr.csv")
            blank = {*truth["blank"].split(), *pieces(set(truth["missing"].split()) & set(TABLES))}
            assert list(row) == list(columns)
            assert {name for name, text in row.items() if text == ""} == blank
            for name in set(row) - blank:
                column = columns[name]
                if isinstance(column, Finding):
                    assert row[name] in column.values
                else:
                    assert column.range[0] <= float(row[name]) <= column.range[1]

    def test_truth_matches_labels(self, cohort: Path) -> None:
        """Labels are the truth's grades, and its posteriors those of its own ratios."""
        labels = {row["record_id"]: row["grade"] for row in rows(cohort / "labels.csv")}
        for row in rows(cohort / "truth.csv"):
            assert labels[row["record_id"]] == row["grade"]
            ratios = {n: float(row[f"llr_{n}"]) for n in pieces(MODALITIES)}
            for name in MODALITIES:
                expected = posterior_high(ratios, pieces([name]))
                assert float(row[f"posterior_{name}"]) == pytest.approx(expected, rel=1e-3)

    def test_same_seed_same_bytes(self, cohort: Path, tmp_path: Path) -> None:
        """A seed fixes every byte; an empty folder may be filled; another seed differs."""
        again = tmp_path / "again"
        again.mkdir()
        simulate(again, 12, seed=3, size=SIZE)
        assert hashes(again) == hashes(cohort)
        other = hashes(simulate(tmp_path / "other", 1, seed=4, size=SIZE))
        ehr = "patients/s4-p0000/ehr.csv"
        assert other[ehr] != hashes(cohort)[ehr.replace("s4", "s3")]

    def test_a_patient_does_not_depend_on_the_others(self, cohort: Path, tmp_path: Path) -> None:
        """The first patients of a larger cohort are those of a smaller one."""
        few, many = hashes(simulate(tmp_path / "few", 3, seed=3, size=SIZE)), hashes(cohort)
        shared = [name for name in few if name.startswith(("patients/", "truth/"))]
        assert len(shared) > 9
        assert all(few[name] == many[name] for name in shared)
        assert rows(tmp_path / "few" / "truth.csv") == rows(cohort / "truth.csv")[:3]

    def test_evidence_does_not_depend_on_size(self, cohort: Path, tmp_path: Path) -> None:
        """The same patients at another resolution have the same tables."""
        simulate(tmp_path / "small", 2, seed=3, size=16)
        ehr = Path("patients") / "s3-p0001" / "ehr.csv"
        assert (tmp_path / "small" / ehr).read_bytes() == (cohort / ehr).read_bytes()

    def test_splits(self, cohort: Path) -> None:
        """Each patient has one split."""
        patients = [row["patient_id"] for row in rows(cohort / "splits.csv")]
        assert patients == [row["patient_id"] for row in rows(cohort / "labels.csv")]
        assert len(set(patients)) == len(patients) == 12

    def test_splits_are_stratified(self) -> None:
        """Every split has its share of each grade."""
        grades = [0] * 60 + [1] * 100
        splits = np.array(assign_splits(grades, seed=1))
        for grade, expected in ((0, [30, 6, 9, 15]), (1, [50, 10, 15, 25])):
            counts = Counter(splits[np.array(grades) == grade].tolist())
            names = ("train", "validation", "calibration", "test")
            assert [counts[n] for n in names] == expected

    def test_progress(self, tmp_path: Path) -> None:
        """Progress counts up to the number of patients."""
        seen: list[tuple[int, int]] = []
        simulate(tmp_path / "out", 2, size=16, progress=lambda *step: seen.append(step))
        assert seen == [(1, 2), (2, 2)]

    def test_missing(self, tmp_path: Path) -> None:
        """Everyone lacks something at 1, no one at 0, and nothing else about them changes."""
        all_lack = simulate(tmp_path / "all", 4, size=16, missing=1.0)
        none_lack = simulate(tmp_path / "none", 4, size=16, missing=0.0)
        for a, b in zip(rows(all_lack / "truth.csv"), rows(none_lack / "truth.csv"), strict=True):
            assert a["missing"]
            assert not b["missing"]
            assert a["posterior_all"] == b["posterior_all"]
            assert a["centre_x_mm"] == b["centre_x_mm"]


class TestRefusal:
    """Wrong requests are refused before anything is written."""

    def test_folder_in_use(self, tmp_path: Path) -> None:
        """A folder with something in it is left alone."""
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ConfigError, match="not empty") as caught:
            simulate(tmp_path, 1, size=16)
        assert caught.value.exit_code == 2
        assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]

    def test_numbers_out_of_range(self, tmp_path: Path) -> None:
        """All problems are listed at once."""
        with pytest.raises(ConfigError) as caught:
            simulate(tmp_path / "out", patients=0, seed=-1, size=4, missing=2)
        assert len(caught.value.problems) == 4
        assert not (tmp_path / "out").exists()

    def test_file_in_the_way(self, tmp_path: Path) -> None:
        """A path below a file cannot be a cohort."""
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="cannot be made"):
            simulate(tmp_path / "file" / "out", 1, size=16)

    def test_nothing_is_left_after_a_failure(self, tmp_path: Path) -> None:
        """An interruption leaves neither half a cohort nor a scratch folder."""

        def interrupt(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            simulate(tmp_path / "out", 2, size=16, progress=interrupt)
        assert list(tmp_path.iterdir()) == []
