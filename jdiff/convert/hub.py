"""Repositories of the Hugging Face hub: fetched into its cache and checked, and exports uploaded.

All goes through `huggingface_hub`, so HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean everywhere. It is
imported when it is needed.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from jdiff.convert import files
from jdiff.convert.rows import ConversionError, refuse

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)((?:/[\w.-]+)*)(?:@([\w./-]+))?")
_SETTINGS = ("json", "txt", "model", "md")
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")


def locate(source: str | Path, weights: str | None = None) -> Path:
    """A path as it is when something lies there, else the hub's `OWNER/NAME[/FOLDER or FILE][@REVISION]`, fetched and checked.

    weights: "raw" prefers `non_ema` files. ConversionError when it is neither, cannot be fetched, or is not what it should be.
    """
    if Path(source).exists() or isinstance(source, Path):
        return Path(source)
    match = _ID.fullmatch(source)
    if match is None or ".." in source:
        raise refuse(f"{source} does not exist")
    repo, inside, revision = match.group(1), match.group(2).strip("/"), match.group(3)
    return _fetch(repo, inside, revision, weights)


def _fetch(repo: str, inside: str, revision: str | None, weights: str | None) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    single = inside.endswith(_SUFFIXES)
    try:
        if single:
            wanted = [inside]
        else:
            names = [name for name in hub.HfApi().list_repo_files(repo, revision=revision) if _under(name, inside)]
            wanted = choose(names, weights)
        root = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except OfflineModeIsEnabled:
        root = _cached(repo, revision)
    except HFValidationError as error:
        raise ConversionError(f"{repo} does not exist, and is no name of the hub's: {error}") from error
    except (OSError, ValueError) as error:
        # no connection: what the cache has will do; a repository that is not there is an error of another class
        if getattr(error, "response", None) is not None:
            raise ConversionError(f"{repo} cannot be fetched from the hub: {_line(error)}") from error
        root = _cached(repo, revision)
    except Exception as error:  # httpx's errors of connection have no common base with the hub's
        if getattr(error, "response", None) is not None or "httpx" not in type(error).__module__:
            raise
        root = _cached(repo, revision)
    place = root / inside if inside else root
    if not place.exists():
        raise refuse(f"{repo} has no {inside}")
    check([place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file()))
    return place


def _cached(repo: str, revision: str | None) -> Path:
    """What the cache has of a repository, by its documented layout: the library's own way wants every file of the repository."""
    from huggingface_hub import constants

    base = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    named = base / "refs" / (revision or "main")
    root = base / "snapshots" / (named.read_text().strip() if named.is_file() else revision or "main")
    if not root.is_dir():
        raise refuse(f"{repo} is not in the hub's cache, and the hub cannot be reached")
    return root


def _under(name: str, folder: str) -> bool:
    return not folder or name.startswith(f"{folder}/")


def choose(names: Iterable[str], weights: str | None = None) -> list[str]:
    """Of a repository's files the settings, and of each folder's weights the one kind that `files.weight_files` would read."""
    names = list(names)
    chosen = [name for name in names if name.rsplit(".", 1)[-1] in _SETTINGS and ".index" not in name]
    variants = (".non_ema", "", ".fp16") if weights == "raw" else ("", ".fp16")
    for folder in sorted({str(PurePosixPath(name).parent) for name in names}):
        here = [name for name in names if str(PurePosixPath(name).parent) == folder]
        chosen += _weights([PurePosixPath(name).name for name in here], "" if folder == "." else f"{folder}/", variants)
    return chosen


def _weights(names: list[str], prefix: str, variants: tuple[str, ...]) -> list[str]:
    for suffix in ("safetensors", "bin"):
        for variant in variants:
            for name in files.NAMES:
                stem, mark = re.escape(name), re.escape(variant)
                shards = rf"{stem}{mark}-\d+-of-\d+\.{suffix}|{stem}-\d+-of-\d+{mark}\.{suffix}"
                index = rf"{stem}\.{suffix}\.index{mark}\.json|{stem}{mark}\.{suffix}\.index\.json"
                found = [n for n in names if re.fullmatch(rf"{stem}{mark}\.{suffix}|{shards}|{index}", n)]
                if found:
                    return [prefix + n for n in found]
    return []


def check(paths: Iterable[Path]) -> None:
    """Holds files of the hub's cache against the hashes that they are stored under: sha256 for large ones, git's for small.

    ConversionError names one that differs; a file stored under another name is not the cache's and is left alone.
    """
    for path in paths:
        name = path.resolve().name
        if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name):
            continue
        if len(name) == 40:
            digest = hashlib.sha1(
                b"blob %d\0" % path.stat().st_size + path.read_bytes(), usedforsecurity=False
            ).hexdigest()
        else:
            with open(path, "rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != name:
            raise refuse(
                f"{path} has the hash {digest}, and should have {name}: delete {path.resolve()} and fetch it again"
            )


def push(dest: Path, repo: str, card: str, private: bool = False) -> str:
    """Uploads an export, a folder or one file, with its card, to the hub's repository, which is made if need be; its address.

    ConversionError, in one line, when that is not allowed or fails.
    """
    import huggingface_hub as hub

    api = hub.HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        if dest.is_dir():
            api.upload_folder(repo_id=repo, folder_path=dest, commit_message="Converted by jdiff")
        else:
            operations = [
                hub.CommitOperationAdd(dest.name, str(dest)),
                hub.CommitOperationAdd("README.md", card.encode()),
            ]
            api.create_commit(repo, operations, commit_message="Converted by jdiff")
    except Exception as error:
        raise ConversionError(f"{dest} was written, but not uploaded to {repo}: {_line(error)}") from error
    return str(address)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
