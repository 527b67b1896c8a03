#!/usr/bin/env bash
# Trains on all GPUs of a machine that its provider may take back (spot, preemptible). On the notice
# the run is saved; the same command on the next machine, or after a boot, goes on with it.
#
#   SYNC='aws s3 sync --delete "$RUN" s3://bucket/run' FETCH='aws s3 sync s3://bucket/run "$RUN"' \
#       bash scripts/spot.sh gpt2-124m --set training.save_minutes=10
#
# FETCH is run before the training; SYNC every SYNC_SECONDS (default 300) and at its end. A half
# copied checkpoint does no harm: it is not valid, and the one before is taken.
# PROVIDER (default: who answers) is aws, gcp, azure or none; METADATA is another address of its
# metadata service; POLL (5) are the seconds between two questions. A run that lost a rank is
# started again, at most RETRIES (3) times in a row and after BACKOFF (10) seconds, then twice as many.
# JOB, RUN, DEVICES, DEVICE: scripts/gpu_run.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh
. scripts/gpu_run.sh

ask() { curl --silent --fail --max-time 2 "$@"; }

# Whether provider $1 has announced to take this machine; 2: it does not answer.
announced() {
    local base=${METADATA:-http://169.254.169.254} token said
    case $1 in
    aws)
        token=$(ask -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$base/latest/api/token") ||
            return 2
        # 404 until there is a notice
        ask -H "X-aws-ec2-metadata-token: $token" \
            "$base/latest/meta-data/spot/instance-action" >/dev/null || return 1
        ;;
    gcp)
        said=$(ask -H 'Metadata-Flavor: Google' "$base/computeMetadata/v1/instance/preempted") ||
            return 2
        [ "$said" = TRUE ]
        ;;
    azure)
        said=$(ask -H 'Metadata: true' "$base/metadata/scheduledevents?api-version=2020-07-01") ||
            return 2
        [[ $said == *'"Preempt"'* ]]
        ;;
    none) return 1 ;;
    esac
}

who_answers() {
    local one code
    for one in aws gcp azure; do
        code=0
        announced "$one" || code=$?
        if [ "$code" != 2 ]; then
            echo "$one"
            return
        fi
    done
    echo none
}

sync_run() {
    if [ -n "${SYNC:-}" ]; then bash -c "$SYNC" || echo "spot.sh: SYNC failed" >&2; fi
}

stop_now() {
    if [ -z "$stopping" ]; then echo "spot.sh: $1; the run is saved" >&2; fi
    stopping=1
    if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null || true; fi
}

# Until the next notice, sync or end of the training, which signals end too.
watch_over() {
    local synced=$SECONDS copying=""
    while kill -0 "$child" 2>/dev/null; do
        sleep "${POLL:-5}" &
        wait "$!" || true
        if [ -z "$stopping" ] && announced "$provider"; then
            stop_now "$provider takes this machine"
        fi
        if [ -n "${SYNC:-}" ] && [ $((SECONDS - synced)) -ge "${SYNC_SECONDS:-300}" ] &&
            ! kill -0 "$copying" 2>/dev/null; then
            synced=$SECONDS
            sync_run &
            copying=$!
        fi
    done
    if [ -n "$copying" ]; then wait "$copying" || true; fi
}

prepare "$@"
provider=${PROVIDER:-$(who_answers)}
case $provider in
aws | gcp | azure | none) ;;
*) fail "PROVIDER=$provider is not one of aws, gcp, azure, none" ;;
esac
echo "spot.sh: notices: $provider" >&2
stopping="" child="" times=0 pause=${BACKOFF:-10}
trap 'stop_now "told to end"' TERM INT HUP
if [ -n "${FETCH:-}" ]; then
    mkdir -p "$(dirname "$RUN")"
    bash -c "$FETCH" || fail "FETCH failed; the run would begin again from nothing"
fi
while [ -z "$stopping" ]; do
    "${command[@]}" --devices "$DEVICES" &
    child=$!
    watch_over
    code=0
    wait "$child" || code=$?
    child=""
    sync_run
    case $code in
    6 | 137) ;; # a lost rank, a full disk, a killed launcher
    *) exit "$code" ;; # done, stopped, or what would go wrong again
    esac
    times=$((times + 1))
    [ -z "$stopping" ] && [ "$times" -le "${RETRIES:-3}" ] || exit "$code"
    echo "spot.sh: exit code $code; again in $pause s (time $times of ${RETRIES:-3})" >&2
    sleep "$pause" &
    wait "$!" || true
    pause=$((pause * 2))
done
exit 143
