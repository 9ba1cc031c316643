"""Workdirs that older versions saved open, sample and train on, through the public faces alone.

`tests/golden/workdir_digits.zip` was written by `--mode=train` of the first version whose workdirs
are promised to stay readable: digits, a SiT of width 4 and two blocks, 200 steps of 16 examples.
"""

import json
import os
import subprocess
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

import ig_jax
from ig_jax.storage.checkpoints import saved_config
from tests.common import GOLDEN

# The fields of later versions that this config lacks, and one that it never had.
LATER = ("data.skip_damaged", "optimizer.clip_norm", "sampler.ema", "train.init_from", "sweep")


@pytest.fixture
def workdir(tmp_path):
    with zipfile.ZipFile(GOLDEN / "workdir_digits.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path


def edit_config(workdir, change):
    path = workdir / "checkpoints" / "200" / "config" / "metadata"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def run(workdir, *arguments):
    command = [sys.executable, "-m", "ig_jax.main", f"--workdir={workdir}", *arguments]
    # One device, as on a user's machine, not the eight of these tests.
    environment = os.environ | {"XLA_FLAGS": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("which", ["last", "best", 200])
def test_its_network_is_what_it_was(workdir, which):
    model = ig_jax.load_workdir(str(workdir), which)
    x = jnp.linspace(-1, 1, 64).reshape(1, 8, 8, 1)
    heads = model(x, jnp.array([0.3]), jnp.array([4]))
    final = [0.7666754722595215, 0.6754253506660461, 0.10690885782241821, -0.013099446892738342]
    auxiliary = [0.709855854511261, 0.6473870873451233, 0.12031176686286926, 0.07198551297187805]
    np.testing.assert_allclose(heads.final[0, 3, :4, 0], final, atol=1e-5)
    # However heads are grouped, this network has one auxiliary head.
    np.testing.assert_allclose(np.reshape(heads.auxiliary, (8, 8))[3, :4], auxiliary, atol=1e-5)


@pytest.mark.slow
def test_it_samples_and_resumes_without_the_fields_that_came_later(workdir):
    def forget(values):
        for field in LATER:
            section, _, name = field.partition(".")
            values[section].pop(name) if name else values.pop(section)

    edit_config(workdir, forget)
    sampled = run(workdir, "--mode=sample")
    assert sampled.returncode == 0, sampled.stderr[-2000:]
    assert "16 samples of step 200" in sampled.stdout
    resumed = run(workdir, "--config.train.num_steps=203", "--config.sampler.num_steps=3")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "continuing from step 200" in resumed.stderr and "trained 203 steps" in resumed.stdout
    # Its unnamed score is beaten by any whose name is known.
    assert saved_config(str(workdir), "best").train.num_steps == 203


def test_a_workdir_of_a_newer_version_gets_one_line(workdir):
    edit_config(workdir, lambda values: values["train"].update(newer=1))
    done = run(workdir, "--mode=sample")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"ig_jax: the config of {workdir} has a field config.train.newer")
