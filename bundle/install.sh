#!/bin/sh
# Installs a bundle from `make bundle` on a machine without a network: ./install.sh [FOLDER]
# PYTHON is the interpreter. Packages that the bundle leaves out, such as torch, come from its environment.
set -eu
bundle=$(cd "$(dirname "$0")" && pwd)
target=${1:-$PWD/embedding-service}
python=${PYTHON:-python3}
about() { "$python" -c 'import json, sys; print(*json.load(open(sys.argv[1]))[sys.argv[2]], sep="")' "$bundle/about.json" "$1"; }

cd "$bundle"
sha256sum --check --quiet manifest.sha256
echo "All $(wc -l <manifest.sha256) files match their checksums."

wanted=$(about python)
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$found" != "$wanted" ] || [ "$(uname -m)" != "$(about machine)" ]; then
  echo "The bundle is for Python $wanted on $(about machine); $python is $found on $(uname -m). Set PYTHON." >&2
  exit 1
fi

# Joins the parts of large files in a folder.
join() {
  find "$1" -name '*.part00' | while read -r first; do
    cat "${first%.part00}".part* >"${first%.part00}"
    rm "${first%.part00}".part*
  done
}
mkdir -p "$target/model" "$target/prepared"
target=$(cd "$target" && pwd)
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
for file in piece-*/wheels/*; do ln -s "$bundle/$file" "$wheels/"; done
for piece in piece-*; do
  for kind in model prepared; do
    if [ -d "$piece/$kind" ]; then cp -R "$piece/$kind/." "$target/$kind/"; fi
  done
done
join "$wheels"
join "$target/model"
join "$target/prepared"
tar -xzf piece-*/service.tar.gz -C "$target"

# pip runs from its own wheel, so neither pip nor ensurepip has to be installed.
"$python" -m venv --clear --without-pip "$target/.venv"
pip=$(echo "$wheels"/pip-*.whl)
"$target/.venv/bin/python" "$pip/pip" install \
  --quiet --disable-pip-version-check --no-index --no-deps --no-warn-script-location "$wheels"/*.whl
if [ -n "$(about without)" ]; then
  # If $python is in a virtual environment, --system-site-packages would skip the packages of that environment.
  site=$("$target/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import sys
for path in sys.path:
    if path.endswith("-packages"):
        print(f"import site; site.addsitedir({path!r})")' >"$site/packages_of_the_machine.pth"
fi
[ -e "$target/.env" ] || printf '%s\n' "EMBEDDING_MODEL=$target/model" "CACHE_FOLDER=$target/prepared" >"$target/.env"

cd "$target"
.venv/bin/python -m bundle.found
echo "To start: cd $target && .venv/bin/python app.py"
