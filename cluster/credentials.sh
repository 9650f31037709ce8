#!/usr/bin/env bash
# A certificate authority for one run, and one certificate signed with it: `credentials.sh DIR` writes ca.pem, cert.pem, key.pem.
# The authority's own key is thrown away, so that nobody can sign another certificate for this run.
set -euo pipefail
out=${1:?directory}
umask 077
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
new="req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
openssl $new -x509 -days 366 -subj "/CN=pavi-scale run" -keyout "$work/ca.key" -out "$out/ca.pem" \
    -addext "basicConstraints=critical,CA:TRUE,pathlen:0" 2>/dev/null
openssl $new -subj "/CN=pavi-scale process" -keyout "$out/key.pem" -out "$work/request" 2>/dev/null
openssl x509 -req -days 366 -in "$work/request" -CA "$out/ca.pem" -CAkey "$work/ca.key" -CAcreateserial -CAserial "$work/serial" -out "$out/cert.pem" 2>/dev/null
