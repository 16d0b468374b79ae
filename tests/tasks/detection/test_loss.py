import pytest
import torch

from dynanet.core.errors import ConfigError, DataError, InputError
from dynanet.tasks.detection.boxes import places
from dynanet.tasks.detection.decoding import decode
from dynanet.tasks.detection.loss import DetectionLoss, assign, centreness


def y(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(1, -1, 5)


AT = places(4, 6, 8, torch.zeros(1))


def test_the_smallest_box_around_a_position_and_near_it():
    boxes = y([1, 0, 0, 48, 32], [0, 16, 8, 32, 24], [-1, 0, 0, 48, 32])
    label, found = assign(boxes, AT, stride=8, reach=1.5)
    label = label.reshape(4, 6)
    assert label[1:3, 2:4].eq(0).all()  # the small one
    assert not label[0, 2:4].ge(0).any() or label[0, 2] == 1  # above it, still near the middle of the large one
    assert label[0, 0] == -1  # inside the large one, too far from its middle
    assert found.reshape(4, 6, 4)[1, 2].tolist() == [16, 8, 32, 24]
    assert found.reshape(4, 6, 4)[0, 0].tolist() == [0, 0, 0, 0]


def test_what_is_smaller_than_a_cell_is_learnt_by_one():
    label, _ = assign(y([2, 9, 9, 10, 10]), AT, stride=8, reach=1.5)
    assert label.reshape(4, 6).nonzero().tolist() != [] and (label == 2).sum() == 1
    assert label.reshape(4, 6)[1, 1] == 2


def test_no_boxes_no_answers():
    for boxes in (torch.zeros(2, 0, 5), torch.full((2, 3, 5), -1.0)):
        label, found = assign(boxes, AT, 8, 1.5)
        assert label.shape == (2, 24) and (label == -1).all() and not found.any()


def test_centreness_by_hand():
    at, box = torch.tensor([[4.0, 4], [2, 4], [0, 0], [9, 9]]), torch.tensor([0.0, 0, 8, 8])
    assert centreness(at, box).tolist() == pytest.approx([1, (2 / 6) ** 0.5, 0, 0])


def perfect(boxes, classes=2):
    """Logits that answer every box."""
    label, wanted = assign(boxes, AT, 8, 1.5)
    answer = torch.zeros(1, 24, classes + 5)
    answer[..., :classes] = -20
    there = label[0] >= 0
    answer[0, there, label[0, there]] = 20
    corners, at = wanted[0, there], AT[there]
    answer[0, there, -5:-1] = (torch.cat([at - corners[:, :2], corners[:, 2:] - at], 1) / 8).log()
    answer[0, there, -1] = centreness(at, corners).logit(eps=1e-6)
    return answer.transpose(1, 2).reshape(1, classes + 5, 4, 6)


def test_a_perfect_answer_costs_what_centreness_leaves():
    boxes = y([1, 0, 0, 24, 32], [0, 24, 8, 48, 32])
    answer = perfect(boxes)
    assert sorted(decode(answer, (32, 48), overlap=0.1)[0].labels.tolist()) == [0, 1]
    best = DetectionLoss()(answer, boxes, None)
    entropy = torch.nn.functional.binary_cross_entropy
    label, wanted = assign(boxes, AT, 8, 1.5)
    central = centreness(AT, wanted[0])[label[0] >= 0]
    torch.testing.assert_close(best, entropy(central, central), atol=1e-4, rtol=1e-4)
    for channel, by in ((0, 30), (3, 1), (6, 1)):
        worse = answer.clone()
        worse[:, channel] += by
        assert DetectionLoss()(worse, boxes, None) > best


def test_images_without_boxes_teach_the_classes_alone():
    answer = torch.randn(2, 7, 4, 6, requires_grad=True)
    DetectionLoss()(answer, torch.zeros(2, 0, 5), None).backward()
    assert answer.grad[:, :2].abs().min() > 0 and not answer.grad[:, 2:].any()
    one = answer.detach()[:1]
    loss = DetectionLoss()
    alone, padded = loss(one, y([0, 8, 8, 24, 24]), None), loss(one, y([0, 8, 8, 24, 24], [-1, 0, 0, 9, 9]), None)
    torch.testing.assert_close(alone, padded)


def test_gradients_are_finite_even_for_wild_answers():
    answer = (50 * torch.randn(1, 7, 4, 6)).requires_grad_()
    DetectionLoss()(answer, y([1, 0, 0, 24, 32], [0, 30, 30, 31, 31]), None).backward()
    assert answer.grad.isfinite().all()


def test_what_cannot_be_learnt_from():
    answer = torch.zeros(1, 7, 4, 6)
    with pytest.raises(DataError, match="label 2 and the detector has 2 classes"):
        DetectionLoss()(answer, y([2, 0, 0, 9, 9]), None)
    with pytest.raises(DataError, match="expected \\(1, M, 5\\)"):
        DetectionLoss()(answer, torch.zeros(2, 3, 5), None)
    with pytest.raises(ConfigError, match="stride"):
        DetectionLoss(0)
    assert repr(DetectionLoss(4)) == "DetectionLoss(stride=4, alpha=0.25, gamma=2.0, reach=1.5)"


def test_the_first_box_with_its_corners_the_wrong_way_round_is_named():
    answer, loss = torch.zeros(2, 7, 4, 6), DetectionLoss()
    boxes = torch.tensor([[0.0, 8, 8, 24, 24], [-1, 9, 9, 0, 0]]).repeat(2, 1, 1)
    loss(answer, boxes, None)  # what fills up may be anything
    boxes[1, 0, 1:] = torch.tensor([24.0, 8, 8, 24])
    boxes[1, 1] = torch.tensor([0.0, 8, 24, 24, 8])
    with pytest.raises(InputError, match=r"box 0 of image 1 .* \[24.0, 8.0, 8.0, 24.0\]; expected left, top, right"):
        loss(answer, boxes, None)
    boxes[1, 0, 1:] = torch.tensor([8.0, 8, 8, 8])  # without an inside: a point, but not reversed
    with pytest.raises(InputError, match="box 1 of image 1"):
        loss(answer, boxes, None)
    boxes[1, 1, 1] = torch.nan
    with pytest.raises(InputError, match="nan"):
        loss(answer, boxes, None)
