"""The library face of extraction: one process, no Ray; conversations in, an xarray Dataset out.

from personaspace.extract.engine import Extractor

extractor = Extractor("~/.cache/personaspace/SmolLM2-135M-Instruct")
conversation = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A ghost."}]
activations = extractor.extract([conversation])
activations["resid_post_mean"]  # (rollout, layer, hidden)
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from rich.progress import track

from personaspace.extract.chat import ChatFormat, Message
from personaspace.extract.checkpoint import resolve
from personaspace.extract.collect import NON_FINITE
from personaspace.extract.config import ModelConfig, Packing, Site
from personaspace.extract.hooks import LayerHook
from personaspace.extract.packing import MicroBatch, chooses_packed, form_batches
from personaspace.extract.precision import machine_dtype
from personaspace.extract.reductions import Readout, plan_arrays
from personaspace.extract.rollouts import why_dropped
from personaspace.extract.selfcheck import check_stage
from personaspace.extract.slicing import load_slice
from personaspace.extract.spans import Conversation, locate
from personaspace.extract.stage import Stage
from personaspace.extract.turns import UnstableBoundaryError
from personaspace.store.errors import InputError

WINDOW_ROWS = 4096
"""Conversations that are sorted by length together."""


class Extractor:
    """A chat model, loaded whole on one device, that can be read as often as wanted.

    ``model`` is a folder, a Hugging Face id, or a ModelConfig; ``device`` such as `cpu` or `cuda:0` (default: the GPU
    if there is one), ``compiled`` is `extract.compile` of a config. Raises InputError if there is no such model,
    UnsupportedModelError if it is no causal decoder.
    """

    def __init__(self, model: ModelConfig | str, *, device: str | None = None, compiled: bool = False) -> None:
        config = ModelConfig(id=model) if isinstance(model, str) else model
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = machine_dtype(device) if config.dtype == "auto" else config.dtype
        self._config = config
        checkpoint = resolve(self._config)
        self.chat = ChatFormat(checkpoint, self._config)
        self._slice = load_slice(
            checkpoint,
            first=0,
            stop=checkpoint.layers,
            dtype=self._dtype,
            device=device,
            attention=self._config.attention,
            compiled=compiled,
        )
        self.name, self.layers, self.hidden = checkpoint.name, checkpoint.layers, checkpoint.hidden
        self._max_positions = checkpoint.max_positions
        self._checked: set[bool] = set()

    def extract(
        self,
        conversations: Sequence[Sequence[Message] | Conversation],
        *,
        sites: Sequence[Site] = ("resid_post",),
        reductions: Sequence[str] = ("mean",),
        layers: Sequence[int] | None = None,
        hooks: Sequence[LayerHook] = (),
        packing: Packing = "auto",
        micro_batch_tokens: int = 8192,
        progress: bool = False,
    ) -> xr.Dataset:
        """Read the model while it runs over finished conversations, each ending with an assistant turn.

        ``sites``, ``reductions``, ``layers``, ``packing`` and ``micro_batch_tokens`` mean what they mean in a config's
        `extract` section; ``hooks`` change the residual stream on its way (steering, capping). Blocks behind the last
        of ``layers`` are not run.

        Returns float32 arrays named `SITE_REDUCTION`, ``(rollout, layer, hidden)``, with coordinates ``layer``,
        ``n_tokens`` (of the response) and ``dropped`` (why a rollout is NaN, or empty); for `turns` and `parts` arrays
        `span_SITE_mean`, ``(span, layer, hidden)``, with coordinates ``span_rollout``, ``turn``, ``part`` and
        ``count``. Raises InputError for settings out of range; what a hook raises passes through.
        """
        chosen = tuple(sorted(set(range(self.layers) if layers is None else layers)))
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < self.layers:
            raise InputError(f"layers: {layers}; give some of the layers 0 to {self.layers - 1}.")
        for hook in hooks:
            if not 0 <= hook.layer <= chosen[-1]:
                raise InputError(f"hooks: layer {hook.layer}; the layers 0 to {chosen[-1]} are run.")
        specs = plan_arrays(sites, reductions, chosen)
        readout = Readout.of_arrays(specs)
        packed = chooses_packed(packing, self._config.attention)
        found, dropped = self._tokenize(conversations)
        self._check(packed)
        batches = self._batches(found, readout, micro_batch_tokens, packed)
        means: dict[int, NDArray[np.float32]] = {}
        with Stage(self._slice, stop=chosen[-1] + 1, sites=readout.sites, layers=chosen, hooks=hooks) as stage:
            for batch in track(batches, "extract", disable=not progress):
                output = stage.forward(batch)
                dropped |= output.failed
                means |= {row: pooled.means_SD for row, pooled in output.pooled().items()}
        for row in [row for row, means_ZLSD in means.items() if not np.isfinite(means_ZLSD).all()]:
            dropped[row] = NON_FINITE
            del means[row]
        if dropped:
            reasons = ", ".join(f"{count} x {why}" for why, count in Counter(dropped.values()).most_common(5))
            warnings.warn(f"{len(dropped)} of {len(conversations)} conversations dropped: {reasons}", stacklevel=2)
        shape = (len(conversations), len(chosen), self.hidden)
        arrays: dict[str, Any] = {}
        for place in readout.places(specs):
            if place.spec.spans:
                continue
            values = np.full(shape, np.nan, dtype=np.float32)
            for row, means_ZLSD in means.items():
                values[row] = means_ZLSD[place.site, :, place.segments][:, 0]
            arrays[place.spec.name] = (("rollout", "layer", "hidden"), values)
        lengths = [len(found[row].response) if row in found else 0 for row in range(len(conversations))]
        coordinates: dict[str, Any] = {
            "layer": np.array(chosen, dtype=np.int32),
            "n_tokens": ("rollout", np.array(lengths, dtype=np.int32)),
            "dropped": ("rollout", np.array([dropped.get(row, "") for row in range(len(conversations))], dtype=object)),
        }
        if readout.parts:
            spans = [(row, span) for row in sorted(means) for span in readout.spans(found[row].spans)]
            for place in readout.places(specs):
                if place.spec.spans:
                    rows = [means[row][place.site, :, place.segments].swapaxes(0, 1) for row in sorted(means)]
                    stacked = np.concatenate([np.empty((0, *shape[1:]), dtype=np.float32), *rows])
                    arrays[f"span_{place.spec.name}"] = (("span", "layer", "hidden"), stacked)
            coordinates |= {
                "span_rollout": ("span", np.array([row for row, _ in spans], dtype=np.int32)),
                "turn": ("span", np.array([span.turn for _, span in spans], dtype=np.int32)),
                "part": ("span", np.array([span.part for _, span in spans], dtype=object)),
                "count": ("span", np.array([span.stop - span.start for _, span in spans], dtype=np.int32)),
            }
        return xr.Dataset(arrays, coordinates, {"model": self.name, "dtype": self._dtype})

    def _tokenize(
        self, conversations: Sequence[Sequence[Message] | Conversation]
    ) -> tuple[dict[int, Conversation], dict[int, str]]:
        """Conversations that can be averaged, by place, and why the others can't."""
        found: dict[int, Conversation] = {}
        dropped: dict[int, str] = {}
        for row, given in enumerate(conversations):
            try:
                conversation = given if isinstance(given, Conversation) else locate(self.chat, given)
            except UnstableBoundaryError as error:
                dropped[row] = str(error)
                continue
            text = self.chat.decode(given.response) if isinstance(given, Conversation) else given[-1]["content"]
            reason = why_dropped(conversation, text, self._max_positions)
            if reason is None:
                found[row] = conversation
            else:
                dropped[row] = reason
        return found, dropped

    def _check(self, packed: bool) -> None:
        """Prove once that rollouts in one micro-batch don't disturb each other."""
        if packed not in self._checked:
            with Stage(self._slice) as stage:
                check_stage(stage, packed=packed)
            self._checked.add(packed)

    @staticmethod
    def _batches(
        found: Mapping[int, Conversation], readout: Readout, micro_batch_tokens: int, packed: bool
    ) -> list[MicroBatch]:
        rows = list(found)
        return [
            batch
            for start in range(0, len(rows), WINDOW_ROWS)
            for batch in form_batches(
                {row: (*found[row].prompt, *found[row].response) for row in rows[start : start + WINDOW_ROWS]},
                {row: readout.segments(found[row].spans) for row in rows[start : start + WINDOW_ROWS]},
                micro_batch_tokens,
                packed=packed,
                begins={row: len(found[row].prompt) for row in rows[start : start + WINDOW_ROWS]},
            )
        ]
