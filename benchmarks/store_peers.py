"""The same values as others keep them: what benchmarks/store.py compares with.

- `pt`: as the reference project keeps them, a file per role: a dict of key -> bf16 tensor ``(L, D)``;
- `safetensors`: a file per role with one bf16 tensor ``(rows, L, D)``, the layout that is fastest to slice;
- `zarr`: float32 with Zarr's own choice of chunks and codecs.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from store_data import Tiles

PEERS = ("pt", "safetensors", "zarr")


def write_peer(peer: str, folder: Path, tiles: Tiles) -> int:
    """Write all of the run; returns the bytes of its files."""
    target = folder / peer
    target.mkdir(parents=True)
    if peer == "zarr":
        _write_zarr(target, tiles)
    else:
        for role in range(tiles.roles):
            values_NLD = torch.from_numpy(tiles.role_values(role)).to(torch.bfloat16)
            if peer == "pt":
                rows = {f"pos_p0_q{row}": values_LD.clone() for row, values_LD in enumerate(values_NLD)}
                torch.save(rows, target / f"{tiles.name(role)}.pt")
            else:
                save_file({"activations": values_NLD}, target / f"{tiles.name(role)}.safetensors")
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())


def _write_zarr(target: Path, tiles: Tiles) -> None:
    layout = tiles.layout
    array = zarr.create_array(target, shape=(layout.rows, layout.layers, layout.hidden), dtype="float32")
    rows = array.chunks[0]
    held: list[NDArray[np.float32]] = []
    done = 0
    for unit in range(layout.units):
        held.append(tiles.unit_ULD(unit))
        values = np.concatenate(held) if len(held) * layout.unit_rows >= rows or unit == layout.units - 1 else None
        if values is None:
            continue
        # Whole chunks only, or Zarr would read and write them twice.
        whole = len(values) if unit == layout.units - 1 else len(values) // rows * rows
        array[done : done + whole] = values[:whole]
        done += whole
        held = [values[whole:]]


def read_layer(peer: str, folder: Path, tiles: Tiles, layer: int) -> Any:
    """One layer of every rollout."""
    target = folder / peer
    if peer == "zarr":
        return zarr.open_array(target, mode="r")[:, layer]
    return torch.cat([_role_layer(peer, target, tiles.name(role), layer) for role in range(tiles.roles)])


def _role_layer(peer: str, target: Path, name: str, layer: int) -> torch.Tensor:
    if peer == "pt":
        rows = torch.load(target / f"{name}.pt", map_location="cpu", weights_only=True)
        return torch.stack([values_LD[layer] for values_LD in rows.values()])
    with safe_open(target / f"{name}.safetensors", "pt") as file:
        part: torch.Tensor = file.get_slice("activations")[:, layer]
        return part


def read_role(peer: str, folder: Path, tiles: Tiles, role: int) -> Any:
    """Every layer of one role's rollouts."""
    target = folder / peer
    if peer == "zarr":
        return zarr.open_array(target, mode="r")[role * tiles.rows_per_role : (role + 1) * tiles.rows_per_role]
    if peer == "pt":
        rows = torch.load(target / f"{tiles.name(role)}.pt", map_location="cpu", weights_only=True)
        return torch.stack(list(rows.values()))
    with safe_open(target / f"{tiles.name(role)}.safetensors", "pt") as file:
        return file.get_tensor("activations").clone()  # Mapped until then, not read.


def read_rows(peer: str, folder: Path, tiles: Tiles, layer: int, rows: NDArray[np.intp]) -> Any:
    """One layer of these rollouts, which are in order."""
    target = folder / peer
    if peer == "zarr":
        return zarr.open_array(target, mode="r").oindex[rows, layer]
    parts = []
    for role in np.unique(rows // tiles.rows_per_role).tolist():
        places = (rows[rows // tiles.rows_per_role == role] % tiles.rows_per_role).tolist()
        if peer == "pt":
            parts.append(_role_layer(peer, target, tiles.name(role), layer)[places])
            continue
        with safe_open(target / f"{tiles.name(role)}.safetensors", "pt") as file:
            part = file.get_slice("activations")
            parts.append(torch.stack([part[place, layer] for place in places]))
    return torch.cat(parts)
