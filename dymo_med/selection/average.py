"""An answer averaged over subsets, each weighted by how reliable it looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, final

import torch
from pydantic import Field
from torch import Tensor

from dymo_med.selection.base import Cases, Fitted, require_something
from dymo_med.selection.evidence import (
    FEATURES,
    Alone,
    Standardiser,
    ask_alone,
    features,
    log_odds,
    spreads,
)
from dymo_med.selection.greedy import (
    Assessed,
    Candidates,
    RewardOptions,
    assess,
    attempt,
    make_trace,
    published_calibration,
    record,
    scatter,
)
from dymo_med.selection.reward import Distance, SimilarityCalibration
from dymo_med.types import (
    Fuse,
    FusionOutput,
    Mixture,
    ModalityMask,
    SelectionTrace,
    SubsetStatistics,
)

# Features of a subset as a whole; those of its candidates are added up beside them.
SUBSET_FEATURES = (
    "size",
    "quality",
    "distance",
    "confidence",
    "agrees_with_observed",
    "agrees_with_candidates",
    "agrees_with_admitted",
)


class AverageOptions(RewardOptions):
    """Settings of the average.

    Attributes:
        penalty: Strength of the ridge penalty on the weights.
        most: Candidates per patient that are combined freely, at most; the 2^most subsets of
            those with the best rewards are averaged.
    """

    penalty: Annotated[float, Field(gt=0)] = 1.0
    most: Annotated[int, Field(ge=1, le=10)] = 6


# Score that stands for certainty; a scaled feature is at most 5.
_CERTAIN = 20.0


@dataclass(frozen=True)
class _Subsets:
    """Every averaged subset of every patient, in a grid of 2^k codes.

    Attributes:
        valid: Bool `(B, S)`.
        admitted: Bool `(B, S, M)`.
        logits: `(B, S, K)`.
        embedding: `(B, S, D)`.
        candidate: Float64 `(B, M, P)`: features of each candidate on top of what was observed.
        whole: Float64 `(B, S, Q)`: features of each subset.
        step: Every candidate alone on top of what was observed.
        state: Of what was observed.
    """

    valid: Tensor
    admitted: Tensor
    logits: Tensor
    embedding: Tensor
    candidate: Tensor
    whole: Tensor
    step: Candidates
    state: Assessed


@dataclass(frozen=True)
class _Model:
    """Weights of the subsets' scores.

    Attributes:
        candidate_scale: Of the candidates' features.
        candidate_weight: Float64 `(P,)`.
        whole_scale: Of the subsets' features.
        whole_weight: Float64 `(Q,)`.
        temperature: Of the probabilities that are averaged.
    """

    candidate_scale: Standardiser
    candidate_weight: Tensor
    whole_scale: Standardiser
    whole_weight: Tensor
    temperature: float


@final
class SubsetAverage(Fitted[_Model]):
    """Average the answers over subsets of the recoveries instead of committing to one.

    Each subset A of a patient's candidates gets a score, linear in the features of its members
    (`evidence.FEATURES`, each on top of what was observed) and in features of the subset as a
    whole (`SUBSET_FEATURES`); a softmax over the patient's subsets turns scores into weights; the
    answer is the weighted mean of the subsets' probabilities. The weights of the features maximise
    the likelihood of that mean on held-back patients, under a ridge penalty.

    A candidate's trust is the summed weight of the subsets that hold it; it counts as admitted
    above one half. With no candidate the answer is that of the observed modalities.

    Args:
        options: See `AverageOptions`.
    """

    name = "subset_average"
    decides_by = "weights"
    admits = "all"
    Options = AverageOptions

    def select(
        self, fuse: Fuse, observed: ModalityMask, candidates: Tensor, statistics: SubsetStatistics
    ) -> SelectionTrace:
        """See `Selector.select`."""
        model = self.model
        subsets = self._combine(fuse, observed, candidates, statistics, model.temperature)
        weight = _weights(subsets, model)  # (B, S)
        trust = (weight[..., None] * subsets.admitted).sum(1)  # (B, M)
        admitted = trust > 0.5
        probability = torch.softmax(subsets.logits.double() / model.temperature, -1)
        mean = (weight[..., None] * probability).sum(1)
        alone = subsets.valid.sum(1) == 1
        logits = torch.where(
            alone[:, None],
            subsets.logits[:, 0].double(),
            mean.clamp_min(torch.finfo(mean.dtype).tiny).log() * model.temperature,
        ).to(subsets.logits.dtype)
        # The embedding is that of the subset whose members are all trusted.
        nearest = (subsets.admitted == admitted[:, None]).all(-1).to(torch.uint8).argmax(1)
        everyone = torch.arange(len(admitted), device=admitted.device)
        rows, code = subsets.valid.nonzero(as_tuple=True)
        step = subsets.step
        shown = torch.where(candidates, trust, -1.0)
        chosen = torch.where(admitted.any(1), shown.argmax(1), -1)
        steps = (
            [record(step, subsets.state, chosen, trust[step.rows, step.column])]
            if len(step.rows)
            else []
        )
        return make_trace(
            self.name,
            observed,
            candidates,
            admitted,
            steps,
            0.5,
            FusionOutput(logits, subsets.embedding[everyone, nearest]),
            Mixture(rows, subsets.admitted[rows, code], weight[rows, code]),
        )

    def similarity_calibration(self, distance: Distance) -> SimilarityCalibration:
        """See `Selector.similarity_calibration`."""
        asked: SimilarityCalibration | None = self.options.calibration
        return asked or published_calibration(distance)

    def fit(self, cases: Cases, statistics: SubsetStatistics) -> None:
        """See `Selector.fit`."""
        from scipy.optimize import minimize

        subsets = self._combine(
            cases.fuse, cases.observed, cases.candidates, statistics, cases.temperature
        )
        weights = cases.weights.double()
        valid = subsets.valid
        there = cases.candidates
        candidate_scale = Standardiser.of(
            subsets.candidate[there], weights[:, None].expand(there.shape)[there]
        )
        whole_scale = Standardiser.of(
            subsets.whole[valid], (weights / valid.sum(1))[:, None].expand(valid.shape)[valid]
        )
        p, q = subsets.candidate.shape[-1], subsets.whole.shape[-1]
        if not bool(there.any()):  # nothing can be said of candidates nobody has seen: admit none
            none = torch.zeros(q, dtype=torch.float64)
            none[SUBSET_FEATURES.index("size")] = -_CERTAIN
            self._model = _Model(
                candidate_scale,
                torch.zeros(p, dtype=torch.float64),
                Standardiser(torch.zeros_like(none), torch.ones_like(none)),
                none,
                cases.temperature,
            )
            return
        probability = torch.softmax(subsets.logits.double() / cases.temperature, -1)
        rows = torch.arange(len(cases), device=cases.labels.device)
        true = probability[rows, :, cases.labels]  # (B, S)

        members = _members(subsets, candidate_scale)
        whole = whole_scale(subsets.whole)

        def objective(values: Any) -> tuple[float, Any]:
            w = torch.tensor(values, dtype=torch.float64, device=true.device, requires_grad=True)
            score = (members @ w[:p] + whole @ w[p:]).masked_fill(~valid, -torch.inf)
            share = torch.softmax(score, -1)
            likelihood = (share * true).sum(-1).clamp_min(1e-12)
            loss = -(weights * likelihood.log()).sum() + self.options.penalty / 2 * w.square().sum()
            loss.backward()
            assert w.grad is not None
            return float(loss.detach()), w.grad.cpu().numpy()

        with torch.enable_grad():
            found = minimize(objective, torch.zeros(p + q).numpy(), jac=True, method="L-BFGS-B")
        w = torch.from_numpy(found.x.copy()).double()
        self._model = _Model(candidate_scale, w[:p], whole_scale, w[p:], cases.temperature)

    def state(self) -> dict[str, Any]:
        """See `Selector.state`."""
        m = self.model
        return {
            "features": [*FEATURES, *SUBSET_FEATURES],
            "candidate_mean": m.candidate_scale.mean.tolist(),
            "candidate_std": m.candidate_scale.std.tolist(),
            "candidate_weight": m.candidate_weight.tolist(),
            "whole_mean": m.whole_scale.mean.tolist(),
            "whole_std": m.whole_scale.std.tolist(),
            "whole_weight": m.whole_weight.tolist(),
            "temperature": m.temperature,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Selector.load_state`."""
        if state["features"] != [*FEATURES, *SUBSET_FEATURES]:
            raise ValueError("subset_average was fitted to other features than this version's.")

        def read(key: str) -> Tensor:
            return torch.tensor(state[key], dtype=torch.float64)

        self._model = _Model(
            Standardiser(read("candidate_mean"), read("candidate_std")),
            read("candidate_weight"),
            Standardiser(read("whole_mean"), read("whole_std")),
            read("whole_weight"),
            float(state["temperature"]),
        )

    def _combine(
        self,
        fuse: Fuse,
        observed: ModalityMask,
        candidates: Tensor,
        statistics: SubsetStatistics,
        temperature: float,
    ) -> _Subsets:
        """Fuse every subset that is averaged, once."""
        require_something(observed)
        b, m = candidates.shape
        device = candidates.device
        everyone = torch.arange(b, device=device)
        nobody = torch.zeros_like(candidates)
        start = fuse(everyone, observed.available, nobody)
        state = assess(start, observed.available, statistics, self.options.temperature)
        alone = ask_alone(fuse, observed, candidates, start.logits.shape[1], temperature)
        rows, column = candidates.nonzero(as_tuple=True)
        step, single = attempt(
            fuse,
            rows,
            column,
            nobody,
            observed.available,
            state,
            start.logits,
            statistics,
            self.options,
        )
        candidate = torch.zeros(
            b, m, len(FEATURES) + m, dtype=torch.float64, device=device
        ).index_put((rows, column), features(step, alone))
        # Candidates in order of their reward; code bit i stands for the i-th of them.
        gain = scatter(step.reward, step, b).nan_to_num(nan=-torch.inf)
        order = gain.argsort(dim=1, descending=True, stable=True)
        count = candidates.sum(1).clamp_max(self.options.most)  # (B,)
        most = int(count.max()) if b else 0
        codes = torch.arange(2**most, device=device)
        valid = codes[None] < (1 << count)[:, None]  # (B, S)
        bits = (codes[:, None] >> torch.arange(most, device=device)) & 1 == 1  # (S, most)
        admitted = torch.zeros(b, len(codes), m, dtype=torch.bool, device=device)
        admitted.scatter_(
            2,
            order[:, None, :most].expand(-1, len(codes), -1),
            bits[None].expand(b, -1, -1) & valid[..., None],
        )
        size = bits.sum(1)
        logits = start.logits.new_zeros(b, len(codes), start.logits.shape[1])
        embedding = start.embedding.new_zeros(b, len(codes), start.embedding.shape[1])
        logits[:, 0], embedding[:, 0] = start.logits, start.embedding
        # One candidate: fused already. Its code is 1 shifted by its rank.
        rank = order.argsort(dim=1)[rows, column]
        kept = rank < most
        at = (rows[kept], 1 << rank[kept])
        logits[at], embedding[at] = single.logits[kept], single.embedding[kept]
        patient, code = (valid & (size >= 2)).nonzero(as_tuple=True)
        if len(patient):
            chosen = admitted[patient, code]
            output = fuse(patient, observed.available[patient] | chosen, chosen)
            logits[patient, code], embedding[patient, code] = output.logits, output.embedding
        return _Subsets(
            valid,
            admitted,
            logits,
            embedding,
            candidate,
            self._whole(valid, admitted, logits, embedding, observed, alone, statistics),
            step,
            state,
        )

    def _whole(
        self,
        valid: Tensor,
        admitted: Tensor,
        logits: Tensor,
        embedding: Tensor,
        observed: ModalityMask,
        alone: Alone,
        statistics: SubsetStatistics,
    ) -> Tensor:
        """Return the features of each subset as a whole, float64 `(B, S, Q)`."""
        rows, code = valid.nonzero(as_tuple=True)
        inside = admitted[rows, code]  # (R, M)
        assessed = assess(
            FusionOutput(logits[rows, code], embedding[rows, code]),
            observed.available[rows] | inside,
            statistics,
            self.options.temperature,
        )
        probability = torch.softmax(logits.double() / alone.temperature, -1)
        p = probability[rows, code]  # (R, K)
        # How far each candidate, alone, agrees with each subset's answer.
        says = torch.einsum("bsk,bmk->bsm", probability, alone.probability)[rows, code]  # (R, M)
        members, size = alone.there[rows].double(), inside.sum(1)
        columns = [
            size.double(),
            assessed.quality.exp(),
            spreads(assessed.similarity),
            log_odds(p),
            (p * probability[rows, 0]).sum(-1),
            (says * members).sum(1) / members.sum(1).clamp_min(1),
            (says * inside).sum(1) / size.clamp_min(1),
        ]
        whole = p.new_zeros(*valid.shape, len(columns))
        whole[rows, code] = torch.stack(columns, -1)
        return whole


def _members(subsets: _Subsets, scale: Standardiser) -> Tensor:
    """Return the scaled features of each subset's members, added up, `(B, S, P)`."""
    return subsets.admitted.double() @ scale(subsets.candidate)


def _weights(subsets: _Subsets, model: _Model) -> Tensor:
    """Return the weight of each subset, float64 `(B, S)`, 0 where there is none."""
    device = subsets.valid.device
    score = _members(subsets, model.candidate_scale) @ model.candidate_weight.to(device)
    score = score + model.whole_scale(subsets.whole) @ model.whole_weight.to(device)
    return torch.softmax(score.masked_fill(~subsets.valid, -torch.inf), -1)
