"""Finding a checkpoint, and saying exactly which one it is, without loading it."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from transformers import AutoConfig

from personaspace.extract.config import ModelConfig
from personaspace.extract.quantization import read_quantization
from personaspace.store.errors import InputError

_HASHED = (".json", ".jinja", ".model", ".txt", ".safetensors", ".bin", ".py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint that exists, pinned."""

    source: str
    """What transformers loads: a local folder or a Hugging Face id."""
    name: str
    """Short name, for people and for `{model_name}`."""
    revision: str | None
    """Commit of a Hugging Face id; None for a folder."""
    files: dict[str, str]
    """File -> hash: sha256 of a folder's files, blob ids of a hub commit."""
    layers: int
    hidden: int
    max_positions: int | None
    """Longest context the model was made for, in tokens; None where its config does not say."""
    trust_remote_code: bool
    quantization: dict[str, Any] | None = None
    """What its config says of quantised weights; None where they are not."""

    def config(self) -> Any:
        """Its config, as transformers reads it."""
        return AutoConfig.from_pretrained(self.source, **self.loading())

    def loading(self) -> dict[str, Any]:
        """Arguments that every `from_pretrained` of this checkpoint takes."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def resolve(config: ModelConfig, *, hashed: bool = True) -> Checkpoint:
    """Find the checkpoint of ``config``; without the hashes of a folder's files, unless ``hashed``.

    Raises InputError if it does not exist or is no decoder model.
    """
    folder = Path(config.id).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"model.id: {folder} holds no config.json; give the folder of a checkpoint.")
        source, revision, files = str(folder.resolve()), None, _hash_files(folder) if hashed else {}
    elif means_folder(config.id):
        raise InputError(f"model.id: {config.id} does not exist; give a checkpoint folder or a Hugging Face id.")
    else:
        source, revision, files = _resolve_hub(config)
    try:
        loaded = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"model.id: {source}: transformers cannot read its config: {error}") from error
    text = decoder_config(loaded, source)
    return Checkpoint(
        source=source,
        name=Path(source).name,
        revision=revision,
        files=files,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        max_positions=getattr(text, "max_position_embeddings", None),
        trust_remote_code=config.trust_remote_code,
        quantization=read_quantization(loaded, source),
    )


def decoder_config(config: Any, name: str) -> Any:
    """The part of a config that describes the decoder. Raises InputError, naming ``name``, where there is none."""
    text = config.get_text_config()
    if not hasattr(text, "num_hidden_layers") or not hasattr(text, "hidden_size"):
        raise InputError(f"model.id: {name} is a {config.model_type} model; only decoder language models can be used.")
    return text


def means_folder(model: str) -> bool:
    """Whether a ``model.id`` is the path of a folder, be it there or not, and not an id of the hub."""
    return Path(model).expanduser().is_dir() or model.startswith(("/", "~", ".")) or model.count("/") > 1


def _resolve_hub(config: ModelConfig) -> tuple[str, str, dict[str, str]]:
    """Pin a Hugging Face id to a commit, and fetch the small files that planning needs."""
    try:
        info = HfApi().model_info(config.id, revision=config.revision, files_metadata=True)
        snapshot_download(config.id, revision=info.sha, allow_patterns=["*.json", "*.jinja", "*.model"])
    except Exception as error:  # The hub's HTTP library, and with it the errors of a dead network, has changed before.
        raise InputError(
            f"model.id: {config.id} is no local folder, and the Hugging Face hub does not give it"
            f"{f' at revision {config.revision}' if config.revision else ''}: {error}"
        ) from error
    files = {file.rfilename: file.blob_id or "" for file in info.siblings or [] if file.rfilename.endswith(_HASHED)}
    return config.id, str(info.sha), files


def _hash_files(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.iterdir() if file.suffix in _HASHED)
    with ThreadPoolExecutor() as threads:
        return dict(zip([file.name for file in files], threads.map(_sha256, files), strict=True))


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
