"""Files beside the weights that go along unchanged: tokenizer, generation settings, licence, ..."""

from pathlib import Path

from .checkpoint.links import refuse_stray_links
from .describe import file_hash
from .errors import DersError
from .output import carry, copy_file
from .source import DersSource, Source


def check_carried(source: Source) -> None:
    """Raise CheckpointError where one is a link that leads away from the checkpoint."""
    folder = source.reader.folder
    refuse_stray_links(folder, source.reader.files, [path.name for path in carry(folder)])


def carried_hashes(source: Source) -> dict[str, str]:
    """Name -> BLAKE3. Of a remote checkpoint's files, fetched anew by each run, times would say nothing."""
    return {path.name: file_hash(path) for path in carry(source.reader.folder)}


def copy_carried(source: Source, folder: Path, hashes: dict[str, str]) -> None:
    """Copy them into `folder`. Raises DersError if the copies have not the hashes that were taken when the run began."""
    check_carried(source)  # again: hours may have passed
    for path in carry(source.reader.folder):
        copy_file(path, folder / path.name)
    copied = {path.name: file_hash(folder / path.name) for path in carry(source.reader.folder)}
    if differ := [name for name in {**hashes, **copied} if hashes.get(name) != copied.get(name)]:
        raise DersError(
            f"{source.reader.folder / differ[0]}: came, went or was written to during the run; "
            "let nobody work in the source's folder, and run again with --overwrite"
        )


def changed(source: Source) -> list[str]:
    """What to say of files that are not what the source's own ders.json notes: edited, perhaps, or damaged."""
    if not isinstance(source, DersSource):
        return []
    folder, said = source.reader.folder, []
    along = {path.name for path in carry(folder)}  # no config.json; its links have been looked at (check_carried)
    for name, noted in source.manifest["files"].items():
        path = folder / name
        if not path.is_file():
            said.append(f"{source.reader.address}: {name} is missing; ders.json lists it")
        elif name in along and file_hash(path) != noted:
            said.append(f"{source.reader.address}: {name} was changed since ders wrote it; it goes along as it is")
    return said
