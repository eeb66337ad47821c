"""Moved to ``espalier.optional``."""

from espalier.optional import MissingPackage, import_lightning, import_optional, import_timm, import_torchvision

__all__ = ["MissingPackage", "import_lightning", "import_optional", "import_timm", "import_torchvision"]
