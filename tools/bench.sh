#!/usr/bin/env bash
# What `make bench` does once everything is installed: the sweep through asv, then the report.
set -euo pipefail

# HEAD of the timeline is the PyTorch that this Python has. asv's tables are hundreds of lines: they go to a file (`asv show HEAD`
# prints them again), and the sweep's progress comes through on standard error, with the place of the report, which is
# built again and again while the sweep goes on.
log=.asv/run.log
export FPX_REPORT="${FPX_REPORT:-$PWD/report}"
echo "fpxbench: the sweep (profile ${FPX_PROFILE:-quick}) runs through asv; half a minute may pass before the first case" >&2
mkdir -p .asv
failed=0
# As a module: an environment that sees another Python's packages has no `asv` of its own. What it leaves out of benchmarks/
# (the codec's speed, the detector's rule, compiling for other targets) says nothing of a new user's machine: `asv run HEAD` has all.
python -m asv run HEAD --bench '^matmul\.' --bench '^numerics\.' >"$log" || failed=$?
if [ "$failed" -ne 0 ]; then
    tail -n 25 "$log" >&2
    echo "asv run ended with $failed; its whole log is $log. What was measured is kept in results/." >&2
    exit "$failed"
fi

fpxbench report --output "$FPX_REPORT"
