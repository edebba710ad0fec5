#!/usr/bin/env bash
# Build the pinned restic, kopia and borg programs into CACHE_DIR/clients, once each.
set -euo pipefail
cache=${1:?usage: clients.sh CACHE_DIR}
# shellcheck source=tests/vm/versions.sh
. "$(dirname "$0")/versions.sh"
PATH=$PATH:/usr/local/go/bin
python=${PYTHON:-python3}
mkdir -p "$cache/clients"
cache=$(cd "$cache" && pwd)

case $(go env GOVERSION) in
  go1.1? | go1.1?.* | go1.20 | go1.20.*)
    printf 'vm: %s is too old: from 1.21 on, Go fetches the version that it needs\n' \
      "$(go env GOVERSION)" >&2
    exit 1 ;;
esac

# A module of our own that requires exactly one version, not `go install MODULE@VERSION`: that
# also asks the proxy for the list of all versions, which some mirrors do not serve.
build() { # NAME MODULE VERSION PACKAGE
  [ -x "$cache/clients/$1" ] && return
  printf 'vm: building %s\n' "$1" >&2
  local work=$cache/clients.partial
  rm -rf "$work"
  mkdir "$work"
  (cd "$work" && go mod init atomtx.invalid/clients &&
   go mod edit -go="$GO_VERSION" &&
   go mod edit -require="$2@$3" &&
   CGO_ENABLED=0 go build -mod=mod -trimpath -o client "$4") >"$cache/go.log" 2>&1 ||
    { tail -20 "$cache/go.log" >&2; exit 1; }
  mv "$work/client" "$cache/clients/$1"
  rm -rf "$work"
}

for version in $RESTIC_VERSIONS; do
  build "restic-$version" github.com/restic/restic "v$version" github.com/restic/restic/cmd/restic
done
build kopia github.com/kopia/kopia "v$KOPIA_VERSION" github.com/kopia/kopia

# In an environment of its own, where its scripts name their final place; the link comes last.
borg=borg-$BORG_VERSION
if [ ! -x "$cache/clients/$borg" ]; then
  printf 'vm: building %s\n' "$borg" >&2
  { "$python" -m venv --clear "$cache/$borg" &&
    "$cache/$borg/bin/pip" install "borgbackup==$BORG_VERSION" &&
    ln -sfn "../$borg/bin/borg" "$cache/clients/$borg"; } >"$cache/borg.log" 2>&1 ||
    { tail -20 "$cache/borg.log" >&2; exit 1; }
fi
