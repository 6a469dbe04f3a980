"""Links in a checkpoint's folder: those of a model cache are followed, those of a thief are not.

transformers' cache keeps `snapshots/<revision>/config.json -> ../../blobs/<hash>`, with the weights' links into the same
folder, and people link a whole model's files to another place. In a stranger's folder `tokenizer.json -> /etc/passwd` looks
the same, and carrying it would put the secret into an output that is then published. What tells them apart: where the
weights really stand. A hard link is the file itself, and nothing tells it apart.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import CheckpointError


def refuse_stray_links(folder: Path, weight_files: Iterable[str], names: Iterable[str] | None = None) -> None:
    """Raise CheckpointError if one of `names` is a link to a file neither in `folder` nor beside one of its weight files.

    None: whatever stands in the folder, aside from hidden files. A link to a folder, or to nothing, is not looked at.
    """
    own = os.path.realpath(folder)
    homes = {os.path.dirname(os.path.realpath(folder / file)) for file in weight_files}
    for name in sorted(os.listdir(folder) if names is None else names):
        path = folder / name
        if name.startswith(".") or not path.is_symlink() or not path.is_file():
            continue
        real = os.path.realpath(path)
        if os.path.dirname(real) not in homes and os.path.commonpath((own, real)) != own:
            raise CheckpointError(
                f"{path}: a link to {real!r:.200}, away from the model's weights; if it is meant, copy the file there"
            )
