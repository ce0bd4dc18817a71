#!/usr/bin/env bash
# A short tour of the main job: a hub of three members, two agents, a manifest, and what happens when things die.
# Ends by itself with exit status 0 and cleans up after itself. Usage: tools/demo.sh NAVE HELLO
set -euo pipefail

nave=$(realpath "$1")
dir=$(mktemp -d /tmp/nave-demo.XXXXXX)
chmod 755 "$dir" # services run as users of their own and must reach their directories
hello="$dir/hello"     # a clone below /root is closed to them
install -m 755 "$2" "$hello"
export NAVE_CONTEXT="$dir/data/client.toml"
dev=

cleanup() {
  status=$?
  if [ -n "$dev" ] && kill -0 "$dev" 2>/dev/null; then
    kill -TERM "$dev"
    wait "$dev" || true
  fi
  if [ "$status" -eq 0 ]; then rm -rf "$dir"; else echo "demo: failed; what was said is in $dir" >&2; fi
}
trap cleanup EXIT

say() { printf '\n\033[1m# %s\033[0m\n' "$*"; }
show() { printf '$ nave %s\n' "$*"; "$nave" "$@"; }
fail() { echo "demo: $*" >&2; tail -n 20 "$dir/dev.log" >&2; exit 1; }

# A block of free ports: members at +0, agents at +10, metrics at +80 and +90.
free_port() {
  for base in 7400 17400 18400 19400 16400 15400; do
    free=1
    for offset in 0 1 2 10 11 80 81 82 90 91; do
      if (exec 3<>"/dev/tcp/127.0.0.1/$((base + offset))") 2>/dev/null; then free=0; break; fi
    done
    if [ "$free" -eq 1 ]; then echo "$base"; return; fi
  done
  fail "no free block of ports"
}

say "a whole cluster on this machine: three members of the hub, two agents"
port=$(free_port)
"$nave" dev --members 3 --agents 2 --port "$port" --data-dir "$dir/data" >"$dir/dev.log" 2>&1 &
dev=$!
for _ in $(seq 600); do
  grep -q '^nave dev: ready' "$dir/dev.log" && break
  kill -0 "$dev" 2>/dev/null || fail "nave dev ended"
  sleep 0.1
done
grep '^nave dev: ready' "$dir/dev.log" || fail "nave dev was not ready within a minute"
show cluster status
show hosts

say "three copies of a web server; --wait returns when all are ready"
sed -e "s|^command = .*|command = [\"$hello\"]|" "$(dirname "$0")/../examples/hello.toml" >"$dir/hello.toml"
show apply -f "$dir/hello.toml" --wait
show ps hello

say "kill -9 one of its processes: it comes back, and the reason is kept"
pid=$("$nave" ps hello -o json | grep -o '"pid": *[0-9]*' | head -n 1 | grep -o '[0-9]*$')
kill -9 "$pid"
for _ in $(seq 100); do
  "$nave" events --service hello | grep -q SIGKILL && "$nave" services -o json | grep -q '"ready": *3' && break
  sleep 0.1
done
show ps hello
"$nave" events --service hello | tail -n 4

say "kill -9 the leader of the hub: the next write is taken by a survivor, no process notices"
leader=$("$nave" cluster status -o json | grep -o '"leader": *"[^"]*"' | cut -d'"' -f4)
kill -9 "$(cat "$dir/data/$leader/nave.pid")"
show scale hello 4 --wait
show services

say "a new version, one instance at a time; then back to the first"
sed -i -e 's|^count = .*|count = 4|' -e "s|^command = .*|command = [\"$hello\", \"--greeting\", \"good day\"]|" "$dir/hello.toml"
show apply -f "$dir/hello.toml" --dry-run
show apply -f "$dir/hello.toml" --wait
show logs hello --tail 1
show rollback hello --wait
show status hello

say "and away with it"
show delete hello --wait

say "that was the tour; everything it started is being stopped"
