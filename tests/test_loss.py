"""Claims about the losses, against torch's own and autograd."""

import pytest
import torch
import torch.nn.functional as F
from cases import close

from alignscale.choices import CrossEntropyConfig, LossConfig, MSEConfig
from alignscale.loss import MSE, CrossEntropy, Loss, make_loss

LOSSES: list[Loss] = [MSE(), MSE(centred=False), MSE(mean=False), CrossEntropy(), CrossEntropy(0.1)]
LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.mark.parametrize("loss", LOSSES)
def test_error_is_the_gradient_of_the_value(loss: Loss) -> None:
    logits = LOGITS.clone().requires_grad_()
    targets = loss.targets(LABELS, 5, torch.float64)
    (expected,) = torch.autograd.grad(loss.value(logits, targets, 9), logits)
    close(loss.error(LOGITS, targets, 9), expected, 1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_parts_of_a_batch_add_up_to_it(loss: Loss) -> None:
    targets = loss.targets(LABELS, 5, torch.float64)
    parts = loss.value(LOGITS[:2], targets[:2], 6) + loss.value(LOGITS[2:], targets[2:], 6)
    close(parts, loss.value(LOGITS, targets, 6), 1e-14)


def test_cross_entropy_is_torchs() -> None:
    for smoothing in (0.0, 0.1):
        loss = make_loss(CrossEntropyConfig(label_smoothing=smoothing))
        targets = loss.targets(LABELS, 5, torch.float64)
        close(loss.value(LOGITS, targets, 6), F.cross_entropy(LOGITS, LABELS, label_smoothing=smoothing), 1e-14)


@pytest.mark.parametrize(("centred", "offset"), [(True, 0.2), (False, 0.0)])
@pytest.mark.parametrize(("reduction", "scale"), [("mean", 1.0), ("sum", 5.0)])
def test_mse_is_torchs_on_labels_centred_or_not(centred: bool, offset: float, reduction: str, scale: float) -> None:
    loss = make_loss(MSEConfig(centred=centred, reduction=reduction))
    expected = scale * F.mse_loss(LOGITS, F.one_hot(LABELS, 5).double() - offset)
    close(loss.value(LOGITS, loss.targets(LABELS, 5, torch.float64), 6), expected, 1e-14)


@pytest.mark.parametrize("loss", [MSE(), CrossEntropy()], ids=lambda loss: type(loss).__name__)
def test_half_precision_logits_are_read_in_the_precision_of_the_targets(loss: Loss) -> None:
    logits = LOGITS.to(torch.bfloat16)
    targets = loss.targets(LABELS, 5, torch.float32)
    for of in (loss.error, loss.value):
        assert of(logits, targets, 6).dtype == torch.float32
        close(of(logits, targets, 6), of(logits.float(), targets, 6), 0.0)


def test_a_loss_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="loss=hinge: expected an MSEConfig or CrossEntropyConfig, found LossConfig"):
        make_loss(LossConfig("hinge"))
