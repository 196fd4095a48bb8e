#!/usr/bin/env bash
# MedPy 0.5.2, SimpleITK 2.5.7, pymia 0.3.4 and ANTsPy (antspyx) 0.6.3: Dice and distance of two
# masks that are both empty.
#
# Expected: one answer, and the same one within a library: NaN, or 1 with a distance of 0.
# Found: Dice is 1 in MedPy and pymia, infinite in SimpleITK for the image and 0 for its label 1,
#   and infinite in ANTsPy, whose other measures are the largest float. pymia calls the same pair
#   perfect (Dice 1) and infinitely far apart; MedPy's precision is 0 at a Dice of 1.
# Who meets it: patients without a lesion. One of them makes the mean infinite, or lifts it, by the
#   library.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check medpy==0.5.2 SimpleITK==2.5.7 \
    pymia==0.3.4 antspyx==0.6.3 numpy==1.26.4 scipy==1.15.3
venv/bin/python - <<'PY'
import sys
import warnings

import ants
import numpy as np
import SimpleITK as sitk
from medpy.metric import binary
from pymia.evaluation.evaluator import SegmentationEvaluator
from pymia.evaluation.metric import DiceCoefficient, HausdorffDistance

warnings.simplefilter("ignore")
sitk.ProcessObject.GlobalWarningDisplayOff()
empty = np.zeros((8, 8, 8), np.uint8)
image = sitk.GetImageFromArray(empty)
overlap = sitk.LabelOverlapMeasuresImageFilter()
overlap.Execute(image, image)
evaluator = SegmentationEvaluator([DiceCoefficient(), HausdorffDistance(percentile=95)], {1: "lesion"})
evaluator.evaluate(image, image, "patient")
pymia = [float(result.value) for result in evaluator.results]
scan = ants.from_numpy(empty.astype(np.float32))
table = ants.label_overlap_measures(scan, scan).iloc[0]
seen = {
    "MedPy: Dice": binary.dc(empty, empty),
    "MedPy: precision": binary.precision(empty, empty),
    "SimpleITK: Dice": overlap.GetDiceCoefficient(),
    "SimpleITK: Dice of label 1": overlap.GetDiceCoefficient(1),
    "pymia: Dice": pymia[0],
    "pymia: HD95": pymia[1],
    "ANTsPy: Dice (MeanOverlap)": float(table["MeanOverlap"]),
    "ANTsPy: Jaccard (UnionOverlap)": float(table["UnionOverlap"]),
}
for what, value in seen.items():
    print(f"{what} = {value:g}")
inf = float("inf")
same = list(seen.values())[:7] == [1.0, 0.0, inf, 0.0, 1.0, inf, inf]
sys.exit(0 if same and seen["ANTsPy: Jaccard (UnionOverlap)"] > 1e308 else "the behaviour has changed")
PY
