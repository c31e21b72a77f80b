#!/bin/sh
# Starts a command with the database's password, which libpq takes from the environment. It comes from a file, so that
# it is in no URL, no command line and nothing that `docker inspect` shows.
set -eu

if [ -n "${PGPASSWORD_FILE-}" ]; then
    PGPASSWORD=$(cat "$PGPASSWORD_FILE")
    export PGPASSWORD
fi
exec "$@"
