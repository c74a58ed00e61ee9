#!/bin/sh
# Makes the release that pyproject.toml and CHANGELOG.md name: checks and tests the commit, builds
# both distributions into dist/, and tags the commit. Publishes nothing.
set -eu
cd "$(dirname "$0")/.."

stop() {
    echo "no release: $1" >&2
    exit 1
}

version="$("$BIN/python" -c 'import tomllib
print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')"
tag="v$version"
[ -z "$(git status --porcelain)" ] || stop "there are uncommitted changes"
grep -q "^## $version ([0-9-]*)$" CHANGELOG.md ||
    stop "CHANGELOG.md has no heading '## $version (DATE)'"
! git rev-parse --quiet --verify "refs/tags/$tag" >/dev/null || stop "the tag $tag exists"

.ci/run
rm -rf dist
# Without isolation: the environment has what a build needs, and a build may be without a network.
"$BIN/python" -m build --no-isolation
"$BIN/python" -m twine check --strict dist/*
[ -z "$(git status --porcelain)" ] || stop "the tests or the build changed tracked files"
git tag -a "$tag" -m "aot-plugin $version"
echo "tagged $tag; to publish: git push origin $tag, and upload the files of dist/"
