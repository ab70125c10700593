"""Files behind names: a local folder or a hub repository, and one line for what goes wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nitro_e.config import ConfigError

T = TypeVar("T")


def load(what: str, key: str, source: str, loader: Callable[[str], T], revision: str | None = None) -> T:
    """`loader(source)`; a missing folder, a missing library, whatever the loader raises become ConfigError.

    `what` is being loaded, `key` of the config names the source: both only for the message."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        source = str(folder.resolve())
        if revision is not None:
            raise ConfigError(f"{what}: revision: '{source}' is a folder; only hub ids have revisions")
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ConfigError(f"{what}: {key}: folder '{source}' does not exist")
    try:
        return loader(source)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{what} needs {error.name}: pip install {error.name}") from error
    except Exception as error:  # several libraries, each with its own kinds of errors
        reason = " ".join(str(error).split())[:200]
        if folder.is_dir():
            remedy = f"check {key}"
        else:
            remedy = f"download it with `hf download {source} --local-dir FOLDER` and set {key}: FOLDER"
        where = "folder" if folder.is_dir() else "hub repository"
        raise ConfigError(f"{what}: cannot load from {where} '{source}' ({reason}); {remedy}") from error


def file(source: str, name: str, revision: str | None = None) -> Path | None:
    """The file of that name in a folder, or downloaded from a hub repository; None if there is none."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except LocalEntryNotFoundError:  # no network: not the same as "no such file"
        raise
    except EntryNotFoundError:
        return None
