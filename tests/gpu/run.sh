#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A GPU owner's first ten minutes: does it load, is it right, how fast is it. Needs nothing of ours installed.
#
#     tests/gpu/run.sh OUT_DIR [--help]
#
# Takes under 9 minutes. OUT_DIR gets results.jsonl (a line for each result, written when it is known), log.txt and
# table.txt, which is printed last. PYTHON=... names another interpreter than python3. The status is 0 if all passed.
root=$(cd "$(dirname "$0")/../.." && pwd)
PYTHONPATH="$root/tests/gpu/first_run:$root/tests/support:$root/benchmarks/gpu${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
exec "${PYTHON:-python3}" -u "$root/tests/gpu/first_run/run.py" "$@"
