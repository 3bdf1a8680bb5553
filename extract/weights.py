"""The files of a checkpoint that hold a slice's weights: which they are, and how they come to this node.

transformers opens every file of a checkpoint and then takes the tensors that the model has a place for. Here its own
rules for names (renamed, merged, quantised) say beforehand which files those tensors are in, and the others are
neither opened nor downloaded.
"""

import json
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from personaspace.extract.checkpoint import Checkpoint
from personaspace.store.errors import InputError

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where transformers looks for weights, in its order."""
DOWNLOADS = 4
"""Files of one slice that are downloaded at the same time."""


def local_folder(checkpoint: Checkpoint, config: Any) -> Path:
    """The checkpoint's folder on this machine; of a Hugging Face id the one in the cache, without its shards.

    ``config`` is transformers' config of it. Raises InputError if a file can't be downloaded.
    """
    if checkpoint.revision is None:
        return Path(checkpoint.source)
    explicit = getattr(config, "transformers_weights", None)
    weights = [name for name in (explicit, *WEIGHT_FILES) if name in checkpoint.files]
    beside = [name for name in ("adapter_config.json", *type(config).extra_files) if name in checkpoint.files]
    # The config comes last: its place tells the folder's.
    folder = download(checkpoint, [*weights[:1], *beside, "config.json"])[-1].parent
    method = (checkpoint.quantization or {}).get("quant_method")
    if method == "torchao" and weights and weights[0].endswith(".index.json"):
        # Its quantizer reads the headers of all files before anything is loaded.
        download(checkpoint, sorted(set(json.loads((folder / weights[0]).read_text())["weight_map"].values())))
    return folder


def slice_files(
    model: PreTrainedModel, checkpoint: Checkpoint, folder: Path, files: list[str], load_config: Any
) -> list[str]:
    """Those of ``files`` that hold weights of ``model``, the slice as it is about to be loaded; all on this machine.

    ``load_config`` is transformers' own. Checkpoints of one file stay as they are. Raises InputError if a file can't be
    downloaded.
    """
    weight_map = (load_config.sharded_metadata or {}).get("weight_map")
    if weight_map is None:
        return files
    wanted = files_with_weights(model, weight_map, load_config.weight_mapping or [])
    kept = [file for file in files if (name := _name_in(folder, file)) in wanted or name not in weight_map.values()]
    if checkpoint.revision is not None:
        download(checkpoint, [_name_in(folder, file) for file in kept])
    return kept


def files_with_weights(
    model: PreTrainedModel, weight_map: Mapping[str, str], conversions: list[WeightRenaming | WeightConverter]
) -> set[str]:
    """Files of ``weight_map`` (tensor -> file) that hold a tensor which transformers would load into ``model``."""
    loaded = _loaded(model, weight_map, conversions)
    wanted = {weight_map[name] for name in loaded}
    # Some conversions depend on which other tensors are seen: they must come to the same with fewer files.
    if _loaded(model, [name for name in weight_map if weight_map[name] in wanted], conversions) != loaded:
        return set(weight_map.values())
    return wanted


def _loaded(
    model: PreTrainedModel, names: Collection[str], conversions: list[WeightRenaming | WeightConverter]
) -> set[str]:
    """Tensors of a checkpoint that have a place in the model: transformers' rule, with its own functions."""
    places = model.state_dict()
    # Conversions remember what they have seen.
    conversions = deepcopy(conversions)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    loaded = set()
    for name in sorted(names, key=dot_natural_key):
        place, _ = rename_source_key(name, renamings, converters, prefix, places)
        if place in places or name in places or rename_source_key(name, [], [], prefix, places)[0] in places:
            loaded.add(name)
    return loaded


def download(checkpoint: Checkpoint, names: list[str]) -> list[Path]:
    """Files of a Hugging Face id in this machine's cache: each is downloaded once, whoever asks for it meanwhile.

    Raises InputError naming the file and the reason.
    """

    def fetch(name: str) -> Path:
        try:
            return Path(hf_hub_download(checkpoint.source, name, revision=checkpoint.revision))
        except Exception as error:  # The hub's HTTP library, and with it the errors of a dead network, has changed.
            raise InputError(
                f"model.id: {checkpoint.source}: the Hugging Face hub does not give {name} at revision "
                f"{checkpoint.revision}: {error}"
            ) from error

    with ThreadPoolExecutor(DOWNLOADS) as threads:
        return list(threads.map(fetch, names))


def _name_in(folder: Path, file: str) -> str:
    path = Path(file)
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
