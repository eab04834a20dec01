"""Files and folders that appear whole or not at all, locks, and the user's folders."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import platformdirs

from worldmodel.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
LOCK = ".lock"  # stays behind; who holds it counts, and a killed process holds nothing


def check_output(path: str | Path) -> Path:
    """The file that is made or replaced by writing to `path`: a symlink is followed.

    Commands call it before their work begins. Raises UserError where `path` is a folder, a device
    or a FIFO, or where its folder cannot be written.
    """
    path = Path(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    if path.is_dir():
        raise UserError(f"expected a file to write to, got the folder {path}: name a file in it.")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file: name another file to write to.")
    _check_writable(path.parent)
    return path


def check_output_folder(folder: str | Path) -> Path:
    """The folder that is made, filled or replaced by writing to `folder`: a symlink is followed.

    Raises UserError where it is something else than a folder, or where it cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name another folder to write to.")
    _check_writable(folder)
    return folder


def _check_writable(folder: Path) -> None:
    """Whether `folder`, or the nearest folder above it that exists, can be written."""
    found = next(path for path in (folder, *folder.parents) if path.exists())
    if not found.is_dir():
        raise UserError(f"{found} is a file, so {folder} cannot be a folder: name another one.")
    if not os.access(found, os.W_OK):
        raise UserError(f"the folder {found} cannot be written: name another place.")


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; the file written there is renamed to `path`
    when the block succeeds, and removed when it fails.

    The folder of `path` is made if it is absent. A reader sees the whole file or none. Raises
    UserError as `check_output`.
    """
    path = check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays last: writers choose the format by it
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: str | Path, data: bytes | str) -> None:
    """Writes a whole file (text as UTF-8), see `replacing_file`."""
    with replacing_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder next to `folder`, which is renamed to `folder` when the block succeeds
    and removed when it fails.

    The old folder is kept until the new one is complete. Raises UserError as `check_output_folder`.
    """
    folder = check_output_folder(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left over from a killed run
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left half written in `folder`.

    Only for a folder in which no other process writes (see `exclusive`).
    """
    for left in folder.glob(".*.[0-9]*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def _replace_folder(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def lock(file: IO) -> bool:
    """Locks an open file for writing; False when another process holds the lock.

    Where there is no flock (Windows) an open file cannot be replaced anyway.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Makes `folder` and keeps other processes out of this block.

    Raises UserError when another process is in it. Locks nothing on Windows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        if not lock(file):
            raise UserError(
                f"another process is writing into {folder}: wait for its end, or choose another "
                "folder"
            )
        yield


def data_folder(name: str) -> Path:
    """The folder of this program's own `worlds` or `configs`.

    Installed: inside the package, where the build puts them. In a checkout: assets/worlds, configs.
    """
    installed = _PACKAGE / "data"
    if installed.is_dir():
        return installed / name
    return _PACKAGE.parent / {"worlds": "assets/worlds", "configs": "configs"}[name]


def find_config(path: str | Path) -> Path:
    """`path` where it exists; else the file of that name in `data_folder("configs")`, such as
    configs/blocks/cpu.yaml of an installed package; else `path`.
    """
    path = Path(path)
    packaged = data_folder("configs").joinpath(*path.parts[1:])
    known = not path.exists() and path.parts[:1] == ("configs",) and packaged.is_file()
    return packaged if known else path


def user_cache() -> Path:
    """This program's folder in the user's cache: `~/.cache/worldmodel` on Linux."""
    return platformdirs.user_cache_path("worldmodel", appauthor=False)


def world_cache(name: str) -> Path:
    """Where the world `name`, made from published weights, is kept."""
    return user_cache() / "worlds" / name


def recordings_folder() -> Path:
    """Where recordings and screenshots go unless the user names a folder.

    In a checkout: ./recordings. Installed: among the user's data, `~/.local/share/worldmodel` on
    Linux.
    """
    if (_PACKAGE / "data").is_dir():
        return platformdirs.user_data_path("worldmodel", appauthor=False) / "recordings"
    return Path("recordings")
