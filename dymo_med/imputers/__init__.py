"""Methods that recover missing modalities from observed ones."""

from __future__ import annotations

from dymo_med.imputers.base import Imputer, require_recovery
from dymo_med.imputers.cmvae import CMVAE
from dymo_med.imputers.conditional import Conditional
from dymo_med.imputers.cyclic import Cyclic
from dymo_med.imputers.iterative import Iterative
from dymo_med.imputers.mmvae_plus import MMVAEPlus
from dymo_med.imputers.mopoe import MoPoE
from dymo_med.imputers.synthesis import Synthesis
from dymo_med.imputers.template import Template
from dymo_med.imputers.tip import TIP
from dymo_med.registry import Registry

IMPUTERS: Registry[Imputer] = Registry(
    "imputer",
    {
        "mopoe": MoPoE,
        "mmvae_plus": MMVAEPlus,
        "cmvae": CMVAE,
        "cyclic": Cyclic,
        "tip": TIP,
        "iterative": Iterative,
        "template": Template,
        "conditional": Conditional,
        "synthesis": Synthesis,
    },
)

__all__ = ["IMPUTERS", "Imputer", "require_recovery"]
