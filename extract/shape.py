"""A model's shape: what planning needs to know of it. Pure data; the large models' shapes ship in configs/shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from personaspace.extract.config import Dtype

BYTES_OF: dict[Dtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of one number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a decoder-only model, and how its parameters lie."""

    name: str
    """Short name, for people."""
    layers: int
    """Blocks."""
    hidden: int
    """Width of the residual stream."""
    intermediate: int
    """Width of a block's MLP, or of all experts that one token passes."""
    heads: int
    """Query heads of attention."""
    kv_heads: int
    """Key and value heads of attention."""
    head_dim: int
    """Width of one head."""
    vocabulary: int
    """Tokens that the head tells apart."""
    max_positions: int | None
    """Longest context in tokens; None where the model's config does not say."""
    block_parameters: tuple[int, ...]
    """Parameters of each block."""
    active_parameters: tuple[int, ...]
    """Of each block, those that one token meets: fewer in mixtures of experts."""
    embedding_parameters: int
    """Of the token embedding."""
    head_parameters: int
    """Of the language-model head; 0 where it is the embedding."""
    eager_attention: bool = False
    """Its attention scores are kept whole unless flash attention is asked for, as in Gemma 2."""
    weight_bits: float = 0.0
    """Bits of one stored block weight in a quantised checkpoint; 0 where weights have the run's dtype."""

    @property
    def parameters(self) -> int:
        """Of blocks, embedding and head, without the final norm."""
        return sum(self.block_parameters) + self.embedding_parameters + self.head_parameters

    def block_bytes(self, layer: int, dtype: Dtype) -> int:
        """Bytes of one block's weights on a device."""
        return round(self.block_parameters[layer] * (self.weight_bits / 8 or BYTES_OF[dtype]))

    def slice_bytes(self, first: int, stop: int, dtype: Dtype) -> int:
        """Bytes of the weights that a stage of blocks ``[first, stop)`` loads; the embedding only where it begins."""
        embedding = self.embedding_parameters * BYTES_OF[dtype] if first == 0 else 0
        return embedding + sum(self.block_bytes(layer, dtype) for layer in range(first, stop))

    def whole_bytes(self, dtype: Dtype) -> int:
        """Bytes of all weights, the head's too: what generating takes."""
        return self.slice_bytes(0, self.layers, dtype) + self.head_parameters * BYTES_OF[dtype]

    def kv_bytes(self, dtype: Dtype) -> int:
        """Bytes that one token of a conversation leaves in the cache of keys and values, all layers together."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES_OF[dtype]


def shipped_shapes() -> dict[str, Mapping[str, Any]]:
    """Hugging Face id in lower case -> the file of configs/shapes that describes it."""
    folder = resources.files("personaspace") / "configs" / "shapes"
    found: dict[str, Mapping[str, Any]] = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        document: Mapping[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        found |= {name.lower(): document for name in document["ids"]}
    return found


def shipped_shape(model_id: str) -> ModelShape | None:
    """The shape of a Hugging Face model whose shape ships with the package; None for others."""
    document = shipped_shapes().get(model_id.lower())
    if document is None:
        return None
    shape = dict(document["shape"])
    parameters = (int(shape.pop("block_parameters")),) * int(shape["layers"])
    return ModelShape(
        name=model_id.rpartition("/")[2], block_parameters=parameters, active_parameters=parameters, **shape
    )


def shipped_config(model_id: str) -> dict[str, Any] | None:
    """Of a model whose shape ships: its settings as transformers names them, `model_type` among them."""
    document = shipped_shapes().get(model_id.lower())
    return None if document is None else dict(document["config"])
