"""Where every array lives: one mesh with axes `data` and `fsdp`, and one rule from shapes and what
a network declares of its parameters.

Parameters, EMA and optimiser state are split over `fsdp`; batches over both axes. Nothing in the
networks mentions devices: `network` runs one on each device's rows and gathers what it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ig_jax.errors import InputError
from ig_jax.models import network as network_lib
from ig_jax.models.functional import Params, merge
from ig_jax.models.network import Heads, Layout, Network, Parameter

AXES = ("data", "fsdp")
# Below this many elements a gather costs more than the memory it would save.
_SMALL = 2**14


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices in a (data, fsdp) mesh.

    Args:
        data, fsdp: sizes; one may be -1 for "the rest".
        devices: all devices if None. Devices of several slices (TPU multi-slice) are arranged so
            that `fsdp` stays inside a slice, where the interconnect is fast.

    Returns:
        The mesh. Raises `InputError` if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    fixed = max(data, 1) * max(fsdp, 1)
    data, fsdp = (len(devices) // fixed if n == -1 else n for n in (data, fsdp))
    if data * fsdp != len(devices):
        raise InputError(
            f"config.mesh is data={data}, fsdp={fsdp}: expected a product of {len(devices)}, "
            "the number of devices"
        )
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    from jax.experimental import mesh_utils

    if slices > 1:
        if data % slices:
            raise InputError(
                f"config.mesh.data is {data}: expected a multiple of the number of slices, {slices}"
            )
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, fsdp), (slices, 1), devices=devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(
            (data, fsdp), devices=devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES)


def parameter_spec(shape: Sequence[int], fsdp: int, stacked: bool = False) -> P:
    """Decides how one array is split: its largest axis that `fsdp` divides, or not at all.

    Args:
        shape: of the array.
        fsdp: size of the mesh's `fsdp` axis.
        stacked: whether its first axis counts layers, which `lax.scan` must be able to slice.
    """
    if fsdp == 1 or math.prod(shape) < _SMALL:
        return P()
    candidates = [i for i in range(int(stacked), len(shape)) if shape[i] % fsdp == 0]
    if not candidates:
        return P()
    # Of equal axes the last: for kernels (in, out), whose gather is then contiguous in rows.
    axis = max(candidates, key=lambda i: (shape[i], i))
    return P(*("fsdp" if i == axis else None for i in range(axis + 1)))


def state_sharding(mesh: Mesh, tree: Any, layout: Layout) -> Any:
    """Shardings for every array (or shape struct) of a pytree of parameters or training state.

    Args:
        mesh: the devices.
        tree: parameters, or a tree that holds trees like them, as an optimiser's state does.
        layout: what the network declares of its parameters (`network.layout`).
    """
    stacked = {
        path for path, parameter in traverse_util.flatten_dict(layout).items() if parameter.stacked
    }

    def place(path: Sequence[Any], leaf: Any) -> NamedSharding:
        names = tuple(getattr(key, "key", getattr(key, "name", None)) for key in path)
        layers = any(names[i:] in stacked for i in range(len(names)))
        return NamedSharding(mesh, parameter_spec(leaf.shape, mesh.shape["fsdp"], layers))

    return jax.tree_util.tree_map_with_path(place, tree)


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of arrays, or shape structs, with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over all devices."""
    return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, P())


def network(mesh: Mesh, graphdef: nnx.GraphDef, params: Params) -> Network:
    """The transformer as one function of the global batch, run by each device on its own rows.

    Left alone on an fsdp mesh, XLA's partitioner splits matrix products by features and moves
    activations between devices. Here the plan is spelt out (ZeRO-3, Rajbhandari et al. 2020): the
    matrices of a block are gathered over `fsdp` where they are used, which differentiates to a
    reduce-scatter of their gradients; these are summed over `data` once the backward pass is done.

    Args:
        mesh: the devices.
        graphdef: of the network.
        params: its parameters, as `state_sharding` places them.

    Returns:
        `network(x, t, y, upto=None) -> Heads` of global arrays whose leading axis the mesh's size
        divides; to be called, and differentiated, inside `jit`.
    """
    if mesh.size == 1:
        return merge(graphdef, params)
    layout = network_lib.layout(graphdef, params)
    fsdp = mesh.shape["fsdp"]
    specs = jax.tree.map(lambda p: parameter_spec(p.shape, fsdp, p.stacked), layout)

    def in_scan(parameter: Parameter) -> bool:
        # Biases of all layers together are gathered at once: they are small, latency is not.
        return parameter.stacked and math.prod(parameter.shape[1:]) >= _SMALL

    at_once = jax.tree.map(lambda p, spec: P() if in_scan(p) else spec, layout, specs)
    per_layer = jax.tree.map(lambda p, spec: P(*spec[1:]) if in_scan(p) else P(), layout, specs)

    def gather(stack: str, layer: Params) -> Params:
        return jax.tree.map(_whole, layer, per_layer[stack])

    late = {"gather": gather} if fsdp > 1 and any(map(in_scan, jax.tree.leaves(layout))) else {}

    rows = P(AXES)

    def run(x: jax.Array, t: jax.Array, y: jax.Array, *, upto: int | None = None) -> Heads:
        def local(params: Params, x: jax.Array, t: jax.Array, y: jax.Array) -> Heads:
            whole = jax.tree.map(_whole, jax.tree.map(_let_copies_differ, params, specs), at_once)
            return merge(graphdef, whole)(x, t, y, upto=upto, **late)

        in_specs = (specs, rows, rows, rows)
        return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=rows)(params, x, t, y)

    return run


def wait_if_simulated(results: Any) -> Any:
    """Waits for a program's results on simulated devices; elsewhere returns them at once.

    The CPU's simulated devices share one pool of threads. A second program in flight can take the
    threads that the first one's collectives wait for, and neither ever ends.
    """
    devices = jax.tree.leaves(results)[0].sharding.device_set
    local = [device for device in devices if device.process_index == jax.process_index()]
    if len(local) > 1 and local[0].platform == "cpu":
        jax.block_until_ready(results)
    return results


def share_layers(
    mesh: Mesh, function: Callable[[jax.Array], jax.Array], stack: jax.Array
) -> jax.Array:
    """Applies a function of whole matrices to a stack of layers, each on a few of the devices.

    Muon's iteration costs more than the forward pass of a small batch; repeated on every device, or
    split within matrices, it would dominate a step. Pieces of layers are exchanged for whole layers
    over `fsdp`, and back; `data` shares the layers further (Liu et al. 2025, "Muon is Scalable for
    LLM Training", §2.3, shares them likewise).

    Args:
        mesh: the devices.
        function: of (layers, M, N), each layer for itself, zero for zero.
        stack: (layers, M, N) as `state_sharding` places it. Single matrices are left to XLA.

    Returns:
        `function(stack)`, placed like it.
    """
    data, fsdp = (mesh.shape[axis] for axis in AXES)
    spec = parameter_spec(stack.shape, fsdp, stacked=True) if stack.ndim == 3 else P()
    if mesh.size == 1 or stack.ndim < 3 or (fsdp > 1 and "fsdp" not in spec):
        return function(stack)
    count = len(stack)
    # Layers of one fsdp group, and the smallest sharing over `data` that covers all layers.
    share = fsdp * math.ceil(count / mesh.size)
    sharing = next(n for n in range(1, data + 1) if data % n == 0 and n * share >= count)
    teams = [list(range(first, first + sharing)) for first in range(0, data, sharing)]

    def local(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, sharing * share - count), (0, 0), (0, 0)))
        first = jax.lax.axis_index("data") % sharing * share
        x = jax.lax.dynamic_slice_in_dim(x, first, share)
        if fsdp > 1:
            axis = spec.index("fsdp")
            x = jax.lax.all_to_all(x, "fsdp", split_axis=0, concat_axis=axis, tiled=True)
        x = function(x)
        if fsdp > 1:
            x = jax.lax.all_to_all(x, "fsdp", split_axis=axis, concat_axis=0, tiled=True)
        x = jax.lax.all_gather(x, "data", axis_index_groups=teams, axis=0, tiled=True)
        return x[:count]

    # Unchecked: that all of `data` hold the same afterwards is beyond the types of shard_map.
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(stack)


def map_over_devices(mesh: Mesh, function: Callable[..., Any], whole: int) -> Callable[..., Any]:
    """Runs a function on each device's own rows of a batch, with no word between devices.

    Args:
        mesh: the devices.
        function: of `whole` arguments that every device gets complete (gathered once, before it
            starts), then of arrays with a leading batch axis; returns arrays with that axis.
        whole: how many.

    Returns:
        The function of global arrays, to be called inside `jit`. It cannot be differentiated.
    """

    def run(*arguments: Any) -> Any:
        specs = (P(),) * whole + (P(AXES),) * (len(arguments) - whole)
        # Unchecked, as loops may carry a constant at first that devices later disagree on.
        return jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=P(AXES), check_vma=False
        )(*arguments)

    return run


def _let_copies_differ(piece: jax.Array, spec: P) -> jax.Array:
    """Lets copies on several devices differ, so that their gradients are summed here, at the end.

    Otherwise that would happen at each use, before the reduce-scatter, where they are larger.
    """
    copies = tuple(axis for axis in AXES if axis not in spec)
    return jax.lax.pcast(piece, copies, to="varying") if copies else piece


def _whole(piece: jax.Array, spec: P) -> jax.Array:
    """Makes an array whole from the pieces on this `fsdp` group's devices."""
    if "fsdp" not in spec:
        return piece
    return jax.lax.all_gather(piece, "fsdp", axis=spec.index("fsdp"), tiled=True)
