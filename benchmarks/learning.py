"""Does it learn from few patients? The product beside plain references, on the same patients.

python benchmarks/learning.py simulated WORK --seeds 5 --patients 400 --size 32 --setting hard
python benchmarks/learning.py cohort COHORT WORK --seeds 5 --budget 4m [--moddrop]

`simulated` draws new patients in every seed: the network that `train` without a recipe would begin
with (descriptors, a table as one row, three networks), the network of earlier versions (strided
encoder, a token per column), the references of the product, and the answer of a bundle, which may
rest on network and reference. Imputers have no part in it: everybody is answered from what he has,
and from parts of it. KL is the divergence from the exact posterior, in nats.

`cohort` deals the patients of a cohort into as many parts as there are seeds, by label; each part
is the test set of one whole `train` without a recipe, so that every patient is tested once.
`product` is what the bundle answers by its default selector, recoveries and all; `network` its
network alone. With `--no-imputer` the network, the references and the answer are trained as for
`simulated`, in a minute a seed.

Patients count the same, however many records they have. Differences are paired, their intervals
from a bootstrap over patients, all seeds together. Answers are kept in WORK by seed, and a seed
that is there is not computed again; with `--seed` one is computed alone.
"""

import argparse
import csv
import os
import platform
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
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
from dymo_med.backbones import FusionBackbone, FusionTransformer, as_one, encode_versions
from dymo_med.bundle import ModelBundle, load_bundle, read_recipe
from dymo_med.comparators.base import only
from dymo_med.config import BackboneTraining, Recipe
from dymo_med.data.batch import collate
from dymo_med.data.patient import read_record
from dymo_med.data.truth import TRUTH, read_truth
from dymo_med.metrics import auroc
from dymo_med.references import features_of, under
from dymo_med.references.mixed import mixed_logits
from dymo_med.tasks import PLAIN
from dymo_med.training.answers import part
from dymo_med.training.calibration import fit_temperature
from dymo_med.training.comparators import train_comparators
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
from dymo_med.training.train import train
from dymo_med.types import Batch, Cohort, ModalitySpec

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
ORDER = ("product", "answer", *NETWORKS, "moddrop", *REFERENCES, "blanks only")
SPLITS = ("train", "validation", "calibration", "test")
HELD = {"validation": 0.2, "calibration": 0.2}  # of those who are not tested
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


def read_batches(cohort: Cohort) -> Batches:
    """Return every split's records that have anything."""
    found = {}
    for split in SPLITS:
        records = [
            read_record(e, cohort.specs, cohort.missing_values, require_something=False)
            for e in cohort.in_split(split)
        ]
        found[split] = collate([r for r in records if r.modalities], cohort.specs)
    return found


def with_labels(data: Batches) -> Batches:
    return {s: b.rows((b.labels >= 0).nonzero().squeeze(1)) for s, b in data.items()}


class Adding:
    """Adds what a method answers for test patients to the results."""

    def __init__(self, results: Results, test: Batch, prefix: str = "", truth: Any = None) -> None:
        self.results, self.test, self.prefix, self.truth = results, test, prefix, truth

    def __call__(self, method: str, scenario: str, mask: Tensor, probabilities: Any) -> None:
        names, truth = self.test.observed.names, self.truth
        rows = mask.any(1).nonzero().squeeze(1)
        kept = self.results.setdefault((scenario, method), Answers())
        for i, p in zip(rows.tolist(), probabilities, strict=True):
            kept.patients.append(f"{self.prefix}{self.test.patient_ids[i]}")
            kept.labels.append(int(self.test.labels[i]))
            kept.probability.append(float(p))
            left = [n for n, m in zip(names, mask[i].tolist(), strict=True) if m]
            exact = truth.of(self.test.record_ids[i], left) if truth else float("nan")
            kept.exact.append(exact)


def add_blanks(
    add: Adding, train: Batch, weights: Tensor, test: Batch, masks: dict[str, Tensor], seed: int
) -> None:
    """Answer from what is there and what is blank alone."""
    model = HistGradientBoostingClassifier(max_iter=60, max_leaf_nodes=6, random_state=seed)
    known = blank_table(train, train.observed.available)
    model.fit(known, train.labels.numpy(), sample_weight=weights.numpy())
    for scenario, mask in masks.items():
        rows = mask.any(1).nonzero().squeeze(1)
        told = model.predict_proba(blank_table(test, mask)[rows])[:, -1]
        add("blanks only", scenario, mask, told)


def one_seed(
    folder: Path,
    seed: int,
    results: Results,
    seconds: dict[str, list[float]],
    networks: tuple[str, ...] = tuple(NETWORKS),
) -> None:
    """Train and test everything once; add the test patients' answers to `results`."""
    cohort = read_cohort(folder)
    data = read_batches(cohort)
    specs, classes = fit_specs(cohort.specs, data["train"]), len(cohort.task.classes)
    labelled = with_labels(data)
    weights = record_weights(labelled["train"])
    began = time.process_time()
    references = train_references(specs, classes, PLAIN, data["train"], labelled, weights, seed)
    seconds.setdefault("references", []).append(time.process_time() - began)
    test, held = labelled["test"], labelled["calibration"]
    masks = scenarios(specs, test.observed.available, seed)
    truth = read_truth(folder) if (folder / TRUTH).is_file() else None
    features = features_of(test, specs)
    add = Adding(results, test, f"{seed}/" if truth else "", truth)
    for scenario, mask in masks.items():
        rows = mask.any(1).nonzero().squeeze(1)
        for name in REFERENCES:
            told = references.fitted[name].probabilities(
                under(features[rows], references.layout, mask[rows])
            )
            add(name, scenario, mask, told[:, -1])
    add_blanks(add, labelled["train"], weights, test, masks, seed)
    for method in networks:
        options, settings = NETWORKS[method]
        if "image" not in {spec.kind for spec in specs}:
            options = {k: v for k, v in options.items() if k not in ("image_encoders", "tails")}
            settings = {k: v for k, v in settings.items() if k != "augmentation"}
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
                    for b in {id(b): b for b in (labelled["validation"], held)}.values()
                ]
                chosen = weigh(references, both, PLAIN, seed)
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


def dealt(source: Path, folder: Path, part_number: int, parts: int) -> None:
    """Write a cohort again, of which one part of the patients is the test set."""
    cohort = read_cohort(source)
    label_of: dict[str, str] = {}
    for record in cohort.records:
        known = label_of.get(record.patient_id, "None")
        label_of[record.patient_id] = str(record.label) if known == "None" else known
    generator = random.Random(0)
    lines = ["patient_id,split"]
    for label in sorted(set(label_of.values())):
        group = sorted(p for p, own in label_of.items() if own == label)
        generator.shuffle(group)
        tested = group[part_number::parts]
        others = [p for p in group if p not in set(tested)]
        random.Random(part_number).shuffle(others)
        at = 0
        for split, share in HELD.items():
            count = round(share * len(others))
            lines += [f"{p},{split}" for p in others[at : at + count]]
            at += count
        lines += [f"{p},train" for p in others[at:]]
        lines += [f"{p},test" for p in tested]
    place = source if source.is_dir() else source.parent
    shutil.copytree(place, folder, copy_function=os.link)
    (folder / "splits.csv").unlink()
    (folder / "splits.csv").write_text("\n".join(lines) + "\n")


@torch.no_grad()
def one_part(
    folder: Path,
    run: Path,
    seed: int,
    budget_s: float,
    moddrop: bool,
    results: Results,
    seconds: dict[str, list[float]],
) -> None:
    """Train on a cohort without a recipe, and add the test patients' answers to `results`."""
    began = time.process_time()
    with torch.enable_grad():
        made = train(None, folder, run, device="cpu", seed=seed, budget_s=budget_s, resume=True)
    seconds.setdefault("train", []).append(time.process_time() - began)
    bundle = load_bundle(made, device="cpu")
    assert bundle.references is not None
    print(f"seed {seed}: {bundle.references.why} {bundle.choice.why}", flush=True)
    labelled = with_labels(read_batches(read_cohort(folder)))
    test = labelled["test"]
    masks = scenarios(bundle.specs, test.observed.available, seed)
    add = Adding(results, test)
    weights = {s: record_weights(b) for s, b in labelled.items()}
    add_blanks(add, labelled["train"], weights["train"], test, masks, seed)
    for scenario, mask in masks.items():
        rows = mask.any(1).nonzero().squeeze(1)
        for method, told in _answers(bundle, test.rows(rows), mask[rows]).items():
            add(method, scenario, mask, told[:, -1])
    if moddrop:
        with torch.enable_grad():
            comparator = _moddrop(bundle, labelled, run, seed)
        for scenario, mask in masks.items():
            rows = mask.any(1).nonzero().squeeze(1)
            logits = comparator.network(only(test.rows(rows), mask[rows])).double()
            add("moddrop", scenario, mask, (logits / comparator.temperature).softmax(1)[:, -1])


def _answers(bundle: ModelBundle, batch: Batch, mask: Tensor) -> dict[str, Tensor]:
    """Return probabilities `(R, K)` by method."""
    assert bundle.references is not None
    of_part = only(batch, mask)
    recovery = bundle.imputer.recover(of_part)
    network = encode_versions(bundle.backbone, of_part, recovery)
    fuse = bundle.answering(network, of_part, recovery)
    rows, nothing = torch.arange(len(mask)), torch.zeros_like(mask)
    temperature = bundle.calibration.temperature
    trace = bundle.selector.select(fuse, of_part.observed, recovery.candidates, bundle.statistics)
    features = features_of(of_part, bundle.specs)
    return {
        "product": bundle.calibration.probabilities(trace.output.logits),
        "answer": (fuse(rows, mask, nothing).logits.double() / temperature).softmax(1),
        "network": (network(rows, mask, nothing).logits.double() / temperature).softmax(1),
        **{n: bundle.references.fitted[n].probabilities(features) for n in REFERENCES},
    }


def _moddrop(bundle: ModelBundle, labelled: Batches, run: Path, seed: int) -> Any:
    """Return a ModDrop network, trained and calibrated as `train` would."""
    recipe = read_recipe(run / "recipe.yaml").model_dump(exclude_none=True)
    plan = Recipe.model_validate({**recipe, "comparators": ["moddrop"]})
    adjusting, _ = part(labelled["validation"], labelled["calibration"], seed)
    log = Log(run / "moddrop.csv")
    found = train_comparators(
        plan,
        bundle.specs,
        len(bundle.task.classes),
        {**labelled, "calibration": adjusting},
        {s: record_weights(b) for s, b in labelled.items()},
        partial(
            train_stage,
            seed=seed,
            fabric=Fabric(accelerator="cpu", devices=1),
            fingerprint="benchmark",
            log=log,
        ),
        log,
        run / "moddrop",
        CPU,
    )
    return found["moddrop"]


def blank_table(batch: Batch, mask: Tensor) -> Floats:
    """Return what is there and what is blank, and nothing else, `(n, M + F)`."""
    fields = [batch.observed_fields[n] for n in batch.observed.names if n in batch.observed_fields]
    return torch.cat([mask, *fields], dim=1).float().numpy()


def log_losses(y: Floats, p: Floats) -> Floats:
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return -np.where(y == 1, np.log(p), np.log(1 - p))


def area(y: Floats, p: Floats, weights: Floats) -> Floats:
    return auroc(y, np.stack([1 - p, p], axis=1), weights)


def table(results: Results, draws: int = 1000) -> list[dict[str, Any]]:
    """Return rows of the table: figures, and paired differences to the better reference."""
    rows = []
    for scenario in dict.fromkeys(s for s, _ in results):
        losses = {}
        for method in (m for m in ORDER if (scenario, m) in results):
            a = results[scenario, method]
            y, p = np.array(a.labels), np.array(a.probability)
            losses[method] = (y, p, np.array(a.exact), np.array(a.patients))
        people = losses[REFERENCES[0]][3]
        counts = Counter(people.tolist())
        weight = np.array([1 / counts[p] for p in people])
        best = min(REFERENCES, key=lambda m: np.average(log_losses(*losses[m][:2]), weights=weight))
        reference = losses[best]
        names, index = np.unique(people, return_inverse=True)
        times = np.random.default_rng(0).multinomial(
            len(names), [1 / len(names)] * len(names), draws
        )
        drawn = times[:, index] * weight
        for method, (y, p, exact, _) in losses.items():
            row = {
                "scenario": scenario,
                "method": method,
                "patients": len(names),
                "auroc": roc_auc_score(y, p, sample_weight=weight),
                "log_loss": np.average(log_losses(y, p), weights=weight),
            }
            if np.isfinite(exact).all():
                row["kl"] = divergence(exact, np.clip(p, 1e-6, 1 - 1e-6)).mean()
                row["exact_auroc"] = roc_auc_score(y, exact)
            if method != best:
                apart = log_losses(y, p) - log_losses(*reference[:2])
                means = drawn @ apart / drawn.sum(1)
                in_loss = np.quantile(means, (0.025, 0.975))
                gains = area(y, p, drawn) - area(y, reference[1], drawn)
                low, high = np.nanquantile(gains, (0.025, 0.975))
                gain = row["auroc"] - roc_auc_score(y, reference[1], sample_weight=weight)
                row |= {
                    "against": best,
                    "auroc_gain": f"{gain:+.3f} ({low:+.3f} to {high:+.3f})",
                    "log_loss_gain": f"{np.average(apart, weights=weight):+.3f}"
                    f" ({in_loss[0]:+.3f} to {in_loss[1]:+.3f})",
                }
            rows.append(row)
    return rows


COLUMNS = ("scenario", "method", "patient", "label", "probability", "exact")


def keep(results: Results, path: Path) -> None:
    """Write one seed's answers."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for (scenario, method), a in results.items():
            for row in zip(a.patients, a.labels, a.probability, a.exact, strict=True):
                writer.writerow([scenario, method, *row])


def kept(paths: list[Path]) -> Results:
    """Return the answers of some seeds."""
    results: Results = {}
    for path in paths:
        with path.open(newline="") as stream:
            for row in csv.DictReader(stream):
                a = results.setdefault((row["scenario"], row["method"]), Answers())
                a.patients.append(row["patient"])
                a.labels.append(int(row["label"]))
                a.probability.append(float(row["probability"]))
                a.exact.append(float(row["exact"]))
    return results


def report(results: Results, work: Path, seeds: int) -> None:
    """Print and write the table of all seeds so far."""
    rows = table(results)
    with (work / "learning.csv").open("w", newline="") as stream:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    exact = any("kl" in row for row in rows)
    print(
        f"\n| scenario | method | AUROC | log-loss |{' KL |' * exact} AUROC gain | log-loss gain |"
    )
    print(f"|---|---|---|---|{'---|' * exact}---|---|")
    for r in rows:
        divergence_of = f" {r['kl']:.3f} |" if exact else ""
        print(
            f"| {r['scenario']} | {r['method']} | {r['auroc']:.3f} | {r['log_loss']:.3f} |"
            f"{divergence_of} {r.get('auroc_gain', '–')} | {r.get('log_loss_gain', '–')} |"
        )
    print(
        "\ngains against the reference of lowest log-loss of each scenario;"
        f" {rows[0]['patients']} test patients, {seeds} seeds"
    )


def seconds_of(text: str) -> float:
    """Return the seconds of `90s` or `4m`."""
    return float(text[:-1]) * {"s": 1, "m": 60}[text[-1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("simulated", "cohort"))
    parser.add_argument("places", type=Path, nargs="+", help="WORK, or COHORT WORK")
    parser.add_argument("--seeds", type=int, default=5, help="of a cohort also its parts")
    parser.add_argument("--seed", type=int, help="compute this one alone")
    parser.add_argument("--patients", type=int, default=400)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--setting", default="hard")
    parser.add_argument("--budget", default="4m", help="of every train, as 90s or 4m")
    parser.add_argument("--no-imputer", action="store_true", help="no whole train of a cohort")
    parser.add_argument("--moddrop", action="store_true", help="train a ModDrop network too")
    a = parser.parse_args()
    work = a.places[-1]
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    files = {seed: work / f"answers-{seed}.csv" for seed in range(a.seeds)}
    for seed in files if a.seed is None else [a.seed]:
        if files[seed].exists():
            continue
        folder = work / f"cohort-{seed}"
        results: Results = {}
        seconds: dict[str, list[float]] = {}
        if a.kind == "simulated":
            from dymo_med.data.dials import setting

            if not folder.exists():
                dials = setting(a.setting)
                simulate(folder, a.patients, seed=2000 + seed, size=a.size, dials=dials)
            one_seed(folder, seed, results, seconds)
        else:
            if not folder.exists():
                dealt(a.places[0], folder, seed, a.seeds)
            if a.no_imputer:
                one_seed(folder, seed, results, seconds, ("network",))
            else:
                run = work / f"run-{seed}"
                budget = seconds_of(a.budget)
                one_part(folder, run, seed, budget, a.moddrop, results, seconds)
        keep(results, files[seed])
        for name, costs in seconds.items():
            print(f"seed {seed}, {name}: {sum(costs):.0f} s of CPU")
    done = [path for path in files.values() if path.exists()]
    report(kept(done), work, len(done))
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
