#!/bin/sh
# Tests of the core (all that needs no torch) in an environment of its own, made anew:
#
#     locks/core.sh PYTHON locked     with the versions of locks/cpu.txt
#     locks/core.sh PYTHON lowest     with the lowest that pyproject.toml allows (resolved by uv: UV=..., default uv)
#
# ARGS: more arguments for pytest.
set -eu

python=$1
versions=$2
uv=${UV:-uv}
cd "$(dirname "$0")/.."

refuse() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

command -v "$python" >/dev/null 2>&1 || refuse "PYTHON=$python: there is no such Python here."
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null ||
    refuse "PYTHON=$python is $("$python" --version 2>&1 | tail -n 1): 3.11, 3.12 or 3.13 is needed."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
"$python" -m venv "$work/venv"
pip="$work/venv/bin/python -m pip install --quiet --disable-pip-version-check"
case $versions in
    locked) cp locks/cpu.txt "$work/versions.txt" ;;
    lowest)
        command -v "$uv" >/dev/null 2>&1 || refuse "the lowest versions are resolved by uv: pip install uv, or UV=/path/to/uv."
        "$uv" pip compile --quiet --resolution lowest-direct --python "$work/venv/bin/python" pyproject.toml -o "$work/versions.txt"
        ;;
    *) refuse "$versions: locked or lowest" ;;
esac
$pip --constraint "$work/versions.txt" -e .
$pip pytest pytest-timeout hypothesis
printf 'The core with %s, %s versions:\n' "$("$python" --version)" "$versions"
skip=
[ "$versions" = locked ] || skip="--deselect tests/schemas/test_schemas_docs.py" # other versions of pydantic word the schema otherwise
# shellcheck disable=SC2086
"$work/venv/bin/python" -m pytest -p no:cacheprovider tests/schemas tests/stages/test_conditions.py tests/stages/select \
    tests/pipeline/test_pipeline_anywhere.py tests/pipeline/test_pipeline_commands.py tests/pipeline/test_pipeline_config_file.py $skip ${ARGS:-}
