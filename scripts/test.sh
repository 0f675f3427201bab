#!/usr/bin/env bash
# All tests, in an environment of their own (made on the first call, reused later).
source "$(dirname "$0")/env.sh" test
ruff check gsq tests bench
ruff format --check gsq tests bench
exec python -m pytest "$@"
