"""Does the network learn from the scans? Beside plain references, on the same patients.

python benchmarks/learning.py simulated WORK --seeds 5 --patients 400 --size 32 --setting hard
python benchmarks/learning.py cohort COHORT WORK --seeds 5

Of every seed: the network that `train` without a recipe would begin with (descriptors, a table as
one row, three networks), the network of earlier versions (strided encoder, a token per column), the
references of the product, and the answer of a bundle, which may rest on network and reference.
Imputers have no part in it: everybody is answered from what he has, and from parts of it. Simulated
patients are new in every seed; those of a cohort keep their splits. Differences are paired, their
intervals from a bootstrap over patients, all seeds together. Where there is a `truth.csv` with
posteriors of subsets, KL is the divergence of the answer from the exact one, in nats.
"""

import argparse
import csv
import platform
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exact import divergence
from lightning_fabric import Fabric
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from torch import Tensor

from dymo_med import read_cohort, simulate
from dymo_med.backbones import FusionBackbone, FusionTransformer, as_one
from dymo_med.config import BackboneTraining
from dymo_med.data.batch import collate
from dymo_med.data.patient import read_record
from dymo_med.data.truth import TRUTH, read_truth
from dymo_med.references import features_of, under
from dymo_med.references.mixed import mixed_logits
from dymo_med.training.calibration import fit_temperature
from dymo_med.training.fit_specs import fit_specs
from dymo_med.training.loop import Log, new_weights, train_stage
from dymo_med.training.objectives import (
    FusionObjective,
    encode_all,
    record_weights,
    sampled_subsets,
    subset_logits,
)
from dymo_med.training.references import Held, train_references, weigh
from dymo_med.types import Batch, ModalitySpec

SIZES = {"dim": 64, "heads": 4, "layers": 2, "projection": 32, "width": 8}
TRAINING = {
    "epochs": 40,
    "batch_size": 16,
    "learning_rate": 0.001,
    "weight_decay": 0.01,
    "patience": 12,
    "subsets": 6,
    "decay": "cosine",
    "augmentation": {"shift_voxels": 1, "intensity": 0.05},
}
NETWORKS = {
    "network": (
        {**SIZES, "image_encoders": ["descriptors"], "table_encoder": "row", "dropout": 0.2},
        {**TRAINING, "members": 3},
    ),
    "network before": (
        {**SIZES, "image_encoders": ["strided"], "tails": False, "table_encoder": "columns"},
        TRAINING,
    ),
}
REFERENCES = ("boosting", "logistic", "reference_mean")
CPU = torch.device("cpu")
Specs = tuple[ModalitySpec, ...]
Batches = dict[str, Batch]
Floats = np.ndarray


@dataclass
class Answers:
    """Of one scenario and method, over seeds: patients, labels, probabilities, exact ones."""

    patients: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)


Results = dict[tuple[str, str], Answers]


def trained(
    specs: Specs, labelled: Batches, classes: int, options: Any, settings: Any, seed: int
) -> tuple[FusionBackbone, float]:
    """Return the mean of `members` networks, in evaluation mode, and seconds of CPU."""
    settings = BackboneTraining.model_validate(settings)
    began, networks = time.process_time(), []
    weights = {s: record_weights(labelled[s]) for s in ("train", "validation")}
    for k in range(settings.members):
        with new_weights(seed, f"backbone {k}"):
            network = FusionTransformer(specs, classes, FusionTransformer.Options(**options))
        objective = FusionObjective(
            network, classes, settings, labelled["validation"], weights["validation"], CPU, seed
        )
        with tempfile.TemporaryDirectory() as folder:
            train_stage(
                f"backbone {k}",
                objective,
                labelled["train"],
                weights["train"],
                settings,
                seed,
                fabric=Fabric(accelerator="cpu", devices=1),
                checkpoint=Path(folder) / "c.safetensors",
                fingerprint="benchmark",
                log=Log(Path(folder) / "log.csv"),
            )
        networks.append(network)
    return as_one(networks).eval(), time.process_time() - began


def scenarios(specs: Specs, available: Tensor, seed: int) -> dict[str, Tensor]:
    """Return bool masks `(n, M)` by name: what is left of each record."""
    found = {"as-is": available}
    images = torch.tensor([spec.is_image for spec in specs])
    if images.any() and not images.all():
        found["scans only"] = available & images
        found["tables only"] = available & ~images
    for rate in (0.25, 0.5, 0.75):
        g = torch.Generator().manual_seed(seed * 100 + int(100 * rate))
        kept = available & (torch.rand(available.shape, generator=g) >= rate)
        # Nobody loses everything: one modality that was there stays.
        one = (
            torch.rand(available.shape, generator=g).where(available, torch.tensor(-1.0)).argmax(1)
        )
        lost = ~kept.any(1)
        kept[lost, one[lost]] = True
        found[f"rate {rate}"] = kept
    return found


def one_seed(folder: Path, seed: int, results: Results, seconds: dict[str, list[float]]) -> None:
    """Train and test everything once; add the test patients' answers to `results`."""
    cohort = read_cohort(folder)
    data = {
        split: collate(
            [read_record(e, cohort.specs, cohort.missing_values) for e in cohort.in_split(split)],
            cohort.specs,
        )
        for split in ("train", "validation", "calibration", "test")
    }
    specs, classes = fit_specs(cohort.specs, data["train"]), len(cohort.task.classes)
    labelled = {s: b.rows((b.labels >= 0).nonzero().squeeze(1)) for s, b in data.items()}
    weights = record_weights(labelled["train"])
    began = time.process_time()
    references = train_references(specs, classes, None, data["train"], labelled, weights, seed)
    seconds.setdefault("references", []).append(time.process_time() - began)
    test, held = labelled["test"], labelled["calibration"]
    masks = scenarios(specs, test.observed.available, seed)
    truth = read_truth(folder) if (folder / TRUTH).is_file() else None
    names = [spec.name for spec in specs]
    features = features_of(test, specs)

    def add(method: str, scenario: str, mask: Tensor, probabilities: Any) -> None:
        rows = mask.any(1).nonzero().squeeze(1)
        kept = results.setdefault((scenario, method), Answers())
        for i, p in zip(rows.tolist(), probabilities, strict=True):
            kept.patients.append(f"{seed}/{test.patient_ids[i]}" if truth else test.patient_ids[i])
            kept.labels.append(int(test.labels[i]))
            kept.probability.append(float(p))
            left = [n for n, m in zip(names, mask[i].tolist(), strict=True) if m]
            kept.exact.append(truth.of(test.record_ids[i], left) if truth else float("nan"))

    for scenario, mask in masks.items():
        rows = mask.any(1).nonzero().squeeze(1)
        for name in REFERENCES:
            told = references.fitted[name].probabilities(
                under(features[rows], references.layout, mask[rows])
            )
            add(name, scenario, mask, told[:, -1])
        blanks = blank_table(labelled["train"], labelled["train"].observed.available)
        model = HistGradientBoostingClassifier(max_iter=60, max_leaf_nodes=6, random_state=seed)
        model.fit(blanks, labelled["train"].labels.numpy(), sample_weight=weights.numpy())
        told = model.predict_proba(blank_table(test, mask)[rows])[:, -1]
        add("blanks only", scenario, mask, told)
    for method, (options, settings) in NETWORKS.items():
        network, cost = trained(specs, labelled, classes, options, settings, seed)
        seconds.setdefault(method, []).append(cost)
        with torch.no_grad():
            of_held = encode_all(network, held, CPU)
            logits, rows = subset_logits(
                of_held, held.observed.available, sampled_subsets(len(specs), seed)
            )
            temperature = fit_temperature(
                logits, held.labels[rows], [held.patient_ids[i] for i in rows.tolist()]
            )
            fuse = encode_all(network, test, CPU)
            chosen = None
            if method == "network":
                both = [
                    Held(b, features_of(b, specs), encode_all(network, b, CPU), temperature)
                    for b in (labelled["validation"], held)
                ]
                chosen = weigh(references, both, None, seed)
                print(f"seed {seed}: {chosen.why}", flush=True)
            for scenario, mask in masks.items():
                rows = mask.any(1).nonzero().squeeze(1)
                out = fuse(rows, mask[rows], torch.zeros_like(mask[rows])).logits.double()
                add(method, scenario, mask, (out / temperature).softmax(1)[:, -1])
                if chosen is not None:
                    answer = out / temperature
                    if chosen.mixed is not None:
                        inputs = under(features[rows], references.layout, mask[rows])
                        fitted = chosen.mixed
                        other = fitted.probabilities(inputs)
                        answer = mixed_logits(out, other, chosen.weight, temperature) / temperature
                    add("answer", scenario, mask, answer.softmax(1)[:, -1])


def blank_table(batch: Batch, mask: Tensor) -> Floats:
    """Return what is there and what is blank, and nothing else, `(n, M + F)`."""
    fields = [batch.observed_fields[n] for n in batch.observed.names if n in batch.observed_fields]
    return torch.cat([mask, *fields], dim=1).float().numpy()


def log_losses(y: Floats, p: Floats) -> Floats:
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return -np.where(y == 1, np.log(p), np.log(1 - p))


def table(results: Results, draws: int = 1000) -> list[dict[str, Any]]:
    """Return rows of the table: figures, and paired differences to the better reference."""
    rows = []
    order = ["answer", *NETWORKS, *REFERENCES, "blanks only"]
    for scenario in dict.fromkeys(s for s, _ in results):
        losses = {}
        for method in order:
            a = results[scenario, method]
            y, p = np.array(a.labels), np.array(a.probability)
            losses[method] = (y, p, np.array(a.exact), np.array(a.patients))
        best = min(REFERENCES, key=lambda m: log_losses(*losses[m][:2]).mean())
        reference = losses[best]
        people, index = np.unique(reference[3], return_inverse=True)
        of_person = [np.flatnonzero(index == i) for i in range(len(people))]
        rng = np.random.default_rng(0)
        samples = [
            np.concatenate([of_person[i] for i in rng.integers(0, len(people), len(people))])
            for _ in range(draws)
        ]
        for method in order:
            y, p, exact, _ = losses[method]
            row = {
                "scenario": scenario,
                "method": method,
                "patients": len(people),
                "auroc": roc_auc_score(y, p),
                "log_loss": log_losses(y, p).mean(),
                "kl": divergence(exact, np.clip(p, 1e-6, 1 - 1e-6)).mean(),
                "exact_auroc": roc_auc_score(y, exact) if np.isfinite(exact).all() else np.nan,
            }
            if method not in REFERENCES:
                apart = log_losses(y, p) - log_losses(*reference[:2])
                in_loss = np.quantile([apart[s].mean() for s in samples], (0.025, 0.975))
                gains = [
                    roc_auc_score(y[s], p[s]) - roc_auc_score(y[s], reference[1][s])
                    for s in samples[:300]
                    if len(set(y[s])) > 1
                ]
                low, high = np.quantile(gains, (0.025, 0.975))
                gain = row["auroc"] - roc_auc_score(y, reference[1])
                row |= {
                    "against": best,
                    "auroc_gain": f"{gain:+.3f} ({low:+.3f} to {high:+.3f})",
                    "log_loss_gain": f"{apart.mean():+.3f}"
                    f" ({in_loss[0]:+.3f} to {in_loss[1]:+.3f})",
                }
            rows.append(row)
    return rows


def report(results: Results, seconds: dict[str, list[float]], work: Path, seeds: int) -> None:
    """Print and write the table of all seeds so far."""
    rows = table(results)
    with (work / "learning.csv").open("w", newline="") as stream:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print("\n| scenario | method | AUROC | log-loss | KL | AUROC gain | log-loss gain |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        gains = f"{r.get('auroc_gain', '')} | {r.get('log_loss_gain', '')}"
        print(
            f"| {r['scenario']} | {r['method']} | {r['auroc']:.3f} | {r['log_loss']:.3f}"
            f" | {r['kl']:.3f} | {gains} |"
        )
    print(
        "\ngains against the reference of lowest log-loss of each scenario;"
        f" {rows[0]['patients']} test patients, {seeds} seeds"
    )
    for name, costs in seconds.items():
        print(f"{name}: {sum(costs) / len(costs):.0f} s of CPU a seed")
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("simulated", "cohort"))
    parser.add_argument("places", type=Path, nargs="+", help="WORK, or COHORT WORK")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--patients", type=int, default=400)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--setting", default="hard")
    a = parser.parse_args()
    work = a.places[-1]
    work.mkdir(parents=True, exist_ok=True)
    results, seconds = {}, {}
    torch.set_num_threads(1)
    for seed in range(a.seeds):
        if a.kind == "simulated":
            from dymo_med.data.dials import setting

            folder = work / f"cohort-{seed}"
            if not folder.exists():
                dials = setting(a.setting)
                simulate(folder, a.patients, seed=2000 + seed, size=a.size, dials=dials)
        else:
            folder = a.places[0]
        one_seed(folder, seed, results, seconds)
        report(results, seconds, work, seed + 1)


if __name__ == "__main__":
    main()
