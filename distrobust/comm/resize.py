"""Residuals for another number of ranks.

What must not change is the mass that waits to be applied, sum(v_i) / N. When N ranks become M, rank r's residual goes
to rank r mod M, scaled by M / N; ranks beyond N start from zero. The same for u. After a dense step v is zero and u the
same on every rank, and has to stay so: it is handed on as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from distrobust.errors import CheckpointError


def resize(states: list[dict[str, Any]], rank: int, num_ranks: int) -> dict[str, Any]:
    """`Compression.state_dict()` of all ranks of a run, in rank order -> the state of rank `rank` of `num_ranks`.

    Byte counts stay with ranks that stay. Raises CheckpointError if the states are not all ranks of one run.
    """
    before = len(states)
    for place, state in enumerate(states):
        if (state["rank"], state["num_ranks"]) != (place, before) or state["step"] != states[0]["step"]:
            raise CheckpointError(
                f"residuals to resize: got rank {state['rank']} of {state['num_ranks']} at step {state['step']} in "
                f"place {place} of {before}, wanted all ranks of one run, in order, at step {states[0]['step']}"
            )
        if state["num_local"] != 1:
            raise CheckpointError(
                "residuals of a hierarchical exchange belong to pieces of parameters: continue with the same machines"
            )
    if before == num_ranks:
        return states[rank]
    residuals = {}
    for name, first in states[0]["residuals"].items():
        settled = all(state["residuals"][name]["settled"] for state in states)
        if settled:
            residuals[name] = first
            continue
        mine = [state["residuals"][name] for state in states[rank::num_ranks]]
        scale = num_ranks / before
        residuals[name] = {
            key: torch.stack([one[key] for one in mine]).sum(dim=0) * scale if mine else torch.zeros_like(first[key])
            for key in first
            if key != "settled"
        }
        residuals[name]["settled"] = False
    counts = states[rank] if rank < before else {**states[0], "sent_bytes": 0, "dense_bytes": 0}
    return {**counts, "residuals": residuals, "rank": rank, "num_ranks": num_ranks}
