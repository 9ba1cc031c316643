import pytest

from ig_jax.data import latents
from ig_jax.plan import reading


@pytest.mark.parametrize("write", reading.LAYOUTS.values())
def test_each_layout_is_written_as_it_is_read(tmp_path, write):
    write(str(tmp_path), reading.random_latents(30), 30)
    source = latents.open_latents(str(tmp_path), num_classes=1000)
    assert source.shape == (32, 32, 4) and len(source.train) == 30
    example = source.train[29]
    assert example["label"] == 29 and example.get("mean", example.get("x"))[0, 0, 0] == 29
