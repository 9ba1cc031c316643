"""Products of tokens; and which attention runs, by device, dtype, shape and, on GPUs, a race."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ig_jax.models import layers

SHAPE = (16, 4, 2, 8)


@pytest.mark.parametrize("batch", [(3, 5), (0, 5), (2, 3, 4), (6,)])
def test_a_linear_layer_is_one_product_of_matrices(batch):
    """The numbers of `nnx.Linear`, but its weight's gradient sums over a single axis."""
    layer, plain = (kind(8, 4, rngs=nnx.Rngs(0)) for kind in (layers.Linear, nnx.Linear))
    x = jax.random.normal(jax.random.key(0), (*batch, 8))

    def total(kernel, layer):
        layer.kernel[...] = kernel
        return jnp.square(layer(x)).sum()

    def gradient(layer):
        return jax.grad(lambda kernel: total(kernel, nnx.clone(layer)))(layer.kernel[...])

    assert layer(x).shape == (*batch, 4)
    np.testing.assert_allclose(layer(x), plain(x), rtol=1e-6)
    np.testing.assert_allclose(gradient(layer), gradient(plain), rtol=1e-5, atol=1e-5)
    text = jax.jit(lambda: gradient(layer)).lower().as_text()
    assert "contracting_dims = [0] x [0]" in text and "[0, 1] x [0, 1]" not in text


@pytest.fixture
def on_gpu(monkeypatch):
    """As if this machine had a GPU, where cuDNN's attention is the stand-in that is returned."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setitem(layers.ATTENTIONS, "cudnn", layers.attend)
    race = layers.race
    race.cache_clear()
    yield monkeypatch
    race.cache_clear()


def test_only_what_cudnn_can_do_on_a_gpu_is_raced(on_gpu):
    raced = []
    on_gpu.setattr(layers, "race", lambda *given: raced.append(given) or "cudnn")
    on_gpu.setattr(jax, "device_count", lambda: 4)
    for shape, dtype in (
        (SHAPE, jnp.float32),
        ((16, 4, 2, 12), jnp.bfloat16),
        ((16, 4, 2, 136), jnp.bfloat16),
    ):
        assert layers.choose_attention(shape, dtype) == "xla"
    assert not raced
    assert layers.choose_attention(SHAPE, jnp.bfloat16) == "cudnn"
    assert raced == [((4, 4, 2, 8), jnp.dtype(jnp.bfloat16))]  # one device's share of the batch
    on_gpu.setattr(jax, "process_count", lambda: 2)
    assert layers.choose_attention(SHAPE, jnp.bfloat16) == "cudnn" and len(raced) == 1
    on_gpu.setattr(jax, "default_backend", lambda: "cpu")
    assert layers.choose_attention(SHAPE, jnp.bfloat16) == "xla" and len(raced) == 1


@pytest.mark.parametrize(
    ("xla", "cudnn", "expected"),
    [(1e-3, 2e-3, "xla"), (3e-3, 2e-3, "cudnn"), (98e-5, 1e-3, "cudnn")],
)
def test_the_faster_one_wins_and_a_tie_changes_nothing(on_gpu, caplog, xla, cudnn, expected):
    asked = []

    def seconds(attention, shape, dtype):
        asked.append(shape)
        return xla if attention is layers.ATTENTIONS["xla"] else cudnn

    on_gpu.setitem(layers.ATTENTIONS, "cudnn", lambda q, k, v: q)
    on_gpu.setattr(layers, "_seconds", seconds)
    with caplog.at_level(logging.INFO):
        found = [layers.race(SHAPE, jnp.dtype(jnp.bfloat16)) for _ in range(3)]
    assert found == [expected] * 3 and asked == [SHAPE] * 2
    (line,) = caplog.messages
    assert line == (
        f"attention of 16×4×2×8 bfloat16: xla {1e3 * xla:.3g} ms, cudnn {1e3 * cudnn:.3g} ms, "
        f"so {expected}"
    )


def test_a_card_without_cudnns_attention_takes_xlas(on_gpu, caplog):
    def refuse(q, k, v):
        raise RuntimeError("cuDNN is not detected.\nlong text")

    on_gpu.setitem(layers.ATTENTIONS, "cudnn", refuse)
    with caplog.at_level(logging.INFO):
        assert layers.race(SHAPE, jnp.dtype(jnp.bfloat16)) == "xla"
    assert caplog.messages == [
        "attention by XLA: cuDNN's does not run here (cuDNN is not detected.)"
    ]


def test_a_race_in_the_midst_of_tracing_leaves_no_trace(on_gpu, caplog):
    """It runs for real, in jit, grad, scan and rematerialisation, and the program is the same."""
    q = jax.random.normal(jax.random.key(0), SHAPE, jnp.bfloat16)

    def network(q):
        @jax.checkpoint
        def block(x, _):
            name = layers.choose_attention(x.shape, x.dtype)
            return layers.ATTENTIONS[name](x, x, x), None

        return jax.lax.scan(block, q, None, length=2)[0].astype(jnp.float32).sum()

    with caplog.at_level(logging.INFO):
        raced = jax.make_jaxpr(jax.jit(jax.grad(network)))(q)
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("attention of 2×4×2×8")
    on_gpu.setattr(layers, "race", lambda *given: "xla")
    assert str(jax.make_jaxpr(jax.jit(jax.grad(network)))(q)) == str(raced)
