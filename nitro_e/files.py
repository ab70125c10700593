"""Files behind names: a local folder or a hub repository, one line for what goes wrong with them; writing and hashing weights."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from nitro_e.config import ConfigError

T = TypeVar("T")


def load(
    what: str, key: str, source: str, loader: Callable[[str], T], revision: str | None = None,
    repository: str | None = None, give: str | None = None,
) -> T:  # fmt: skip
    """`loader(source)`; a missing folder, a missing library, whatever the loader raises become ConfigError.

    Only for the message: `what` is being loaded, the config's `key` (it ends in "path" if there is a revision) names the
    source, `repository` has the right files where source is a folder, and `give` tells how to name a folder."""
    source = resolve(what, key, source, revision)
    folder = Path(source)
    try:
        return loader(source)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{what} needs {error.name}: pip install {error.name}") from error
    except Exception as error:  # several libraries, each with its own kinds of errors
        reason = " ".join(str(error).split())[:200]
        if folder.is_dir() and repository is None:
            remedy = f"check {key}"
        else:
            download = f"`hf download {repository or source} --local-dir FOLDER`"
            remedy = f"download it with {download} and {give or f'set {key}: FOLDER'}"
        where = "folder" if folder.is_dir() else "hub repository"
        raise ConfigError(f"{what}: cannot load from {where} '{source}' ({reason}); {remedy}") from error


def resolve(what: str, key: str, source: str, revision: str | None = None) -> str:
    """The absolute path of a folder, or a hub id as it is; ConfigError for a folder that does not exist."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(
                f"{what}: {key.removesuffix('path')}revision: '{folder}' is a folder; only hub ids have revisions"
            )
        return str(folder.resolve())
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ConfigError(f"{what}: {key}: folder '{source}' does not exist")
    return source


def find(source: str, name: str, revision: str | None = None) -> Path | None:
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


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def weights_hash(*parts: Any) -> str:
    """Of all weights: modules, and modules and tensors that plain objects hold."""
    digest = hashlib.sha256()
    for part in parts:
        held = {"": part} if isinstance(part, nn.Module) else vars(part)
        for name, value in sorted(held.items()):
            if isinstance(value, (nn.Module, Tensor)):
                add_tensors(digest, name, value)
    return digest.hexdigest()


def add_tensors(digest: Any, name: str, value: nn.Module | Tensor) -> None:
    """Put every tensor of `value` into a hash of hashlib, with its name, type and shape."""
    tensors = value.state_dict() if isinstance(value, nn.Module) else {"": value}
    for key, tensor in tensors.items():
        digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a `.safetensors` file with the permissions of any other new file; OSError if it cannot be written."""
    with _os_errors(path):
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
        path.chmod(mode)  # safetensors leaves 0600, which hides published weights from colleagues


def save_object(value: Any, path: Path) -> None:
    """`torch.save` plain data and tensors; OSError if it cannot be written."""
    with _os_errors(path), path.open("wb") as file:
        torch.save(value, file)


@contextlib.contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """A full disk is an OSError that names the file, also where the libraries raise kinds of their own.

    safetensors raises SafetensorError with "(os error N)" in it, torch.save a RuntimeError about positions in the file
    whose context is the OSError.
    """
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
    except RuntimeError as error:
        cause = error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno or errno.EIO, cause.strerror or str(cause), str(path)) from error
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
        raise
