"""Files: found behind a name (a local folder or a hub repository), written whole or not at all, hashed."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from nitro_e.config import ConfigError

T = TypeVar("T")

SHIPPED = Path(__file__).parent / "shapes" / "pretrained"  # weights that the package brings along
EMOJI = Path(__file__).parent / "pretrained" / "emoji"  # likewise, of configs/emoji

# Every hub repository that the project uses unasked -> the commit it is read at. None: no public record of a commit was
# found, so it is the newest one at the time of the first download, which is printed then and recorded by `commit_of`.
REVISIONS: dict[str, str | None] = {
    "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers": "ca69e17e97609e64ce055115a6515215109b1f50",
    "meta-llama/Llama-3.2-1B": "4e20de362430cd3b72f300e6b0f18e50e7166e08",
    "timm/vit_base_patch14_dinov2.lvd142m": "4685c99dabffe5affac90bd99dbffd25801ae58d",
    "timm/vit_base_patch16_dinov3.lvd1689m": None,
    "timm/vit_base_patch16_siglip_224.v2_webli": None,
    "timm/vit_base_patch16_clip_224.openai": None,
    "mit-han-lab/dc-ae-f64c128-in-1.0-diffusers": None,
    "stabilityai/sd-vae-ft-mse": None,
    "stabilityai/sdxl-vae": None,
    "black-forest-labs/FLUX.1-schnell": None,
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
    "xswu/HPSv2": "697403c78157020a1ae59d23f111aa58ced35b0a",
    "trl-lib/ddpo-aesthetic-predictor": "cf4bd10345610935a80a5d3be9a3133c50f121e4",
    "zai-org/ImageReward": "5736be03b2652728fb87788c9797b0570450ab72",
    "google-bert/bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594",
    "facebook/mask2former-swin-small-coco-instance": None,
    "Salesforce/blip-vqa-capfilt-large": None,
    "timm/vit_large_patch14_dinov2.lvd142m": None,
    "openai/clip-vit-large-patch14-336": None,
    "amd/Nitro-E": None,
}

# What a tokenizer of transformers may consist of, besides config.json; of every repository it has some.
TOKENIZER = (
    "config.json",
    "tokenizer*|vocab*",
    "special_tokens_map.json?",
    "added_tokens.json?",
    "merges.txt?",
)
TRANSFORMER = ("config.json", "model*.safetensors", "model.safetensors.index.json?")


def load(
    what: str,
    key: str,
    source: str,
    loader: Callable[[str], T],
    wanted: Sequence[str],
    revision: str | None = None,
    repository: str | None = None,
    give: str | None = None,
) -> T:
    """`loader(folder)`; a missing folder, a missing library, whatever the loader raises become ConfigError.

    source: a folder, or a hub repository, of which the files `wanted` are fetched (see `fetch`).
    Only for the message: `what` is being loaded, the config's `key` (it ends in "path" if there is a revision) names the
    source, `repository` has the right files where source is a folder, and `give` tells how to name a folder."""
    source = resolve(what, key, source, revision)
    folder = Path(source)
    try:
        return loader(source if folder.is_dir() else str(fetch(source, wanted, revision)))
    except ModuleNotFoundError as error:
        raise ConfigError(f"{what} needs {error.name}: pip install {error.name}") from error
    except Exception as error:  # several libraries, each with its own kinds of errors
        reason = " ".join(str(error).split())[:200]
        if folder.is_dir() and repository is None:
            remedy = f"check {key}"
        else:
            wrong = repository or source
            commit = (revision if wrong == source else None) or REVISIONS.get(wrong)
            at = f" --revision {commit}" if commit else ""
            download = f"`hf download {wrong}{at} --local-dir FOLDER`"
            remedy = f"download it with {download} and {give or f'set {key}: FOLDER'}"
        where = "folder" if folder.is_dir() else "hub repository"
        raise ConfigError(f"{what}: cannot load from {where} '{source}' ({reason}); {remedy}") from error


def resolve(what: str, key: str, source: str, revision: str | None = None) -> str:
    """The absolute path of a folder, or a hub id as it is; ConfigError for a folder that does not exist."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(
                f"{what}: {key.removesuffix('path')}revision: '{folder.resolve()}' is a folder; only hub ids have revisions"
            )
        return str(folder.resolve())
    if not is_hub_id(source):
        raise ConfigError(f"{what}: {key}: folder '{source}' does not exist")
    return source


def is_hub_id(source: str | Path) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source), re.ASCII) is not None


def fetch(repository: str, wanted: Sequence[str], revision: str | None = None) -> Path:
    """The folder with the wanted files of a hub repository: from the local cache, or else downloaded, which is said.

    wanted: file names or patterns, "a|b" for either; the cache must have them all but for those with "?" at the end.
    revision: None is the commit in REVISIONS; of other repositories it is the one that the cache has, or the newest.
    The only place where the project asks the hub; libraries get the folder.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    cached = cached_folder(repository, revision)
    needed = [pattern.split("|") for pattern in wanted if not pattern.endswith("?")]
    if cached is not None and not missing(cached, needed):
        return cached
    revision = revision or REVISIONS.get(repository)
    try:  # a look-up without retries: without a network this says so at once
        HfApi().model_info(repository, revision=revision, timeout=10)
    except HfHubHTTPError:  # no such repository, no such revision, no access
        raise
    except OfflineModeIsEnabled:
        raise ConnectionError(
            "it is not in the local cache, and HF_HUB_OFFLINE forbids to ask the hub"
        ) from None
    except Exception as error:  # the library's http clients change, and their errors with them
        raise ConnectionError(
            f"it is not in the local cache, and the hub cannot be reached: {first_cause(error)}"
        ) from error
    names = [name for pattern in wanted for name in pattern.removesuffix("?").split("|")]
    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=names))
    print(f"downloaded {repository} at commit {folder.name}", file=sys.stderr)
    if absent := missing(folder, needed):
        raise FileNotFoundError(f"there is no {', '.join(' or '.join(names) for names in absent)}")
    return folder


def upload(folder: Path, repository: str, *, private: bool, message: str) -> str:
    """Upload a folder to a hub repository, which is made if it is not there; return its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        address = HfApi().create_repo(repository, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=message)
    except HFValidationError as error:
        raise ConfigError(f"'{repository}' cannot be a hub repository: {error}; give USER/NAME") from None
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"the hub did not take '{repository}': {reason}; log in with `hf auth login` and check USER/NAME"
        ) from None
    return str(address)


def first_cause(error: BaseException) -> BaseException:
    """Follow an exception's causes to the first one, which names the reason."""
    while deeper := error.__cause__ or error.__context__:
        error = deeper
    return error


def missing(folder: Path, needed: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """List the groups of patterns of which a folder has no file."""
    return [names for names in needed if not any(any(folder.glob(name)) for name in names)]


def cached_folder(repository: str, revision: str | None = None) -> Path | None:
    """Find the local cache's folder of a hub repository without asking the hub; the folder's name is the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or REVISIONS.get(repository),
                allow_patterns=[],
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        return None


def commit_of(repository: str, revision: str | None = None) -> str | None:
    """Return the commit meant by a hub repository's revision, as far as this machine knows it."""
    folder = cached_folder(repository, revision)
    return revision or REVISIONS.get(repository) if folder is None else folder.name


def sha256_of(path: Path) -> str:
    """Hash the content of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def weights_hash(*parts: Any) -> str:
    """Hash all weights: those of modules, and of the modules and tensors that plain objects hold."""
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


def save_png(image: Image.Image, path: Path, about: PngInfo | None = None) -> None:
    """Write the whole file or, on a full disk, nothing of it."""
    with atomic_path(path, durable=False) as temporary:
        image.save(temporary, "PNG", pnginfo=about)


def write_text(path: Path, text: str) -> None:
    """Write the whole UTF-8 file or, on a full disk, nothing of it. Its folder must exist."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")


def append_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Append JSON lines to a file, on lines of their own also after one that a kill cut short."""
    with path.open("a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def short_hash(data: Any) -> str:
    """Hash plain data to ten hex digits, for names of files."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:10]


@contextlib.contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """A full disk is an OSError that names the file, also where the libraries raise kinds of their own.

    safetensors raises SafetensorError with "(os error N)" or "code: N" in it, torch.save a RuntimeError about positions in the file
    whose context is the OSError.
    """
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"(?:os error|code:) (\d+)", str(error))
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


@contextlib.contextmanager
def atomic_path(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path`, for a file or a folder; rename it to `path` when the block ends well.

    It is deleted if the block fails. A folder cannot replace one that is not empty.
    durable: wait until it is on the disk, and remove what earlier, killed processes of this host left behind for the
    same path; too slow for thousands of small files.
    """
    path = Path(path)
    host = socket.gethostname()
    temporary = path.with_name(f"{path.name}.{host}.{os.getpid()}.tmp")
    if durable:
        for stale in path.parent.glob(f"{glob.escape(path.name)}.{host}.*.tmp"):
            pid = stale.name.split(".")[-2]
            if not pid.isdigit() or not _is_alive(int(pid)):
                _remove(stale)
    try:
        yield temporary
        if durable:
            for part in [*temporary.rglob("*"), temporary]:
                sync(part)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing, as `atomic_path` does; the folder of `path` is made if it is not there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def sync(path: Path) -> None:
    """Wait until what was written to a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
