#!/usr/bin/env bash
# Submits ig_jax to a Slurm cluster: one process for each GPU, which JAX joins by itself.
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: launch/slurm.sh --nodes=N --gpus-per-node=G [OPTIONS] -- ARGUMENTS OF ig_jax.main

  --nodes N              how many nodes
  --gpus-per-node G      how many GPUs of each; also the number of processes on it
  --cpus-per-gpu C       CPU cores for each process (default: the cluster's)
  --partition P, --account A, --time T, --job-name NAME (default ig_jax)
  --log-dir DIR          where NAME-JOBID.log goes (default: here)
  --python PATH          default: python, as found when the job is submitted
  --sbatch-flag FLAG     any other flag of sbatch, as in --qos=high; may be repeated
  --dry-run              print the sbatch command, submit nothing

One process drives one GPU: JAX reads SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID, and process i
of a node takes GPU i of those that the node's job sees, so tasks must not be bound to GPUs. A
preempted job or one that lost a node is put back in the queue and continues from its last
checkpoint; if one process dies, all end. Two minutes before its time limit training saves a
checkpoint, stops with exit code 75, and is put back in the queue as well (ten minutes with
--sbatch-flag=--signal=TERM@600). The workdir must be a file system that all nodes share.

One machine needs none of this: `python -m ig_jax.main ARGUMENTS` uses all of its GPUs in one
process (CUDA_VISIBLE_DEVICES restricts them). Nor do nodes without Slurm: give each process
IG_JAX_COORDINATOR=HOST:PORT (of process 0), IG_JAX_PROCESS_ID and IG_JAX_NUM_PROCESSES.

  launch/slurm.sh --nodes=4 --gpus-per-node=8 --partition=gpu --time=2-00:00:00 -- --mode=train \
    --config=configs/sit_xl_ig.py --workdir=/shared/sit-xl
USAGE
}

fail() {
  printf 'launch/slurm.sh: %s\n' "$1" >&2
  exit 2
}

quote() { # prints words so that a shell reads them back
  local word separator=''
  for word; do
    if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then word="'${word//\'/\'\\\'\'}'"; fi
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
}

need_number() {
  [[ -n $2 ]] || fail "$1 is missing"
  [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || fail "$1=$2: expected a whole number, at least 1"
}

# In the job's own shell, after srun. Training that was stopped (ig_jax/errors.py) goes on later;
# `scancel` ends that shell too, so a cancelled job stays cancelled.
readonly run_stopped=75
# shellcheck disable=SC2016
readonly again='code=$?; [ $code != '$run_stopped' ] || scontrol requeue "$SLURM_JOB_ID"; exit $code'

main() {
  local nodes='' gpus='' cpus='' partition='' account='' limit='' job=ig_jax log_dir=.
  local python=python dry_run='' option value
  local flags=() arguments=() step=()
  while (($#)); do
    case $1 in
      -h | --help) usage && return 0 ;;
      --) shift && arguments=("$@") && break ;;
      --dry-run) dry_run=1 && shift && continue ;;
      --*=*) option=${1%%=*} value=${1#*=} && shift ;;
      --*)
        option=$1
        (($# > 1)) || fail "$option needs a value"
        value=$2 && shift 2
        ;;
      *) fail "unexpected argument '$1' (arguments of ig_jax.main go after --)" ;;
    esac
    case $option in
      --nodes) nodes=$value ;;
      --gpus-per-node) gpus=$value ;;
      --cpus-per-gpu) cpus=$value ;;
      --partition) partition=$value ;;
      --account) account=$value ;;
      --time) limit=$value ;;
      --job-name) job=$value ;;
      # In --log-dir=~/logs the shell leaves the tilde alone.
      --log-dir) log_dir=${value/#"~/"/"$HOME/"} ;;
      --python) python=${value/#"~/"/"$HOME/"} ;;
      --sbatch-flag) flags+=("$value") ;;
      *) fail "unknown option $option (--help lists them)" ;;
    esac
  done
  need_number --nodes "$nodes"
  need_number --gpus-per-node "$gpus"
  [[ -z $cpus ]] || need_number --cpus-per-gpu "$cpus"
  [[ $job =~ ^[A-Za-z0-9_.-]+$ ]] || fail "--job-name=$job: expected letters, digits, _ . -"
  ((${#arguments[@]})) || fail "nothing to run: give the arguments of ig_jax.main after --"

  # srun has not inherited --cpus-per-task from sbatch since Slurm 22.05.
  [[ -z $cpus ]] || step=("--cpus-per-task=$cpus")
  # A lost process is noticed by the others, which end with codes of their own. srun must not kill
  # what is still leaving after training stopped, or its code would hide theirs.
  step=(srun --kill-on-bad-exit=0 --wait=60 --gpu-bind=none "${step[@]}" "$python" -u -m ig_jax.main)
  local batch=(
    sbatch "--job-name=$job" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus"
    --requeue --signal=TERM@120 --open-mode=append "--output=$log_dir/%x-%j.log"
  )
  [[ -z $cpus ]] || batch+=("--cpus-per-task=$cpus")
  [[ -z $partition ]] || batch+=("--partition=$partition")
  [[ -z $account ]] || batch+=("--account=$account")
  [[ -z $limit ]] || batch+=("--time=$limit")
  batch+=("${flags[@]}" "--wrap=$(quote "${step[@]}" "${arguments[@]}"); $again")

  if [[ -n $dry_run ]]; then
    printf '%s\n' "$(quote "${batch[@]}")"
    return 0
  fi
  command -v sbatch >/dev/null || fail "sbatch is not on the PATH; is this a login node? (--dry-run)"
  mkdir -p "$log_dir"
  printf '+ %s\n' "$(quote "${batch[@]}")" >&2
  "${batch[@]}"
}

main "$@"
