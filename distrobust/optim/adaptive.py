"""Noise-adaptive layerwise rates on top of any torch optimizer: SGD, AdamW, Muon, without a change to their code.

    optimizer = NoiseAdaptive(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    ...                                                                     # the loop stays as it was

The rates of LANTON (rates.py) alone: the update is the inner optimizer's, and the noise is measured in the Frobenius
norm, its own dual. Groups are matrices and vectors. For the length of its step the inner optimizer sees one parameter
group for each parameter, at the group's rate times the parameter's ratio; before and after it sees its own groups. So
schedulers, checkpoints and whoever reads a rate know nothing of ratios, and nothing can multiply them up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from distrobust.errors import CheckpointError, ConfigError
from distrobust.optim.groups import dense_gradients, log, trained_parameters
from distrobust.optim.noise import Noise, SpreadNoise, TemporalNoise
from distrobust.optim.rates import check_alpha, rate_ratios

_NEW = object()


class NoiseAdaptive(Optimizer):
    """optimizer: one, or several that share the model's parameters. model: names and groups come from it.

    alpha, beta2: see rates.py and noise.py. groups: name -> any label, to change what is compared with what (matrices
    with matrices, vectors with vectors). `ratios`: name -> ratio of the last step. Handed to `distrobust.compress` it
    measures the workers' spread; alone, or with one worker, successive gradients. Raises ConfigError.
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        model: nn.Module,
        *,
        alpha: float = 0.1,
        beta2: float = 0.9,
        groups: Mapping[str, str] | None = None,
    ) -> None:
        check_alpha(alpha)
        self.optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        if any(isinstance(one, LBFGS) for one in self.optimizers):
            raise ConfigError("NoiseAdaptive: got LBFGS, which moves all layers by one rate; wanted another optimizer")
        parameters = trained_parameters(model)
        self.alpha = alpha
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        self._refuse_strangers(model)
        labels = {name: "matrix" if p.ndim > 1 else "vector" for name, p in parameters.items()} | dict(groups or {})
        if unknown := sorted(set(labels) - set(parameters)):
            raise ConfigError(f"NoiseAdaptive groups: {unknown[0]!r} is no parameter of the model that is trained")
        self._labels = {parameter: labels[name] for parameter, name in self._names.items()}
        self._is_observed = False
        self._take_on(TemporalNoise(parameters, dict.fromkeys(parameters, "frobenius"), beta2))
        super().__setstate__({})  # torch's hooks; its own __init__ would want parameters

    def observer_for(self, num_ranks: int, always_dense: bool, parameters: Mapping[str, Tensor]) -> Noise:
        """What an exchange shall call on every gradient of `parameters`; from here on `step` measures no more.

        The optimizer takes on the exchange's names and keeps what it measured so far.
        """
        kind = SpreadNoise if num_ranks > 1 else TemporalNoise
        noise = kind(parameters, dict.fromkeys(parameters, "frobenius"), self.noise.beta2)
        noise.continue_from(self.noise)
        how = "successive gradients, since there is one worker"
        if num_ranks > 1:
            how = "the spread of workers' gradients" + ("" if always_dense else ", by projections where it is sparse")
        log(f"NoiseAdaptive: noise from {how}")
        self._names |= {p: name for name, p in parameters.items() if p in self._names}
        self._is_observed = True
        self._take_on(noise)
        return noise

    def load_noise(self, state: Mapping[str, Any]) -> None:
        """The noise of a `state_dict()`, without the inner optimizers."""
        self.noise.load_state_dict(state)
        self._refresh()

    def _take_on(self, noise: Noise) -> None:
        self.noise = noise
        labels = [self._labels.get(parameter, "") for parameter in noise.parameters.values()]
        numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        self._groups = torch.tensor([numbers[label] for label in labels], device=noise.h.device)
        self._refresh()

    def _refresh(self) -> None:
        """The ratios, from the noise as it is known now."""
        ratios = rate_ratios(self.noise.h, self._groups, self.alpha).tolist()
        self.ratios: dict[str, float] = dict(zip(self.noise.names, ratios, strict=True))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if isinstance(self.noise, TemporalNoise) and not self._is_observed:
            self.noise.measure(dense_gradients({n: p for p, n in self._names.items()}, "NoiseAdaptive"))
        self._refresh()
        for optimizer in self.optimizers:
            self._step_with_ratios(optimizer)
        return loss

    def _step_with_ratios(self, optimizer: Optimizer) -> None:
        own = optimizer.param_groups
        split: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for group in own:
            for i, parameter in enumerate(group["params"]):
                alone = {**group, "params": [parameter], "lr": group["lr"] * self._ratio_of(parameter)}
                if "param_names" in group:
                    alone["param_names"] = [group["param_names"][i]]
                split.append((group, alone))
        given = [alone["lr"] for _, alone in split]
        optimizer.param_groups = [alone for _, alone in split]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = own
        for (group, alone), rate in zip(split, given, strict=True):
            kept = ("params", "param_names", "lr")
            changed = [key for key in alone if key not in kept and alone[key] is not group.get(key, _NEW)]
            if alone["lr"] is not rate or changed:
                what = "its learning rate" if alone["lr"] is not rate else f"its {changed[0]!r}"
                raise ConfigError(
                    f"NoiseAdaptive: {type(optimizer).__name__}.step() changed {what} while it ran, and the rates of "
                    "single layers would be lost; let a scheduler do that between steps, on the NoiseAdaptive optimizer"
                )

    def _ratio_of(self, parameter: Tensor) -> float:
        """1 for a parameter that is frozen, or not exchanged."""
        return self.ratios.get(self._names.get(parameter, ""), 1.0)

    def _refuse_strangers(self, model: nn.Module) -> None:
        known = set(model.parameters())
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter not in known:
                        raise ConfigError(
                            f"NoiseAdaptive: {type(optimizer).__name__} holds a parameter of shape "
                            f"{tuple(parameter.shape)} that the model does not; pass the optimizer's own model"
                        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        return {key: value for optimizer in self.optimizers for key, value in optimizer.state.items()}

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizers[0].defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise ConfigError("NoiseAdaptive: add parameters to the model and make the optimizer anew")

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [one.state_dict() for one in self.optimizers], "noise": self.noise.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if "optimizers" not in state_dict:
            raise CheckpointError("this is not the state of a NoiseAdaptive optimizer: it holds no 'optimizers'")
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.load_noise(state_dict["noise"])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()
