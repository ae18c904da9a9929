#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The version of this tree, from git, in a form that is valid and sorts right in
# the binary, in a deb and in an rpm:
#   at tag v1.2.3                1.2.3
#   at tag v1.3.0-rc.1           1.3.0~rc.1     before 1.3.0
#   5 commits later              1.2.3+5.gabcdef012345
#   with changes, not committed  1.2.3+5.gabcdef012345.dirty
#   before the first tag         0.0.0+310.gabcdef012345
#   without git                  0.0.0~unknown
set -euo pipefail

git rev-parse -q --verify HEAD >/dev/null 2>&1 || { echo 0.0.0~unknown; exit; }
# <tag>-<commits since>-g<hash>[-dirty]; without a tag there is only the last part.
describe=$(git describe --tags --match 'v[0-9]*' --long --abbrev=12 --dirty 2>/dev/null) ||
	describe=v0.0.0-$(git rev-list --count HEAD)-g$(git describe --always --exclude '*' --abbrev=12 --dirty)
dirty=
case $describe in *-dirty) dirty=dirty describe=${describe%-dirty} ;; esac
hash=${describe##*-} rest=${describe%-*}
commits=${rest##*-} tag=${rest%-*}
version=${tag#v}
version=${version/-/\~}
# What else a tag may hold is valid in neither format.
version=${version//[^0-9A-Za-z.~]/.}
if [ "$commits" != 0 ]; then
	version+=+$commits.$hash${dirty:+.dirty}
elif [ -n "$dirty" ]; then
	version+=+dirty
fi
echo "$version"
