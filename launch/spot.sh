#!/usr/bin/env bash
# Trains on a spot TPU to the end, through preemptions, as a queued resource. Start it and walk away
# (in tmux, or on a small VM: it must go on running).
#
#   launch/spot.sh [FLAGS of training]
#
# It asks for the TPU, sets it up, trains, and looks every minute. Exit code 75 of a worker, or a VM that
# is gone, starts again and resumes; 0 deletes the TPU and ends; another code stops, shows the log and
# leaves the TPU for you to look at. Ctrl-C lets training save, then deletes the TPU.
#
# Settings come from launch/settings.env or --settings=FILE; --dry_run prints every command;
# --any_region allows a bucket elsewhere. POLL_SECONDS (60) is how often it looks.
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
poll_seconds=${POLL_SECONDS:-60}

state() { # of the queued resource: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; "NONE" if there is none
  gcloud compute tpus queued-resources describe "${setting[NAME]}" "${where[@]}" \
    --format="value(state.state)" 2>/dev/null || echo NONE
}

request() {
  run gcloud compute tpus queued-resources create "${setting[NAME]}" "${where[@]}" \
    --node-id="${setting[NAME]}" --accelerator-type="${setting[TYPE]}" \
    --runtime-version="${setting[RUNTIME]}" --spot --quiet ||
    fail "the TPU could not be asked for (see above)" 1
}

delete() { # with the VM that belongs to it
  run gcloud compute tpus queued-resources delete "${setting[NAME]}" "${where[@]}" --force --quiet ||
    say "warning: ${setting[NAME]} could not be deleted; see: gcloud compute tpus queued-resources list"
}

interrupted() {
  trap '' INT TERM
  say "interrupted: training saves, then the TPU is deleted"
  stop_training
  delete
  exit 130
}

wait_until_active() {
  local now before=""
  while true; do
    now=$(state)
    [[ "$now" == "$before" ]] || say "queued resource ${setting[NAME]}: $now"
    before=$now
    case "$now" in
      ACTIVE) return ;;
      NONE) request ;;
      FAILED | SUSPENDED) delete ;;
    esac
    sleep "$poll_seconds"
  done
}

# Looks until training has ended: prints "done", "again" or the exit code that stopped it.
wait_for_end() {
  local codes gone=0
  while true; do
    sleep "$poll_seconds"
    if [[ "$(state)" != ACTIVE ]]; then echo again && return; fi
    if ! codes=$(worker_codes 2>/dev/null); then
      say "a worker does not answer; looking again"
      continue
    fi
    codes=$(grep -E '^([0-9]+|running|lost)$' <<<"$codes" | sort -u || true)
    case "$codes" in
      *running* | "") continue ;;
      0) echo "done" && return ;;
    esac
    # 76 says that another process was lost: the reason is that one's code, or that its machine is gone,
    # which the state may tell only a little later.
    local reason
    reason=$(grep -vE '^(0|75|76|lost)$' <<<"$codes" | head -n 1 || true)
    if [[ -n "$reason" ]]; then echo "$reason" && return; fi
    if grep -qx 75 <<<"$codes"; then echo again && return; fi
    gone=$((gone + 1))
    if ((gone > 5)); then echo 76 && return; fi
  done
}

parse_flags "$@"
need PROJECT ZONE NAME TYPE RUNTIME BUCKET CONFIG WORKDIR
need_tool gcloud "https://cloud.google.com/sdk/docs/install"
check_region
if [[ -n "$dry_run" ]]; then
  request
  setup_workers
  start_training "${arguments[@]}"
  worker_codes
  delete
  exit 0
fi
trap interrupted INT TERM
while true; do
  wait_until_active
  ready=1
  (setup_workers && start_training "${arguments[@]}") || ready=""
  if [[ -z "$ready" ]]; then
    [[ "$(state)" == ACTIVE ]] && fail "set-up failed on a TPU that is there (see above); it still runs" 1
    say "the TPU went away during set-up"
    continue
  fi
  end=$(wait_for_end)
  case "$end" in
    done)
      say "training is complete: ${setting[WORKDIR]}"
      delete
      exit 0
      ;;
    again) say "preempted: starting again, from the newest checkpoint" ;;
    *)
      say "training ended with code $end; the TPU still runs (launch/tpu_vm.sh delete). The log says:"
          on_workers all "tail -n 20 $remote/train.log" >&2 || true
      exit "$end"
      ;;
  esac
done
