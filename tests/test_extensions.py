"""A person's own files: what `--config=FILE` may be, and which `--import` a workdir remembers."""

import pathlib
import subprocess
import sys

import pytest

from ig_jax import config as config_lib
from ig_jax import extensions, main, tables
from ig_jax.diffusion.guidance import RULES
from ig_jax.errors import InputError
from tests.common import tiny_config

GOOD = "from tests.common import tiny_config\n\ndef get_config({}):\n    return {}\n"


def test_a_config_file_and_its_argument(tmp_path):
    (tmp_path / "plain.py").write_text(GOOD.format("", "tiny_config()"))
    assert extensions.read_config(str(tmp_path / "plain.py")).model.width == 32
    (tmp_path / "steps.py").write_text(GOOD.format("n", "tiny_config(num_steps=int(n))"))
    assert extensions.read_config(f"{tmp_path}/steps.py:7").train.num_steps == 7


RULE = """
import dataclasses
from ig_jax.diffusion.guidance import RULES

@dataclasses.dataclass(frozen=True)
class Mine:
    half: float = 0.5

    def __call__(self, weak, strong, scale):
        return strong

RULES["mine"] = Mine
"""


@pytest.fixture
def no_rows_are_left(monkeypatch):
    before = dict(RULES)
    monkeypatch.setattr(tables, "IMPORTED", [])
    yield
    RULES.clear()
    RULES.update(before)


def test_a_saved_config_says_which_import_is_missing(no_rows_are_left, tmp_path):
    config = tiny_config()
    config.guidance.ig_rule = "mine(half=0.25)"
    config.imports = ("/elsewhere/mine.py",)
    saved = config_lib.from_json(config_lib.to_json(config))
    assert saved.imports == ("/elsewhere/mine.py",)
    expected = "config.guidance.ig_rule is 'mine.*--import=/elsewhere/mine.py"
    with pytest.raises(InputError, match=expected):
        config_lib.validate(saved)
    # Known when the config is checked, not when the package was imported.
    (tmp_path / "mine.py").write_text(RULE)
    saved.imports = extensions.load([str(tmp_path / "mine.py")])
    config_lib.validate(saved)
    # What was imported is not missing, whatever else is wrong.
    saved.guidance.ig_rule = "mien"
    with pytest.raises(InputError, match="did you mean mine") as caught:
        config_lib.validate(saved)
    assert "--import" not in str(caught.value)
    other = config_lib.to_json(config) | {"imports": ["net.py"]}
    other["model"]["family"] = "mine"
    with pytest.raises(InputError, match="unknown model 'mine'.*made with --import=net.py"):
        config_lib.from_json(other)


def test_a_run_remembers_what_it_imported(tmp_path):
    """In the config that modes are handed, and so in every checkpoint."""
    (tmp_path / "mine.py").write_text(RULE)
    (tmp_path / "my.py").write_text("from tests.common import tiny_config as get_config\n")
    show = (
        "import sys; from ig_jax import main\n"
        "main.MODES['train'] = ('', lambda config, workdir: repr(config.imports))\n"
        "sys.exit(main.main(sys.argv))"
    )
    flags = [
        f"--config={tmp_path}/my.py",
        f"--workdir={tmp_path}/w",
        f"--import={tmp_path}/mine.py",
    ]
    done = subprocess.run(
        [sys.executable, "-c", show, *flags, "--config.guidance.ig_rule=mine"],
        cwd=pathlib.Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [repr((f"{tmp_path}/mine.py",))], done.stderr


class TestHelp:
    def printed(self, capsys, *arguments):
        assert main.main(["ig_jax", *arguments]) == 0
        return capsys.readouterr().out

    def test_a_section(self, capsys):
        for section, fields in tiny_config().items():
            text = (
                self.printed(capsys, f"--help=config.{section}") if hasattr(fields, "keys") else ""
            )
            for name in fields if text else ():
                assert f"  --config.{section}.{name}=" in text
        text = self.printed(capsys, "--help=config.train")
        assert "--config.train.batch_size=256\n" in text
        assert "an integer, 1…1048576; stays when a run is resumed" in text
        assert "--config.data.name" not in text

    def test_names_of_tables_in_the_rooms_above(self, capsys):
        known = {"data": "data set", "evaluation": "feature extractor", "sweep": "metric"}
        for section, kind in known.items():
            text = self.printed(capsys, f"--help=config.{section}")
            assert f"{', '.join(extensions.table(kind))}; " in text

    def test_the_whole_config(self, capsys):
        text = self.printed(capsys, "--help=config")
        for section in tiny_config():
            assert f"--help=config.{section}" in text or f"--config.{section}=" in text

    def test_rows_of_ones_own(self, capsys, no_rows_are_left, tmp_path):
        (tmp_path / "mine.py").write_text(RULE)
        text = self.printed(capsys, f"--import={tmp_path}/mine.py", "--help=config.guidance")
        assert "projected(eta=0.0, norm=0.0)" in text and "mine(half=0.5)" in text


def test_every_field_says_what_it_means():
    for path, field in config_lib.FIELDS.items():
        assert len(field.help) > 5, path
        assert field.resume in ("fixed", "free")
        field.check(path, field.default)
        with pytest.raises(InputError, match=f"^{path} is "):
            field.check(path, object())
