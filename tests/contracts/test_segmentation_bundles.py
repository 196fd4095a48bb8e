"""What a segmentation bundle holds besides its network is checked, and taken as it was stored."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dymo_med.bundle import checksums_of
from dymo_med.bundle_segmentation import load_segmentation_bundle
from dymo_med.data.patient import read_patient
from dymo_med.errors import BundleError
from dymo_med.inference.segment import segment_record
from dymo_med.selection import SELECTORS


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the segmentation bundle, to be spoilt."""
    made = tiny.bundle("segmentation", "shared_unet", "synthesis")
    return shutil.copytree(made, tmp_path / "bundle")


def signed(folder):
    (folder / "checksums.json").write_text(json.dumps(checksums_of(folder)))
    return folder


def with_statistics(folder, change):
    path = folder / "models" / "statistics.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return signed(folder)


SPOILT = {
    "not a number": lambda t: t["prototypes"].fill_(torch.nan),
    "infinite": lambda t: t["readout.mean"].fill_(torch.inf),
    "another shape": lambda t: t.update(overall=t["overall"][:, :-1]),
    "another type": lambda t: t.update(counts=t["counts"].float()),
    "of other modalities": lambda t: t.update(subsets=t["subsets"][:, :1]),
    "one is gone": lambda t: t.pop("spread"),
    "a readout is gone": lambda t: t.pop("readout.std"),
    "one too many": lambda t: t.update(more=t["spread"].clone()),
    "leads nowhere": lambda t: t["borrowed_from"].fill_(10_000),
    "a readout of another network": lambda t: t.update({"readout.std": t["readout.std"][:-1]}),
    "other classes": lambda t: t.update({"readout.centres": t["readout.centres"][:-1]}),
}


@pytest.mark.parametrize("case", SPOILT)
def test_statistics_that_cannot_be_right_are_refused(folder, case):
    with_statistics(folder, SPOILT[case])
    with pytest.raises(BundleError, match=r"statistics\.safetensors: the tensors are not those"):
        load_segmentation_bundle(folder, "cpu")


@pytest.mark.parametrize("key", ["spread", "voxel_ml"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_readout_that_cannot_be_right_is_refused(folder, key, value):
    with_statistics(folder, lambda t: t[f"readout.{key}"].fill_(value))
    with pytest.raises(BundleError, match="does not fit this version"):
        load_segmentation_bundle(folder, "cpu")


def test_selectors_keep_the_options_they_were_made_with(tiny, folder, tmp_path):
    bundle = load_segmentation_bundle(folder, "cpu")
    kind = SELECTORS["dymo"]
    options = kind.Options(temperature=7.0)
    trust = replace(bundle.trust, selectors={**bundle.trust.selectors, "dymo": kind(options)})
    replace(bundle, trust=trust).save(tmp_path / "other")
    again = load_segmentation_bundle(tmp_path / "other", "cpu")
    assert again.trust.selectors["dymo"].options == options != kind.Options()
    assert bundle.trust.selectors["dymo"].options == kind.Options()
    record = read_patient(tiny.patients / "p17", again.specs)
    one, two = (segment_record(b, record, methods=["dymo"]).traces["dymo"] for b in (bundle, again))
    assert not torch.equal(one.reward, two.reward)  # they are used, and not made anew


def test_bundles_of_before_have_the_defaults(folder):
    path = folder / "configs" / "selectors.json"
    stored = json.loads(path.read_text())
    stored["entries"] = list(stored["entries"])
    path.write_text(json.dumps(stored))
    trust = load_segmentation_bundle(signed(folder), "cpu").trust
    assert trust.selectors["dymo"].options == SELECTORS["dymo"].Options()
