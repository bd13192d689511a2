"""The search step, and the way of its values to the host."""

import pytest
import timm
import torch
from accelerate import Accelerator

from bmsn_zoo.errors import InputError
from bmsn_zoo.layout import Layout
from bmsn_zoo.step import Lag, Trainer, check_finite, train_and_score


def test_a_step_trains_with_its_layout_and_then_scores_on_other_images():
    supernet = timm.create_model("bmsn_resnet20", num_classes=4, searchable=True)
    trainer = Trainer(supernet, supernet, torch.optim.SGD(supernet.parameters(), lr=0.1))
    images, scored = torch.randn(2, 8, 3, 16, 16)
    labels, truth = torch.randint(0, 4, (2, 8))
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    supernet.set_layout("2-2-6")
    expected = torch.nn.functional.cross_entropy(supernet(images), labels).item()
    supernet.set_layout("4-3-3")

    loss, accuracy = train_and_score(
        trainer, Layout.parse("2-2-6"), (images, labels), (scored, truth), Accelerator()
    ).tolist()
    assert loss == pytest.approx(expected)
    assert supernet.layout == "2-2-6"
    assert all(not torch.equal(before[name], tensor) for name, tensor in supernet.state_dict().items())
    assert accuracy == (supernet(scored).argmax(1) == truth).float().mean().item(), "scored after the step"
    assert all(parameter.grad is None for parameter in supernet.parameters())


def test_all_supernets_are_scored_with_the_layout_of_the_step():
    supernets = [timm.create_model("bmsn_resnet20", num_classes=4, searchable=True) for _ in range(3)]
    trainer = Trainer(supernets[1], supernets[1], torch.optim.SGD(supernets[1].parameters(), lr=0.1))
    images, scored = torch.randn(2, 8, 3, 16, 16)
    labels, truth = torch.randint(0, 4, (2, 8))
    layout, batches = Layout.parse("2-2-6"), ((images, labels), (scored, truth))
    for supernet in supernets:
        supernet.set_layout(layout)
    expected = [(supernet(scored).argmax(1) == truth).float().mean().item() for supernet in supernets]
    before = [{name: tensor.clone() for name, tensor in one.state_dict().items()} for one in supernets]
    for supernet in supernets:
        supernet.set_layout("4-3-3")
    _, *accuracies = train_and_score(trainer, layout, *batches, Accelerator(), supernets).tolist()
    assert accuracies == expected, "scored before the step"
    changed = [not torch.equal(old["fc.weight"], one.fc.weight) for old, one in zip(before, supernets, strict=True)]
    assert changed == [False, True, False]


def test_what_nothing_learns_from_is_not_scored():
    supernet = timm.create_model("bmsn_resnet20", num_classes=4, searchable=True)
    trainer = Trainer(supernet, supernet, torch.optim.SGD(supernet.parameters(), lr=0.1))
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(0, 4, (8,))
    supernet.set_layout("2-2-6")
    expected = (supernet(images).argmax(1) == labels).float().mean().item()
    runs = []
    supernet.register_forward_hook(lambda *_: runs.append(1))
    _, accuracy = train_and_score(trainer, Layout.parse("2-2-6"), (images, labels), None, Accelerator()).tolist()
    assert runs == [1] and accuracy == expected, "the accuracy on the batch itself costs nothing"


def test_values_arrive_one_step_late_and_all_of_them_at_the_end():
    lag, arrived = Lag[int](), []
    for step in range(4):
        arrived.append(list(lag.push(step, torch.tensor([step, 0.5]), last=step == 3)))
    assert arrived == [[], [(0, [0, 0.5])], [(1, [1, 0.5])], [(2, [2, 0.5]), (3, [3, 0.5])]]


def test_values_on_their_way_are_not_those_of_a_tensor_that_is_used_again():
    lag, values = Lag[str](), torch.ones(2)
    assert list(lag.push("first", values * 1)) == []
    values.zero_()
    assert next(iter(lag.push("second", values, last=True))) == ("first", [1, 1])


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_run_that_diverges_is_stopped_where_it_did(loss):
    check_finite(1e30, 0, 0)
    with pytest.raises(InputError, match=rf"loss became {loss} in epoch 3, step 1: try a lower lr"):
        check_finite(loss, 2, 0)
