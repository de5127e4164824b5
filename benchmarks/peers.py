"""What distrobust is measured against: plain Deep Gradient Compression, and PowerSGD, as DDP hooks.

Written from the papers, because no maintained implementation of either runs under DistributedDataParallel on gloo, and
tuned as a fair opponent: in-place passes, numpy where it is faster than torch, one collective per tensor, all of them
launched before the first is awaited.

Deep Gradient Compression (Lin et al., ICLR 2018, algorithm 4): u = m u + g, v = v + u; per tensor, a threshold from the
k-th largest of a strided 1 % sample, then the k largest of those above it (the paper's hierarchical selection); what is
sent leaves u and v (momentum factor masking); fp16 values and int32 indices. As in the authors' code, 0.8 k survivors
are enough, rounding to fp16 is lost, and biases and norms are reduced dense; they are fused, one all-reduce a bucket.

PowerSGD (Vogels et al., NeurIPS 2019, algorithms 1 and 2): M = gradient + error, P = mean M Q, P orthogonalised,
Q = mean M'P, M is replaced by P Q' and the error is M - P Q'. Q is kept from step to step.

No `from __future__ import annotations`: torch compares the hooks' annotations with its own types.
"""

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

_SAMPLED = 0.01  # of a tensor's coordinates
_ENOUGH, _LOWER = 0.8, 0.8  # of k survivors; what the threshold is multiplied by when there are fewer
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def sent_by_ring(num_bytes: int, num_ranks: int) -> int:
    """What every rank sends to reduce `num_bytes` in a ring."""
    return 2 * num_bytes * (num_ranks - 1) // num_ranks


class DgcState:
    """u and v of every parameter, by the parameter itself; `group`: the process group, None for the default one."""

    def __init__(self, density: float, momentum: float, group: dist.ProcessGroup | None) -> None:
        self.density, self.momentum, self.group = density, momentum, group
        self.num_ranks = dist.get_world_size(group) if group is None else group.size()
        self.u: dict[Tensor, Tensor] = {}
        self.v: dict[Tensor, Tensor] = {}
        self.magnitude = torch.empty(0)  # scratch, of the largest tensor
        self.sent_bytes = 0


def dgc(model: DistributedDataParallel, density: float, momentum: float = 0.9) -> DgcState:
    """Installs plain Deep Gradient Compression on `model`."""
    state = DgcState(density, momentum, model.process_group)
    model.register_comm_hook(state, dgc_hook)
    return state


def dgc_hook(state: DgcState, bucket: GradBucket) -> Future[Tensor]:
    buffer = bucket.buffer()
    sparse, dense, futures = [], [], []
    for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        if parameter.ndim <= 1:
            dense.append((parameter, gradient))
            continue
        message, k = compress(state, parameter, gradient.reshape(-1))
        received = message.new_empty((state.num_ranks, message.numel()))
        futures.append(_all_gather(received.view(-1), message, group=state.group, async_op=True).get_future())
        state.sent_bytes += (state.num_ranks - 1) * message.numel()
        sparse.append((gradient, received, k))
    if dense:
        flat = torch.cat([gradient.reshape(-1) for _, gradient in dense]).div_(state.num_ranks)
        futures.append(dist.all_reduce(flat, group=state.group, async_op=True).get_future())
        state.sent_bytes += sent_by_ring(4 * flat.numel(), state.num_ranks)

    def finish(done: Future[list[Future[Tensor]]]) -> Tensor:
        for one in done.value():
            one.value()  # raises if a peer is gone
        buffer.zero_()
        for gradient, received, k in sparse:
            decompress_(gradient.view(-1), received, k)
        if dense:
            pieces = flat.split([gradient.numel() for _, gradient in dense])
            for (parameter, gradient), mean in zip(dense, pieces, strict=True):
                u = state.u.setdefault(parameter, torch.zeros_like(mean))
                gradient.copy_(u.mul_(state.momentum).add_(mean).view_as(gradient))
        return buffer

    return torch.futures.collect_all(futures).then(finish)


def compress(state: DgcState, parameter: Tensor, gradient: Tensor) -> tuple[Tensor, int]:
    """One tensor's gradient (n,) -> its message, uint8 (k int32 indices, k fp16 values, filled up to 4 bytes), k."""
    n = gradient.numel()
    if parameter not in state.u:
        state.u[parameter], state.v[parameter] = torch.zeros(n), torch.zeros(n)
        if state.magnitude.numel() < n:
            state.magnitude = torch.empty(n)
    u, v = state.u[parameter], state.v[parameter]
    u.mul_(state.momentum).add_(gradient)
    v.add_(u)
    k = math.ceil(n * state.density)
    indices = select(torch.abs(v, out=state.magnitude[:n]), k, state.density)
    message = torch.zeros(6 * k + 2 * (k % 2), dtype=torch.uint8)
    message[: 4 * k].view(torch.int32)[: len(indices)] = indices
    message[4 * k : 6 * k].view(torch.float16)[: len(indices)] = v[indices]
    u[indices] = 0.0
    v[indices] = 0.0
    return message, k


def select(magnitude: Tensor, k: int, density: float) -> Tensor:
    """At most k indices of the largest of `magnitude` (n,): above a sampled threshold, trimmed to the k largest."""
    n = magnitude.numel()
    stride = max(1, int(n // max(_SAMPLED * n, 2 / density)))
    sample = magnitude[::stride]
    threshold = float(torch.topk(sample, math.ceil(sample.numel() * density), sorted=False).values.min())
    while True:
        indices = torch.from_numpy(np.flatnonzero(magnitude.numpy() >= threshold))
        if len(indices) >= _ENOUGH * k:
            break
        threshold *= _LOWER
    if len(indices) > k:
        indices = indices[torch.topk(magnitude[indices], k, sorted=False).indices]
    return indices


def decompress_(mean: Tensor, messages: Tensor, k: int) -> None:
    """Adds the mean of `messages` (num_ranks, bytes) to `mean` (n,); the padding of a short one is zero."""
    for message in messages:
        values = message[4 * k : 6 * k].view(torch.float16).to(torch.float32).div_(len(messages))
        mean.index_add_(0, message[: 4 * k].view(torch.int32), values)


class PowerSgdState:
    """Q (m, r) and error (n, m) of every matrix, by the parameter itself."""

    def __init__(self, rank: int, group: dist.ProcessGroup | None) -> None:
        self.rank, self.group = rank, group
        self.num_ranks = dist.get_world_size(group) if group is None else group.size()
        self.q: dict[Tensor, Tensor] = {}
        self.error: dict[Tensor, Tensor] = {}
        self.sent_bytes = 0


def power_sgd(model: DistributedDataParallel, rank: int = 1) -> PowerSgdState:
    """Installs PowerSGD with error feedback on `model`."""
    state = PowerSgdState(rank, model.process_group)
    model.register_comm_hook(state, power_sgd_hook)
    return state


def power_sgd_hook(state: PowerSgdState, bucket: GradBucket) -> Future[Tensor]:
    """The first all-reduce is waited for: a collective launched from a callback of another hangs or crashes gloo."""
    buffer, r = bucket.buffer(), state.rank
    matrices, small = [], []
    for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        n, m = gradient.shape[0], gradient[0].numel()
        if parameter.ndim <= 1 or r * (n + m) >= n * m:
            small.append(gradient)
            continue
        if parameter not in state.q:
            seed = torch.Generator().manual_seed(len(state.q))  # the same Q on every rank: the same model everywhere
            state.q[parameter] = torch.randn(m, r, generator=seed)
            state.error[parameter] = torch.zeros(n, m)
        state.error[parameter].add_(gradient.reshape(n, m))
        matrices.append((state.error[parameter], state.q[parameter], gradient))

    products = [error @ q for error, q, _ in matrices]
    first = torch.cat([*(p.view(-1) for p in products), *(gradient.reshape(-1) for gradient in small)])
    dist.all_reduce(first.div_(state.num_ranks), group=state.group)
    pieces = first.split([*(p.numel() for p in products), *(gradient.numel() for gradient in small)])
    for gradient, mean in zip(small, pieces[len(products) :], strict=True):
        gradient.copy_(mean.view_as(gradient))
    bases = [torch.linalg.qr(p.view(-1, r)).Q for p in pieces[: len(products)]]
    second = torch.cat([(error.T @ basis).view(-1) for (error, _, _), basis in zip(matrices, bases, strict=True)])
    second.div_(state.num_ranks)
    state.sent_bytes += sent_by_ring(4 * (first.numel() + second.numel()), state.num_ranks)

    def finish(done: Future[list[Tensor]]) -> Tensor:
        done.value()  # raises if a peer is gone
        sums = second.split([q.numel() for _, q, _ in matrices])
        for (error, q, gradient), basis, mean in zip(matrices, bases, sums, strict=True):
            q.copy_(mean.view_as(q))
            approximation = gradient.view(error.shape)
            torch.mm(basis, q.T, out=approximation)
            error.sub_(approximation)
        return buffer

    return dist.all_reduce(second, group=state.group, async_op=True).get_future().then(finish)
