import pytest
import torch

from dynanet.core.errors import ConfigError, InputError
from dynanet.tasks.detection.decoding import decode


def silence(batch=1, classes=2, height=4, width=6):
    """Nothing anywhere."""
    answer = torch.zeros(batch, classes + 5, height, width)
    answer[:, :classes], answer[:, -1] = -20.0, 0.0
    return answer


def say(answer, image, label, row, column, sides, score=5.0):
    """A box of these sides, in strides, around a position."""
    answer[image, label, row, column] = score
    answer[image, -5:-1, row, column] = torch.tensor(sides).log()
    answer[image, -1, row, column] = 20.0


def test_boxes_come_out_as_they_were_said():
    answer = silence(2)
    say(answer, 0, 1, 2, 3, [1.0, 0.5, 1.5, 1.0], score=2.0)
    say(answer, 0, 0, 1, 1, [0.5, 0.5, 0.5, 0.5], score=3.0)
    first, second = decode(answer, (32, 48))
    assert first.labels.tolist() == [0, 1]
    torch.testing.assert_close(first.boxes, torch.tensor([[8.0, 8, 16, 16], [20, 16, 40, 28]]))
    torch.testing.assert_close(first.scores, torch.tensor([3.0, 2.0]).sigmoid())
    assert second.boxes.shape == (0, 4) and second.labels.dtype == torch.int64 and second.scores.shape == (0,)


def test_boxes_are_clipped_to_the_image():
    answer = silence()
    say(answer, 0, 0, 0, 0, [9.0, 9.0, 99.0, 99.0])
    say(answer, 0, 1, 3, 5, [0.1, 0.1, 1.0, 1.0])  # at 44, 28: outside an image of 27 x 42 pixels
    (found,) = decode(answer, (27, 42))
    assert found.boxes.tolist() == [[0, 0, 42, 27]]


def test_of_two_that_overlap_the_better_one():
    answer = silence()
    say(answer, 0, 0, 1, 2, [1.5, 1.5, 1.5, 1.5], score=1.0)
    say(answer, 0, 0, 1, 3, [2.5, 1.5, 0.5, 1.5], score=2.0)  # the same box
    say(answer, 0, 1, 1, 1, [0.5, 1.5, 2.5, 1.5], score=1.0)  # of another class
    (found,) = decode(answer, (32, 48))
    assert found.labels.tolist() == [0, 1] and found.scores[0] == pytest.approx(torch.tensor(2.0).sigmoid())
    (found,) = decode(answer, (32, 48), most=1)
    assert len(found.labels) == 1


def test_nothing_to_decode():
    assert decode(silence(0), (32, 48)) == []
    assert len(decode(silence(), (32, 48), least=0.0)[0].labels) <= 100
    wild = torch.full((1, 7, 2, 2), 1e4)
    assert decode(wild, (16, 16))[0].boxes.isfinite().all()


def test_what_cannot_be_decoded():
    with pytest.raises(InputError, match="classes \\+ 5"):
        decode(torch.zeros(1, 5, 4, 4), (32, 32))
    with pytest.raises(ConfigError, match="thresholds"):
        decode(silence(), (32, 48), least=2.0)
    with pytest.raises(ConfigError, match="counts"):
        decode(silence(), (32, 48), most=0)
