# Which Pythons this machine has; sourced.

# Print version and path of every Python that can make environments, the newest last.
pythons() {
  local path
  for path in $(compgen -c | grep -xE 'python3(\.[0-9]+)?' | sort -u | xargs -r which -a) \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3; do
    "$path" -c 'import ensurepip, ssl, sys
print("%d.%d.%d" % sys.version_info[:3], sys.executable)' 2>/dev/null || true
  done | sort -uV
}

found=$(pythons)
newest=$(awk '$1 !~ /^3\.([0-9]|1[01])\./ {path = $2} END {print path}' <<<"$found")
oldest=$(awk '$1 ~ /^3\.11\./ {path = $2} END {print path}' <<<"$found")
