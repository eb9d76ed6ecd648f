#!/usr/bin/env bash
# Trains on a spot TPU (a queued resource) until training is complete, through preemptions. Run it in tmux
# or on a small VM: it must keep running.
#
#   launch/spot.sh [FLAGS of training]
#
# It requests the TPU, sets it up, starts training and checks every minute. If a worker ends with code 75, or
# the VM is gone, it starts again and resumes. After code 0 it deletes the TPU and ends. After other codes
# (for example when writes to a bucket kept failing) it starts again a few times, as long as there are new
# checkpoints. Otherwise, and after code 2 (bad input), it stops, shows the log and leaves the TPU running for
# inspection; for two hours it repeats that the TPU costs money and how to delete it. Ctrl-C lets training
# save, then deletes the TPU. Every start uses the commit and the package versions of the first one.
#
# Settings come from launch/settings.env or --settings=FILE; --dry_run prints every command;
# --any_region allows a bucket in another region. POLL_SECONDS (60) is the time between checks, REMINDERS (12)
# the number of reminders that the TPU still runs, one every ten checks.
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
poll_seconds=${POLL_SECONDS:-60}
tries=5            # attempts at operations that can fail temporarily
short_seconds=1800 # a start lost sooner than this counts as no progress
reminders=${REMINDERS:-12}

pause() { # a sleep that signals interrupt at once
  sleep "$poll_seconds" &
  wait $!
}

# Prints the state of the queued resource: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; NONE if it does not
# exist, UNKNOWN if the request failed.
state() {
  local said
  if said=$(gcloud compute tpus queued-resources describe "${setting[NAME]}" "${where[@]}" \
    --format="value(state.state)" 2>&1); then
    said=${said##*$'\n'}
    if [[ "$said" =~ ^[A-Z_]+$ ]]; then echo "$said"; else echo UNKNOWN; fi # such as a gcloud warning
  elif [[ "$said" == *NOT_FOUND* || "$said" == *"not found"* ]]; then
    echo NONE
  else
    say "the state is unknown: ${said##*$'\n'}"
    echo UNKNOWN
  fi
}

request() {
  run gcloud compute tpus queued-resources create "${setting[NAME]}" "${where[@]}" \
    --node-id="${setting[NAME]}" --accelerator-type="${setting[TYPE]}" \
    --runtime-version="${setting[RUNTIME]}" --spot --quiet
}

delete() { # deletes the queued resource with its VM, and checks that it is gone
  local i
  for ((i = 0; i < 2 * tries; i++)); do
    run gcloud compute tpus queued-resources delete "${setting[NAME]}" "${where[@]}" --force --quiet || true
    if [[ -n "$dry_run" || "$(state)" == NONE ]]; then return 0; fi # in a trap, plain `return` keeps the previous code
    pause
  done
  fail "${setting[NAME]} COULD NOT BE DELETED and may cost money: see gcloud compute tpus queued-resources list" 1
}

interrupted() {
  trap '' INT TERM HUP
  say "interrupted: letting training save, then deleting the TPU"
  stop_training
  delete
  exit 130
}

stop() { # stop CODE MESSAGE: ends this script but not the TPU, and repeats that on the screen
  local i j
  say "$2. End of the log:"
  on_workers all "tail -n 20 $remote/train.log" >&2 || true
  for ((i = 0; i <= reminders; i++)); do
    echo "
  ############################################################################################
  #  $2
  #  THE TPU STILL RUNS, AND COSTS MONEY. Ctrl-C here deletes it; or, when this has ended:
  #  gcloud compute tpus queued-resources delete ${setting[NAME]} ${where[*]} --force --quiet
  ############################################################################################
" >&2
    for ((j = 0; j < 10 && i < reminders; j++)); do pause; done
  done
  exit "$1"
}

newest_step() { # prints the newest checkpoint's step in WORKDIR, if any; fails if that is unknown
  local said
  if [[ "${setting[WORKDIR]}" == gs://* ]]; then
    if ! said=$(gcloud storage ls "${setting[WORKDIR]}/checkpoints/" 2>&1); then
      [[ "$said" == *"matched no objects"* ]] || return 1
    fi
  else
    said=$(on_workers 0 "cd $remote/code && ls -1 $(printf %q "${setting[WORKDIR]}/checkpoints") || true") || return 1
  fi
  grep -oE '(^|/)[0-9]+/?$' <<<"$said" | tr -d / | sort -n | tail -n 1 || true
}

# Succeeds if there is a newer checkpoint than $1, the newest one at the start.
moved() {
  local i now
  for ((i = 0; i < tries; i++)); do
    if now=$(newest_step); then
      [[ -n "$now" && "$now" != "$1" ]]
      return
    fi
    pause
  done
  return 1
}

wait_until_active() {
  local now before="" failed=0
  while true; do
    now=$(state)
    [[ "$now" == "$before" ]] || say "queued resource ${setting[NAME]}: $now"
    before=$now
    case "$now" in
      ACTIVE) return ;;
      NONE)
        if ! request; then
          failed=$((failed + 1))
          ((failed < tries)) || fail "the TPU could not be requested (see above)" 1
        fi
        ;;
      SUSPENDED) delete ;;
      FAILED)
        gcloud compute tpus queued-resources describe "${setting[NAME]}" "${where[@]}" \
          --format="value(state.failedData.error.message)" >&2 || true
        delete
        fail "Google Cloud refused the TPU for the reason above: check TYPE, RUNTIME, ZONE and your quota" 1
        ;;
    esac
    pause
  done
}

prepare() { # sets up and starts training; retries as long as the TPU exists
  local i
  for ((i = 0; i < tries; i++)); do
    if (stop_training && setup_workers && start_training "$@"); then return 0; fi
    pause
    case "$(state)" in
      ACTIVE | UNKNOWN) say "set-up failed; trying again" ;;
      *) return 1 ;;
    esac
  done
  stop 1 "set-up failed $tries times on a running TPU (see above)"
}

# Waits for the end of training, and sets `end` to "done", "again", "renew" (the TPU is unusable) or the exit
# code that stopped it.
wait_for_end() {
  local codes reason gone=0 silent=0
  while true; do
    pause
    case "$(state)" in
      ACTIVE) ;;
      UNKNOWN) continue ;;
      *) end=again && return ;;
    esac
    if ! codes=$(worker_codes); then
      silent=$((silent + 1))
      say "a worker does not answer; checking again"
      if ((silent > 3 * tries)); then end=renew && return; fi
      continue
    fi
    silent=0
    codes=$(grep -E '^([0-9]+|running|lost)$' <<<"$codes" | sort -u || true)
    case "$codes" in
      *running* | "") continue ;;
      0) end="done" && return ;;
    esac
    # 143 is a preemption's SIGTERM before training could handle it. 76 means that another process was lost,
    # "lost" that a process left no code: if the machine is gone, its state may show this only later.
    reason=$(grep -vE '^(0|75|76|143|lost)$' <<<"$codes" | sort -n | tail -n 1 || true)
    if grep -qx 2 <<<"$codes"; then reason=2; fi # bad input does not go away
    if [[ -n "$reason" ]]; then end=$reason && return; fi
    if grep -qxE '75|143' <<<"$codes"; then end=again && return; fi
    gone=$((gone + 1))
    if ((gone > tries)); then end=lost && return; fi
  done
}

parse_flags "$@"
need PROJECT ZONE NAME TYPE RUNTIME BUCKET CONFIG WORKDIR
need_tool gcloud "https://cloud.google.com/sdk/docs/install"
check_region
make_archive
if [[ -n "$dry_run" ]]; then
  request
  setup_workers
  start_training "${arguments[@]}"
  worker_codes
  delete
  exit 0
fi
trap interrupted INT TERM HUP
lost=0
failed=0
while true; do
  wait_until_active
  before=$(newest_step) || before=""
  if ! prepare "${arguments[@]}"; then
    say "the TPU disappeared during set-up"
    continue
  fi
  begin=$SECONDS
  wait_for_end
  if ((SECONDS - begin > short_seconds)); then lost=0 failed=0; fi
  if [[ "$end" == lost ]]; then
    lost=$((lost + 1))
    if ((lost < tries)); then end=again; else end=76; fi
  fi
  case "$end" in
    done)
      say "training is complete: ${setting[WORKDIR]}"
      delete
      exit 0
      ;;
    again) say "preempted: starting again from the newest checkpoint" ;;
    renew)
      say "the TPU does not answer: asking for another"
      delete
      ;;
    2 | 76) stop "$end" "training ended with code $end" ;;
    *)
      failed=$((failed + 1))
      if ((failed >= tries)); then stop "$end" "training ended with code $end for the ${failed}th time"; fi
      if ! moved "$before"; then stop "$end" "training ended with code $end, without a new checkpoint"; fi
      say "training ended with code $end, after a new checkpoint: starting again from it"
      ;;
  esac
done
