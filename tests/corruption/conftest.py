"""The small bundle serves the corruption suite too."""

from tests.unit.conftest import bundle, bundle_dir, plain

__all__ = ["bundle", "bundle_dir", "plain"]
