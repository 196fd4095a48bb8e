"""The quality gate: what passes, what is warned of, what is refused."""

import csv
import dataclasses
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from dymo_med.bundle import load_bundle, save_bundle
from dymo_med.config import Strict
from dymo_med.data.cohort import read_cohort
from dymo_med.data.gate import CHECKS, FEWEST, Limits, fit_norms, judge, measure
from dymo_med.data.patient import examine, read_patient
from dymo_med.demo import shipped_bundle
from dymo_med.errors import ConfigError, PatientDataError, RefusedError
from dymo_med.inference.audit import audit
from dymo_med.inference.evaluate import evaluate
from dymo_med.inference.predict import predict_patient
from dymo_med.inference.prediction_file import read_prediction
from dymo_med.inference.recovered import impute_patient
from dymo_med.inference.report import words
from dymo_med.modalities import modality
from dymo_med.modalities.native import native, otsu
from dymo_med.types import Column, ModalitySpec, ModalityValue, Native, Norms, Source

SPEC = ModalitySpec("t1", "image", "t1.nii.gz", (1, 48, 48, 48), (4.0,) * 3, "zscore")
SCAN = Native((180, 200, 160), (1.0, 1.0, 1.0), 2.0, 0.0, 20.0, 400.0, 256, 0.3, 0.95)
USUAL = {
    "tilt": (0.0, 5.0),
    "body": (0.2, 0.4),
    "low": (0.0, 5.0),
    "width": (300.0, 600.0),
    "balance": (0.02, 0.2),
    "levels": (200.0, 256.0),
    "structure": (0.9, 0.99),
    **{f"voxel_mm.{a}": (0.9, 1.2) for a in range(3)},
    **{f"extent_mm.{a}": (150.0, 220.0) for a in range(3)},
}
NORMS = Norms(ranges={"t1": USUAL}, records={"t1": 100})


def value(scan=SCAN, **changes):
    scan = dataclasses.replace(scan, **changes)
    return ModalityValue(torch.zeros(1, 2, 2, 2), Source("t1.nii.gz", "0" * 64), native=scan)


def found(norms=NORMS, spec=SPEC, **changes):
    result = judge(spec, value(**changes), norms)
    return {finding.check: finding.level for finding in result.findings}


@pytest.mark.parametrize("norms", [NORMS, None])
def test_a_usual_scan_passes(norms):
    result = judge(SPEC, value(), norms)
    assert result.state == "pass" and not result.findings


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Finer than the grid of 4 mm: coarser voxels that still reach it lose nothing.
        ({"spacing_mm": (1.0, 1.0, 3.9), "size": (180, 200, 40)}, {}),
        ({"spacing_mm": (1.0, 1.0, 7.0), "size": (180, 200, 24)}, {"resolution": "warn"}),
        ({"spacing_mm": (20.0,) * 3, "size": (9, 10, 8)}, {"resolution": "refuse"}),
        ({"size": (180, 200, 110)}, {"field_small": "warn"}),
        ({"size": (180, 200, 40)}, {"field_small": "refuse"}),
        ({"size": (180, 200, 500)}, {"field_large": "warn"}),
        ({"size": (1800, 2000, 1600)}, {"field_large": "refuse"}),
        ({"tilt_degrees": 30.0}, {"tilt": "warn"}),
        ({"foreground": 0.0005}, {"empty": "refuse"}),
        ({"foreground": 0.9995}, {"empty": "refuse"}),
        ({"foreground": 0.05}, {"body": "warn"}),
        ({"foreground": 0.01}, {"body": "refuse"}),
        ({"high": 4000.0, "middle": 300.0}, {"contrast": "warn"}),
        ({"low": -300.0, "middle": -280.0}, {"offset": "warn"}),
        ({"middle": 350.0}, {"balance": "warn"}),
        ({"structure": 0.1}, {"noise": "warn"}),
        ({"structure": 0.01}, {"noise": "refuse"}),
        ({"levels": 2}, {"mask": "refuse"}),
    ],
)
def test_against_training_scans(changes, expected):
    assert found(**changes) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # The grid of 192 mm in steps of 4 mm stands in for training scans.
        ({"spacing_mm": (1.0, 1.0, 7.0), "size": (180, 200, 24)}, {}),
        ({"spacing_mm": (20.0,) * 3, "size": (9, 10, 8)}, {"resolution": "warn"}),
        ({"spacing_mm": (80.0,) * 3, "size": (3, 3, 3)}, {"resolution": "refuse"}),
        ({"size": (180, 200, 60)}, {"field_small": "warn"}),
        ({"size": (20, 20, 20)}, {"field_small": "refuse"}),
        ({"size": (1800, 2000, 1600)}, {"field_large": "warn"}),
        ({"foreground": 0.01, "high": 4000.0, "middle": 3000.0}, {}),
        ({"foreground": 0.0005}, {"empty": "refuse"}),
        ({"structure": 0.01}, {"noise": "refuse"}),
        ({"levels": 2}, {"mask": "warn"}),
    ],
)
@pytest.mark.parametrize("norms", [None, Norms(records={"t1": 3})])
def test_where_training_scans_are_not_known(norms, changes, expected):
    assert found(norms, **changes) == expected


def test_intensities_are_refused_only_where_the_network_sees_them():
    raw = dataclasses.replace(SPEC, intensity="none")
    changes = {"high": 40_000.0, "middle": 3000.0}
    assert found(spec=raw, **changes) == {"contrast": "refuse"}
    assert found(**changes) == {"contrast": "warn"}


def test_a_picture_goes_by_its_pixels_and_proportions():
    spec = ModalitySpec("film", "image", "film.png", (1, 64, 64), (), "percentile")
    film = Native((200, 100), None, 0.0, 0.0, 20.0, 250.0, 256, 0.3, 0.95)
    usual = {k: v for k, v in USUAL.items() if not k.endswith(("0", "1", "2"))}
    usual |= {"pixels": (180.0, 400.0), "shape": (1.0, 2.0)}
    norms = Norms(ranges={"film": usual})
    assert found(norms, spec, **dataclasses.asdict(film)) == {}
    for size, expected in (
        ((40, 30), {"resolution": "warn"}),
        ((12, 8), {"resolution": "refuse"}),
        ((400, 80), {"shape": "warn"}),
    ):
        changed = {**dataclasses.asdict(film), "size": size}
        assert found(norms, spec, **changed) == expected


LABS = ModalitySpec(
    "labs",
    "table",
    "ehr.csv",
    (5,),
    columns=(
        *(Column(n, "continuous", mean=10.0, std=2.0) for n in ("a", "b", "c", "d")),
        Column("sex", "categorical", values=("F", "M"), frequencies=(0.5, 0.5)),
    ),
)


@pytest.mark.parametrize(
    ("cells", "state", "columns"),
    [
        ([10, 11, 9, 17, 1], "pass", ""),
        ([10, 11, 9, 19, 1], "warn", "d"),
        ([100, 110, 90, 10, 1], "refuse", "a, b, c"),
        ([100, None, 90, 10, 1], "warn", "a, c"),  # too few numbers to refuse the table
    ],
)
def test_cells_far_from_those_of_training_patients(cells, state, columns):
    filled = torch.tensor([c is not None for c in cells])
    row = torch.tensor([0.0 if c is None else float(c) for c in cells])
    result = judge(LABS, ModalityValue(row, Source("ehr.csv", "0" * 64), filled))
    assert result.state == state
    assert [f.got for f in result.findings] == [columns] * bool(columns)


def test_a_table_with_hardly_a_cell_is_a_warning():
    filled = torch.tensor([True, False, False, False, False])
    sparse = ModalityValue(torch.full((5,), 10.0), Source("ehr.csv", "0" * 64), filled)
    norms = Norms(ranges={"labs": {"filled": (0.6, 1.0)}})
    assert judge(LABS, sparse, norms).state == "warn"
    assert judge(LABS, sparse, None).state == "pass"


def test_limits_can_be_moved():
    scan = {"spacing_mm": (1.0, 1.0, 7.0), "size": (180, 200, 24)}
    assert found(dataclasses.replace(NORMS, limits={"coarser_warn": 2.0}), **scan) == {}
    assert found(dataclasses.replace(NORMS, limits={"coarser_refuse": 1.6}), **scan) == {
        "resolution": "refuse"
    }


def test_a_cohort_sets_limits_and_unknown_ones_are_errors(cohort_dir, tmp_path):
    copy = tmp_path / "cohort"
    shutil.copytree(cohort_dir, copy)
    text = (copy / "cohort.yaml").read_text()
    (copy / "cohort.yaml").write_text(text + "quality: {coarser_warn: 2.0}\n")
    assert read_cohort(copy).quality == {"coarser_warn": 2.0}
    (copy / "cohort.yaml").write_text(text + "quality: {corser_warn: 2.0, body_warn: 0.5}\n")
    with pytest.raises(ConfigError) as caught:
        read_cohort(copy)
    message = str(caught.value)
    assert "coarser_warn" in message and "quality.body_warn" in message


def test_every_limit_and_check_is_explained():
    assert issubclass(Limits, Strict)
    for name in Limits.model_fields:
        assert f"        {name}: " in (Limits.__doc__ or ""), name
    assert set(words()["gate"]["checks"]) == set(CHECKS)


# --- What is measured -----------------------------------------------------------------------------


def test_otsu_parts_two_peaks_in_the_middle():
    values = np.concatenate([np.full(900, 2.0), np.full(100, 10.0)])
    assert otsu(values) == pytest.approx(6, abs=0.1)


def test_native_measures_follow_the_body_not_the_file():
    rng = np.random.default_rng(0)
    ball = (
        np.linalg.norm(
            np.indices((20, 30, 40)) - np.array([10, 15, 20])[:, None, None, None], axis=0
        )
        < 8
    )
    scan = (100 * ball + rng.normal(0, 3, ball.shape)).astype(np.float32)
    straight = native(scan[None], np.diag([3.0, 2.0, 1.0, 1.0]))
    # The same scan stored head first and mirrored.
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = -1.0, 3.0, 2.0, 1.0
    turned = native(np.ascontiguousarray(scan.transpose(2, 0, 1)[::-1])[None], affine)
    assert turned.size == straight.size == (20, 30, 40)
    assert turned.spacing_mm == straight.spacing_mm == (3.0, 2.0, 1.0)
    assert turned.foreground == straight.foreground == pytest.approx(ball.mean(), abs=1e-3)
    assert straight.structure > 0.8 and straight.tilt_degrees == 0
    noise = native(rng.normal(size=(1, 30, 30, 30)).astype(np.float32), np.eye(4))
    assert abs(noise.structure) < 0.05
    c, s = np.cos(np.radians(12)), np.sin(np.radians(12))
    tilted = np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]])
    assert native(scan[None], tilted).tilt_degrees == pytest.approx(12)


def test_norms_need_enough_records_and_hold_percentiles(cohort, records):
    assert fit_norms(cohort.specs, records[: FEWEST - 1]).ranges == {}
    many = [records[0]] * 98 + [records[2]]
    norms = fit_norms(cohort.specs, many, {"coarser_warn": 2.0})
    assert norms.records["t1"] == 99 and norms.limits == {"coarser_warn": 2.0}
    usual = measure(records[0].modalities["t1"])
    low, high = norms.ranges["t1"]["voxel_mm.2"]
    assert low == high == usual["voxel_mm.2"] == 3.0


# --- The line from the folder to the report -------------------------------------------------------


def scan_like(folder, name, change):
    path = folder / f"{name}.nii.gz"
    image = nib.load(path)
    data, affine = change(np.asarray(image.dataobj), image.affine.copy())
    nib.save(nib.Nifti1Image(data, affine), path)


def constant(data, affine):
    return np.full_like(data, 7), affine


def empty(data, affine):
    speck = np.zeros_like(data)
    speck[0, 0, :2] = 9, 7
    return speck, affine


def tiny(data, affine):
    first = np.array(data.shape) // 2 - 3
    affine[:3, 3] += affine[:3, :3] @ first
    return data[tuple(slice(n, n + 6) for n in first)], affine


def coarse(data, affine):
    affine[:3, :3] *= 20
    return data[::20, ::20, ::20], affine


def noise(data, affine):
    return np.random.default_rng(0).normal(100, 20, data.shape).astype(np.float32), affine


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    from dymo_med.data.simulate import simulate

    return simulate(tmp_path_factory.mktemp("gate") / "cohort", patients=8, seed=77)


@pytest.fixture(scope="module")
def shipped():
    return load_bundle(shipped_bundle(), "cpu")


@pytest.fixture
def patient(simulated, shipped, tmp_path):
    """A copy of a complete patient of the simulated cohort."""
    for entry in read_cohort(simulated).records:
        record = read_patient(entry.folder, shipped.specs, norms=shipped.norms)
        if len(record.modalities) == len(shipped.specs):
            return shutil.copytree(entry.folder, tmp_path / entry.record_id)
    raise AssertionError("no patient is complete")


def test_new_patients_of_the_same_cohort_are_not_refused(simulated, shipped):
    for entry in read_cohort(simulated).records:
        result = examine(entry.folder, shipped.specs, norms=shipped.norms)
        assert not result.refusals
        assert all(r.state == "pass" for n, r in result.results.items() if n != "labs")


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (constant, "constant"),
        (empty, "empty"),
        (tiny, "field_small"),
        (coarse, "resolution"),
        (noise, "noise"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(patient, shipped, change, check):
    scan_like(patient, "flair", change)
    with pytest.raises(RefusedError) as caught:
        read_patient(patient, shipped.specs, norms=shipped.norms)
    assert caught.value.exit_code == 3 and check in caught.value.checks
    for problem in caught.value.problems:
        assert "flair.nii.gz" in problem.where and problem.got + problem.expected
        assert "--treat-refused-as-missing" in problem.remedy
    left = read_patient(patient, shipped.specs, norms=shipped.norms, treat_refused_as_missing=True)
    assert "flair" not in left.modalities and left.refused["flair"].state == "refuse"


def test_an_unreadable_file_is_never_treated_as_missing(patient, shipped):
    (patient / "flair.nii.gz").write_bytes(b"nothing")
    scan_like(patient, "t1", constant)
    with pytest.raises(PatientDataError) as caught:
        read_patient(patient, shipped.specs, norms=shipped.norms, treat_refused_as_missing=True)
    assert not isinstance(caught.value, RefusedError)
    text = str(caught.value)
    assert "flair.nii.gz" in text and "t1.nii.gz" in text


def test_nothing_is_left_when_all_is_refused(patient, shipped):
    for name in ("t1", "t1ce", "t2", "flair"):
        scan_like(patient, name, constant)
    (patient / "ehr.csv").unlink()
    with pytest.raises(PatientDataError, match="nothing was observed"):
        read_patient(patient, shipped.specs, norms=shipped.norms, treat_refused_as_missing=True)


def cropped(data, affine):
    return data[:, :, : 2 * data.shape[2] // 3], affine


def test_the_report_says_what_was_refused_and_warned_of(patient, shipped, tmp_path):
    scan_like(patient, "flair", constant)
    scan_like(patient, "t2", cropped)
    with pytest.raises(RefusedError):
        predict_patient(patient, shipped, tmp_path / "not")
    assert not (tmp_path / "not").exists()
    out = tmp_path / "out"
    given = {"explain": False, "draws": 0, "treat_refused_as_missing": True}
    prediction = predict_patient(patient, shipped, out, **given)
    assert prediction.refused == ("flair",) and "flair" in prediction.recovered
    file = read_prediction(out / "prediction.json")
    assert file.quality["flair"].state == "refuse" and file.quality["t2"].state == "warn"
    assert file.quality["t1"].state == "pass"
    reasons = [(r.code, r.values["modality"]) for r in file.status_reasons if "check" in r.values]
    assert reasons[0] == ("refused", "flair") and ("quality", "t2") in reasons
    assert file.status != "answered"
    assert "--treat-refused-as-missing" in file.command
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "flair was brought but refused and treated as missing" in page
    assert words()["gate"]["checks"]["field_small"] in page
    assert words()["gate"]["checks"]["constant"] + "." in page
    assert not audit(out).problems
    data = json.loads((out / "prediction.json").read_text(encoding="utf-8"))
    data["quality"]["t2"]["state"] = "pass"
    (out / "prediction.json").write_text(json.dumps(data), encoding="utf-8")
    assert any("quality, t2" in p.where for p in audit(out).problems)
    written = impute_patient(patient, shipped, tmp_path / "imputed", treat_refused_as_missing=True)
    assert any("flair" in path.name for path in written)
    about = json.loads((tmp_path / "imputed" / "recovered" / "recovered.json").read_text())
    assert about["refused"] == ["flair"]


def test_evaluate_lists_what_the_gate_says(simulated, shipped, tmp_path, plain):
    cohort = tmp_path / "cohort"
    shutil.copytree(simulated, cohort)
    first, *_ = read_cohort(cohort).in_split("train")
    scan_like(first.folder, "t1", constant)
    described = read_cohort(cohort)
    scenarios = ("as-is", "drop:flair")

    def rows(name):
        with (tmp_path / name).open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream))

    given = {"split": "train", "scenarios": scenarios, "reports": 0}
    refused = evaluate(shipped, described, tmp_path / "strict", **given)
    assert refused.failures == 1
    (failure,) = rows("strict/failures.csv")
    assert (failure["record_id"], failure["stage"]) == (first.record_id, "gate")
    assert "every voxel has the same value" in failure["message"]
    strict = rows("strict/quality.csv")
    about = {(r["record_id"], r["modality"]): r for r in strict}
    assert len(about) == len(strict)  # once, not once per scenario
    assert about[first.record_id, "t1"]["state"] == "refuse"
    assert about[first.record_id, "t1"]["check"] == "constant"
    assert about[first.record_id, "t2"] | {"expected": ""} == {
        "record_id": first.record_id, "modality": "t2", "state": "pass",
        "check": "", "got": "", "expected": "",
    }  # fmt: skip
    kind = {"treat_refused_as_missing": True}
    done = evaluate(shipped, described, tmp_path / "kind", **given, **kind)
    assert done.failures == 0 and rows("kind/quality.csv") == strict
    answered = {r["record_id"]: r for r in rows("kind/predictions.csv") if r["method"] == "dymo"}
    assert "t1" not in answered[first.record_id]["observed"].split("+")
    with pytest.raises(ConfigError, match="treatment of refused"):
        evaluate(shipped, described, tmp_path / "kind", resume=True, **given)
    for part in (1, 0):
        shared = {"num_parts": 2, "part_id": part, "batch_size": 1}
        evaluate(shipped, described, tmp_path / "parts", **given, **kind, **shared)
    assert rows("parts/quality.csv") == strict


def test_a_bundle_keeps_what_training_scans_were_like(bundle, shipped, tmp_path):
    assert bundle.norms is not None and not bundle.norms.ranges  # too few records
    assert set(shipped.norms.ranges) == {spec.name for spec in shipped.specs}
    limited = dataclasses.replace(shipped.norms, limits={"coarser_warn": 2.0})
    save_bundle(dataclasses.replace(shipped, norms=limited), tmp_path / "copy")
    assert load_bundle(tmp_path / "copy", "cpu").norms == limited
    assert modality(shipped.specs[0]).spec == shipped.specs[0]
