#!/usr/bin/env bash
# What `make bench` does once everything is installed: the sweep through asv, then the report.
set -euo pipefail

log=.asv/run.log
mkdir -p .asv

# HEAD of the timeline is the PyTorch that this Python has. On a terminal asv's tables, hundreds of lines of them, go to a file and
# leave the screen to the progress bar; `asv show HEAD` prints them again.
failed=0
if [ -t 2 ]; then
    FPX_PROGRESS=/dev/tty asv run HEAD 2>"$log" || failed=$?
else
    asv run HEAD 2> >(tee "$log" >&2) || failed=$?
fi
if [ "$failed" -ne 0 ]; then
    [ -t 2 ] && tail -n 25 "$log" >&2
    echo "asv run ended with $failed; its log is $log. What was measured is kept in results/." >&2
    exit "$failed"
fi

fpxbench report
