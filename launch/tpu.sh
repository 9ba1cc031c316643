#!/usr/bin/env bash
# Runs ig_jax on Cloud TPU VMs, from one host to several slices, with nothing but gcloud.
#
# shellcheck disable=SC2016  # What stands in single quotes here is for the workers' shells.
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: launch/tpu.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- ARGUMENTS OF ig_jax.main]

  create    make a TPU VM now              (--accelerator-type, --spot, --reserved)
  queue     ask for one or more slices and wait in line for them
                                           (the same, and --slices)
  wait      return when the TPU is ready
  install   put this checkout and the same versions of everything on every worker,
            print the versions, fail if two workers differ    (--source, --as-of)
  start     run `python -m ig_jax.main ARGUMENTS` on every worker, detached     (--env)
  logs      follow the log of one worker   (--worker, --slice)
  status    state of the TPU, and of the run on every worker
  resume    bring the run back, whatever happened to it: recreate a preempted TPU, wait for
            it, install, start the same command again. Exits 0 if the run is going on
            (started again if it had stopped and saved a checkpoint), 3 if it has finished, 4 if
            it had failed by itself and was started again, 5 if it had ended for a reason that
            starting again does not mend (bad input, numbers that are not finite)
  watch     resume, again and again, until the run has finished  (--poll-seconds, --max-restarts)
  stop      end the run on every worker (TERM, after 30 s KILL)
  delete    delete the TPU and everything on its disks

  create, queue, install and start remember their options for the later commands in
  ${IG_JAX_LAUNCH_DIR:-~/.ig_jax/launch}/ZONE.NAME; options given again win. On a machine without
  that record, say --kind=direct (create) or --kind=queued (queue), and what else is needed.

Options (--option=value or --option value)
  --name NAME               of the TPU VM or queued resource (slices are NAME-0, NAME-1, …)
  --zone ZONE               as in us-west4-a
  --project PROJECT         default: gcloud's own
  --accelerator-type TYPE   as in v5litepod-16 (v5e, 16 chips), v6e-256, v5p-128, v4-64
  --runtime-version NAME    default: the one for JAX on that accelerator type
  --slices N                that many slices of that type, joined over the data-centre network
  --spot                    cheap, and may be taken away at any time (see resume, watch)
  --reserved                from your reservation
  --source WHAT             checkout (default: this one, edits included), or git+URL@REF
  --as-of TIME              only package versions published by then (RFC 3339, default: now); it is
                            remembered, so a resumed run gets the versions it began with
  --env NAME=VALUE          for the run; may be repeated
  --worker N, --slice N     which log to follow (default 0, 0)
  --poll-seconds N          how often wait and watch look (default 60)
  --max-restarts N          of a run that fails by itself, in watch (default 3)
  --create-flag FLAG        for gcloud's create, as in --network=…; may be repeated
  --connect-flag FLAG       for gcloud's ssh and scp, as in --internal-ip; may be repeated
  --dry-run                 print the commands, one a line, and run nothing (resume: as if preempted);
                            later dry runs go on from there

The workdir should be on gs://: a preempted TPU loses its disks, and all workers write checkpoints.
gcloud reaches several workers only with your key in the agent: ssh-add ~/.ssh/google_compute_engine

  launch/tpu.sh queue   --name=ig --zone=us-west4-a --accelerator-type=v5litepod-256 --spot
  launch/tpu.sh wait    --name=ig --zone=us-west4-a
  launch/tpu.sh install --name=ig --zone=us-west4-a
  launch/tpu.sh start   --name=ig --zone=us-west4-a -- --mode=train \
    --config=configs/sit_xl_ig.py --workdir=gs://my-bucket/sit-xl
  launch/tpu.sh watch   --name=ig --zone=us-west4-a
USAGE
}

fail() {
  printf 'launch/tpu.sh: %s\n' "$1" >&2
  exit "${2:-2}"
}

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  fail "needs bash 4.4 or newer, this is $BASH_VERSION (macOS: brew install bash)"
fi

readonly commands="create queue wait install start logs status resume watch stop delete"
readonly python_version=3.11
readonly exit_finished=3 exit_restarted=4 exit_hopeless=5
# Exit codes of ig_jax.main (ig_jax/errors.py): bad input, not finite, stopped with a checkpoint.
readonly run_bad_input=2 run_not_finite=3 run_stopped=75
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Options.

name='' zone='' project='' kind='' accelerator_type='' runtime_version='' slices=1
tier='' source=checkout as_of='' worker=0 slice=0 poll_seconds=60 max_restarts=3 dry_run=''
environment=() create_flags=() connect_flags=() arguments=()

declare -A given
append() { # append ARRAY VALUE; a new command line replaces what was remembered
  local -n list=$1
  [[ -n ${given[$1]:-} ]] || list=()
  given[$1]=1
  list+=("$2")
}

parse() {
  local option value
  given=()
  while (($#)); do
    case $1 in
      --) shift && arguments=("$@") && return ;;
      --spot | --reserved)
        [[ -z ${given[tier]:-} || $tier == "${1#--}" ]] || fail "--spot and --reserved exclude each other"
        tier=${1#--} given[tier]=1
        shift && continue
        ;;
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
      --name) name=$value ;;
      --zone) zone=$value ;;
      --project) project=$value ;;
      --kind) kind=$value ;;
      --accelerator-type) accelerator_type=$value ;;
      --runtime-version) runtime_version=$value ;;
      --slices) slices=$value ;;
      --source) source=$value ;;
      --as-of) as_of=$value ;;
      --worker) worker=$value ;;
      --slice) slice=$value ;;
      --poll-seconds) poll_seconds=$value ;;
      --max-restarts) max_restarts=$value ;;
      --env) append environment "$value" ;;
      --create-flag) append create_flags "$value" ;;
      --connect-flag) append connect_flags "$value" ;;
      *) fail "unknown option $option (--help lists them)" ;;
    esac
  done
}

record_file() { # a dry run sees what real ones remember; where there is none, dry runs have their own
  local folder=${IG_JAX_LAUNCH_DIR:-$HOME/.ig_jax/launch}
  [[ -z $dry_run || -e $folder/$zone.$name ]] || folder+=/dry-run
  printf '%s/%s.%s' "$folder" "$zone" "$name"
}

remember() { # the record is a command line, one word after the other, NUL-terminated
  [[ -z $dry_run || $(record_file) == */dry-run/* ]] || return 0
  local file words=("--kind=$kind" "--slices=$slices" "--source=$source") word
  for word in project accelerator_type runtime_version as_of; do
    [[ -z ${!word} ]] || words+=("--${word//_/-}=${!word}")
  done
  [[ -z $tier ]] || words+=("--$tier")
  for word in "${environment[@]}"; do words+=("--env=$word"); done
  for word in "${create_flags[@]}"; do words+=("--create-flag=$word"); done
  for word in "${connect_flags[@]}"; do words+=("--connect-flag=$word"); done
  file=$(record_file)
  mkdir -p "$(dirname "$file")"
  umask 077 # --env may hold keys
  printf '%s\0' "${words[@]}" -- "${arguments[@]}" >"$file"
}

recall() {
  local words=()
  [[ -e $(record_file) ]] || return 0
  mapfile -d '' words <"$(record_file)"
  parse "${words[@]}"
}

need_number() { # need_number OPTION VALUE LEAST
  if [[ ! $2 =~ ^[0-9]{1,6}$ ]] || ((10#$2 < $3)); then
    fail "$1=$2: expected a whole number, at least $3"
  fi
}

check() {
  [[ -n $name ]] || fail "--name is missing"
  [[ -n $zone ]] || fail "--zone is missing, as in --zone=us-west4-a"
  [[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
    fail "--name=$name: expected lower-case letters, digits and -, starting with a letter"
  [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "--zone=$zone: expected a zone, as in us-west4-a"
  need_number --slices "$slices" 1
  need_number --worker "$worker" 0
  need_number --slice "$slice" 0
  need_number --poll-seconds "$poll_seconds" 1
  need_number --max-restarts "$max_restarts" 0
  [[ -z $kind || $kind == direct || $kind == queued ]] || fail "--kind=$kind: expected direct or queued"
  [[ $source == checkout || $source == git+*://* ]] ||
    fail "--source=$source: expected checkout or git+URL@REF"
  [[ -z $as_of || $as_of =~ ^[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9:]+Z)?$ ]] ||
    fail "--as-of=$as_of: expected a time, as in 2026-01-31T12:00:00Z"
  local pair
  for pair in "${environment[@]}"; do
    [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env=$pair: expected NAME=VALUE"
  done
}

check_accelerator() {
  local known='v5litepod-16 (v5e), v5litepod-256, v6e-8, v6e-256, v5p-128, v4-64'
  [[ -n $accelerator_type ]] || fail "--accelerator-type is missing; some are $known"
  local family=${accelerator_type%-*} size=${accelerator_type##*-} sizes runtime
  case $family in
    v2) sizes='8 32 128 256 512' runtime=tpu-ubuntu2204-base ;;
    v3) sizes='8 32 64 128 256 512 1024 2048' runtime=tpu-ubuntu2204-base ;;
    v4) sizes='multiples of 8' runtime=tpu-ubuntu2204-base ;;
    v5p) sizes='multiples of 8' runtime=v2-alpha-tpuv5 ;;
    v5litepod) sizes='1 4 8 16 32 64 128 256' runtime=v2-alpha-tpuv5-lite ;;
    v6e) sizes='1 4 8 16 32 64 128 256' runtime=v2-alpha-tpuv6e ;;
    *) fail "--accelerator-type=$accelerator_type is unknown; some are $known" ;;
  esac
  if [[ $sizes == multiples* ]]; then
    [[ $size =~ ^[1-9][0-9]{0,4}$ ]] && ((size % 8 == 0))
  else
    [[ " $sizes " == *" $size "* ]]
  fi || fail "--accelerator-type=$accelerator_type: sizes of $family are $sizes"
  runtime_version=${runtime_version:-$runtime}
}

# Running commands, or printing them.

quote() { # prints words so that a shell reads them back
  local word separator=''
  for word; do
    if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then word="'${word//\'/\'\\\'\'}'"; fi
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
}

run() {
  if [[ -n $dry_run ]]; then
    printf '%s\n' "$(quote "$@")" >&3
  else
    printf '+ %s\n' "$(quote "$@")" >&2
    "$@"
  fi
}

tpus() { # tpus VERB [FLAGS]: the gcloud command for this TPU, whichever way it was made
  local verb=$1 group=tpu-vm where=("--zone=$zone")
  shift
  [[ -z $project ]] || where+=("--project=$project")
  [[ $kind == direct ]] || group=queued-resources
  if [[ $verb == scp ]]; then
    run gcloud compute tpus "$group" scp "$1" "$name:" "${where[@]}" "${@:2}"
  else
    run gcloud compute tpus "$group" "$verb" "$name" "${where[@]}" "$@"
  fi
}

all_workers=()
everywhere() { tpus ssh "${all_workers[@]}" "--command=$1" "${connect_flags[@]}"; }

# What is run on the workers. Each is one line, so that a dry run is one line as well.

readonly home='$HOME/.ig_jax' tree='$HOME/ig_jax'
readonly is_running="[ -e $home/pid ] && kill -0 -- -\$(cat $home/pid) 2>/dev/null"

remote_install() { # remote_install ARCHIVE
  local uv="$home/tools/bin/uv" url ref
  printf 'set -e; mkdir -p %s; rm -rf %s; ' "$home" "$tree"
  if [[ $source == checkout ]]; then
    printf 'mkdir %s; tar -xzf $HOME/%s -C %s; ' "$tree" "$1" "$tree"
  else
    url=${source#git+} ref=''
    # An @ before the last / belongs to the address, as in git+ssh://git@host/….
    if [[ ${url##*/} == *@* ]]; then ref=${url##*@} url=${url%@*}; fi
    printf 'git clone --quiet %s %s; ' "$(quote "$url")" "$tree"
    [[ -z $ref ]] || printf 'git -C %s checkout --quiet %s; ' "$tree" "$(quote "$ref")"
  fi
  printf 'python3 -m pip install --quiet --upgrade --target %s/tools uv; ' "$home"
  printf '%s venv --quiet --clear --python %s %s/env; ' "$uv" "$python_version" "$home"
  printf '%s pip install --quiet --python %s/env/bin/python --exclude-newer %s -e "%s[tpu]"' \
    "$uv" "$home" "$as_of" "$tree"
}

remote_versions() { # one line: a digest of all package versions and of the code, then some by name
  local freeze="$home/tools/bin/uv pip freeze --quiet --python $home/env/bin/python"
  printf 'cd %s && all=$(%s) && code=$(find ig_jax -name "*.py" | LC_ALL=C sort | xargs cat) && ' \
    "$tree" "$freeze"
  printf 'echo "ig_jax-versions $(printf "%%s" "$all" "$code" | sha256sum | cut -c1-12)" '
  printf '$(%s/env/bin/python -V) $(echo "$all" | grep -E "^(jax|jaxlib|libtpu|flax)==") ' "$home"
  printf '"on $(hostname)"'
}

remote_start() {
  local run_it='"$@"; echo $? >$HOME/.ig_jax/exit'
  printf 'cd %s || exit 1; if %s; then echo "$(hostname): a run is going on" >&2; exit 1; fi; ' \
    "$tree" "$is_running"
  printf 'rm -f %s/exit; nohup setsid env %s bash -c %s ig_jax %s/env/bin/python -u -m ig_jax.main %s ' \
    "$home" "$(quote "${environment[@]}")" "$(quote "$run_it")" "$home" "$(quote "${arguments[@]}")"
  printf '>>%s/log 2>&1 </dev/null & echo $! >%s/pid' "$home" "$home"
}

remote_probe() {
  printf 'if %s; then s=running; elif [ -e %s/exit ]; then s=exit:$(cat %s/exit); ' \
    "$is_running" "$home" "$home"
  printf 'elif [ -e %s/env ]; then s=idle; else s=fresh; fi; ' "$home"
  printf 'echo "ig_jax-run $s $(hostname): $(tail -n 1 %s/log 2>/dev/null)"' "$home"
}

remote_stop() {
  printf 'if %s; then p=$(cat %s/pid); kill -TERM -- -$p; ' "$is_running" "$home"
  printf 'for i in $(seq 150); do sleep 0.2; kill -0 -- -$p 2>/dev/null || exit 0; done; '
  printf 'kill -KILL -- -$p; fi'
}

# The commands.

do_create() {
  check_accelerator
  local flags=("--accelerator-type=$accelerator_type")
  if [[ $kind == direct ]]; then
    ((slices == 1)) || fail "--slices=$slices needs the command queue"
    flags+=("--version=$runtime_version")
  else
    flags+=("--runtime-version=$runtime_version")
    if ((slices > 1)); then
      flags+=("--node-count=$slices" "--node-prefix=$name")
    else
      flags+=("--node-id=$name")
    fi
  fi
  [[ -z $tier ]] || flags+=("--$tier")
  tpus create "${flags[@]}" "${create_flags[@]}"
  remember
}

tpu_state() { # prints the state, MISSING if there is no such TPU
  local format='value(state.state)' messages state
  [[ $kind == queued ]] || format='value(state)'
  messages=$(mktemp)
  if state=$(tpus describe "--format=$format" 2>"$messages"); then
    printf '%s\n' "$state"
  elif grep -q NOT_FOUND "$messages"; then
    echo MISSING
  else
    grep -v '^+ ' "$messages" >&2
    rm -f "$messages"
    return 1
  fi
  rm -f "$messages"
}

do_wait() {
  local state
  while true; do
    state=$(tpu_state)
    [[ -z $dry_run ]] || return 0
    case $state in
      ACTIVE | READY) return 0 ;;
      MISSING | FAILED | SUSPENDED | PREEMPTED | TERMINATED | STOPPED)
        fail "$name is $state; waiting will not help (try: launch/tpu.sh resume)" 1
        ;;
    esac
    printf '%s is %s; looking again in %s s\n' "$name" "$state" "$poll_seconds" >&2
    sleep "$poll_seconds"
  done
}

do_install() {
  local archive="ig_jax-$name.tar.gz" path answers digests
  path="${TMPDIR:-/tmp}/$archive"
  as_of=${as_of:-$(date -u +%Y-%m-%dT%H:%M:%SZ)}
  if [[ $source == checkout ]]; then
    run tar --exclude=__pycache__ -czf "$path" -C "$root" \
      pyproject.toml README.md LICENSE ig_jax configs
    tpus scp "$path" "${all_workers[@]}" "${connect_flags[@]}"
  fi
  everywhere "$(remote_install "$archive")"
  answers=$(everywhere "$(remote_versions)")
  remember
  [[ -z $dry_run ]] || return 0
  answers=$(grep '^ig_jax-versions ' <<<"$answers" | sort) || fail "no worker told its versions" 1
  cut -d' ' -f3- <<<"$answers"
  digests=$(cut -d' ' -f2 <<<"$answers" | sort -u | wc -l)
  ((digests == 1)) || fail "the workers differ: $((digests)) different installations (above)" 1
}

do_start() {
  ((${#arguments[@]})) || fail "nothing to run: give the arguments of ig_jax.main after --"
  local word
  for word in "${arguments[@]}"; do
    if [[ $word == --workdir=* && $word != --workdir=gs://* ]]; then
      printf 'launch/tpu.sh: warning: %s is on the workers; gs:// outlives them and is shared\n' \
        "$word" >&2
    fi
  done
  everywhere "$(remote_start)"
  remember
}

do_logs() {
  local where=("--worker=$worker")
  [[ $kind == direct ]] || where=("--node=$slice" "${where[@]}")
  tpus ssh "${where[@]}" "--command=tail -n 200 -F $home/log" "${connect_flags[@]}"
}

do_status() {
  local state
  state=$(tpu_state)
  [[ -n $dry_run ]] || printf '%s: %s\n' "$name" "$state"
  if [[ -n $dry_run || $state == ACTIVE || $state == READY ]]; then
    everywhere "$(remote_probe)" | sed -n 's/^ig_jax-run //p' | sort
  fi
}

do_stop() { everywhere "$(remote_stop)"; }

do_delete() {
  local flags=(--quiet)
  [[ $kind == direct ]] || flags=(--force --quiet)
  tpus delete "${flags[@]}"
}

do_resume() {
  ((${#arguments[@]})) || fail "nothing to resume: give the arguments of ig_jax.main after --"
  local state probe runs code
  state=$(tpu_state)
  [[ -z $dry_run ]] || state=SUSPENDED
  case $state in
    ACTIVE | READY)
      probe=$(everywhere "$(remote_probe)")
      runs=$(sed -n 's/^ig_jax-run \([^ ]*\).*/\1/p' <<<"$probe" | sort -u | tr '\n' ' ')
      [[ $runs != 'exit:0 ' ]] || exit "$exit_finished"
      # Some workers may end a little before the others.
      [[ ! $runs =~ running || $runs =~ idle|fresh|exit:[1-9] ]] || return 0
      for code in "$run_bad_input" "$run_not_finite"; do
        [[ $runs != *"exit:$code "* ]] ||
          fail "the run on $name ended with exit code $code, which starting it again would not \
mend (try: launch/tpu.sh logs, then start)" "$exit_hopeless"
      done
      do_stop
      [[ $runs != *fresh* ]] || do_install
      do_start
      runs=${runs/"exit:$run_stopped "/}
      [[ ${runs/"exit:0 "/} != *exit:* ]] || exit "$exit_restarted"
      return 0
      ;;
    SUSPENDED | FAILED | PREEMPTED | TERMINATED)
      do_delete
      do_create
      ;;
    MISSING) do_create ;;
    STOPPED) fail "$name is STOPPED; first: gcloud compute tpus tpu-vm start $name --zone=$zone" 1 ;;
    SUSPENDING | DELETING)
      printf '%s is %s; resume again when that is over\n' "$name" "$state" >&2
      return 0
      ;;
  esac
  do_wait
  do_install
  do_start
}

do_watch() { # each look is a process of its own, so that a failed one is tried again
  local status restarts=0
  while true; do
    status=0
    "$BASH" "${BASH_SOURCE[0]}" resume "$@" || status=$?
    [[ -z $dry_run ]] || return "$status"
    case $status in
      0) ;;
      2) exit 2 ;;
      "$exit_hopeless") return 1 ;;
      "$exit_finished") echo "the run on $name has finished" && return 0 ;;
      "$exit_restarted")
        if ((++restarts > max_restarts)); then
          fail "the run on $name has failed $restarts times by itself; see: launch/tpu.sh logs" 1
        fi
        ;;
      *) printf 'launch/tpu.sh: resume failed (exit %s); trying again\n' "$status" >&2 ;;
    esac
    sleep "$poll_seconds"
  done
}

main() {
  case ${1:-} in
    '' | -h | --help | help) usage && exit 0 ;;
  esac
  local command=$1
  shift
  [[ " $commands " == *" $command "* ]] || fail "unknown command '$command'; there are: $commands"
  [[ " $* " != *" --help "* ]] || { usage && exit 0; }
  parse "$@"
  check
  recall
  parse "$@"
  check
  case $command in
    create) kind=direct ;;
    queue) kind=queued ;;
  esac
  [[ -n $kind ]] ||
    fail "nothing is remembered of $name in $zone; say --kind=direct (create) or --kind=queued (queue)"
  all_workers=(--worker=all)
  [[ $kind == direct ]] || all_workers=(--node=all --worker=all)
  if [[ -z $dry_run ]] && ! command -v gcloud >/dev/null; then
    fail "gcloud is not on the PATH; install the Google Cloud CLI, or use --dry-run"
  fi
  exec 3>&1
  case $command in
    create | queue) do_create ;;
    delete)
      do_delete
      [[ -n $dry_run && $(record_file) != */dry-run/* ]] || rm -f "$(record_file)"
      ;;
    watch) do_watch "$@" ;;
    *) "do_$command" ;;
  esac
}

main "$@"
