#!/usr/bin/env bash
# Build an image for real and run it as its user and as an arbitrary one: docker/check.sh cpu|cuda   (make image-check)
#
# Needs root, buildah and debootstrap (Debian: apt-get install buildah debootstrap), about 12 GB of disk and ten minutes; no Docker and no
# registry: the base image is made by debootstrap, with Debian's Python 3.11, and trusts the certificates that this machine trusts.
# PIP_EXTRA_INDEX_URL as for the README's install, or WHEELS: a folder on this machine that holds torch's CPU build.
set -euo pipefail
cd "$(dirname "$0")/.."

platform=${1:-cpu}
suite=${SUITE:-bookworm}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
base=docker.io/library/python:3.11-slim-bookworm
[ "$platform" = cpu ] || base=$(sed -n 's/^FROM \([^ ]*\).*/\1/p' "docker/Dockerfile.$platform" | tail -n 1)
image=congrad-check:$platform

for tool in buildah debootstrap; do
    command -v "$tool" >/dev/null || { echo "error: $tool is not installed (apt-get install buildah debootstrap)" >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "error: chroot isolation needs root" >&2; exit 1; }
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-overlay}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python3-pip,python3-dev "$suite" "$work/root" "$mirror"
    cp /etc/ssl/certs/ca-certificates.crt "$work/root/etc/ssl/certs/ca-certificates.crt"
    container=$(buildah from scratch)
    buildah copy --quiet "$container" "$work/root" /
    buildah config --env PIP_CERT=/etc/ssl/certs/ca-certificates.crt --env PIP_FIND_LINKS=/wheels "$container"
    buildah commit --quiet "$container" "$base"
    buildah rm "$container" >/dev/null
fi

mkdir "$work/wheels"
buildah build --network host --volume "${WHEELS:-$work/wheels}:/wheels:ro" --pull-never --layers -f "docker/Dockerfile.$platform" \
    --build-arg PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:-}" -t "$image" .
container=$(buildah from --pull-never "$image")
inside() {
    local user=$1
    shift
    echo "--- as $user: $*"
    buildah run --network host --user "$user" "$container" -- "$@"
}
# The image's user, a number without a name and without a home in group 0 (OpenShift), and the same with a strict umask.
for user in 1000:1000 54321:0; do
    inside "$user" congrad --help
    inside "$user" congrad doctor package:configs/starter.yaml --quick || true # no hub in the check: a finding, no traceback
    inside "$user" sh -c 'umask 027 && cd /tmp && congrad init --from demo "run-$(id -u).yaml"'
    inside "$user" sh -c 'touch /app/runs/x /cache/x && rm /app/runs/x /cache/x'
done
inside 1000:1000 make test ARGS="tests/schemas tests/pipeline/test_pipeline_anywhere.py -n 0"
if [ "$platform" = cpu ]; then
    inside 54321:0 env MYPY_CACHE_DIR=/tmp/mypy make test ARGS="tests/end_to_end/test_e2e_tiny.py -k every_table -n 0"
fi
buildah rm "$container" >/dev/null
echo "docker/check.sh: $image is fine"
