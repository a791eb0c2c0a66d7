# Sourced by quickstart.sh and test.sh: puts a Python environment with the given requirement files on the PATH.
# Uses the active environment (VIRTUAL_ENV or CONDA_PREFIX) if there is one, else makes .venv. Installs only when a
# requirements file has changed since the last time.

setup_environment() {  # arguments: requirement files
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
        if [ ! -x .venv/bin/python ]; then
            local python=${PYTHON:-python3}
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
                echo "error: Python 3.10 or newer is needed, found $("$python" --version 2>&1); set PYTHON" >&2
                return 1
            }
            echo "Making a Python environment in .venv"
            "$python" -m venv .venv || {
                echo "error: python3 -m venv failed (on Debian and Ubuntu: apt install python3-venv)" >&2
                return 1
            }
        fi
        export VIRTUAL_ENV=$PWD/.venv
        export PATH=$VIRTUAL_ENV/bin:$PATH
    fi
    local file prefix stamp wanted
    prefix=$(python -c 'import sys; print(sys.prefix)')
    for file in "$@"; do
        stamp=$prefix/.installed-$(echo "$file" | tr / -)
        wanted=$(cksum < "$file")
        if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
            echo "Installing $file (the first time: about 5 GB, a minute or more)"
            if python -m pip --version > /dev/null 2>&1; then
                python -m pip install --quiet --disable-pip-version-check -r "$file" || return 1
            elif command -v uv > /dev/null; then  # makes environments without pip
                uv pip install --quiet -r "$file" || return 1
            else
                echo "error: the active environment $prefix has no pip: python -m ensurepip, or deactivate it" >&2
                return 1
            fi
            echo "$wanted" > "$stamp"
        fi
    done
}
