import numpy as np

from ig_jax.data import digits


def every(source):
    return [source[i] for i in range(len(source))]


def test_pixels_are_scikit_learns_in_minus_one_to_one():
    from sklearn.datasets import load_digits

    original = load_digits()
    images, labels = digits.load()
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.float32
    assert (images.min(), images.max()) == (-1, 1)
    np.testing.assert_array_equal((images[..., 0] + 1) * 8, original.images)
    np.testing.assert_array_equal(labels, original.target)
    assert labels.dtype == np.int32


def test_a_data_source_of_ten_classes():
    source = digits.open_digits()
    assert source.shape == (8, 8, 1) and source.num_classes == 10
    assert source.class_names == tuple("0123456789")
    assert source.autoencoder is None and (source.shift, source.scale) == (0, 1)
    example = source.train[0]
    assert example["x"].shape == source.shape and example["x"].dtype == np.float32
    assert example["label"].dtype == np.int32


def test_held_out_digits_are_fixed_apart_and_of_every_class():
    source, again = digits.open_digits(180), digits.open_digits(180)
    assert (len(source.train), len(source.validation)) == (1617, 180)
    for example, same in zip(every(source.validation), every(again.validation), strict=True):
        np.testing.assert_array_equal(example["x"], same["x"])
    pictures = [
        {e["x"].tobytes() for e in every(part)} for part in (source.train, again.validation)
    ]
    assert not pictures[0] & pictures[1]
    assert pictures[0] | pictures[1] == {image.tobytes() for image in digits.load()[0]}
    counts = np.bincount([e["label"] for e in every(source.validation)], minlength=10)
    assert counts.min() >= 8
    assert digits.open_digits(0).validation is None


def test_labels_stay_with_their_digits():
    images, labels = digits.load()
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    source = digits.open_digits(300)
    for part in (source.train, source.validation):
        assert all(known[e["x"].tobytes()] == e["label"] for e in every(part))
