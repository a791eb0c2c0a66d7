"""The depthwise convolution's own backward pass."""

import pytest
import torch

from libs import depthwise


@pytest.mark.parametrize("size", [(2, 5, 9, 6, 7), (3, 4, 4, 5, 1), (1, 2, 3, 4, 5)])
def test_as_one_operation_it_has_pytorchs_gradients(size):
    torch.manual_seed(0)
    *shape, k = size
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape[-1], 1, k, k, dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (x, weight)]
    expected, found = depthwise.as_image_convolution(*leaves), depthwise.depthwise_conv(*leaves)
    assert torch.equal(found, expected)
    along = torch.randn(found.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(found, leaves, along)
    for ours, pytorchs in zip(gradients, torch.autograd.grad(expected, leaves, along), strict=True):
        torch.testing.assert_close(ours, pytorchs, rtol=1e-12, atol=1e-12)
    for i, leaf in enumerate(leaves):  # with the other frozen
        alone = depthwise.depthwise_conv(*(other if other is leaf else other.detach() for other in leaves))
        gradient = torch.autograd.grad(alone, leaf, along)[0]
        assert torch.equal(gradient, gradients[i]) and gradient.stride() == leaf.stride()


def test_in_bfloat16_the_gradient_of_the_weights_is_summed_in_float32():
    torch.manual_seed(0)
    x, weight, along = torch.randn(8, 16, 16, 6), torch.randn(6, 1, 7, 7), torch.randn(8, 16, 16, 6)
    found, exact = (
        depthwise.depthwise_gradients(*(a.bfloat16().to(dtype) for a in (along, x, weight)), True, True)
        for dtype in (torch.bfloat16, torch.float64)
    )
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - wanted).abs().max() <= wanted.abs().max() * 2**-8


def test_as_one_operation_it_is_registered_well():
    x, weight = torch.randn(2, 3, 4, 6), torch.randn(6, 1, 3, 3)
    torch.library.opcheck(depthwise.depthwise_conv, (x.requires_grad_(), weight.requires_grad_()))
    for needed in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(depthwise.depthwise_gradients, (x.detach(), x.detach(), weight.detach(), *needed))
