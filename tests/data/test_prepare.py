import errno
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ig_jax.data import images, latents, prepare, shards
from ig_jax.errors import InputError
from ig_jax.storage import lock
from tests.data.common import OPTIONS, SIZE, add_irregular, encode, encoded, make_tree, photo, strew


def run(root, path, encode=encode, **options):
    return prepare.prepare(images.ImageFolder(root), str(path), encode, **(OPTIONS | options))


def content(path):
    """Every file under a directory."""
    return {p.name: p.read_bytes() for p in pathlib.Path(path).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = make_tree(tmp_path_factory.mktemp("images") / "tree")
    return root, add_irregular(root)


@pytest.fixture(scope="module")
def undisturbed(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "whole"
    line = run(tree[0], path, twins=True)
    assert line.startswith("23 images of 3 classes as latents of shape (4, 4, 4) in 6 shards")
    converted = "4 converted, 1 of them transparent and put on white"
    assert f"3 skipped, {converted}, 1 enlarged: listed in index.json" in line
    return path


def test_records_are_what_the_encoder_gave(tree, undisturbed):
    index = shards.read_index(str(undisturbed))
    source = shards.ShardSource(str(undisturbed), index, index["shards"])
    folder = images.ImageFolder(tree[0])
    kept = [i for i in range(len(folder)) if folder.name(i) not in tree[1]["skipped"]]
    assert len(source) == len(kept) == index["num_examples"]
    for position, i in enumerate(kept):
        data, label = folder[i]
        x = images.decode(data, SIZE).pixels[None].astype(np.float32) / 127.5 - 1
        expected = [*encode(x), *encode(x[:, :, ::-1])]
        example = source[position]
        assert example["label"] == label == index["labels"][position]
        for name, value in zip(("mean", "std", "mean_flip", "std_flip"), expected, strict=True):
            np.testing.assert_allclose(example[name], value[0], rtol=1e-6, atol=1e-6)


def test_index_lists_what_was_irregular(tree, undisturbed):
    index = shards.read_index(str(undisturbed))
    assert [name for name, _ in index["skipped"]] == tree[1]["skipped"]
    assert all(reason for _, reason in index["skipped"])
    assert [name for name, _ in index["converted"]] == tree[1]["converted"]
    assert index["enlarged"] == tree[1]["enlarged"]
    assert index["class_names"] == ["china", "flower", "odd"]
    assert (index["autoencoder"], index["fingerprint"], index["image_size"]) == (
        "pooling",
        "abc",
        16,
    )


def test_statistics_are_those_of_samples(undisturbed):
    index = shards.read_index(str(undisturbed))
    source = shards.ShardSource(str(undisturbed), index, index["shards"])
    rng = np.random.default_rng(0)
    examples = [source[i] for i in range(len(source))]
    samples = np.stack(
        [e["mean"] + e["std"] * rng.standard_normal((400, 4, 4, 4)) for e in examples]
    )
    np.testing.assert_allclose(index["statistics"]["mean"], samples.mean((0, 1, 2, 3)), atol=0.01)
    np.testing.assert_allclose(index["statistics"]["std"], samples.std((0, 1, 2, 3)), rtol=0.01)


def test_processes_make_the_same_files(tree, undisturbed, tmp_path):
    lines = [
        run(tree[0], tmp_path, twins=True, process_index=p, process_count=3) for p in (2, 0, 1)
    ]
    assert "2 of 6 shards" in lines[0] and "4 of 6" in lines[1] and "23 images" in lines[2]
    assert content(tmp_path) == content(undisturbed)


KILLER = """
import os, random, signal, sys, time
import numpy as np
from ig_jax.data import images, prepare, shards
from tests.data.common import OPTIONS, encode

root, path, log = sys.argv[1:]

def work(die_at):
    '''Prepares, and dies without any clean-up at the n-th operation.'''
    count = 0
    def counted(function, name):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == die_at:
                os._exit(9)
            if name == "encode":
                with open(log, "a") as file:
                    file.write(str(len(arguments[0])) + chr(10))
                time.sleep(0.002)
            return function(*arguments, **options)
        return call
    for module, name in ((os, "replace"), (os, "fsync"), (os, "makedirs")):
        setattr(module, name, counted(getattr(module, name), name))
    shards.encode_record = counted(shards.encode_record, "record")
    folder = images.ImageFolder(root)
    prepare.prepare(folder, path, counted(encode, "encode"), twins=True, **OPTIONS)
    os._exit(0)

rng, deaths = random.Random(0), 0
for trial in range(200):
    child = os.fork()
    if child == 0:
        work(rng.randint(1, 30) if trial % 2 else 0)
    if trial % 2 == 0 and trial < 60:  # at any moment, not only between operations
        time.sleep(rng.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    deaths += 1
print(deaths)
"""


def test_killed_at_random_and_restarted_gives_the_same_bytes(tree, undisturbed, tmp_path):
    log = tmp_path / "encoded"
    log.touch()
    command = [sys.executable, "-c", KILLER, tree[0], str(tmp_path / "out"), str(log)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    deaths = int(done.stdout)
    assert deaths >= 5
    assert content(tmp_path / "out") == content(undisturbed)
    # Each death costs at most the shard in flight: 2 batches, of pictures and of twins.
    encoded = len(log.read_text().splitlines())
    assert 20 <= encoded <= 20 + 4 * deaths


def test_finished_shards_are_never_encoded_again(tree, undisturbed, tmp_path):
    calls = []

    def dies(x):
        calls.append(len(x))
        if len(calls) == 10:
            raise KeyboardInterrupt
        return encode(x)

    with pytest.raises(KeyboardInterrupt):
        run(tree[0], tmp_path, dies, twins=True)
    assert sorted(p.name for p in tmp_path.iterdir() if "latents" in p.name) == [
        f"latents-{i:05d}-of-00006.{kind}" for i in (0, 1) for kind in ("arrayrecord", "json")
    ]
    before = [(p, p.stat().st_mtime_ns) for p in tmp_path.glob("latents-*")]
    with pytest.raises(InputError, match="found 2 of 6 shards.*the same --mode=prepare command"):
        latents.open_latents(str(tmp_path))
    calls = [0] * 100
    run(tree[0], tmp_path, dies, twins=True)
    assert [(p, p.stat().st_mtime_ns) for p, _ in before] == before
    assert len(calls) - 100 == 12
    assert content(tmp_path) == content(undisturbed)
    run(tree[0], tmp_path, None, twins=True)  # all is done: the encoder is not called


def test_damaged_shards_are_named_and_redone_alone(tree, undisturbed, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(undisturbed, path)
    assert shards.verify(str(path)) == {}
    cut, altered, gone = (path / shards.shard_name(i, 6) for i in (1, 2, 4))
    cut.write_bytes(cut.read_bytes()[:-1000])
    data = bytearray(altered.read_bytes())
    data[len(data) // 2] ^= 1
    altered.write_bytes(data)
    gone.unlink()
    problems = shards.verify(str(path))
    assert list(problems) == [cut.name, altered.name, gone.name]
    assert "truncated" in problems[cut.name] and "checksum" in problems[altered.name]
    with pytest.raises(
        InputError, match=r"00001-of-00006.arrayrecord: truncated.*and 1 more.*other 4"
    ):
        latents.open_latents(str(path))
    rest = latents.open_latents(str(path), skip_damaged=True)
    index = shards.read_index(str(path))
    lost = sum(index["shards"][i]["examples"] for i in (1, 4))
    assert len(rest.train) == 23 - lost
    assert rest.train[0]["label"] == index["labels"][0]
    altered.unlink()
    calls = []
    run(tree[0], path, lambda x: calls.append(1) or encode(x), twins=True)
    assert len(calls) <= 12
    assert content(path) == content(undisturbed)


def test_a_full_disk_is_one_line_and_keeps_finished_shards(
    tree, undisturbed, tmp_path, monkeypatch
):
    run(tree[0], tmp_path, twins=True, process_index=0, process_count=2)
    before = content(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(InputError, match=r"File too large, .* 3 of 6 finished .* others need"):
            run(tree[0], tmp_path, twins=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert content(tmp_path) == before

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(InputError, match="No space left on device"):
            run(tree[0], tmp_path, twins=True)
    run(tree[0], tmp_path, twins=True)
    assert content(tmp_path) == content(undisturbed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(fingerprint="def"), "fingerprint is abc, expected def"),
        (dict(autoencoder="sd-vae-ft-ema"), "autoencoder is pooling, expected sd-vae-ft-ema"),
        (dict(image_size=32), "image_size is 16, expected 32"),
        (dict(twins=False), "twins is True, expected False"),
        (dict(examples_per_shard=7), "examples_per_shard is 5, expected 7"),
    ],
)
def test_another_preparation_is_refused(tree, undisturbed, change, message):
    before = content(undisturbed)
    with pytest.raises(InputError, match=f"of another preparation, {message}"):
        run(tree[0], undisturbed, None, **(dict(twins=True) | change))
    assert content(undisturbed) == before


def test_other_images_are_another_preparation(tree, undisturbed, tmp_path):
    root = make_tree(tmp_path / "tree")
    with pytest.raises(InputError, match="images is .*'count': 26.*, expected .*'count': 18"):
        run(root, undisturbed, None, twins=True)


def test_hidden_files_do_not_make_a_directory_anothers(tmp_path):
    root, path = make_tree(tmp_path / "tree", per_class=1), tmp_path / "latents"
    path.mkdir()
    strew(path)
    assert "2 images of 2 classes" in run(root, path)


def test_a_folder_without_classes_gives_unlabelled_latents(tree, tmp_path):
    flat = tmp_path / "flat"
    shutil.copytree(pathlib.Path(tree[0]) / "china", flat)
    assert "9 images of 0 classes" in run(str(flat), tmp_path / "latents")
    source = latents.open_latents(str(tmp_path / "latents"), num_validation=2)
    assert (source.num_classes, source.class_names) == (0, ())
    assert [int(source.train[i]["label"]) for i in range(7)] == [0] * 7


ANY_NAME = """
import sys
from ig_jax.data import images, prepare
from tests.data.common import OPTIONS, encode

print(sys.getfilesystemencoding())
prepare.prepare(images.ImageFolder(sys.argv[1]), sys.argv[2], encode, **OPTIONS)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="file systems that take UTF-8 only")
@pytest.mark.parametrize("locale", [{"PYTHONUTF8": "1"}, {"PYTHONUTF8": "0", "LC_ALL": "C"}])
def test_any_name_in_any_locale_gives_the_same_index(tmp_path, locale):
    root = os.fsencode(tmp_path / "tree")
    for name in ("café".encode(), b"caf\xe9", b"strange\n"):
        os.makedirs(root + b"/" + name)
        with open(root + b"/" + name + b"/\xff.png", "wb") as file:
            file.write(encoded(photo().resize((SIZE, SIZE)).convert("L")))
    command = [sys.executable, "-c", ANY_NAME, root, str(tmp_path / "out")]
    environment = os.environ | {"PYTHONCOERCECLOCALE": "0"} | locale
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"utf-8" if locale["PYTHONUTF8"] == "1" else b"ascii")
    index = shards.read_index(str(tmp_path / "out"))
    assert index["class_names"] == ["café", r"caf\udce9", r"strange\n"]
    assert index["converted"][1] == [r"caf\udce9/\udcff.png", "L"]


def test_what_is_no_picture_is_not_encoded(tree, tmp_path):
    shutil.copytree(tree[0], tmp_path / "tree")
    strew(tmp_path / "tree")
    strew(tmp_path / "tree" / "china")
    assert "23 images of 3 classes" in run(str(tmp_path / "tree"), tmp_path / "out")
    index = shards.read_index(str(tmp_path / "out"))
    assert (index["images"]["count"], len(index["skipped"])) == (26, 3)


def test_bad_input(tree, tmp_path):
    with pytest.raises(InputError, match="output is not finite"):
        run(tree[0], tmp_path / "nan", lambda x: (np.full((len(x), 4, 4, 4), np.nan),) * 2)
    broken = tmp_path / "images" / "a"
    broken.mkdir(parents=True)
    (broken / "0.jpg").write_bytes(b"?")
    with pytest.raises(InputError, match="not one of the 1 images can be read.*a/0.jpg: not an im"):
        run(str(tmp_path / "images"), tmp_path / "none")


def test_a_second_run_in_a_folder_is_refused_by_name_and_age(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENT_S", 0.2)
    message = f"is in use by process {os.getpid()} on .* .for 0 s, last sign of life 0 s ago"
    with lock.hold(tmp_path), pytest.raises(InputError, match=message):
        run(tree[0], tmp_path)
    assert not list(tmp_path.iterdir())
    # A killed one is none, nor does its lock make the folder somebody else's.
    (tmp_path / lock.FILE).write_text("{}")
    run(tree[0], tmp_path)
    assert not (tmp_path / lock.FILE).exists()


def test_verify_from_the_command_line(undisturbed, tmp_path, capsys):
    assert shards.main(["", str(undisturbed)]) == 0
    assert "all shards are as they were" in capsys.readouterr().out
    assert shards.main(["", str(tmp_path)]) == 2
    path = tmp_path / "copy"
    shutil.copytree(undisturbed, path)
    (path / shards.marker_name(3, 6)).unlink()
    assert shards.main(["", str(path)]) == 1
    assert "latents-00003-of-00006.arrayrecord: not complete" in capsys.readouterr().out


def test_the_index_is_plain_json(undisturbed):
    index = json.loads((undisturbed / "index.json").read_text())
    assert index["format"] == "ig_jax latents 1"
    assert [entry["examples"] for entry in index["shards"]] == [5, 5, 5, 4, 3, 1]
