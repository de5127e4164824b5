"""ResNet-50's shapes and the gradients that are handed out for them."""

import pytest
import torch
from harness.ranks import Rank, run_ranks
from torch.nn.parallel import DistributedDataParallel

from distrobust.bench.shapes import NUM_PARAMETERS, NUM_TENSORS, Pool, ResNet50Shape, share_storage_


def test_the_tensors_are_those_of_resnet50() -> None:
    parameters = dict(ResNet50Shape().named_parameters())
    assert len(parameters) == NUM_TENSORS == 161
    assert sum(parameter.numel() for parameter in parameters.values()) == NUM_PARAMETERS == 25_557_032
    assert parameters["conv1.weight"].shape == (64, 3, 7, 7)
    assert parameters["layer3.5.conv2.weight"].shape == (256, 256, 3, 3)
    assert parameters["layer4.0.downsample.0.weight"].shape == (2048, 1024, 1, 1)
    assert parameters["fc.weight"].shape == (1000, 2048)
    assert sum(parameter.ndim == 1 for parameter in parameters.values()) == 107  # biases and norms


def test_gradients_differ_between_ranks_and_steps_and_have_a_heavy_tail() -> None:
    model = ResNet50Shape()
    parameters = list(model.parameters())

    def flat(seed: int, step: int) -> torch.Tensor:
        return torch.cat([g.reshape(-1) for g in Pool(NUM_PARAMETERS, seed).gradients(parameters, step)])

    first = flat(0, 0)
    for other in (flat(0, 1), flat(1, 0)):
        # independent coordinates: the correlation of n pairs is about 1 / sqrt(n), 0.0002 here
        assert abs(torch.nn.functional.cosine_similarity(first, other, dim=0)) < 0.01
    energy = first.square()
    largest = energy.topk(NUM_PARAMETERS // 100).values.sum()
    assert largest > 0.4 * energy.sum()  # of a normal distribution it would be 0.10


@pytest.mark.ranks
def test_backward_through_ddp_averages_the_given_gradients_and_leaves_them_alone() -> None:
    def body(rank: Rank) -> tuple[torch.Tensor, torch.Tensor, bool]:
        pool = Pool(NUM_PARAMETERS, seed=rank.rank)
        before = pool.values[:100_000].clone(), pool.values[-100_000:].clone()
        model = DistributedDataParallel(
            ResNet50Shape(), process_group=rank.group, gradient_as_bucket_view=True, init_sync=False
        )
        for step in range(3):
            model.zero_grad(set_to_none=True)
            model(pool, step).backward()
        given = pool.gradients(list(model.parameters()), 2)[-2].clone()
        unchanged = torch.equal(before[0], pool.values[:100_000]) and torch.equal(before[1], pool.values[-100_000:])
        gradient = model.module.fc.weight.grad
        assert gradient is not None
        return given, gradient.clone(), unchanged

    (given, mean, unchanged), (given_, mean_, unchanged_) = run_ranks(2, body)
    torch.testing.assert_close(mean, (given + given_) / 2)
    assert torch.equal(mean, mean_)
    assert unchanged
    assert unchanged_


def test_models_can_share_their_weights() -> None:
    models = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    share_storage_(list(models))
    assert models[0].weight.data_ptr() == models[1].weight.data_ptr()
    assert models[0].weight is not models[1].weight
