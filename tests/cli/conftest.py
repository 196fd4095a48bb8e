"""The small bundle serves the command line's tests too."""

from tests.unit.conftest import bundle, bundle_dir

__all__ = ["bundle", "bundle_dir"]
