"""The loss beside PyTorch's: values, gradients, and where the memory goes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from raylm.training import loss as losses
from raylm.training.loss import summed_cross_entropy
from raylm.training.objectives import IGNORE

ROWS, CLASSES = 37, 50


def data(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(ROWS, CLASSES, generator=chance)).to(dtype)
    labels = torch.randint(0, CLASSES - 1, (ROWS,), generator=chance)
    labels[::5] = IGNORE
    return logits, labels


@pytest.mark.parametrize("chunk", [1, 8 * CLASSES, 1 << 18])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("excluded", [None, CLASSES - 1])
def test_loss_and_gradient_are_those_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, chunk: int, smoothing: float, excluded: int | None
) -> None:
    monkeypatch.setitem(losses._CHUNK_ELEMENTS, "cpu", chunk)
    logits, labels = data()
    theirs = logits.clone().requires_grad_()
    counted = theirs if excluded is None else theirs[:, :excluded]
    expected = functional.cross_entropy(counted, labels, reduction="sum", label_smoothing=smoothing)
    (expected * 0.25).backward()
    ours = logits.clone().requires_grad_()
    found = summed_cross_entropy(ours * 1, labels, smoothing, excluded)
    (found * 0.25).backward()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    assert not ours.grad[labels == IGNORE].any()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_16_bits_are_computed_in_32(dtype: torch.dtype, atol: float) -> None:
    logits, labels = data(dtype)
    theirs = logits.float().requires_grad_()
    expected = functional.cross_entropy(theirs, labels, reduction="sum")
    expected.backward()
    ours = logits.clone().requires_grad_()
    found = summed_cross_entropy(ours * 1, labels)
    found.backward()
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert ours.grad.dtype == dtype
    assert torch.allclose(ours.grad.float(), theirs.grad, atol=atol)


def test_a_loss_scale_reaches_what_16_bits_could_not_hold() -> None:
    logits = torch.zeros(1, 2, dtype=torch.float16)
    logits[0, 1] = -18  # a probability of 1.5e-8, below the least fp16
    ours = logits.requires_grad_()
    (summed_cross_entropy(ours * 1, torch.tensor([0])) * 65_536).backward()
    assert float(ours.grad[0, 1]) == pytest.approx(65_536 * 1.5e-8, rel=0.05)


def test_the_gradient_takes_the_place_of_the_logits() -> None:
    logits, labels = data()
    weight = torch.eye(CLASSES).requires_grad_()
    products = logits @ weight
    summed_cross_entropy(products, labels).backward()
    assert float(products.sum(1).abs().max()) < 1e-5  # probabilities less one


def test_without_gradients_only_the_loss_is_computed() -> None:
    logits, labels = data()
    expected = functional.cross_entropy(logits, labels, reduction="sum")
    with torch.no_grad():
        assert float(summed_cross_entropy(logits.clone(), labels)) == pytest.approx(float(expected), rel=1e-6)
    nothing = torch.full((ROWS,), IGNORE)
    assert float(summed_cross_entropy(logits.clone(), nothing)) == 0
