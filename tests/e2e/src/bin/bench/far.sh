#!/bin/bash
# Keys for the others' far end, in DIRECTORY: a certificate authority, a server's and a client's
# certificate under the names that QEMU and libnbd look for, and a user's and a host's ssh key.
set -euo pipefail
cd "$1"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca-key.pem \
    -out ca-cert.pem -days 7 -subj /CN=bench 2>/dev/null
for side in server client; do
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout $side-key.pem \
        -out $side.csr -subj /CN=localhost 2>/dev/null
    openssl x509 -req -in $side.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial \
        -out $side-cert.pem -days 7 2>/dev/null \
        -extfile <(echo "subjectAltName=DNS:localhost,IP:127.0.0.1
extendedKeyUsage=${side}Auth")
done
ssh-keygen -q -t ed25519 -N '' -f host
ssh-keygen -q -t ed25519 -N '' -f user
cat >sshd_config <<CONFIG
ListenAddress 127.0.0.1
HostKey $PWD/host
AuthorizedKeysFile $PWD/user.pub
StrictModes no
UsePAM no
PidFile none
CONFIG
mkdir -p /run/sshd
