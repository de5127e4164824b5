"""Free adversarial training: one backward pass updates the weights and the perturbation (Shafahi et al., NeurIPS 2019).

Every batch is trained on m times in a row. Each time the gradient with respect to the input, which the backward pass of
the step computes anyway, moves the perturbation that the next step starts from, also that of the next batch
(algorithm 1):

    x' = clip(x + delta, 0, 1);  one backward pass: gradients of the weights, and g of x'
    delta <- clip(delta + eps sign(g), -eps, eps)

The forms in other norms are ours. delta is per place in the batch, not per image, as in the paper.
"""

from __future__ import annotations

from torch import Tensor

from distrobust.adversarial.threat import Threat, ascend, project


def start(x: Tensor, delta: Tensor | None, threat: Threat) -> Tensor:
    """x' (B, C, H, W), a leaf that collects a gradient; delta: of the step before, None at first, else x's shape."""
    x_adv = x.clone() if delta is None else project(x + delta, x, threat)
    return x_adv.detach().requires_grad_()


def moved(x: Tensor, x_adv: Tensor, threat: Threat) -> Tensor:
    """The next delta, from x_adv.grad after the step's backward pass; detached, within the ball around zero.

    Unlike the paper's it is clipped where x + delta would leave [0, 1]. Without a gradient it stays.
    """
    if x_adv.grad is None:
        return (x_adv - x).detach()
    return project(ascend(x_adv.detach(), x_adv.grad, threat.eps, threat), x, threat) - x
