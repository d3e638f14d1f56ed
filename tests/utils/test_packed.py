import numpy as np
import pytest

from utils.packed import PackedRows, PackedTexts


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return [rng.random((count, 5)).astype(np.float32) for count in (3, 0, 1, 4, 0, 2, 0)]


def test_packed_rows_equal_the_list_of_arrays(arrays):
    packed = PackedRows.of(arrays, 5)
    assert len(packed) == len(arrays)
    for number, array in enumerate(arrays):
        np.testing.assert_array_equal(packed[number], array)
        np.testing.assert_array_equal(packed[number - len(arrays)], array)
    assert [len(rows) for rows in packed] == [3, 0, 1, 4, 0, 2, 0] == packed.counts.tolist()
    np.testing.assert_array_equal(np.concatenate(packed), np.concatenate(arrays))
    assert [len(rows) for rows in packed[1:5:2]] == [0, 4]
    assert [packed.owner(row) for row in range(10)] == [0, 0, 0, 2, 3, 3, 3, 3, 5, 5]
    with pytest.raises(IndexError):
        packed[len(arrays)]
    assert len(PackedRows.of([], 5)) == 0
    assert PackedRows.of([], 5).rows.shape == (0, 5)


def test_rows_taken_in_another_order(arrays):
    order = np.array([5, 3, 3, 1, 0])
    taken = PackedRows.of(arrays, 5).take(order)
    assert len(taken) == len(order)
    for rows, number in zip(taken, order, strict=True):
        np.testing.assert_array_equal(rows, arrays[number])
    assert len(PackedRows.of(arrays, 5).take(np.array([], int))) == 0


def test_packed_texts_equal_the_list_of_texts():
    texts = ["a/b.jpg", "", "Bäume/図.png", b"not\xffutf8.jpg".decode("utf-8", "surrogateescape")]
    packed = PackedTexts.of(iter(texts))
    assert list(packed) == texts
    assert packed[-1] == texts[-1]
    assert packed[1:3] == texts[1:3]
    assert texts[2] in packed
    with pytest.raises(IndexError):
        packed[4]
