"""Scans from scans: what is learned, what is never looked at, and that windows leave no seams."""

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from torch.nn import functional as F

from dymo_med.bundle import load_bundle
from dymo_med.config import Document, Recipe
from dymo_med.data.batch import collate
from dymo_med.data.patient import read_patient
from dymo_med.errors import ConfigError
from dymo_med.imputers import require_recovery
from dymo_med.imputers.synthesis import Synthesis, random_proper_subsets
from dymo_med.imputers.template import Template
from dymo_med.inference.predict import predict_patient
from dymo_med.inference.recovered import impute_patient
from dymo_med.types import Batch, Column, ModalityMask, ModalitySpec

NAMES = ("a", "b", "c")
SUBSETS = [s for s in torch.cartesian_prod(*[torch.tensor([False, True])] * 3) if 0 < s.sum() < 3]


def scan(name, shape, intensity="zscore"):
    spacing = (1.0,) * 3 if len(shape) == 4 else ()
    return ModalitySpec(name, "image", f"{name}.nii.gz", shape, spacing, intensity)


def build(specs, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"width": 4, "levels": 1, "patch": 8} | options
    return Synthesis(specs, Synthesis.Options(**sizes))


def batch_of(specs, values, available=None):
    n = len(next(iter(values.values())))
    if available is None:
        available = torch.ones(n, len(specs), dtype=torch.bool)
    ids = tuple(map(str, range(n)))
    mask = ModalityMask(tuple(s.name for s in specs), available)
    return Batch(ids, ids, values, mask, {}, torch.zeros(n, dtype=torch.int64))


def random_batch(specs, n=3, seed=0, available=None):
    g = torch.Generator().manual_seed(seed)
    values = {s.name: torch.randn(n, *s.shape, generator=g) for s in specs}
    return batch_of(specs, values, available)


def showing(batch, *names):
    """The same batch, of which only some scans are there; the others are NaN."""
    keep = torch.tensor([n in names for n in batch.observed.names]).expand(len(batch), -1)
    values = {
        n: v if n in names else torch.full_like(v, torch.nan) for n, v in batch.values.items()
    }
    mask = ModalityMask(batch.observed.names, keep.clone())
    return dataclasses.replace(batch, values=values, observed=mask)


def ball(spatial):
    axes = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in spatial], indexing="ij")
    return sum(x**2 for x in axes) < 0.9


def related(n, spatial, seed, whole=False):
    """Smooth random scans: a, and b and c that follow from a (b is invertible, c from both)."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 1, *(-(-s // 4) for s in spatial), generator=g)
    mode = "bilinear" if len(spatial) == 2 else "trilinear"
    a = 1.5 * F.interpolate(coarse, spatial, mode=mode)
    b = torch.where(a > 0, 0.4 - a, 0.4 - 3 * a)
    c = (a - b) / 2 + 0.2
    body = ball(spatial) | whole
    return {k: torch.where(body, v, 0.0) for k, v in zip(NAMES, (a, b, c), strict=True)}


def fitted(specs, batch, steps, rate=0.005, **options):
    imputer = build(specs, **options).train()
    optimizer = torch.optim.AdamW(imputer.parameters(), lr=rate)
    g = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        rows = torch.randint(len(batch), (4,), generator=g)
        loss = imputer.loss(batch.rows(rows), g).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(imputer.parameters(), 5.0)
        optimizer.step()
    return imputer


@pytest.fixture(scope="module")
def learned():
    """A network for three 2D scans, briefly trained on patients of whom some lack one."""
    specs = [scan(n, (1, 24, 24)) for n in NAMES]
    values = related(40, (24, 24), 0)
    available = torch.ones(40, 3, dtype=torch.bool)
    for m in range(3):
        available[m::5, m] = False
    for m, name in enumerate(NAMES):
        values[name][~available[:, m]] = torch.nan
    train = batch_of(specs, values, available)
    return specs, train, fitted(specs, train, 200, rate=0.01, width=8, patch=16)


class TestLearning:
    @pytest.mark.parametrize("given", SUBSETS, ids=lambda s: "".join(map(str, s.int().tolist())))
    def test_any_subset_to_any_target_beats_the_mean_image(self, learned, given):
        """The error is less than half of the mean image's, whatever is shown."""
        specs, _, imputer = learned
        template = Template(specs, Template.Options())
        template.start_from(batch_of(specs, related(40, (24, 24), 0)))
        test = batch_of(specs, related(8, (24, 24), 1))
        left = showing(test, *(n for n, g in zip(NAMES, given.tolist(), strict=True) if g))
        recovery = imputer.recover(left)
        assert torch.equal(recovery.recovered, ~given.expand(8, 3))
        floor = template.recover(left)
        for name, there in zip(NAMES, given.tolist(), strict=True):
            if not there:
                error = (recovery.values[name] - test.values[name]).abs().mean()
                assert error < 0.5 * (floor.values[name] - test.values[name]).abs().mean()

    def test_a_volume_too(self):
        specs = [scan(n, (1, 12, 12, 12)) for n in NAMES[:2]]
        values = {n: related(12, (12, 12, 12), 0)[n] for n in NAMES[:2]}
        imputer = fitted(specs, batch_of(specs, values), 120, width=8, patch=12)
        values = {n: related(4, (12, 12, 12), 1)[n] for n in NAMES[:2]}
        test = batch_of(specs, values)
        made = imputer.recover(showing(test, "a")).values["b"]
        mean = related(12, (12, 12, 12), 0)["b"].mean(0)
        assert (made - values["b"]).abs().mean() < 0.5 * (mean - values["b"]).abs().mean()

    def test_same_seed_same_bits(self):
        specs = [scan(n, (1, 8, 8)) for n in NAMES]
        batch = random_batch(specs, 6)
        one, two = (fitted(specs, batch, 3).state_dict() for _ in range(2))
        assert all(torch.equal(one[k], two[k]) for k in one)


class TestWindows:
    @pytest.mark.parametrize(
        ("shape", "patch", "most"), [((1, 96, 72), 48, 0.01), ((1, 48, 48, 32), 32, 0.03)]
    )
    def test_where_windows_see_all_that_matters_they_give_the_whole_image(self, shape, patch, most):
        """Against one pass over everything; the difference in the image's own spread.

        Weights are random and the scans are noise, so that the network's surroundings count for
        more than they do in what is learned from scans.
        """
        specs = [scan(n, shape) for n in NAMES]
        batch = showing(random_batch(specs, 1), "a", "c")
        whole = build(specs, patch=96).recover(batch).values["b"]
        slid = build(specs, patch=patch).recover(batch).values["b"]
        assert 0 < (whole - slid).square().mean().sqrt() < most * whole.std()

    def test_windows_tile_evenly(self):
        """A last window moved back to fit would lie nearly on its neighbour."""
        specs = [scan(n, (1, 33, 97)) for n in NAMES]
        (grid,) = build(specs, patch=32).grids
        assert grid.window == (32, 32) and grid.tiled == (48, 112)

    @pytest.mark.parametrize("at", ["middle", "face"])
    def test_no_step_at_the_edges_of_windows(self, learned, at):
        """Where a window begins or ends there is no more of a jump than elsewhere.

        Looked at along a line through the middle of the image and along its face, where every
        window has little weight.
        """
        specs = [scan(n, (1, 64, 64), "none") for n in NAMES]
        batch = showing(batch_of(specs, related(16, (64, 64), 2, whole=True)), "a")
        line = 32 if at == "middle" else 0
        jumps = []
        for patch in (16, 64):
            imputer = build(specs, width=8, patch=patch)
            imputer.load_state_dict(learned[2].state_dict())
            jumps.append(imputer.recover(batch).values["b"][:, 0, line].diff(dim=-1))
        added = (jumps[0] - jumps[1]).abs().mean(0)
        edges = torch.zeros(63, dtype=torch.bool)
        edges[7::8] = True
        assert added[edges].mean() < 1.5 * added[~edges].mean()
        assert added[edges].mean() < 0.1 * jumps[1].abs().mean()

    def test_a_shift_by_whole_windows_shifts_the_result(self):
        """Every window starts at a multiple of the stride, so that all pool the same voxels."""
        specs = [scan(n, (1, 64, 16), "none") for n in NAMES]
        imputer = build(specs, levels=2, patch=16, overlap=0.3)
        (grid,) = imputer.grids
        steps = [int(w * (1 - o)) for w, o in zip(grid.window, grid.overlap, strict=True)]
        assert steps == [8, 8]
        batch = random_batch(specs, 1)
        moved = {n: v.roll(8, 2) for n, v in batch.values.items()}
        one = imputer.recover(showing(batch, "a")).values["b"]
        two = imputer.recover(showing(dataclasses.replace(batch, values=moved), "a")).values["b"]
        torch.testing.assert_close(one[:, :, 16:40], two[:, :, 24:48], atol=1e-6, rtol=0)

    @pytest.mark.parametrize(
        ("patch", "overlap", "step"), [(8, 0.0, 8), (8, 0.9, 2), (64, 0.5, 32), (48, 0.3, 32)]
    )
    def test_overlap_is_in_whole_cells_of_the_network(self, patch, overlap, step):
        specs = [scan(n, (1, 200, 200)) for n in NAMES]
        (grid,) = build(specs, patch=patch, overlap=overlap).grids
        assert [int(w * (1 - o)) for w, o in zip(grid.window, grid.overlap, strict=True)] == [
            step
        ] * 2

    @pytest.mark.parametrize("shape", [(1, 8, 8), (1, 9, 13), (1, 8, 9, 11), (3, 10, 40)])
    @pytest.mark.parametrize("levels", [1, 3])
    def test_any_size(self, shape, levels):
        specs = [scan(n, shape, "percentile") for n in NAMES]
        imputer = build(specs, levels=levels, patch=16)
        batch = random_batch(specs, 2)
        made = imputer.recover(showing(batch, "b")).values
        assert all(made[n].shape == (2, *shape) and made[n].isfinite().all() for n in NAMES)
        assert imputer.loss(batch, torch.Generator().manual_seed(0)).isfinite().all()

    def test_windows_at_once_change_next_to_nothing(self):
        specs = [scan(n, (1, 40, 24)) for n in NAMES]
        batch = showing(random_batch(specs, 1), "a")
        one, four = (build(specs, windows=w).recover(batch).values["b"] for w in (1, 4))
        torch.testing.assert_close(one, four, atol=1e-5, rtol=0)


class TestTraining:
    specs = tuple(scan(n, (1, 12, 10)) for n in NAMES)

    def test_a_record_with_one_scan_teaches_nothing(self):
        available = torch.tensor([[True, True, True], [False, True, False], [True, False, True]])
        batch = random_batch(self.specs, 3, available=available)
        loss = build(self.specs).loss(batch, torch.Generator().manual_seed(0))
        assert (loss > 0).tolist() == [True, False, True]

    def test_a_batch_of_such_records_has_a_gradient_of_zero(self):
        batch = random_batch(self.specs, 2, available=torch.eye(3, dtype=torch.bool)[:2])
        imputer = build(self.specs)
        loss = imputer.loss(batch, torch.Generator())
        assert loss.tolist() == [0, 0]
        loss.sum().backward()
        assert not any(p.grad is not None and p.grad.any() for p in imputer.parameters())

    def test_absent_scans_may_hold_anything(self):
        available = torch.tensor([[True, True, False], [False, True, True], [True, False, True]])
        batch = random_batch(self.specs, 3, available=available)
        imputer = build(self.specs)
        results = []
        for other in (0.0, torch.nan):
            for m, name in enumerate(NAMES):
                batch.values[name][~available[:, m]] = other
            imputer.zero_grad()
            loss = imputer.loss(batch, torch.Generator().manual_seed(1))
            loss.sum().backward()
            made = imputer.recover(batch).values
            results.append([loss, *made.values(), *(p.grad for p in imputer.parameters())])
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
        assert all(bool(x.isfinite().all()) for x in results[0])

    def test_the_loss_is_the_mean_absolute_error_of_the_targets(self):
        """In a pair one shows the other; whole images, as they are no larger than a patch."""
        specs = [scan(n, (1, 8, 8), "none") for n in "ab"]
        batch = random_batch(specs, 8)
        imputer = build(specs)
        shown = random_proper_subsets(batch.observed.available, torch.Generator().manual_seed(3))
        loss = imputer.loss(batch, torch.Generator().manual_seed(3))
        for i, given in enumerate(shown.tolist()):
            source, target = ("a", "b") if given[0] else ("b", "a")
            made = imputer.recover(showing(batch.rows(torch.tensor([i])), source)).values[target]
            error = (made[0] - batch.values[target][i]).abs().mean()
            torch.testing.assert_close(loss[i], error)

    def test_patches_only(self):
        """Training looks at no more than a patch, however large the scan."""
        specs = [scan(n, (1, 40, 40)) for n in NAMES]
        seen = []
        imputer = build(specs)
        imputer.networks[0].first.register_forward_hook(lambda _, x, y: seen.append(x[0].shape))
        imputer.loss(random_batch(specs, 5), torch.Generator().manual_seed(0))
        assert seen == [(5, 6, 8, 8)]

    def test_patches_hold_body_where_there_is_some(self):
        specs = [scan(n, (1, 64, 64)) for n in NAMES[:2]]
        image = torch.zeros(1, 1, 64, 64)
        image[..., 20:44, 20:44] = 1.0  # one voxel in seven
        batch = batch_of(specs, {"a": image, "b": 2 * image})
        imputer = build(specs)
        g = torch.Generator().manual_seed(0)
        losses = torch.cat([imputer.loss(batch, g) for _ in range(50)])
        assert (losses > 0).float().mean() > 0.85  # of uniform patches a fourth

    def test_gradient_reaches_every_parameter(self):
        specs = [
            *(scan(n, (1, 12, 10)) for n in NAMES),
            *(scan(n, (1, 9, 8, 8)) for n in "de"),
            scan("alone", (1, 16, 16)),
        ]
        imputer = build(specs, levels=2)
        assert [grid.members for grid in imputer.grids] == [(0, 1, 2), (3, 4)]
        batch = random_batch(specs, 8)
        imputer.loss(batch, torch.Generator().manual_seed(0)).sum().backward()
        assert not [n for n, p in imputer.named_parameters() if p.grad is None or not p.grad.any()]

    def test_proper_subsets_are_uniform(self):
        g = torch.Generator().manual_seed(0)
        shown = random_proper_subsets(torch.ones(6000, 3, dtype=torch.bool), g)
        number = (shown * torch.tensor([1, 2, 4])).sum(1)
        counts = number.bincount(minlength=8)
        assert counts[0] == counts[7] == 0
        assert (counts[1:7] - 1000).abs().max() < 120


class TestRecovery:
    specs = tuple(scan(n, (1, 12, 10)) for n in NAMES)

    def test_what_is_recoverable(self):
        table = ModalitySpec("t", "table", "t.csv", (1,), columns=(Column("x", "continuous"),))
        specs = [
            scan("a", (1, 8, 8)),
            table,
            scan("b", (3, 8, 8)),
            scan("other", (1, 8, 9)),
            scan("volume", (1, 8, 8, 8)),
            dataclasses.replace(scan("coarse", (1, 8, 8, 8)), spacing_mm=(2.0,) * 3),
        ]
        imputer = build(specs)
        everything = torch.ones(1, 6, dtype=torch.bool)
        assert imputer.recoverable(everything).tolist() == [[True, False, True] + [False] * 3]
        only = imputer.recoverable(torch.eye(6, dtype=torch.bool))
        assert only.nonzero().tolist() == [[0, 2], [2, 0]]
        require_recovery(imputer, "synthesis")

    def test_observing_more_never_makes_less_recoverable(self):
        imputer = build([*self.specs, scan("d", (1, 9, 9)), scan("e", (1, 9, 9))])
        subsets = torch.cartesian_prod(*[torch.tensor([False, True])] * 5)
        can = imputer.recoverable(subsets)
        within = (subsets[:, None] <= subsets).all(2)  # (S, S): one is part of the other
        assert bool((can[:, None] <= can)[within].all())

    def test_scans_on_grids_of_their_own_are_refused(self):
        imputer = build([scan("a", (1, 8, 8)), scan("b", (1, 8, 9))])
        assert not list(imputer.parameters())
        with pytest.raises(ConfigError, match=r"synthesis: it can recover none of a, b"):
            require_recovery(imputer, "synthesis")

    def test_air_stays_air(self):
        """0 where the scans shown are all 0; one of them may reach further than another."""
        values = {n: torch.randn(2, 1, 12, 10) for n in NAMES}
        values["a"][..., :4, :] = 0
        values["c"][..., :6, :] = 0
        batch = batch_of(self.specs, values)
        imputer = build(self.specs)
        made = imputer.recover(showing(batch, "a", "c")).values["b"]
        assert not made[..., :4, :].any() and bool((made[..., 4:, :] != 0).all())
        made = imputer.recover(showing(batch, "c")).values["b"]
        assert not made[..., :6, :].any() and bool((made[..., 6:, :] != 0).all())

    @pytest.mark.parametrize("which", [0, 1])
    def test_elsewhere_zero_is_a_value_like_others(self, which):
        """One of the two is not z-scored: the scan shown, or the one asked for."""
        specs = [scan("a", (1, 8, 8)), scan("b", (1, 8, 8))]
        specs[which] = scan("ab"[which], (1, 8, 8), "percentile")
        imputer = build(specs)
        with torch.no_grad():
            imputer.networks[0].last.bias.fill_(0.1)
        batch = random_batch(specs, 1)
        batch.values["a"][..., :4, :] = 0
        assert bool((imputer.recover(showing(batch, "a")).values["b"] != 0).all())

    def test_a_patient_alone_gets_the_same_bits(self):
        available = torch.tensor([[True, True, False], [False, True, False], [True, False, True]])
        batch = random_batch(self.specs, 3, available=available)
        imputer = build(self.specs)
        whole = imputer.recover(batch)
        for i in range(3):
            alone = imputer.recover(batch.rows(torch.tensor([i])))
            assert all(torch.equal(alone.values[n][0], whole.values[n][i]) for n in NAMES)

    def test_only_what_is_wanted_is_computed(self):
        batch = random_batch(
            self.specs, 3, available=torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]) > 0
        )
        imputer = build(self.specs, patch=16)
        passes = []
        imputer.networks[0].register_forward_hook(lambda *_: passes.append(1))
        proposals = imputer.propose(batch, ["c"], None)
        assert list(proposals) == ["c"] and len(passes) == 2
        assert not proposals["c"][1].any()

    def test_no_more_than_a_window_goes_through_the_network(self):
        """Memory depends on the patch, not on the scan."""
        specs = [scan(n, (1, 40, 24)) for n in NAMES]
        imputer = build(specs)
        seen = set()
        imputer.networks[0].register_forward_hook(lambda _, x, y: seen.add(tuple(x[0].shape)))
        imputer.recover(showing(random_batch(specs, 2), "a"))
        assert seen == {(1, 3, 8, 8)}

    def test_patch_and_levels_must_fit(self):
        with pytest.raises(ValidationError, match=r"patch must be a multiple of 16"):
            Synthesis.Options(levels=4, patch=24)


RECIPE = {
    "name": "synthetic-scans",
    "imputer": {"name": "synthesis", "width": 4, "levels": 1, "patch": 8},
    "backbone": {"name": "transformer", "dim": 16, "heads": 2, "layers": 1, "projection": 6},
    "selector": {"name": "trust_all"},
    "imputer_training": {"epochs": 2, "batch_size": 8, "learning_rate": 0.005},
    "backbone_training": {"epochs": 1, "batch_size": 8, "subsets": 2},
}


@pytest.fixture(scope="module")
def scans_bundle(tmp_path_factory, cohort_dir):
    """A bundle that synthesises t1 from t2 and t2 from t1, briefly trained."""
    from dymo_med.training.train import train

    folder = tmp_path_factory.mktemp("synthesis")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    return load_bundle(train(recipe, cohort_dir, folder / "run", device="cpu"), "cpu")


class TestFiles:
    @pytest.fixture
    def without_t2(self, cohort_dir, tmp_path):
        """The folder of a patient who lacks t2."""
        folder = tmp_path / "patient"
        folder.mkdir()
        for name in ("t1.nii.gz", "photo.png", "ehr.csv"):
            (folder / name).write_bytes((cohort_dir / "patients" / "p000" / name).read_bytes())
        return folder

    def test_impute_writes_the_scan_at_full_resolution(self, scans_bundle, without_t2, tmp_path):
        (path,) = impute_patient(without_t2, scans_bundle, tmp_path / "out")
        assert path.name == "t2_synthetic.nii.gz"
        image = nib.load(path)
        assert b"SYNTHETIC" in image.header["descrip"].item()
        assert image.shape == (16, 16, 16) and image.header.get_zooms() == (2.0, 2.0, 2.0)
        record = read_patient(without_t2, scans_bundle.specs)
        source = record.modalities["t1"]
        np.testing.assert_allclose(image.affine, source.source.affine)
        made = image.get_fdata()
        body = source.values[0].numpy() != 0
        assert 0 < body.sum() < body.size and not made[~body].any()
        # Voxel by voxel, not a coarse map enlarged.
        assert len(np.unique(made[body])) > 0.9 * body.sum()
        batch = collate([record], scans_bundle.specs)
        expected = scans_bundle.imputer.recover(batch).values["t2"][0, 0].numpy()
        np.testing.assert_array_equal(made.astype(np.float32), expected)
        about = json.loads(path.with_name("recovered.json").read_text(encoding="utf-8"))
        assert about["synthetic"] is True

    def test_predict_uses_and_writes_it(self, scans_bundle, without_t2, tmp_path):
        out = tmp_path / "out"
        prediction = predict_patient(without_t2, scans_bundle, out, explain=False)
        assert prediction.recovered == prediction.trusted == ("t2",)
        assert nib.load(out / "recovered" / "t2_synthetic.nii.gz").shape == (16, 16, 16)

    def test_a_table_is_left_absent(self, scans_bundle, without_t2):
        (without_t2 / "ehr.csv").unlink()
        prediction = predict_patient(without_t2, scans_bundle, explain=False)
        assert prediction.recovered == ("t2",)
        assert prediction.absent == ("demographics", "labs")


def test_the_recipe_of_the_repository_is_valid():
    path = Path(__file__).resolve().parents[2] / "configs" / "synthesis.yaml"
    recipe = Document(path).parse(Recipe)
    Synthesis.Options(**recipe.imputer.options)
