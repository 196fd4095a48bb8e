"""When does recovering pay? Averages over draws against leaving the gaps, on the same patients.

python benchmarks/when.py tables WORK --seeds 3
python benchmarks/when.py simulated WORK --seeds 5 --patients 800 --setting hard --labels 40,80,200

A map over the number of labelled training patients (of 400), redundancy between modalities, who
the imputer is fitted on (labelled patients alone, or all), and how many modalities are hidden.
`tables` draws patients with five tables whose evidence is shared to a part that is dialled.
`simulated` makes cohorts of scans and tables; what the network reads of scans are descriptors.
Every network is trained on parts of what labelled patients have (as `train` does), and answers
for the same test patients from what is left (gap), from the imputer's best guess, and averaged
over 20 draws. The product's rule for its default is asked on 60 calibration patients, and told
right or wrong by the test patients. Gains are in nats of log-loss and in AUROC, above 0 =
recovering is better; 95 % intervals from a bootstrap over patients, all seeds together.
"""

import argparse
import csv
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learning import NETWORKS, log_losses, scenarios, trained
from torch import Tensor

from dymo_med import read_cohort, simulate
from dymo_med.data.batch import collate
from dymo_med.data.dials import setting
from dymo_med.data.patient import read_record
from dymo_med.drawn import recovered
from dymo_med.imputers.conditional import Conditional
from dymo_med.metrics import auroc
from dymo_med.references import References, features_of, under
from dymo_med.selection import SELECTORS
from dymo_med.tasks import PLAIN
from dymo_med.training.calibration import fit_temperature
from dymo_med.training.objectives import (
    encode_all,
    record_weights,
    sampled_subsets,
    subset_logits,
)
from dymo_med.training.references import Held, train_references, weigh
from dymo_med.training.selectors import calibration_cases, choose, held_out
from dymo_med.training.train import fit_specs
from dymo_med.types import Batch, Column, ModalityMask, ModalitySpec

CPU = torch.device("cpu")
METHODS = ("observed_only", "trust_all", "average", "guarded")
RATES = ("rate 0.25", "rate 0.5", "rate 0.75")
SIZES = {"train": 400, "validation": 40, "calibration": 60, "test": 400}
Specs = tuple[ModalitySpec, ...]
Batches = dict[str, Batch]


@dataclass
class Cell:
    """One cell of the map, over seeds: answers of test patients by method, and what was chosen."""

    labels: list[int] = field(default_factory=list)
    answers: dict[str, list[float]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)


Map = dict[tuple[str, ...], Cell]


def tables(redundancy: float, seed: int) -> tuple[Specs, Batches]:
    """Return patients with five tables of four cells; each shows evidence of its own.

    Evidence is normal given the label with separation .8; `redundancy` is the share of its
    variance that all tables have in common. Two of a table's cells show its evidence, two a
    nuisance that is shared to the same part.
    """
    rng = np.random.default_rng([seed, 17])
    names = tuple("abcde")
    specs = tuple(
        ModalitySpec(
            n,
            "table",
            f"{n}.csv",
            (4,),
            columns=tuple(Column(f"{n}{j}", "continuous") for j in range(4)),
        )
        for n in names
    )
    loadings = rng.choice([-1, 1], (5, 4)) * rng.uniform(0.6, 1.0, (5, 4))
    data = {}
    for split, n in SIZES.items():
        y = rng.integers(0, 2, n)
        own = np.sqrt(1 - redundancy) * rng.normal(size=(n, 5, 2))
        both = np.sqrt(redundancy) * rng.normal(size=(n, 1, 2))
        latent = own + both
        latent[:, :, 0] += 0.8 * (y[:, None] - 0.5)
        cells = loadings * latent[:, :, [0, 0, 1, 1]] + 0.6 * rng.normal(size=(n, 5, 4))
        ids = tuple(f"{split}{i}" for i in range(n))
        seen = torch.ones(n, 5, dtype=torch.bool)
        data[split] = Batch(
            ids,
            ids,
            {name: torch.from_numpy(cells[:, m]).float() for m, name in enumerate(names)},
            ModalityMask(names, seen),
            {name: torch.ones(n, 4, dtype=torch.bool) for name in names},
            torch.from_numpy(y),
        )
    return fit_specs(specs, data["train"]), data


def simulated(folder: Path, a: argparse.Namespace, seed: int) -> tuple[Specs, Batches]:
    """Return a simulated cohort; of its scans only descriptors are kept, voxels being unread."""
    if not folder.exists():
        dials = setting(a.setting)
        dials = dials.model_copy(update={"flair_after_contrast": a.redundant})
        simulate(folder, a.patients, seed=4000 + seed, size=a.size, dials=dials)
    cohort = read_cohort(folder)
    data = {
        split: collate(
            [read_record(e, cohort.specs, cohort.missing_values) for e in cohort.in_split(split)],
            cohort.specs,
        )
        for split in SIZES
    }
    specs = fit_specs(cohort.specs, data["train"])
    small = {s.name: (1, 2, 2, 2) for s in specs if s.is_image}

    def thin(batch: Batch) -> Batch:
        n = len(batch)
        values = {
            k: torch.zeros(n, *small[k]) if k in small else v for k, v in batch.values.items()
        }
        return replace(batch, values=values)

    for split, n in (("validation", 40), ("calibration", 60)):
        data[split] = some(data[split], n, seed)
    specs = tuple(replace(s, shape=small.get(s.name, s.shape)) for s in specs)
    return specs, {split: thin(batch) for split, batch in data.items()}


def some(batch: Batch, n: int, seed: int) -> Batch:
    """Return n records, drawn by the seed."""
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    return batch.rows(order[:n].sort().values)


def left(batch: Batch, mask: Tensor) -> Batch:
    """Return records with what a mask leaves of them."""
    fields = {
        n: f & mask[:, batch.observed.names.index(n), None]
        for n, f in batch.observed_fields.items()
    }
    observed = ModalityMask(batch.observed.names, mask)
    return replace(batch, observed=observed, observed_fields=fields)


def one_seed(
    specs: Specs, data: Batches, labels: int, seed: int, key: tuple[str, ...], found: Map
) -> list[dict[str, Any]]:
    """Train once, and add what every method answers to the map; return what was chosen."""
    train = data["train"]
    labelled = {**data, "train": some(train, labels, seed + 10)}
    options, settings = NETWORKS["network"]
    if not any(s.is_image for s in specs):
        options = {k: v for k, v in options.items() if k != "image_encoders"}
    network, _ = trained(specs, labelled, 2, options, settings, seed)
    held = labelled["calibration"]
    chosen = []
    with torch.no_grad():
        fuse = encode_all(network, held, CPU)
        logits, rows = subset_logits(
            fuse, held.observed.available, sampled_subsets(len(specs), seed)
        )
        temperature = fit_temperature(
            logits, held.labels[rows], [held.patient_ids[i] for i in rows.tolist()]
        )
        mixed = None
        if any(s.is_image for s in specs):  # the map itself is of the network
            weights = record_weights(labelled["train"])
            references = train_references(specs, 2, PLAIN, train, labelled, weights, seed)
            both = [
                Held(b, features_of(b, specs), encode_all(network, b, CPU), temperature)
                for b in (labelled["validation"], held)
            ]
            mixed = weigh(references, both, PLAIN, seed)
        test = data["test"]
        masks = scenarios(specs, test.observed.available, seed)
        for who, patients in (("all", train), ("labelled", labelled["train"])):
            imputer = Conditional(specs, Conditional.Options(pictures=0))
            imputer.start_from(patients)
            for answers, refs in (("network", None), ("default", mixed)):
                if answers == "default" and (who == "labelled" or refs is None):
                    continue
                cell = (*key, str(labels), who, answers)
                cases, people = calibration_cases(
                    imputer, network, held, record_weights(held), temperature, seed, CPU, refs
                )
                selectors = {n: SELECTORS[n]() for n in METHODS}
                selectors["guarded"].fit(cases, None)
                told = held_out(selectors, cases, None, people)
                choice = choose(told, cases, people)
                gain, error = gain_of(told, cases.labels, people)
                chosen.append(
                    {"cell": cell, "seed": seed, "choice": choice.name, "gain": gain, "se": error}
                )
                for rate in RATES:
                    answer_for(
                        left(test, masks[rate]),
                        imputer,
                        network,
                        refs,
                        temperature,
                        selectors,
                        found,
                        (*cell, rate),
                        seed,
                        choice.name,
                    )
                    if refs is not None:
                        add_references(found[*cell, rate], test, masks[rate], mixed, specs)
    return chosen


def gain_of(told: dict[str, Tensor], labels: Tensor, people: list[str]) -> tuple[float, float]:
    """Return the gain of `average` on calibration patients, and its standard error."""
    rows = torch.arange(len(labels))
    apart = told["average"][rows, labels] - told["observed_only"][rows, labels]
    names = sorted(set(people))
    index = torch.tensor([names.index(p) for p in people])
    each = torch.zeros(len(names), dtype=torch.float64).index_add_(0, index, apart)
    each = each / torch.bincount(index)
    return float(each.mean()), float(each.std() / len(names) ** 0.5)


def answer_for(
    batch: Batch,
    imputer: Conditional,
    network: Any,
    refs: References | None,
    temperature: float,
    selectors: dict[str, Any],
    found: Map,
    key: tuple[str, ...],
    seed: int,
    default: str,
) -> None:
    """Add every method's answers for test patients to a cell."""
    cell = found.setdefault(key, Cell())
    made = recovered(imputer, network, refs, batch, temperature, seed=seed)
    cell.labels += batch.labels.tolist()
    cell.seeds += [seed] * len(batch)
    for name, selector in selectors.items():
        trace = selector.select(made.fuse, batch.observed, made.recovery.candidates, None)
        p = torch.softmax(trace.output.logits.double() / temperature, 1)[:, 1].tolist()
        cell.answers.setdefault(name, []).extend(p)
        if name == default:
            cell.answers.setdefault("chosen", []).extend(p)
    # The network by itself, gaps left: what a default with references is compared with, too.
    rows = torch.arange(len(batch))
    none = torch.zeros_like(batch.observed.available)
    alone = made.network(rows, batch.observed.available, none).logits.double() / temperature
    cell.answers.setdefault("network, gaps", []).extend(alone.softmax(1)[:, 1].tolist())


def add_references(
    cell: Cell, test: Batch, mask: Tensor, references: References, specs: Specs
) -> None:
    """Add what plain references answer."""
    features = under(features_of(test, specs), references.layout, mask)
    for name, fitted in references.fitted.items():
        cell.answers.setdefault(name, []).extend(fitted.probabilities(features)[:, 1].tolist())


def compared(cell: Cell, one: str, other: str, draws: int = 500) -> dict[str, float]:
    """Return by how much one method is better than another, with intervals over patients."""
    y, seeds = np.array(cell.labels), np.array(cell.seeds)
    p, q = (np.array(cell.answers[m]) for m in (one, other))
    apart = log_losses(y, q) - log_losses(y, p)
    rng = np.random.default_rng(0)
    losses, areas, own = np.zeros(draws), np.zeros(draws), []
    groups = [np.flatnonzero(seeds == s) for s in np.unique(seeds)]
    for g in groups:
        weights = rng.multinomial(len(g), np.full(len(g), 1 / len(g)), size=draws).astype(float)
        weights = np.vstack([np.ones(len(g)), weights])
        areas_of = [auroc(y[g], np.stack([1 - r[g], r[g]], 1), weights) for r in (p, q)]
        gained = areas_of[0] - areas_of[1]
        own.append(gained[0])
        areas += gained[1:] / len(groups)
        losses += weights[1:] @ apart[g] / len(y)
    low, high = np.quantile(losses, (0.025, 0.975))
    auc_low, auc_high = np.quantile(areas, (0.025, 0.975))
    return {
        "gain": float(apart.mean()),
        "low": float(low),
        "high": float(high),
        "auroc": float(np.mean(own)),
        "auroc_low": float(auc_low),
        "auroc_high": float(auc_high),
    }


def report(found: Map, chosen: list[dict[str, Any]], work: Path) -> None:
    """Print and write the map so far."""
    rows = []
    for key, cell in found.items():
        *where, rate = key
        pairs = [("average", "observed_only"), ("trust_all", "observed_only")]
        if where[-1] == "default":
            pairs += [("chosen", "network, gaps"), ("chosen", "observed_only")]
            pairs += [("chosen", m) for m in ("boosting", "logistic")]
        for one, other in pairs:
            row = {"cell": " ".join(where), "rate": rate, "method": one, "against": other}
            rows.append(row | compared(cell, one, other))
    with (work / "when.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print("\n| labels, imputer, answers | hidden | method | against | log-loss | AUROC |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['cell']} | {r['rate']} | {r['method']} | {r['against']}"
            f" | {r['gain']:+.3f} ({r['low']:+.3f} to {r['high']:+.3f})"
            f" | {r['auroc']:+.3f} ({r['auroc_low']:+.3f} to {r['auroc_high']:+.3f}) |"
        )
    signs(found, chosen)


def signs(found: Map, chosen: list[dict[str, Any]]) -> None:
    """Print how often calibration patients foretell whether averaging pays, seed by seed."""
    right = dict.fromkeys(("mean above 0", "above one standard error", "choice"), 0)
    clear = harmful = 0
    for c in chosen:
        cells = [found[*c["cell"], rate] for rate in RATES]
        apart = (
            np.concatenate(
                [
                    (
                        log_losses(np.array(x.labels), np.array(x.answers["observed_only"]))
                        - log_losses(np.array(x.labels), np.array(x.answers["average"]))
                    )[np.array(x.seeds) == c["seed"]]
                    for x in cells
                ]
            )
            .reshape(len(RATES), -1)
            .mean(0)
        )
        mean, error = apart.mean(), apart.std() / len(apart) ** 0.5
        if abs(mean) < 1.96 * error:
            continue  # either is right
        clear += 1
        pays = mean > 0
        right["mean above 0"] += (c["gain"] > 0) == pays
        right["above one standard error"] += (c["gain"] > c["se"]) == pays
        right["choice"] += (c["choice"] in ("average", "trust_all")) == pays
        harmful += not pays
    print(
        f"\n{len(chosen)} choices; {clear} clear by the test patients ({harmful} against averaging)"
    )
    for rule, count in right.items():
        print(f"{rule}: right in {count} of {clear}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", choices=("tables", "simulated"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--labels", default="40,80,200")
    parser.add_argument("--redundancy", default="0,0.5,0.9", help="of tables")
    parser.add_argument("--patients", type=int, default=800)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--setting", default="hard")
    parser.add_argument("--redundant", action="store_true", help="FLAIR after contrast")
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found: Map = {}
    chosen: list[dict[str, Any]] = []
    worlds = [f"{float(r):g}" for r in a.redundancy.split(",")] if a.world == "tables" else [""]
    for seed in range(a.seeds):
        for world in worlds:
            if a.world == "tables":
                key = (f"redundancy {world},",)
                specs, data = tables(float(world), seed)
            else:
                key = (f"{a.setting}{' redundant' if a.redundant else ''},",)
                specs, data = simulated(a.work / f"cohort-{seed}", a, seed)
            for labels in map(int, a.labels.split(",")):
                began = time.monotonic()
                chosen += one_seed(specs, data, labels, seed, key, found)
                print(
                    f"{key[0]} seed {seed}, {labels} labels: {time.monotonic() - began:.0f} s",
                    flush=True,
                )
        report(found, chosen, a.work)


if __name__ == "__main__":
    main()
