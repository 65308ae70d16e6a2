#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A GPU owner's first ten minutes: does it load, is it right, how fast is it. Needs nothing of ours installed.
#
#     tests/gpu/run.sh OUT_DIR [--help]
#
# Takes under 9 minutes. OUT_DIR gets results.jsonl (a line for each result, written when it is known), log.txt and
# table.txt, which is printed last. PYTHON=... names another interpreter than python3. The status is 0 if all passed.
exec "${PYTHON:-python3}" -u "$(dirname "$0")/first_run/run.py" "$@"
