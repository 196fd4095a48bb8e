"""Saliency of the shipped bundle against lesions that are known (benchmarks/explain.py)."""

import nibabel as nib
import numpy as np
import pytest

from dymo_med.bundle import load_bundle
from dymo_med.data.cohort import read_cohort
from dymo_med.data.patient import read_patient
from dymo_med.data.simulate import simulate
from dymo_med.demo import shipped_bundle
from dymo_med.inference.answer import answer, explain_record


@pytest.mark.slow
def test_saliency_gathers_in_the_lesion(tmp_path):
    """By chance the ratio is 1; over 149 patients it is 4.9 on average, standard deviation 2.7."""
    bundle = load_bundle(shipped_bundle(), "cpu")
    cohort = read_cohort(simulate(tmp_path / "c", patients=8, seed=78))
    ratios = []
    for entry in cohort.records:
        answers = answer(bundle, [read_patient(entry.folder, bundle.specs)])
        saliency = explain_record(bundle, answers, 0, seed=0).saliency
        file = cohort.root / "truth" / entry.record_id / "lesion.nii.gz"
        lesion = np.asarray(nib.as_closest_canonical(nib.load(file)).dataobj) > 0
        heat = sum(m.abs().numpy() for m in saliency.maps.values())
        body = np.any([answers.batch.values[n][0, 0].numpy() != 0 for n in saliency.maps], axis=0)
        share = heat[lesion & body].sum() / heat[body].sum()
        ratios.append(share / (lesion & body).sum() * body.sum())
    assert np.mean(ratios) > 2, ratios
