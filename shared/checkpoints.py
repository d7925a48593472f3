"""The folders in `checkpoints/`: their manifests, their checksums, and which of them are whole. Torch-free.

    checkpoints/00001200/manifest.json         step, time, evaluation return, and size and checksum of every other file
                         state.pt              networks, optimisers, counters, random states
                         weights.safetensors   the networks alone, for other programs
                         replay-000007.bin     a segment of the replay; `learner_proc/replay_files.py` describes it
    checkpoints/latest                         "00001200", for people and scripts; Tandem does not read it

manifest.json is written last, so a folder that was not completed has none. It also holds a checksum of itself. Folders
that begin with a dot belong to a save that has not ended. A checkpoint that was found damaged gets a file `damaged`
with the reason, so that it is not read in full again.

Verifying costs one reading of the files, at about 1 GB/s if the disk delivers that much.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import SettingError
from shared.files import write_atomic
from shared.stream import DTYPE_BYTES

FORMAT = 2  # of the manifest and of the files that it lists; 1 is the format of Tandem 0.1, which has no checksums
MANIFEST, DAMAGED = "manifest.json", "damaged"
BLOCK_BYTES = 1 << 22
_NAME = re.compile(r"(\d{8,})(?:\.\d+)?")  # the step, and a number if a checkpoint of this step exists already
_FORMAT_1_KEYS = {"step", "spec_digest", "replay_rows", "fields", "files"}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. The other checkpoints are as they were."""


class DamagedError(CheckpointError):
    """A checkpoint is not what its manifest describes, or the manifest is damaged."""


class NewerFormatError(DamagedError):
    """A newer version of Tandem wrote this checkpoint. It may be whole, so it must be neither skipped nor deleted."""


@dataclass(frozen=True)
class StoredFile:
    """Size and checksum of a file. The checksum is 8 hexadecimal digits. None: not known yet, or in format 1 never.

    A size of None means any size but 0; only the first checkpoints of Tandem 0.1 have it.
    """

    size: int | None
    crc32: str | None


@dataclass(frozen=True)
class Segment:
    """A file of the replay and the number of its rows."""

    file: str
    rows: int


@dataclass(frozen=True)
class Manifest:
    """What is in a checkpoint.

    serial: counts the saves of the run; the newest checkpoint has the highest. replay_rows: the rows that could be
    sampled, which are the last ones of all segments together. fields: name, shape and dtype of each field of a row.
    """

    step: int
    serial: int = 0
    saved_at: float = 0.0  # s since 1970
    eval_return_mean: float | None = None
    spec_digest: str = ""
    replay_rows: int = 0
    fields: tuple[Mapping[str, Any], ...] = ()
    segments: tuple[Segment, ...] = ()
    files: Mapping[str, StoredFile] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def num_bytes(self) -> int:
        """Return the size of all files together."""
        return sum(file.size or 0 for file in self.files.values())


@dataclass(frozen=True)
class Checkpoint:
    """The folder of a checkpoint that has a valid manifest."""

    folder: Path
    manifest: Manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json as a whole. It comes last, because it makes the folder a checkpoint. Raises: OSError."""
    write_atomic(folder / MANIFEST, _encoded(asdict(manifest)))


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises: DamagedError if it is missing or is not exactly as it was written; NewerFormatError.
    """
    try:
        raw = (folder / MANIFEST).read_bytes()
        content = json.loads(raw)
    except FileNotFoundError as error:
        raise DamagedError(f"{MANIFEST} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error}") from error
    if isinstance(content, dict) and "step" in content and content.keys() <= _FORMAT_1_KEYS:
        return _manifest_of_format_1(content)
    if not isinstance(content, dict) or raw != _encoded({k: v for k, v in content.items() if k != "crc32"}):
        raise DamagedError(f"{MANIFEST} does not match its own checksum")
    if content["format"] > FORMAT:
        raise NewerFormatError(
            f"it has format {content['format']}; expected at most {FORMAT}, the newest that this version reads"
        )
    del content["crc32"]
    return manifest_of(content)


def manifest_of(content: Mapping[str, Any]) -> Manifest:
    """Return the manifest that `dataclasses.asdict` turned into `content`, also after a way through JSON."""
    return Manifest(**{
        **content,
        "fields": tuple(content["fields"]),
        "segments": tuple(Segment(**segment) for segment in content["segments"]),
        "files": {name: StoredFile(**file) for name, file in content["files"].items()},
    })  # fmt: skip


def size_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, as far as its manifest and the sizes of its files show it, or None."""
    try:
        manifest = read_manifest(folder)
    except DamagedError as error:
        return str(error)
    if (folder / DAMAGED).is_file():
        return (folder / DAMAGED).read_text(errors="replace").strip()
    for name, file in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size == 0 or file.size not in (None, size):
            return f"{name} has {size} bytes; expected {file.size or 'some'}"
    return None


def damage(
    folder: Path,
    *,
    on_block: Callable[[], None] = lambda: None,
    known: dict[tuple[int, int], str] | None = None,
) -> str | None:
    """Return what is wrong with a checkpoint, or None: `size_damage`, and then the checksum of every file.

    on_block: called for each block that was read, to report progress. known: remembers the checksums of shared files
    from one call to the next.
    """
    known = {} if known is None else known
    found = size_damage(folder)
    if found is not None:
        return found
    for name, file in read_manifest(folder).files.items():
        try:
            status = (folder / name).stat()
            key = (status.st_dev, status.st_ino)
            crc32 = known[key] = known.get(key) or file_crc32(folder / name, on_block=on_block)
        except OSError as error:
            return f"{name} cannot be read: {error}"
        if file.crc32 not in (None, crc32):
            return f"{name} has checksum {crc32}; expected {file.crc32}"
    return None


def file_crc32(path: Path, *, on_block: Callable[[], None] = lambda: None) -> str:
    """Return the checksum of a file, which is read block by block. Raises: OSError."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
            on_block()
    return f"{crc:08x}"


def checkpoint_folders(root: Path) -> list[Path]:
    """Return the folders of all checkpoints, also of those without a valid manifest, in the order of their steps."""
    return sorted(path for path in root.glob("*") if _NAME.fullmatch(path.name) and path.is_dir())


def whole_checkpoints(root: Path) -> list[Checkpoint]:
    """Return the checkpoints whose files have the right sizes, the newest first."""
    whole = (folder for folder in checkpoint_folders(root) if size_damage(folder) is None)
    found = [Checkpoint(folder, read_manifest(folder)) for folder in whole]
    return sorted(found, key=lambda each: (each.manifest.serial, each.manifest.step), reverse=True)


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """Return the newest checkpoint whose files have the right sizes, or None."""
    return next(iter(whole_checkpoints(root)), None)


def newest_verified(root: Path, *, on_block: Callable[[], None] = lambda: None) -> Checkpoint | None:
    """Return the newest checkpoint whose checksums are right, or None. It reads the whole checkpoint.

    Those that are found damaged are marked, so that `newest_checkpoint` then returns the same one.
    Raises: SettingError if a newer version of Tandem wrote one: to continue from an older one would undo its work.
    """
    _refuse_newer_formats(root)
    known: dict[tuple[int, int], str] = {}
    for checkpoint in whole_checkpoints(root):
        found = damage(checkpoint.folder, on_block=on_block, known=known)
        if found is None:
            return checkpoint
        mark_damaged(checkpoint.folder, found)
    return None


def damaged_checkpoints(root: Path) -> list[tuple[Path, str]]:
    """Return the folders of checkpoints that are known to be damaged, and what is wrong with each."""
    found = [(folder, size_damage(folder)) for folder in checkpoint_folders(root)]
    return [(folder, damage) for folder, damage in found if damage is not None]


def mark_damaged(folder: Path, reason: str) -> None:
    """Let `size_damage` return this reason from now on. A folder that cannot be written stays as it is."""
    with suppress(OSError):
        write_atomic(folder / DAMAGED, reason + "\n")


def settle(root: Path) -> None:
    """Clean up after a save that was killed: complete folders get their name, all others are deleted.

    Call it only while no process saves. Raises: OSError.
    """
    for leftover in [*root.glob(".partial-*"), *root.glob(".aside-*")]:
        step = leftover.name.rpartition("-")[2]
        if _NAME.fullmatch(step) and size_damage(leftover) is None:
            leftover.rename(free_folder(root, int(step.partition(".")[0])))
        elif leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)


def free_folder(root: Path, step: int) -> Path:
    """Return a path for a checkpoint of this step at which there is nothing yet."""
    name, number = f"{step:08d}", 0
    path = root / name
    while path.exists():
        number += 1
        path = root / f"{name}.{number}"
    return path


def _refuse_newer_formats(root: Path) -> None:
    """Raise SettingError if a newer version of Tandem wrote one of the checkpoints."""
    for folder in checkpoint_folders(root):
        try:
            read_manifest(folder)
        except NewerFormatError as error:
            raise SettingError(
                f"{folder} cannot be loaded: {error}; use the version that wrote it, or move this folder away to "
                "continue from an older checkpoint"
            ) from error
        except DamagedError:
            continue


def _encoded(content: Mapping[str, Any]) -> bytes:
    """Return the only bytes that a valid manifest with this content can have."""
    crc = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    return (json.dumps({**content, "crc32": f"{crc:08x}"}, sort_keys=True, indent=1) + "\n").encode()


def _manifest_of_format_1(content: Mapping[str, Any]) -> Manifest:
    """Return the manifest of a checkpoint of Tandem 0.1. Raises: DamagedError."""
    try:
        rows = int(content.get("replay_rows", 0))
        fields = tuple(content.get("fields", ()))
        row_bytes = sum(math.prod(field["shape"]) * DTYPE_BYTES[field["dtype"]] for field in fields)
        sizes: dict[str, int | None] = {"state.pt": None} | ({"replay.bin": rows * row_bytes} if rows else {})
        sizes |= content.get("files", {})
        return Manifest(
            step=content["step"] + 0,
            spec_digest=str(content.get("spec_digest", "")),
            replay_rows=rows,
            fields=fields,
            segments=(Segment("replay.bin", rows),) if rows else (),
            files={name: StoredFile(None if size is None else int(size), None) for name, size in sizes.items()},
            format=1,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST} of format 1 is malformed: {error!r}") from error
