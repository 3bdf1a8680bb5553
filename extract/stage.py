"""A slice of a model: runs its own blocks, and sums what passes at each of them over the spans asked for.

The states received from the previous stage are spliced in before the first own block; embedding scale, rotary tables
and masks stay the model's own business. Shape suffixes: B batch, T tokens, D hidden, Z sites, L layers of the stage,
S segments of the micro-batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from personaspace.extract.anatomy import states_of
from personaspace.extract.config import Site
from personaspace.extract.hooks import LayerHook, attach
from personaspace.extract.packing import MicroBatch
from personaspace.extract.pooling import HostCopy, Pooled, SegmentSums, to_device
from personaspace.extract.sites import INNER_SITES, Addition, check_compilable, find_additions
from personaspace.extract.slicing import PassThrough, Slice

OUT_OF_MEMORY = "out of memory, even alone in its micro-batch"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOutput:
    """What one micro-batch gives at one stage."""

    hidden_BTD: torch.Tensor | None
    """Residual stream after the stage's last block, for the next stage; None from the last stage."""
    copies: tuple[tuple[MicroBatch, HostCopy], ...]
    """Sums of each part that was run, on their way to the host. One part, unless memory ran out."""
    failed: dict[int, str] = field(default_factory=dict)
    """Row -> reason, for rollouts that could not be run."""

    @property
    def parts(self) -> int:
        """Pieces that the micro-batch was run in: more than one if memory ran out."""
        return len(self.copies) + len(self.failed)

    def pooled(self) -> dict[int, Pooled]:
        """Row -> its sums, ``(Z, L, segments of the row, D)``. Waits for the device."""
        rows: dict[int, Pooled] = {}
        for batch, copy in self.copies:
            sums_ZLSD = copy.numpy()
            first = 0
            for row, segments in zip(batch.rows, batch.segments, strict=True):
                last = first + len(segments)
                counts_S = np.array([stop - start for start, stop in segments], dtype=np.int64)
                rows[row] = Pooled(sums_SD=sums_ZLSD[:, :, first:last], counts_S=counts_S)
                first = last
        return rows


class Stage:
    """A slice of a model at work on one device. Knows nothing of other processes.

    It runs the blocks from the slice's first to ``stop - 1`` (default: all of the slice's), and sums what passes at
    ``sites`` of ``layers`` (absolute numbers; default: all that it runs). ``last`` says that no other stage follows.
    Where memory runs out, ``before_halves`` is called before the micro-batch is run in halves. The slice can be used by
    one stage at a time; `close` gives it back as it was. Raises UnsupportedModelError if the model can't be read so.
    """

    def __init__(
        self,
        model: Slice,
        *,
        stop: int | None = None,
        last: bool = True,
        sites: Sequence[Site] = ("resid_post",),
        layers: Sequence[int] | None = None,
        hooks: Sequence[LayerHook] = (),
        before_halves: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self._before_halves = before_halves
        self.stop = model.stop if stop is None else stop
        self.is_last = last
        self.sites = tuple(sites)
        self.layers = tuple(range(model.first, self.stop) if layers is None else layers)
        self._received_BTD: torch.Tensor | None = None
        self._leaving_BTD: torch.Tensor | None = None
        self._sums: SegmentSums | None = None
        self._response_BT: torch.Tensor | None = None
        self._masked = any(hook.positions == "response" for hook in hooks)
        self._handles: list[RemovableHandle] = []
        self._set_aside = {layer: model.blocks[layer] for layer in range(self.stop, model.stop)}
        for layer, block in self._set_aside.items():
            model.blocks[layer] = PassThrough(block)
        try:
            self._register(hooks)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take all hooks out of the model."""
        for handle in self._handles:
            handle.remove()
        for layer, block in self._set_aside.items():
            self.model.blocks[layer] = block

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @torch.inference_mode()
    def forward(
        self,
        batch: MicroBatch,
        received_BTD: torch.Tensor | None = None,
        *,
        embedded_BTD: torch.Tensor | None = None,
    ) -> StageOutput:
        """Run one micro-batch through the stage's blocks; in halves, and those again, where memory runs out.

        ``received_BTD`` is the previous stage's ``hidden_BTD``; the first stage embeds token ids instead. In the
        others no block may look at the embeddings; ``embedded_BTD`` stands for them, by default the received states.
        """
        try:
            return self._forward(batch, received_BTD, embedded_BTD)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        finally:
            self._received_BTD = self._leaving_BTD = self._sums = self._response_BT = None
        # Outside of the handler, since the error's traceback holds on to all that was alive.
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self._before_halves()
        return self._forward_halves(batch, received_BTD)

    def probe(
        self, lengths: Sequence[int], *, packed: bool = False, seed: int = 0
    ) -> tuple[MicroBatch, torch.Tensor | None]:
        """A micro-batch of random tokens, and the states that a stage other than the first would receive."""
        draw = torch.Generator().manual_seed(seed)
        vocabulary = self.model.decoder.config.get_text_config().vocab_size
        batch = MicroBatch(
            rows=tuple(range(len(lengths))),
            token_ids=tuple(tuple(torch.randint(vocabulary, (n,), generator=draw).tolist()) for n in lengths),
            segments=tuple(((1, n),) for n in lengths),
            packed=packed,
            begins=(1,) * len(lengths),
        )
        if self.model.first == 0:
            return batch, None
        received_BTD = torch.zeros((*batch.shape, self.model.hidden))
        for (row, origin), n in zip(batch.origins, lengths, strict=True):
            received_BTD[row, origin : origin + n] = torch.randn((n, self.model.hidden), generator=draw)
        return batch, received_BTD.to(self.model.dtype)

    @torch.inference_mode()
    def run_decoder(
        self, batch: MicroBatch, received_BTD: torch.Tensor | None, embedded_BTD: torch.Tensor | None = None
    ) -> None:
        """One pass of the decoder; hooks see what passes."""
        if self._masked:
            self._response_BT = _response_mask(batch, self.model.device)
        # Padding to the right needs no mask under causal attention, and without one the fused causal kernels run.
        # Packed rollouts are told apart by their positions alone, and only without a mask and a cache.
        arguments: dict[str, Any] = {"use_cache": False}
        if batch.packed:
            positions_T = torch.cat([torch.arange(length) for length in batch.lengths])
            arguments["position_ids"] = to_device(positions_T[None], self.model.device)
            if self.model.decoder.config._attn_implementation.startswith("flash"):
                # Else transformers finds the borders by itself, with a host sync in every layer.
                arguments |= _borders(batch, self.model.device)
        if received_BTD is None:
            ids_BT = torch.zeros(batch.shape, dtype=torch.long)
            for (row, origin), ids in zip(batch.origins, batch.token_ids, strict=True):
                ids_BT[row, origin : origin + len(ids)] = torch.tensor(ids)
            self.model.decoder(input_ids=to_device(ids_BT, self.model.device), **arguments)
        else:
            self._received_BTD = received_BTD.to(self.model.device)
            embedded_BTD = self._received_BTD if embedded_BTD is None else embedded_BTD.to(self.model.device)
            self.model.decoder(inputs_embeds=embedded_BTD, **arguments)

    def _forward(
        self, batch: MicroBatch, received_BTD: torch.Tensor | None, embedded_BTD: torch.Tensor | None
    ) -> StageOutput:
        self._sums = SegmentSums(
            batch,
            sites=len(self.sites),
            layers=len(self.layers),
            hidden=self.model.hidden,
            device=self.model.device,
        )
        self.run_decoder(batch, received_BTD, embedded_BTD)
        copy = HostCopy(self._sums.sums_ZLSD)
        return StageOutput(hidden_BTD=None if self.is_last else self._leaving_BTD, copies=((batch, copy),))

    def _forward_halves(self, batch: MicroBatch, received_BTD: torch.Tensor | None) -> StageOutput:
        rows, hidden_BTD = len(batch.rows), None
        if not self.is_last:
            shape = (*batch.shape, self.model.hidden)
            hidden_BTD = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
        if rows == 1:
            # Other stages need states of the right shape; what they make of them is dropped with the row.
            return StageOutput(hidden_BTD=hidden_BTD, copies=(), failed={batch.rows[0]: OUT_OF_MEMORY})
        outputs = []
        for first, stop in ((0, rows // 2), (rows // 2, rows)):
            half = batch.part(first, stop)
            place = _place(batch, half, first)
            output = self.forward(half, None if received_BTD is None else received_BTD[place])
            if hidden_BTD is not None:
                assert output.hidden_BTD is not None
                hidden_BTD[place] = output.hidden_BTD
            outputs.append(output)
        return StageOutput(
            hidden_BTD=hidden_BTD,
            copies=tuple(copy for output in outputs for copy in output.copies),
            failed={row: why for output in outputs for row, why in output.failed.items()},
        )

    def _register(self, hooks: Sequence[LayerHook]) -> None:
        model = self.model
        if model.compiled:
            check_compilable(self.sites)
        blocks = {layer: model.blocks[layer] for layer in range(model.first, self.stop)}
        if model.first > 0:
            self._handles.append(blocks[model.first].register_forward_pre_hook(self._splice, with_kwargs=True))
        additions: dict[tuple[int, Site], Addition] = {}
        if set(INNER_SITES) & set(self.sites):
            additions = find_additions(blocks, lambda: self.run_decoder(*self.probe((6,))))
        self._handles += attach(blocks, hooks, self._response)
        for number, layer in enumerate(self.layers):
            for place, site in enumerate(self.sites):
                self._observe(place, number, site, blocks[layer], additions.get((layer, site)))
        self._handles.append(blocks[self.stop - 1].register_forward_hook(self._leave))

    def _response(self) -> torch.Tensor:
        assert self._response_BT is not None
        return self._response_BT

    def _splice(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (self._received_BTD, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._received_BTD}

    def _leave(self, _: nn.Module, __: tuple[Any, ...], output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        self._leaving_BTD = states_of(output)

    def _observe(self, place: int, number: int, site: Site, block: nn.Module, addition: Addition | None) -> None:
        """Have the states summed at one site of the stage's layer number ``number``."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._sums is not None:
                self._sums.add(place, number, args[0] if args else kwargs["hidden_states"])

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if self._sums is not None:
                self._sums.add(place, number, states_of(output), 1.0 if addition is None else addition.scale)

        if site == "resid_pre":
            self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        else:
            read = block if addition is None else addition.module
            self._handles.append(read.register_forward_hook(after))


def _response_mask(batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """Which tokens belong to responses, ``(B, T)``."""
    mask_BT = torch.zeros(batch.shape, dtype=torch.bool)
    for (row, origin), begin, length in zip(batch.origins, batch.begins, batch.lengths, strict=True):
        mask_BT[row, origin + begin : origin + length] = True
    return to_device(mask_BT, device)


def _borders(batch: MicroBatch, device: torch.device) -> dict[str, Any]:
    """Where packed rollouts begin and end, as flash attention takes it."""
    ends = torch.tensor([0, *accumulate(batch.lengths)], dtype=torch.int32)
    borders, longest = to_device(ends, device), max(batch.lengths)
    return {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _place(batch: MicroBatch, part: MicroBatch, first: int) -> tuple[slice, slice]:
    """Where the part, which begins with rollout number ``first``, lies in the batch's tensors."""
    row, origin = batch.origins[first]
    rows, length = part.shape
    return slice(row, row + rows), slice(origin, origin + length)


def _is_out_of_memory(error: BaseException) -> bool:
    # PyTorch's CPU allocator has no error class of its own.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
