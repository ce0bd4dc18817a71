#!/usr/bin/env bash
# Installs what building Nave needs and this machine lacks: a C and C++ compiler, libclang (for RocksDB's bindings).
# `packages.sh test` installs also what the tests run: services written in Python, curl as a caller, and the tools for
# machines in network namespaces.
set -euo pipefail

have_libclang() {
  [ -n "${LIBCLANG_PATH:-}" ] && return 0
  compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null || compgen -G '/usr/lib/*-linux-gnu/libclang*.so*' >/dev/null
}

missing=()
command -v cc >/dev/null && command -v c++ >/dev/null && command -v make >/dev/null || missing+=(build-essential)
have_libclang || missing+=(libclang-dev)
if [ "${1:-}" = test ]; then
  PATH=$PATH:/usr/sbin:/sbin
  for needed in python3:python3 curl:curl ip:iproute2 nft:nftables; do
    command -v "${needed%%:*}" >/dev/null || missing+=("${needed##*:}")
  done
fi
[ ${#missing[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null; then
  echo "nave: this needs ${missing[*]} (names as in Debian); install them with your package manager and try again" >&2
  exit 1
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "nave: this needs ${missing[*]}; as root: apt-get install ${missing[*]}" >&2; exit 1; }
  as_root=(sudo)
fi
echo "nave: installing ${missing[*]}"
"${as_root[@]}" apt-get update -qq
DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
