"""What holds for every encoder by name: magnitude survives the way to a token, before training."""

from dataclasses import replace

import pytest
import torch

from dymo_med.backbones import FusionTransformer
from dymo_med.encoders import IMAGE_ENCODERS, TABLE_ENCODERS
from dymo_med.modalities import modality
from dymo_med.types import Batch, Column, ModalityMask, ModalitySpec

PATIENTS = 900


def scans(axes: int) -> torch.Tensor:
    """Return standardised scans `(n, 1, *spatial)` of a noisy body with a bright lesion."""
    g = torch.Generator().manual_seed(0)
    side = 12 if axes == 3 else 24
    line = torch.linspace(-1, 1, side)
    grid = torch.stack(torch.meshgrid(*[line] * axes, indexing="ij"))
    body = grid.square().sum(0) < 0.81
    place = torch.rand(PATIENTS, axes, generator=g) - 0.5
    radius = 0.15 + 0.25 * torch.rand(PATIENTS, generator=g)
    bright = 6 * torch.rand(PATIENTS, generator=g)
    apart = (grid[None] - place.view(PATIENTS, axes, *[1] * axes)).square().sum(1).sqrt()
    wide = [PATIENTS, *[1] * axes]
    lesion = bright.view(wide) * (apart < radius.view(wide))
    raw = torch.randn(PATIENTS, *[side] * axes, generator=g) + lesion
    inside = raw[:, body]
    standard = (raw - inside.mean(1).view(wide)) / inside.std(1).view(wide) * body
    return standard[:, None]


def brightest(images: torch.Tensor) -> torch.Tensor:
    """Return the mean of the brightest hundredth of each scan's body `(n,)`."""
    values = images.flatten(1)
    return values.topk(max(1, round(0.01 * int((values[0] != 0).sum())))).values.mean(1)


def explained(tokens: torch.Tensor, target: torch.Tensor) -> float:
    """Return R squared of a linear map from tokens on patients that it was not fitted to."""
    x = torch.cat([tokens.flatten(1), torch.ones(len(tokens), 1)], dim=1).double()
    y, half = target.double(), 2 * len(tokens) // 3
    ridge = 1e-2 * torch.eye(x.shape[1], dtype=torch.float64)
    w = torch.linalg.solve(x[:half].T @ x[:half] + ridge, x[:half].T @ y[:half])
    error = (x[half:] @ w - y[half:]).square().mean()
    return float(1 - error / y[half:].var(correction=0))


def network(spec: ModalitySpec, **options: object) -> FusionTransformer:
    sizes = {"dim": 64, "heads": 4, "width": 8, "projection": 8}
    made = FusionTransformer((spec,), 2, FusionTransformer.Options(**sizes, **options))
    return made.eval()


@pytest.fixture(scope="module", params=[2, 3], ids=["picture", "volume"])
def image(request):
    values = scans(request.param)
    spacing = (2.0,) * request.param
    spec = ModalitySpec("scan", "image", "scan", values.shape[1:], spacing, "zscore")
    return modality(spec).fit(values, None), values


@pytest.fixture(scope="module")
def table():
    columns = (
        Column("age", "continuous", unit="years"),
        Column("crp", "continuous"),
        Column("sex", "categorical", values=("F", "M")),
    )
    g = torch.Generator().manual_seed(0)
    age = 60 + 12 * torch.randn(PATIENTS, generator=g)
    crp = torch.randn(PATIENTS, generator=g).exp() * 8  # skewed
    sex = (torch.rand(PATIENTS, generator=g) < 0.5).float()
    values = torch.stack([age, crp, sex], dim=1)
    spec = ModalitySpec("clinic", "table", "ehr.csv", (3,), columns=columns)
    return modality(spec).fit(values, None), values


@pytest.mark.parametrize("name", sorted(IMAGE_ENCODERS))
def test_a_scans_bright_tail_survives(image, name):
    spec, values = image
    with torch.no_grad():
        tokens = network(spec, image_encoders=(name,)).encode("scan", values).values
    assert explained(tokens, brightest(values)) > 0.9


def test_the_published_encoder_alone_averages_it_away(image):
    spec, values = image
    with torch.no_grad():
        tokens = network(spec, tails=False).encode("scan", values).values
    assert explained(tokens, brightest(values)) < 0.5


@pytest.mark.parametrize("name", sorted(TABLE_ENCODERS))
@pytest.mark.parametrize("layers", [0, 1])
def test_every_cell_survives(table, name, layers):
    spec, values = table
    with torch.no_grad():
        made = network(spec, table_encoder=name, column_layers=layers)
        tokens = made.encode("clinic", values).values
    logs = values.clone()
    logs[:, 1] = logs[:, 1].log()  # what is skewed is seen as its logarithm
    assert spec.columns[1].logarithm is not None
    assert spec.columns[0].logarithm is None
    for f in range(3):
        assert explained(tokens, logs[:, f]) > 0.9


def batch_of(spec: ModalitySpec, values: torch.Tensor, fields: torch.Tensor | None) -> Batch:
    n = len(values)
    ids = tuple(map(str, range(n)))
    mask = ModalityMask((spec.name,), torch.ones(n, 1, dtype=torch.bool))
    given = {} if fields is None else {spec.name: fields}
    return Batch(ids, ids, {spec.name: values}, mask, given, torch.zeros(n, dtype=torch.int64))


@pytest.mark.parametrize("name", sorted(IMAGE_ENCODERS))
def test_patients_do_not_depend_on_each_other_and_gradients_reach_every_weight(image, name):
    spec, values = image
    encoder = modality(spec).encoder(16, {"image_encoders": (name,), "width": 8, "tails": True})
    told = modality(spec).describe(values[:4])
    whole = encoder(values[:4], None, told).values
    alone = torch.cat([encoder(values[i : i + 1], None, told[i : i + 1]).values for i in range(4)])
    assert torch.allclose(whole, alone, atol=1e-5)
    assert whole.shape == (4, encoder.tokens, 16)
    (whole * torch.randn_like(whole)).sum().backward()
    for label, parameter in encoder.named_parameters():
        assert parameter.grad is not None, label
        if ".second." not in label and ".first." not in label:  # residuals that start as nothing
            assert parameter.grad.abs().sum() > 0, label


@pytest.mark.parametrize("name", sorted(TABLE_ENCODERS))
def test_what_stands_in_a_blank_cell_changes_nothing(table, name):
    spec, values = table
    encoder = modality(spec).encoder(16, {"table_encoder": name})
    fields = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    spoilt = values[:3].where(fields, torch.tensor(float("nan")))
    first, second = encoder(values[:3], fields), encoder(spoilt, fields)
    assert torch.equal(first.available, second.available)
    assert not bool(first.available[2].any())
    seen = first.available
    assert torch.equal(first.values[seen], second.values[seen])


def test_several_encoders_stand_side_by_side(image):
    spec, values = image
    made = network(spec, image_encoders=("descriptors", "fine"))
    tokens = made.encode("scan", values[:3])
    assert tokens.values.shape[1] == len(made.token_modality) == 4
    assert made.described("scan") and made.sees_voxels("scan")
    only = network(spec, image_encoders=("descriptors",))
    assert only.described("scan") and not only.sees_voxels("scan")


def test_a_recovered_scan_is_described_as_one_that_was_stored():
    """On the grid tails are shorter; the map that training scans give puts them back."""
    values = scans(3)
    spec = ModalitySpec("scan", "image", "scan", values.shape[1:], (2.0,) * 3, "zscore")
    on_grid = modality(spec).describe(values)
    stored = on_grid * 1.3 + 0.2
    fitted = modality(spec).fit(values, None, stored)
    assert torch.allclose(modality(fitted).describe(values), stored, atol=0.1)
    again = ModalitySpec.from_dict(fitted.to_dict())
    assert again == fitted
    assert "descriptors" not in replace(fitted, descriptors=None).to_dict()
