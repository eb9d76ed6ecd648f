# Shared code, sourced by the launch scripts. Not a command.
# shellcheck shell=bash disable=SC2034
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
settings="$here/settings.env"
dry_run=""
any_region=""
declare -A setting=()
arguments=()
where=() # the project and zone flags of gcloud and xpk

fail() { # fail MESSAGE [CODE]
  echo "error: $1" >&2
  exit "${2:-2}"
}

say() { echo "$(date +%H:%M:%S) $*" >&2; }

usage() { # prints the comment at the top of the script
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0" >&2
  exit "${1:-2}"
}

# Parses the flags common to all scripts; leaves the rest in `arguments`.
parse_flags() {
  arguments=()
  while (($#)); do
    case "$1" in
      --settings=*) settings="${1#*=}" ;;
      --dry_run) dry_run=1 ;;
      --any_region) any_region=1 ;;
      --help | -h) usage 0 ;;
      *) arguments+=("$1") ;;
    esac
    shift
  done
  [[ -f "$settings" ]] || fail "$settings does not exist: copy launch/settings.example.env to it and fill it in"
  local line key value
  while IFS= read -r line || [[ -n "$line" ]]; do
    line=${line%%$'\r'}
    [[ "$line" =~ ^[[:space:]]*(#.*)?$ ]] && continue
    [[ "$line" =~ ^([A-Z_]+)=(.*)$ ]] || fail "$settings: not KEY=VALUE: $line"
    key=${BASH_REMATCH[1]}
    value=${BASH_REMATCH[2]%%[[:space:]]#*}
    setting[$key]=${value%"${value##*[![:space:]]}"}
  done <"$settings"
  where=(--project="${setting[PROJECT]:-}" --zone="${setting[ZONE]:-}")
}

need() { # need KEY...: stops if a setting is missing
  local key
  for key in "$@"; do
    [[ -n "${setting[$key]:-}" ]] || fail "$settings: $key is not set"
  done
}

run() { # runs a command, or prints it with --dry_run
  if [[ -n "$dry_run" ]]; then
    local word line=+
    for word in "$@"; do
      if [[ "$word" =~ [^A-Za-z0-9_./:=,@%+-] ]]; then word=${word@Q}; fi
      line+=" $word"
    done
    printf '%s\n' "$line"
    return 0
  fi
  "$@"
}

need_tool() { # need_tool NAME WHERE_FROM
  [[ -n "$dry_run" ]] || command -v "$1" >/dev/null || fail "$1 is not on PATH: $2"
}

# Prints the train command, quoted for a remote shell; "$@" are additional flags.
train_command() {
  local flags
  read -ra flags <<<"${setting[FLAGS]:-}"
  printf 'python -m pixelflow_jax.train'
  printf ' %q' "--config=${setting[CONFIG]}" "--workdir=${setting[WORKDIR]}" "${flags[@]}" "$@"
}

# Prints the same on Google Cloud, with compiled programs kept in the bucket: a machine that replaces a lost
# one has an empty disk, and need not compile again.
cloud_command() {
  printf 'env JAX_COMPILATION_CACHE_DIR=%q %s' "${setting[BUCKET]%/}/compiled" "$(train_command "$@")"
}

# Fails unless every bucket in the settings is in the zone's region (or a multi-region that contains it).
check_region() {
  local region place bucket continent
  region=${setting[ZONE]%-*}
  continent=${region%%-*}
  local all="${setting[BUCKET]} ${setting[WORKDIR]} ${setting[FLAGS]:-}" buckets=()
  mapfile -t buckets < <(grep -oE 'gs://[^/ ]+' <<<"$all" | sort -u)
  for bucket in "${buckets[@]}"; do
    local look=(gcloud storage buckets describe "$bucket" --project="${setting[PROJECT]}")
    if [[ -n "$dry_run" ]]; then
      run "${look[@]}" --format="value(location)"
      continue
    fi
    place=$("${look[@]}" --format="value(location)") ||
      fail "the bucket $bucket cannot be read: run gcloud auth login, or correct its name in $settings" 1
    place=$(tr '[:upper:]' '[:lower:]' <<<"$place")
    case "$place" in
      "$region") ;;
      "${continent/europe/eu}")
        say "note: $bucket is a multi-region bucket ($place); one in $region reads faster"
        ;;
      *-*) wrong_region "$bucket" "$place" "$region" ;; # another region
      nam[0-9]* | eur[0-9]* | asia[0-9]*)
        case "$continent $place" in
          us\ nam* | northamerica\ nam* | europe\ eur* | asia\ asia*) ;;
          *) wrong_region "$bucket" "$place" "$region" ;;
        esac
        say "note: $bucket is a dual-region bucket ($place); check that $region is one of the two"
        ;;
      *) wrong_region "$bucket" "$place" "$region" ;;
    esac
  done
}

wrong_region() { # wrong_region BUCKET PLACE REGION
  if [[ -n "$any_region" ]]; then
    say "warning: $1 is in $2, the TPU in $3"
    return
  fi
  fail "$1 is in $2, but ${setting[ZONE]} is in $3: every byte read is billed, and slow. \
Use a bucket in $3, or --any_region if you accept the cost"
}

# -- TPU VMs (tpu_vm.sh, spot.sh)

remote="pixelflow_run" # folder in the home directory of every worker
# Matches the training process, not the shells around it.
process='^python -m pixelflow_jax[.](train|doctor)'
started=$(date -u +%Y-%m-%dT%H:%M:%SZ)

on_workers() { # on_workers WHICH COMMAND: on worker WHICH, or all; returns the first nonzero code
  local flags
  read -ra flags <<<"${setting[SSH_FLAGS]:-}"
  run gcloud compute tpus tpu-vm ssh "${setting[NAME]}" "${where[@]}" --quiet "${flags[@]}" \
    --worker="$1" --command="$2"
}

make_archive() { # of the last commit; uncommitted changes are not included
  archive=$(mktemp -d)/code.tar.gz
  run git -C "$here/.." archive --format=tar.gz -o "$archive" HEAD || fail "git archive failed" 1
}

# Gives every worker the same commit and the package versions available when the script started. uv brings
# its own Python, because the images' Python is too old.
setup_workers() {
  local flags
  read -ra flags <<<"${setting[SSH_FLAGS]:-}"
  on_workers all "mkdir -p $remote" || fail "not all workers can be reached (see above)" 1
  run gcloud compute tpus tpu-vm scp "$archive" "${setting[NAME]}:$remote/code.tar.gz" "${where[@]}" \
    --quiet "${flags[@]}" --worker=all || fail "the code could not be copied to all workers" 1
  on_workers all "cd $remote && rm -rf code && mkdir code && tar xzf code.tar.gz -C code && \
python3 -m pip install -q --user uv && python3 -m uv venv -q --clear --python 3.12 venv && \
python3 -m uv pip install -q --exclude-newer $started --python venv/bin/python -e 'code[tpu,gcs,data,text]'" ||
    fail "the set-up failed on a worker (see above)" 1
}

# Runs in the background on the workers, so that a lost connection does not end training. With `flock`, a
# second start fails instead of training twice. The exit code goes to a file, also after a shutdown's SIGTERM.
start_training() {
  local inner
  inner="trap : TERM; . venv/bin/activate; (cd code && exec $(cloud_command "$@"))"
  on_workers all "cd $remote || exit 1; flock -n lock true || { echo another run holds the lock >&2; exit 1; }; \
rm -f exit_code; nohup setsid flock -n lock bash -c $(printf %q \
    "$inner; echo \$? >exit_code") >>train.log 2>&1 </dev/null &" || fail "training was not started" 1
}

# Sends SIGTERM, so that training saves a checkpoint. Kills what still runs after 120 s or holds the TPU.
stop_training() {
  on_workers all "pkill -TERM -f '$process'; for i in \$(seq 120); do \
pgrep -f '$process' >/dev/null || break; sleep 1; done; pkill -KILL -f '$process'; \
sudo -n fuser -k /dev/accel* /dev/vfio/[0-9]* >/dev/null 2>&1; sudo -n rm -f /tmp/libtpu_lockfile; true" || true
}

worker_codes() { # one line per worker: "running", "lost" (gone without a code) or the exit code
  on_workers all "cat $remote/exit_code 2>/dev/null || { pgrep -f '$process' >/dev/null && \
echo running || echo lost; }"
}

delete_vm() {
  run gcloud compute tpus tpu-vm delete "${setting[NAME]}" "${where[@]}" --quiet
}
