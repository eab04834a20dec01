"""Resolve a source of weights (a file, a folder or a path on the Hugging Face hub) to a local path.

    FILE or FOLDER                        used as it is
    owner/name[@revision][/path]          a model repository on the hub, or a file or folder in it
    hf:owner/name[@revision][/path]       the same, where a folder here has the owner's name

Only the requested files of a repository are downloaded, once, into the hub library's own cache
(`HF_HOME`); an interrupted download resumes. With `HF_HUB_OFFLINE=1`, or without a connection, only
the cache is used. The hub library is imported when it is needed.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from worldmodel.errors import UserError, first_line

logger = logging.getLogger(__name__)

INDEX = ".safetensors.index.json"
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_PLACE = re.compile(
    r"(?:hf:)?(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<path>.+?))?/?"
)
_PATIENCE = 30  # seconds for the hub's list of files
_MOST_NAMES = 8  # in a sentence


class SourceError(UserError):
    """A source that cannot be resolved; the message is one sentence for the user."""


@dataclass(frozen=True)
class HubPath:
    """A model repository on the hub, or a file or folder in it."""

    repository: str  # owner/name
    path: str = ""  # file or folder in it
    revision: str | None = None  # branch, tag or commit; None: main

    def __str__(self):
        return (
            self.repository
            + (f"@{self.revision}" if self.revision else "")
            + (f"/{self.path}" if self.path else "")
        )


def parse_source(source: str | Path) -> Path | HubPath:
    """Parse a source without downloading anything. Raises SourceError for a text that is neither a
    local path nor a possible hub path.
    """
    text = str(source)
    if isinstance(source, Path) or (text and Path(text).exists() and not text.startswith("hf:")):
        return Path(source)
    match = _PLACE.fullmatch(text)
    here = not text.startswith("hf:") and (
        text.startswith((".", "~", "/")) or Path(text).parts[:1] in _folders_here()
    )
    if match is None or here or not text:
        raise SourceError(
            f"there is no file or folder {text!r}; on the hub a source reads owner/name or "
            "owner/name/path/to/file."
        )
    return HubPath(match["repository"], match["path"] or "", match["revision"])


def fetch(
    source: str | Path,
    part: str = "transformer",
    progress: Callable[[str], object] = logger.info,
) -> Path:
    """Return the local file or folder of a source; for a repository or a folder in one, the weights
    file (or its index).

    part: sub-folder to search first, as in diffusers' repositories ("transformer", "vae"). A
    weights file from the hub is downloaded with the `config.json` of its folder, an index with the
    files it
    names. progress: called with a sentence before a download begins.
    Raises SourceError naming the file and the repository that are not available, or the files to
    choose from.
    """
    place = parse_source(source)
    if isinstance(place, Path):
        return place
    sizes, reason = _listing(place)
    name = place.path if place.path in sizes else _chosen(place, sizes, part, reason)
    config = str(PurePosixPath(name).with_name("config.json"))
    companions = [config] if config in sizes and config != name else []
    path = _download(place, [name, *companions], sizes, reason, progress)
    if name.endswith(".index.json"):
        folder = PurePosixPath(name).parent
        shards = [str(folder / shard) for shard in shards_of(path)]
        _download(place, shards, sizes, reason, progress)
    return path


def weights_among(names: Collection[str], part: str = "transformer") -> list[str]:
    """Of the files of a folder (names relative to it, `/` between folders), those that may hold the
    weights of `part`.

    The sub-folder `part` comes before the folder itself; in each, an index before single
    safetensors files before other weights.
    """
    for folder in (part, "."):
        files = sorted(name for name in names if str(PurePosixPath(name).parent) == folder)
        for kinds in ((INDEX,), _WEIGHTS[:1], _WEIGHTS):
            found = [name for name in files if name.endswith(kinds)]
            if found:
                return found
    return []


def shards_of(index: Path) -> list[str]:
    """The files that an index (`*.safetensors.index.json`) names. SourceError when it cannot be
    read.
    """
    return sorted(set(read_index(index).values()))


def read_index(index: Path) -> dict[str, str]:
    """An index as tensor name -> file in its folder. Raises SourceError when it cannot be read."""
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not table or any(
            not isinstance(file, str) or "/" in file or "\\" in file for file in table.values()
        ):
            raise ValueError
        return dict(table)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise SourceError(
            f"{index} is not an index of weights files, or only half of one: fetch it again."
        ) from None


# -------------------- inside


def _folders_here() -> set[tuple[str]]:
    return {(entry.name,) for entry in os.scandir() if entry.is_dir()}


def _listing(place: HubPath) -> tuple[dict[str, int], str]:
    """({file of the repository: bytes}, ""), or what the cache has of it and why the hub could not
    be asked.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if constants.HF_HUB_OFFLINE:
        return _cached(place), "HF_HUB_OFFLINE is set"
    try:
        found = (
            HfApi()
            .model_info(
                place.repository, revision=place.revision, files_metadata=True, timeout=_PATIENCE
            )
            .siblings
        )
    except HFValidationError as error:
        raise SourceError(
            f"{place.repository} is not a repository name ({first_line(error)}): give owner/name."
        ) from None
    except RevisionNotFoundError:
        raise SourceError(
            f"{place.repository} has no revision {place.revision!r}: name a branch, a tag or a "
            "commit of it."
        ) from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"there is no file or folder {str(place)!r} here and no repository {place.repository} "
            "on the hub that you may read: correct the name, or log in first (`hf auth login`) "
            "if it is private or gated."
        ) from None
    except (
        OSError,
        *HfHubHTTPError.__bases__,
    ) as error:  # the bases: errors of the transport, another library in each version
        return _cached(place), f"the hub cannot be reached ({first_line(error)})"
    return {file.rfilename: file.size or 0 for file in found or ()}, ""


def _cached(place: HubPath) -> dict[str, int]:
    """{file: bytes} of the newest snapshot of the repository's revision that the hub library's
    cache holds.
    """
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return {}
    wanted = place.revision or "main"
    for repository in repositories:
        if repository.repo_type == "model" and repository.repo_id == place.repository:
            for snapshot in repository.revisions:
                if wanted in snapshot.refs or snapshot.commit_hash == wanted:
                    root = snapshot.snapshot_path
                    return {
                        file.file_path.relative_to(root).as_posix(): file.size_on_disk
                        for file in snapshot.files
                    }
    return {}


def _chosen(place: HubPath, sizes: dict[str, int], part: str, reason: str) -> str:
    """The one weights file (or index) of a repository or of the folder `place.path` in it."""
    prefix = f"{place.path}/" if place.path else ""
    inside = {name.removeprefix(prefix) for name in sizes if name.startswith(prefix)}
    found = weights_among(inside, part)
    if len(found) == 1:
        return prefix + found[0]
    if reason and not found:
        what = place.path or f"{part}/, or a single file of weights,"
        raise SourceError(
            f"{what} of {place.repository} cannot be had: {reason} and the cache "
            f"{_cache_folder()} does not hold it; connect once, or name a file on this machine."
        )
    others = [prefix + name for name in found] or sorted(
        name for name in sizes if name.endswith(_WEIGHTS)
    )
    listed = ", ".join(others[:_MOST_NAMES]) + (
        f" and {len(others) - _MOST_NAMES} more" if len(others) > _MOST_NAMES else ""
    )
    raise SourceError(
        f"{place} is not one weights file: {place.repository} has {listed or 'none'}; name one, "
        f"as in {place.repository}/{(others or ['FILE'])[0]}."
    )


def _download(
    place: HubPath,
    names: list[str],
    sizes: dict[str, int],
    reason: str,
    progress: Callable[[str], object],
) -> Path:
    """Brings files of a repository into the cache, the hub library shows how far it is; returns the
    path of the first.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    place_of = {"repo_id": place.repository, "revision": place.revision}
    absent = [
        name
        for name in names
        if not isinstance(try_to_load_from_cache(filename=name, **place_of), str)
    ]
    if absent and not reason:
        size = sum(sizes.get(name, 0) for name in absent) / 1e6
        what = absent[0] if len(absent) == 1 else f"{len(absent)} files"
        progress(f"fetching {what} of {place.repository} ({size:,.1f} MB) into {_cache_folder()}")
    paths = []
    for name in names:
        try:
            paths.append(hf_hub_download(filename=name, local_files_only=bool(reason), **place_of))
        except EntryNotFoundError as error:
            lost = reason or (
                isinstance(error, FileNotFoundError)
                and f"the hub cannot be reached ({first_line(error)})"
            )
            why = (
                f"{lost} and the cache {_cache_folder()} does not hold it"
                if lost
                else "the repository has no such file"
            )
            raise SourceError(
                f"{name} of {place.repository} cannot be had: {why}; connect once, or name "
                "another file."
            ) from None
        except (OSError, *HfHubHTTPError.__bases__) as error:
            if (
                isinstance(error, OSError)
                and error.errno
                and not isinstance(error, (ConnectionError, TimeoutError))
            ):
                raise  # the disk's, not the hub's
            raise SourceError(
                f"the download of {name} from {place.repository} broke off ({first_line(error)}): "
                "start again, the download resumes."
            ) from None
    return Path(paths[0])


def _cache_folder() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE
