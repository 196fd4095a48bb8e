"""How far an evaluation's answers are from the best possible ones.

python benchmarks/exact.py EVALUATION COHORT

COHORT is a simulated one, whose `truth.csv` knows the exact probability from every set of
modalities. Each answer is set beside the one from exactly the modalities that were observed, and
where a scenario hid single cells, without these (from the cohort's likelihood ratios). KL is the
divergence of the answer from the exact one in nats; 95 % intervals by bootstrap over patients.
Prints a table and writes EVALUATION/exact.csv.
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from dymo_med.data.dials import setting
from dymo_med.data.simulate import DIALS, pieces, posterior_high
from dymo_med.data.truth import TRUTH, Truth, read_truth

Row = dict[str, str | float | int]
Cells = dict[tuple[str, str], frozenset[str]]


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def hidden_cells(evaluation: Path) -> Cells:
    """Return the columns of which a scenario hid single cells, by scenario and record."""
    path, found = evaluation / "hidden.csv", {}
    for row in rows_of(path) if path.exists() else []:
        if row["column"]:
            key = row["scenario"], row["record_id"]
            found[key] = found.get(key, frozenset()) | {row["column"]}
    return found


class Recomputed:
    """Exact answers of a simulated cohort from any cells, by its likelihood ratios.

    Args:
        cohort: Its folder, with `truth.csv` and, where dials were changed, `dials.yaml`.
    """

    def __init__(self, cohort: Path) -> None:
        dials = cohort / DIALS
        self.dials = setting("default", dials if dials.exists() else None)
        self.rows = {row["record_id"]: row for row in rows_of(cohort / TRUTH)}

    def of(self, record_id: str, observed: Sequence[str], hidden: frozenset[str]) -> float:
        """Return the exact probability from some modalities without some of their cells."""
        row = self.rows[record_id]
        unseen = {*row["blank"].split(), *hidden}
        seen = [piece for piece in pieces(observed, self.dials) if piece not in unseen]
        ratios = {piece: float(row[f"llr_{piece}"]) for piece in seen}
        return posterior_high(ratios, seen, self.dials)


def divergence(exact: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Return the divergence of answers from exact probabilities of one of two classes, `(n,)`."""
    p = np.clip(exact, 1e-12, 1 - 1e-12)
    q = np.clip(answer, 1e-12, 1 - 1e-12)
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def log_loss(truth: np.ndarray, answer: np.ndarray) -> float:
    """Return the mean log-loss of answers about a class, True or False."""
    q = np.clip(answer, 1e-12, 1 - 1e-12)
    return float(-np.where(truth, np.log(q), np.log(1 - q)).mean())


def exact_answers(
    rows: Sequence[Mapping[str, str]],
    truth: Truth,
    hidden: Cells | None = None,
    recomputed: Recomputed | None = None,
) -> np.ndarray:
    """Return the exact probability for each answer, `(n,)`.

    Args:
        rows: Of `predictions.csv`.
        truth: Of the same cohort.
        hidden: Single cells that scenarios hid; needs `recomputed`.
        recomputed: Of the same cohort.
    """
    found = []
    for row in rows:
        record_id, observed = row["record_id"], [n for n in row["observed"].split("+") if n]
        cells = (hidden or {}).get((row["scenario"], record_id), frozenset())
        if cells and row["method"] != "oracle":
            assert recomputed is not None
            found.append(recomputed.of(record_id, observed, cells))
        else:
            found.append(truth.of(record_id, observed))
    return np.array(found)


def beside(
    predictions: Sequence[Mapping[str, str]],
    truth: Truth,
    hidden: Cells | None = None,
    recomputed: Recomputed | None = None,
    draws: int = 1000,
) -> list[Row]:
    """Return a row per scenario and method.

    Args:
        predictions: Rows of `predictions.csv`.
        truth: Of the same cohort.
        hidden: Single cells that scenarios hid; needs `recomputed`.
        recomputed: Of the same cohort.
        draws: Of the bootstrap.
    """
    event = [c for c in predictions[0] if c.startswith("prob_")][-1]
    groups: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in predictions:
        groups.setdefault((row["scenario"], row["method"]), []).append(row)
    found: list[Row] = []
    for (scenario, method), rows in groups.items():
        answer = np.array([float(row[event]) for row in rows])
        exact = exact_answers(rows, truth, hidden, recomputed)
        label = np.array([row["label"] == event.removeprefix("prob_") for row in rows])
        apart = divergence(exact, answer)
        people, index = np.unique([row["patient_id"] for row in rows], return_inverse=True)
        own = np.bincount(index, apart) / np.bincount(index)
        rng = np.random.default_rng(0)
        means = own[rng.integers(0, len(own), (draws, len(own)))].mean(1)
        low, high = np.quantile(means, (0.025, 0.975))
        both = 0 < label.sum() < len(label)
        found.append(
            {
                "scenario": scenario,
                "method": method,
                "patients": len(people),
                "auroc": float(roc_auc_score(label, answer)) if both else float("nan"),
                "exact_auroc": float(roc_auc_score(label, exact)) if both else float("nan"),
                "log_loss": log_loss(label, answer),
                "exact_log_loss": log_loss(label, exact),
                "kl": float(own.mean()),
                "kl_low": float(low),
                "kl_high": float(high),
            }
        )
    return found


def main() -> None:
    """Compare, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("cohort", type=Path)
    arguments = parser.parse_args()
    predictions = rows_of(arguments.evaluation / "predictions.csv")
    hidden = hidden_cells(arguments.evaluation)
    recomputed = Recomputed(arguments.cohort) if hidden else None
    rows = beside(predictions, read_truth(arguments.cohort), hidden, recomputed)
    with (arguments.evaluation / "exact.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print("| scenario | method | n | AUROC (exact) | log-loss (exact) | KL |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['scenario']} | {r['method']} | {r['patients']}"
            f" | {r['auroc']:.3f} ({r['exact_auroc']:.3f})"
            f" | {r['log_loss']:.3f} ({r['exact_log_loss']:.3f})"
            f" | {r['kl']:.3f} ({r['kl_low']:.3f} to {r['kl_high']:.3f}) |"
        )


if __name__ == "__main__":
    main()
