import torch

from llmcompress.training.rows import by_length, flags, pad_rows


def test_places_predict_the_response():
    padded = pad_rows([[5, 6, 7], [8]], [[1, 2], [3, 4, 9]], pad=0, device="cpu")
    assert padded.ids.tolist() == [[5, 6, 7, 1, 2], [8, 3, 4, 9, 0]]
    assert padded.mask.tolist() == [[1] * 5, [1, 1, 1, 1, 0]]
    assert padded.targets.tolist() == [[1, 2, 0], [3, 4, 9]]
    assert padded.inside.tolist() == [[True, True, False], [True, True, True]]
    # logits that say their own position: the place of a target is the one before it
    logits = torch.arange(5.0)[None, :, None].expand(2, 5, 1)
    assert padded.select(logits)[..., 0].tolist()[0][:2] == [2, 3]
    assert padded.select(logits)[..., 0].tolist()[1] == [0, 1, 2]
    assert padded.select(logits, 2)[..., 0].tolist() == [[2, 3], [0, 1]]


def test_flags_are_filled_up():
    assert flags([[True, False], [1]], 3, "cpu", fill=-1).tolist() == [[1, 0, -1], [1, -1, -1]]


def test_parts_hold_every_row_once_beside_rows_of_its_length():
    assert by_length([5, 1, 4, 1, 3], 2) == [[1, 3], [4, 2], [0]]
    # nine tokens at once, padding included; a longer row has a part of its own
    assert by_length([5, 1, 4, 1, 12], 3, 9) == [[1, 3], [2], [0], [4]]
    assert by_length([4, 4, 4], 3, 8) == [[0, 1], [2]]
