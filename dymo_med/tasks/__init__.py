"""What can be predicted: one file and one line of `TASKS` each.

The interface is `dymo_med.types.Task`; `dymo_med.tasks.base` has what tasks over K classes share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dymo_med.registry import Registry
from dymo_med.tasks.base import OverClasses, TaskEntry, answered, class_loss
from dymo_med.tasks.classification import PLAIN, Classification
from dymo_med.tasks.regression import Regression
from dymo_med.tasks.segmentation import Segmentation
from dymo_med.tasks.survival import Survival
from dymo_med.types import Task

TASKS: Registry[Task] = Registry(
    "task",
    {
        "classification": Classification,
        "regression": Regression,
        "segmentation": Segmentation,
        "survival": Survival,
    },
)


def task_from(stored: Mapping[str, Any]) -> Task:
    """Return the task that `Task.to_dict` described.

    Raises:
        ConfigError: If there is no such task.
        KeyError: If something is absent.
        ValueError: If it cannot be.
    """
    return TASKS[str(stored["type"])].from_dict(stored)


__all__ = [
    "PLAIN",
    "TASKS",
    "Classification",
    "OverClasses",
    "Regression",
    "Segmentation",
    "Survival",
    "TaskEntry",
    "answered",
    "class_loss",
    "task_from",
]
