"""The environment that a program finds: what it can print, which devices JAX is let look for."""

import os
import subprocess
import sys

import pytest

from ig_jax import console


def run(code, **environment):
    """Output bytes of a program in another environment."""
    done = subprocess.run(
        [sys.executable, *code], env=os.environ | environment, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


PRINTS = """
from ig_jax import console
console.forgive_output()
print("Fréchet 0.12 ± 0.01 – 32×32 …")
print("caf\\udce9 \\u4f60")
console.print_table("a – b", ["é", "n"], [["…", "1"], ["caf\\udce9", "2"]])
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_can_be_printed(encoding):
    lines = run(["-c", PRINTS], PYTHONIOENCODING=encoding).splitlines()
    spoken = {
        "ascii": "Frechet 0.12 +- 0.01 - 32x32 ...",
        "latin-1": "Fréchet 0.12 ± 0.01 - 32×32 ...",
    }
    assert lines[0] == spoken.get(encoding, "Fréchet 0.12 ± 0.01 – 32×32 …").encode(encoding)
    # Bytes of a name that is no text arrive as they are.
    assert lines[1] == b"caf\xe9 " + ("你" if encoding == "utf-8" else "?").encode()
    assert len(lines) > 5 and any(b"caf\xe9" in line for line in lines[2:])


@pytest.mark.parametrize("module", ["ig_jax.main", "ig_jax.convert"])
def test_help_on_an_ascii_terminal(module):
    assert b"--workdir" in run(["-m", module, "--help"], PYTHONIOENCODING="ascii")


PLOTS = """
import sys
from ig_jax import pictures
figure = pictures.make_figure(2, 2)
figure.subplots().plot([1, 2], label="…")
pictures.save_figure(sys.argv[1], figure)
print("matplotlib.pyplot" in sys.modules)
"""


@pytest.mark.parametrize("backend", ["nowhere", "module://nowhere.backend", "TkAgg"])
def test_figures_need_no_backend(tmp_path, backend):
    file = tmp_path / "a.png"
    assert run(["-c", PLOTS, str(file)], MPLBACKEND=backend).strip() == b"False"
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "plugins,tpu,platforms",
    [([], False, "cpu"), (["xla_cuda13"], False, None), ([], True, None)],
)
def test_only_a_machine_without_plugins_is_put_on_the_cpu(monkeypatch, plugins, tpu, platforms):
    """Under WSL2 a GPU has no /dev/nvidiactl; that its plugin is installed says enough."""
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda p: not str(p).startswith("/dev/") and exists(p))
    monkeypatch.setattr(console.importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(console, "_may_have_tpu", lambda: tpu)
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    console.quiet_libraries()
    assert os.environ.get("JAX_PLATFORMS") == platforms
