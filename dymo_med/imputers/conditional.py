"""The exact conditional distribution of what is missing, from one joint normal of everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from torch.nn import functional as F

from dymo_med import gaussian
from dymo_med.config import Strict
from dymo_med.imputers.base import RAREST, Imputer, unfitted
from dymo_med.modalities import modality
from dymo_med.modalities.descriptors import NAMES, fit_norms
from dymo_med.types import Batch, Column, ModalitySpec

# Pictures of fewer patients than this would show single ones to whoever has the bundle.
_MOST_PRIVATE = 10
# A principal component of a picture or sequence rests on at least so many records.
_PER_COMPONENT = 8
# Pictures are decoded on a grid of at most so many points along each axis.
_MOST_POINTS = {2: 64, 3: 24}
# No number enters further out than so many standard deviations.
_FURTHEST = 5.0
_SMALLEST = 1e-6  # of a number whose logarithm is taken
_RIDGE = 10.0  # in records, of the map from the code to a picture
_CHUNK = 64


class Conditional(Imputer):
    """What is missing given what is there, under a joint normal distribution of all modalities.

    A record is a row of numbers, its code: of a scan the whitened principal components of its
    descriptors (`modalities.descriptors`), of a sequence principal components, of a table its
    cells, standardised, skewed ones by their logarithm, of a category one indicator for each
    value but the first. Mean and covariance are fitted to **all** training records, labelled or
    not, complete or not, by expectation maximisation with shrinkage (`gaussian.fit`). The
    distribution of any part of the code given any other is then normal as well, and known
    exactly: its mean is the best guess, and draws are taken from it, all modalities of a record
    together.

    What a network may need is decoded from the code: descriptors of a scan (`describe`), by the
    components; cells; steps of a sequence. A scan itself is decoded for the eye only: ridge
    regressions from the code to principal components of coarse pictures give an average head
    with about the right contrast, and no lesion in its right place. Networks that look at voxels
    are better served by another imputer.

    A drawn category has the probability that its indicators state, and goes along with the other
    numbers drawn (a Gaussian copula). A draw of one record does not depend on the others in its
    batch.

    Scans and sequences that fewer than ten training patients have are not recovered, because
    their principal components would show single patients.

    Args:
        specs: Modalities in canonical order, fitted.
        options: How many components, and how much shrinkage.

    References:
        Dempster, Laird, Rubin: Maximum Likelihood from Incomplete Data via the EM Algorithm, 1977;
        Rubin, Multiple Imputation for Nonresponse in Surveys, 1987. Draws by conditioning: Journel
        and Huijbregts, Mining Geostatistics, 1978, VII.A.1.
    """

    class Options(Strict):
        """How many components, and how much shrinkage.

        Attributes:
            components: Principal components of a scan's descriptors, or of a sequence, at most;
                of a scan no more than its network reads.
            pictures: Principal components of a scan as it is shown.
            shrinkage: Factor on the share by which the covariance is drawn to its diagonal,
                d / (d + n) with d numbers and n records.
        """

        components: Annotated[int, Field(ge=1, le=30)] = 8
        pictures: Annotated[int, Field(ge=0, le=64)] = 8
        shrinkage: Annotated[float, Field(gt=0)] = 1.0

    probabilistic = True
    closed_form = True
    records: Tensor
    known: Tensor
    mean: Tensor
    covariance: Tensor
    root: Tensor

    def __init__(self, specs: Sequence[ModalitySpec], options: BaseModel) -> None:
        super().__init__(specs, options)
        self.options = Conditional.Options.model_validate(options.model_dump())
        self.specs = tuple(specs)
        self.blocks: dict[str, slice] = {}
        d = 0
        for spec in self.specs:
            width = self._width(spec)
            self.blocks[spec.name] = slice(d, d + width)
            d += width
        # Buffers are the fitted state, saved like weights; double precision for the algebra.
        self.register_buffer("records", torch.zeros((), dtype=torch.int64))
        self.register_buffer("known", torch.zeros(len(self.specs), dtype=torch.bool))
        self.register_buffer("mean", torch.zeros(d, dtype=torch.float64))
        self.register_buffer("covariance", torch.eye(d, dtype=torch.float64))
        self.register_buffer("root", torch.eye(d, dtype=torch.float64))
        for spec in self.specs:
            if spec.columns:
                continue
            width, size = self._width(spec), _size(spec)
            self.register_buffer(f"center_{spec.name}", torch.zeros(size, dtype=torch.float64))
            for which in ("reduce", "expand"):
                shape = (width, size)
                self.register_buffer(
                    f"{which}_{spec.name}", torch.zeros(shape, dtype=torch.float64)
                )
            if spec.is_image:
                coarse = _coarse(spec)
                q = self.options.pictures
                self.register_buffer(f"picture_{spec.name}", torch.zeros(coarse))
                self.register_buffer(f"basis_{spec.name}", torch.zeros(q, *coarse))
                ridge = torch.zeros(d, q, dtype=torch.float64)
                self.register_buffer(f"ridge_{spec.name}", ridge)
        self._last: tuple[Tensor, tuple[Tensor, Tensor, Tensor]] | None = None

    def _width(self, spec: ModalitySpec) -> int:
        """Return how many numbers of the code are of a modality."""
        if spec.columns:
            return sum(_cells(column) for column in spec.columns)
        if spec.is_image and spec.descriptors is not None:
            return min(self.options.components, len(spec.descriptors.components))
        return self.options.components

    # -- fitting -------------------------------------------------------------------------------

    @torch.no_grad()
    def start_from(self, batch: Batch) -> None:
        """Fit everything to the training records, labelled or not."""
        self.records.fill_(len(batch))
        for m, spec in enumerate(self.specs):
            rows = batch.observed.available[:, m].nonzero().squeeze(1)
            if spec.columns:
                self.known[m] = any(column.known for column in spec.columns)
                continue
            self.known[m] = len({batch.patient_ids[i] for i in rows.tolist()}) >= _MOST_PRIVATE
            if not self.known[m]:
                continue
            if spec.is_image:
                self._fit_descriptors(spec, _descriptors(batch, spec, rows))
            else:
                self._fit_sequence(spec, _flat(batch.values[spec.name][rows]))
        code = self._code(batch)
        # What nobody has, or what never varies, takes no part, and its place stays 0.
        seen = code.masked_fill(code.isnan(), 0.0)
        active = (seen.square().sum(0) > 1e-12).nonzero().squeeze(1)
        mean, covariance = gaussian.fit(code[:, active], self.options.shrinkage)
        self.mean.zero_()
        self.mean[active] = mean
        self.covariance.copy_(1e-6 * torch.eye(len(self.mean), dtype=torch.float64))
        self.covariance[active[:, None], active] = covariance
        self.root.zero_()
        self.root[active[:, None], active] = torch.linalg.cholesky(covariance)
        self._last = None
        for m, spec in enumerate(self.specs):
            if spec.is_image and self.known[m] and self.options.pictures:
                self._fit_pictures(batch, m, code)

    def _fit_descriptors(self, spec: ModalitySpec, told: Tensor) -> None:
        """Fit how a scan's descriptors become components, and components descriptors."""
        norms = spec.descriptors or fit_norms(told, told)
        reduce = torch.tensor(norms.components, dtype=torch.float64)
        reduce = reduce[: self._width(spec)]
        self._set(spec, torch.tensor(norms.center, dtype=torch.float64), reduce)
        # Of all descriptors with these components, those that are expected: by least squares.
        away = told.double() - self.get_buffer(f"center_{spec.name}")
        scores = away @ reduce.T
        ridge = 1e-6 * len(told) * torch.eye(len(reduce), dtype=torch.float64)
        expand = torch.linalg.solve(scores.T @ scores + ridge, scores.T @ away)
        # Exactly these components: what the regression lacks is put right along the smallest way.
        lacks = torch.eye(len(reduce), dtype=torch.float64) - expand @ reduce.T
        expand = expand + lacks @ torch.linalg.pinv(reduce).T
        self.get_buffer(f"expand_{spec.name}")[: len(reduce)] = expand

    def _fit_sequence(self, spec: ModalitySpec, flat: Tensor) -> None:
        """Fit principal components of a sequence."""
        center, axes, spread = _principal(flat.double(), self._width(spec))
        self._set(spec, center, axes / spread[:, None])
        self.get_buffer(f"expand_{spec.name}")[: len(axes)] = axes * spread[:, None]

    def _set(self, spec: ModalitySpec, center: Tensor, reduce: Tensor) -> None:
        self.get_buffer(f"center_{spec.name}").copy_(center)
        self.get_buffer(f"reduce_{spec.name}").zero_()[: len(reduce)] = reduce
        self.get_buffer(f"expand_{spec.name}").zero_()

    def _fit_pictures(self, batch: Batch, m: int, code: Tensor) -> None:
        """Fit what a scan looks like on a coarse grid, from the code."""
        spec = self.specs[m]
        rows = batch.observed.available[:, m].nonzero().squeeze(1)
        small = _shrunk(batch.values[spec.name][rows].float(), _coarse(spec)).double()
        center, axes, spread = _principal(small.flatten(1), self.options.pictures)
        self.get_buffer(f"picture_{spec.name}").copy_(center.view(_coarse(spec)))
        basis = (axes * spread[:, None]).view(-1, *_coarse(spec))
        self.get_buffer(f"basis_{spec.name}").zero_()[: len(basis)] = basis
        scores = (small.flatten(1) - center) @ (axes / spread[:, None]).T
        whole = torch.cat([self._expected(code[part])[0] for part in rows.split(_CHUNK)])
        whole = whole - self.mean
        eye = torch.eye(whole.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(whole.T @ whole + _RIDGE * eye, whole.T @ scores)
        self.get_buffer(f"ridge_{spec.name}").zero_()[:, : len(basis)] = weights

    # -- the code ------------------------------------------------------------------------------

    def _code(self, batch: Batch) -> Tensor:
        """Return the code of each record, float64 `(B, d)`, NaN where there is nothing."""
        device = self.mean.device
        code = torch.full(
            (len(batch), len(self.mean)), torch.nan, dtype=torch.float64, device=device
        )
        for m, spec in enumerate(self.specs):
            block, seen = self.blocks[spec.name], batch.observed.available[:, m]
            if spec.columns:
                filled = batch.observed_fields[spec.name] & seen[:, None]
                code[:, block] = _standard(spec.columns, batch.values[spec.name], filled)
                continue
            rows = seen.nonzero().squeeze(1)
            if not bool(self.known[m]) or not len(rows):
                continue
            told = (
                _descriptors(batch, spec, rows)
                if spec.is_image
                else _flat(batch.values[spec.name][rows])
            )
            away = told.double() - self.get_buffer(f"center_{spec.name}")
            scores = away @ self.get_buffer(f"reduce_{spec.name}").T
            code[rows, block] = scores.clamp(-_FURTHEST, _FURTHEST)
        return code

    def _weights(self, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights and covariances by pattern, and the pattern of each row.

        Draws of one batch ask for the same again and again, so the last answer is kept.
        """
        if self._last is not None and torch.equal(self._last[0], known):
            return self._last[1]
        patterns, owner = known.unique(dim=0, return_inverse=True)
        weights, left = gaussian.conditional(self.covariance, patterns)
        self._last = known, (weights, left, owner)
        return self._last[1]

    def _expected(self, code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return conditional means `(B, d)`, covariances by pattern, and the pattern of each row.

        What is known is given back as it is.

        Raises:
            RuntimeError: Before `start_from`.
        """
        if not self.records:
            raise unfitted(self)
        known = ~code.isnan()
        weights, left, owner = self._weights(known)
        gap = (code - self.mean).nan_to_num(0.0)
        found = self.mean + _applied(gap, weights, owner)
        return torch.where(known, code, found), left, owner

    def code(
        self, batch: Batch, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the completed code of each record, and the distribution it is of.

        Args:
            batch: B records.
            generator: Of one draw; None = the conditional mean.

        Returns:
            The code `(B, d)`; its conditional mean `(B, d)`; conditional covariances `(G, d, d)`
            of the patterns among the records; and the pattern of each `(B,)`.
        """
        code = self._code(batch)
        mean, left, owner = self._expected(code)
        if generator is None:
            return mean, mean, left, owner
        noise = torch.randn(len(self.mean), generator=generator, dtype=torch.float64)
        free = self.root @ noise.to(self.mean.device)  # of the joint distribution, less its mean
        known = ~code.isnan()
        weights, _, _ = self._weights(known)
        # A free draw, moved by what its known part is off: a draw given the known part.
        there = free * known
        drawn = mean + free - _applied(there, weights, owner)
        return torch.where(known, code, drawn), mean, left, owner

    # -- what is proposed ----------------------------------------------------------------------

    def recoverable(self, observed: Tensor) -> Tensor:
        """Return bool `(B, M)`: everything that enough training patients have, from anything.

        Raises:
            RuntimeError: Before `start_from`.
        """
        if not self.records:
            raise unfitted(self)
        return super().recoverable(observed) & self.known

    def propose(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """See `Imputer.propose`."""
        code, mean, left, owner = self.code(batch, generator)
        found = {}
        for spec in self.specs:
            if spec.name not in wanted:
                continue
            block = self.blocks[spec.name]
            if spec.columns:
                own = left[:, block, block]
                found[spec.name] = _natural(
                    spec.columns, code[:, block], mean[:, block], own, owner
                )
            elif spec.is_image:
                scores = (code - self.mean) @ self.get_buffer(f"ridge_{spec.name}")
                picture = self.get_buffer(f"picture_{spec.name}")
                basis = self.get_buffer(f"basis_{spec.name}")
                small = picture + torch.tensordot(scores.to(basis.dtype), basis, dims=1)
                found[spec.name] = _enlarged(small, spec)
            else:
                flat = code[:, block] @ self.get_buffer(f"expand_{spec.name}")
                flat = flat + self.get_buffer(f"center_{spec.name}")
                found[spec.name] = flat.view(-1, *spec.shape)
        return found

    def describe(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """See `Imputer.describe`."""
        code = self.code(batch, generator)[0]
        found = {}
        for m, spec in enumerate(self.specs):
            if spec.is_image and spec.name in wanted and bool(self.known[m]):
                away = code[:, self.blocks[spec.name]] @ self.get_buffer(f"expand_{spec.name}")
                found[spec.name] = away + self.get_buffer(f"center_{spec.name}")
        return found

    def table_likelihood(self, batch: Batch, wanted: Sequence[str]) -> dict[str, Tensor]:
        """See `Imputer.table_likelihood`.

        A number that enters by its logarithm has the mean and spread of that lognormal.
        """
        _, mean, left, owner = self.code(batch, None)
        found = {}
        for spec in self.specs:
            if spec.name in wanted and spec.columns:
                block = self.blocks[spec.name]
                own = left[:, block, block]
                found[spec.name] = _likelihood(spec.columns, mean[:, block], own, owner)
        return found

    def cell_intervals(
        self, batch: Batch, wanted: Sequence[str], share: float
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """See `Imputer.cell_intervals`: exact, and for skewed cells not symmetric."""
        _, mean, left, owner = self.code(batch, None)
        reach = 2**0.5 * torch.erfinv(torch.tensor(share, dtype=torch.float64)).item()
        found = {}
        for spec in self.specs:
            if spec.name not in wanted or not spec.columns:
                continue
            block = self.blocks[spec.name]
            spread = left.diagonal(dim1=1, dim2=2)[owner, block].clamp_min(0).sqrt()
            low, high = (
                _natural(spec.columns, mean[:, block] + sign * reach * spread, None, None, owner)
                for sign in (-1, 1)
            )
            found[spec.name] = low, high
        return found


# -- cells -------------------------------------------------------------------------------------


def _cells(column: Column) -> int:
    """Return how many numbers of the code are of a column."""
    return len(column.values) - 1 if column.type == "categorical" else 1


def _center(column: Column) -> tuple[float, float]:
    """Return what a number, or its logarithm, is standardised by."""
    if column.logarithm is not None:
        return column.logarithm.mean, column.logarithm.std
    return column.mean or 0.0, column.std or 1.0


def _standard(columns: Sequence[Column], values: Tensor, filled: Tensor) -> Tensor:
    """Return the code of a table's cells, NaN where there is nothing.

    Args:
        columns: F columns.
        values: `(B, F)`, natural units.
        filled: Bool `(B, F)`.
    """
    parts = []
    for i, column in enumerate(columns):
        known = filled[:, i] & column.known
        cell = values[:, i].double().where(known, torch.zeros((), dtype=torch.float64))
        if column.type == "categorical":
            part = F.one_hot(cell.round().long(), len(column.values))[:, 1:].double()
        else:
            center, spread = _center(column)
            if column.logarithm is not None:
                cell = (cell + column.logarithm.shift).clamp_min(_SMALLEST).log()
            part = ((cell - center) / spread).clamp(-_FURTHEST, _FURTHEST)[:, None]
        parts.append(part.masked_fill(~known[:, None], torch.nan))
    return torch.cat(parts, dim=1)


def _shares(mean: Tensor) -> Tensor:
    """Return how likely each category is, from its expected indicators but the first's."""
    whole = torch.cat([1 - mean.sum(1, keepdim=True), mean], dim=1).clamp_min(RAREST)
    return whole / whole.sum(1, keepdim=True)


def _natural(
    columns: Sequence[Column],
    code: Tensor,
    mean: Tensor | None,
    left: Tensor | None,
    owner: Tensor,
) -> Tensor:
    """Return cells in natural units `(B, F)`.

    Args:
        columns: F columns.
        code: Of the table `(B, w)`.
        mean: Its conditional mean; None = no categories are asked for, they are NaN.
        left: Its conditional covariances `(G, w, w)`; None likewise.
        owner: The pattern of each row `(B,)`.
    """
    cells, at = [], 0
    for column in columns:
        part = slice(at, at + _cells(column))
        at = part.stop
        if column.type == "categorical":
            if mean is None or left is None:
                cells.append(torch.full_like(code[:, 0], torch.nan))
                continue
            share = _shares(mean[:, part])
            cells.append(
                _category(share, code[:, part] - mean[:, part], left[:, part, part], owner)
            )
            continue
        center, spread = _center(column)
        cell = code[:, part.start] * spread + center
        if column.logarithm is not None:
            cell = cell.exp() - column.logarithm.shift
        cells.append(cell if column.range is None else cell.clamp(*column.range))
    return torch.stack(cells, dim=1)


def _category(share: Tensor, away: Tensor, left: Tensor, owner: Tensor) -> Tensor:
    """Return the likeliest category, or the one that a draw stands for.

    Args:
        share: How likely each is `(B, k)`.
        away: What was drawn of the indicators, less their means `(B, k - 1)`; 0 = the best guess.
        left: Their covariances `(G, k - 1, k - 1)`.
        owner: The pattern of each row `(B,)`.
    """
    order = torch.arange(1, share.shape[1], dtype=share.dtype, device=share.device)
    spread = (left @ order @ order).clamp_min(1e-12).sqrt()[owner]
    drawn = away @ order / spread
    # The share of draws below this one is the share of categories below the drawn one.
    below = share.cumsum(1)[:, :-1]
    index = (torch.special.ndtr(drawn)[:, None] >= below).sum(1)
    guess = (away == 0).all(1)
    return torch.where(guess, share.argmax(1), index).to(share.dtype)


def _likelihood(columns: Sequence[Column], mean: Tensor, left: Tensor, owner: Tensor) -> Tensor:
    """Return likelihood parameters `(B, P)` as `Table.cell_log_likelihood` reads them."""
    parts, at = [], 0
    variances = left.diagonal(dim1=1, dim2=2)[owner].clamp_min(1e-12)
    for column in columns:
        part = slice(at, at + _cells(column))
        at = part.stop
        if column.type == "categorical":
            parts.append(_shares(mean[:, part]).log())
            continue
        own, variance = mean[:, part], variances[:, part]
        if column.logarithm is not None:
            log = column.logarithm
            variance = variance * log.std**2
            middle = (own * log.std + log.mean + variance / 2).clamp_max(50).exp()
            own = (middle - log.shift - (column.mean or 0.0)) / (column.std or 1.0)
            variance = (middle / (column.std or 1.0)).square() * torch.expm1(variance.clamp_max(20))
        parts += [own, variance.clamp_min(1e-12).log() / 2]
    return torch.cat(parts, dim=1)


# -- scans and sequences -----------------------------------------------------------------------


def _size(spec: ModalitySpec) -> int:
    """Return how many numbers the code's part of a modality is made from."""
    if spec.is_image:
        return len(NAMES)
    return spec.shape[0] * spec.shape[1]


def _descriptors(batch: Batch, spec: ModalitySpec, rows: Tensor) -> Tensor:
    """Return the descriptors of some records' scans `(R, P)`."""
    if spec.name in batch.descriptors:
        return batch.descriptors[spec.name][rows]
    found = modality(spec).describe(batch.values[spec.name][rows])
    assert found is not None
    return found


def _flat(values: Tensor) -> Tensor:
    return values.flatten(1)


def _principal(flat: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean of rows `(n, p)`, principal axes `(q, p)`, and how far rows spread on each.

    By the rows' products with each other, since there are far more columns than rows.
    """
    n = len(flat)
    center = flat.mean(0)
    away = flat - center
    values, vectors = torch.linalg.eigh(away @ away.T)
    most = max(1, min(most, n // _PER_COMPONENT))
    values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
    kept = values > 1e-9 * values.sum().clamp_min(1e-12)
    values, vectors = values[kept], vectors[:, kept]
    axes = (away.T @ vectors / values.sqrt()).T
    largest = axes.abs().argmax(1, keepdim=True)
    axes = axes * axes.gather(1, largest).sign()  # the same sign on every machine
    return center, axes, (values / n).sqrt()


def _coarse(spec: ModalitySpec) -> tuple[int, ...]:
    """Return the shape of a scan on the grid it is decoded on, with its channels."""
    most = _MOST_POINTS[len(spec.shape) - 1]
    return (spec.shape[0], *(min(n, most) for n in spec.shape[1:]))


def _shrunk(values: Tensor, coarse: tuple[int, ...]) -> Tensor:
    """Return scans on the coarse grid, by averages."""
    if tuple(values.shape[1:]) == coarse:
        return values
    pool = F.adaptive_avg_pool3d if len(coarse) == 4 else F.adaptive_avg_pool2d
    found: Tensor = pool(values, coarse[1:])  # type: ignore[arg-type]
    return found


def _enlarged(small: Tensor, spec: ModalitySpec) -> Tensor:
    """Return scans on their own grid, by interpolation."""
    if tuple(small.shape[1:]) == spec.shape:
        return small
    mode = "trilinear" if len(spec.shape) == 4 else "bilinear"
    return F.interpolate(small, spec.shape[1:], mode=mode, align_corners=False)


def _applied(rows: Tensor, weights: Tensor, owner: Tensor) -> Tensor:
    """Return each row `(B, d)` times the weights `(G, d, d)` of its own pattern."""
    found = torch.empty_like(rows)
    for g in range(len(weights)):
        at = (owner == g).nonzero().squeeze(1)
        found[at] = rows[at] @ weights[g]
    return found
