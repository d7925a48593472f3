"""One optimiser: loss scale, clipping, and gradients in another memory layout."""

from __future__ import annotations

import pytest
import torch

from learner_proc.optimiser import LossScale, Optimiser

CPU = torch.device("cpu")


def test_a_loss_scale_halves_on_a_bad_step_and_doubles_after_many_good_ones():
    scale = LossScale(CPU)
    for bad, expected in ((True, 2.0**15), (True, 2.0**14), (False, 2.0**14)):
        scale.update(torch.tensor(bad))
        assert scale.scale.item() == expected
    for _ in range(1998):
        scale.update(torch.tensor(False))
    assert scale.scale.item() == 2.0**14
    scale.update(torch.tensor(False))
    assert (scale.scale.item(), scale.num_finite.item()) == (2.0**15, 0.0)


def test_a_loss_scale_leaves_the_gradient_as_it_was():
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    updaters = [Optimiser([param], lr=0.1, eps=1e-5, clip=100.0, scaled=scaled) for scaled in (False, True)]
    for updater in updaters:
        grads = list(torch.autograd.grad(updater.scaled((param**2).sum()), [param]))
        norm, bad = updater.apply(grads)
        assert (norm.item(), bad.item()) == (pytest.approx(20**0.5), False)
        assert grads[0].tolist() == [2.0, -4.0]
        with torch.no_grad():
            param.copy_(torch.tensor([1.0, -2.0]))


def test_gradients_are_clipped_to_the_global_norm_and_the_norm_before_is_reported():
    params = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))]
    updater = Optimiser(params, lr=0.5, eps=1e-5, clip=1.0, scaled=False)
    norm, bad = updater.apply([torch.tensor([30.0]), torch.tensor([-40.0])])
    assert (norm.item(), bad.item()) == (50.0, False)
    moments = [updater.optimizer.state[p]["exp_avg"].item() for p in params]
    assert moments == pytest.approx([0.1 * 0.6, 0.1 * -0.8], rel=1e-4)
    assert [p.item() for p in params] == pytest.approx([-0.5, 0.5], rel=1e-3)  # the size of Adam's first step is lr


def test_a_gradient_in_another_memory_layout_changes_the_right_weights():
    """Convolutions return such gradients if their input is channels-last."""
    torch.manual_seed(0)
    start, grad = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    for param, layout in zip(params, (torch.contiguous_format, torch.channels_last), strict=True):
        updater = Optimiser([param], lr=0.1, eps=1e-5, clip=100.0, scaled=False)
        for _ in range(2):
            updater.apply([grad.clone(memory_format=layout)])
    assert torch.equal(params[0], params[1])
    assert torch.equal((params[0] - start).sign(), -grad.sign())
