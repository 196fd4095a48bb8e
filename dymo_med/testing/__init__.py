"""The laws of components, to be checked by whoever writes one.

    from dymo_med.testing import check_imputer

    check_imputer(MyImputer, {"latent": 4})

`check_imputer`, `check_backbone`, `check_selector` and `check_task` raise an `AssertionError` that
names the law which a component breaks. The project's own components are held to the same laws.
"""

from dymo_med.testing.laws import (
    BACKBONE_LAWS,
    IMPUTER_LAWS,
    SELECTOR_LAWS,
    TASK_LAWS,
    Options,
    Setting,
    check_backbone,
    check_imputer,
    check_selector,
    check_task,
    fitted_selector,
    selector_setting,
)
from dymo_med.testing.made_up import NAMES, SPECS, WITHOUT_STAGE, K, make_batch, noisy

__all__ = [
    "BACKBONE_LAWS",
    "IMPUTER_LAWS",
    "NAMES",
    "SELECTOR_LAWS",
    "SPECS",
    "TASK_LAWS",
    "WITHOUT_STAGE",
    "K",
    "Options",
    "Setting",
    "check_backbone",
    "check_imputer",
    "check_selector",
    "check_task",
    "fitted_selector",
    "make_batch",
    "noisy",
    "selector_setting",
]
