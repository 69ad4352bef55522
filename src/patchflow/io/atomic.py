"""Files on disk: found with a helpful sentence, written whole or not at all.

Every writer of the library goes through :func:`atomic_path` (or :func:`write_bytes`, which is built
on it): the bytes go to a temporary file in the target's own folder, are flushed to the disk, and
only then take the target's name in one step. Whatever fails before that (a full disk, Ctrl-C, a
bug) leaves the old file as it was and no temporary file behind.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from patchflow.errors import InputError

_REASONS = {
    errno.ENOSPC: ("no space left on the disk", "free some space or write to another folder"),
    errno.EDQUOT: ("no space left in the disk quota", "free some space or write to another folder"),
    errno.EFBIG: ("no space left, the file is over the size limit", "write to another folder"),
    errno.EACCES: ("permission denied", "write to a folder that is yours"),
    errno.EPERM: ("permission denied", "write to a folder that is yours"),
    errno.EROFS: ("the file system is read-only", "write to another folder"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter name"),
}


@contextlib.contextmanager
def atomic_path(path: str | Path, *, parents: bool = False) -> Iterator[Path]:
    """Yield a temporary path that takes the name ``path`` when the block ends without an exception.

    A missing folder is an error unless ``parents`` is set: a mistyped folder should not appear on
    somebody's disk.

    Args:
        path: The file to write; a symbolic link is followed, so that the link stays.
        parents: Create missing parent folders.

    Yields:
        An existing empty file in the target's folder, to be filled by the block.

    Raises:
        InputError: The folder is missing, the target is not an ordinary file, or the system refuses
        to write.
    """
    target = Path(os.path.realpath(path))
    try:
        _check_target(path, target, parents=parents)
        temporary = _create_beside(target)
    except OSError as error:
        raise _refused(path, error) from error
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        # After the rename there is nothing left to remove; after any failure, Ctrl-C included,
        # there is.
        with contextlib.suppress(OSError):
            temporary.unlink()
    _sync_folder(target.parent)


def write_bytes(
    path: str | Path, data: bytes | bytearray | memoryview, *, parents: bool = False
) -> None:
    """Write ``data`` to ``path``, whole or not at all; see :func:`atomic_path`.

    Args:
        path: The file to write.
        data: Its content.
        parents: Create missing parent folders.

    Raises:
        InputError: As :func:`atomic_path`.
    """
    with atomic_path(path, parents=parents) as temporary, open(temporary, "wb") as file:
        file.write(data)


def write_text(path: str | Path, text: str, *, parents: bool = False) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all; see :func:`atomic_path`.

    Args:
        path: The file to write.
        text: Its content.
        parents: Create missing parent folders.

    Raises:
        InputError: As :func:`atomic_path`.
    """
    write_bytes(path, text.encode("utf-8"), parents=parents)


def existing_file(path: str | Path, kind: str = "file") -> Path:
    """Check that ``path`` is a readable file, and say what was probably meant if it is not.

    Args:
        path: The file.
        kind: What the file is to be, for the message ("image", "model file").

    Returns:
        The path.

    Raises:
        InputError: There is no such file (near names in its folder are suggested), it is a folder,
        or it may not be read.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder, but a single {kind} is needed: name one file of it.")
    if not path.exists():
        raise InputError(f"There is no {kind} {path}{_near_names(path)}")
    if not os.access(path, os.R_OK):
        raise InputError(
            f"{path} may not be read by this user, but a readable {kind} is needed: "
            "change its permissions."
        )
    return path


def read_bytes(path: str | Path, kind: str = "file") -> bytes:
    """Read a whole file; see :func:`existing_file`.

    Args:
        path: The file.
        kind: What the file is to be, for the message.

    Raises:
        InputError: As :func:`existing_file`, or the disk fails.
    """
    path = existing_file(path, kind)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({_reason(error)}), but a readable {kind} is needed: copy it "
            "again."
        ) from error


def digest(path: str | Path, kind: str = "file") -> str:
    """The SHA-256 digest of a file's bytes, in hexadecimal digits; see :func:`read_bytes`."""
    return hashlib.sha256(read_bytes(path, kind)).hexdigest()


def _check_target(path: str | Path, target: Path, *, parents: bool) -> None:
    if not target.parent.is_dir():
        if not parents:
            raise InputError(
                f"{path} cannot be written because there is no folder {target.parent}: create it, "
                "or choose another."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        raise InputError(f"{path} is a folder, but a file is to be written: add a file name.")
    if target.exists() and not target.is_file():
        raise InputError(f"{path} is not an ordinary file: choose the name of an ordinary one.")


def _create_beside(target: Path) -> Path:
    # Not tempfile.mkstemp: its files are private (mode 0600), and the result would stay private
    # after the rename.
    name = f".{target.name[:100]}.{secrets.token_hex(6)}.tmp"
    temporary = target.with_name(name)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return temporary


def _sync_folder(folder: Path) -> None:
    # The rename itself reaches the disk only with the folder; file systems that cannot do this are
    # no reason to fail.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: OSError) -> str:
    if error.errno in _REASONS:
        return _REASONS[error.errno][0]
    return (error.strerror or str(error) or type(error).__name__).lower()


def _refused(path: str | Path, error: OSError) -> InputError:
    remedy = _REASONS.get(error.errno or 0, ("", "write to another folder"))[1]
    return InputError(
        f"{path} could not be written: {_reason(error)}; nothing was overwritten: {remedy}."
    )


def _near_names(path: Path) -> str:
    if not path.parent.is_dir():
        return f": the folder {path.parent} does not exist either, check the path."
    try:
        names = [entry.name for entry in os.scandir(path.parent)]
    except OSError:
        return ": check the path."
    # Case is a common slip (IMG.PNG), so it must not count.
    by_folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(path.name.casefold(), list(by_folded), n=3, cutoff=0.6)
    if not near:
        return ": check the path."
    meant = " or ".join(str(path.with_name(by_folded[name])) for name in near)
    return f": did you mean {meant}?"
