"""The transformers plug-in: `import ders_cli.hf`, and `from_pretrained` takes the folders that ders writes.

transformers finds no plug-ins by itself, so the import must stand before loading. Without it stock loading stops at
the guard tensors (docs/format.md, section 2) and never gives a model with random experts.
"""

import transformers
from packaging.version import Version

from ..errors import UnsupportedError

OLDEST, TOO_NEW = "5.21", "6"  # 5.20 leaves renamed tensors in the file's dtype; tried with 5.21.0 and 5.23.0


def check_transformers(found: str) -> None:
    """Raise UnsupportedError unless `found` is a version that the plug-in goes with."""
    if not Version(OLDEST) <= Version(found) < Version(TOO_NEW):
        raise UnsupportedError(
            f"ders_cli.hf: transformers {found} is installed; expected >={OLDEST},<{TOO_NEW}: pip install "
            f"'transformers>={OLDEST},<{TOO_NEW}', or `ders restore` the checkpoint and load that"
        )


check_transformers(transformers.__version__)  # before the imports below reach for internals that may not be there

from .load import DersConfig, DersQuantizer, freeze_base

__all__ = ["DersConfig", "DersQuantizer", "check_transformers", "freeze_base"]
