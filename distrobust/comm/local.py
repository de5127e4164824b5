"""The half of an exchange that needs no link: accumulate every parameter of a bucket, select, and code messages."""

from __future__ import annotations

import torch
from torch import Tensor

from distrobust.comm import line
from distrobust.comm.bucket import Bucket, Mean, Settings, Step, Verdict, had_gradients, unscaled
from distrobust.comm.line import Cut, Joined, Unit
from distrobust.compression import codec, memory, message
from distrobust.compression.accumulate import Piece, Selected, accumulate_and_select, select_piece
from distrobust.compression.message import Layout, Message


class LocalHalf:
    """One message for every cut of the line.

    `owned`: the cut that this rank owns, for which it selects nothing; it sends itself a message without payload.
    """

    def __init__(
        self, settings: Settings, step: Step, bucket: Bucket, verdict: Verdict, num_cuts: int, owned: int | None
    ) -> None:
        self.settings, self.step, self.bucket, self.verdict = settings, step, bucket, verdict
        self.num_cuts, self.owned = num_cuts, owned
        fused_size = sum(r.v.numel() for r in step.fused.values()) if bucket.is_last else 0
        self.size = bucket.flat.numel() + fused_size
        self.num_side = len(bucket.parts) * settings.observer.width if settings.observer is not None else 0
        self._chosen: dict[tuple[str, int], Selected] = {}
        self.decoded: dict[int, Message] = {}  # messages of this rank, as receivers will read them
        used, side = self._accumulate()
        self.cuts = self._cut(self._join() if fused_size else None)
        self.layouts = [self.layout(0 if i == owned else cut.space.k, i) for i, cut in enumerate(self.cuts)]
        if verdict.finite:
            self.messages = self._messages(used, side)
        else:
            device = bucket.flat.device
            self.messages = [message.pack_status(layout, message.NON_FINITE, device) for layout in self.layouts]

    def layout(self, k: int, owner: int, hop: int = 0) -> Layout:
        """Of a message with k coordinates of the `owner`-th cut."""
        space = self.cuts[owner].space if k else codec.Space(self.cuts[owner].space.n, ())
        num_parameters, num_side = (0, 0) if hop else (len(self.bucket.parts), self.num_side)
        return Layout(space, self.settings.code, num_parameters, num_side, self.step.number, hop)

    def headers(self, decoded: list[Message]) -> Mean:
        """What the headers of all ranks' messages say."""
        if any(one.status for one in decoded):
            return Mean(finite=False)
        names = [part.name for part in self.bucket.parts]
        used = torch.stack([one.used for one in decoded]).any(dim=0).tolist()
        mean = Mean(used=dict(zip(names, used, strict=True)), side_is_local=True)
        if self.num_side:
            side = torch.stack([one.side for one in decoded]).view(len(decoded), len(names), -1)
            mean.side = dict(zip(names, side.unbind(dim=1), strict=True))
        return mean

    def _accumulate(self) -> tuple[Tensor, Tensor]:
        """Every part's gradient into its next buffers, large ones selected from. The flags and side values to send."""
        settings, step = self.settings, self.step
        used, side = had_gradients(settings, self.bucket.parts), []
        by_part = self._pieces_by_part()
        for part in self.bucket.parts:
            gradient = unscaled(part, step.scale)
            if settings.observer is not None:
                side.append(settings.observer.observe(part.name, gradient))
            rule = part.residual.rule
            factor = memory.clip_factor(gradient, rule, settings.transport.num_ranks)
            if part.name in step.fused:
                memory.accumulate(part.residual, memory.decayed(gradient, part.weight, rule, factor))
                continue
            numbers, pieces = by_part[part.name]
            found = accumulate_and_select(part.residual, gradient, part.weight, factor, pieces, settings.selector)
            if found is None:
                self.verdict.finite = False
                continue
            self._chosen.update({(part.name, number): s for number, s in zip(numbers, found, strict=True)})
        device = self.bucket.flat.device
        return used, torch.cat(side) if side else torch.zeros(0, device=device)

    def _pieces_by_part(self) -> dict[str, tuple[list[int], list[Piece]]]:
        """For each large part: the cuts it lies in, without the owned one, and its pieces there."""
        found: dict[str, tuple[list[int], list[Piece]]] = {part.name: ([], []) for part in self.bucket.parts}
        for number, cut in enumerate(self._cut(None)):
            for unit, piece in cut.pieces:
                if unit.part is not None and number != self.owned:
                    numbers, pieces = found[unit.part.name]
                    numbers.append(number)
                    pieces.append(piece)
        return found

    def _join(self) -> Joined:
        joined = Joined(list(self.step.fused.values()))
        if not bool(torch.isfinite(joined.next_v).all()):
            self.verdict.finite = False
        return joined

    def _cut(self, joined: Joined | None) -> list[Cut]:
        large = [part for part in self.bucket.parts if part.name not in self.step.fused]
        units = line.units_of(large, self.bucket.flat.numel(), joined)
        return line.cut(units, self.size, self.num_cuts, self.step.density)

    def _messages(self, used: Tensor, side: Tensor) -> list[Tensor]:
        """Codes what was selected in every cut and removes what receivers will decode, which is `decoded`."""
        header = message.header(used, side)
        full = [number for number, layout in enumerate(self.layouts) if layout.space.k]
        selected = [(*self._selected(number), self.cuts[number].space) for number in full]
        payloads: dict[int, Tensor] = {}
        for number, (payload, places, sent) in zip(full, codec.encode_all(selected, self.settings.code), strict=True):
            line.remove_sent(self.cuts[number], places, sent)
            self.decoded[number] = Message(0, used, side, places, sent)
            payloads[number] = payload
        return [message.pack(layout, header, payloads.get(number)) for number, layout in enumerate(self.layouts)]

    def _selected(self, number: int) -> tuple[Tensor, Tensor]:
        """Places and values of what was selected in a cut."""
        cut = self.cuts[number]
        selected = [
            self._chosen[unit.part.name, number] if unit.part is not None else select_in(self.settings, unit, piece)
            for unit, piece in cut.pieces
        ]
        return line.join(cut, selected)


def select_in(settings: Settings, unit: Unit, piece: Piece) -> Selected:
    """The piece's largest."""
    return select_piece(unit.memory.next_v, piece, settings.selector)
