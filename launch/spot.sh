#!/usr/bin/env bash
# Trains on a spot TPU to the end, through preemptions, as a queued resource. Start it and walk away
# (in tmux, or on a small VM: it must go on running).
#
#   launch/spot.sh [FLAGS of training]
#
# It asks for the TPU, sets it up, trains, and looks every minute. Exit code 75 of a worker, or a VM that
# is gone, starts again and resumes; 0 deletes the TPU and ends. Another code, such as that of a write to
# a bucket that failed for too long, starts again a few times as long as there are new checkpoints. Else, and
# after code 2 (bad input), it stops, shows the log and leaves the TPU for you to look at; it says for two
# hours, again and again, that this costs money, and how to end it. Ctrl-C lets training save, then deletes
# the TPU. Every start takes the commit, and the package versions, of the first.
#
# Settings come from launch/settings.env or --settings=FILE; --dry_run prints every command;
# --any_region allows a bucket elsewhere. POLL_SECONDS (60) is how often it looks, REMINDERS (12) how often
# it says that the TPU still runs, every ten looks.
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
poll_seconds=${POLL_SECONDS:-60}
tries=5            # of what can fail for reasons of the moment
short_seconds=1800 # a start that is lost sooner than this has done nothing
reminders=${REMINDERS:-12}

pause() { # a sleep that signals end at once
  sleep "$poll_seconds" &
  wait $!
}

# Of the queued resource: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED ...; NONE if there is none, UNKNOWN if
# the answer is not to be had just now.
state() {
  local said
  if said=$(gcloud compute tpus queued-resources describe "${setting[NAME]}" "${where[@]}" \
    --format="value(state.state)" 2>&1); then
    said=${said##*$'\n'}
    if [[ "$said" =~ ^[A-Z_]+$ ]]; then echo "$said"; else echo UNKNOWN; fi # a warning of gcloud's, say
  elif [[ "$said" == *NOT_FOUND* || "$said" == *"not found"* ]]; then
    echo NONE
  else
    say "the state is not known: ${said##*$'\n'}"
    echo UNKNOWN
  fi
}

request() {
  run gcloud compute tpus queued-resources create "${setting[NAME]}" "${where[@]}" \
    --node-id="${setting[NAME]}" --accelerator-type="${setting[TYPE]}" \
    --runtime-version="${setting[RUNTIME]}" --spot --quiet
}

delete() { # with the VM that belongs to it; looks whether it is really gone
  local i
  for ((i = 0; i < 2 * tries; i++)); do
    run gcloud compute tpus queued-resources delete "${setting[NAME]}" "${where[@]}" --force --quiet || true
    if [[ -n "$dry_run" || "$(state)" == NONE ]]; then return 0; fi # plain `return` in a trap gives the code before it
    pause
  done
  fail "${setting[NAME]} COULD NOT BE DELETED and may cost money: see gcloud compute tpus queued-resources list" 1
}

interrupted() {
  trap '' INT TERM HUP
  say "interrupted: training saves, then the TPU is deleted"
  stop_training
  delete
  exit 130
}

stop() { # stop CODE MESSAGE: ends this script, not the TPU; whoever comes back to the screen sees it
  local i j
  say "$2. The log says:"
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

newest_step() { # of the checkpoints in WORKDIR; nothing if there is none. Fails if that is not known
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

# Whether training has left a newer checkpoint than $1 was when it started.
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
          ((failed < tries)) || fail "the TPU could not be asked for (see above)" 1
        fi
        ;;
      SUSPENDED) delete ;;
      FAILED)
        gcloud compute tpus queued-resources describe "${setting[NAME]}" "${where[@]}" \
          --format="value(state.failedData.error.message)" >&2 || true
        delete
        fail "Google Cloud refused the TPU, for the reason above: see TYPE, RUNTIME, ZONE and your quota" 1
        ;;
    esac
    pause
  done
}

prepare() { # sets up and starts; on a TPU that is there, again and again before it gives up
  local i
  for ((i = 0; i < tries; i++)); do
    if (stop_training && setup_workers && start_training "$@"); then return 0; fi
    pause
    case "$(state)" in
      ACTIVE | UNKNOWN) say "set-up failed; trying again" ;;
      *) return 1 ;;
    esac
  done
  stop 1 "set-up failed $tries times on a TPU that is there (see above)"
}

# Looks until training has ended, and sets `end` to "done", "again", "renew" (the machine is of no use) or
# the exit code that stopped it.
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
      say "a worker does not answer; looking again"
      if ((silent > 3 * tries)); then end=renew && return; fi
      continue
    fi
    silent=0
    codes=$(grep -E '^([0-9]+|running|lost)$' <<<"$codes" | sort -u || true)
    case "$codes" in
      *running* | "") continue ;;
      0) end="done" && return ;;
    esac
    # 143 is a preemption's SIGTERM before training could take it. 76 says that another process was lost, and "lost" that one left no code: if the machine is gone, the
    # state may tell only a little later.
    reason=$(grep -vE '^(0|75|76|143|lost)$' <<<"$codes" | sort -n | tail -n 1 || true)
    if grep -qx 2 <<<"$codes"; then reason=2; fi # bad input stays bad
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
    say "the TPU went away during set-up"
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
    again) say "preempted: starting again, from the newest checkpoint" ;;
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
